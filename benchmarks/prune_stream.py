"""Streaming prune of an 8B shape (random weights, 16 GB in bfloat16) to the 4B shape: peak memory and time.

The time is compared with moving the same bytes: reading all of the teacher's files in order and writing as many bytes
as the student has, flushed to the disk. Each runs in a process of its own, with the teacher's pages dropped from the
cache before. --teacher and --student name other presets for a quick look.
"""

from __future__ import annotations

import json
import math
import os
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from common import Report, arguments, run_apart, spread
from halflap.checkpoints.checkpoint import Checkpoint, write_checkpoint
from halflap.compress.axes import Sizes
from halflap.compress.importance import Importance, score_shapes
from halflap.compress.plan import PruningPlan
from halflap.compress.prune import apply_plan
from halflap.compress.ranking import plan_for
from halflap.models.config import Mamba2Config, MLPConfig, ModelConfig
from halflap.models.layout import layout, shape
from halflap.models.presets import preset

PIECE = 16 << 20  # bytes copied at once


def random_tensors(config: ModelConfig) -> Iterator[tuple[str, torch.Tensor]]:
    """bfloat16 noise, one tensor at a time; a block of noise is repeated, since making 16 GB of it takes minutes."""
    noise = 0.02 * torch.randn(1 << 22, generator=torch.Generator().manual_seed(0))
    for name, dims in layout(config).items():
        size = shape(dims)
        numbers = math.prod(size)
        narrow = noise if name.endswith(("A_log", ".D", "dt_bias")) else noise.to(torch.bfloat16)
        yield name, narrow.repeat(-(-numbers // len(noise)))[:numbers].reshape(size)


def plan_between(teacher: Checkpoint, student: ModelConfig) -> PruningPlan:
    """The plan that reaches the student's widths by random scores."""
    config, generator = teacher.config, torch.Generator().manual_seed(0)
    widths = {name: torch.rand(size, generator=generator) for name, size in score_shapes(config).items()}
    mamba = next(block for block in student.blocks if isinstance(block, Mamba2Config))
    mlp = next(block for block in student.blocks if isinstance(block, MLPConfig))
    sizes = Sizes(student.hidden_size, mlp.intermediate_size, mamba.num_heads, mamba.head_dim, mamba.state_size)
    return plan_for(Importance("random", widths), teacher.digest, config, sizes)


def prune(source: str, target: str, student: str) -> dict[str, float]:
    """Runs in a process of its own."""
    start = time.perf_counter()
    teacher = Checkpoint.open(source)
    plan = plan_between(teacher, preset(student))
    types = {plan.student_name(name): dtype for name, dtype in teacher.dtypes.items()}
    kept = {name: dtype for name, dtype in types.items() if name is not None}
    write_checkpoint(target, plan.student, apply_plan(plan, teacher.tensors()), dtype=kept)
    return {"seconds": time.perf_counter() - start, "peak_bytes": peak()}


def move(source: str, target: str, written: int) -> dict[str, float]:
    """Read every byte of the teacher in order and write `written` bytes; runs in a process of its own."""
    start = time.perf_counter()
    with open(target, "wb") as output:
        for file in sorted(Path(source).glob("*.safetensors")):
            with open(file, "rb", buffering=0) as read:
                while piece := read.read(PIECE):
                    output.write(piece[:written])
                    written -= min(written, len(piece))
        output.flush()
        os.fsync(output.fileno())
    return {"seconds": time.perf_counter() - start, "peak_bytes": peak()}


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def drop_pages(directory: str) -> None:
    for file in Path(directory).glob("*.safetensors"):
        with open(file, "rb") as opened:
            os.fsync(opened.fileno())
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def weight_bytes(directory: str) -> int:
    return sum(file.stat().st_size for file in Path(directory).glob("*.safetensors"))


def main() -> None:
    if sys.argv[1:2] == ["--apart"]:
        kind, *rest = sys.argv[2:]
        print(json.dumps(prune(*rest) if kind == "prune" else move(rest[0], rest[1], int(rest[2]))))
        return
    chosen = arguments(__doc__, teacher="nemotron-h-8b", student="nemotron-h-4b", folder="")
    report = Report("prune_stream", chosen.out, chosen.threads)
    with tempfile.TemporaryDirectory(dir=chosen.folder or None) as scratch:
        source, target, moved = (f"{scratch}/{name}" for name in ("teacher", "student", "moved"))
        config = preset(chosen.teacher)
        write_checkpoint(source, config, random_tensors(config), dtype="bfloat16")
        pruning, moving = [], []
        for _ in range(min(chosen.repeats, 3)):
            drop_pages(source)
            shutil.rmtree(target, ignore_errors=True)
            pruning.append(run_apart("prune_stream.py", "--apart", "prune", source, target, chosen.student))
            drop_pages(source)
            moving.append(run_apart("prune_stream.py", "--apart", "move", source, moved, str(weight_bytes(target))))
            Path(moved).unlink()
        seconds = {"prune": [run["seconds"] for run in pruning], "move": [run["seconds"] for run in moving]}
        rates = {f"{name}_seconds": spread([1 / s for s in taken]) for name, taken in seconds.items()}
        report.add(
            teacher=chosen.teacher, student=chosen.student,
            teacher_gb=weight_bytes(source) / 1e9, student_gb=weight_bytes(target) / 1e9,
            peak_gib=max(run["peak_bytes"] for run in pruning) / 2**30, **rates,
            time_ratio=rates["prune_seconds"]["median"] / rates["move_seconds"]["median"],
        )  # fmt: skip
    report.write()


if __name__ == "__main__":
    main()
