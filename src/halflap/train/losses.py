"""What a loss is: a sum over the batch and, for show, metrics as (sum, count); no loss divides.

Only the training loop divides, by the count of the whole step over all micro-batches and ranks, so the gradient
does not depend on how a step is cut up.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor, nn


@dataclass(frozen=True)
class LossTerms:
    """The differentiable sum, and detached metrics whose mean is sum / count over everything they are added over."""

    sum: Tensor
    metrics: Mapping[str, tuple[Tensor | float, Tensor | float]] = field(default_factory=dict)


class Objective(Protocol):
    """A training method. `count` is what the loss is a mean over (tokens, pairs); it must not need the model."""

    def count(self, batch: Any) -> float: ...

    def loss(self, model: nn.Module, batch: Any) -> LossTerms: ...
