"""Mamba-2 mixer (Dao & Gu 2024, section 7; Nemotron-H): projection, convolution, state-space scan, gated group norm.

`Mamba2Inner` is what lies between the two projections; a hybrid block has one behind its own projections.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from halflap.models.cache import ConvSSMState
from halflap.models.config import Mamba2Config
from halflap.models.context import Context, SequenceContext, by_group
from halflap.models.linear import Linear
from halflap.ops import select
from halflap.ops.conv import final_conv_state


class GroupNormWeight(nn.Module):
    """Holds the gain of the gated norm under its checkpoint name, `norm.weight`."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))


class Mamba2Inner(nn.Module):
    """[z | x B C | dt] to norm(scan(silu(conv(xBC))) * silu(z)), the norm per group."""

    def __init__(self, config: Mamba2Config) -> None:
        super().__init__()
        self.config = config
        self.add_parameters(config)

    def add_parameters(self, config: Mamba2Config) -> None:
        self.conv1d = nn.Conv1d(
            config.conv_size, config.conv_size, config.conv_kernel, groups=config.conv_size, bias=config.conv_bias
        )
        self.dt_bias = nn.Parameter(torch.zeros(config.num_heads))
        self.A_log = nn.Parameter(torch.zeros(config.num_heads))
        self.D = nn.Parameter(torch.ones(config.num_heads))
        self.norm = GroupNormWeight(config.inner_size)

    def mix(
        self, projected: Tensor, context: Context, state: ConvSSMState | list[ConvSSMState] | None = None
    ) -> Tensor:
        """projected (B, T, 2I + 2GN + H) to (B, T, I); with a state, both parts of it are advanced in place."""
        return by_group(self._mix, context, state, projected)

    def _mix(self, context: SequenceContext, state: ConvSSMState | None, projected: Tensor) -> Tensor:
        if state is not None and projected.shape[1] == 1 and context.lengths is None and context.held is None:
            mixed, state.conv, state.ssm = select.mamba2_step(projected[:, 0], *self._inner(), state.conv, state.ssm)
            return mixed[:, None]
        c = self.config
        tail, ssm = (state.conv, state.wide()) if state is not None and context.past else (None, None)

        def scan(lengths: Tensor | None) -> tuple[Tensor, Tensor]:
            return select.mamba2_mix(
                projected, *self._inner(), conv_state=tail, ssm_state=ssm, runs=context.runs, lengths=lengths
            )

        def leave(final: Tensor, lengths: Tensor | None) -> None:
            assert state is not None
            xBC = projected[..., c.inner_size : c.inner_size + c.conv_size]
            state.conv = final_conv_state(xBC, c.conv_kernel, tail, lengths).to(state.conv.dtype)
            state.ssm = final.to(state.ssm.dtype)

        return context.scanned(scan, None if state is None else leave)

    def _inner(self) -> tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor, Tensor, Mamba2Config]:
        """What lies between the two projections."""
        conv = self.conv1d
        return conv.weight, conv.bias, self.dt_bias, self.A_log, self.D, self.norm.weight, self.config


class Mamba2Mixer(Mamba2Inner):
    """[z | x B C | dt] = in_proj(u), the inner part, out_proj."""

    def __init__(self, config: Mamba2Config, hidden_size: int) -> None:
        nn.Module.__init__(self)
        self.config = config
        self.in_proj = Linear(hidden_size, config.inner_size + config.conv_size + config.num_heads, bias=False)
        self.add_parameters(config)
        self.out_proj = Linear(config.inner_size, hidden_size, bias=False)

    def forward(self, x: Tensor, context: Context, state: ConvSSMState | None = None) -> Tensor:
        """x (B, T, D) to (B, T, D)."""
        return self.out_proj(self.mix(self.in_proj(x), context, state))
