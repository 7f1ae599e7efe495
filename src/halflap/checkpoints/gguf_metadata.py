"""What a GGUF file says about the network, both ways: llama.cpp's keys to a config, and a config to keys.

llama.cpp stores most sizes once and head counts and feed-forward widths a layer at a time if need be, with 0 where a
layer has none; so unequal blocks can be written as far as these go. A file of ours also carries the whole config
(`halflap.config`), which counts as long as the keys that llama.cpp reads still say the same.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from halflap.checkpoints.family import beyond_stock, only
from halflap.checkpoints.gguf_names import ROPE_FREQUENCIES, layers
from halflap.errors import HalflapError
from halflap.models.config import (
    AttentionConfig,
    BlockConfig,
    Mamba2Config,
    MLPConfig,
    ModelConfig,
    RopeConfig,
    RopeScaling,
)
from halflap.models.patterns import parse_pattern
from halflap.models.rope import inverse_frequencies

Fields = Mapping[str, Any]
Shapes = Mapping[str, tuple[int, ...]]
OWN_CONFIG = "halflap.config"
IDS = {"bos_token_id": "bos_token_id", "eos_token_id": "eos_token_id", "pad_token_id": "padding_token_id"}
UNCLAMPED = (0.0, float("inf"))

# ---- a config to keys


def architecture_of(config: ModelConfig) -> str:
    """llama.cpp's name for what this model is; only when `cannot_write` is None."""
    if config.family == "llama":
        return "llama" if len(set(config.blocks)) == 2 and _is_pairs(config) else "deci"
    return "mamba2" if set(config.pattern()) == {"M"} else "nemotron_h"


def _is_pairs(config: ModelConfig) -> bool:
    pattern = config.pattern()
    return pattern == "*-" * (len(pattern) // 2)


def cannot_write(config: ModelConfig) -> str | None:
    """Why llama.cpp cannot run this model, or None."""
    checks = {"llama": _not_llama, "nemotron_h": _not_nemotron_h}
    if config.family not in checks:
        return f"it is a {config.family}, and GGUF is written of {' and '.join(checks)} only"
    if config.norm != "rms":
        return "its norms are LayerNorms, and llama.cpp takes RMSNorms there"
    return beyond_stock(config) or _not_alike(config) or checks[config.family](config)


def _not_alike(config: ModelConfig) -> str | None:
    attention = [b for b in config.blocks if isinstance(b, AttentionConfig)]
    return only({b.head_dim for b in attention}, "head_dim") or only({b.rope for b in attention}, "rotary embedding")


def _not_llama(config: ModelConfig) -> str | None:
    pattern = config.pattern()
    if not pattern.startswith("*"):
        return f"its first block is no attention ({pattern}), from which llama.cpp reads the size of a head"
    for index, block in enumerate(config.blocks):
        if isinstance(block, MLPConfig):
            if not block.gated or block.activation != "silu":
                return f"its MLP in block {index} is no gated SiLU, which is all that llama.cpp runs in a Llama"
        elif not isinstance(block, AttentionConfig):
            return f"its block {index} is of kind {block.kind}, which llama.cpp does not run in a Llama"
        elif block.rope is None or block.rope.fraction != 1:
            return "its attention has no full rotary embedding, which llama.cpp always applies in a Llama"
        elif pattern[index + 1 : index + 2] != "-":
            return f"no MLP follows its attention in block {index}, and llama.cpp skips an attention without one"
    return None


def _not_nemotron_h(config: ModelConfig) -> str | None:
    mamba = [b for b in config.blocks if isinstance(b, Mamba2Config)]
    if set(config.pattern()) != {"M"} and not {"M", "*"} <= set(config.pattern()):
        return f"its pattern is {config.pattern()}, and llama.cpp aborts on a Nemotron-H that lacks M or *"
    for index, block in enumerate(config.blocks):
        if isinstance(block, AttentionConfig) and (block.rope is not None or block.bias):
            return "its attention has a rotary embedding or biases, which llama.cpp does not apply in a Nemotron-H"
        if isinstance(block, MLPConfig) and (block.gated or block.activation != "relu2"):
            return f"its MLP in block {index} is no squared ReLU, which is all that llama.cpp runs in a Nemotron-H"
        if isinstance(block, Mamba2Config) and not block.conv_bias:
            return f"the convolution of its block {index} has no bias, which llama.cpp requires"
        if isinstance(block, Mamba2Config) and block.time_step_limit != UNCLAMPED:
            return f"its time step is limited to {block.time_step_limit}, which llama.cpp ignores"
    return (
        only({b.num_heads for b in mamba}, "mamba_num_heads")
        or only({b.head_dim for b in mamba}, "mamba_head_dim")
        or only({b.num_groups for b in mamba}, "n_groups")
        or only({b.state_size for b in mamba}, "ssm_state_size")
        or only({b.conv_kernel for b in mamba}, "conv_kernel")
        or only({b.norm_eps for b in mamba} | {config.norm_eps}, "the epsilon of their norms")
    )


def metadata(config: ModelConfig) -> dict[str, Any]:
    """llama.cpp's keys and values for a config that `cannot_write` has nothing against."""
    name = architecture_of(config)
    places = layers(config, name)
    count = places[-1] + 1
    ids = {key: getattr(config, ours) for ours, key in IDS.items()}
    sizes: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": count,
        "attention.layer_norm_rms_epsilon": config.norm_eps,
    }
    heads, shared, widths = [0] * count, [0] * count, [0] * count
    for place, block in zip(places, config.blocks):
        if isinstance(block, AttentionConfig):
            heads[place], shared[place] = block.num_attention_heads, block.num_key_value_heads
        elif isinstance(block, MLPConfig):
            widths[place] = block.intermediate_size
    if name == "nemotron_h":
        heads = [n or max(heads) for n in heads]  # sizes of heads are read only if the first count is not 0
        sizes["attention.layer_norm_epsilon"] = config.norm_eps  # which some versions ask for beside the other
    sizes |= {"attention.head_count": _shortest(heads), "feed_forward_length": _shortest(widths)}
    sizes |= {"attention.head_count_kv": _shortest(shared)} if name != "mamba2" else {}
    sizes |= _head_sizes(config) | (_state_sizes(config) if name in ("nemotron_h", "mamba2") else {})
    return {f"{name}.{key}": value for key, value in sizes.items()} | {
        f"tokenizer.ggml.{key}": value[0] if isinstance(value, tuple) else value
        for key, value in ids.items()
        if value is not None
    }


def _shortest(values: list[int]) -> int | list[int]:
    return values[0] if len(set(values)) == 1 else values


def _head_sizes(config: ModelConfig) -> dict[str, Any]:
    for block in config.blocks:
        if isinstance(block, AttentionConfig):
            sizes: dict[str, Any] = {"attention.key_length": block.head_dim, "attention.value_length": block.head_dim}
            if block.rope is not None:
                sizes |= {"rope.dimension_count": block.head_dim, "rope.freq_base": float(block.rope.theta)}
            return sizes
    return {}


def _state_sizes(config: ModelConfig) -> dict[str, Any]:
    block = next(b for b in config.blocks if isinstance(b, Mamba2Config))
    return {
        "ssm.conv_kernel": block.conv_kernel,
        "ssm.inner_size": block.inner_size,
        "ssm.state_size": block.state_size,
        "ssm.group_count": block.num_groups,
        "ssm.time_step_rank": block.num_heads,
    }


def rope_divisors(config: ModelConfig) -> Tensor | None:
    """Llama 3.1's scaling as llama.cpp takes it: divisors of the frequencies, (head_dim / 2,) float32."""
    block = next((b for b in config.blocks if isinstance(b, AttentionConfig)), None)
    if block is None or block.rope is None or not isinstance(block.rope.scaling, RopeScaling):
        return None
    plain = dataclasses.replace(block.rope, scaling=None)
    return (inverse_frequencies(plain, block.head_dim) / inverse_frequencies(block.rope, block.head_dim)).float()


# ---- keys to a config


def read_config(fields: Fields, shapes: Shapes, frequencies: Callable[[], Tensor]) -> ModelConfig:
    """The model of a file; frequencies() reads its table of rotary divisors. Raises HalflapError for what is missing,
    for experts, and for rotary scalings other than Llama 3.1's."""
    if (own := _own_config(fields)) is not None:
        return own
    name = fields["general.architecture"]
    return READERS[name](fields, shapes, frequencies)


def _own_config(fields: Fields) -> ModelConfig | None:
    """The config that halflap left in the file, unless somebody changed the keys since, or another version wrote it."""
    try:
        config = ModelConfig.from_json(json.loads(fields[OWN_CONFIG]))
        expected = {"general.architecture": architecture_of(config), **metadata(config)}
        same = all(_equal(fields[key], value) for key, value in expected.items())
    except (KeyError, ValueError, TypeError, AttributeError, StopIteration):
        return None
    return config if same else None


def _equal(stored: Any, value: Any) -> bool:
    return np.float32(stored) == np.float32(value) if isinstance(value, float) else stored == value


def _each(value: Any, count: int) -> list[int]:
    """A number that llama.cpp stores once or a layer at a time."""
    values = [int(n) for n in value] if isinstance(value, Sequence) else [int(value)] * count
    if len(values) != count:
        raise HalflapError(
            f"the GGUF gives {len(values)} sizes for its {count} layers: copy or download it again, or use another "
            "conversion"
        )
    return values


def _common(fields: Fields, shapes: Shapes, prefix: str) -> dict[str, Any]:
    return {
        "vocab_size": shapes["token_embd.weight"][0],
        "hidden_size": int(fields[f"{prefix}.embedding_length"]),
        "norm_eps": _epsilon(fields[f"{prefix}.attention.layer_norm_rms_epsilon"]),
        "tie_word_embeddings": "output.weight" not in shapes,
        "max_position_embeddings": int(fields[f"{prefix}.context_length"]),
        **{ours: fields.get(f"tokenizer.ggml.{key}") for ours, key in IDS.items()},
    }


def _epsilon(value: float) -> float:
    """Undo the rounding to float32: 9.999999747378752e-06 was written as 1e-05."""
    return float(f"{value:.6g}")


def read_llama(fields: Fields, shapes: Shapes, frequencies: Callable[[], Tensor]) -> ModelConfig:
    """The config of a Llama, or of one whose layers differ (`deci`)."""
    name = fields["general.architecture"]
    if fields.get(f"{name}.expert_count"):
        raise HalflapError(
            f"the GGUF holds a mixture of {fields[f'{name}.expert_count']} experts, which halflap does not support: "
            "use a dense model"
        )
    _require(fields, shapes, name, "embedding_length", "block_count", "attention.head_count", "feed_forward_length")
    count = int(fields[f"{name}.block_count"])
    heads = _each(fields[f"{name}.attention.head_count"], count)
    shared = _each(fields.get(f"{name}.attention.head_count_kv", heads), count)
    widths = _each(fields[f"{name}.feed_forward_length"], count)
    guess = int(fields[f"{name}.embedding_length"]) // max(*heads, 1)
    head_dim = int(fields.get(f"{name}.attention.key_length", fields.get(f"{name}.rope.dimension_count", guess)))
    if (rotary := int(fields.get(f"{name}.rope.dimension_count", head_dim))) != head_dim:
        raise HalflapError(
            f"the GGUF rotates {rotary} of {head_dim} head channels, which Hugging Face's Llama cannot: "
            "use another model"
        )
    rope = _rope(fields, shapes, name, head_dim, frequencies)
    blocks: list[BlockConfig] = []
    for i in range(count):
        if heads[i] and not shared[i]:
            raise HalflapError(
                f"layer {i} of the GGUF has a linear map in place of attention, which halflap does not support: "
                "use another model"
            )
        if heads[i]:
            blocks.append(AttentionConfig(heads[i], shared[i], head_dim, rope, f"blk.{i}.attn_q.bias" in shapes))
        if widths[i]:
            blocks.append(MLPConfig(widths[i], "silu", gated=True, bias=f"blk.{i}.ffn_up.bias" in shapes))
    return ModelConfig(family="llama", blocks=tuple(blocks), **_common(fields, shapes, name))


def _rope(fields: Fields, shapes: Shapes, name: str, head_dim: int, frequencies: Callable[[], Tensor]) -> RopeConfig:
    """Rotary settings; Llama 3.1's scaling is stored only as a table of frequency divisors, and recognised by it."""
    theta = float(fields.get(f"{name}.rope.freq_base", 10000.0))
    kind = fields.get(f"{name}.rope.scaling.type", "none")
    if kind != "none":
        raise HalflapError(
            f"the GGUF scales its rotary embedding ({kind}), which halflap does not support: use another model"
        )
    if ROPE_FREQUENCIES not in shapes:
        return RopeConfig(theta=theta)
    divisors = frequencies().double()
    scaled = RopeConfig(theta=theta, scaling=RopeScaling(factor=round(divisors.max().item(), 4)))
    expected = inverse_frequencies(RopeConfig(theta=theta), head_dim) / inverse_frequencies(scaled, head_dim)
    if divisors.shape != expected.shape or not torch.allclose(divisors, expected, rtol=1e-5):
        raise HalflapError("the GGUF's rotary divisors are not those of Llama 3.1's scaling: use another model")
    return scaled


def read_nemotron_h(fields: Fields, shapes: Shapes, frequencies: Callable[[], Tensor]) -> ModelConfig:
    """The config of a Nemotron-H, or of Mamba-2 blocks alone; which block is what is read off the tensors it has."""
    del frequencies
    name = fields["general.architecture"]
    _require(fields, shapes, name, "embedding_length", "block_count", "ssm.inner_size", "ssm.time_step_rank")
    count = int(fields[f"{name}.block_count"])
    symbols = {"ssm_in.weight": "M", "attn_q.weight": "*", "ffn_up.weight": "-"}
    pattern = "".join(
        next((symbol for key, symbol in symbols.items() if f"blk.{i}.{key}" in shapes), "?") for i in range(count)
    )
    common = _common(fields, shapes, name)
    heads = int(fields[f"{name}.ssm.time_step_rank"])
    mamba = Mamba2Config(
        num_heads=heads,
        head_dim=int(fields[f"{name}.ssm.inner_size"]) // heads,
        num_groups=int(fields.get(f"{name}.ssm.group_count", 1)),
        state_size=int(fields[f"{name}.ssm.state_size"]),
        conv_kernel=int(fields[f"{name}.ssm.conv_kernel"]),
        norm_eps=common["norm_eps"],
    )
    queries = _each(fields.get(f"{name}.attention.head_count", 0), count)
    shared = _each(fields.get(f"{name}.attention.head_count_kv", 0), count)
    widths = _each(fields.get(f"{name}.feed_forward_length", 0), count)

    def block(i: int) -> BlockConfig:
        if pattern[i] == "*":
            return AttentionConfig(queries[i], shared[i], int(fields[f"{name}.attention.key_length"]))
        if pattern[i] == "-":
            return MLPConfig(widths[i], bias=f"blk.{i}.ffn_up.bias" in shapes)
        return parse_pattern(pattern[i], {"M": mamba})[0]

    return ModelConfig(family="nemotron_h", blocks=tuple(block(i) for i in range(count)), **common)


def _require(fields: Fields, shapes: Shapes, prefix: str, *keys: str) -> None:
    needed = [f"{prefix}.{key}" for key in (*keys, "context_length", "attention.layer_norm_rms_epsilon")]
    missing = [key for key in needed if key not in fields] + [t for t in ("token_embd.weight",) if t not in shapes]
    if missing:
        raise HalflapError(f"the GGUF lacks {', '.join(missing)}: copy or download it again, or use another conversion")


READERS: dict[str, Callable[[Fields, Shapes, Callable[[], Tensor]], ModelConfig]] = {
    "llama": read_llama,
    "deci": read_llama,
    "nemotron_h": read_nemotron_h,
    "mamba2": read_nemotron_h,
}
