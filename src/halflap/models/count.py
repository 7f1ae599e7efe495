"""Costs from the config alone: parameters, floating-point operations a token, bytes of cache and memory.

Parameters are the layout multiplied out. A multiply and an add are two operations, as everyone counts them. Cache
bytes are those of one sequence's state times the batch. Pure data: no torch. Nothing here is a measurement.
"""

from __future__ import annotations

import math
from typing import Literal

from halflap.models.config import AttentionConfig, BlockConfig, Mamba2Config, MLPConfig, ModelConfig
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
        norm
        + sum(math.prod(shape(dims)) for dims in mixer_layout(block, index, config.hidden_size).values())
        for index, block in enumerate(config.blocks)
    ]


def flops_per_token(config: ModelConfig, context: int, phase: Phase = "decode") -> int:
    """Operations of one token's forward pass, the language head included.

    decode: one token attending to `context` tokens (itself included), one step of the recurrence. prefill: the mean
    over the tokens of a prompt of `context` tokens, attention halved by causality, the chunked form of the scan as
    dense products (Dao & Gu 2024, section 6). Twice a matrix's parameters for every projection; norms, activations and
    the embedding look-up, all of lower order, are left out.
    """
    mixers = sum(_block_flops(block, config.hidden_size, context, phase) for block in config.blocks)
    return round(mixers + 2 * config.hidden_size * config.vocab_size)


def _block_flops(block: BlockConfig, hidden: int, context: int, phase: Phase) -> float:
    projections = 2 * sum(
        math.prod(shape(dims)) for name, dims in mixer_layout(block, 0, hidden).items() if name.endswith("proj.weight")
    )
    if isinstance(block, AttentionConfig):
        seen = context if phase == "decode" else (context + 1) / 2
        return projections + 4 * block.num_attention_heads * block.head_dim * seen  # q k^T and its product with v
    if isinstance(block, Mamba2Config):
        conv = 2 * block.conv_kernel * block.conv_size
        return projections + conv + (_step_flops(block) if phase == "decode" else _scan_flops(block, context))
    assert isinstance(block, MLPConfig)
    return projections


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
) -> int:
    """Bytes of decode state for `batch` sequences of `context` tokens: keys and values, convolution tails, SSM states.

    Of the convolution we hold the last W - 1 inputs and count those; transformers holds W columns, which published
    figures count: `conv_columns=4` gives them.
    """
    bits = 0
    for block in config.blocks:
        if isinstance(block, AttentionConfig):
            bits += 2 * block.num_key_value_heads * block.head_dim * context * kv_bits
        elif isinstance(block, Mamba2Config):
            columns = block.conv_kernel - 1 if conv_columns is None else conv_columns
            bits += block.conv_size * columns * conv_bits
            bits += block.inner_size * block.state_size * ssm_bits
    return math.ceil(batch * bits / 8)


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
