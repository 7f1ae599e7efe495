# pyright: reportMissingImports=false, reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
# pyright: reportIndexIssue=false, reportOperatorIssue=false
"""Mamba-1's step in Triton: `ops.selective_scan.selective_step` on a GPU, a program for some channels of each row."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from halflap.ops.triton_common import TAKEN, block, rows, silu, softplus, tiles

STATES_AT_ONCE = 1024  # of one program


@triton.jit
def _step(
    u, dt, A, B, C, D, state, dt_bias, gate, y, channels, size,
    stride_u, stride_dt, stride_B, stride_C, stride_gate,
    BLOCK_I: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0) * BLOCK_I + tl.arange(0, BLOCK_I)
    n = tl.arange(0, BLOCK_N)
    row = tl.program_id(1).to(tl.int64)
    in_channels, in_state = i < channels, n < size
    inside = in_channels[:, None] & in_state[None, :]
    x = tl.load(u + row * stride_u + i, mask=in_channels, other=0.0).to(tl.float32)
    step = tl.load(dt + row * stride_dt + i, mask=in_channels, other=0.0).to(tl.float32)
    if dt_bias is not None:
        step = softplus(step + tl.load(dt_bias + i, mask=in_channels, other=0.0).to(tl.float32))
    rate = tl.load(A + i[:, None] * size + n[None, :], mask=inside, other=0.0).to(tl.float32)
    written = tl.load(B + row * stride_B + n, mask=in_state, other=0.0).to(tl.float32)
    read = tl.load(C + row * stride_C + n, mask=in_state, other=0.0).to(tl.float32)
    place = state + (row * channels + i[:, None]) * size + n[None, :]
    new = tl.load(place, mask=inside, other=0.0) * tl.exp(step[:, None] * rate)
    new += (step * x)[:, None] * written[None, :]
    tl.store(place, new, mask=inside)
    out = tl.sum(new * read[None, :], axis=1)
    if D is not None:
        out += tl.load(D + i, mask=in_channels, other=0.0).to(tl.float32) * x
    if gate is not None:
        out *= silu(tl.load(gate + row * stride_gate + i, mask=in_channels, other=0.0).to(tl.float32))
    tl.store(y + row * channels + i, out.to(y.dtype.element_ty), mask=in_channels)


def selective_step(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    state: Tensor,
    *,
    dt_bias: Tensor | None = None,
    gate: Tensor | None = None,
) -> tuple[Tensor, Tensor] | Any:
    """As `ops.selective_scan.selective_step` but advancing the state in place, or NotImplemented."""
    if torch.is_grad_enabled() or u.dim() != 2 or state.dtype != torch.float32 or not state.is_contiguous():
        return NotImplemented
    if not TAKEN.of_selective((u, dt, gate), A, (B, C), (D, dt_bias), state):
        return NotImplemented
    (batch, channels), size = u.shape, A.shape[1]
    dense = [None if x is None else rows(x) for x in (u, dt, B, C, gate)]
    y = torch.empty(batch, channels, dtype=u.dtype, device=u.device)
    block_n = block(size)
    block_i = block(channels, most=max(1, STATES_AT_ONCE // block_n))
    _step[(tiles(channels, block_i), batch)](
        *dense[:2], A.contiguous(), *dense[2:4], D, state, dt_bias, dense[4], y, channels, size,
        *(0 if x is None else x.stride(0) for x in dense), BLOCK_I=block_i, BLOCK_N=block_n,
    )  # fmt: skip
    return y, state
