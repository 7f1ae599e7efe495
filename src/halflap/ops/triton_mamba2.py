# pyright: reportMissingImports=false, reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
# pyright: reportIndexIssue=false, reportOperatorIssue=false
"""Mamba-2 between its two projections in Triton: one token in two kernels, and over a sequence.

A token: the first kernel has a program for some channels of each head of each row, which convolves what it needs,
advances its part of the state in place and leaves y silu(z); the second has one for each group of each row, which
normalises and moves the convolution's inputs on, once every head has read them.
A sequence: convolution (triton_conv.py), scan (triton_ssd.py), gated norm; gradients are the plain form's.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from halflap.models.config import Mamba2Config
from halflap.ops import mamba2
from halflap.ops.operands import WIDTHS
from halflap.ops.triton_common import TAKEN, Recomputed, block, rows, silu, tiles, time_step
from halflap.ops.triton_conv import convolved
from halflap.ops.triton_ssd import MOST_STATES, scan

STATES_AT_ONCE = 2048  # of one program: enough programs for a batch of one, enough work in each


@triton.jit
def _convolved(newest, window, weight, bias, at, inside, width, WIDTH: tl.constexpr):
    """silu of the convolution of channels `at`, whose earlier inputs are in `window` (W-1, width)."""
    mixed = tl.load(newest + at, mask=inside, other=0.0).to(tl.float32)
    mixed *= tl.load(weight + at * WIDTH + WIDTH - 1, mask=inside, other=0.0).to(tl.float32)
    for tap in tl.static_range(WIDTH - 1):
        earlier = tl.load(window + tap * width + at, mask=inside, other=0.0).to(tl.float32)
        mixed += earlier * tl.load(weight + at * WIDTH + tap, mask=inside, other=0.0).to(tl.float32)
    if bias is not None:
        mixed += tl.load(bias + at, mask=inside, other=0.0).to(tl.float32)
    return silu(mixed)


@triton.jit
def _moved(newest, window, at, inside, width, WIDTH: tl.constexpr):
    """Each input of channels `at` to the place of the one before it."""
    for tap in tl.static_range(WIDTH - 2):
        later = tl.load(window + (tap + 1) * width + at, mask=inside)
        tl.debug_barrier()  # read by all threads before any of them overwrites it, now or in the next turn
        tl.store(window + tap * width + at, later, mask=inside)
    arrived = tl.load(newest + at, mask=inside)
    tl.store(window + (WIDTH - 2) * width + at, arrived.to(window.dtype.element_ty), mask=inside)


@triton.jit
def _normalised(v, weight, at, inside, size, eps):
    gain = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    return v * tl.rsqrt(tl.sum(v * v) / size + eps) * gain


@triton.jit
def _advance(
    projected, conv_weight, conv_bias, dt_bias, A_log, D, conv_state, ssm_state, gated,
    stride, heads, channels, groups, size, low, high,
    WIDTH: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    n = tl.arange(0, BLOCK_N)
    head, row = tl.program_id(1), tl.program_id(2).to(tl.int64)
    group = head // (heads // groups)
    inner, width = heads * channels, heads * channels + 2 * groups * size
    in_head, in_state = p < channels, n < size
    z = projected + row * stride
    newest, window = z + inner, conv_state + row * (WIDTH - 1) * width
    own, B_at, C_at = head * channels + p, inner + group * size + n, inner + (groups + group) * size + n
    x = _convolved(newest, window, conv_weight, conv_bias, own, in_head, width, WIDTH)
    B = _convolved(newest, window, conv_weight, conv_bias, B_at, in_state, width, WIDTH)
    C = _convolved(newest, window, conv_weight, conv_bias, C_at, in_state, width, WIDTH)
    raw = tl.load(newest + width + head).to(tl.float32) + tl.load(dt_bias + head).to(tl.float32)
    step = time_step(raw, low, high)
    decay = tl.exp(-step * tl.exp(tl.load(A_log + head).to(tl.float32)))
    place = ssm_state + ((row * heads + head) * channels + p[:, None]) * size + n[None, :]
    inside = in_head[:, None] & in_state[None, :]
    state = tl.load(place, mask=inside, other=0.0) * decay + (step * x)[:, None] * B[None, :]
    tl.store(place, state, mask=inside)
    y = tl.sum(state * C[None, :], axis=1) + tl.load(D + head).to(tl.float32) * x
    gate = silu(tl.load(z + own, mask=in_head, other=0.0).to(tl.float32))
    tl.store(gated + row * inner + own, y * gate, mask=in_head)


@triton.jit
def _finish(
    projected, norm_weight, conv_state, gated, out, stride, heads, channels, groups, size, eps,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    group, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    inner, width = heads * channels, heads * channels + 2 * groups * size
    newest, window = projected + row * stride + inner, conv_state + row * (WIDTH - 1) * width
    share = inner // groups
    own, n = group * share + tl.arange(0, BLOCK), tl.arange(0, BLOCK_N)
    inside = own < (group + 1) * share
    v = tl.load(gated + row * inner + own, mask=inside, other=0.0)
    v = _normalised(v, norm_weight, own, inside, share, eps)
    tl.store(out + row * inner + own, v.to(out.dtype.element_ty), mask=inside)
    _moved(newest, window, own, inside, width, WIDTH)
    _moved(newest, window, inner + group * size + n, n < size, width, WIDTH)
    _moved(newest, window, inner + (groups + group) * size + n, n < size, width, WIDTH)


@triton.jit
def _gated_norm(y, z, weight, out, stride, groups, share, eps, BLOCK: tl.constexpr):
    token, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    own = group * share + tl.arange(0, BLOCK)
    inside = own < (group + 1) * share
    gate = silu(tl.load(z + token * stride + own, mask=inside, other=0.0).to(tl.float32))
    v = tl.load(y + token * groups * share + own, mask=inside, other=0.0).to(tl.float32) * gate
    v = _normalised(v, weight, own, inside, share, eps)
    tl.store(out + token * groups * share + own, v.to(out.dtype.element_ty), mask=inside)


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
    if torch.is_grad_enabled() or ssm_state.dtype != torch.float32 or not batch or projected.dim() != 2:
        return NotImplemented
    parameters = (conv_weight, conv_bias, dt_bias, A_log, D, norm_weight)
    if not (_knows(c) and TAKEN.of_mamba2(c, projected, parameters, conv_state, ssm_state)):
        return NotImplemented
    if not (conv_state.is_contiguous() and ssm_state.is_contiguous()):
        return NotImplemented
    projected, device = rows(projected), projected.device
    gated = torch.empty(batch, c.inner_size, dtype=torch.float32, device=device)
    out = torch.empty(batch, c.inner_size, dtype=projected.dtype, device=device)
    sizes = (projected.stride(0), c.num_heads, c.head_dim, c.num_groups, c.state_size)
    block_n, share = block(c.state_size), c.inner_size // c.num_groups
    block_p = block(c.head_dim, most=max(1, STATES_AT_ONCE // block_n))
    _advance[(tiles(c.head_dim, block_p), c.num_heads, batch)](
        projected, conv_weight.contiguous(), conv_bias, dt_bias, A_log, D, conv_state, ssm_state, gated,
        *sizes, *c.time_step_limit, WIDTH=c.conv_kernel, BLOCK_P=block_p, BLOCK_N=block_n,
    )  # fmt: skip
    _finish[(c.num_groups, batch)](
        projected, norm_weight, conv_state, gated, out, *sizes, c.norm_eps,
        WIDTH=c.conv_kernel, BLOCK=block(share), BLOCK_N=block_n, num_warps=_warps(share),
    )  # fmt: skip
    return out, conv_state, ssm_state


def mamba2_mix(
    projected: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    dt_bias: Tensor,
    A_log: Tensor,
    D: Tensor,
    norm_weight: Tensor,
    config: Mamba2Config,
    *,
    conv_state: Tensor | None = None,
    ssm_state: Tensor | None = None,
    runs: Tensor | None = None,
    lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor] | Any:
    """As `ops.mamba2.mamba2_mix`, or NotImplemented."""
    c = config
    if projected.dim() != 3 or 0 in projected.shape:
        return NotImplemented
    parameters = (conv_weight, conv_bias, dt_bias, A_log, D, norm_weight)
    if not (_knows(c) and TAKEN.of_mamba2(c, projected, parameters, conv_state, ssm_state, runs, lengths)):
        return NotImplemented

    def plain(*tensors: Any) -> tuple[Tensor, Tensor]:
        *first, conv_state, ssm_state, runs, lengths = tensors
        states = {"conv_state": conv_state, "ssm_state": ssm_state}
        return mamba2.mamba2_mix(*first, c, **states, runs=runs, lengths=lengths)

    def fast(*tensors: Any) -> tuple[Tensor, Tensor]:
        return _mixed(c, *tensors)

    return Recomputed.apply(fast, plain, projected, *parameters, conv_state, ssm_state, runs, lengths)


def _knows(c: Mamba2Config) -> bool:
    """Whether the kernels are written for such sizes."""
    return c.conv_kernel in WIDTHS and c.state_size <= MOST_STATES


def _mixed(
    c: Mamba2Config,
    projected: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    dt_bias: Tensor,
    A_log: Tensor,
    D: Tensor,
    norm_weight: Tensor,
    conv_state: Tensor | None,
    ssm_state: Tensor | None,
    runs: Tensor | None,
    lengths: Tensor | None,
) -> tuple[Tensor, Tensor]:
    projected, share = projected.contiguous(), c.inner_size // c.num_groups
    xBC = projected[..., c.inner_size : c.inner_size + c.conv_size]
    mixed = convolved(xBC, conv_weight[:, 0], conv_bias, conv_state, runs)
    y, final = scan(projected, mixed, dt_bias, A_log, D, c, initial_state=ssm_state, runs=runs, lengths=lengths)
    out, stride = torch.empty_like(y), projected.shape[2]
    _gated_norm[(y.shape[0] * y.shape[1], c.num_groups)](
        y, projected, norm_weight, out, stride, c.num_groups, share, c.norm_eps,
        BLOCK=block(share), num_warps=_warps(share),
    )  # fmt: skip
    return out, final


def _warps(size: int) -> int:
    """Of a program that holds a row of so many numbers."""
    return 4 if size <= 2048 else 8
