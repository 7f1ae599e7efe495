"""Model shapes by name: the published ones, and small ones for two cores. Shapes only, no weights; no torch.

Nemotron-H sizes and patterns are those of the released configs; the 47B has the 45 Mamba-2, 5 attention and 48 MLP
blocks of its config, not the 44 and 49 of secondary notes. `-55m` and `-205m` keep the family's proportions (Mamba-2
and MLP in equal number, 7 % attention, each attention block followed by an MLP) at widths a laptop can train.

Minitron 8B's heads are together wider than its hidden size, and Minitron 4B has 24 of them as in its config, not the 32
of its model card, with which it would have 4.39 B parameters.
"""

from __future__ import annotations

from halflap.errors import HalflapError
from halflap.models.config import AttentionConfig, Mamba2Config, MLPConfig, ModelConfig, RopeConfig, parse_pattern

PATTERN_8B = "M-M-M-M*-" + 3 * "M-M-M-M-M*-" + "M-M-M-M-M-"
PATTERN_56B = "M-M-M-M*-" + 9 * "M-M-M-M-M*-" + "M-M-M-M-M-"
PATTERN_47B = "M-M-M-M-M-M-M-M-M*-M-M-M-M-M-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-M-M---MM---M-M*-M-M-M-M-M-"
PATTERN_28 = "M-M-M-M*-" + "M-M-M-M-M*-" + "M-M-M-M-"
PATTERN_14 = "M-M-M*-M-M-M*-"
PATTERN_TINY = "M-M*-M-"


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
    "nemotron-4-tiny": nemotron_4(
        4, hidden=96, mlp=384, attention=(6, 2, 16), vocab=512, context=512, std=0.02, ids=(1, 2, 0)
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
