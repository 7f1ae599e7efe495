"""Nemotron-H as Hugging Face knows it: `config.json` in both dialects, and the tensor names.

Dialects: the remote code that came with the first checkpoints (`hybrid_override_pattern`, `mamba_n_groups`,
`mamba_d_conv`, `attention_head_dim`, ...) and the class inside transformers (`layers_block_type` or `layer_types`).
Written is `hybrid_override_pattern` with the stored names, which both dialects, vLLM and llama.cpp read; a
`layers_block_type` would stop the first dialect's class. `expand` is written for information and never read: the inner
size is `mamba_num_heads * mamba_head_dim`.

Time step: the transformers class clamps dt from below at `time_step_min` in its chunked pass and not in its one-token
pass, and looks at no `time_step_limit`. We clamp at `time_step_limit`, by default not at all, in both. So what we write
has a `time_step_min` that never binds (or our lower limit), and both passes of the stock class then compute what we do.
"""

from __future__ import annotations

import math
from typing import Any

from halflap.checkpoints.family import (
    Family,
    Json,
    beyond_stock,
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
from halflap.models.config import AttentionConfig, Mamba2Config, MLPConfig, ModelConfig
from halflap.models.patterns import parse_pattern

SYMBOLS = {
    "mamba": "M",
    "mamba2": "M",
    "linear_attention": "M",
    "attention": "*",
    "full_attention": "*",
    "mlp": "-",
    "moe": "E",
}
ALLOWED: dict[str, tuple[Any, ...]] = {
    "use_bias": (False,),
    "mamba_proj_bias": (False,),
    "attention_bias": (False,),
    "mamba_hidden_act": ("silu", "swish"),
    "sliding_window": (),
}
UNCLAMPED = (0.0, math.inf)
STEP_MIN_THAT_NEVER_BINDS = 1e-9  # not 0: transformers takes its logarithm when it initialises a fresh model


def read_config(data: Json) -> ModelConfig:
    """The model of a `config.json` in either dialect; absent keys take the defaults of transformers' class.

    Raises HalflapError for mixture-of-experts blocks, unknown blocks, unsupported biases and quantized weights.
    """
    refuse(data, "Nemotron-H", ALLOWED)
    heads = pick(data, 32, "num_attention_heads")
    epsilon = read_positive(data, 1e-5, "layer_norm_epsilon")
    low, high = pick(data, UNCLAMPED, "time_step_limit", "mamba_dt_limit")
    blocks = {
        "M": Mamba2Config(
            num_heads=pick(data, 128, "mamba_num_heads"),
            head_dim=pick(data, 64, "mamba_head_dim"),
            num_groups=pick(data, 8, "n_groups", "mamba_n_groups"),
            state_size=pick(data, 128, "ssm_state_size"),
            conv_kernel=pick(data, 4, "conv_kernel", "mamba_d_conv"),
            chunk_size=pick(data, 128, "chunk_size", "mamba_chunk_size"),
            conv_bias=pick(data, True, "use_conv_bias", "mamba_conv_bias"),
            time_step_limit=(read_float(low), read_float(high)),
            norm_eps=epsilon,
        ),
        "*": AttentionConfig(
            num_attention_heads=heads,
            num_key_value_heads=pick(data, heads if "num_key_value_heads" in data else 8, "num_key_value_heads"),
            head_dim=pick(data, 128, "head_dim", "attention_head_dim"),
        ),
        "-": MLPConfig(
            intermediate_size=pick(data, 21504, "intermediate_size"),
            activation=pick(data, "relu2", "mlp_hidden_act"),
            bias=pick(data, False, "mlp_bias"),
        ),
    }
    return ModelConfig(
        family="nemotron_h",
        vocab_size=pick(data, 131072, "vocab_size"),
        hidden_size=pick(data, 4096, "hidden_size"),
        blocks=parse_pattern(read_pattern(data), blocks),
        norm_eps=epsilon,
        tie_word_embeddings=pick(data, False, "tie_word_embeddings"),
        residual_in_fp32=pick(data, False, "residual_in_fp32"),
        max_position_embeddings=pick(data, 4096, "max_position_embeddings"),
        initializer_range=read_float(pick(data, 0.02, "initializer_range")),
        **token_ids(data, {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}),
    )


def read_pattern(data: Json) -> str:
    """One symbol a block, from whichever key has it; two keys that disagree are refused."""
    names = pick(data, None, "layers_block_type", "layer_types")
    pattern = data.get("hybrid_override_pattern")
    if names is None and pattern is None:
        raise HalflapError(
            "config.json of a Nemotron-H says nothing about its blocks; give hybrid_override_pattern, e.g. 'M-M*-'"
        )
    if names is None:
        return str(pattern)
    if unknown := sorted({str(name) for name in names} - set(SYMBOLS)):
        raise HalflapError(
            f"config.json lists a block of type {unknown[0]!r}; allowed are {', '.join(SYMBOLS)}: "
            "correct layers_block_type"
        )
    listed = "".join(SYMBOLS[name] for name in names)
    if pattern is not None and pattern.split("/")[0].replace("|", "") != listed:
        raise HalflapError(
            f"config.json says {pattern!r} under hybrid_override_pattern and {listed!r} under layers_block_type: "
            "keep the right one"
        )
    return listed


def cannot_write(config: ModelConfig) -> str | None:
    """Why no stock `config.json` can express this model, or None: the class has one width for each kind of block."""
    if reason := beyond_stock(config):
        return reason
    attention, mamba, mlp = _kinds(config)
    if config.tie_word_embeddings:
        return "its embeddings are tied, which the stock class does not do"
    if config.norm != "rms":
        return "its norms are LayerNorms, and the stock class has RMSNorms"
    for block in attention:
        if block.rope is not None or block.bias:
            return "its attention has a rotary embedding or biases, which the stock class has not"
    for block in mlp:
        if block.gated:
            return "its MLPs are gated, which the stock class's are not"
    for block in mamba:
        if not math.isinf(block.time_step_limit[1]):
            return f"its time step has an upper limit of {block.time_step_limit[1]:g}, which the stock class ignores"
    return (
        only({b.intermediate_size for b in mlp}, "intermediate_size")
        or only({b.activation for b in mlp}, "mlp_hidden_act")
        or only({b.bias for b in mlp}, "mlp_bias")
        or only({b.num_attention_heads for b in attention}, "num_attention_heads")
        or only({b.num_key_value_heads for b in attention}, "num_key_value_heads")
        or only({b.head_dim for b in attention}, "head_dim")
        or only({b.num_heads for b in mamba}, "mamba_num_heads")
        or only({b.head_dim for b in mamba}, "mamba_head_dim")
        or only({b.num_groups for b in mamba}, "n_groups")
        or only({b.state_size for b in mamba}, "ssm_state_size")
        or only({b.conv_kernel for b in mamba}, "conv_kernel")
        or only({b.chunk_size for b in mamba}, "chunk_size")
        or only({b.conv_bias for b in mamba}, "use_conv_bias")
        or only({b.time_step_limit for b in mamba}, "time_step_limit")
        or only({b.norm_eps for b in mamba} | {config.norm_eps}, "the epsilon of their norms")
    )


def _kinds(config: ModelConfig) -> tuple[list[AttentionConfig], list[Mamba2Config], list[MLPConfig]]:
    return (
        [b for b in config.blocks if isinstance(b, AttentionConfig)],
        [b for b in config.blocks if isinstance(b, Mamba2Config)],
        [b for b in config.blocks if isinstance(b, MLPConfig)],
    )


def write_config(config: ModelConfig) -> dict[str, Any]:
    """A `config.json` that stock loaders, old and new, and `read_config` read; only when `cannot_write` is None."""
    attention, mamba, mlp = _kinds(config)
    data: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": len(config.blocks),
        "hybrid_override_pattern": config.pattern(),
        "layer_norm_epsilon": config.norm_eps,
        "tie_word_embeddings": config.tie_word_embeddings,
        "residual_in_fp32": config.residual_in_fp32,
        "max_position_embeddings": config.max_position_embeddings,
        "initializer_range": config.initializer_range,
        "rescale_prenorm_residual": True,
        "use_cache": bool(attention),  # transformers' cache asks an attention block for the length of the text
        "use_bias": False,
        "mamba_proj_bias": False,
        "attention_bias": False,
        **write_token_ids(config),
    }
    for block in attention[:1]:
        data |= {
            "num_attention_heads": block.num_attention_heads,
            "num_key_value_heads": block.num_key_value_heads,
            "head_dim": block.head_dim,
            "attention_head_dim": block.head_dim,
        }
    for block in mlp[:1]:
        data |= {
            "intermediate_size": block.intermediate_size,
            "mlp_hidden_act": block.activation,
            "mlp_bias": block.bias,
        }
    for block in mamba[:1]:
        data |= _write_mamba(block, config.hidden_size)
    return data


def _write_mamba(block: Mamba2Config, hidden_size: int) -> dict[str, Any]:
    data: dict[str, Any] = {
        "mamba_num_heads": block.num_heads,
        "mamba_head_dim": block.head_dim,
        "mamba_hidden_act": "silu",
        "n_groups": block.num_groups,
        "ssm_state_size": block.state_size,
        "conv_kernel": block.conv_kernel,
        "use_conv_bias": block.conv_bias,
        "chunk_size": block.chunk_size,
        "expand": max(1, round(block.inner_size / hidden_size)),
        "time_step_min": max(block.time_step_limit[0], STEP_MIN_THAT_NEVER_BINDS),
        "time_step_max": 0.1,
        "time_step_floor": 1e-4,
        "mamba_ssm_cache_dtype": "float32",
    }
    if block.time_step_limit != UNCLAMPED:
        data["time_step_limit"] = list(block.time_step_limit)
    return data


MIXER_NAMES = (
    *(f"{name}.weight" for name in ("in_proj", "conv1d", "norm", "out_proj")),
    *("conv1d.bias", "A_log", "D", "dt_bias"),
    *(f"{name}.weight" for name in ("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj")),
    *("up_proj.bias", "down_proj.bias", "out_proj.bias"),
)

NEMOTRON_H = Family(
    name="nemotron_h",
    architecture="NemotronHForCausalLM",
    read_config=read_config,
    write_config=write_config,
    cannot_write=cannot_write,
    rows=(
        NameRow("backbone.embeddings.weight", "embedding.weight"),
        NameRow("backbone.layers.{i}.norm.weight", "blocks.{i}.norm.weight"),
        *(NameRow(f"backbone.layers.{{i}}.mixer.{name}", f"blocks.{{i}}.mixer.{name}") for name in MIXER_NAMES),
        NameRow("backbone.norm_f.weight", "norm.weight"),
        NameRow("lm_head.weight", "head.weight"),
    ),
    prefixes=("backbone.", "model."),
    ignored=(r"^mtp\.", r"\.rotary_emb\.inv_freq$"),
)
