"""A small Hymba and a small Nemotron-4: trained, compressed by half over several seeds, beside honest controls.

    python benchmarks/compress_families.py --data DIR [--tokens 5M] [--distill 500k] [--work runs/families]

DIR holds `books`, `textbooks`, `techdocs`, `code_python`, each with train and validation files. Teachers learn from the
training text, with a tokenizer of their own; all are judged on validation text that none has seen. Each seed
compresses a teacher to half its parameters by `halflap compress` (scores, search, cut, certificate, distillation), and
trains the same shape from scratch and from a random cut on the same tokens in the same order; the student is exported
and judged once more from there. A finished step is passed over, so that an interrupted run goes on.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import torch

import halflap
from common import RESULTS, THREADS, Report
from halflap.report.arms import Arms, across_seeds, arms_markdown

TEACHERS = ("hymba-2m", "nemotron-4-2m")
CORPORA = ("books", "textbooks", "techdocs", "code_python")
TEACHER_FIT = {
    "sequence_length": 256, "batch_size": 16, "learning_rate": 3e-3, "schedule": "wsd", "warmup": 0.01,
    "decay_fraction": 0.25, "weight_decay": 0.1, "save_every": 50, "evaluate_every": 0,
}  # fmt: skip
STUDENT_FIT = {
    "sequence_length": 256, "batch_size": 8, "learning_rate": 2e-3, "warmup": 0.05, "schedule": "cosine",
    "save_every": 20,
}  # fmt: skip


def main() -> None:
    chosen = options()
    torch.set_num_threads(chosen.threads)
    report = Report("compress_families", chosen.out, chosen.threads)
    text = {part: files(chosen.data, part) for part in ("train", "validation")}
    for name in chosen.teachers:
        teacher = str(chosen.work / name)
        trained = halflap.pretrain(
            name, data=text["train"], tokens=chosen.tokens, dtype="auto", fit=TEACHER_FIT, out=teacher
        )
        shards = {part: tokenised(teacher, part, text[part]) for part in text}
        results = [compressed(teacher, shards, text["validation"], chosen, seed) for seed in chosen.seeds]
        tables = [Arms.load(chosen.work / f"{name}-half-{seed}" / "arms.json") for seed in chosen.seeds]
        table = across_seeds(tables)
        table.save(chosen.work / f"{name}-arms.json")
        (chosen.work / f"{name}-table.md").write_text(arms_markdown(table), "utf-8")
        report.add(
            teacher=name, tokens_trained=trained["tokens"], seeds=list(chosen.seeds),
            verified=all(result["verified"] for result in results),
            parameters_ratio=results[0]["parameters_ratio"],
            exported_loss=[result["exported_loss"] for result in results],
            arms=[dataclasses.asdict(arm) for arm in table.arms],
        )  # fmt: skip
    report.write()


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--teachers", nargs="+", default=TEACHERS, choices=TEACHERS)
    parser.add_argument("--tokens", default="5M", help="of a teacher's training")
    parser.add_argument("--distill", default="500k", help="tokens of every arm")
    parser.add_argument("--eval-tokens", default="100k")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--work", type=Path, default=Path("runs/families"))
    parser.add_argument("--threads", type=int, default=THREADS)
    parser.add_argument("--out", type=Path, default=RESULTS)
    return parser.parse_args()


def files(data: Path, part: str) -> list[str]:
    """Of the training or the validation text; raises SystemExit when there is none."""
    found = [str(file) for name in CORPORA for file in sorted((data / name).glob(f"{part}*"))]
    if not found:
        raise SystemExit(f"{data} has no {part} files of {', '.join(CORPORA)}")
    return found


def tokenised(teacher: str, part: str, text: list[str]) -> list[str]:
    """The text as the teacher's tokens, which every seed reads."""
    places = [f"{teacher}-text/{Path(file).parent.name}-{part}" for file in text]
    for file, place in zip(text, places, strict=True):
        halflap.corpus(data=[file], tokenizer=f"{teacher}/checkpoint", out=place)
    return places


def compressed(
    teacher: str, shards: dict[str, list[str]], judged_on: list[str], chosen: argparse.Namespace, seed: int
) -> dict[str, Any]:
    """The result of `compress` with one seed, and the loss of the student read back from its export.

    All is judged in windows of the length that the teachers learnt from.
    """
    place = f"{teacher}-half-{seed}"
    result = halflap.compress(
        teacher, data=shards["train"], eval_data=shards["validation"], params="50%", tokens=chosen.distill,
        calibration_tokens="64k", eval_tokens=chosen.eval_tokens, eval_context=STUDENT_FIT["sequence_length"],
        controls=["scratch", "random"], shortlist=6, score_tokens="16k", dtype="auto", fit=STUDENT_FIT, seed=seed,
        out=place,
    )  # fmt: skip
    exported = f"{place}-exported"
    halflap.export(place, out=exported)
    judged = halflap.evaluate(
        exported, data=judged_on, tokens=chosen.eval_tokens, context=STUDENT_FIT["sequence_length"],
        out=f"{place}-judged",
    )  # fmt: skip
    return {**result, "exported_loss": judged["loss"]}


if __name__ == "__main__":
    main()
