"""Grouped-query attention mixer with optional rotary embedding; packed, cached or plain causal."""

from __future__ import annotations

from torch import Tensor, nn

from halflap.models.cache import KeyValueState
from halflap.models.config import AttentionConfig
from halflap.models.context import SequenceContext
from halflap.models.linear import Linear
from halflap.models.rope import rotate
from halflap.ops import select


class AttentionMixer(nn.Module):
    """softmax(q k^T / sqrt(head_dim)) v, heads concatenated, projected back to the hidden size."""

    def __init__(self, config: AttentionConfig, hidden_size: int) -> None:
        super().__init__()
        self.config = config
        query_size = config.num_attention_heads * config.head_dim
        key_size = config.num_key_value_heads * config.head_dim
        self.q_proj = Linear(hidden_size, query_size, bias=config.bias)
        self.k_proj = Linear(hidden_size, key_size, bias=config.bias)
        self.v_proj = Linear(hidden_size, key_size, bias=config.bias)
        self.o_proj = Linear(query_size, hidden_size, bias=config.bias)

    def forward(self, x: Tensor, context: SequenceContext, state: KeyValueState | None = None) -> Tensor:
        """x (B, T, D) to (B, T, D); with a state, keys and values are appended to it."""
        c = self.config
        query = self.q_proj(x).unflatten(-1, (c.num_attention_heads, c.head_dim)).transpose(1, 2)
        key = self.k_proj(x).unflatten(-1, (c.num_key_value_heads, c.head_dim)).transpose(1, 2)
        value = self.v_proj(x).unflatten(-1, (c.num_key_value_heads, c.head_dim)).transpose(1, 2)
        if c.rope is not None:
            cos, sin = context.rotary(c.rope, c.head_dim, query.dtype)
            query, key = rotate(query, cos, sin), rotate(key, cos, sin)
        if state is not None:
            key, value = state.append(key, value, context.positions, context.uniform, context.used)
        keys = key.shape[2]
        y = select.attention(
            query, key, value, lambda: context.attention_mask(keys), starts=context.starts, offset=context.offset
        )
        return self.o_proj(y.transpose(1, 2).flatten(2))
