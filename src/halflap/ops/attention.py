"""Causal grouped-query attention over PyTorch's scaled_dot_product_attention.

Query head i reads key/value head i // (H/K). Scores are scaled by head_dim ** -0.5. Packed documents, windows and
cached keys are expressed by one boolean mask; without any, the causal kernel runs unmasked.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

FEW_QUERIES = 16  # up to here, values wider than keys take three plain products instead of PyTorch's fused kernels


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Callable[[], Tensor | None] = lambda: None,
    *,
    starts: Tensor | None = None,
    offset: int | None = 0,
    window: int | None = None,
    meta: int = 0,
) -> Tensor:
    """Attend: query (B, H, T, h), key (B, K, S, h) and value (B, K, S, v); returns (B, H, T, v).

    mask() makes (B, 1, T, S), True where a query may look; None means causal with S == T, or T == 1 seeing every key.
    The others say the same without a mask, for implementations that need none: query i of row b sees the keys
    starts[b, i] .. offset + i, with a window only those of at least offset + i - window and the first `meta` from
    starts[b, i] on; offset None means that rows differ and only the mask knows.
    """
    del starts, offset, window, meta
    allowed = mask()
    if value.shape[3] != query.shape[3]:
        return _wide_values(query, key, value, allowed)
    if query.shape[2] == 1 and query.dtype == torch.bfloat16 and query.device.type == "cpu":
        return _products(query, key, value, allowed)  # PyTorch's kernel takes two to six times as long for one query
    return _fused(query, key, value, allowed)


def _fused(query: Tensor, key: Tensor, value: Tensor, allowed: Tensor | None) -> Tensor:
    causal = allowed is None and query.shape[2] > 1
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=allowed, is_causal=causal, enable_gqa=query.shape[1] != key.shape[1]
    )


def _wide_values(query: Tensor, key: Tensor, value: Tensor, allowed: Tensor | None) -> Tensor:
    """Values as wide as several keys: the fused kernels, which want equal widths, run once for each part of that width.

    For few queries, whose scores are small, plain products read the keys once.
    """
    size = query.shape[3]
    if query.shape[2] > FEW_QUERIES and value.shape[3] % size == 0:
        parts = [_fused(query, key, part, allowed) for part in value.split(size, 3)]
        return torch.cat(parts, 3)
    return _products(query, key, value, allowed)


def _products(query: Tensor, key: Tensor, value: Tensor, allowed: Tensor | None) -> Tensor:
    """Three plain products, which hold the scores; no key is copied for the queries that share it."""
    size = query.shape[3]
    time, (key_heads, keys) = query.shape[2], key.shape[1:3]
    grouped = query.unflatten(1, (key_heads, -1)).flatten(2, 3)  # (B, K, R T, h)
    scores = torch.matmul(grouped, key.transpose(2, 3)).unflatten(2, (-1, time)) * size**-0.5
    if allowed is None and time > 1:
        allowed = torch.ones(time, keys, dtype=torch.bool, device=query.device).tril()[None, None]
    if allowed is not None:
        scores = scores.masked_fill(~allowed[:, :, None], -torch.inf)
    wide = torch.promote_types(scores.dtype, torch.float32)
    weights = torch.softmax(scores, -1, dtype=wide).to(value.dtype)
    return torch.matmul(weights.flatten(2, 3), value).unflatten(2, (-1, time)).flatten(1, 2)


def packed_mask(runs: Tensor) -> Tensor:
    """Causal mask that keeps documents apart: runs (B, T) to (B, 1, T, T)."""
    time = runs.shape[1]
    causal = torch.ones(time, time, dtype=torch.bool, device=runs.device).tril()
    return ((runs[:, :, None] == runs[:, None, :]) & causal)[:, None]


def cached_mask(positions: Tensor, keys: int) -> Tensor:
    """Queries at `positions` (B, T) see cached keys up to their own position: (B, 1, T, keys)."""
    return (torch.arange(keys, device=positions.device) <= positions[..., None])[:, None]


def within_window(queries: Tensor, keys: Tensor, window: int, meta: int, starts: Tensor | None = None) -> Tensor:
    """Causal mask (B or 1, 1, T, S) for queries and keys at places (T,) and (S,) of a row.

    A query sees itself, `window` places before it and the first `meta` places of its document, which begins at
    starts (B, T), or at 0.
    """
    back = queries[:, None] - keys
    begin = keys if starts is None else keys - starts[..., None]
    seen = (back >= 0) & ((back <= window) | (begin < meta))
    return seen[:, None] if starts is not None else seen[None, None]
