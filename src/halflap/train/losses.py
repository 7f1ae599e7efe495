"""What a loss is: a sum over the batch and, for show, metrics as (sum, count); no loss divides.

Only the training loop divides, by the count of the whole step over all micro-batches and ranks, so the gradient
does not depend on how a step is cut up.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from halflap.parallel import mesh
from halflap.train.numerics import precision


@dataclass(frozen=True)
class LossTerms:
    """The differentiable sum, and detached metrics whose mean is sum / count over everything they are added over."""

    sum: Tensor
    metrics: Mapping[str, tuple[Tensor | float, Tensor | float]] = field(default_factory=dict)


class Objective(Protocol):
    """A training method. `count` is what the loss is a mean over (tokens, pairs); it must not need the model."""

    def count(self, batch: Any) -> float: ...

    def loss(self, model: nn.Module, batch: Any) -> LossTerms: ...


@torch.no_grad()
def mean_loss(
    model: nn.Module, objective: Objective, batches: Sequence[Any], device: torch.device, dtype: torch.dtype
) -> dict[str, float]:
    """Loss and metrics of `objective` over the batches of all ranks, each sum divided by its exact count."""
    totals: dict[str, list[float]] = {}
    for batch in batches:
        with precision(device, dtype):
            terms = objective.loss(model, batch.to(device))
        for name, (total, number) in {"loss": (terms.sum, objective.count(batch)), **terms.metrics}.items():
            held = totals.setdefault(name, [0.0, 0.0])
            totals[name] = [held[0] + float(total), held[1] + float(number)]
    return {name: total / number for name, (total, number) in add_over_ranks(totals, device).items() if number}


def add_over_ranks(totals: Mapping[str, Sequence[Tensor | float]], device: torch.device) -> dict[str, list[float]]:
    """Each [sum, count] summed over ranks; every rank must name the same ones."""
    names = sorted(totals)
    flat = [float(value) for name in names for value in totals[name]]
    summed = mesh.all_reduce_sum(torch.tensor(flat, dtype=torch.float64, device=mesh.wire(device))).tolist()
    return {name: summed[2 * i : 2 * i + 2] for i, name in enumerate(names)}
