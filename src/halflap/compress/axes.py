"""Which axes may be cut, what people call their sizes, and the config that remains.

An axis is named as in `models/layout.py` (`hidden`, `blocks.3.head`); its short name is the last part. A size is
named as in Hugging Face configs (`mamba_num_heads`) and is what recipes speak of; which axis it asks for in which kind
of block says `kinds.py`. Pure data: no torch.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from halflap.compress.kinds import KINDS, PRUNABLE, block_counts, block_sizes, owner, resize_block
from halflap.errors import HalflapError
from halflap.models.config import BlockConfig, ModelConfig
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
    """Key/value heads of each attention or hybrid block."""
    mamba_intermediate_size: int | None = None
    """Channels of each Mamba-1 block."""
    num_blocks: int | None = None
    """How many blocks stay; the least important go."""
    drop_blocks: tuple[int, ...] = ()
    """Blocks that go, by index."""


@dataclass(frozen=True)
class SearchSpace:
    """Sizes to try on each axis; an axis not given is chosen automatically, within the largest cuts."""

    hidden_size: tuple[int, ...] = ()
    """Widths of the residual stream."""
    intermediate_size: tuple[int, ...] = ()
    """Neurons of each MLP."""
    mamba_num_heads: tuple[int, ...] = ()
    """Heads of each Mamba-2 block."""
    mamba_head_dim: tuple[int, ...] = ()
    """Channels of a Mamba-2 head; of hybrid blocks, of an attention head's values and the SSM beside them."""
    ssm_state_size: tuple[int, ...] = ()
    """State sizes of a Mamba block."""
    num_attention_heads: tuple[int, ...] = ()
    """Query heads of each attention or hybrid block."""
    num_key_value_heads: tuple[int, ...] = ()
    """Key/value heads of each attention or hybrid block."""
    mamba_intermediate_size: tuple[int, ...] = ()
    """Channels of each Mamba-1 block."""
    num_blocks: tuple[int, ...] = ()
    """Numbers of blocks that stay."""
    max_width_cut: float | None = None
    """Largest share of an axis that automatic choices cut; 0.4 when not given, of method puzzle 0.9."""
    max_depth_cut: float | None = None
    """Largest share of the blocks that automatic choices drop; 0.2 when not given, of method puzzle 0.5."""

    def __post_init__(self) -> None:
        for name in ("max_width_cut", "max_depth_cut"):
            if not 0 <= (getattr(self, name) or 0) < 1:
                raise HalflapError(
                    f"space.{name} is {getattr(self, name)}; it must be at least 0 and below 1: correct it"
                )

    def with_cuts(self, width: float, depth: float) -> SearchSpace:
        """The same with these largest cuts where none were given."""
        cuts = {"max_width_cut": width, "max_depth_cut": depth}
        return dataclasses.replace(self, **{n: v for n, v in cuts.items() if getattr(self, n) is None})


def _axes_by_size() -> dict[str, tuple[str, ...]]:
    rows = {(row.size, row.axis) for kind in KINDS.values() for row in kind.sizes} | {("hidden_size", "hidden")}
    names = [field.name for field in dataclasses.fields(Sizes)]
    return {name: axes for name in names if (axes := tuple(sorted(axis for size, axis in rows if size == name)))}


AXES: dict[str, tuple[str, ...]] = _axes_by_size()
"""Short names of the axes that a size cuts, by the names of `Sizes`."""

# Blocks that leave together, for families whose stock classes count several of our blocks as one layer.
DEPTH_UNITS: dict[str, int] = {"llama": 2, "nemotron": 2, "hymba": 2}


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
    """Runs of blocks that are kept or dropped together."""
    step = DEPTH_UNITS.get(config.family, 1)
    count = len(config.blocks)
    return tuple(tuple(range(start, min(start + step, count))) for start in range(0, count, step))


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
    largest = largest_sizes(config)
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
    _check_depth(config, sizes)


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
