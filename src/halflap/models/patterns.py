"""The order of blocks as a string, one symbol a block: published ones, and how one is read."""

from __future__ import annotations

from collections.abc import Mapping

from halflap.errors import HalflapError
from halflap.models.config import BlockConfig

PATTERN_8B = "M-M-M-M*-" + 3 * "M-M-M-M-M*-" + "M-M-M-M-M-"
PATTERN_56B = "M-M-M-M*-" + 9 * "M-M-M-M-M*-" + "M-M-M-M-M-"
PATTERN_47B = "M-M-M-M-M-M-M-M-M*-M-M-M-M-M-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-M-M---MM---M-M*-M-M-M-M-M-"
PATTERN_28 = "M-M-M-M*-" + "M-M-M-M-M*-" + "M-M-M-M-"
PATTERN_14 = "M-M-M*-M-M-M*-"
PATTERN_TINY = "M-M*-M-"


def parse_pattern(pattern: str, blocks: Mapping[str, BlockConfig]) -> tuple[BlockConfig, ...]:
    """Expand a pattern string with one block config a symbol; `|` and a `/...` suffix (Megatron) are ignored.

    Raises HalflapError for MoE (`E`), by name, and for any other letter, with its position.
    """
    symbols = pattern.split("/")[0].replace("|", "")
    for position, symbol in enumerate(symbols):
        if symbol == "E":
            raise HalflapError(
                f"block {position} of pattern {pattern!r} is a mixture-of-experts block (E), which halflap does not "
                "support yet; use a dense model with M, * and - blocks"
            )
        if symbol not in blocks:
            raise HalflapError(
                f"letter {symbol!r} at position {position} of pattern {pattern!r} is not a block; allowed are "
                "M (Mamba-2), * (attention), - (MLP): correct the pattern"
            )
    return tuple(blocks[symbol] for symbol in symbols)
