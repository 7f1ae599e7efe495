"""Mamba-1 mixer (Gu & Dao 2023), with Jamba's norms on time step, B and C: convolution, selective scan, gate.

`Mamba1Inner` is what lies between the two projections; a hybrid block has one behind its own projections.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from halflap.models.cache import ConvSSMState
from halflap.models.config import Mamba1Config
from halflap.models.context import Context, SequenceContext, by_group
from halflap.models.linear import Linear
from halflap.models.norm import RMSNorm
from halflap.ops import select
from halflap.ops.conv import final_conv_state


class Mamba1Inner(nn.Module):
    """[x | z] to scan(silu(conv(x))) * silu(z), with time steps, B and C read from the convolved x."""

    def __init__(self, config: Mamba1Config) -> None:
        super().__init__()
        self.config = config
        self.add_parameters(config)

    def add_parameters(self, c: Mamba1Config) -> None:
        inner = c.inner_size
        self.conv1d = nn.Conv1d(inner, inner, c.conv_kernel, groups=inner, bias=c.conv_bias)
        self.x_proj = Linear(inner, c.dt_rank + 2 * c.state_size, bias=False)
        if c.inner_norms:
            self.dt_norm = RMSNorm(c.dt_rank, c.norm_eps)
            self.B_norm = RMSNorm(c.state_size, c.norm_eps)
            self.C_norm = RMSNorm(c.state_size, c.norm_eps)
        self.dt_proj = Linear(c.dt_rank, inner, bias=False)
        self.dt_bias = nn.Parameter(torch.zeros(inner))
        self.A_log = nn.Parameter(torch.zeros(inner, c.state_size))
        self.D = nn.Parameter(torch.ones(inner))

    def mix(
        self, projected: Tensor, context: Context, state: ConvSSMState | list[ConvSSMState] | None = None
    ) -> Tensor:
        """projected (B, T, 2I) to (B, T, I); with a state, both parts of it are advanced."""
        return by_group(self._mix, context, state, projected)

    def _mix(self, context: SequenceContext, state: ConvSSMState | None, projected: Tensor) -> Tensor:
        c = self.config
        x, z = projected.split(c.inner_size, -1)
        tail, ssm = (state.conv, state.wide()) if state is not None and context.past else (None, None)
        conv = self.conv1d
        u = select.conv_silu(x, conv.weight[:, 0], conv.bias, initial_state=tail, runs=context.runs)
        dt, B, C = self.x_proj(u).split([c.dt_rank, c.state_size, c.state_size], -1)
        if c.inner_norms:
            dt, B, C = self.dt_norm(dt), self.B_norm(B), self.C_norm(C)
        dt, A = self.dt_proj(dt), -torch.exp(self.A_log)
        if state is not None and x.shape[1] == 1 and context.lengths is None and context.held is None:
            y, state.ssm = select.selective_step(
                u[:, 0], dt[:, 0], A, B[:, 0], C[:, 0], self.D, state.ssm, dt_bias=self.dt_bias, gate=z[:, 0]
            )
            state.conv = final_conv_state(x, c.conv_kernel, tail, None).to(state.conv.dtype)
            return y[:, None]

        def scan(lengths: Tensor | None) -> tuple[Tensor, Tensor]:
            return select.selective_scan(
                u, dt, A, B, C, self.D,
                state=ssm, runs=context.runs, lengths=lengths, dt_bias=self.dt_bias, gate=z,
            )  # fmt: skip

        def leave(final: Tensor, lengths: Tensor | None) -> None:
            assert state is not None
            state.ssm = final.to(state.ssm.dtype)
            state.conv = final_conv_state(x, c.conv_kernel, tail, lengths).to(state.conv.dtype)

        return context.scanned(scan, None if state is None else leave)


class Mamba1Mixer(Mamba1Inner):
    """[x | z] = in_proj(u), the inner part, out_proj."""

    def __init__(self, config: Mamba1Config, hidden_size: int) -> None:
        nn.Module.__init__(self)
        self.config = config
        self.in_proj = Linear(hidden_size, 2 * config.inner_size, bias=False)
        self.add_parameters(config)
        self.out_proj = Linear(config.inner_size, hidden_size, bias=False)

    def forward(self, x: Tensor, context: Context, state: ConvSSMState | None = None) -> Tensor:
        """x (B, T, D) to (B, T, D)."""
        return self.out_proj(self.mix(self.in_proj(x), context, state))
