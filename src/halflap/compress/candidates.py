"""Students of one teacher that are run and never written: each part of the teacher is read once for all of them.

A part of the teacher as stored, and one student's part made of it, are what is in memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from halflap.checkpoints.checkpoint import Checkpoint
from halflap.checkpoints.passes import Input, Passes
from halflap.checkpoints.streamed import Part, StreamedModel, read_ahead
from halflap.compress.plan import PruningPlan
from halflap.compress.prune import apply_plan


class Source:
    """A teacher, of which the tensors of the part read last are kept as stored, for models in `dtype` on `device`."""

    def __init__(self, teacher: Checkpoint, dtype: torch.dtype, device: torch.device | str = "cpu") -> None:
        self.teacher, self.dtype, self.device = teacher, dtype, device
        self._held: dict[str, Tensor] = {}

    def whole(self) -> StreamedModel:
        """The teacher itself, its tensors to be changed by whoever has them."""

        def copies(names: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
            return ((name, tensor.clone()) for name, tensor in self._read(names))

        return StreamedModel(self.teacher.config, copies, self.dtype, self.device, partial(read_ahead, self.teacher))

    def cut(self, plan: PruningPlan, name: str, inputs: Sequence[Input]) -> Passes:
        """Passes of a plan's student, in the order of the teacher's parts; it is made in the wide dtype, where factors
        of the gains round nothing."""

        def made(names: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
            return apply_plan(plan, self._read(plan.teacher_names(names)), names, self.dtype)

        model = StreamedModel(plan.student, made, self.dtype, self.device)
        return Passes(name, model, inputs, partial(part_of_student, plan))

    def _read(self, names: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
        self._held = {name: tensor for name, tensor in self._held.items() if name in names}
        for name in names:
            if name not in self._held:
                self._held[name] = self.teacher.read(name)
            yield name, self._held[name]


def part_of_student(plan: PruningPlan, part: Part) -> Part | None:
    """What a part of the teacher is in the student; None for a block that is dropped."""
    if isinstance(part, str):
        return part
    return plan.keep_blocks.index(part) if part in plan.keep_blocks else None
