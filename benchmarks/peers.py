"""Five ways to make SmolLM2-135M smaller, to the same budgets, on the same text, with the same distillation.

    python benchmarks/peers.py --model FILE.gguf|DIR --data DIR [--sizes 75% 50%] [--arms halflap depth ...]
        [--stages compress judge_cut distill judge] [--tokens 2M] [--work runs/peers]

halflap        score, search and prune: what `compress` does before it distils
torch_pruning  Torch-Pruning as its LLM example has it, the best of four settings (torch_pruning_arm.py)
random         the sizes that halflap found, what stays of each axis chosen at random
weight_norm    the same sizes by the norm of the weights
depth          whole layers go, those whose removal changes the output least; nothing else is cut

Distillation learns the teacher's largest logits, which it stores in one pass for all arms and sizes. A size is a share
of the parameters beside the embeddings. DIR of --data is as for smollm2.py. Compression reads training text alone,
which is tokenised before; the test files (WikiText-2, LAMBADA) are read by the models as cut and as distilled. The cut
of each arm runs in a process of its own, anew if it was interrupted, so that its seconds and peak memory are those of
the whole; random and weight_norm spare the search. Every finished stage of an arm is kept under --work and passed over
the next time, and the rows hold what is there.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import halflap
import torch_pruning_arm
from common import Report, run_measured
from halflap.checkpoints.checkpoint import Checkpoint
from halflap.commands.memory import LOGITS
from halflap.commands.shortlist import STORED_LOGITS
from halflap.compress.axes import Sizes, depth_units, resize
from halflap.compress.plan import PruningPlan
from halflap.models.count import count_non_embedding_parameters
from smollm2_parts import (
    CORPORA,
    begin,
    cut,
    cut_alike,
    distilled,
    files,
    imported,
    judged,
    kept,
    parser_of,
    planned,
    scored,
    text_of,
)

ARMS = ("halflap", "torch_pruning", "random", "weight_norm", "depth")
STAGES = ("compress", "judge_cut", "distill", "judge")


def main() -> None:
    parser = parser_of(__doc__, work="runs/peers")
    parser.add_argument("--sizes", nargs="+", default=["75%", "50%"], help="shares to keep, each with its percent sign")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS)
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES)
    parser.add_argument("--apart", nargs=3, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    begin(chosen)
    if chosen.apart:
        print(json.dumps(cut_of(*chosen.apart, chosen)))
        return
    if "torch_pruning" in chosen.arms:
        torch_pruning_arm.library()
    report = Report("peers", chosen.out, chosen.threads)
    teacher = imported(chosen.model, chosen.work)
    tokenise(teacher, chosen)
    for stage in STAGES:
        for size in chosen.sizes if stage in chosen.stages else ():
            for arm in chosen.arms:
                run_stage(stage, arm, size, teacher, chosen)
    if "judge" in chosen.stages:
        kept(chosen.work / "teacher.json", lambda: judged(teacher, chosen))
    for row, tries in rows_of(chosen):
        report.add(**row)
        report.rows[-1]["tries"] = tries
    report.write()


def shards(part: str, chosen: argparse.Namespace) -> list[str]:
    """Of the training or the validation text."""
    return [str(chosen.work / "text" / f"{name}-{part}") for name in CORPORA]


def tokenise(teacher: Path, chosen: argparse.Namespace) -> None:
    for part in ("train", "validation"):
        for file, out in zip(files(chosen, part), shards(part, chosen), strict=True):
            halflap.corpus(data=[file], tokenizer=str(teacher), out=out)


def stored_logits(chosen: argparse.Namespace) -> dict[str, Any]:
    """The loss of every arm at every size: all read the same tokens, so the teacher reads them once for all."""
    return {"top_k": STORED_LOGITS, "top_k_in": str(chosen.work / LOGITS)}


def place_of(arm: str, size: str, chosen: argparse.Namespace) -> Path:
    return chosen.work / size.rstrip("%") / arm


def run_stage(stage: str, arm: str, size: str, teacher: Path, chosen: argparse.Namespace) -> None:
    """A stage that is kept already is passed over; one whose cut is not there cannot be run."""
    place = place_of(arm, size, chosen)
    if stage == "compress":
        compressed(arm, size, chosen)
        return
    if not (place / "compress.json").exists():
        raise SystemExit(f"{arm} at {size} has not been cut; add compress to --stages")
    student = place / read(place / "compress.json")["chosen"] / "pruned" / "checkpoint"
    if stage == "judge_cut":
        kept(place / "judge_cut.json", lambda: judged(student, chosen))
        return
    text, validation = text_of(shards("train", chosen), chosen), shards("validation", chosen)
    found = distilled(student, teacher, text, validation, chosen.tokens, place / "distilled", **stored_logits(chosen))
    if stage == "judge":
        kept(place / "judge.json", lambda: {"tokens_distilled": chosen.tokens, **judged(found, chosen)})


# --- the cuts, each in a process of its own --------------------------------------------------------------------------


def compressed(arm: str, size: str, chosen: argparse.Namespace) -> dict[str, Any]:
    """What was tried for the arm, the best of it, the seconds of all and the peak memory; made if need be."""
    place = place_of(arm, size, chosen)
    if arm in ("random", "weight_norm"):
        compressed("halflap", size, chosen)  # whose sizes they take

    def one(name: str) -> dict[str, Any]:
        shutil.rmtree(place / name, ignore_errors=True)
        words = (*sys.argv[1:], "--apart", arm, name, size)
        return run_measured(sys.executable, __file__, *words, threads=chosen.threads, shown=True)

    def all_tries() -> dict[str, Any]:
        tries = {name: kept(place / f"{name}.json", lambda name=name: one(name)) for name in tries_of(arm)}
        best = min(tries, key=lambda name: tries[name]["result"].get("loss", 0.0))
        return {
            "seconds": sum(done["seconds"] for done in tries.values()),
            "peak_gib": max(done["peak_bytes"] for done in tries.values()) / 2**30,
            "chosen": best,
            "tries": tries,
        }

    return kept(place / "compress.json", all_tries)


def tries_of(arm: str) -> tuple[str, ...]:
    return torch_pruning_arm.TRIES if arm == "torch_pruning" else ("cut",)


def cut_of(arm: str, name: str, size: str, chosen: argparse.Namespace) -> dict[str, Any]:
    """Make one cut, in pruned/checkpoint of its place; runs in a process of its own."""
    teacher, train = imported(chosen.model, chosen.work), shards("train", chosen)
    place, share = place_of(arm, size, chosen) / name, float(size.rstrip("%")) / 100
    text = text_of(train, chosen)
    plan_file = place_of("halflap", size, chosen) / "cut" / "pruning_plan.json"
    if arm == "torch_pruning":
        return torch_pruning_arm.cut(teacher, train, place, name, share)
    if arm == "halflap":
        planned(teacher, text, place, size).save(plan_file)
        cut(teacher, place, plan=str(plan_file))
    elif arm == "depth":
        shallower(teacher, text, place, share)
    else:
        cut_alike(teacher, text, place, arm, PruningPlan.load(plan_file))
    return {}


def shallower(teacher: Path, text: dict[str, Any], place: Path, share: float) -> None:
    """With as many layers as the budget allows."""
    config = Checkpoint.open(teacher).config
    budget = share * count_non_embedding_parameters(config)
    step, count = len(depth_units(config)[0]), len(config.blocks)
    left = next(
        left for left in range(count, 0, -step)
        if count_non_embedding_parameters(resize(config, tuple(range(left)), Sizes())) <= budget
    )  # fmt: skip
    cut(teacher, place, importance=scored(teacher, text, place), **{"sizes.num_blocks": left})


# --- what is there ---------------------------------------------------------------------------------------------------


def rows_of(chosen: argparse.Namespace) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """A row for each arm and size that has been cut, with what was judged of it; and what was tried for it."""
    rows: list[tuple[dict[str, Any], dict[str, Any]]] = []
    if (chosen.work / "teacher.json").exists():
        rows.append(({"arm": "teacher", "as_it_is": read(chosen.work / "teacher.json")}, {}))
    for size in chosen.sizes:
        for arm in chosen.arms:
            place = place_of(arm, size, chosen)
            if not (place / "compress.json").exists():
                continue
            made = read(place / "compress.json")
            row = {"arm": arm, "size": size, **{name: made[name] for name in ("seconds", "peak_gib", "chosen")}}
            for name, stage in (("as_cut", "judge_cut"), ("distilled", "judge")):
                if (place / f"{stage}.json").exists():
                    row[name] = read(place / f"{stage}.json")
            rows.append((row, made["tries"]))
    return rows


def read(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text())


if __name__ == "__main__":
    main()
