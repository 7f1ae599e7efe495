"""Mamba-2 mixer (Dao & Gu 2024, section 7; Nemotron-H): projection, convolution, state-space scan, gated group norm."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from halflap.models.cache import ConvSSMState
from halflap.models.config import Mamba2Config
from halflap.models.context import SequenceContext
from halflap.ops.conv import causal_conv, conv_step, final_conv_state
from halflap.ops.norm import gated_rms_norm
from halflap.ops.ssd import ssd_chunked, ssd_step


class GroupNormWeight(nn.Module):
    """Holds the gain of the gated norm under its checkpoint name, `norm.weight`."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))


class Mamba2Mixer(nn.Module):
    """[z | x B C | dt] = in_proj(u); silu(conv(xBC)); scan; norm(y * silu(z)) per group; out_proj."""

    def __init__(self, config: Mamba2Config, hidden_size: int) -> None:
        super().__init__()
        self.config = config
        self.in_proj = nn.Linear(hidden_size, config.inner_size + config.conv_size + config.num_heads, bias=False)
        self.conv1d = nn.Conv1d(
            config.conv_size, config.conv_size, config.conv_kernel, groups=config.conv_size, bias=config.conv_bias
        )
        self.dt_bias = nn.Parameter(torch.zeros(config.num_heads))
        self.A_log = nn.Parameter(torch.zeros(config.num_heads))
        self.D = nn.Parameter(torch.ones(config.num_heads))
        self.norm = GroupNormWeight(config.inner_size)
        self.out_proj = nn.Linear(config.inner_size, hidden_size, bias=False)

    def forward(self, x: Tensor, context: SequenceContext, state: ConvSSMState | None = None) -> Tensor:
        """x (B, T, D) to (B, T, D); with a state, both parts of it are advanced in place."""
        c = self.config
        z, xBC, dt = self.in_proj(x).split([c.inner_size, c.conv_size, c.num_heads], -1)
        if state is not None and x.shape[1] == 1 and context.lengths is None:
            y = self._step(xBC[:, 0], dt[:, 0], state)[:, None]
        else:
            y = self._scan(xBC, dt, context, state)
        return self.out_proj(gated_rms_norm(y, z, self.norm.weight, c.num_groups, c.norm_eps))

    def time_step(self, dt: Tensor) -> Tensor:
        """clamp(softplus(dt + dt_bias)) in float32 or wider, one rule for prefill and decode."""
        wide = torch.promote_types(dt.dtype, torch.float32)
        step = F.softplus(dt.to(wide) + self.dt_bias.to(wide))
        low, high = self.config.time_step_limit
        return step if (low, high) == (0.0, float("inf")) else step.clamp(low, high)

    def _split(self, xBC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        c = self.config
        x, B, C = xBC.split([c.inner_size, c.num_groups * c.state_size, c.num_groups * c.state_size], -1)
        heads, groups = (c.num_heads, c.head_dim), (c.num_groups, c.state_size)
        return x.unflatten(-1, heads), B.unflatten(-1, groups), C.unflatten(-1, groups)

    def _scan(self, xBC: Tensor, dt: Tensor, context: SequenceContext, state: ConvSSMState | None) -> Tensor:
        c = self.config
        conv_state, ssm_state = (state.conv, state.ssm) if state is not None and context.past else (None, None)
        step = self.time_step(dt)
        if (valid := context.valid) is not None:
            step = step * valid
        wide = step.dtype
        bias = self.conv1d.bias
        mixed = causal_conv(
            xBC.to(wide),
            self.conv1d.weight[:, 0].to(wide),
            None if bias is None else bias.to(wide),
            initial_state=conv_state,
            runs=context.runs,
        )
        x, B, C = self._split(F.silu(mixed))
        with torch.autocast(xBC.device.type, enabled=False):
            y, final = ssd_chunked(
                x,
                step,
                -torch.exp(self.A_log.to(wide)),
                B,
                C,
                self.D.to(wide),
                chunk_size=c.chunk_size,
                initial_state=ssm_state,
                runs=context.runs,
            )
        if state is not None:
            state.conv = final_conv_state(xBC, c.conv_kernel, conv_state, context.lengths).to(state.conv.dtype)
            state.ssm = final.to(state.ssm.dtype)
        return y.flatten(2)

    def _step(self, xBC: Tensor, dt: Tensor, state: ConvSSMState) -> Tensor:
        step = self.time_step(dt)
        wide = step.dtype
        bias = self.conv1d.bias
        mixed, state.conv = conv_step(
            xBC.to(wide), self.conv1d.weight[:, 0].to(wide), None if bias is None else bias.to(wide), state.conv
        )
        state.conv = state.conv.to(xBC.dtype)
        x, B, C = self._split(F.silu(mixed))
        y, state.ssm = ssd_step(x, step, -torch.exp(self.A_log.to(wide)), B, C, self.D.to(wide), state.ssm.to(wide))
        return y.flatten(1)
