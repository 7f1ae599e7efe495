"""Costs from the config alone: parameters, floating-point operations a token, bytes of cache and memory.

Parameters are the layout multiplied out. A multiply and an add are two operations, as everyone counts them. Cache
bytes are those of one sequence's state times the batch. Pure data: no torch. Nothing here is a measurement.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

from halflap.models.config import AttentionConfig, BlockConfig, Mamba1Config, Mamba2Config, ModelConfig
from halflap.models.layout import layout, mixer_layout, norm_layout, shape

Phase = Literal["decode", "prefill"]
EMBEDDINGS = ("embedding.weight", "head.weight")


def count_parameters(config: ModelConfig) -> int:
    """All parameters, embeddings included; a tied head counts once."""
    return sum(math.prod(shape(dims)) for dims in layout(config).values())


def count_non_embedding_parameters(config: ModelConfig) -> int:
    """Parameters without the input embedding and the language head."""
    return sum(math.prod(shape(dims)) for name, dims in layout(config).items() if name not in EMBEDDINGS)


def count_block_parameters(config: ModelConfig) -> list[int]:
    """Parameters of each block, its norm included."""
    norm = config.hidden_size * len(norm_layout(config))
    return [
        norm + sum(math.prod(shape(dims)) for dims in mixer_layout(block, index, config.hidden_size).values())
        for index, block in enumerate(config.blocks)
    ]


def flops_per_token(config: ModelConfig, context: int, phase: Phase = "decode") -> int:
    """Operations of one token's forward pass, the language head included.

    decode: one token attending to `context` tokens (itself included), one step of the recurrence. prefill: the mean
    over the tokens of a prompt of `context` tokens, attention halved by causality, the chunked form of the scan as
    dense products (Dao & Gu 2024, section 6). Twice a matrix's parameters for every projection; norms, activations and
    the embedding look-up, all of lower order, are left out.
    """
    meta = config.num_meta_tokens
    mixers = sum(_block_flops(block, config.hidden_size, context, phase, meta) for block in config.blocks)
    return round(mixers + 2 * config.hidden_size * config.vocab_size)


def _block_flops(block: BlockConfig, hidden: int, context: int, phase: Phase, meta: int) -> float:
    projections = 2 * sum(
        math.prod(shape(dims)) for name, dims in mixer_layout(block, 0, hidden).items() if name.endswith("proj.weight")
    )
    inside = 0.0
    if (attention := block.attention) is not None:  # q k^T and its product with v
        channels = 2 * attention.num_attention_heads * (attention.head_dim + attention.value_dim)
        inside += channels * (tokens_seen(attention, context, phase) + meta)
    if isinstance(block.ssm, Mamba1Config):
        inside += 2 * block.ssm.conv_kernel * block.ssm.inner_size + _selective_flops(block.ssm)
    if isinstance(block.ssm, Mamba2Config):
        inside += 2 * block.ssm.conv_kernel * block.ssm.conv_size
        inside += _step_flops(block.ssm) if phase == "decode" else _scan_flops(block.ssm, context)
    return projections + inside


def tokens_seen(block: AttentionConfig, context: int, phase: Phase) -> float:
    """Tokens that a query sees, itself included: the last one's, or the mean over a prompt of `context` tokens."""
    reach = context if block.window is None else min(context, block.window + 1)
    return reach if phase == "decode" else reach - reach * (reach - 1) / 2 / context


def _selective_flops(block: Mamba1Config) -> int:
    """S = exp(dt A) S + (dt u) B: 5 an element; y = S C: 2; dt u and y + D u: 3 a channel."""
    return block.inner_size * (7 * block.state_size + 3)


def _step_flops(block: Mamba2Config) -> int:
    """S = a S + (dt x) B^T: 3 an element; y = S C: 2; y + D x: 2 a channel."""
    return block.inner_size * (5 * block.state_size + 2)


def _scan_flops(block: Mamba2Config, context: int) -> int:
    """A token of the chunked scan: C B^T once a group, times x, into the chunk's state, out of the carried one."""
    chunk = min(block.chunk_size, context)
    scores = 2 * chunk * block.num_groups * block.state_size
    within = 3 * chunk * block.num_heads + 2 * chunk * block.inner_size  # decays and scores multiplied, then times x
    states = 2 * 2 * block.inner_size * block.state_size
    return scores + within + states + 2 * block.inner_size


def cache_bytes(
    config: ModelConfig,
    context: int,
    batch: int = 1,
    kv_bits: int = 16,
    ssm_bits: int = 32,
    *,
    conv_bits: int = 16,
    conv_columns: int | None = None,
    window_slots: int = 1,
) -> int:
    """Bytes of decode state for `batch` sequences of `context` tokens: everything that `cache_parts` lists."""
    parts = cache_parts(
        config, context, batch, kv_bits, ssm_bits,
        conv_bits=conv_bits, conv_columns=conv_columns, window_slots=window_slots,
    )  # fmt: skip
    return math.ceil(sum(parts.values()))


def cache_parts(
    config: ModelConfig,
    context: int,
    batch: int = 1,
    kv_bits: int = 16,
    ssm_bits: int = 32,
    *,
    conv_bits: int = 16,
    conv_columns: int | None = None,
    window_slots: int = 1,
) -> dict[str, float]:
    """Bytes by what they hold: keys and values of whole and windowed attention, and of meta tokens; conv tails; states.

    Of the convolution we hold the last W - 1 inputs and count those; transformers holds W columns, which published
    figures count: `conv_columns=4` gives them. A windowed block holds its window and `window_slots` tokens more, we the
    newest one; published figures count the window alone: `window_slots=0`.
    """
    bits = dict.fromkeys(("whole", "windowed", "meta", "convolution", "ssm"), 0)
    for block in config.blocks:
        attention, ssm = block.attention, block.ssm
        if attention is not None and attention.key_value_source is None:
            token = attention.num_key_value_heads * (attention.head_dim + attention.value_dim) * kv_bits
            bits["meta"] += token * config.num_meta_tokens
            if attention.window is None:
                bits["whole"] += token * context
            else:
                bits["windowed"] += token * min(context, attention.window + window_slots)
        if ssm is not None:
            channels = ssm.conv_size if isinstance(ssm, Mamba2Config) else ssm.inner_size
            columns = ssm.conv_kernel - 1 if conv_columns is None else conv_columns
            bits["convolution"] += channels * columns * conv_bits
            bits["ssm"] += ssm.inner_size * ssm.state_size * ssm_bits
    return {name: batch * value / 8 for name, value in bits.items()}


def published_cache(config: ModelConfig, contexts: Sequence[int] = ()) -> dict[str, Any]:
    """The cache in the setting of Hymba's published figures: 8,000 tokens, 16 bits for everything, tails of 4 columns.

    `by_context` has the same sums at other contexts. Of which parts their 79 MB for the 1.5B are the sum is not said;
    all but the SSM states (`without_states`) give it.
    """
    sums = {str(context): _published_sums(config, context) for context in (8000, *contexts)}
    return {"context": 8000, "dtype": "float16", "bytes": sums["8000"], "by_context": sums}


def _published_sums(config: ModelConfig, context: int) -> dict[str, float]:
    parts = cache_parts(config, context, ssm_bits=16, conv_columns=4, window_slots=0)
    tokens = parts["whole"] + parts["windowed"]
    return {
        "keys_and_values": tokens,
        "with_meta_tokens": tokens + parts["meta"],
        "without_states": tokens + parts["meta"] + parts["convolution"],
        "everything": sum(parts.values()),
    }


def memory_bytes(
    config: ModelConfig,
    context: int,
    batch: int = 1,
    weight_bits: int = 16,
    kv_bits: int = 16,
    ssm_bits: int = 32,
) -> int:
    """Weights and decode state together; activations, which depend on the engine, are not in it."""
    weights = math.ceil(count_parameters(config) * weight_bits / 8)
    return weights + cache_bytes(config, context, batch, kv_bits, ssm_bits)
