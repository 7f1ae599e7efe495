"""Grouped-query attention mixer with optional rotary embedding; packed, cached or plain causal."""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn

from halflap.models.cache import KeyValueState
from halflap.models.config import AttentionConfig
from halflap.models.context import Context, SequenceContext, by_group
from halflap.models.linear import Linear
from halflap.models.rope import rotate
from halflap.ops import select


class AttentionMixer(nn.Module):
    """softmax(q k^T / sqrt(head_dim)) v, heads concatenated, projected back to the hidden size."""

    def __init__(self, config: AttentionConfig, hidden_size: int) -> None:
        super().__init__()
        self.config = config
        self.q_proj = Linear(hidden_size, config.num_attention_heads * config.head_dim, bias=config.bias)
        if config.key_value_source is None:
            self.k_proj = Linear(hidden_size, config.num_key_value_heads * config.head_dim, bias=config.bias)
            self.v_proj = Linear(hidden_size, config.num_key_value_heads * config.value_dim, bias=config.bias)
        self.o_proj = Linear(config.num_attention_heads * config.value_dim, hidden_size, bias=config.bias)

    def forward(self, x: Tensor, context: Context, state: KeyValueState | None = None) -> Tensor:
        """x (B, T, D) to (B, T, D); with a state, keys and values are appended to it."""
        own = (self.k_proj(x), self.v_proj(x)) if self.config.key_value_source is None else None
        return self.o_proj(attend(self.config, self.q_proj(x), own, context, state))


def attend(
    config: AttentionConfig,
    query: Tensor,
    own: tuple[Tensor, Tensor] | None,
    context: Context,
    state: KeyValueState | list[KeyValueState] | None,
) -> Tensor:
    """Attend with query (B, T, H h) to what is visible; returns (B, T, H v).

    own: key (B, T, K h) and value (B, T, K v) of this block; None where it reads another's, rotated there already.
    """
    return by_group(partial(_attend, config), context, state, query, *(own or (None, None)))


def _attend(
    c: AttentionConfig,
    context: SequenceContext,
    state: KeyValueState | None,
    query: Tensor,
    key: Tensor | None,
    value: Tensor | None,
) -> Tensor:
    query = query.unflatten(-1, (c.num_attention_heads, c.head_dim)).transpose(1, 2)
    if c.rope is not None:
        cos, sin = context.rotary(c.rope, c.head_dim, query.dtype)
        query = rotate(query, cos, sin)
    if key is None or value is None:
        assert c.key_value_source is not None
        seen = context.shared(c.key_value_source)
    else:
        key = key.unflatten(-1, (c.num_key_value_heads, c.head_dim)).transpose(1, 2)
        value = value.unflatten(-1, (c.num_key_value_heads, c.value_dim)).transpose(1, 2)
        if c.rope is not None:
            key = rotate(key, cos, sin)
        seen = context.key_values(key, value, c.window, state)
    y = select.attention(
        query, seen.keys, seen.values, seen.mask,
        starts=seen.starts, offset=seen.offset, window=seen.window, meta=seen.meta,
    )  # fmt: skip
    return y.transpose(1, 2).flatten(2)
