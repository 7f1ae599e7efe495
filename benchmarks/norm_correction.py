"""Which correction of the norms makes the best student: none, masked or calibrated (compress/correction.py).

The demo's teacher is cut along each axis that a norm averages over, and along all of them, under each correction; each
student is judged on held-out text as cut and after a short distillation, over several seeds (the order of the text).
Losses are nats a token. A finished run is found again, so that an interrupted study goes on.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

import torch

import halflap
from common import RESULTS, THREADS, Report

ROOT = Path(__file__).resolve().parents[1]
CORRECTIONS = ("none", "masked", "calibrated")
SHARE = 0.75
CUTS = {
    "hidden": ("hidden_size",),
    "mamba heads": ("mamba_num_heads",),
    "mamba channels": ("mamba_head_dim",),
    "all": ("hidden_size", "mamba_num_heads", "mamba_head_dim", "intermediate_size"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(ROOT / "demo" / "teacher"))
    parser.add_argument("--data", default=str(ROOT / "demo" / "text" / "train.jsonl.xz"))
    parser.add_argument("--eval-data", default=str(ROOT / "demo" / "text" / "validation.jsonl.xz"))
    parser.add_argument("--tokens", default="60k", help="tokens of the short distillation")
    parser.add_argument("--calibration-tokens", default="64k")
    parser.add_argument("--eval-tokens", default="60k")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--work", type=Path, default=Path("runs/norm-correction"))
    parser.add_argument("--threads", type=int, default=THREADS)
    parser.add_argument("--out", type=Path, default=RESULTS)
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    report = Report("norm_correction", chosen.out, chosen.threads)
    scored = halflap.score(
        chosen.model, data=[chosen.data], tokens=chosen.calibration_tokens, out=str(chosen.work / "score")
    )
    sizes = {row["axis"]: row["size"] for row in scored["axes"]}
    for cut, axes in CUTS.items():
        target = {f"sizes.{axis}": round(SHARE * sizes[axis]) for axis in axes}
        for correction in CORRECTIONS:
            runs = [student(chosen, cut, correction, target, scored["path"], seed) for seed in chosen.seeds]
            report.add(
                cut=cut,
                sizes={name.removeprefix("sizes."): size for name, size in target.items()},
                correction=correction,
                teacher=runs[0]["teacher"]["loss"],
                as_cut=runs[0]["pruned"]["loss"],
                distilled=over_seeds([run["student"]["loss"] for run in runs]),
                tokens=runs[0]["student"]["tokens_trained"],
            )
    report.write()


def student(
    chosen: argparse.Namespace, cut: str, correction: str, target: dict[str, int], importance: str, seed: int
) -> dict[str, Any]:
    return halflap.compress(
        chosen.model,
        data=[chosen.data],
        eval_data=[chosen.eval_data],
        importance=importance,
        norm_correction=correction,
        tokens=chosen.tokens,
        eval_tokens=chosen.eval_tokens,
        seed=seed,
        dtype="auto",
        out=str(chosen.work / f"{cut.replace(' ', '-')}-{correction}-{seed}"),
        **target,
        **{"fit.sequence_length": 512, "fit.batch_size": 8, "fit.learning_rate": 1e-3, "fit.schedule": "cosine"},
    )


def over_seeds(losses: list[float]) -> dict[str, Any]:
    return {"median": statistics.median(losses), "least": min(losses), "most": max(losses), "runs": len(losses)}


if __name__ == "__main__":
    main()
