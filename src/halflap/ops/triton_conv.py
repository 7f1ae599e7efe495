# pyright: reportMissingImports=false, reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
# pyright: reportIndexIssue=false, reportOperatorIssue=false
"""Depthwise causal convolution with SiLU as one Triton kernel: `ops.conv.conv_silu` on a GPU.

A program has a block of tokens and channels and reads each input once for every tap, from the cache but the first time.
Gradients are the plain form's.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from halflap.ops import conv
from halflap.ops.triton_common import TAKEN, Recomputed, block, rows, silu, tiles

BLOCK_TIME, BLOCK_CHANNELS = 16, 128


@triton.jit
def _conv_silu(
    x, weight, bias, state, runs, y, time, channels, stride_row, stride_time,
    WIDTH: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    t = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    row = tl.program_id(2).to(tl.int64)
    in_time, in_channels = t < time, c < channels
    inside = in_time[:, None] & in_channels[None, :]
    mixed = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
    if bias is not None:
        mixed += tl.load(bias + c, mask=in_channels, other=0.0).to(tl.float32)[None, :]
    for tap in tl.static_range(WIDTH):
        source = t - (WIDTH - 1 - tap)
        place = x + row * stride_row + source.to(tl.int64)[:, None] * stride_time + c[None, :]
        value = tl.load(place, mask=inside & (source >= 0)[:, None], other=0.0).to(tl.float32)
        if state is not None:
            held = state + (row * (WIDTH - 1) + (source + WIDTH - 1)[:, None]) * channels + c[None, :]
            value += tl.load(held, mask=inside & (source < 0)[:, None], other=0.0).to(tl.float32)
        if runs is not None:
            own = tl.load(runs + row * time + t, mask=in_time, other=0)
            its = tl.load(runs + row * time + tl.maximum(source, 0), mask=in_time, other=0)
            value = tl.where((own == its)[:, None], value, 0.0)
        value *= tl.load(weight + c * WIDTH + tap, mask=in_channels, other=0.0).to(tl.float32)[None, :]
        mixed += value
    place = y + (row * time + t[:, None]) * channels + c[None, :]
    tl.store(place, silu(mixed).to(y.dtype.element_ty), mask=inside)


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

    def plain(x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None, runs: Tensor | None) -> Tensor:
        return conv.conv_silu(x, weight, bias, initial_state=state, runs=runs)

    return Recomputed.apply(convolved, plain, x, weight, bias, initial_state, runs)


def convolved(x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None, runs: Tensor | None) -> Tensor:
    """silu(causal convolution) (B, T, C) in the dtype of x, whose rows may be slices of longer ones."""
    (batch, time, channels), width = x.shape, weight.shape[1]
    x, y = rows(x), torch.empty(batch, time, channels, dtype=x.dtype, device=x.device)
    held, numbers = (None if a is None else a.contiguous() for a in (state, runs))
    span = block(time, most=BLOCK_TIME)
    _conv_silu[(tiles(channels, BLOCK_CHANNELS), tiles(time, span), batch)](
        x, weight.contiguous(), bias, held, numbers, y, time, channels, x.stride(0), x.stride(1),
        WIDTH=width, BLOCK_T=span, BLOCK_C=BLOCK_CHANNELS,
    )  # fmt: skip
    return y
