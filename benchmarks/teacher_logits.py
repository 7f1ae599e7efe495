"""A teacher's k best log-probabilities on disk: bytes a token, what is lost, and tokens a second, for several k.

`error` is KL(full || stored with the rest spread evenly) and `gap` the share of the full forward KL to a student that
the stored form does not see (its tail is one category), both on the first batch. `store` runs the teacher on a batch,
writes it and measures its error; `read` brings one back; `live` and `stored` are a student's forward and backward pass
by either teacher. Weights are random unless --model names a checkpoint, and random weights have the flattest, hardest
distributions.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from common import SIZES, Report, arguments, interleave, our_model, random_model, random_tokens, spread
from halflap.checkpoints.checkpoint import load_model
from halflap.data.batch import Batch
from halflap.models.model import HybridModel
from halflap.train.objectives.distillation import Distillation, TopKDistillation
from halflap.train.teacher_logits import TopKTeacher, store_teacher_logits

KEPT = (16, 32, 64, 128, 256)


def main() -> None:
    quick = {"sizes": ["55m"], "preset": "nemotron-h-tiny", "batch": 2, "tokens": 64}
    chosen = arguments(__doc__, quick, model="", preset="", batch=8, tokens=512)
    report = Report("teacher_logits", chosen.out, chosen.threads)
    for size in chosen.sizes:
        teacher = load_model(chosen.model) if chosen.model else our_model(chosen.preset or size)
        student = random_model(teacher.config, seed=1).train()
        tokens = random_tokens(teacher, chosen.batch, chosen.tokens + 1)
        batch = Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), torch.ones(chosen.batch, chosen.tokens))
        for k in KEPT:
            name = chosen.model or chosen.preset or SIZES[size]
            report.add(teacher=name, k=k, **measured(teacher, student, batch, k, chosen.repeats))
    report.write()


def measured(teacher: HybridModel, student: HybridModel, batch: Batch, k: int, repeats: int) -> dict[str, Any]:
    """A row of the table; k is at most the vocabulary's size."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "kept"
        stored = store_teacher_logits(teacher, lambda index: batch, 1, place, k=k)
        known = TopKTeacher(place)
        written = iter(range(repeats + 2))

        def store() -> None:
            store_teacher_logits(teacher, lambda index: batch, 1, Path(folder) / str(next(written)), k=k)

        live, from_disk = Distillation(teacher), TopKDistillation()
        full = float(live.loss(student, batch).sum.detach())
        seen = float(from_disk.loss(student, known.read(0, batch)).sum.detach())
        sides: dict[str, Callable[[], Any]] = {
            "store": store,
            "read": lambda: known.read(0, batch),
            "live": lambda: live.loss(student, batch).sum.backward(),
            "stored": lambda: from_disk.loss(student, known.read(0, batch)).sum.backward(),
        }
        times = interleave(sides, repeats)
    speeds = {f"{name}_tokens_per_second": spread(taken, batch.tokens.numel()) for name, taken in times.items()}
    return {"bytes_per_token": stored.bytes_per_token, "error": stored.error, "gap": 1 - seen / full, **speeds}


if __name__ == "__main__":
    main()
