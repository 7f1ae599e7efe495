"""What a family is: its config in both directions, its tensor names, and how blocks go together.

Also the small helpers with which families read a Hugging Face `config.json`, whose keys have had several spellings.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from halflap.checkpoints.names import NameRow
from halflap.errors import HalflapError
from halflap.models.config import (
    AttentionConfig,
    HybridConfig,
    LinearConfig,
    Mamba1Config,
    MLPConfig,
    ModelConfig,
    NTKScaling,
)

Json = Mapping[str, Any]

# Keys that transformers writes into every config and that change no forward pass.
EVERY_CONFIG = (
    *("use_cache", "model_type", "architectures", "auto_map", "torch_dtype", "dtype", "transformers_version"),
    *("torchscript", "quantization_config", "return_dict", "output_attentions", "output_hidden_states"),
    *("use_bfloat16", "id2label", "tf_legacy_loss", "pruned_heads", "chunk_size_feed_forward", "label2id"),
    *("is_encoder_decoder", "is_decoder", "cross_attention_hidden_size", "add_cross_attention", "tie_encoder_decoder"),
    *("tokenizer_class", "sep_token_id", "decoder_start_token_id", "task_specific_params", "problem_type"),
    *("max_length", "min_length", "do_sample", "early_stopping", "num_beams", "num_beam_groups", "temperature"),
    *("diversity_penalty", "top_k", "top_p", "typical_p", "repetition_penalty", "length_penalty", "output_scores"),
    *("no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "bad_words_ids", "num_return_sequences"),
    *("return_dict_in_generate", "forced_bos_token_id", "forced_eos_token_id", "remove_invalid_values"),
    *("exponential_decay_length_penalty", "suppress_tokens", "begin_suppress_tokens", "finetuning_task", "prefix"),
)


@dataclass(frozen=True)
class Family:
    """One architecture of Hugging Face.

    cannot_write(config) is the reason why no stock config.json can express a config, or None; depth_unit is the
    number of consecutive blocks that are one layer there; prefixes lists the canonical tensor prefix first.
    """

    name: str
    architecture: str
    read_config: Callable[[Json], ModelConfig]
    write_config: Callable[[ModelConfig], dict[str, Any]]
    cannot_write: Callable[[ModelConfig], str | None]
    rows: tuple[NameRow, ...]
    depth_unit: int = 1
    prefixes: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()


def pick(data: Json, default: Any, *keys: str) -> Any:
    """The value under whichever of `keys` is there, null counting as absent, or the default; refuse two that differ."""
    present = {key: data[key] for key in keys if data.get(key) is not None}
    values = list(present.values())
    if any(value != values[0] for value in values):
        listed = ", ".join(f"{key}={value!r}" for key, value in present.items())
        raise HalflapError(f"config.json says one thing twice and differently ({listed}): keep the right one")
    if values and isinstance(default, bool) and not isinstance(values[0], bool):
        key = next(iter(present))
        raise HalflapError(f"config.json has {key}={values[0]!r}; allowed are true and false: correct it")
    return values[0] if values else default


def refuse(data: Json, family: str, allowed: Mapping[str, tuple[Any, ...]]) -> None:
    """Raise HalflapError when a key of `allowed` has a value that is neither null nor among those listed."""
    for key, values in allowed.items():
        value = data.get(key)
        if value is not None and value not in values:
            names = " or ".join(repr(v) for v in values) or "null"
            raise HalflapError(
                f"config.json has {key}={value!r}, which halflap's {family} does not support; allowed is {names}: "
                "use a checkpoint without it"
            )
    if data.get("quantization_config"):
        raise HalflapError(
            "config.json has a quantization_config; quantized weights are not read: "
            "dequantize the checkpoint to bfloat16 or float32 first"
        )


def read_float(value: Any) -> float:
    """A number as JSON spells it, infinity included: `Infinity`, "inf", or transformers' {"__float__": "Infinity"}."""
    if isinstance(value, Mapping):
        value = value.get("__float__")
    try:
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise HalflapError(f"config.json has {value!r} where a number is needed: correct it") from None


def read_positive(data: Json, default: float, *keys: str) -> float:
    """The finite number above 0 under whichever of `keys` is there, or the default. Raises HalflapError, by name."""
    value = pick(data, default, *keys)
    number = read_float(value)
    if not 0 < number < math.inf:
        name = next((key for key in keys if data.get(key) is not None), keys[0])
        raise HalflapError(f"config.json has {name}={value!r}; it must be a number above 0: correct it")
    return number


def check_kinds(data: Json, kinds: Mapping[str, type]) -> None:
    """Raise HalflapError when a key of `kinds` has a value that is neither null nor of its kind."""
    words = {int: "a whole number", bool: "true or false", list: "a list", Mapping: "an object"}
    for key, kind in kinds.items():
        value = data.get(key)
        if value is not None and (not isinstance(value, kind) or (kind is int and isinstance(value, bool))):
            raise HalflapError(f"config.json has {key}={value!r}; it must be {words[kind]}: correct it")


def check_sizes(data: Json, keys: Sequence[str]) -> None:
    """Raise HalflapError when one of `keys` is not a whole number of at least 1."""
    for key in keys:
        if not isinstance(data[key], int) or isinstance(data[key], bool) or data[key] < 1:
            raise HalflapError(
                f"config.json has {key}={data[key]!r}; it must be a whole number of at least 1: correct it"
            )


def layer_sizes(data: Json, hidden: int, heads: int, layers: int) -> tuple[int, int, int]:
    """hidden_size, num_attention_heads and num_hidden_layers of a Transformer, or these defaults.

    Raises HalflapError when one is not a whole number of at least 1.
    """
    defaults = {"hidden_size": hidden, "num_attention_heads": heads, "num_hidden_layers": layers}
    sizes = {key: pick(data, default, key) for key, default in defaults.items()}
    check_sizes(sizes, tuple(sizes))
    return sizes["hidden_size"], sizes["num_attention_heads"], sizes["num_hidden_layers"]


def token_ids(data: Json, defaults: Mapping[str, int | None]) -> dict[str, Any]:
    """bos, eos and pad token ids; an absent key takes the class default, an explicit null stays None.

    Raises HalflapError for what is no token id.
    """
    ids: dict[str, Any] = {key: data.get(key, default) for key, default in defaults.items()}
    for key, value in ids.items():
        listed = value if isinstance(value, list) and key == "eos_token_id" else [value]
        if not all(one is None or type(one) is int for one in listed):
            raise HalflapError(f"config.json has {key}={value!r}; a token id is a whole number or null: correct it")
    if isinstance(ids.get("eos_token_id"), list):
        ids["eos_token_id"] = tuple(ids["eos_token_id"])
    return ids


def write_token_ids(config: ModelConfig) -> dict[str, Any]:
    eos = config.eos_token_id
    return {
        "bos_token_id": config.bos_token_id,
        "eos_token_id": list(eos) if isinstance(eos, tuple) else eos,
        "pad_token_id": config.pad_token_id,
    }


def only(values: set[Any], what: str) -> str | None:
    """None when all blocks agree on `what`, else the sentence that says they do not."""
    if len(values) <= 1:
        return None
    shown = sorted(values, key=str)
    return f"its blocks differ in {what} ({', '.join(map(str, shown[:4]))}{', ...' if len(shown) > 4 else ''})"


def beyond_stock(config: ModelConfig) -> str | None:
    """What no stock class of a Transformer or of Nemotron-H has, in a sentence, or None."""
    if config.num_meta_tokens:
        return f"it has {config.num_meta_tokens} meta tokens, which the stock class has not"
    for block in config.blocks:
        if isinstance(block, HybridConfig | Mamba1Config | LinearConfig):
            return f"it has {block.kind} blocks, which the stock class has not"
        if (attention := block.attention) is None:
            continue
        if attention.window is not None:  # as every block has that reads another's keys and values
            return f"its attention has a window of {attention.window} tokens, which the stock class has not"
        if attention.value_dim != attention.head_dim:
            return f"its value heads are {attention.value_dim} wide and its key heads {attention.head_dim}"
        if attention.rope is not None and isinstance(attention.rope.scaling, NTKScaling):
            return "its rotary embedding is stretched (NTK), which the stock class's is not"
    return None


def beyond_transformer(
    config: ModelConfig, own: Callable[[list[AttentionConfig], list[MLPConfig]], str | None]
) -> str | None:
    """Why no stock Transformer, of pairs of attention and MLP that are all alike, is this model, or None.

    own(attention, mlp) gives what the family's class alone has not.
    """
    attention = [b for b in config.blocks[::2] if isinstance(b, AttentionConfig)]
    mlp = [b for b in config.blocks[1::2] if isinstance(b, MLPConfig)]
    if len(attention) != len(mlp) or len(attention) + len(mlp) != len(config.blocks):
        return f"its blocks are not pairs of attention and MLP ({config.pattern()})"
    residual = "its residual is kept in float32, which the stock class does not do" if config.residual_in_fp32 else None
    return (
        beyond_stock(config)
        or residual
        or own(attention, mlp)
        or only({b.intermediate_size for b in mlp}, "intermediate_size")
        or only({b.activation for b in mlp}, "hidden_act")
        or only({b.bias for b in mlp}, "mlp_bias")
        or only({b.num_attention_heads for b in attention}, "num_attention_heads")
        or only({b.num_key_value_heads for b in attention}, "num_key_value_heads")
        or only({b.head_dim for b in attention}, "head_dim")
        or only({b.bias for b in attention}, "attention_bias")
        or only({b.rope for b in attention}, "rotary embedding")
    )


def write_transformer(config: ModelConfig) -> dict[str, Any]:
    """The keys of `config.json` that stock Transformers share; only of a model they can express."""
    attention, mlp = config.blocks[:2]
    assert isinstance(attention, AttentionConfig) and isinstance(mlp, MLPConfig)
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": mlp.intermediate_size,
        "num_hidden_layers": len(config.blocks) // 2,
        "num_attention_heads": attention.num_attention_heads,
        "num_key_value_heads": attention.num_key_value_heads,
        "head_dim": attention.head_dim,
        "hidden_act": mlp.activation,
        "attention_bias": attention.bias,
        "mlp_bias": mlp.bias,
        "tie_word_embeddings": config.tie_word_embeddings,
        "max_position_embeddings": config.max_position_embeddings,
        "initializer_range": config.initializer_range,
        "use_cache": True,
        **write_token_ids(config),
    }
