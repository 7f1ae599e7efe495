"""What may become of each block, and what each of these variants costs (Puzzle: Bercovich et al. 2024). No torch.

A block stays whole, is cut along its own axes, has neighbouring key/value heads averaged, sees a (shorter) window,
becomes one linear map, or is dropped; the hidden size stays. Blocks that leave together (`droppable_units`) are dropped
by one option that covers them all. A choice is one option for each block; the rules say which choices are students:
what reads another's keys and values goes with it and has its window, a block of each kind stays, and no more are
dropped than the search space allows.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from halflap.compress.axes import Sizes, droppable_units, readers_of, target_counts
from halflap.compress.costs import Budget, block_cost, rest_cost
from halflap.compress.grid import SearchSpace, go_together
from halflap.compress.kinds import (
    BLOCK_COUNTS,
    KINDS,
    SHARED,
    Change,
    SizedAxis,
    block_counts,
    block_sizes,
    changed_block,
    owner,
    resize_block,
)
from halflap.compress.plan import sharing_blocks
from halflap.errors import HalflapError
from halflap.models.config import AttentionConfig, BlockConfig, MLPConfig, ModelConfig
from halflap.models.sharing import with_source

LARGEST_CUTS = 0.9, 0.5
"""Of width and depth: single blocks can do with far less than all of them can."""

# Shares of a size that are tried where none are given (Bercovich et al. 2024 of MLPs and key/value heads; of Mamba
# heads those of 16 a group, with few of their channels, as each goes with each). The state size is left whole: cutting
# it is untried.
_HEADS = (0.875, 0.75, 0.5)
SHARES: Mapping[str, tuple[float, ...]] = {
    "intermediate_size": (0.87, 0.75, 0.5, 0.25, 0.2, 0.1),
    "mamba_num_heads": _HEADS,
    "mamba_head_dim": (0.75, 0.5),
    "mamba_intermediate_size": _HEADS,
    "num_attention_heads": (0.75, 0.5, 0.25),
    "num_key_value_heads": (0.5, 0.25, 0.125),
}
WINDOWS = (0.5, 0.25, 0.125)
"""Shares of what a token sees before itself: of its window, or of the text where it sees all."""


@dataclass(frozen=True)
class Variant:
    """What becomes of a block: sizes to cut it to, a change beside, or that it goes."""

    sizes: Sizes = Sizes()
    change: Change = Change()
    dropped: bool = False

    @property
    def name(self) -> str:
        """`whole`, `dropped`, or what is left: `intermediate_size 192`."""
        if self.dropped:
            return "dropped"
        parts = [f"{size} {value}" for size, value in dataclasses.asdict(self.sizes).items() if value]
        if self.change.pool > 1:
            parts.append(f"key/value heads averaged by {self.change.pool}")
        if self.change.linear:
            parts.append("linear")
        if self.change.window is not None:
            parts.append(f"window {self.change.window}")
        return ", ".join(parts) or "whole"

    def of(self, block: BlockConfig) -> BlockConfig:
        """The block that is left; not of a dropped one."""
        return changed_block(resize_block(block, target_counts(block, self.sizes)), self.change)


WHOLE, DROPPED = Variant(), Variant(dropped=True)


@dataclass(frozen=True)
class Option:
    """A variant of the blocks it covers: one, or several that are dropped together."""

    blocks: tuple[int, ...]
    variant: Variant

    @property
    def name(self) -> str:
        return f"{'+'.join(map(str, self.blocks))} {self.variant.name}"


@dataclass(frozen=True)
class Rule:
    """weights @ choice <= at_most, of every student."""

    weights: np.ndarray
    at_most: float


@dataclass(frozen=True)
class Library:
    """All options of a teacher, those of a block together, and the rules of choosing among them."""

    teacher: ModelConfig
    options: tuple[Option, ...]
    max_dropped: int

    @property
    def covers(self) -> np.ndarray:
        """(L, C) int: whether option c decides block i."""
        table = np.zeros((len(self.teacher.blocks), len(self.options)), int)
        for column, option in enumerate(self.options):
            table[list(option.blocks), column] = 1
        return table

    def rules(self) -> list[Rule]:
        dropped = {column: o.blocks for column, o in enumerate(self.options) if o.variant.dropped}

        def of(weight_of: Mapping[int, float]) -> np.ndarray:
            weights = np.zeros(len(self.options))
            weights[list(weight_of)] = list(weight_of.values())
            return weights

        rules = [Rule(of({column: len(blocks) for column, blocks in dropped.items()}), self.max_dropped)]
        linear = {column: o.blocks for column, o in enumerate(self.options) if o.variant.change.linear}
        for kind, count in Counter(type(block) for block in self.teacher.blocks).items():
            gone = {c: sum(type(self.teacher.blocks[i]) is kind for i in b) for c, b in (dropped | linear).items()}
            rules.append(Rule(of(gone), count - 1))
        going = {index: column for column, blocks in dropped.items() for index in blocks}
        windows = self._windows()
        for source, readers in readers_of(self.teacher).items():
            for reader in readers:
                gone = {going[reader]: -1.0} if reader in going else {}
                if source in going and going[source] not in gone:
                    rules.append(Rule(of({going[source]: 1, **gone}), 0))
                for window in sorted(windows[source].keys() | windows[reader].keys()):  # of both, or of none
                    ours, theirs = windows[reader].get(window, ()), windows[source].get(window, ())
                    rules.append(Rule(of(dict.fromkeys(ours, 1) | dict.fromkeys(theirs, -1)), 0))
                    rules.append(Rule(of(dict.fromkeys(theirs, 1) | dict.fromkeys(ours, -1) | gone), 0))
        return rules

    def _windows(self) -> dict[int, dict[int, list[int]]]:
        """Of each block, its options by the window that they leave, of those that shorten it."""
        found: dict[int, dict[int, list[int]]] = {index: {} for index in range(len(self.teacher.blocks))}
        for column, option in enumerate(self.options):
            if (window := option.variant.change.window) is not None:
                found[option.blocks[0]].setdefault(window, []).append(column)
        return found

    def _maker(self, option: Option) -> int:
        """The block whose keys and values the (first) block of an option reads, which may be itself."""
        return owner(self.teacher.blocks[option.blocks[0]], option.blocks[0])

    def saving(self, budget: Budget) -> Library:
        """Without variants that cost no less than the whole block under any of the budgets.

        A window saves no parameters: where they alone are limited, it is not worth a score, let alone a candidate. One
        that saves in some of the blocks that share keys and values stays in all.
        """
        saves = np.array([option.variant in (WHOLE, DROPPED) for option in self.options])
        whole = {o.blocks: column for column, o in enumerate(self.options) if o.variant == WHOLE}
        at = [whole.get(option.blocks, column) for column, option in enumerate(self.options)]
        for name in budget.ceilings:
            added, _ = self.costs(name, budget)
            saves |= added < added[at]
        windows = [(self._maker(option), option.variant.change.window) for option in self.options]
        saved = {pair for pair, saving in zip(windows, saves, strict=True) if saving and pair[1] is not None}
        stays = [saving or pair in saved for pair, saving in zip(windows, saves, strict=True)]
        return dataclasses.replace(self, options=tuple(itertools.compress(self.options, stays)))

    def alone(self, option: Option) -> tuple[Variant, ...]:
        """What becomes of each block when this option alone is chosen; not of a dropped one.

        What shares keys and values has one window, so the others of its group take that of the option.
        """
        window, maker = option.variant.change.window, self._maker(option)
        follow = WHOLE if window is None else Variant(change=Change(window=window))
        alike = (follow if owner(block, index) == maker else WHOLE for index, block in enumerate(self.teacher.blocks))
        return tuple(option.variant if index in option.blocks else other for index, other in enumerate(alike))

    def follows(self, option: Option) -> bool:
        """Whether it does nothing by itself: a window of keys and values that another block makes.

        Whoever reads them sees the window of the block that makes them, whose score is of all.
        """
        window = option.variant.change.window
        only = window is not None and option.variant == Variant(change=Change(window=window))
        return only and self._maker(option) not in option.blocks

    def costs(self, name: str, budget: Budget) -> tuple[np.ndarray, float]:
        """What each option adds (C,) to a cost, and what the model costs beside its blocks."""
        known: dict[BlockConfig, float] = {}
        added = np.zeros(len(self.options))
        for column, option in enumerate(self.options):
            if option.variant.dropped:
                continue
            block = with_source(option.variant.of(self.teacher.blocks[option.blocks[0]]), 0)  # which one costs nothing
            if block not in known:
                known[block] = block_cost(name, self.teacher, budget, block)
            added[column] = known[block]
        return added, rest_cost(name, self.teacher, budget)

    def variants(self, chosen: Sequence[int]) -> tuple[Variant, ...]:
        """What becomes of each block when these options are chosen."""
        found = {index: self.options[column].variant for column in chosen for index in self.options[column].blocks}
        return tuple(found[index] for index in range(len(self.teacher.blocks)))

    def named(self, names: Sequence[str]) -> tuple[Variant, ...]:
        """The variants of these names, one for each block."""
        by_name = {(index, o.variant.name): o.variant for o in self.options for index in o.blocks}
        return tuple(by_name[pair] for pair in enumerate(names))


def library_of(teacher: ModelConfig, space: SearchSpace | None = None, length: int | None = None) -> Library:
    """The variants of every block. Raises HalflapError for sizes that no block can have.

    Of an axis with sizes given in the space these are tried, all combined; other axes are cut alone, to `SHARES`, but
    for SSM heads and their channels, which are combined. length: tokens of the text that windows are shares of where a
    block sees all; the model's own context when not given.
    """
    space = space or SearchSpace()
    length = length or teacher.max_position_embeddings
    _check_space(teacher, space)
    width, depth = space.largest_cuts(*LARGEST_CUTS)
    most = int(depth * len(teacher.blocks) + 1e-9)
    shared = sharing_blocks(teacher)
    known: dict[tuple[BlockConfig, bool], tuple[Variant, ...]] = {}
    options: list[Option] = []
    for unit in droppable_units(teacher):
        for index in unit:
            key = with_source(teacher.blocks[index], 0), index in shared
            if key not in known:
                known[key] = tuple(_variants(teacher.blocks[index], space, width, index in shared, length))
            options += [Option((index,), variant) for variant in known[key]]
        if len(unit) <= most:
            options.append(Option(unit, DROPPED))
    return Library(teacher, tuple(options), most)


def _check_space(teacher: ModelConfig, space: SearchSpace) -> None:
    for name in ("hidden_size", "num_blocks", *BLOCK_COUNTS):
        if getattr(space, name):
            raise HalflapError(
                f"space.{name} was given; method puzzle chooses block by block, which keeps the hidden size and drops "
                "what the budget asks for: leave it out (--space.max-depth-cut limits what is dropped)"
            )
    if space.window and (min(space.window) < 1 or not any(block.attention for block in teacher.blocks)):
        raise HalflapError(
            f"space.window has {', '.join(map(str, space.window))}; this {teacher.family} model ({teacher.pattern()}) "
            "must have attention, and a window at least 1 token: correct it or leave it out"
        )
    sizes = {size for block in teacher.blocks for size in block_sizes(block)}
    for name in sizes:
        if (given := getattr(space, name, ())) and min(given) < 1:
            raise HalflapError(f"space.{name} has {min(given)}; a size is at least 1: correct it or leave it out")
    for field in dataclasses.fields(Sizes):
        if getattr(space, field.name, ()) and field.name not in sizes:
            raise HalflapError(
                f"space.{field.name} was given, but this {teacher.family} model ({teacher.pattern()}) has no such "
                f"axis; its blocks have {', '.join(sorted(sizes))}: leave it out"
            )


def _variants(block: BlockConfig, space: SearchSpace, width: float, shared: bool, length: int) -> Iterator[Variant]:
    """Whole first, then the largest first, each once."""
    own = block_sizes(block)
    rows = [row for row in KINDS[type(block)].sizes if not (shared and row.axis in SHARED)]
    given = [row.size for row in rows if getattr(space, row.size)]
    found: dict[BlockConfig, Variant] = {block: WHOLE}
    lists = [sorted({own[size], *(v for v in getattr(space, size) if v < own[size])}, reverse=True) for size in given]
    windows = _windows_of(block, space, length)
    for *values, window in itertools.product(*lists, (None, *windows) if space.window else (None,)):
        sizes: dict[str, Any] = {s: v for s, v in zip(given, values, strict=True) if v < own[s]}
        if go_together(own | sizes):
            _add(found, block, Variant(Sizes(**sizes), Change(window=window)))
    for variant in _automatic(block, [row for row in rows if row.size not in given], 1 - width):
        _add(found, block, variant)
    for window in windows:
        _add(found, block, Variant(change=Change(window=window)))
    if isinstance(block, AttentionConfig | MLPConfig) and not shared:
        _add(found, block, Variant(change=Change(linear=True)))
    yield from found.values()


def _windows_of(block: BlockConfig, space: SearchSpace, length: int) -> list[int]:
    """Given ones that are shorter than its own, else `WINDOWS` of its own, or of the text where that is shorter."""
    if block.attention is None:
        return []
    own = math.inf if block.attention.window is None else block.attention.window
    if space.window:
        return sorted({window for window in space.window if window < own}, reverse=True)
    values = (round(share * min(own, length)) for share in WINDOWS)
    return [window for window in dict.fromkeys(values) if 0 < window < own]


def _automatic(block: BlockConfig, rows: Sequence[SizedAxis], least: float) -> Iterator[Variant]:
    """Each of these sizes cut alone to `SHARES`, then SSM heads with their channels."""
    own, counts = block_sizes(block), block_counts(block)
    lists = {
        row.size: _steps_down(row.size, own[row.size], 1 if row.parent is None else counts[row.parent], least)
        for row in rows
    }
    for size, values in lists.items():
        for value in values:
            if size == "num_key_value_heads" and isinstance(block, AttentionConfig):
                if own[size] % value == 0:
                    yield Variant(change=Change(pool=own[size] // value))
            else:
                yield Variant(Sizes(**{size: value}))  # type: ignore[arg-type]
    for heads in ("mamba_num_heads", "num_attention_heads"):  # in a hybrid block an SSM head is a query head's
        for pair in itertools.product(lists.get(heads, ()), lists.get("mamba_head_dim", ())):
            both: dict[str, Any] = dict(zip((heads, "mamba_head_dim"), pair, strict=True))
            yield Variant(Sizes(**both))


def _add(found: dict[BlockConfig, Variant], block: BlockConfig, variant: Variant) -> None:
    found.setdefault(variant.of(block), variant)


def _steps_down(size: str, whole: int, step: int, least: float) -> list[int]:
    """`SHARES` of a size in whole steps: of so many heads' parents, or for neurons and channels a power of two."""
    if size in ("intermediate_size", "mamba_intermediate_size"):
        step = max(8, 1 << max(0, (whole // 64).bit_length() - 1))
    if size == "mamba_head_dim":
        step = max(1, whole // 8)
    shares = [share for share in SHARES.get(size, ()) if share >= least - 1e-9]
    values = (max(1, round(share * whole / step)) * step for share in shares)
    return [value for value in dict.fromkeys(values) if value < whole]


def summary(pattern: str, variants: Sequence[str]) -> str:
    """A student in a line: the pattern with `~` for what is cut and `.` for what is gone, and how often by kind."""
    strip = "".join({"whole": s, "dropped": "."}.get(v, "~") for s, v in zip(pattern, variants, strict=True))
    kinds = []
    for symbol in dict.fromkeys(pattern):
        count = Counter(v for s, v in zip(pattern, variants, strict=True) if s == symbol)
        kinds.append(f"{symbol} {', '.join(f'{n} {name}' for name, n in count.most_common())}")
    return f"{strip}  {'; '.join(kinds)}"
