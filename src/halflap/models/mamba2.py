"""Mamba-2 mixer (Dao & Gu 2024, section 7; Nemotron-H): projection, convolution, state-space scan, gated group norm."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from halflap.models.cache import ConvSSMState
from halflap.models.config import Mamba2Config
from halflap.models.context import SequenceContext
from halflap.models.linear import Linear
from halflap.ops import select
from halflap.ops.conv import final_conv_state


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
        self.in_proj = Linear(hidden_size, config.inner_size + config.conv_size + config.num_heads, bias=False)
        self.conv1d = nn.Conv1d(
            config.conv_size, config.conv_size, config.conv_kernel, groups=config.conv_size, bias=config.conv_bias
        )
        self.dt_bias = nn.Parameter(torch.zeros(config.num_heads))
        self.A_log = nn.Parameter(torch.zeros(config.num_heads))
        self.D = nn.Parameter(torch.ones(config.num_heads))
        self.norm = GroupNormWeight(config.inner_size)
        self.out_proj = Linear(config.inner_size, hidden_size, bias=False)

    def forward(self, x: Tensor, context: SequenceContext, state: ConvSSMState | None = None) -> Tensor:
        """x (B, T, D) to (B, T, D); with a state, both parts of it are advanced in place."""
        projected = self.in_proj(x)
        if state is not None and x.shape[1] == 1 and context.lengths is None:
            mixed, state.conv, state.ssm = select.mamba2_step(projected[:, 0], *self._inner(), state.conv, state.ssm)
            return self.out_proj(mixed[:, None])
        conv_state, ssm_state = (state.conv, state.ssm) if state is not None and context.past else (None, None)
        mixed, final = select.mamba2_mix(
            projected,
            *self._inner(),
            conv_state=conv_state,
            ssm_state=ssm_state,
            runs=context.runs,
            lengths=context.lengths,
        )
        if state is not None:
            c = self.config
            xBC = projected[..., c.inner_size : c.inner_size + c.conv_size]
            state.conv = final_conv_state(xBC, c.conv_kernel, conv_state, context.lengths).to(state.conv.dtype)
            state.ssm = final.to(state.ssm.dtype)
        return self.out_proj(mixed)

    def _inner(self) -> tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor, Tensor, Mamba2Config]:
        """What lies between the two projections."""
        conv = self.conv1d
        return conv.weight, conv.bias, self.dt_bias, self.A_log, self.D, self.norm.weight, self.config
