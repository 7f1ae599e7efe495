"""Draws from logits (sampling.cpp), a row a task: one pass over a row, two more for top-p."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from halflap.ops.native.common import library, long, pointer
from halflap.ops.sampling import Draw


class Asked(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_double) for name in ("temperature", "top_p", "min_p")),
        ("top_k", ctypes.c_int64),
        ("key", ctypes.c_uint64),
    )


def draw(logits: Tensor, rows: Sequence[Draw]) -> Tensor | Any:
    """As `ops.sampling.draw`, or NotImplemented: for other types than float32 and rows that do not lie together."""
    if logits.dtype != torch.float32 or logits.dim() != 2 or not logits.numel() or logits.stride(1) != 1:
        return NotImplemented
    asked = (Asked * len(rows))(*(Asked(r.temperature, r.top_p, r.min_p, r.top_k, r.key) for r in rows))
    tokens = torch.empty(len(rows), dtype=torch.int64)
    library().halflap_draw(
        *long(*logits.shape), pointer(logits), *long(logits.stride(0)), asked, pointer(tokens), torch.get_num_threads()
    )
    return tokens
