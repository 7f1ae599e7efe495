"""One token of many sequences: the Mamba-2 step and linear maps of few rows (decode.cpp), for inference only.

Float32 and bfloat16 on the CPU without gradients; anything else gets NotImplemented and runs plain. States are
advanced in place.
"""

from __future__ import annotations

import ctypes
import math
from typing import Any

import torch
from torch import Tensor

from halflap.models.config import Mamba2Config
from halflap.ops.native.common import TAKEN, fits, is_narrow, library, long, pointer

FEW_ROWS = 32  # beyond this the general matrix product's packing pays,
MANY_ROWS = 256  # or on AVX2 beyond this
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
    c, batch = config, len(projected)
    if torch.is_grad_enabled() or conv_state.dtype != projected.dtype or ssm_state.dtype != torch.float32 or not batch:
        return NotImplemented
    parameters = (conv_weight, conv_bias, dt_bias, A_log, D, norm_weight)
    if projected.dim() != 2 or not TAKEN.of_mamba2(c, projected, parameters, conv_state, ssm_state):
        return NotImplemented
    if not (conv_state.is_contiguous() and ssm_state.is_contiguous()):
        return NotImplemented
    projected = projected.contiguous()
    small = [p if p is None else p.contiguous() for p in parameters]
    narrow = sum(1 << i for i, p in enumerate(parameters) if p is not None and is_narrow(p))
    out = projected.new_empty(batch, c.inner_size)
    step = Step(
        batch, c.num_heads, c.head_dim, c.num_groups, c.state_size, c.conv_kernel,
        is_narrow(projected), narrow, torch.get_num_threads(),
        *c.time_step_limit, c.norm_eps,
        *(None if t is None else t.data_ptr() for t in (projected, *small, conv_state, ssm_state, out)),
    )  # fmt: skip
    library().halflap_mamba2_step(ctypes.byref(step))
    return out, conv_state, ssm_state


def most_rows(dtype: torch.dtype) -> float:
    """Rows that `linear` serves better than the general product, hopeless in bfloat16 without instructions for it."""
    if not library().halflap_many_rows():
        return FEW_ROWS
    return MANY_ROWS if dtype == torch.float32 else math.inf


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | Any:
    """x (..., K) times weight (N, K) transposed plus bias, for up to `most_rows`; or NotImplemented."""
    if torch.is_grad_enabled() or x.dtype != weight.dtype or weight.dim() != 2 or torch.is_autocast_enabled("cpu"):
        return NotImplemented
    outputs, inputs = weight.shape
    rows = x.numel() // inputs if inputs else 0
    if not (0 < rows <= most_rows(x.dtype) and outputs and fits(x, *x.shape[:-1], inputs) and weight.is_contiguous()):
        return NotImplemented
    if not (fits(weight, outputs, inputs) and fits(bias, outputs)):
        return NotImplemented
    x = x.contiguous()
    y = x.new_empty(*x.shape[:-1], outputs)
    wide = None if bias is None else bias.float().contiguous()
    library().halflap_few_rows(
        *long(rows, outputs, inputs), *map(pointer, (x, weight, wide, y)), is_narrow(x), torch.get_num_threads()
    )
    return y
