"""What a student costs and what it may: counts, bytes, operations and seconds of a config, and ceilings on them.

Every cost adds up over blocks, so those of many sizes come from few (`Costs`). Times come from a cost table of the
device; all else is counted. Pure data: no torch.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from halflap.compress.axes import Sizes, block_types, kept_after, target_counts
from halflap.compress.cost_model import Condition
from halflap.compress.cost_table import CostTable
from halflap.compress.grid import SizeLists, go_together
from halflap.compress.kinds import block_sizes, resize_block
from halflap.errors import HalflapError
from halflap.models.config import BlockConfig, ModelConfig
from halflap.models.count import (
    Phase,
    count_non_embedding_parameters,
    count_parameters,
    flops_per_token,
    memory_bytes,
)
from halflap.models.sharing import with_source

WITHIN = 0.95  # a student comes within 5 % below its ceiling where the space allows
SPARE = 0.02
"""Share of a ceiling on time that a timed student leaves free: two timings of one shape differ by about that."""
ROUNDING = 1e-9
"""Share by which a time may pass its ceiling: the teacher's own, summed over blocks, is within its 100 %."""


@dataclass(frozen=True)
class Budget:
    """Ceilings, absolute: counts, bytes, operations a token, seconds a pass; `throughput`, in tokens a second, is a
    floor. And what memory, FLOPs and times are meant at.

    Keys and values take `cache_bits`; SSM states, into which the whole text is summed, take twice as many: 32 and 16
    beside 16 and 8, as in our cache and in the memory budget of Nemotron-H 47B. `table` tells times.
    """

    params: float | None = None
    non_embedding_params: float | None = None
    memory: float | None = None
    flops: float | None = None
    latency: float | None = None
    throughput: float | None = None
    phase: Phase = "decode"
    context: int = 8192
    batch: int = 1
    weight_bits: int = 16
    cache_bits: int = 16
    table: CostTable | None = None

    @property
    def condition(self) -> Condition:
        return Condition(self.phase, self.context, self.batch)

    @property
    def ceilings(self) -> dict[str, float]:
        """Cost name to ceiling, of those that are set; a throughput is a ceiling on the latency."""
        found = {name: getattr(self, name) for name in COSTS if getattr(self, name) is not None}
        if (seconds := min(found.get("latency", math.inf), self._seconds_at_throughput)) < math.inf:
            found["latency"] = seconds * (1 + ROUNDING)
        return found

    @property
    def _seconds_at_throughput(self) -> float:
        return self.condition.tokens / self.throughput if self.throughput else math.inf

    def at_pace(self, pace: float | None) -> Budget:
        """With students predicted to take `pace` times what the table tells, and some of the ceiling to spare; itself
        where no pace is known."""
        if pace is None or self.table is None:
            return self
        return dataclasses.replace(
            self,
            table=self.table.at_pace(self.condition, pace),
            latency=self.latency and self.latency / (1 + SPARE),
            throughput=self.throughput and self.throughput * (1 + SPARE),
        )

    @property
    def binding_time(self) -> str:
        """Which of latency and throughput asks for the shorter pass."""
        return "throughput" if self._seconds_at_throughput < (self.latency or math.inf) else "latency"

    def flag(self, cost: str) -> str:
        """What to write to allow more of a cost."""
        name = self.binding_time if cost == "latency" else cost
        return f"{'lower' if name == 'throughput' else 'raise'} --{name.replace('_', '-')}"

    def unmet_together(self, limits: Mapping[str, float], smallest: Mapping[str, float | None], what: str) -> str:
        """Each limit can be met, but not all; smallest: what each cost can be under the others, None where it cannot.

        what: may be smaller, so that they can.
        """
        parts = [
            f"with the others kept, the smallest has {self.say(name, value)}"
            for name, value in smallest.items()
            if value is not None
        ]
        asked = " and ".join(self.say(name, limit) for name, limit in limits.items())
        mend = " or ".join(map(self.flag, limits))
        return (
            f"budgets of {asked} cannot be met together: {'; '.join(parts) or 'no two of them can'}; {mend}, or allow "
            f"smaller {what} with --space.max-width-cut or --space.max-depth-cut"
        )

    def short(self, counted: Mapping[str, float]) -> str | None:
        """What a student has and may have of the cost that is nearest to its ceiling, where it is over 5 % below it."""
        limits = self.ceilings
        name = max(limits, key=lambda name: counted[name] / limits[name])
        if counted[name] >= WITHIN * limits[name]:
            return None
        return f"{self.say(name, counted[name])} where {self.say(name, limits[name])} are allowed"

    def say(self, cost: str, value: float) -> str:
        """An amount of a cost as people say it."""
        if cost != "latency":
            return f"{value:,.0f} {UNITS[cost]}"
        if self.binding_time == "throughput":
            rate = self.condition.tokens / value
            return f"{rate:,.{0 if rate >= 1000 else 3}f} tokens a second ({self.condition})"
        return f"{1e3 * value:,.4g} ms a pass ({self.condition})"


def _memory(config: ModelConfig, budget: Budget) -> float:
    return memory_bytes(
        config, budget.context, budget.batch, budget.weight_bits, budget.cache_bits, 2 * budget.cache_bits
    )


def _latency(config: ModelConfig, budget: Budget) -> float:
    if budget.table is None:
        raise HalflapError(
            f"a {budget.binding_time} budget needs measured times and there is no cost table; make one with "
            "`halflap bench MODEL --blocks` and name it with --costs"
        )
    return budget.table.seconds(config, budget.condition)


COSTS: dict[str, Callable[[ModelConfig, Budget], float]] = {
    "params": lambda config, _: count_parameters(config),
    "non_embedding_params": lambda config, _: count_non_embedding_parameters(config),
    "memory": _memory,
    "flops": lambda config, budget: flops_per_token(config, budget.context, budget.phase),
    "latency": _latency,
}
UNITS = {
    "params": "parameters",
    "non_embedding_params": "parameters without embeddings",
    "memory": "bytes of memory",
    "flops": "FLOPs a token",
}
BUDGETS = (*COSTS, "throughput")
"""Names of what may be limited."""


def costs(config: ModelConfig, budget: Budget) -> dict[str, float]:
    """Every cost of a config, under a budget's context, batch and bits; with a cost table also latency, in seconds a
    pass, and throughput, in tokens a second."""
    found = {name: cost(config, budget) for name, cost in COSTS.items() if name != "latency" or budget.table}
    return with_throughput(found, budget)


def with_throughput(found: Mapping[str, float], budget: Budget) -> dict[str, float]:
    """Costs, with the throughput at their latency if that is known."""
    return {**found, **({"throughput": budget.condition.tokens / found["latency"]} if "latency" in found else {})}


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


class Costs:
    """Costs of many sizes of one teacher: sums over its different blocks, each counted once for each of its sizes."""

    def __init__(self, teacher: ModelConfig, budget: Budget, drop_order: tuple[int, ...] | None) -> None:
        self.teacher, self.budget, self.drop_order = teacher, budget, drop_order
        alone = {block: with_source(block, 0) for block in teacher.blocks}  # which block is read costs nothing
        self._alone = [alone[block] for block in teacher.blocks]
        self._types = {"num_blocks": tuple(range(len(teacher.blocks)))} | block_types(teacher)

    @property
    def names(self) -> list[str]:
        """Of the costs that can be told."""
        return [name for name in COSTS if name != "latency" or self.budget.table]

    def all(self, sizes: Mapping[str, int]) -> dict[str, float]:
        """Every cost of the student of these sizes."""
        alone = {name: (value,) for name, value in sizes.items()}
        return with_throughput({name: self.over(name, alone).item() for name in self.names}, self.budget)

    def over(self, name: str, grid: SizeLists) -> np.ndarray:
        """A cost at every point of a grid of sizes: float64, a dimension for each size, in the order of the grid.

        As `costs` has it, to what rounding of each block to whole bytes and operations leaves; NaN where heads do not
        go together.
        """
        hidden = grid["hidden_size"]
        total = np.zeros(1)
        for counted in self._types:
            if counted not in grid:
                continue
            kept = [self._kept(counted, left) for left in grid[counted]]
            for block in dict.fromkeys(block for counter in kept for block in counter):
                counts = np.array([counter[block] for counter in kept])
                own = tuple(block_sizes(block))
                added = [self._block(name, width, block, {size: grid[size] for size in own}) for width in hidden]
                total = total + _spread(counts, (counted,), grid) * _spread(added, ("hidden_size", *own), grid)
        rest = [rest_cost(name, self._at(width), self.budget) for width in hidden]
        return _spread(rest, ("hidden_size",), grid) + total

    def _kept(self, counted: str, left: int) -> Counter[BlockConfig]:
        """Blocks of a type (all for num_blocks) when so many of them are left."""
        sizes: dict[str, Any] = {counted: left}
        kept = {*kept_after(self.teacher, Sizes(**sizes), self.drop_order)} & {*self._types[counted]}
        return Counter(self._alone[index] for index in sorted(kept))

    def _block(self, name: str, hidden: int, block: BlockConfig, lists: SizeLists) -> np.ndarray:
        """What one more such block adds, at every combination of its own sizes."""
        config = self._at(hidden)
        added = []
        for values in itertools.product(*lists.values()):
            sizes: dict[str, Any] = dict(zip(lists, values, strict=True))
            if go_together(sizes):
                resized = resize_block(block, target_counts(block, Sizes(**sizes)))
                added.append(block_cost(name, config, self.budget, resized))
            else:
                added.append(math.nan)
        return np.array(added).reshape([len(values) for values in lists.values()])

    def _at(self, hidden: int) -> ModelConfig:
        return dataclasses.replace(self.teacher, hidden_size=hidden)


def _spread(values: Any, names: tuple[str, ...], grid: SizeLists) -> np.ndarray:
    """Values by some of a grid's sizes, as an array that broadcasts over all of it."""
    order = [names.index(name) for name in grid if name in names]
    return np.asarray(values).transpose(order).reshape([len(grid[name]) if name in names else 1 for name in grid])
