"""What several sizes lose by sharing one checkpoint: joint distillation beside a run of `compress` for each size.

The demo's teacher is compressed with `--elastic` on some tokens, dealt to the whole and the nested sizes, and by itself
to each of the budgets on as many tokens as that size saw, and on as many as all of them saw together. A budget between
the nested ones, which nobody trained, is cut from the elastic checkpoint (timed) and judged too. Losses are nats a
token of held-out text. A finished run is found again, so that an interrupted study goes on.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

import halflap
from common import RESULTS, THREADS, Report, seconds

ROOT = Path(__file__).resolve().parents[1]
CONTEXT = 512  # the teacher's training's, and the students'
FIT = {
    "sequence_length": CONTEXT, "batch_size": 8, "learning_rate": 2e-3, "warmup": 0.05, "schedule": "cosine",
    "save_every": 20,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(ROOT / "demo" / "teacher"))
    parser.add_argument("--data", default=str(ROOT / "demo" / "text" / "train.jsonl.xz"))
    parser.add_argument("--eval-data", default=str(ROOT / "demo" / "text" / "validation.jsonl.xz"))
    parser.add_argument("--nested", nargs="+", default=["75%", "50%"])
    parser.add_argument("--between", nargs="+", default=["62%"])
    parser.add_argument("--tokens", type=int, default=750_000, help="of the joint distillation")
    parser.add_argument("--calibration-tokens", default="64k")
    parser.add_argument("--eval-tokens", default="60k")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--work", type=Path, default=Path("runs/elastic-study"))
    parser.add_argument("--threads", type=int, default=THREADS)
    parser.add_argument("--out", type=Path, default=RESULTS)
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    report = Report("elastic", chosen.out, chosen.threads)
    importance = halflap.score(
        chosen.model, data=[chosen.data], tokens=chosen.calibration_tokens, out=str(chosen.work / "score")
    )["path"]
    for seed in chosen.seeds:
        elastic = compress(chosen, importance, f"elastic-{seed}", seed, chosen.tokens, elastic=chosen.nested)
        each = chosen.tokens // (1 + len(chosen.nested))
        report.add(seed=seed, size="whole", teacher=elastic["teacher"]["loss"], elastic=elastic["whole"]["loss"])
        for row in elastic["nested"]:
            value = row["budget"].split()[-1]
            alone = {
                tokens: compress(chosen, importance, f"{value}-{tokens}-{seed}", seed, tokens, params=value)
                for tokens in (each, chosen.tokens)
            }
            report.add(
                seed=seed, size=value, parameters=row["parameters"], as_cut=row["loss_as_cut"], elastic=row["loss"],
                alone_on_its_tokens=alone[each]["student"]["loss"],
                alone_on_all=alone[chosen.tokens]["student"]["loss"],
                alone_as_cut=alone[each]["pruned"]["loss"], sizes=row["sizes"],
            )  # fmt: skip
        for value in chosen.between:
            report.add(seed=seed, size=value, **between(chosen, importance, elastic["path"], seed, value))
    report.write()


def compress(
    chosen: argparse.Namespace, importance: str, name: str, seed: int, tokens: int, **how: Any
) -> dict[str, Any]:
    return halflap.compress(
        chosen.model, data=[chosen.data], eval_data=[chosen.eval_data], importance=importance, tokens=tokens,
        eval_tokens=chosen.eval_tokens, eval_context=CONTEXT, shortlist=6, score_tokens="16k", dtype="auto", fit=FIT,
        seed=seed, out=str(chosen.work / name), **how,
    )  # fmt: skip


def between(chosen: argparse.Namespace, importance: str, elastic: str, seed: int, value: str) -> dict[str, Any]:
    """A size that was not trained: cut from the elastic checkpoint, and from the teacher."""
    places = {name: str(chosen.work / f"{value}-{name}-{seed}") for name in ("from-elastic", "from-teacher")}
    cut = {
        "from-elastic": lambda: halflap.prune(elastic, from_elastic=True, params=value, out=places["from-elastic"]),
        "from-teacher": lambda: halflap.prune(
            chosen.model, importance=importance, params=value, out=places["from-teacher"]
        ),
    }
    took = {name: seconds(run) for name, run in cut.items()}
    losses = {
        name: halflap.evaluate(
            place, data=[chosen.eval_data], tokens=chosen.eval_tokens, context=CONTEXT, out=f"{place}-judged"
        )["loss"]
        for name, place in places.items()
    }
    return {
        "elastic": losses["from-elastic"],
        "as_cut_from_teacher": losses["from-teacher"],
        "prune_seconds": took["from-elastic"],
    }


if __name__ == "__main__":
    main()
