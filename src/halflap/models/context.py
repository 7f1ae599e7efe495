"""What one pass knows about its tokens: the only channel between the model and its mixers."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from halflap.models.config import RopeConfig
from halflap.models.rope import inverse_frequencies, rotary_tables
from halflap.ops.attention import cached_mask, packed_mask


@dataclass
class SequenceContext:
    """One pass over tokens (B, T).

    positions (B, T) count from each document's start; runs (B, T) number the documents of a row, None when each row
    is one; lengths (B,) are the valid right-padded tokens of a cached pass, None when all are; `past` is True when
    the cache already holds tokens.
    """

    positions: Tensor
    runs: Tensor | None = None
    starts: Tensor | None = None  # (B, T) where each token's document begins in its row; None when each row is one
    lengths: Tensor | None = None
    past: bool = False
    uniform: bool = True  # all rows of the cache equally long
    used: int = 0  # tokens of the longest row once this pass is written
    _masks: dict[int, Tensor | None] = field(default_factory=dict)
    _rotary: dict[tuple[RopeConfig, int, torch.dtype], tuple[Tensor, Tensor]] = field(default_factory=dict)

    def attention_mask(self, keys: int) -> Tensor | None:
        """Mask (B, 1, T, keys), made once a pass; None where plain causal attention is meant."""
        if keys not in self._masks:
            self._masks[keys] = self._make_mask(keys)
        return self._masks[keys]

    def _make_mask(self, keys: int) -> Tensor | None:
        time = self.positions.shape[1]
        if self.runs is not None:
            return packed_mask(self.runs)
        if not self.past or (time == 1 and self.uniform):
            return None
        return cached_mask(self.positions, keys)

    @property
    def offset(self) -> int | None:
        """Keys before the first query, the same in every row; None when rows differ."""
        if not self.past:
            return 0
        return self.used - self.positions.shape[1] if self.uniform else None

    def rotary(self, rope: RopeConfig, head_dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin (B, 1, T, rotary) of this pass, made once for all blocks with the same rotary embedding."""
        key = (rope, head_dim, dtype)
        if key not in self._rotary:
            self._rotary[key] = rotary_tables(self.positions, inverse_frequencies(rope, head_dim), dtype)
        return self._rotary[key]
