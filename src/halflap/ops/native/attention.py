"""Causal attention by blocks (attention.cpp): the fast `ops.attention.attention`, without masks, copies or transposes.

Float32 and bfloat16 on the CPU, for sequences long enough to matter; with gradients only when every key is a key of
this pass. Anything else gets NotImplemented and runs plain.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from halflap.ops.native.common import counts, fits, is_narrow, library

TILE = 16  # head sizes are padded to a multiple of it inside
SHORTEST = 16  # queries; for fewer, the plain form has less to set up
COUNTS = ("batch", "time", "keys", "heads", "key_heads", "size", "offset", "bf16", "threads")
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
    if window is not None:
        return NotImplemented
    if offset is None or not query.dim() == key.dim() == 4 or 0 in query.shape or query.shape[2] < SHORTEST:
        return NotImplemented
    (batch, heads, time, size), (_, key_heads, keys, _) = query.shape, key.shape
    if not (fits(query, *query.shape) and all(fits(x, batch, key_heads, keys, size) for x in (key, value))):
        return NotImplemented
    wants = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)
    if not query.dtype == key.dtype == value.dtype or not key_heads or heads % key_heads or (offset and wants):
        return NotImplemented
    if keys != offset + time or not counts(starts, batch, time):
        return NotImplemented
    query, key, value = (x if x.stride(3) == 1 else x.contiguous() for x in (query, key, value))
    return _Attention.apply(query, key, value, starts, offset)


def _sizes(query: Tensor, key: Tensor, offset: int, **strided: Tensor) -> Sizes:
    batch, heads, time, size = query.shape
    return Sizes(
        batch, time, key.shape[2], heads, key.shape[1], size, offset, is_narrow(query),
        torch.get_num_threads(), scale=size**-0.5,
        **{f"{name}_strides": (ctypes.c_int64 * 3)(*tensor.stride()[:3]) for name, tensor in strided.items()},
    )  # fmt: skip


def _pointers(**tensors: Tensor | None) -> Pointers:
    return Pointers(**{name: None if t is None else t.data_ptr() for name, t in tensors.items()})


def _by_token(query: Tensor) -> Tensor:
    """An empty (B, H, T, h) whose memory is (B, T, H, h), as the output projection wants it."""
    batch, heads, time, size = query.shape
    return query.new_empty(batch, time, heads, size).transpose(1, 2)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, starts: Tensor | None, offset: int) -> Tensor:
        out, lse = _by_token(query), torch.empty(query.shape[:3])
        starts = None if starts is None else starts.to(torch.int64).contiguous()
        sizes = _sizes(query, key, offset, q=query, k=key, v=value, out=out)
        pointers = _pointers(q=query, k=key, v=value, start=starts, out=out, lse=lse)
        library().halflap_attention(ctypes.byref(sizes), ctypes.byref(pointers))
        ctx.save_for_backward(query, key, value, out, lse, starts)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, lse, starts = ctx.saved_tensors
        dout = dout.to(query.dtype)
        dout = dout if dout.stride(3) == 1 else dout.contiguous()
        dq, dk, dv = _by_token(query), _by_token(key), _by_token(value)
        batch, heads, _, size = query.shape
        partial = torch.empty(batch, heads, 2, key.shape[2], -(-size // TILE) * TILE)
        sizes = _sizes(query, key, 0, q=query, k=key, v=value, out=out, dout=dout, dq=dq, dk=dk, dv=dv)
        pointers = _pointers(
            q=query, k=key, v=value, start=starts, out=out, lse=lse, dout=dout, dq=dq, dk=dk, dv=dv, partial=partial
        )
        library().halflap_attention_backward(ctypes.byref(sizes), ctypes.byref(pointers))
        return dq, dk, dv, None, None
