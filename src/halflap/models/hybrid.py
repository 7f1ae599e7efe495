"""Hybrid-head mixer (Hymba, section 3): attention and SSM heads on one projection, each normalised, then averaged.

The rows of `in_proj` are q, k, v (no k and v where another block's are read), then what the SSM reads: x, z of a
Mamba-1, z, x, B, C, dt of a Mamba-2. The branches' learnt weights of the paper are the gains of their norms; Mamba-2's
own gated group norm is its branch's.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from halflap.models.attention import attend
from halflap.models.cache import HybridState
from halflap.models.config import HybridConfig, Mamba1Config
from halflap.models.context import Context
from halflap.models.linear import Linear
from halflap.models.mamba1 import Mamba1Inner
from halflap.models.mamba2 import Mamba2Inner
from halflap.models.norm import RMSNorm


class HybridMixer(nn.Module):
    """out((norm(attention) + norm(ssm)) / 2), both on slices of in_proj(x)."""

    def __init__(self, config: HybridConfig, hidden_size: int) -> None:
        super().__init__()
        self.config = config
        a, s = config.attention, config.ssm
        mamba1 = isinstance(s, Mamba1Config)
        keys = [] if a.key_value_source is not None else [a.head_dim, a.value_dim]
        self.widths = [
            a.num_attention_heads * a.head_dim,
            *(a.num_key_value_heads * width for width in keys),
            2 * s.inner_size if mamba1 else s.inner_size + s.conv_size + s.num_heads,
        ]
        self.in_proj = Linear(hidden_size, sum(self.widths), bias=False)
        self.ssm = Mamba1Inner(s) if mamba1 else Mamba2Inner(s)
        self.attention_norm = RMSNorm(s.inner_size, config.norm_eps, before_mixer=True)
        self.ssm_norm = RMSNorm(s.inner_size, config.norm_eps, before_mixer=True) if mamba1 else nn.Identity()
        self.out_proj = Linear(s.inner_size, hidden_size, bias=False)

    def forward(self, x: Tensor, context: Context, state: HybridState | list[HybridState] | None = None) -> Tensor:
        """x (B, T, D) to (B, T, D); with a state, all parts of it are advanced."""
        query, *own, inputs = self.in_proj(x).split(self.widths, -1)
        pair = (own[0], own[1]) if own else None
        attended = attend(self.config.attention, query, pair, context, _branch(state, "attention"))
        scanned = self.ssm.mix(inputs, context, _branch(state, "ssm"))
        return self.out_proj((self.attention_norm(attended) + self.ssm_norm(scanned)) * 0.5)


def _branch(state: HybridState | list[HybridState] | None, name: str) -> Any:
    """Its part of the state, or of each group's."""
    return [getattr(part, name) for part in state] if isinstance(state, list) else getattr(state, name, None)
