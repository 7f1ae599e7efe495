"""What a search measures of candidates whose teacher is read a block at a time: of all of them by one reading."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from halflap.checkpoints.passes import Input, Passes, carry
from halflap.checkpoints.shelf import Shelf
from halflap.checkpoints.streamed import Part, StreamedModel
from halflap.commands.students import Teacher
from halflap.compress.candidates import Source, part_of_student
from halflap.compress.local import trained_at
from halflap.compress.partial import Scratch
from halflap.compress.plan import PruningPlan
from halflap.data.batch import Batch
from halflap.models.model import HybridModel
from halflap.train.numerics import precision, resolve_dtype
from halflap.train.objectives.agreement import with_teacher_tokens

Measure = Callable[[Any, Sequence[Any], Teacher], dict[str, float]]
"""(model, batches, teacher) to what is measured of it, by the names of `search.Trial`."""


class Coming:
    """The hidden states of batches, to be asked for in their order, as if a model in memory computed each."""

    def __init__(self, model: StreamedModel, states: Iterator[Tensor]) -> None:
        self.model, self._states = model, states

    def hidden_states(self, tokens: Tensor, *, segments: Tensor | None = None) -> Tensor:
        del tokens, segments
        return next(self._states)

    @property
    def head_weight(self) -> Tensor:
        return self.model.head_weight


def measured(
    teacher: Teacher,
    plans: Sequence[PruningPlan],
    batches: Sequence[Batch],
    measure: Measure,
    scratch: Scratch,
    *,
    with_teacher: bool,
    trained: Path,
) -> Iterator[dict[str, float]]:
    """What is measured of each plan's student, in order, in float32.

    with_teacher: the batches are given the teacher's likeliest tokens. trained: folder of blocks that the search has
    trained, which students have in place of theirs. Streams lie in the scratch directory, 4 D bytes
    a token of every student; interrupted, they are gone on with.
    """
    assert scratch.directory is not None
    moved = [batch.to(teacher.device) for batch in batches]
    inputs: list[Input] = [(batch.tokens, batch.segments) for batch in moved]
    source = Source(teacher.checkpoint, torch.float32, teacher.device)
    whole = Passes("teacher", source.whole(), inputs)
    students = [
        dataclasses.replace(source.cut(plan, plan.digest, inputs), alter=partial(_put_trained, trained, plan))
        for plan in plans
    ]
    shelf, dtype = Shelf(scratch.directory, scratch.made_from), resolve_dtype(teacher.dtype, teacher.device)
    with torch.inference_mode(), precision(teacher.device, dtype):
        carry([whole, *students] if with_teacher else students, teacher.config, shelf)
    if with_teacher:
        coming: Any = Coming(whole.model, whole.hidden_states(shelf))
        batches = with_teacher_tokens(coming, batches, teacher.device, dtype)
        del coming  # and with it the teacher's head
    for passes in students:
        yield measure(Coming(passes.model, passes.hidden_states(shelf)), batches, teacher)
    shelf.remove()


def _put_trained(folder: Path, plan: PruningPlan, student: HybridModel, part: Part) -> None:
    """The trained weights of a part, named as in the teacher, in place of the student's, where there are any."""
    if isinstance(at := part_of_student(plan, part), int):
        student.load_state_dict(trained_at(folder, plan, at), strict=False)
