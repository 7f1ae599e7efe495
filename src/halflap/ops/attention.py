"""Causal grouped-query attention over PyTorch's scaled_dot_product_attention.

Query head i reads key/value head i // (H/K). Scores are scaled by head_dim ** -0.5. Packed documents and cached
keys are expressed by one boolean mask; without either, the causal kernel runs unmasked.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Callable[[], Tensor | None] = lambda: None,
    *,
    starts: Tensor | None = None,
    offset: int | None = 0,
) -> Tensor:
    """Attend: query (B, H, T, h), key and value (B, K, S, h); returns (B, H, T, h).

    mask() makes (B, 1, T, S), True where a query may look; None means causal with S == T, or T == 1 seeing every key.
    The other two say the same without a mask, for implementations that need none: query i of row b sees the keys
    starts[b, i] .. offset + i; offset None means that rows differ and only the mask knows.
    """
    del starts, offset
    allowed = mask()
    causal = allowed is None and query.shape[2] > 1
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=allowed, is_causal=causal, enable_gqa=query.shape[1] != key.shape[1]
    )


def packed_mask(runs: Tensor) -> Tensor:
    """Causal mask that keeps documents apart: runs (B, T) to (B, 1, T, T)."""
    time = runs.shape[1]
    causal = torch.ones(time, time, dtype=torch.bool, device=runs.device).tril()
    return ((runs[:, :, None] == runs[:, None, :]) & causal)[:, None]


def cached_mask(positions: Tensor, keys: int) -> Tensor:
    """Queries at `positions` (B, T) see cached keys up to their own position: (B, 1, T, keys)."""
    return (torch.arange(keys, device=positions.device) <= positions[..., None])[:, None]
