"""Which axes may be cut, what people call their sizes, and the config that remains.

An axis is named as in `models/layout.py` (`hidden`, `blocks.3.head`); its short name is the last part. A size is
named as in Hugging Face configs (`mamba_num_heads`) and is what recipes speak of; which axis it asks for in which kind
of block says `kinds.py`. Pure data: no torch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from halflap.compress.kinds import (
    BLOCK_COUNTS,
    BLOCKS_OF,
    KINDS,
    PRUNABLE,
    block_counts,
    block_sizes,
    owner,
    resize_block,
)
from halflap.errors import HalflapError
from halflap.models.config import BlockConfig, LinearConfig, MLPConfig, ModelConfig
from halflap.models.layout import Axis, layout
from halflap.models.sharing import keep_blocks as left_blocks


@dataclass(frozen=True)
class Sizes:
    """Target sizes; None keeps the teacher's, and so does a size larger than a block's own."""

    hidden_size: int | None = None
    """Width of the residual stream."""
    intermediate_size: int | None = None
    """Neurons of each MLP."""
    mamba_num_heads: int | None = None
    """Heads of each Mamba-2 block, a multiple of its groups."""
    mamba_head_dim: int | None = None
    """Channels of a Mamba-2 head; of hybrid blocks, of an attention head's values and the SSM beside them."""
    ssm_state_size: int | None = None
    """State size of a Mamba block."""
    num_attention_heads: int | None = None
    """Query heads of each attention or hybrid block, a multiple of its key/value heads."""
    num_key_value_heads: int | None = None
    """Key/value heads of each attention or hybrid block; with one go the query heads that read it."""
    mamba_intermediate_size: int | None = None
    """Channels of each Mamba-1 block."""
    num_blocks: int | None = None
    """How many blocks stay; the least important go."""
    drop_blocks: tuple[int, ...] = ()
    """Blocks that go, by index."""
    num_mamba_blocks: int | None = None
    """How many Mamba blocks stay; like the two after it, in place of num_blocks."""
    num_attention_blocks: int | None = None
    """How many attention blocks stay."""
    num_mlp_blocks: int | None = None
    """How many MLP blocks stay."""

    def to_json(self) -> dict[str, Any]:
        """Those that are given."""
        return {name: value for name, value in dataclasses.asdict(self).items() if value not in (None, ())}

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Sizes:
        values: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in data.items()}
        return Sizes(**values)


def _axes_by_size() -> dict[str, tuple[str, ...]]:
    rows = {(row.size, row.axis) for kind in KINDS.values() for row in kind.sizes} | {("hidden_size", "hidden")}
    names = [field.name for field in dataclasses.fields(Sizes)]
    return {name: axes for name in names if (axes := tuple(sorted(axis for size, axis in rows if size == name)))}


AXES: dict[str, tuple[str, ...]] = _axes_by_size()
"""Short names of the axes that a size cuts, by the names of `Sizes`."""

# For families whose stock classes count several of our blocks as one layer, how many.
DEPTH_UNITS: dict[str, int] = {"llama": 2, "nemotron": 2, "hymba": 2}

# Families whose stock class opens only what has a hidden size that is a multiple of its query heads.
HEADS_DIVIDE_HIDDEN = ("llama",)


def short_name(axis: str) -> str:
    return axis.rsplit(".", 1)[-1]


def block_of(axis: str) -> int | None:
    """The block an axis belongs to; None for one of the whole model."""
    return int(axis.split(".")[1]) if axis.startswith("blocks.") else None


def axes_of(config: ModelConfig) -> dict[str, Axis]:
    """Every axis of the model that may be cut, by name, parents before children."""
    found = {
        axis.name: axis
        for dims in layout(config).values()
        for dim in dims
        for span in dim
        for axis in span
        if short_name(axis.name) in PRUNABLE
    }
    return dict(sorted(found.items(), key=lambda item: item[1].parent is not None))


def depth_units(config: ModelConfig) -> tuple[tuple[int, ...], ...]:
    """Runs of blocks that are counted, ranked and dropped together: the layers of a stock class, or single blocks.

    Single ones too where a layer lacks a part (`droppable_units`): no stock class opens that model in any case.
    """
    step = DEPTH_UNITS.get(config.family, 1)
    return _runs(config, step if _in_layers(config.blocks) else 1)


def droppable_units(config: ModelConfig) -> tuple[tuple[int, ...], ...]:
    """Runs of blocks that a plan keeps or drops together, as finely as can be: single blocks, of a Hymba layers.

    A released Hymba has no layer without one of its parts.
    """
    return depth_units(config) if config.family == "hymba" else _runs(config, 1)


def _runs(config: ModelConfig, step: int) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(range(start, start + step)) for start in range(0, len(config.blocks), step))


def _in_layers(blocks: Sequence[BlockConfig]) -> bool:
    """Whether they are pairs of attention, or of what is in its place, and MLP."""
    first, second = blocks[::2], blocks[1::2]
    return (
        len(first) == len(second)
        and not any(isinstance(block, MLPConfig) for block in first)
        and all(isinstance(block, MLPConfig | LinearConfig) for block in second)
    )


def block_types(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Blocks that are counted and ranked among themselves, by the size that says how many of them stay.

    Layers of several blocks, and what leans on them, are all of one type, counted by `num_blocks`.
    """
    if len(depth_units(config)[0]) > 1 or any(type(block) not in BLOCKS_OF for block in config.blocks):
        return {"num_blocks": tuple(range(len(config.blocks)))}
    names = [BLOCKS_OF[type(block)] for block in config.blocks]
    return {name: tuple(i for i, other in enumerate(names) if other == name) for name in dict.fromkeys(names)}


def kept_after(config: ModelConfig, sizes: Sizes, drop_order: tuple[int, ...] | None) -> tuple[int, ...]:
    """Blocks that stay when the first of `drop_order` go, of each type or of all, until as many are left as asked."""
    everything = tuple(range(len(config.blocks)))
    gone = set(sizes.drop_blocks)
    for name, blocks in {"num_blocks": everything, **block_types(config)}.items():
        wanted = getattr(sizes, name)
        if wanted is not None and wanted < len(blocks) and not sizes.drop_blocks:  # which say as many
            members = set(blocks)
            order = [index for index in (everything[::-1] if drop_order is None else drop_order) if index in members]
            gone |= set(order[: len(blocks) - wanted])
    return tuple(index for index in everything if index not in gone)


# ---- sizes, counts and configs


def largest_sizes(config: ModelConfig) -> dict[str, int]:
    """The largest value of each size that the model has, `num_blocks` included."""
    sizes = {"hidden_size": config.hidden_size}
    for block in config.blocks:
        for name, value in block_sizes(block).items():
            sizes[name] = max(value, sizes.get(name, 0))
    return sizes | {"num_blocks": len(config.blocks)}


def check_sizes(config: ModelConfig, sizes: Sizes) -> None:
    """Raise HalflapError on a size that this teacher cannot be cut to."""
    types = block_types(config)
    largest = largest_sizes(config) | {name: len(blocks) for name, blocks in types.items()}
    _check_types(config, sizes, types)
    for name, value in dataclasses.asdict(sizes).items():
        if value is None or name == "drop_blocks":
            continue
        if name not in largest:
            raise HalflapError(
                f"sizes.{name} is {value}, but this {config.family} model ({config.pattern()}) has no such axis; "
                f"it has {', '.join(largest)}: leave that size out"
            )
        if not 1 <= value <= largest[name]:
            raise HalflapError(
                f"sizes.{name} is {value}; the teacher has {largest[name]}, and pruning only cuts: "
                f"choose 1 to {largest[name]}"
            )
    for block in set(config.blocks):
        target_counts(block, sizes)
        _check_heads(block, sizes)
    _check_depth(config, sizes)


def _check_heads(block: BlockConfig, sizes: Sizes) -> None:
    """Fewer key/value heads leave fewer query heads; a number above those that are left would not be had."""
    attention, wanted, kept = block.attention, sizes.num_attention_heads, sizes.num_key_value_heads
    if attention is None or wanted is None or kept is None:
        return
    left = min(kept, attention.num_key_value_heads) * attention.queries_per_key_value_head
    if min(wanted, attention.num_attention_heads) > left:
        raise HalflapError(
            f"sizes.num_attention_heads is {wanted}, and {kept} key/value heads leave {left}: choose at most {left}, "
            "or more key/value heads; left out, it is all that are left"
        )


def counts_by_type(sizes: Sizes) -> dict[str, int]:
    """Those that are asked for of how many blocks of a type stay."""
    return {name: count for name in BLOCK_COUNTS if (count := getattr(sizes, name)) is not None}


def _check_types(config: ModelConfig, sizes: Sizes, types: Mapping[str, tuple[int, ...]]) -> None:
    counts = counts_by_type(sizes)
    if counts and "num_blocks" in types:
        raise HalflapError(
            f"sizes.{next(iter(counts))} counts blocks of one type, and a {config.family} layer is "
            f"{len(depth_units(config)[0])} blocks of several, which stay or go together: use sizes.num_blocks"
        )
    if counts and (sizes.num_blocks is not None or sizes.drop_blocks):
        other = "drop_blocks" if sizes.drop_blocks else "num_blocks"
        raise HalflapError(
            f"sizes.{next(iter(counts))} and sizes.{other} both say which blocks stay; give one of the two"
        )


def _check_depth(config: ModelConfig, sizes: Sizes) -> None:
    count, dropped = len(config.blocks), set(sizes.drop_blocks)
    if dropped and sizes.num_blocks is not None and sizes.num_blocks != count - len(dropped):
        raise HalflapError(
            f"sizes.num_blocks is {sizes.num_blocks} and sizes.drop_blocks leaves {count - len(dropped)}; "
            "give one of the two"
        )
    if outside := sorted(index for index in dropped if not 0 <= index < count):
        raise HalflapError(
            f"sizes.drop_blocks names block {outside[0]}; the teacher's blocks are 0 to {count - 1}: correct the list"
        )
    if len(dropped) == count:
        raise HalflapError(f"sizes.drop_blocks names all {count} blocks; at least one must stay: shorten the list")
    units = depth_units(config)
    for unit in units:
        if 0 < len(dropped & set(unit)) < len(unit):
            raise HalflapError(
                f"sizes.drop_blocks splits blocks {', '.join(map(str, unit))}, which are one layer of a "
                f"{config.family} model; drop all of them or none"
            )
    _check_sharing(config, dropped)
    if sizes.num_blocks is not None and sizes.num_blocks % len(units[0]):
        raise HalflapError(
            f"sizes.num_blocks is {sizes.num_blocks}; a {config.family} layer is {len(units[0])} blocks: "
            "choose a multiple"
        )


def readers_of(config: ModelConfig) -> dict[int, tuple[int, ...]]:
    """Blocks that read another's keys and values, by that other."""
    found: dict[int, tuple[int, ...]] = {}
    for index, block in enumerate(config.blocks):
        if (source := owner(block, index)) != index:
            found[source] = (*found.get(source, ()), index)
    return found


def _check_sharing(config: ModelConfig, dropped: set[int]) -> None:
    for source, readers in readers_of(config).items():
        left = [index for index in readers if index not in dropped]
        if source in dropped and left:
            more = sorted(index for unit in depth_units(config) if set(unit) & set(left) for index in unit)
            raise HalflapError(
                f"sizes.drop_blocks has block {source}, whose keys and values are read by {', '.join(map(str, left))}; "
                f"add {', '.join(map(str, more))} to the list, or keep block {source}"
            )


def target_counts(block: BlockConfig, sizes: Sizes) -> dict[str, int]:
    """Counts of a block's axes that reach the sizes; raises HalflapError when heads cannot be shared out evenly."""
    count = block_counts(block)
    for row in KINDS[type(block)].sizes:
        wanted, own = getattr(sizes, row.size), count[row.axis]
        if row.parent is None:
            count[row.axis] = _smaller(wanted, own)
        else:
            parents = count[row.parent]
            total = _smaller(wanted, parents * own)
            count[row.axis] = _per_parent(row.size, total, parents, own, row.parents)
    return count


def _smaller(wanted: int | None, own: int) -> int:
    return own if wanted is None else min(wanted, own)


def _per_parent(size: str, total: int, parents: int, most: int, what: str) -> int:
    if total % parents or not 1 <= total // parents <= most:
        raise HalflapError(
            f"sizes.{size} is {total}; with {parents} {what}, which must stay equal, it is a multiple of {parents} "
            f"from {parents} to {parents * most}: choose {max(1, min(most, round(total / parents))) * parents}"
        )
    return total // parents


def resize(config: ModelConfig, keep_blocks: tuple[int, ...], sizes: Sizes) -> ModelConfig:
    """The shape that remains of a teacher: its kept blocks at the sizes; norms' eps still the teacher's."""
    blocks = tuple(
        resize_block(block, target_counts(block, sizes)) for block in left_blocks(config.blocks, keep_blocks)
    )
    return dataclasses.replace(config, hidden_size=_smaller(sizes.hidden_size, config.hidden_size), blocks=blocks)
