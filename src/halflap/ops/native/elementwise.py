"""RMSNorm, squared ReLU and SwiGLU in one read and one write each (elementwise.cpp), forward and backward.

RMSNorm keeps 1/rms of each row; squared ReLU keeps only its output, which the next projection keeps anyway, since
the gradient is 2 sqrt(y) dy. Float32 and bfloat16 on the CPU; anything else gets NotImplemented and runs plain.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from halflap.ops.native.common import DTYPES, GAIN_PARTS, fits, is_narrow, library, long, pointer


def rms_norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype | None = None) -> Tensor | Any:
    """As `ops.norm.rms_norm`, or NotImplemented."""
    dtype = dtype or x.dtype
    if not x.numel() or dtype not in DTYPES or not fits(x, *x.shape) or not fits(weight, *x.shape[-1:]):
        return NotImplemented
    return _RMSNorm.apply(x, weight, eps, dtype)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        x, gain = x.contiguous(), weight.float()
        out = torch.empty(x.shape, dtype=dtype)
        width = x.shape[-1]
        rows = x.numel() // width
        scales = torch.empty(rows)
        library().halflap_rms_norm(
            *long(rows, width), *map(pointer, (x, gain)), ctypes.c_double(eps), pointer(out), pointer(scales),
            is_narrow(x) + 2 * is_narrow(out), torch.get_num_threads(),
        )  # fmt: skip
        ctx.save_for_backward(x, weight, scales)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scales = ctx.saved_tensors
        grad, gain, width = grad.contiguous(), weight.float(), x.shape[-1]
        dx, dweight, partial = torch.empty_like(x), torch.empty(width), torch.empty(GAIN_PARTS, width)
        library().halflap_rms_norm_backward(
            *long(len(scales), width), *map(pointer, (x, gain, scales, grad, None, dx, dweight, partial)),
            *long(GAIN_PARTS), is_narrow(x) + 2 * is_narrow(grad), torch.get_num_threads(),
        )  # fmt: skip
        return dx, dweight.to(weight.dtype), None, None


def squared_relu(x: Tensor) -> Tensor | Any:
    """As `ops.activation.squared_relu`, or NotImplemented."""
    return _SquaredReLU.apply(x) if x.numel() and fits(x, *x.shape) else NotImplemented


class _SquaredReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.contiguous()
        y = torch.empty_like(x)
        library().halflap_relu2(*long(x.numel()), pointer(x), pointer(y), is_narrow(x), torch.get_num_threads())
        ctx.save_for_backward(y)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        grad = grad.contiguous()
        dx = torch.empty_like(y)
        library().halflap_relu2_backward(
            *long(y.numel()), *map(pointer, (y, grad, dx)), is_narrow(y), torch.get_num_threads()
        )
        return dx


def swiglu(gate: Tensor, up: Tensor) -> Tensor | Any:
    """As `ops.activation.swiglu`, or NotImplemented."""
    if not up.numel() or gate.dtype != up.dtype or not fits(gate, *up.shape) or not fits(up, *up.shape):
        return NotImplemented
    return _SwiGLU.apply(gate, up)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        gate, up = gate.contiguous(), up.contiguous()
        y = torch.empty_like(gate)
        library().halflap_swiglu(*long(y.numel()), *map(pointer, (gate, up, y)), is_narrow(y), torch.get_num_threads())
        ctx.save_for_backward(gate, up)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        grad = grad.contiguous()
        dgate, dup = torch.empty_like(gate), torch.empty_like(up)
        library().halflap_swiglu_backward(
            *long(gate.numel()), *map(pointer, (gate, up, grad, dgate, dup)), is_narrow(gate), torch.get_num_threads()
        )
        return dgate, dup
