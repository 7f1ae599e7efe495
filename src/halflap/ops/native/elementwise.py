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

from halflap.ops.native.build import load

DTYPES = (torch.float32, torch.bfloat16)
GAIN_PARTS = 16  # partial sums of the gain's gradient; a fixed number, so that the sum does not depend on the threads


def _accepts(*tensors: Tensor) -> bool:
    return all(t.device.type == "cpu" and t.dtype in DTYPES and t.numel() > 0 for t in tensors)


def _narrow(tensor: Tensor) -> int:
    return int(tensor.dtype == torch.bfloat16)


def _pointer(tensor: Tensor | None) -> ctypes.c_void_p | None:
    return None if tensor is None else ctypes.c_void_p(tensor.data_ptr())


def _long(*numbers: int) -> tuple[ctypes.c_int64, ...]:
    return tuple(map(ctypes.c_int64, numbers))


def _library() -> ctypes.CDLL:
    library = load().library
    assert library is not None
    return library


def rms_norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype | None = None) -> Tensor | Any:
    """As `ops.norm.rms_norm`, or NotImplemented."""
    dtype = dtype or x.dtype
    if not _accepts(x, weight) or dtype not in DTYPES:
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
        _library().halflap_rms_norm(
            *_long(rows, width), *map(_pointer, (x, gain)), ctypes.c_double(eps), _pointer(out), _pointer(scales),
            _narrow(x) + 2 * _narrow(out), torch.get_num_threads(),
        )  # fmt: skip
        ctx.save_for_backward(x, weight, scales)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scales = ctx.saved_tensors
        grad, gain, width = grad.contiguous(), weight.float(), x.shape[-1]
        dx, dweight, partial = torch.empty_like(x), torch.empty(width), torch.empty(GAIN_PARTS, width)
        _library().halflap_rms_norm_backward(
            *_long(len(scales), width), *map(_pointer, (x, gain, scales, grad, None, dx, dweight, partial)),
            *_long(GAIN_PARTS), _narrow(x) + 2 * _narrow(grad), torch.get_num_threads(),
        )  # fmt: skip
        return dx, dweight.to(weight.dtype), None, None


def squared_relu(x: Tensor) -> Tensor | Any:
    """As `ops.activation.squared_relu`, or NotImplemented."""
    return _SquaredReLU.apply(x) if _accepts(x) else NotImplemented


class _SquaredReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.contiguous()
        y = torch.empty_like(x)
        _library().halflap_relu2(*_long(x.numel()), _pointer(x), _pointer(y), _narrow(x), torch.get_num_threads())
        ctx.save_for_backward(y)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        grad = grad.contiguous()
        dx = torch.empty_like(y)
        _library().halflap_relu2_backward(
            *_long(y.numel()), *map(_pointer, (y, grad, dx)), _narrow(y), torch.get_num_threads()
        )
        return dx


def swiglu(gate: Tensor, up: Tensor) -> Tensor | Any:
    """As `ops.activation.swiglu`, or NotImplemented."""
    if not _accepts(gate, up) or gate.dtype != up.dtype or gate.shape != up.shape:
        return NotImplemented
    return _SwiGLU.apply(gate, up)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        gate, up = gate.contiguous(), up.contiguous()
        y = torch.empty_like(gate)
        _library().halflap_swiglu(*_long(y.numel()), *map(_pointer, (gate, up, y)), _narrow(y), torch.get_num_threads())
        ctx.save_for_backward(gate, up)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        grad = grad.contiguous()
        dgate, dup = torch.empty_like(gate), torch.empty_like(up)
        _library().halflap_swiglu_backward(
            *_long(gate.numel()), *map(_pointer, (gate, up, grad, dgate, dup)), _narrow(gate), torch.get_num_threads()
        )
        return dgate, dup
