"""Llama as Hugging Face knows it. One layer there is two blocks here: attention, then the gated MLP.

Rotary embedding: the halves of a head are rotated (`rotate_half`), as in the stock class, and keep that order inside.
Both spellings of its settings are read: `rope_theta` with `rope_scaling`, and transformers 5's `rope_parameters`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from halflap.checkpoints.family import (
    Family,
    Json,
    beyond_transformer,
    check_kinds,
    layer_sizes,
    pick,
    read_float,
    read_positive,
    refuse,
    token_ids,
    write_transformer,
)
from halflap.checkpoints.names import NameRow
from halflap.errors import HalflapError
from halflap.models.config import AttentionConfig, MLPConfig, ModelConfig, RopeConfig, RopeScaling

ALLOWED: dict[str, tuple[Any, ...]] = {"partial_rotary_factor": (1, 1.0), "sliding_window": ()}


def read_config(data: Json) -> ModelConfig:
    """The model of a Llama `config.json`; absent keys take the defaults of transformers' class."""
    refuse(data, "Llama", ALLOWED)
    hidden, heads, layers = layer_sizes(data, hidden=4096, heads=32, layers=32)
    attention = AttentionConfig(
        num_attention_heads=heads,
        num_key_value_heads=pick(data, heads, "num_key_value_heads"),
        head_dim=pick(data, hidden // heads, "head_dim"),
        rope=read_rope(data),
        bias=pick(data, False, "attention_bias"),
    )
    mlp = MLPConfig(
        intermediate_size=pick(data, 11008, "intermediate_size"),
        activation=pick(data, "silu", "hidden_act"),
        gated=True,
        bias=pick(data, False, "mlp_bias"),
    )
    return ModelConfig(
        family="llama",
        vocab_size=pick(data, 32000, "vocab_size"),
        hidden_size=hidden,
        blocks=(attention, mlp) * layers,
        norm_eps=read_positive(data, 1e-6, "rms_norm_eps"),
        tie_word_embeddings=pick(data, False, "tie_word_embeddings"),
        max_position_embeddings=pick(data, 2048, "max_position_embeddings"),
        initializer_range=read_float(pick(data, 0.02, "initializer_range")),
        **token_ids(data, {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}),
    )


def read_rope(data: Json) -> RopeConfig:
    """The rotary embedding of either spelling; only the plain and the Llama 3.1 kind are known."""
    check_kinds(data, {"rope_scaling": Mapping, "rope_parameters": Mapping})
    settings = dict(data.get("rope_scaling") or {}) | dict(data.get("rope_parameters") or {})
    theta = read_positive({"rope_theta": data.get("rope_theta")} | settings, 10000.0, "rope_theta")
    kind = settings.get("rope_type", settings.get("type", "default"))
    if kind == "default":
        return RopeConfig(theta=theta)
    if kind != "llama3":
        raise HalflapError(
            f"config.json has a rotary embedding of type {kind!r}; allowed are default and llama3: "
            "use a checkpoint without it"
        )
    if "factor" not in settings:
        raise HalflapError("the rotary embedding of type 'llama3' in config.json has no factor: add the model's own")
    return RopeConfig(
        theta=theta,
        scaling=RopeScaling(
            factor=read_float(settings["factor"]),
            low_freq_factor=read_float(settings.get("low_freq_factor", 1.0)),
            high_freq_factor=read_float(settings.get("high_freq_factor", 4.0)),
            original_max_position_embeddings=int(settings.get("original_max_position_embeddings", 8192)),
        ),
    )


def cannot_write(config: ModelConfig) -> str | None:
    """Why no stock `config.json` can express this model, or None: it has pairs of attention and MLP, all alike."""

    def own(attention: list[AttentionConfig], mlp: list[MLPConfig]) -> str | None:
        if config.norm != "rms":
            return "its norms are LayerNorms, and the stock class has RMSNorms"
        for block in attention:
            if block.rope is None or block.rope.fraction != 1:
                return "its attention has no full rotary embedding"
            if config.hidden_size % block.num_attention_heads:
                return (
                    f"its hidden size {config.hidden_size} is not a multiple of its {block.num_attention_heads} "
                    "attention heads, which the stock class demands"
                )
        return None if all(block.gated for block in mlp) else "its MLPs are not gated"

    return beyond_transformer(config, own)


def write_config(config: ModelConfig) -> dict[str, Any]:
    """A `config.json` that stock loaders, old and new, and `read_config` read; only when `cannot_write` is None."""
    attention = config.blocks[0]
    assert isinstance(attention, AttentionConfig) and attention.rope is not None
    return {
        **write_transformer(config),
        "rms_norm_eps": config.norm_eps,
        "rope_theta": attention.rope.theta,
        "rope_scaling": write_rope_scaling(attention.rope),
    }


def write_rope_scaling(rope: RopeConfig) -> dict[str, Any] | None:
    """`rope_scaling` as `read_rope` reads it."""
    return None if rope.scaling is None else {"rope_type": "llama3", **dataclasses.asdict(rope.scaling)}


def _rows(part: str, names: tuple[str, ...], offset: int) -> tuple[NameRow, ...]:
    return tuple(
        NameRow(f"model.layers.{{i}}.{part}.{name}.{kind}", f"blocks.{{i}}.mixer.{name}.{kind}", 2, offset)
        for name in names
        for kind in ("weight", "bias")
    )


LLAMA = Family(
    name="llama",
    architecture="LlamaForCausalLM",
    read_config=read_config,
    write_config=write_config,
    cannot_write=cannot_write,
    rows=(
        NameRow("model.embed_tokens.weight", "embedding.weight"),
        NameRow("model.layers.{i}.input_layernorm.weight", "blocks.{i}.norm.weight", 2, 0),
        NameRow("model.layers.{i}.post_attention_layernorm.weight", "blocks.{i}.norm.weight", 2, 1),
        *_rows("self_attn", ("q_proj", "k_proj", "v_proj", "o_proj", "out_proj"), 0),
        *_rows("mlp", ("gate_proj", "up_proj", "down_proj", "out_proj"), 1),
        NameRow("model.norm.weight", "norm.weight"),
        NameRow("lm_head.weight", "head.weight"),
    ),
    depth_unit=2,
    ignored=(r"\.rotary_emb\.inv_freq$",),
)
