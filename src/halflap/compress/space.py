"""The candidates that stay below ceilings on what a student may cost. From configs alone; no torch.

A candidate is one size for each axis in all blocks (homogeneous), or, by type, a number of blocks of each type and one
width of all MLPs (MiniPuzzle: Nemotron-H, section 5). Costs add up over blocks and grow with every size: a candidate is
worth looking at only if no axis can go up a step, since a student that another contains is never better.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np

from halflap.compress.axes import Sizes, block_types, largest_sizes
from halflap.compress.costs import WITHIN, Budget, Costs, with_throughput
from halflap.compress.grid import (
    ATTENTION_HEADS,
    LARGEST_CUTS,
    STEPS,
    Grid,
    SearchSpace,
    SizeLists,
    choices,
    go_together,
    heads_divide_hidden,
    left_whole,
    widening,
)
from halflap.compress.kinds import BLOCK_COUNTS
from halflap.errors import HalflapError
from halflap.models.config import ModelConfig

WIDENED = (
    f"no student within the usual cuts ({100 * LARGEST_CUTS[0]:g} % of a width, {100 * LARGEST_CUTS[1]:g} % of the "
    "blocks, attention heads whole) meets the budgets, so larger cuts were allowed; --space.max-width-cut and "
    "--space.max-depth-cut limit them"
)


# How much a cut of each size hurts (order of Taghibakhshi et al. 2025: depth, Mamba heads, then FFN and hidden;
# channels worse than heads), on the squared logarithm of the cut. It decides which candidates are looked at first.
# Attention blocks are few and their cache is large: the three best MiniPuzzle students keep 4, 5 and 4 of 10.
HURTS: dict[str, float] = {
    "num_blocks": 16,
    "num_mamba_blocks": 16,
    "num_mlp_blocks": 16,
    "num_attention_blocks": 1,
    "mamba_head_dim": 4,
    "mamba_num_heads": 3,
    "mamba_intermediate_size": 3,
    "num_key_value_heads": 3,
    "hidden_size": 2,
    "num_attention_heads": 2,
    "ssm_state_size": 2,
    "intermediate_size": 1,
}


@dataclass(frozen=True)
class Candidate:
    """Sizes, what the student of these sizes costs, and how much its cuts are expected to hurt.

    Of method puzzle, `variants` says what becomes of each of the teacher's blocks (`library.py`).
    """

    sizes: Sizes
    costs: Mapping[str, float]
    hurt: float
    variants: tuple[str, ...] = ()


@dataclass(frozen=True)
class Fitting:
    """Candidates that fit, the likeliest of every depth first.

    `remark` says so when none comes near a ceiling, or when it took larger cuts than automatic choices usually make.
    """

    candidates: tuple[Candidate, ...]
    tried: int
    remark: str | None = None


def fitting(
    teacher: ModelConfig,
    budget: Budget,
    space: SearchSpace | None = None,
    drop_order: tuple[int, ...] | None = None,
    grid_of: Grid = choices,
) -> Fitting:
    """Candidates below every ceiling that no axis could exceed by a step, and within 5 % of a ceiling if any is.

    Where the space holds no such candidate, wider ones are tried (`grid.widening`).
    `drop_order` lists blocks, the least important first; without it automatic choices keep every block. `grid_of` says
    what is varied: one size an axis (`choices`) or numbers of blocks of each type (`choices_by_type`).
    Raises HalflapError without a budget, and for one that cannot be met, with the smallest that can.
    """
    space = space or SearchSpace()
    ceilings = budget.ceilings
    if not ceilings:
        raise HalflapError(
            "no budget was given; set at least one of --params, --non-embedding-params, --memory, --flops, --latency, "
            "--throughput"
        )
    cost = Costs(teacher, budget, drop_order)
    whole = largest_sizes(teacher) | {name: len(blocks) for name, blocks in block_types(teacher).items()}
    spaces = widening(teacher, space)
    for tried, least in itertools.product(spaces, STEPS):
        grid = grid_of(teacher, tried, drop_order is not None, least)
        together = _together(teacher, tried, grid)
        spent = {name: cost.over(name, grid) for name in ceilings}
        below = together & np.all([spent[name] <= limit for name, limit in ceilings.items()], axis=0)
        largest = _maximal(below)
        close = largest & np.any([spent[name] >= WITHIN * limit for name, limit in ceilings.items()], axis=0)
        if close.any() or (below.any() and least == STEPS[-1]):
            break
    else:
        _refuse(grid, together, spent, ceilings, budget, teacher, whole)
    remarks = [WIDENED] if tried != space else []
    if not close.any():
        remarks.append(_not_close(grid, largest, spent, budget, whole))
    chosen = np.nonzero(close if close.any() else largest)
    spent |= {name: cost.over(name, grid) for name in cost.names if name not in spent}
    found = [
        _candidate(_sizes_at(grid, place), {name: float(spent[name][place]) for name in cost.names}, budget, whole)
        for place in zip(*chosen, strict=True)
    ]
    return Fitting(_by_turns(teacher, found), int(together.sum()), "; ".join(remarks) or None)


def _by_turns(teacher: ModelConfig, candidates: list[Candidate]) -> tuple[Candidate, ...]:
    """The likeliest of each depth, then the second of each, and so on: depth and width are hard to compare unseen."""
    types = block_types(teacher)
    ordered = sorted(candidates, key=lambda candidate: candidate.hurt)
    seen: Counter[int] = Counter()
    turns = []
    for candidate in ordered:
        counts = vars(candidate.sizes)
        depth = counts["num_blocks"] or sum(counts[name] or len(blocks) for name, blocks in types.items())
        turns.append((seen[depth], candidate.hurt))
        seen[depth] += 1
    return tuple(candidate for _, candidate in sorted(zip(turns, ordered), key=lambda pair: pair[0]))


def _together(teacher: ModelConfig, space: SearchSpace, grid: SizeLists) -> np.ndarray:
    """Which points of a grid go together: bool, a dimension for each size, in the order of the grid.

    Of a Llama, hidden sizes that were not given are multiples of the heads that are left, as its stock class demands.
    Numbers of blocks of types add up to one of `num_blocks`, or else leave out at most `max_depth_cut` of the blocks,
    unless each of them was given.
    """
    at = dict(zip(grid, np.meshgrid(*grid.values(), indexing="ij", sparse=True), strict=True))
    found = np.ones([len(values) for values in grid.values()], bool)
    found &= go_together(at)
    if {*ATTENTION_HEADS} <= at.keys():
        attention = [block.attention for block in teacher.blocks if block.attention]
        wanted, whole = at["num_attention_heads"], max(a.num_attention_heads for a in attention)
        left = max(a.queries_per_key_value_head for a in attention) * at["num_key_value_heads"]
        found &= (wanted <= left) | (wanted >= whole)  # the whole of them is what is left, however many there were
        if heads_divide_hidden(teacher) and not space.hidden_size:
            opens = found & (at["hidden_size"] % np.minimum(wanted, left) == 0)
            found = opens if opens.any() else found
    types = [name for name in BLOCK_COUNTS if name in grid]
    if types:
        given = all(getattr(space, name) for name in types)
        _, depth = space.largest_cuts(*LARGEST_CUTS)
        least = 0 if given else math.ceil((1 - depth) * len(teacher.blocks))
        totals = space.num_blocks or range(least, len(teacher.blocks) + 1)
        found &= np.isin(sum(at[name] for name in types), list(totals))
    return found


def _sizes_at(grid: SizeLists, place: Iterable[np.intp]) -> dict[str, int]:
    return {name: values[index] for (name, values), index in zip(grid.items(), place, strict=True)}


def _maximal(below: np.ndarray) -> np.ndarray:
    """Points of which no single size can go up: on a grid with growing costs, those that no other contains.

    below: bool, sizes falling along every dimension.
    """
    found = below.copy()
    for axis in range(below.ndim):
        there = np.moveaxis(found, axis, 0)
        there[1:] &= ~np.moveaxis(below, axis, 0)[:-1]
    return found


def _candidate(
    sizes: Mapping[str, int], spent: Mapping[str, float], budget: Budget, whole: Mapping[str, int]
) -> Candidate:
    """Without the sizes that stay the teacher's; but of numbers of blocks of types, each is said."""
    cut: dict[str, Any] = {name: value for name, value in sizes.items() if value < whole[name]}
    hurt = sum(HURTS[name] * math.log(whole[name] / value) ** 2 for name, value in cut.items())
    cut |= {name: sizes[name] for name in BLOCK_COUNTS if name in sizes}
    return Candidate(Sizes(**cut), with_throughput(spent, budget), hurt)


def _refuse(
    grid: SizeLists,
    together: np.ndarray,
    spent: Mapping[str, np.ndarray],
    ceilings: Mapping[str, float],
    budget: Budget,
    teacher: ModelConfig,
    whole: Mapping[str, int],
) -> NoReturn:
    """Raise HalflapError on the first ceiling that no point of the grid is below."""
    if not together.any():
        raise HalflapError(
            "no sizes of the search space go together: numbers of blocks of each type must add up to one of "
            "space.num_blocks, and query heads be a multiple of the key/value heads; correct the lists of the space"
        )
    for name, limit in ceilings.items():
        reachable = np.where(together, spent[name], np.inf)
        place = np.unravel_index(reachable.argmin(), reachable.shape)
        if reachable[place] > limit:
            smallest = _sizes_at(grid, place)
            sizes = ", ".join(f"{size} {value}" for size, value in smallest.items() if value < whole[size])
            uncut = [size for size in left_whole(teacher) if 1 < whole.get(size, 0) == smallest[size]]
            flags = " or ".join(f"--space.{size.replace('_', '-')}" for size in ("hidden_size", *uncut))
            raise HalflapError(
                f"a budget of {budget.say(name, limit)} cannot be met: the smallest student of this search space "
                f"has {budget.say(name, reachable[place])} ({sizes or 'no axis may be cut'}); {budget.flag(name)}, "
                f"or allow smaller sizes with --space.max-width-cut, --space.max-depth-cut or lists such as {flags}"
            )
    smallest = {}
    for name in ceilings:
        kept = together & np.all([spent[other] <= ceilings[other] for other in ceilings if other != name], axis=0)
        smallest[name] = float(spent[name][kept].min()) if kept.any() else None
    raise HalflapError(budget.unmet_together(ceilings, smallest, "sizes"))


def _not_close(
    grid: SizeLists,
    largest: np.ndarray,
    spent: Mapping[str, np.ndarray],
    budget: Budget,
    whole: Mapping[str, int],
) -> str:
    best = {name: float(spent[name][largest].max()) for name in budget.ceilings}
    first = _sizes_at(grid, np.argwhere(largest)[0])
    if largest.sum() == 1 and all(value == whole[size] for size, value in first.items()):
        nearest = max(best, key=lambda name: best[name] / budget.ceilings[name])
        return f"the teacher itself has {budget.say(nearest, best[nearest])}, within the budget: nothing is cut"
    return (
        f"no size of the search space comes within 5 % of the budget: the nearest student has {budget.short(best)}; "
        "give finer lists, such as --space.intermediate-size, to use all of it"
    )
