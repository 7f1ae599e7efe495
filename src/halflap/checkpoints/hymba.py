"""Hymba as released (nvidia/Hymba-1.5B): `config.json` and the tensor names. One layer there is two blocks here.

The defaults of the released configuration class are those of another model, so what fixes the shape must be said. Keys
that nobody knows are refused by name: they may change the arithmetic. Who has keys and values follows from the config
(`kv_reuse_group`), and the rows of each `in_proj` must agree with it. Padding: a tokenizer's own `[PAD]` token; the
config's `pad_token_id` of 0 is kept as it is, and no loss ever looks at it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from halflap.checkpoints.family import (
    EVERY_CONFIG,
    Family,
    Json,
    check_kinds,
    check_sizes,
    only,
    pick,
    read_float,
    read_positive,
    refuse,
    token_ids,
    write_token_ids,
)
from halflap.checkpoints.names import NameRow
from halflap.errors import HalflapError
from halflap.models.config import (
    AttentionConfig,
    BlockConfig,
    HybridConfig,
    Mamba1Config,
    MLPConfig,
    ModelConfig,
    NTKScaling,
    RopeConfig,
)
from halflap.models.sharing import sources

ALLOWED: dict[str, tuple[Any, ...]] = {
    "num_experts": (1,),
    "num_experts_per_tok": (1,),
    "num_mamba": (1,),
    "kv_weight_reuse": (False,),
    "kv_reuse_every_i_layer": (-1, 0),
    "memory_tokens_interspersed_every": (-1, 0),
    "mamba_proj_bias": (False,),
    "kq_norm": ("none",),
    "hidden_act": ("silu", "swish"),
    "mlp_hidden_act": ("silu", "relu2"),
    "rope_type": ("default", "ntk"),
}
SIZES = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "mamba_d_state", "mamba_d_conv", "max_position_embeddings"),
)
NEEDED = (*SIZES, "mamba_expand", "mamba_dt_rank", "num_memory_tokens", "global_attn_idx", "tie_word_embeddings")
READ = (
    *("attn_hidden_size", "kq_head_dim", "v_head_dim", "sliding_window", "kv_reuse_group", "mamba_conv_bias"),
    *("mamba_inner_layernorms", "conv_dim", "layer_type", "rope", "rope_theta", "orig_max_position_embeddings"),
    *("rms_norm_eps", "initializer_range", "bos_token_id", "eos_token_id", "pad_token_id"),
)
KINDS: dict[str, type] = {
    **dict.fromkeys(("num_memory_tokens", "attn_hidden_size", "kq_head_dim", "v_head_dim"), int),
    **dict.fromkeys(("mamba_conv_bias", "mamba_inner_layernorms", "rope", "tie_word_embeddings"), bool),
    **dict.fromkeys(("global_attn_idx", "kv_reuse_group", "layer_type"), list),
}
WITHOUT_EFFECT = (  # on a forward pass: how training and the released engine go about it
    *("seq_length", "attention_dropout", "router_aux_loss_coef", "output_router_logits", "attn_implementation"),
    *("attn_implementation_new", "calc_logits_for_entire_prompt", "use_mamba_kernels", "num_logits_to_keep"),
)
KNOWN = {*ALLOWED, *NEEDED, *READ, *WITHOUT_EFFECT, *EVERY_CONFIG}


def read_config(data: Json) -> ModelConfig:
    """The model of a released `config.json`. Raises HalflapError, by name, for the missing, unknown or unsupported."""
    _check_keys(data)
    hidden, layers, heads = (data[key] for key in ("hidden_size", "num_hidden_layers", "num_attention_heads"))
    inner = int(data["mamba_expand"] * hidden)
    attention = AttentionConfig(
        num_attention_heads=heads,
        num_key_value_heads=data["num_key_value_heads"],
        head_dim=_head_dim(data),
        rope=_read_rope(data),
        value_head_dim=_divided(inner, heads, "mamba_expand * hidden_size", "num_attention_heads"),
    )
    _check_derived(data, attention, inner)
    rank, epsilon = data["mamba_dt_rank"], read_positive(data, 1e-6, "rms_norm_eps")
    ssm = Mamba1Config(
        inner_size=inner,
        state_size=data["mamba_d_state"],
        dt_rank=-(-hidden // 16) if rank == "auto" else rank,
        conv_kernel=data["mamba_d_conv"],
        conv_bias=pick(data, True, "mamba_conv_bias"),
        inner_norms=pick(data, True, "mamba_inner_layernorms"),
        norm_eps=epsilon,
    )
    activation = pick(data, "silu", "mlp_hidden_act")
    mlp = MLPConfig(data["intermediate_size"], activation=activation, gated=activation == "silu")
    return ModelConfig(
        family="hymba",
        vocab_size=data["vocab_size"],
        hidden_size=hidden,
        blocks=_layers(data, attention, ssm, mlp, layers, epsilon),
        norm_eps=epsilon,
        tie_word_embeddings=data["tie_word_embeddings"],
        max_position_embeddings=data["max_position_embeddings"],
        initializer_range=read_float(pick(data, 0.02, "initializer_range")),
        num_meta_tokens=data["num_memory_tokens"],
        **token_ids(data, {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}),
    )


def _layers(
    data: Json, attention: AttentionConfig, ssm: Mamba1Config, mlp: MLPConfig, count: int, epsilon: float
) -> tuple[BlockConfig, ...]:
    window = data.get("sliding_window")
    groups = pick(data, [], "kv_reuse_group")
    if window is None and groups:
        raise HalflapError("config.json has a kv_reuse_group and no sliding_window; only windowed layers share: add it")
    if wrong := [layer for layer in data["global_attn_idx"] if layer not in range(count)]:
        raise HalflapError(f"global_attn_idx in config.json names layer {wrong[0]!r} of {count}: correct it")
    whole = set(range(count)) if window is None else set(data["global_attn_idx"])
    _check_groups(groups, whole, count)
    shared = sources(groups)
    blocks: list[BlockConfig] = []
    for layer in range(count):
        own = dataclasses.replace(
            attention,
            window=None if layer in whole else window,
            key_value_source=2 * shared[layer] if layer in shared else None,
        )
        blocks += [HybridConfig(own, ssm, epsilon), mlp]
    return tuple(blocks)


def _check_keys(data: Json) -> None:
    refuse(data, "Hymba", ALLOWED)
    if unknown := sorted(key for key in data if key not in KNOWN and not key.startswith("_")):
        raise HalflapError(
            f"config.json has the key {unknown[0]!r}, which halflap's Hymba does not know and which may change the "
            "model; remove it if it changes nothing, else use a checkpoint without it"
        )
    for key in NEEDED:
        if data.get(key) is None:
            raise HalflapError(f"config.json of a Hymba does not say {key}, and there is no safe default: add it")
    check_kinds(data, KINDS)
    check_sizes(data, SIZES)
    if not isinstance(data["mamba_expand"], int | float) or data["mamba_expand"] * data["hidden_size"] < 1:
        raise HalflapError(
            f"config.json has mamba_expand={data['mamba_expand']!r}; it must be a number that makes of hidden_size "
            "the SSM's channels: correct it"
        )
    listed = pick(data, ["h"] * data["num_hidden_layers"], "layer_type")
    if wrong := [kind for kind in listed if kind != "h"] or listed[data["num_hidden_layers"] :]:
        raise HalflapError(
            f"config.json has a layer of type {wrong[0]!r}; allowed is 'h' for each of num_hidden_layers: correct it"
        )


def _check_groups(groups: Any, whole: set[int], count: int) -> None:
    """Layers of a group: consecutive in order, windowed, in no other group; the first is the producer."""
    seen: set[int] = set()
    for group in groups:
        if not isinstance(group, Sequence) or len(group) < 2:
            raise HalflapError(
                f"kv_reuse_group in config.json has {group!r}; a group is two layers or more: correct it"
            )
        for before, layer in zip([None, *group], group):
            reason = None
            if layer not in range(count):
                reason = f"there are {count} layers"
            elif before is not None and layer <= before:
                reason = (
                    f"layer {layer} comes before layer {before}, whose group it reads: keys and values flow forward"
                )
            elif layer in whole or any(i in whole for i in range(layer if before is None else before, layer)):
                reason = "a global layer is in it or lies between its layers, and global layers keep their own"
            elif layer in seen:
                reason = f"layer {layer} is in two groups"
            if reason is not None:
                raise HalflapError(
                    f"kv_reuse_group in config.json has the group {list(group)}, but {reason}: correct it"
                )
            seen.add(layer)


def _divided(whole: int, parts: int, what: str, by: str) -> int:
    if whole % parts:
        raise HalflapError(
            f"config.json gives {what} {whole}, which its {parts} heads ({by}) do not divide; every head needs equally "
            "many channels: correct it"
        )
    return whole // parts


def _head_dim(data: Json) -> int:
    """Of queries and keys; -1 means derived."""
    if (own := pick(data, -1, "kq_head_dim")) > 0:
        return own
    width = pick(data, -1, "attn_hidden_size")
    width, name = (width, "attn_hidden_size") if width > 0 else (data["hidden_size"], "hidden_size")
    return _divided(width, data["num_attention_heads"], name, "num_attention_heads")


def _check_derived(data: Json, attention: AttentionConfig, inner: int) -> None:
    """Keys that only repeat what follows from others must agree with them."""
    values = pick(data, -1, "v_head_dim")
    if values > 0 and values != attention.value_dim:
        raise HalflapError(
            f"config.json has v_head_dim={values}, and mamba_expand and num_attention_heads make it "
            f"{attention.value_dim}; attention and SSM outputs are averaged and must be equally wide: correct it"
        )
    widths = pick(data, {}, "conv_dim")
    listed = list(widths.values()) if isinstance(widths, Mapping) else [widths]
    if wrong := [width for width in listed if width != inner]:
        raise HalflapError(f"config.json has a conv_dim of {wrong[0]} where mamba_expand makes {inner}: correct it")


def _read_rope(data: Json) -> RopeConfig | None:
    if not pick(data, True, "rope"):
        return None
    theta = read_positive(data, 10000.0, "rope_theta")
    if pick(data, "default", "rope_type") == "default":
        return RopeConfig(theta)
    if data.get("orig_max_position_embeddings") is None:
        raise HalflapError("config.json has rope_type 'ntk' and no orig_max_position_embeddings: add it")
    check_sizes(data, ("orig_max_position_embeddings",))
    return RopeConfig(theta, scaling=NTKScaling(data["orig_max_position_embeddings"], data["max_position_embeddings"]))


def cannot_write(config: ModelConfig) -> str | None:
    """Why the released `config.json` cannot express this model, or None."""
    hybrid = [b for b in config.blocks[::2] if isinstance(b, HybridConfig)]
    mlp = [b for b in config.blocks[1::2] if isinstance(b, MLPConfig)]
    ssm = [b.ssm for b in hybrid if isinstance(b.ssm, Mamba1Config)]
    if len(hybrid) != len(mlp) or len(hybrid) + len(mlp) != len(config.blocks):
        return f"its blocks are not pairs of hybrid heads and MLP ({config.pattern()})"
    if len(ssm) != len(hybrid):
        return "its SSM heads are Mamba-2, and the released class has Mamba-1"
    if config.residual_in_fp32 or config.norm != "rms":
        return "its residual or norms are of a kind that the released class has not"
    attention = [b.attention for b in hybrid]
    reason = (
        only({b.intermediate_size for b in mlp}, "intermediate_size")
        or only({(b.activation, b.gated, b.bias) for b in mlp}, "activation, gate or bias of MLPs")
        or only({b.num_attention_heads for b in attention}, "num_attention_heads")
        or only({b.num_key_value_heads for b in attention}, "num_key_value_heads")
        or only({b.head_dim for b in attention}, "head_dim")
        or only({b.value_dim for b in attention}, "value_head_dim")
        or only({b.rope for b in attention}, "rotary embedding")
        or only({b.window for b in attention if b.window is not None}, "window")
        or only(set(ssm), "the sizes of their SSM")
        or only({b.norm_eps for b in hybrid} | {b.norm_eps for b in ssm} | {config.norm_eps}, "epsilon of their norms")
    )
    return reason or _cannot_write_layer(config, hybrid[0], mlp[0])


def _cannot_write_layer(config: ModelConfig, hybrid: HybridConfig, mlp: MLPConfig) -> str | None:
    """The same for models whose layers are alike."""
    attention = hybrid.attention
    if (mlp.activation, mlp.gated, mlp.bias) not in (("silu", True, False), ("relu2", False, False)):
        return "its MLPs are neither gated SiLU nor plain squared ReLU without biases"
    if (rope := attention.rope) is not None:
        expected = rope.scaling is None or (
            isinstance(rope.scaling, NTKScaling)
            and rope.scaling.factor == 2
            and rope.scaling.max_position_embeddings == config.max_position_embeddings
        )
        if rope.fraction != 1 or not expected:
            return "its rotary embedding is partial or stretched in another way"
    return None


def _expand(inner: int, hidden: int) -> int | float:
    """The factor that the released class multiplies the hidden size by, rounding down; a pruned model's is no whole
    number."""
    if inner % hidden == 0:
        return inner // hidden
    factor = inner / hidden
    while int(factor * hidden) < inner:
        factor = math.nextafter(factor, math.inf)
    return factor


def write_config(config: ModelConfig) -> dict[str, Any]:
    """A `config.json` with the released keys; only when `cannot_write` is None."""
    layers = [b for b in config.blocks if isinstance(b, HybridConfig)]
    mlp, first = config.blocks[1], layers[0]
    attention, ssm = first.attention, first.ssm
    assert isinstance(mlp, MLPConfig) and isinstance(ssm, Mamba1Config)
    count, rope = len(layers), attention.rope
    stretched = rope.scaling if rope is not None and isinstance(rope.scaling, NTKScaling) else None
    windows = [b.attention.window for b in layers if b.attention.window is not None]
    queries = attention.num_attention_heads * attention.head_dim
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": mlp.intermediate_size,
        "num_hidden_layers": count,
        "num_attention_heads": attention.num_attention_heads,
        "num_key_value_heads": attention.num_key_value_heads,
        "attn_hidden_size": -1 if queries == config.hidden_size else queries,
        "kq_head_dim": -1,
        "v_head_dim": attention.value_dim,
        "kq_norm": "none",
        "hidden_act": "silu",
        "mlp_hidden_act": mlp.activation,
        "attention_dropout": 0.0,
        "global_attn_idx": [i for i, b in enumerate(layers) if b.attention.window is None],
        "sliding_window": windows[0] if windows else None,
        "kv_reuse_group": _groups(layers),
        "kv_reuse_every_i_layer": -1,
        "kv_weight_reuse": False,
        "num_memory_tokens": config.num_meta_tokens,
        "memory_tokens_interspersed_every": 0,
        "mamba_d_state": ssm.state_size,
        "mamba_d_conv": ssm.conv_kernel,
        "mamba_dt_rank": ssm.dt_rank,
        "mamba_expand": _expand(ssm.inner_size, config.hidden_size),
        "mamba_conv_bias": ssm.conv_bias,
        "mamba_proj_bias": False,
        "mamba_inner_layernorms": ssm.inner_norms,
        "num_mamba": 1,
        "conv_dim": {str(layer): ssm.inner_size for layer in range(count)},
        "layer_type": ["h"] * count,
        "rope": rope is not None,
        "rope_theta": 10000.0 if rope is None else rope.theta,
        "rope_type": "default" if stretched is None else "ntk",
        "max_position_embeddings": config.max_position_embeddings,
        "orig_max_position_embeddings": None if stretched is None else stretched.original_max_position_embeddings,
        "seq_length": config.max_position_embeddings,
        "rms_norm_eps": config.norm_eps,
        "initializer_range": config.initializer_range,
        "num_experts": 1,
        "num_experts_per_tok": 1,
        "router_aux_loss_coef": 0.001,
        "output_router_logits": False,
        "attn_implementation": "flex",
        "attn_implementation_new": "flex",
        "calc_logits_for_entire_prompt": False,
        "use_mamba_kernels": True,
        "use_cache": True,
        "tie_word_embeddings": config.tie_word_embeddings,
        **write_token_ids(config),
    }


def _groups(layers: Sequence[HybridConfig]) -> list[list[int]]:
    groups: dict[int, list[int]] = {}
    for layer, block in enumerate(layers):
        if (source := block.attention.key_value_source) is not None:
            groups.setdefault(source // 2, [source // 2]).append(layer)
    return list(groups.values())


MIXER_ROWS = {
    "in_proj.weight": "in_proj.weight",
    "out_proj.weight": "out_proj.weight",
    "pre_avg_layernorm1.weight": "attention_norm.weight",
    "pre_avg_layernorm2.weight": "ssm_norm.weight",
    "conv1d.weight": "ssm.conv1d.weight",
    "conv1d.bias": "ssm.conv1d.bias",
    "x_proj.0.weight": "ssm.x_proj.weight",
    "dt_proj.0.weight": "ssm.dt_proj.weight",
    "dt_proj.0.bias": "ssm.dt_bias",
    "A_log.0": "ssm.A_log",
    "D.0": "ssm.D",
    "dt_layernorm.weight": "ssm.dt_norm.weight",
    "B_layernorm.weight": "ssm.B_norm.weight",
    "C_layernorm.weight": "ssm.C_norm.weight",
}
MLP_NAMES = ("gate_proj.weight", "up_proj.weight", "down_proj.weight", "out_proj.weight")

HYMBA = Family(
    name="hymba",
    architecture="HymbaForCausalLM",
    read_config=read_config,
    write_config=write_config,
    cannot_write=cannot_write,
    rows=(
        NameRow("model.embed_tokens.weight", "embedding.weight"),
        NameRow("model.memory_tokens", "meta_tokens"),
        NameRow("model.layers.{i}.input_layernorm.weight", "blocks.{i}.norm.weight", 2, 0),
        NameRow("model.layers.{i}.pre_moe_layernorm.weight", "blocks.{i}.norm.weight", 2, 1),
        *(NameRow(f"model.layers.{{i}}.mamba.{a}", f"blocks.{{i}}.mixer.{b}", 2, 0) for a, b in MIXER_ROWS.items()),
        *(NameRow(f"model.layers.{{i}}.moe.experts.0.{n}", f"blocks.{{i}}.mixer.{n}", 2, 1) for n in MLP_NAMES),
        NameRow("model.final_layernorm.weight", "norm.weight"),
        NameRow("lm_head.weight", "head.weight"),
    ),
    depth_unit=2,
)
