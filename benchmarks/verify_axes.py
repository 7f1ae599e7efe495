"""Certificates on trained weights: every axis of a teacher cut at once, and each of them checked alone (`verify`).

    python benchmarks/verify_axes.py [--models demo/teacher DIR ...]

Each teacher loses a quarter of every axis, and its last layer, by the weights' norms; `max_abs_error` is the largest
difference of a logit between the cut and the masked teacher in float64, `logit_scale` the largest logit.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch

from common import RESULTS, THREADS, Report
from halflap.checkpoints.checkpoint import Checkpoint, load_model
from halflap.commands.students import certify, open_teacher, write_student
from halflap.compress.axes import Sizes, depth_units, largest_sizes
from halflap.compress.metrics import collect
from halflap.compress.prune import apply_plan
from halflap.compress.ranking import plan_for
from halflap.models.config import AttentionConfig, Mamba2Config, ModelConfig
from halflap.recipe import Common

ROOT = Path(__file__).resolve().parents[1]


def three_quarters(config: ModelConfig) -> Sizes:
    """Every size by a quarter, heads in whole groups."""
    sizes: dict[str, Any] = {
        name: 3 * size // 4 for name, size in largest_sizes(config).items() if name != "num_blocks"
    }
    for block in config.blocks:
        if isinstance(block, Mamba2Config):
            sizes["mamba_num_heads"] = max(1, 3 * block.heads_per_group // 4) * block.num_groups
        elif isinstance(block, AttentionConfig):
            kv = max(1, 3 * block.num_key_value_heads // 4)
            sizes["num_key_value_heads"] = kv
            sizes["num_attention_heads"] = max(1, 3 * block.queries_per_key_value_head // 4) * kv
    return Sizes(**sizes, drop_blocks=depth_units(config)[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=[str(ROOT / "demo" / "teacher")])
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--threads", type=int, default=THREADS)
    parser.add_argument("--out", type=Path, default=RESULTS)
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    report = Report("verify_axes", chosen.out, chosen.threads)
    for path in chosen.models:
        teacher = open_teacher(path, Common())
        importance = collect(load_model(teacher.checkpoint.path), [], "weight_norm", teacher=teacher.digest)
        plan = plan_for(importance, teacher.digest, teacher.config, three_quarters(teacher.config), "masked")
        with tempfile.TemporaryDirectory() as directory:
            place = Path(directory)
            write_student(place, teacher, plan, apply_plan(plan, Checkpoint.open(path).tensors()))
            certificate = certify(place, teacher.checkpoint, plan, chosen.tokens)
        model = {"model": Path(path).name, "family": teacher.config.family, "stored": certificate["stored"]}
        for axis in certificate["axes"]:
            report.add(**model, **axis)
        whole = {"max_abs_error": certificate["exact_max_abs_error"], "passed": certificate["passed"]}
        report.add(**model, axis="all", **whole, logit_scale=certificate["logit_scale"])
    report.write()


if __name__ == "__main__":
    main()
