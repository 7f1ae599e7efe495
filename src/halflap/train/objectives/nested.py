"""Train several students that share weights as one model: each row of a step is one student's, in turn.

A row is a student's by its place in the whole order of rows, so a step has the same loss however it is cut into
micro-batches, a resumed run deals as an uninterrupted one, and every student sees as many rows as the others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from halflap.data.batch import Batch
from halflap.train.losses import LossTerms, Objective


@dataclass(frozen=True, eq=False)
class DealtBatch(Batch):
    """A batch with the student of each row, (B,) int64."""

    student: Tensor | None = None

    def of(self, student: int) -> Batch | None:
        """The rows of one student; None when it has none."""
        assert self.student is not None
        mine = (self.student == student).nonzero()[:, 0]
        segments = None if self.segments is None else self.segments[mine]
        return Batch(self.tokens[mine], self.targets[mine], self.weights[mine], segments) if len(mine) else None


def deal(batch: Batch, first: int, students: int) -> DealtBatch:
    """Deal the rows of a batch, of which the first is row `first` of all rows, to students 0, 1, ... in turn."""
    turns = torch.arange(first, first + len(batch.tokens)) % students
    return DealtBatch(batch.tokens, batch.targets, batch.weights, batch.segments, turns)


class Nested:
    """An objective of each student on its own rows; its loss is a metric by the student's name.

    students: by name, functions of the model that is trained (`compress.slices.Slice`), in the order of dealing.
    """

    def __init__(self, objective: Objective, students: Mapping[str, Callable[[Any], Any]]) -> None:
        self.objective, self.students = objective, dict(students)

    def count(self, batch: DealtBatch) -> float:
        return self.objective.count(batch)

    def loss(self, model: Any, batch: DealtBatch) -> LossTerms:
        sums: list[Tensor] = []
        metrics: dict[str, tuple[Tensor | float, Tensor | float]] = {}
        for place, (name, student) in enumerate(self.students.items()):
            rows = batch.of(place)
            if rows is None:  # every rank has every name
                metrics[name] = (0.0, 0.0)
                continue
            terms = self.objective.loss(student(model), rows)
            sums.append(terms.sum)
            metrics[name] = (terms.sum.detach(), self.objective.count(rows))
            for shared, (total, number) in terms.metrics.items():
                held = metrics.get(shared, (0.0, 0.0))
                metrics[shared] = (held[0] + total, held[1] + number)
        return LossTerms(torch.stack(sums).sum(), metrics)
