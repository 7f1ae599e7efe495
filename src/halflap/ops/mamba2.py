"""Mamba-2 between its two projections, in plain PyTorch: convolution, SiLU, time steps, scan, gated group norm.

[z | x B C | dt] = the input projection; dt = clamp(softplus(dt + dt_bias)); A = -exp(A_log). Time steps, decays,
states and norms are computed in float32 (float64 stays). Legend as in `ops`; I = H P, C = I + 2 G N channels.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from halflap.models.config import Mamba2Config
from halflap.ops.conv import causal_conv, conv_step
from halflap.ops.norm import gated_rms_norm
from halflap.ops.ssd import ssd_chunked, ssd_step


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
) -> tuple[Tensor, Tensor]:
    """Mix projected (B, T, 2I + 2GN + H) along time; returns (B, T, I) in its dtype and the final state (B, H, P, N).

    conv_weight (C, 1, W); conv_state (B, W-1, C) and ssm_state (B, H, P, N) continue earlier tokens; runs (B, T)
    keep packed documents apart; of row b only the first lengths[b] tokens enter the state.
    """
    c = config
    z, xBC, dt = projected.split([c.inner_size, c.conv_size, c.num_heads], -1)
    step = time_step(dt, dt_bias, c)
    if lengths is not None:
        step = step * (torch.arange(step.shape[1], device=step.device) < lengths[:, None])[..., None]
    wide = step.dtype
    bias = None if conv_bias is None else conv_bias.to(wide)
    mixed = causal_conv(xBC.to(wide), conv_weight[:, 0].to(wide), bias, initial_state=conv_state, runs=runs)
    x, B, C = _split(F.silu(mixed), c)
    with torch.autocast(projected.device.type, enabled=False):
        y, final = ssd_chunked(
            x, step, -torch.exp(A_log.to(wide)), B, C, D.to(wide),
            chunk_size=c.chunk_size, initial_state=ssm_state, runs=runs,
        )  # fmt: skip
    return gated_rms_norm(y.flatten(2), z, norm_weight, c.num_groups, c.norm_eps), final


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
) -> tuple[Tensor, Tensor, Tensor]:
    """One token: projected (B, 2I + 2GN + H); returns (B, I) and the next conv_state and ssm_state."""
    c = config
    z, xBC, dt = projected.split([c.inner_size, c.conv_size, c.num_heads], -1)
    step = time_step(dt, dt_bias, c)
    wide = step.dtype
    bias = None if conv_bias is None else conv_bias.to(wide)
    mixed, window = conv_step(xBC.to(wide), conv_weight[:, 0].to(wide), bias, conv_state)
    x, B, C = _split(F.silu(mixed), c)
    y, state = ssd_step(x, step, -torch.exp(A_log.to(wide)), B, C, D.to(wide), ssm_state.to(wide))
    out = gated_rms_norm(y.flatten(1), z, norm_weight, c.num_groups, c.norm_eps)
    return out, window.to(conv_state.dtype), state.to(ssm_state.dtype)


def time_step(dt: Tensor, dt_bias: Tensor, config: Mamba2Config) -> Tensor:
    """clamp(softplus(dt + dt_bias)) in float32 or wider, one rule for prefill and decode."""
    wide = torch.promote_types(dt.dtype, torch.float32)
    step = F.softplus(dt.to(wide) + dt_bias.to(wide))
    low, high = config.time_step_limit
    return step if (low, high) == (0.0, float("inf")) else step.clamp(low, high)


def _split(xBC: Tensor, c: Mamba2Config) -> tuple[Tensor, Tensor, Tensor]:
    x, B, C = xBC.split([c.inner_size, c.num_groups * c.state_size, c.num_groups * c.state_size], -1)
    heads, groups = (c.num_heads, c.head_dim), (c.num_groups, c.state_size)
    return x.unflatten(-1, heads), B.unflatten(-1, groups), C.unflatten(-1, groups)
