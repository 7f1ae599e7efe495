"""What one training step receives. Legend: B rows, T tokens of a row."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Batch:
    """Rows of tokens with what is to be predicted at each position.

    tokens    (B, T) int64
    targets   (B, T) int64, the token after each position; any valid id where the weight is 0
    weights   (B, T) float32, the share of a position in the loss: 1, or 0 where there is no target
    segments  (B, T) int64, documents of a row numbered 1, 2, ... and 0 for padding; None when a row is one stream
    """

    tokens: Tensor
    targets: Tensor
    weights: Tensor
    segments: Tensor | None = None

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device; itself when it is there."""
        moved = {
            field.name: value.to(device, non_blocking=True)
            for field in dataclasses.fields(self)
            if (value := getattr(self, field.name)) is not None
        }
        here = all(value is getattr(self, name) for name, value in moved.items())
        return self if here else dataclasses.replace(self, **moved)

    def rows(self, start: int, stop: int) -> Batch:
        """Rows [start, stop), without a copy."""
        parts = {
            field.name: value[start:stop]
            for field in dataclasses.fields(self)
            if (value := getattr(self, field.name)) is not None
        }
        return dataclasses.replace(self, **parts)
