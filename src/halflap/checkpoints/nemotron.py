"""Nemotron-4 (Minitron, Nemotron-Mini) as Hugging Face knows it. One layer there is two blocks here: attention, MLP.

Norms are LayerNorms whose weight is stored less one, in both formats, so weights are copied as they are. The first half
of a head's channels turns (`rotate_half`). Dialects of `config.json`: rotary settings at the top level or under
`rope_parameters`, the width of a head as `head_dim` or Megatron's `kv_channels`, eps as `norm_eps` or `layer_norm_eps`,
no `num_key_value_heads` where every head has its own. Megatron's own tensors are read by `megatron.py`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from halflap.checkpoints.family import (
    Family,
    Json,
    beyond_transformer,
    layer_sizes,
    pick,
    read_float,
    read_positive,
    refuse,
    token_ids,
    write_transformer,
)
from halflap.checkpoints.llama import read_rope, write_rope_scaling
from halflap.checkpoints.names import NameRow
from halflap.errors import HalflapError
from halflap.models.config import AttentionConfig, MLPConfig, ModelConfig, RopeConfig

ALLOWED: dict[str, tuple[Any, ...]] = {"sliding_window": ()}
HALF = 0.5
PERCENT = ("rotary_percent", "rope_percent", "rope_percentage")  # the part of a head that turns, in older files


def read_config(data: Json) -> ModelConfig:
    """The model of a Nemotron `config.json`; absent keys take the defaults of transformers' class, which are the 15B's.

    A head's width is never guessed as hidden_size / heads when the file states it: Minitron 8B's quotient is no whole
    number.
    """
    refuse(data, "Nemotron", ALLOWED)
    hidden, heads, layers = layer_sizes(data, hidden=6144, heads=48, layers=32)
    head_dim = _head_dim(data, hidden, heads)
    attention = AttentionConfig(
        num_attention_heads=heads,
        num_key_value_heads=pick(data, heads, "num_key_value_heads"),
        head_dim=head_dim,
        rope=_read_rope(data, head_dim),
        bias=pick(data, False, "attention_bias"),
    )
    mlp = MLPConfig(
        intermediate_size=pick(data, 24576, "intermediate_size"),
        activation=pick(data, "relu2", "hidden_act"),
        bias=pick(data, False, "mlp_bias"),
    )
    return ModelConfig(
        family="nemotron",
        vocab_size=pick(data, 256000, "vocab_size"),
        hidden_size=hidden,
        blocks=(attention, mlp) * layers,
        norm="layer1p",
        norm_eps=read_positive(data, 1e-5, "norm_eps", "layer_norm_eps"),
        tie_word_embeddings=pick(data, False, "tie_word_embeddings"),
        max_position_embeddings=pick(data, 4096, "max_position_embeddings"),
        initializer_range=read_float(pick(data, 0.0134, "initializer_range")),
        **token_ids(data, {"bos_token_id": 2, "eos_token_id": 3, "pad_token_id": None}),
    )


def _head_dim(data: Json, hidden: int, heads: int) -> int:
    stated = pick(data, None, "head_dim", "kv_channels")
    if stated is None and hidden % heads:
        raise HalflapError(
            f"config.json has hidden_size={hidden} and num_attention_heads={heads}, whose quotient is no whole number, "
            "and neither head_dim nor kv_channels: add head_dim"
        )
    return hidden // heads if stated is None else stated


def _read_rope(data: Json, head_dim: Any) -> RopeConfig:
    """The rotary embedding of either spelling, of a part of each head."""
    plain = read_rope(data)
    nested = {f"rope_parameters.{key}": value for key, value in (data.get("rope_parameters") or {}).items()}
    keys = ("partial_rotary_factor", "rope_parameters.partial_rotary_factor", *PERCENT)
    fraction = read_float(pick({**data, **nested}, HALF, *keys))
    if isinstance(head_dim, int) and not (0 < fraction <= 1 and turned_channels(head_dim, fraction) % 2 == 0):
        raise HalflapError(
            f"config.json has partial_rotary_factor={fraction:g} of head_dim={head_dim}, which turns "
            f"{turned_channels(head_dim, fraction)} channels; it must be an even number from 2 to head_dim: correct it"
        )
    return dataclasses.replace(plain, fraction=fraction)


def turned_channels(head_dim: int, fraction: float) -> int:
    """As the stock class counts them: rounded down."""
    return int(head_dim * fraction)


def cannot_write(config: ModelConfig) -> str | None:
    """Why no stock `config.json` can express this model, or None: it has pairs of attention and MLP, all alike."""

    def own(attention: list[AttentionConfig], mlp: list[MLPConfig]) -> str | None:
        if config.norm != "layer1p":
            return "its norms are RMSNorms, and the stock class has LayerNorms"
        for block in attention:
            if block.rope is None:
                return "its attention has no rotary embedding, which the stock class always has"
            size, fraction = block.head_dim, block.rope.fraction
            if round(size * fraction) != turned_channels(size, fraction):
                return f"{fraction:g} of its {size} channels turn, which the stock class rounds down"
        return "its MLPs are gated, which the stock class's are not" if any(block.gated for block in mlp) else None

    return beyond_transformer(config, own)


def write_config(config: ModelConfig) -> dict[str, Any]:
    """A `config.json` that stock loaders, old and new, and `read_config` read; only when `cannot_write` is None.

    `kv_channels`, which serving engines of the first releases read, says what `head_dim` says.
    """
    attention = config.blocks[0]
    assert isinstance(attention, AttentionConfig) and attention.rope is not None
    return {
        **write_transformer(config),
        "kv_channels": attention.head_dim,
        "norm_eps": config.norm_eps,
        "rope_theta": attention.rope.theta,
        "partial_rotary_factor": attention.rope.fraction,
        "rope_scaling": write_rope_scaling(attention.rope),
    }


def _pairs(theirs: str, ours: str, offset: int) -> tuple[NameRow, ...]:
    return tuple(
        NameRow(f"model.layers.{{i}}.{theirs}.{kind}", f"blocks.{{i}}.{ours}.{kind}", 2, offset)
        for kind in ("weight", "bias")
    )


NEMOTRON = Family(
    name="nemotron",
    architecture="NemotronForCausalLM",
    read_config=read_config,
    write_config=write_config,
    cannot_write=cannot_write,
    rows=(
        NameRow("model.embed_tokens.weight", "embedding.weight"),
        *_pairs("input_layernorm", "norm", 0),
        *_pairs("post_attention_layernorm", "norm", 1),
        *(
            row
            for name in ("q_proj", "k_proj", "v_proj", "o_proj", "out_proj")
            for row in _pairs(f"self_attn.{name}", f"mixer.{name}", 0)
        ),
        *(row for name in ("up_proj", "down_proj", "out_proj") for row in _pairs(f"mlp.{name}", f"mixer.{name}", 1)),
        NameRow("model.norm.weight", "norm.weight"),
        NameRow("model.norm.bias", "norm.bias"),
        NameRow("lm_head.weight", "head.weight"),
    ),
    depth_unit=2,
    ignored=(r"\.rotary_emb\.inv_freq$",),
)
