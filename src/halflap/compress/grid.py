"""Sizes to try on each axis: lists that are given, else steps down from the teacher's. From configs alone; no torch.

Two grids: one size an axis for all blocks (homogeneous), and numbers of blocks of each type beside one width of all
MLPs, where the blocks of a type that stay are its best (MiniPuzzle: Nemotron-H, section 5).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from halflap.compress.axes import HEADS_DIVIDE_HIDDEN, Sizes, block_types, check_sizes, depth_units, largest_sizes
from halflap.compress.kinds import BLOCK_COUNTS
from halflap.errors import HalflapError
from halflap.models.config import HybridConfig, Mamba2Config, ModelConfig


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
    window: tuple[int, ...] = ()
    """Tokens that a query of an attention or hybrid block sees before itself (puzzle)."""
    num_blocks: tuple[int, ...] = ()
    """Numbers of blocks that stay."""
    num_mamba_blocks: tuple[int, ...] = ()
    """Numbers of Mamba blocks that stay (minipuzzle)."""
    num_attention_blocks: tuple[int, ...] = ()
    """Numbers of attention blocks that stay (minipuzzle)."""
    num_mlp_blocks: tuple[int, ...] = ()
    """Numbers of MLP blocks that stay (minipuzzle)."""
    max_width_cut: float | None = None
    """Largest share of an axis that automatic choices cut; when not given 0.4, or 0.75 for budgets that need it, of
    method puzzle 0.9."""
    max_depth_cut: float | None = None
    """Largest share of the blocks that automatic choices drop; when not given 0.2, or 0.5 for budgets that need it, of
    method puzzle 0.5."""

    def __post_init__(self) -> None:
        for name in ("max_width_cut", "max_depth_cut"):
            if not 0 <= (getattr(self, name) or 0) < 1:
                raise HalflapError(
                    f"space.{name} is {getattr(self, name)}; it must be at least 0 and below 1: correct it"
                )

    def largest_cuts(self, width: float, depth: float) -> tuple[float, float]:
        """Those of width and depth that were given, or else these."""
        return (
            width if self.max_width_cut is None else self.max_width_cut,
            depth if self.max_depth_cut is None else self.max_depth_cut,
        )


LARGEST_CUTS, WIDENED_CUTS = (0.4, 0.2), (0.75, 0.5)
"""Of width and depth, where all blocks, or all of a type, are cut alike; the latter for budgets out of their reach."""

# Axes that automatic choices leave whole: attention is 8 % of a Nemotron-H and whole in all published students, and
# cutting the state size is untried. On the query heads of hybrid blocks hang the channels of their SSM.
ATTENTION_HEADS = ("num_attention_heads", "num_key_value_heads")
LEFT_WHOLE = (*ATTENTION_HEADS, "ssm_state_size")


def left_whole(teacher: ModelConfig) -> tuple[str, ...]:
    """Names of `LEFT_WHOLE` that this teacher has reasons for."""
    hybrid = any(isinstance(block, HybridConfig) for block in teacher.blocks)
    return tuple(name for name in LEFT_WHOLE if not (hybrid and name == "num_attention_heads"))


def heads_divide_hidden(teacher: ModelConfig) -> bool:
    """Whether its stock class wants that of a student, and the teacher has it."""
    heads = [block.attention.num_attention_heads for block in teacher.blocks if block.attention]
    return teacher.family in HEADS_DIVIDE_HIDDEN and teacher.hidden_size % math.lcm(*heads) == 0


SizeLists = Mapping[str, tuple[int, ...]]
"""A grid: sizes to try by name."""
Grid = Callable[[ModelConfig, SearchSpace, bool, int], dict[str, tuple[int, ...]]]
"""(teacher, space, whether depth may be chosen, least step of a width) -> sizes to try by name, largest first."""
STEPS = 8, 1
"""Least step of a width: a multiple of 8 suits matrix units; finer where no such size comes near the budget."""


def widening(teacher: ModelConfig, space: SearchSpace) -> tuple[SearchSpace, ...]:
    """The space, then wider ones for budgets out of its reach: larger automatic cuts, then of attention heads too.

    Cuts and lists that were given hold in all of them.
    """
    width, depth = space.largest_cuts(*WIDENED_CUTS)
    wider = dataclasses.replace(space, max_width_cut=width, max_depth_cut=depth)
    largest = largest_sizes(teacher)
    heads = {
        name: _down(teacher, name, largest[name], width, STEPS[-1])
        for name in ATTENTION_HEADS
        if name in left_whole(teacher) and name in largest and not getattr(space, name)
    }
    return tuple(dict.fromkeys((space, wider, dataclasses.replace(wider, **heads))))


def choices(
    teacher: ModelConfig, space: SearchSpace, with_depth: bool, least: int = STEPS[0]
) -> dict[str, tuple[int, ...]]:
    """Sizes to try by name, largest first; depth is chosen automatically only `with_depth`."""
    largest = largest_sizes(teacher)
    found: dict[str, tuple[int, ...]] = {}
    for field in dataclasses.fields(SearchSpace):
        given = getattr(space, field.name)
        if field.name.startswith("max_"):
            continue
        if given and field.name == "window":
            raise HalflapError(
                "space.window was given, and windows are varied block by block alone; search with --method puzzle, or "
                "leave it out"
            )
        if given and field.name in BLOCK_COUNTS:
            raise HalflapError(
                f"{field.name} counts blocks of one type, which is not varied here; search with --method minipuzzle, "
                "or use num_blocks"
            )
        if given:
            for value in given:
                check_sizes(teacher, Sizes(**{field.name: value}))
            found[field.name] = tuple(sorted(set(given), reverse=True))
        elif field.name in largest:
            found[field.name] = _automatic(teacher, space, field.name, largest[field.name], with_depth, least)
    return found


def choices_by_type(
    teacher: ModelConfig, space: SearchSpace, with_depth: bool, least: int = STEPS[0]
) -> dict[str, tuple[int, ...]]:
    """Numbers of blocks of each type and widths of the MLPs; other axes stay whole unless lists of sizes are given.

    `num_blocks` is a choice of its own only where all blocks are of one type, else a list of it is of sums.
    """
    types = block_types(teacher)
    counted = {"num_blocks", *BLOCK_COUNTS}
    widths = choices(teacher, dataclasses.replace(space, **dict.fromkeys(counted, ())), False, least)
    found = {
        name: values if name == "intermediate_size" or getattr(space, name) else values[:1]
        for name, values in widths.items()
        if name not in counted
    }
    if unknown := [name for name in BLOCK_COUNTS if getattr(space, name) and name not in types]:
        check_sizes(teacher, Sizes(**{unknown[0]: getattr(space, unknown[0])[0]}))
    step, count = len(depth_units(teacher)[0]), len(teacher.blocks)
    _, depth = space.largest_cuts(*LARGEST_CUTS)
    most = count - min(space.num_blocks) if space.num_blocks else math.floor(depth * count)
    for name, blocks in types.items():
        given = getattr(space, name)
        for value in given:
            check_sizes(teacher, Sizes(**{name: value}))
        fewest = max(step, len(blocks) - most) if with_depth else len(blocks)
        found[name] = tuple(sorted(set(given), reverse=True)) or tuple(range(len(blocks), fewest - 1, -step))
    return found


def between(grid: Grid, least: Sizes | None, most: Sizes, listed: SearchSpace) -> Grid:
    """The same grid from the sizes of one student to those of another, both included; without `least` all below.

    A size that a student leaves out is the teacher's. What a list of `listed`, the caller's own space, says is tried
    alone, and the grid raises HalflapError for one that has nothing in the range.
    """

    def limited(
        teacher: ModelConfig, space: SearchSpace, with_depth: bool, step: int = STEPS[0]
    ) -> dict[str, tuple[int, ...]]:
        whole, found = largest_sizes(teacher), {}
        for name, values in grid(teacher, space, with_depth, step).items():
            high = getattr(most, name) or whole.get(name, values[0])
            low = 0 if least is None else getattr(least, name) or whole.get(name, values[0])
            tried = {value for value in values if low <= value <= high}
            if not getattr(listed, name):
                tried |= {low, high} - {0}
            elif not tried:
                sizes = ", ".join(map(str, getattr(listed, name)))
                raise HalflapError(
                    f"space.{name} has {sizes}, and between the sizes trained above and below this budget it is from "
                    f"{low or 1} to {high}: list some of these, or leave it out"
                )
            found[name] = tuple(sorted(tried, reverse=True))
        return found

    return limited


def go_together(sizes: Mapping[str, Any]) -> Any:
    """Whether query heads are a multiple of the key/value heads; of arrays of sizes, an array or one answer for all."""
    return sizes.get("num_attention_heads", 0) % sizes.get("num_key_value_heads", 1) == 0


def _automatic(
    teacher: ModelConfig, space: SearchSpace, name: str, largest: int, with_depth: bool, least: int
) -> tuple[int, ...]:
    if name in left_whole(teacher) or (name == "num_blocks" and not with_depth):
        return (largest,)
    width, depth = space.largest_cuts(*LARGEST_CUTS)
    if name == "num_blocks":
        unit = len(depth_units(teacher)[0])
        step = unit * max(1, round(largest / 26 / unit))  # 2 of the 52 blocks of the 8B
        return tuple(range(largest, max(unit, math.ceil((1 - depth) * largest)) - 1, -step))
    return _down(teacher, name, largest, width, least)


def _down(teacher: ModelConfig, name: str, largest: int, cut: float, least: int) -> tuple[int, ...]:
    """Sizes from the largest down to a cut of so large a share, in steps that keep groups and heads equal."""
    attention = [block.attention for block in teacher.blocks if block.attention]
    if name == "mamba_num_heads":
        step = _step_of_heads(largest, [b.num_groups for b in teacher.blocks if isinstance(b, Mamba2Config)])
    elif name == "num_attention_heads":
        step = _step_of_heads(largest, [block.num_key_value_heads for block in attention])
    elif name == "mamba_head_dim":
        step = max(1, largest // 8)
    else:
        step = _step(largest, least)
    if name == "hidden_size" and heads_divide_hidden(teacher):
        heads = math.lcm(*(block.num_attention_heads for block in attention))
        step = max(1, round(step / heads)) * heads
    return tuple(range(largest, math.ceil((1 - cut) * largest) - 1, -step))


def _step_of_heads(largest: int, parents: list[int]) -> int:
    """Every group, or key/value head, keeps equally many."""
    common = math.lcm(*parents)
    return common * _step(largest // common, 1)


def _step(size: int, least: int) -> int:
    """The largest power of two that leaves at least 16 steps: 256 of 4096, 1024 of 21504, 32 of 512."""
    return max(least, 1 << max(0, (size // 16).bit_length() - 1))
