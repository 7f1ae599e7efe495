"""Sizes to try, and the candidates that stay below ceilings on what a student may cost. From configs alone; no torch.

A candidate is one size for each axis in all blocks (homogeneous). Costs add up over blocks and grow with every size,
which this module uses twice: the smallest size of every axis gives the smallest reachable cost, and a candidate is
worth looking at only if no axis can go up a step, since a student that another contains is never better.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from halflap.compress.axes import Sizes, check_sizes, depth_units, largest_sizes, resize
from halflap.compress.costs import Budget, Costs, costs, kept_after
from halflap.errors import HalflapError
from halflap.models.config import HybridConfig, Mamba2Config, ModelConfig

WITHIN = 0.95  # a student comes within 5 % below its ceiling where the space allows


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
    max_width_cut: float = 0.4
    """Largest share of an axis that automatic choices cut."""
    max_depth_cut: float = 0.2
    """Largest share of the blocks that automatic choices drop."""

    def __post_init__(self) -> None:
        for name in ("max_width_cut", "max_depth_cut"):
            if not 0 <= getattr(self, name) < 1:
                raise HalflapError(
                    f"space.{name} is {getattr(self, name)}; it must be at least 0 and below 1: correct it"
                )


# Axes that automatic choices leave whole: attention is 8 % of a Nemotron-H and whole in all published students, and
# cutting the state size is untried. On the query heads of hybrid blocks hang the channels of their SSM.
LEFT_WHOLE = ("num_attention_heads", "num_key_value_heads", "ssm_state_size")


def left_whole(teacher: ModelConfig) -> tuple[str, ...]:
    """Names of `LEFT_WHOLE` that this teacher has reasons for."""
    hybrid = any(isinstance(block, HybridConfig) for block in teacher.blocks)
    return tuple(name for name in LEFT_WHOLE if not (hybrid and name == "num_attention_heads"))


# How much a cut of each size hurts (order of Taghibakhshi et al. 2025: depth, Mamba heads, then FFN and hidden;
# channels worse than heads), on the squared logarithm of the cut. It decides which candidates are looked at first.
HURTS: dict[str, float] = {
    "num_blocks": 16,
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
    """Sizes, what the student of these sizes costs, and how much its cuts are expected to hurt."""

    sizes: Sizes
    costs: Mapping[str, float]
    hurt: float


@dataclass(frozen=True)
class Fitting:
    """Candidates that fit, the likeliest of every depth first; `remark` says so when none comes near a ceiling."""

    candidates: tuple[Candidate, ...]
    tried: int
    remark: str | None = None


STEPS = 8, 1
"""Least step of a width: a multiple of 8 suits matrix units; finer where no such size comes near the budget."""


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
        if given:
            for value in given:
                check_sizes(teacher, Sizes(**{field.name: value}))
            found[field.name] = tuple(sorted(set(given), reverse=True))
        elif field.name in largest:
            found[field.name] = _automatic(teacher, space, field.name, largest[field.name], with_depth, least)
    return found


def _automatic(
    teacher: ModelConfig, space: SearchSpace, name: str, largest: int, with_depth: bool, least: int
) -> tuple[int, ...]:
    if name in left_whole(teacher) or (name == "num_blocks" and not with_depth):
        return (largest,)
    if name == "num_blocks":
        unit = len(depth_units(teacher)[0])
        step = unit * max(1, round(largest / 26 / unit))  # 2 of the 52 blocks of the 8B
        return tuple(range(largest, math.ceil((1 - space.max_depth_cut) * largest) - 1, -step))
    if name == "mamba_num_heads":
        step = _step_of_heads(largest, [b.num_groups for b in teacher.blocks if isinstance(b, Mamba2Config)])
    elif name == "num_attention_heads":
        step = _step_of_heads(largest, [b.attention.num_key_value_heads for b in teacher.blocks if b.attention])
    elif name == "mamba_head_dim":
        step = max(1, largest // 8)
    else:
        step = _step(largest, least)
    return tuple(range(largest, math.ceil((1 - space.max_width_cut) * largest) - 1, -step))


def _step_of_heads(largest: int, parents: list[int]) -> int:
    """Every group, or key/value head, keeps equally many."""
    common = math.lcm(*parents)
    return common * _step(largest // common, 1)


def _step(size: int, least: int) -> int:
    """The largest power of two that leaves at least 16 steps: 256 of 4096, 1024 of 21504, 32 of 512."""
    return max(least, 1 << max(0, (size // 16).bit_length() - 1))


def fitting(
    teacher: ModelConfig, budget: Budget, space: SearchSpace | None = None, drop_order: tuple[int, ...] | None = None
) -> Fitting:
    """Candidates below every ceiling that no axis could exceed by a step, and within 5 % of a ceiling if any is.

    `drop_order` lists blocks, the least important first; without it automatic choices keep every block.
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
    _check_reachable(choices(teacher, space, drop_order is not None, STEPS[-1]), ceilings, cost, teacher)
    grid, largest, close = {}, [], []
    for least in STEPS:
        grid = choices(teacher, space, drop_order is not None, least)
        largest = _maximal(grid, [sizes for sizes in _product(grid) if cost.within(sizes, ceilings)])
        close = [s for s in largest if any(cost.of(name, s) >= WITHIN * limit for name, limit in ceilings.items())]
        if close:
            break
    remark = None if close else _not_close(largest, ceilings, cost, largest_sizes(teacher))
    found = [_candidate(teacher, budget, sizes, drop_order) for sizes in close or largest]
    tried = math.prod(len(values) for values in grid.values())
    return Fitting(_by_turns(found), tried, remark)


def _by_turns(candidates: list[Candidate]) -> tuple[Candidate, ...]:
    """The likeliest of each depth, then the second of each, and so on: depth and width are hard to compare unseen."""
    ordered = sorted(candidates, key=lambda candidate: candidate.hurt)
    seen: Counter[int | None] = Counter()
    turns = []
    for candidate in ordered:
        turns.append((seen[candidate.sizes.num_blocks], candidate.hurt))
        seen[candidate.sizes.num_blocks] += 1
    return tuple(candidate for _, candidate in sorted(zip(turns, ordered), key=lambda pair: pair[0]))


def _product(grid: Mapping[str, tuple[int, ...]]) -> Iterator[dict[str, int]]:
    for values in itertools.product(*grid.values()):
        sizes = dict(zip(grid, values, strict=True))
        if sizes.get("num_attention_heads", 0) % sizes.get("num_key_value_heads", 1) == 0:
            yield sizes


def _maximal(grid: Mapping[str, tuple[int, ...]], below: Iterable[dict[str, int]]) -> list[dict[str, int]]:
    """Candidates of which no single size can go up: on a grid with growing costs, those that no other contains."""
    fits = {tuple(sizes.values()) for sizes in below}
    larger = {name: dict(zip(values[1:], values, strict=False)) for name, values in grid.items()}

    def can_grow(key: tuple[int, ...]) -> bool:
        for place, name in enumerate(grid):
            up = larger[name].get(key[place])
            if up is not None and (*key[:place], up, *key[place + 1 :]) in fits:
                return True
        return False

    return [dict(zip(grid, key, strict=True)) for key in sorted(fits, reverse=True) if not can_grow(key)]


def _candidate(
    teacher: ModelConfig, budget: Budget, sizes: Mapping[str, int], drop_order: tuple[int, ...] | None
) -> Candidate:
    """With exact costs, and without the sizes that stay the teacher's."""
    largest = largest_sizes(teacher)
    cut: dict[str, Any] = {name: value for name, value in sizes.items() if value < largest[name]}
    hurt = sum(HURTS[name] * math.log(largest[name] / value) ** 2 for name, value in cut.items())
    chosen = Sizes(**cut)
    return Candidate(chosen, costs(resize(teacher, kept_after(teacher, chosen, drop_order), chosen), budget), hurt)


def _check_reachable(
    grid: Mapping[str, tuple[int, ...]], ceilings: Mapping[str, float], cost: Costs, teacher: ModelConfig
) -> None:
    smallest = {name: values[-1] for name, values in grid.items()}
    for name, limit in ceilings.items():
        reachable = cost.of(name, smallest)
        if reachable > limit:
            whole = largest_sizes(teacher)
            sizes = ", ".join(f"{size} {value}" for size, value in smallest.items() if value < whole[size])
            uncut = [size for size in left_whole(teacher) if 1 < whole.get(size, 0) == smallest[size]]
            flags = " or ".join(f"--space.{size.replace('_', '-')}" for size in ("hidden_size", *uncut))
            raise HalflapError(
                f"a budget of {cost.budget.say(name, limit)} cannot be met: the smallest student of this search space "
                f"has {cost.budget.say(name, reachable)} ({sizes or 'no axis may be cut'}); {cost.budget.flag(name)}, "
                f"or allow smaller sizes with --space.max-width-cut or lists such as {flags}"
            )


def _not_close(
    largest: list[dict[str, int]], ceilings: Mapping[str, float], cost: Costs, whole: Mapping[str, int]
) -> str:
    best = {name: max(cost.of(name, sizes) for sizes in largest) for name in ceilings}
    nearest = max(ceilings, key=lambda name: best[name] / ceilings[name])
    reached = cost.budget.say(nearest, best[nearest])
    if len(largest) == 1 and all(value == whole[size] for size, value in largest[0].items()):
        return f"the teacher itself has {reached}, within the budget: nothing is cut"
    return (
        f"no size of the search space comes within 5 % of the budget: the nearest student has {reached} where "
        f"{cost.budget.say(nearest, ceilings[nearest])} are allowed; give finer lists, such as "
        "--space.intermediate-size, to use all of it"
    )
