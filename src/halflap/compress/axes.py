"""Which axes may be cut, what people call their sizes, and the config that remains.

An axis is named as in `models/layout.py` (`hidden`, `blocks.3.head`); its short name is the last part. A size is
named as in Hugging Face configs (`mamba_num_heads`) and is what recipes speak of. Counts of an axis with a parent
are per index of the parent: 112 Mamba heads in 8 groups are a count of 14. Pure data: no torch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from halflap.errors import HalflapError
from halflap.models.config import AttentionConfig, BlockConfig, Mamba2Config, MLPConfig, ModelConfig
from halflap.models.layout import Axis, layout
from halflap.models.sharing import keep_blocks as left_blocks

Counts = Mapping[str, int]
"""Indices of each axis by short name, per index of the parent."""


@dataclass(frozen=True)
class Sizes:
    """Target sizes; None keeps the teacher's, and so does a size larger than a block's own."""

    hidden_size: int | None = None
    """Width of the residual stream."""
    intermediate_size: int | None = None
    """Neurons of each MLP."""
    mamba_num_heads: int | None = None
    """Heads of each Mamba block, a multiple of its groups."""
    mamba_head_dim: int | None = None
    """Channels of a Mamba head."""
    ssm_state_size: int | None = None
    """State size of a Mamba block."""
    num_attention_heads: int | None = None
    """Query heads of each attention block, a multiple of its key/value heads."""
    num_key_value_heads: int | None = None
    """Key/value heads of each attention block."""
    num_blocks: int | None = None
    """How many blocks stay; the least important go."""
    drop_blocks: tuple[int, ...] = ()
    """Blocks that go, by index."""


class WidthAxis(NamedTuple):
    """A size, the axis that is cut to reach it, and the kind of block that has it (None: the whole model)."""

    size: str
    axis: str
    block: type | None


AXES: tuple[WidthAxis, ...] = (
    WidthAxis("hidden_size", "hidden", None),
    WidthAxis("intermediate_size", "neuron", MLPConfig),
    WidthAxis("mamba_num_heads", "head", Mamba2Config),
    WidthAxis("mamba_head_dim", "channel", Mamba2Config),
    WidthAxis("ssm_state_size", "state", Mamba2Config),
    WidthAxis("num_attention_heads", "query", AttentionConfig),
    WidthAxis("num_key_value_heads", "kv", AttentionConfig),
)

# A group keeps its own B, C and norm, so it can only go or move whole; no size asks for it, but a plan may say it.
PRUNABLE = frozenset(axis.axis for axis in AXES) | {"group"}

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


def last_kind(block: BlockConfig) -> MLPConfig:
    """The MLP that a block is when it is neither Mamba-2 nor attention. Raises HalflapError for other kinds."""
    if not isinstance(block, MLPConfig):
        raise HalflapError(
            f"a block of kind {block.kind} cannot be cut yet; prune models of attention, Mamba-2 and MLP blocks"
        )
    return block


def block_counts(block: BlockConfig) -> dict[str, int]:
    """How many indices each axis of a block has."""
    if isinstance(block, Mamba2Config):
        return {
            "group": block.num_groups,
            "head": block.heads_per_group,
            "channel": block.head_dim,
            "state": block.state_size,
        }
    if isinstance(block, AttentionConfig):
        return {"kv": block.num_key_value_heads, "query": block.queries_per_key_value_head}
    return {"neuron": last_kind(block).intermediate_size}


def _resize_mamba2(block: Mamba2Config, count: Counts) -> Mamba2Config:
    return dataclasses.replace(
        block,
        num_heads=count["group"] * count["head"],
        head_dim=count["channel"],
        num_groups=count["group"],
        state_size=count["state"],
    )


def _resize_attention(block: AttentionConfig, count: Counts) -> AttentionConfig:
    return dataclasses.replace(block, num_attention_heads=count["kv"] * count["query"], num_key_value_heads=count["kv"])


def _resize_mlp(block: MLPConfig, count: Counts) -> MLPConfig:
    return dataclasses.replace(block, intermediate_size=count["neuron"])


RESIZE: dict[type, Callable[..., BlockConfig]] = {
    Mamba2Config: _resize_mamba2,
    AttentionConfig: _resize_attention,
    MLPConfig: _resize_mlp,
}


def resize_block(block: BlockConfig, count: Counts) -> BlockConfig:
    """The block with these counts; the inverse of `block_counts`."""
    return RESIZE[type(block)](block, count)


def block_sizes(block: BlockConfig) -> dict[str, int]:
    """The sizes of a block, by the names of `Sizes`."""
    if isinstance(block, Mamba2Config):
        return {
            "mamba_num_heads": block.num_heads,
            "mamba_head_dim": block.head_dim,
            "ssm_state_size": block.state_size,
        }
    if isinstance(block, AttentionConfig):
        return {
            "num_attention_heads": block.num_attention_heads,
            "num_key_value_heads": block.num_key_value_heads,
        }
    return {"intermediate_size": last_kind(block).intermediate_size}


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
    if sizes.num_blocks is not None and sizes.num_blocks % len(units[0]):
        raise HalflapError(
            f"sizes.num_blocks is {sizes.num_blocks}; a {config.family} layer is {len(units[0])} blocks: "
            "choose a multiple"
        )


def target_counts(block: BlockConfig, sizes: Sizes) -> dict[str, int]:
    """Counts of a block's axes that reach the sizes; raises HalflapError when heads cannot be shared out evenly."""
    own = block_counts(block)
    if isinstance(block, Mamba2Config):
        heads = _smaller(sizes.mamba_num_heads, block.num_heads)
        return own | {
            "head": _per_parent("mamba_num_heads", heads, own["group"], own["head"], "groups of shared B and C"),
            "channel": _smaller(sizes.mamba_head_dim, block.head_dim),
            "state": _smaller(sizes.ssm_state_size, block.state_size),
        }
    if isinstance(block, AttentionConfig):
        kv = _smaller(sizes.num_key_value_heads, block.num_key_value_heads)
        heads = _smaller(sizes.num_attention_heads, kv * own["query"])
        return {"kv": kv, "query": _per_parent("num_attention_heads", heads, kv, own["query"], "key/value heads")}
    return {"neuron": _smaller(sizes.intermediate_size, last_kind(block).intermediate_size)}


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
