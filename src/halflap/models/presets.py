"""Model shapes by name: the published ones, and small ones for two cores. Shapes only, no weights; no torch.

Nemotron-H sizes and patterns are those of the released configs; the 47B has the 45 Mamba-2, 5 attention and 48 MLP
blocks of its config, not the 44 and 49 of secondary notes. `-55m` and `-205m` keep the family's proportions (Mamba-2
and MLP in equal number, 7 % attention, each attention block followed by an MLP) at widths a laptop can train.

Minitron 8B's heads are together wider than its hidden size, and Minitron 4B has 24 of them as in its config, not the 32
of its model card, with which it would have 4.39 B parameters.

Of Hymba only the 1.5B's global layers and sharing groups are published; the others follow the rule of sharing.py, and
time step ranks and inner sizes are in the 1.5B's proportion to the hidden size.
"""

from __future__ import annotations

from halflap.errors import HalflapError
from halflap.models.config import (
    AttentionConfig,
    BlockConfig,
    HybridConfig,
    Mamba1Config,
    Mamba2Config,
    MLPConfig,
    ModelConfig,
    NTKScaling,
    RopeConfig,
)
from halflap.models.patterns import (
    PATTERN_8B,
    PATTERN_14,
    PATTERN_28,
    PATTERN_47B,
    PATTERN_56B,
    PATTERN_TINY,
    parse_pattern,
)
from halflap.models.sharing import global_layers, sharing_groups, sources


def nemotron_h(
    pattern: str,
    *,
    hidden: int,
    mlp: int,
    mamba: tuple[int, int, int, int],
    attention: tuple[int, int, int],
    vocab: int = 131072,
    context: int = 8192,
) -> ModelConfig:
    """mamba: heads, channels a head, groups, state size; attention: query heads, key/value heads, channels a head."""
    heads, channels, groups, state = mamba
    blocks = {
        "M": Mamba2Config(num_heads=heads, head_dim=channels, num_groups=groups, state_size=state),
        "*": AttentionConfig(*attention),
        "-": MLPConfig(mlp),
    }
    return ModelConfig(
        family="nemotron_h",
        vocab_size=vocab,
        hidden_size=hidden,
        blocks=parse_pattern(pattern, blocks),
        max_position_embeddings=context,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )


def llama(
    layers: int,
    *,
    hidden: int,
    mlp: int,
    attention: tuple[int, int, int],
    vocab: int,
    theta: float = 10000.0,
    context: int = 8192,
    tied: bool = False,
    ids: tuple[int, int, int | None] = (1, 2, 0),
) -> ModelConfig:
    """attention: query heads, key/value heads, channels a head; ids: the bos, eos and pad tokens."""
    pair = AttentionConfig(*attention, rope=RopeConfig(theta)), MLPConfig(mlp, activation="silu", gated=True)
    return ModelConfig(
        family="llama",
        vocab_size=vocab,
        hidden_size=hidden,
        blocks=pair * layers,
        tie_word_embeddings=tied,
        max_position_embeddings=context,
        bos_token_id=ids[0],
        eos_token_id=ids[1],
        pad_token_id=ids[2],
    )


def nemotron_4(
    layers: int,
    *,
    hidden: int,
    mlp: int,
    attention: tuple[int, int, int],
    vocab: int = 256000,
    context: int = 4096,
    std: float = 0.0134,
    ids: tuple[int, int, int | None] = (2, 3, None),
) -> ModelConfig:
    """attention: query heads, key/value heads, channels a head; std: of fresh weights; ids: bos, eos and pad tokens."""
    return ModelConfig(
        family="nemotron",
        vocab_size=vocab,
        hidden_size=hidden,
        blocks=(AttentionConfig(*attention, rope=RopeConfig(fraction=0.5)), MLPConfig(mlp)) * layers,
        norm="layer1p",
        max_position_embeddings=context,
        initializer_range=std,
        bos_token_id=ids[0],
        eos_token_id=ids[1],
        pad_token_id=ids[2],
    )


def hymba(
    layers: int,
    *,
    hidden: int,
    mlp: int,
    heads: tuple[int, int],
    state: int = 16,
    window: int = 1024,
    meta: int = 128,
    vocab: int = 32001,
    context: int = 8192,
    original_context: int | None = 2048,
) -> ModelConfig:
    """heads: query and key/value heads; original_context: where the rotary embedding is stretched from, None if not."""
    scaling = None if original_context is None else NTKScaling(original_context, context)
    ssm = Mamba1Config(inner_size=2 * hidden, state_size=state, dt_rank=hidden // 16)
    whole = global_layers(layers)
    shared = sources(sharing_groups(layers, whole))
    blocks: list[BlockConfig] = []
    for layer in range(layers):
        attention = AttentionConfig(
            *heads,
            head_dim=hidden // heads[0],
            rope=RopeConfig(scaling=scaling),
            value_head_dim=2 * hidden // heads[0],
            window=None if layer in whole else window,
            key_value_source=2 * shared[layer] if layer in shared else None,  # a layer is two blocks
        )
        blocks += [HybridConfig(attention, ssm), MLPConfig(mlp, activation="silu", gated=True)]
    return ModelConfig(
        family="hymba",
        vocab_size=vocab,
        hidden_size=hidden,
        blocks=tuple(blocks),
        norm_eps=1e-6,
        tie_word_embeddings=True,
        max_position_embeddings=context,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        num_meta_tokens=meta,
    )


PRESETS: dict[str, ModelConfig] = {
    "nemotron-h-4b": nemotron_h(PATTERN_8B, hidden=3072, mlp=12288, mamba=(112, 64, 8, 128), attention=(32, 8, 128)),
    "nemotron-h-8b": nemotron_h(PATTERN_8B, hidden=4096, mlp=21504, mamba=(128, 64, 8, 128), attention=(32, 8, 128)),
    "nemotron-h-47b": nemotron_h(PATTERN_47B, hidden=8192, mlp=30720, mamba=(256, 64, 8, 256), attention=(64, 8, 128)),
    "nemotron-h-56b": nemotron_h(PATTERN_56B, hidden=8192, mlp=32768, mamba=(256, 64, 8, 256), attention=(64, 8, 128)),
    "nemotron-h-205m": nemotron_h(
        PATTERN_28, hidden=1024, mlp=3264, mamba=(32, 64, 4, 128), attention=(16, 4, 64), vocab=8192
    ),
    "nemotron-h-55m": nemotron_h(
        PATTERN_28, hidden=512, mlp=1344, mamba=(16, 64, 4, 128), attention=(8, 2, 64), vocab=8192
    ),
    "nemotron-h-8m": nemotron_h(
        PATTERN_14, hidden=256, mlp=768, mamba=(16, 32, 4, 32), attention=(8, 2, 32), vocab=4096, context=2048
    ),
    "nemotron-h-tiny": nemotron_h(
        PATTERN_TINY, hidden=96, mlp=320, mamba=(12, 16, 4, 16), attention=(6, 2, 16), vocab=512, context=512
    ),
    "nemotron-4-340b": nemotron_4(96, hidden=18432, mlp=73728, attention=(96, 8, 192), std=0.0063),
    "nemotron-4-15b": nemotron_4(32, hidden=6144, mlp=24576, attention=(48, 8, 128)),
    "minitron-8b": nemotron_4(32, hidden=4096, mlp=16384, attention=(48, 8, 128), std=0.01),
    "minitron-4b": nemotron_4(32, hidden=3072, mlp=9216, attention=(24, 8, 128)),
    "nemotron-mini-4b": nemotron_4(32, hidden=3072, mlp=9216, attention=(24, 8, 128)),
    "nemotron-4-55m": nemotron_4(
        17, hidden=512, mlp=2048, attention=(8, 2, 64), vocab=8192, context=8192, std=0.02, ids=(1, 2, 0)
    ),
    "nemotron-4-8m": nemotron_4(
        8, hidden=256, mlp=1024, attention=(8, 2, 32), vocab=4096, context=2048, std=0.02, ids=(1, 2, 0)
    ),
    "nemotron-4-2m": nemotron_4(
        8, hidden=128, mlp=512, attention=(4, 2, 32), vocab=2048, context=2048, std=0.02, ids=(1, 2, 0)
    ),
    "nemotron-4-tiny": nemotron_4(
        4, hidden=96, mlp=384, attention=(6, 2, 16), vocab=512, context=512, std=0.02, ids=(1, 2, 0)
    ),
    "hymba-125m": hymba(24, hidden=512, mlp=1664, heads=(8, 4)),
    "hymba-350m": hymba(32, hidden=768, mlp=2432, heads=(12, 4)),
    "hymba-1.5b": hymba(32, hidden=1600, mlp=5504, heads=(25, 5)),
    "hymba-55m": hymba(12, hidden=512, mlp=1344, heads=(8, 4), window=256, meta=32, vocab=8192, original_context=None),
    "hymba-8m": hymba(
        8, hidden=256, mlp=384, heads=(8, 2), window=128, meta=16, vocab=4096, context=2048, original_context=None
    ),
    "hymba-2m": hymba(
        8, hidden=128, mlp=256, heads=(4, 2), window=64, meta=16, vocab=2048, context=2048, original_context=None
    ),
    "hymba-tiny": hymba(
        8, hidden=96, mlp=192, heads=(6, 2), state=8, window=64, meta=8, vocab=512, context=512, original_context=None
    ),
    "smollm2-135m": llama(
        30, hidden=576, mlp=1536, attention=(9, 3, 64), vocab=49152, theta=100000.0, tied=True, ids=(1, 2, 2)
    ),
    "llama-55m": llama(16, hidden=512, mlp=1472, attention=(8, 2, 64), vocab=8192),
    "llama-tiny": llama(4, hidden=96, mlp=256, attention=(6, 2, 16), vocab=512, context=512),
}


def preset(name: str) -> ModelConfig:
    """Raise HalflapError, with the names there are, for an unknown one."""
    if name not in PRESETS:
        raise HalflapError(
            f"{name!r} is neither a directory nor a preset; presets are {', '.join(PRESETS)}: choose one of them"
        )
    return PRESETS[name]
