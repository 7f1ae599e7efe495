"""Which attention blocks see everything, and which read the keys and values of another (Hymba, section 4).

Global layers keep their own; windowed ones share in consecutive groups whose first member, the producer, has keys and
values. Rule for any depth: global are the first, the last and the one before the middle; each run of windowed layers
between them is cut into pairs from its start, and where it is odd its first group is a triple. Pure data: no torch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, NoReturn

from halflap.errors import HalflapError

if TYPE_CHECKING:
    from halflap.models.config import BlockConfig

ALIKE = ("num_key_value_heads", "head_dim", "value_dim", "rope", "window")


def global_layers(layers: int) -> tuple[int, ...]:
    """Layers that attend to everything: 0, 15 and 31 of 32."""
    return tuple(sorted({0, max(0, layers // 2 - 1), layers - 1}))


def sharing_groups(layers: int, whole: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """Groups of windowed layers with one set of keys and values, producer first; lone layers are in none."""
    groups: list[tuple[int, ...]] = []
    run: list[int] = []
    for layer in range(layers + 1):
        if layer < layers and layer not in whole:
            run.append(layer)
            continue
        first = 3 if len(run) % 2 else 2
        groups += [g for g in (tuple(run[:first]), *zip(run[first::2], run[first + 1 :: 2])) if len(g) > 1]
        run = []
    return tuple(groups)


def sources(groups: Sequence[Sequence[int]]) -> dict[int, int]:
    """Each consumer's producer."""
    return {layer: group[0] for group in groups for layer in group[1:]}


def check_key_value_sources(blocks: Sequence[BlockConfig]) -> None:
    """Raise HalflapError unless every block that borrows keys and values reads an earlier windowed block of its kind.

    Between the two there must be no global block: a group lies within one run of windowed blocks.
    """
    for index, block in enumerate(blocks):
        own = block.attention
        if own is None or (source := own.key_value_source) is None:
            continue

        def stop(reason: str, index: int = index, source: int = source) -> NoReturn:
            raise HalflapError(
                f"block {index} reads the keys and values of block {source} (key_value_source), {reason}: name an "
                "earlier windowed block that has its own, or leave key_value_source out"
            )

        if not 0 <= source < index:
            stop("which does not come before it")
        other = blocks[source].attention
        if other is None:
            stop(f"which has no attention ({blocks[source].kind})")
        if other.key_value_source is not None:
            stop(f"which itself reads those of block {other.key_value_source}")
        for name in ALIKE:
            theirs, ours = getattr(other, name), getattr(own, name)
            if theirs != ours:
                stop(f"whose {name} is {theirs} where its own is {ours}")
        between = [b.attention for b in blocks[source : index + 1] if b.attention is not None]
        if any(attention.window is None for attention in between):
            stop("and a global block, which shares with none, is among them or between")


def keep_blocks(blocks: Sequence[BlockConfig], kept: Sequence[int]) -> tuple[BlockConfig, ...]:
    """The kept blocks, in order, with their key_value_source renumbered.

    Raises HalflapError when a block stays whose keys and values are those of a block that goes.
    """
    place = {old: new for new, old in enumerate(kept)}
    return tuple(_renumber(blocks[old], old, place) for old in kept)


def _renumber(block: BlockConfig, index: int, place: dict[int, int]) -> BlockConfig:
    source = None if block.attention is None else block.attention.key_value_source
    if source is not None and source not in place:
        raise HalflapError(
            f"block {index} reads the keys and values of block {source}, which is dropped; keep block {source}, or "
            f"drop block {index} too"
        )
    return block if source is None else with_source(block, place[source])


def with_source(block: BlockConfig, source: int | None) -> BlockConfig:
    """A block that reads another one's keys and values with another source, None its own; others as they are."""
    attention = block.attention
    if attention is None or attention.key_value_source is None:
        return block
    moved = dataclasses.replace(attention, key_value_source=source)
    return moved if block is attention else dataclasses.replace(block, attention=moved)  # type: ignore[call-arg]
