"""Depthwise causal convolution with SiLU in one pass (convolution.cpp): the fast `ops.conv.conv_silu`.

For autograd it keeps its input alone. Float32 and bfloat16 on the CPU, widths 2 to 4; anything else gets
NotImplemented and runs plain.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from halflap.ops.native.common import TAKEN, is_narrow, library, reach

COUNTS = ("batch", "time", "channels", "width", "stride", "bf16", "threads")
POINTERS = ("x", "weight", "bias", "state", "reach", "y", "dy", "dx", "dweight", "dbias")


class Sizes(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_int64) for name in COUNTS)


class Pointers(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_void_p) for name in POINTERS)


def conv_silu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    initial_state: Tensor | None = None,
    runs: Tensor | None = None,
) -> Tensor | Any:
    """As `ops.conv.conv_silu`, or NotImplemented."""
    if not TAKEN.of_convolution(x, weight, bias, initial_state, runs):
        return NotImplemented
    if initial_state is not None and initial_state.requires_grad:
        return NotImplemented
    return _Convolution.apply(x, weight, bias, initial_state, runs)


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None, runs: Tensor | None
    ) -> Tensor:
        y = torch.empty(x.shape, dtype=x.dtype)
        _call(x, weight, bias, state, runs, y=y)
        ctx.save_for_backward(x, weight, bias, state, runs)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, state, runs = ctx.saved_tensors
        dx, dweight, dbias = torch.empty(x.shape, dtype=x.dtype), torch.empty(weight.shape[::-1]), None
        if bias is not None:
            dbias = torch.empty(bias.shape)
        _call(x, weight, bias, state, runs, dy=dy.to(x.dtype).contiguous(), dx=dx, dweight=dweight, dbias=dbias)
        return (
            dx,
            dweight.t().to(weight.dtype),
            None if bias is None or dbias is None else dbias.to(bias.dtype),
            None,
            None,
        )


def _call(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor | None,
    runs: Tensor | None,
    **more: Tensor | None,
) -> None:
    batch, time, channels = x.shape
    if x.stride(2) != 1 or (batch > 1 and x.stride(0) != time * x.stride(1)):
        x = x.contiguous()
    named = {
        "x": x,
        "weight": weight.t().float().contiguous(),
        "bias": None if bias is None else bias.float().contiguous(),
        "state": None if state is None else state.to(x.dtype).contiguous(),
        "reach": None if runs is None else reach(runs, weight.shape[1]),
        **more,
    }
    sizes = Sizes(batch, time, channels, weight.shape[1], x.stride(1), is_narrow(x), torch.get_num_threads())
    pointers = Pointers(**{name: None if t is None else t.data_ptr() for name, t in named.items()})
    library().halflap_conv_silu(ctypes.byref(sizes), ctypes.byref(pointers))
