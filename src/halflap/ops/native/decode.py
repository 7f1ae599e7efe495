"""One token of many sequences: the Mamba-2 step and linear maps of few rows (decode.cpp), for inference only.

Float32 and bfloat16 on the CPU without gradients; anything else gets NotImplemented and runs plain. States are
advanced in place.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from halflap.models.config import Mamba2Config
from halflap.ops.native.build import load

DTYPES = (torch.float32, torch.bfloat16)
FEW_ROWS = 32  # beyond this the general matrix product's packing pays
COUNTS = ("batch", "heads", "channels", "groups", "states", "width", "bf16", "narrow_parameters", "threads")
POINTERS = (
    *("projected", "conv_weight", "conv_bias", "dt_bias", "A_log", "D", "norm_weight"),
    *("conv_state", "ssm_state", "out"),
)


class Step(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in COUNTS),
        *((name, ctypes.c_float) for name in ("low", "high", "eps")),
        *((name, ctypes.c_void_p) for name in POINTERS),
    )


def mamba2_step(
    projected: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    dt_bias: Tensor,
    A_log: Tensor,
    D: Tensor,
    norm_weight: Tensor,
    config: Mamba2Config,
    conv_state: Tensor,
    ssm_state: Tensor,
) -> tuple[Tensor, Tensor, Tensor] | Any:
    """As `ops.mamba2.mamba2_step` but advancing the states in place, or NotImplemented."""
    if projected.device.type != "cpu" or projected.dtype not in DTYPES or torch.is_grad_enabled():
        return NotImplemented
    if conv_state.dtype != projected.dtype or ssm_state.dtype != torch.float32 or not projected.numel():
        return NotImplemented
    kinds = {p.dtype for p in (conv_weight, conv_bias, dt_bias, A_log, D, norm_weight) if p is not None}
    if len(kinds) > 1 or not kinds <= set(DTYPES):
        return NotImplemented
    if not (conv_state.is_contiguous() and ssm_state.is_contiguous()):
        return NotImplemented
    c = config
    projected = projected.contiguous()
    small = [p if p is None else p.contiguous() for p in (conv_weight, conv_bias, dt_bias, A_log, D, norm_weight)]
    out = projected.new_empty(projected.shape[0], c.inner_size)
    step = Step(
        len(projected), c.num_heads, c.head_dim, c.num_groups, c.state_size, c.conv_kernel,
        projected.dtype == torch.bfloat16, torch.bfloat16 in kinds, torch.get_num_threads(),
        *c.time_step_limit, c.norm_eps,
        *(None if t is None else t.data_ptr() for t in (projected, *small, conv_state, ssm_state, out)),
    )  # fmt: skip
    _library().halflap_mamba2_step(ctypes.byref(step))
    return out, conv_state, ssm_state


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | Any:
    """x (..., K) times weight (N, K) transposed plus bias, for few rows; or NotImplemented."""
    if torch.is_grad_enabled() or x.device.type != "cpu" or x.dtype != weight.dtype or x.dtype not in DTYPES:
        return NotImplemented
    inputs = x.shape[-1]
    rows = x.numel() // inputs if inputs else 0
    if not 0 < rows <= FEW_ROWS or not weight.is_contiguous() or torch.is_autocast_enabled("cpu"):
        return NotImplemented
    x = x.contiguous()
    y = x.new_empty(*x.shape[:-1], weight.shape[0])
    wide = None if bias is None else bias.float()
    _library().halflap_few_rows(
        ctypes.c_int64(rows), ctypes.c_int64(weight.shape[0]), ctypes.c_int64(inputs),
        ctypes.c_void_p(x.data_ptr()), ctypes.c_void_p(weight.data_ptr()),
        None if wide is None else ctypes.c_void_p(wide.data_ptr()), ctypes.c_void_p(y.data_ptr()),
        x.dtype == torch.bfloat16, torch.get_num_threads(),
    )  # fmt: skip
    return y


def _library() -> ctypes.CDLL:
    library = load().library
    assert library is not None
    return library
