"""Causal attention by blocks (attention.cpp): the fast `ops.attention.attention`, without masks, copies or transposes.

Float32 and bfloat16 on the CPU, for sequences long enough to matter; with gradients only when every key is a key of
this pass. Anything else gets NotImplemented and runs plain.
"""

from __future__ import annotations

import ctypes
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from halflap.ops.native.common import counts, fits, is_narrow, library

TILE = 16  # head sizes are padded to a multiple of it inside
SHORTEST = 16  # queries; for fewer, the plain form has less to set up
COUNTS = (
    *("batch", "time", "keys", "heads", "key_heads", "size", "value_size"),
    *("offset", "window", "meta", "bf16", "threads"),
)
STRIDED = ("q", "k", "v", "out", "dout", "dq", "dk", "dv")
POINTERS = ("q", "k", "v", "start", "out", "lse", "dout", "dq", "dk", "dv", "partial")


class Sizes(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in COUNTS),
        *((f"{name}_strides", ctypes.c_int64 * 3) for name in STRIDED),
        ("scale", ctypes.c_double),
    )


class Pointers(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_void_p) for name in POINTERS)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Any = None,
    *,
    starts: Tensor | None = None,
    offset: int | None = 0,
    window: int | None = None,
    meta: int = 0,
) -> Tensor | Any:
    """As `ops.attention.attention`, or NotImplemented."""
    if offset is None or not query.dim() == key.dim() == value.dim() == 4 or query.shape[2] < SHORTEST:
        return NotImplemented
    (batch, heads, time, size), (_, key_heads, keys, _), width = query.shape, key.shape, value.shape[3]
    if 0 in query.shape or not width or meta < 0 or (window is not None and window < 0):
        return NotImplemented
    expected = (query.shape, (batch, key_heads, keys, size), (batch, key_heads, keys, width))
    if not all(fits(x, *shape) for x, shape in zip((query, key, value), expected)):
        return NotImplemented
    wants = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)
    if not query.dtype == key.dtype == value.dtype or not key_heads or heads % key_heads or (offset and wants):
        return NotImplemented
    if keys != offset + time or not counts(starts, batch, time):
        return NotImplemented
    query, key, value = (x if x.stride(3) == 1 else x.contiguous() for x in (query, key, value))
    return _Attention.apply(query, key, value, starts, Sight(offset, -1 if window is None else window, meta))


class Sight(NamedTuple):
    """What queries see besides `starts`: keys before the first query, the window (-1: none), the meta tokens."""

    offset: int
    window: int
    meta: int


def _sizes(query: Tensor, key: Tensor, value: Tensor, sight: Sight, **strided: Tensor) -> Sizes:
    batch, heads, time, size = query.shape
    strided = {"q": query, "k": key, "v": value, **strided}
    return Sizes(
        batch, time, key.shape[2], heads, key.shape[1], size, value.shape[3], *sight, is_narrow(query),
        torch.get_num_threads(), scale=size**-0.5,
        **{f"{name}_strides": (ctypes.c_int64 * 3)(*tensor.stride()[:3]) for name, tensor in strided.items()},
    )  # fmt: skip


def _pointers(**tensors: Tensor | None) -> Pointers:
    return Pointers(**{name: None if t is None else t.data_ptr() for name, t in tensors.items()})


def _by_token(like: Tensor, size: int) -> Tensor:
    """An empty (B, H, T, h) whose memory is (B, T, H, h), as the output projection wants it."""
    batch, heads, time, _ = like.shape
    return like.new_empty(batch, time, heads, size).transpose(1, 2)


def _padded(size: int) -> int:
    return -(-size // TILE) * TILE


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, starts: Tensor | None, sight: Sight) -> Tensor:
        out, lse = _by_token(query, value.shape[3]), torch.empty(query.shape[:3])
        starts = None if starts is None else starts.to(torch.int64).contiguous()
        sizes = _sizes(query, key, value, sight, out=out)
        pointers = _pointers(q=query, k=key, v=value, start=starts, out=out, lse=lse)
        library().halflap_attention(ctypes.byref(sizes), ctypes.byref(pointers))
        ctx.save_for_backward(query, key, value, out, lse, starts)
        ctx.sight = sight
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, lse, starts = ctx.saved_tensors
        dout = dout.to(query.dtype)
        dout = dout if dout.stride(3) == 1 else dout.contiguous()
        dq, dk, dv = (_by_token(x, x.shape[3]) for x in (query, key, value))
        batch, heads, _, size = query.shape
        partial = torch.empty(batch, heads, key.shape[2], _padded(size) + _padded(value.shape[3]))
        sizes = _sizes(query, key, value, ctx.sight, out=out, dout=dout, dq=dq, dk=dk, dv=dv)
        pointers = _pointers(
            q=query, k=key, v=value, start=starts, out=out, lse=lse, dout=dout, dq=dq, dk=dk, dv=dv, partial=partial
        )
        library().halflap_attention_backward(ctypes.byref(sizes), ctypes.byref(pointers))
        return dq, dk, dv, None, None
