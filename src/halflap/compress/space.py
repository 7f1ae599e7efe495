"""Sizes to try, ceilings on what a student may cost, and the candidates that fit. From configs alone; no torch.

A candidate is one size for each axis in all blocks (homogeneous). Costs add up over blocks and grow with every size,
which this module uses twice: the smallest size of every axis gives the smallest reachable cost, and a candidate is
worth looking at only if no axis can go up a step, since a student that another contains is never better.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from halflap.compress.axes import SearchSpace, Sizes, check_sizes, depth_units, largest_sizes, resize, target_counts
from halflap.compress.kinds import block_sizes, resize_block
from halflap.errors import HalflapError
from halflap.models.config import BlockConfig, HybridConfig, Mamba2Config, ModelConfig
from halflap.models.count import count_non_embedding_parameters, count_parameters, flops_per_token, memory_bytes
from halflap.models.sharing import with_source

WITHIN = 0.95  # a student comes within 5 % below its ceiling where the space allows


@dataclass(frozen=True)
class Budget:
    """Ceilings, absolute: counts, bytes, operations a token; and what memory and FLOPs are meant at.

    Keys and values take `cache_bits`; SSM states, into which the whole text is summed, take twice as many: 32 and 16
    beside 16 and 8, as in our cache and in the memory budget of Nemotron-H 47B.
    """

    params: float | None = None
    non_embedding_params: float | None = None
    memory: float | None = None
    flops: float | None = None
    latency: float | None = None
    throughput: float | None = None
    phase: str = "decode"
    context: int = 8192
    batch: int = 1
    weight_bits: int = 16
    cache_bits: int = 16

    @property
    def ceilings(self) -> dict[str, float]:
        """Cost name to ceiling, of those that are set."""
        for name in ("latency", "throughput"):
            if getattr(self, name) is not None:
                raise HalflapError(
                    f"a {name} budget is not supported yet, because it needs measured times; use --params, "
                    "--non-embedding-params, --memory or --flops"
                )
        return {name: getattr(self, name) for name in COSTS if getattr(self, name) is not None}


def _memory(config: ModelConfig, budget: Budget) -> float:
    return memory_bytes(
        config, budget.context, budget.batch, budget.weight_bits, budget.cache_bits, 2 * budget.cache_bits
    )


def _flops(config: ModelConfig, budget: Budget) -> float:
    return flops_per_token(config, budget.context, "prefill" if budget.phase == "prefill" else "decode")


COSTS: dict[str, Callable[[ModelConfig, Budget], float]] = {
    "params": lambda config, _: count_parameters(config),
    "non_embedding_params": lambda config, _: count_non_embedding_parameters(config),
    "memory": _memory,
    "flops": _flops,
}
UNITS = {
    "params": "parameters",
    "non_embedding_params": "parameters without embeddings",
    "memory": "bytes of memory",
    "flops": "FLOPs a token",
}


def costs(config: ModelConfig, budget: Budget) -> dict[str, float]:
    """Every cost of a config, under a budget's context, batch and bits."""
    return {name: cost(config, budget) for name, cost in COSTS.items()}


COPIES = 8  # bytes are counted up from bits, so eight alike add a whole number of them


def block_cost(name: str, config: ModelConfig, budget: Budget, block: BlockConfig) -> float:
    """What one more block adds to a cost; one that reads another's keys and values needs that beside it."""
    beside, block = with_source(block, None), with_source(block, 0)
    one, more = (_cost_of(name, config, budget, beside, *[block] * count) for count in (0, COPIES))
    return (more - one) / COPIES


def rest_cost(name: str, config: ModelConfig, budget: Budget) -> float:
    """What a model costs beside its blocks."""
    block = config.blocks[0]  # the first reads no other
    return _cost_of(name, config, budget, block) - block_cost(name, config, budget, block)


def _cost_of(name: str, config: ModelConfig, budget: Budget, *blocks: BlockConfig) -> float:
    return COSTS[name](dataclasses.replace(config, blocks=blocks), budget)


LARGEST_CUTS = 0.4, 0.2
"""Of width and depth, where all blocks are cut alike."""


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
    """Sizes, what the student of these sizes costs, and how much its cuts are expected to hurt.

    Of method puzzle, `variants` says what becomes of each of the teacher's blocks (`library.py`).
    """

    sizes: Sizes
    costs: Mapping[str, float]
    hurt: float
    variants: tuple[str, ...] = ()


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
    space, largest = space.with_cuts(*LARGEST_CUTS), largest_sizes(teacher)
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
    width, depth = space.max_width_cut or 0.0, space.max_depth_cut or 0.0
    if name in left_whole(teacher) or (name == "num_blocks" and not with_depth):
        return (largest,)
    if name == "num_blocks":
        unit = len(depth_units(teacher)[0])
        step = unit * max(1, round(largest / 26 / unit))  # 2 of the 52 blocks of the 8B
        return tuple(range(largest, math.ceil((1 - depth) * largest) - 1, -step))
    if name == "mamba_num_heads":
        step = _step_of_heads(largest, [b.num_groups for b in teacher.blocks if isinstance(b, Mamba2Config)])
    elif name == "num_attention_heads":
        step = _step_of_heads(largest, [b.attention.num_key_value_heads for b in teacher.blocks if b.attention])
    elif name == "mamba_head_dim":
        step = max(1, largest // 8)
    else:
        step = _step(largest, least)
    return tuple(range(largest, math.ceil((1 - width) * largest) - 1, -step))


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
            "no budget was given; set at least one of --params, --non-embedding-params, --memory, --flops"
        )
    cost = _Costs(teacher, budget, drop_order)
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


def kept_after(teacher: ModelConfig, sizes: Sizes, drop_order: tuple[int, ...] | None) -> tuple[int, ...]:
    """Blocks that stay when the first of `drop_order` go until `num_blocks` are left."""
    count = len(teacher.blocks)
    gone = set(sizes.drop_blocks)
    if sizes.num_blocks is not None and sizes.num_blocks < count:
        order = range(count - 1, -1, -1) if drop_order is None else drop_order
        gone = set(itertools.islice(order, count - sizes.num_blocks))
    return tuple(index for index in range(count) if index not in gone)


class _Costs:
    """Costs of many sizes of one teacher: a sum over its different blocks, each counted once for each width."""

    def __init__(self, teacher: ModelConfig, budget: Budget, drop_order: tuple[int, ...] | None) -> None:
        self.teacher, self.budget, self.drop_order = teacher, budget, drop_order
        self._alone = [with_source(block, 0) for block in teacher.blocks]  # which block is read costs nothing
        self._blocks: dict[Any, Counter[BlockConfig]] = {}
        self._known: dict[Any, float] = {}

    def of(self, name: str, sizes: Mapping[str, int]) -> float:
        hidden = sizes["hidden_size"]
        return self._rest(name, hidden) + sum(
            count * self._block(name, hidden, block, tuple(sizes[size] for size in block_sizes(block)))
            for block, count in self._kept(sizes["num_blocks"]).items()
        )

    def within(self, sizes: Mapping[str, int], ceilings: Mapping[str, float]) -> bool:
        return all(self.of(name, sizes) <= limit for name, limit in ceilings.items())

    def _kept(self, num_blocks: int) -> Counter[BlockConfig]:
        if num_blocks not in self._blocks:
            kept = kept_after(self.teacher, Sizes(num_blocks=num_blocks), self.drop_order)
            self._blocks[num_blocks] = Counter(self._alone[index] for index in kept)
        return self._blocks[num_blocks]

    def _block(self, name: str, hidden: int, block: BlockConfig, values: tuple[int, ...]) -> float:
        key = (name, hidden, id(block), values)
        if key not in self._known:
            sizes: dict[str, Any] = dict(zip(block_sizes(block), values, strict=True))
            resized = resize_block(block, target_counts(block, Sizes(**sizes)))
            self._known[key] = block_cost(name, self._at(hidden), self.budget, resized)
        return self._known[key]

    def _rest(self, name: str, hidden: int) -> float:
        key = (name, hidden)
        if key not in self._known:
            self._known[key] = rest_cost(name, self._at(hidden), self.budget)
        return self._known[key]

    def _at(self, hidden: int) -> ModelConfig:
        return dataclasses.replace(self.teacher, hidden_size=hidden)


def _check_reachable(
    grid: Mapping[str, tuple[int, ...]], ceilings: Mapping[str, float], cost: _Costs, teacher: ModelConfig
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
                f"a budget of {limit:,.0f} {UNITS[name]} cannot be met: the smallest student of this search space has "
                f"{reachable:,.0f} ({sizes or 'no axis may be cut'}); raise --{name.replace('_', '-')}, or allow "
                f"smaller sizes with --space.max-width-cut or lists such as {flags}"
            )


def _not_close(
    largest: list[dict[str, int]], ceilings: Mapping[str, float], cost: _Costs, whole: Mapping[str, int]
) -> str:
    best = {name: max(cost.of(name, sizes) for sizes in largest) for name in ceilings}
    nearest = max(ceilings, key=lambda name: best[name] / ceilings[name])
    if len(largest) == 1 and all(value == whole[size] for size, value in largest[0].items()):
        return f"the teacher itself has {best[nearest]:,.0f} {UNITS[nearest]}, within the budget: nothing is cut"
    return (
        f"no size of the search space comes within 5 % of the budget: the nearest student has {best[nearest]:,.0f} "
        f"{UNITS[nearest]} of {ceilings[nearest]:,.0f}; give finer lists, such as "
        "--space.intermediate-size, to use all of it"
    )
