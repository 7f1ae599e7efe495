"""Which stacks of equal blocks a cost table needs, and the time of a pass over one, as `generate` makes it.

A block timed alone would find its weights in the processor's caches, where in a model they come from memory. So each
stack has so many copies that what they read is several times the last-level cache, or as much as the whole model reads,
where that is less. Its vocabulary is small. The head is timed alike: behind two blocks, and with a vocabulary that
makes it read as much.
"""

from __future__ import annotations

import dataclasses
import random
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from halflap.compress.cost_model import Condition, kind_of
from halflap.compress.cost_table import CostTable, Rows, Stack
from halflap.compress.grid import LEFT_WHOLE, WIDENED_CUTS
from halflap.compress.kinds import KINDS, Change, block_counts, changed_block, resize_block
from halflap.compress.library import SHARES
from halflap.evaluate.bench import now
from halflap.inference.generate import prefill
from halflap.models.cache import Cache, fields, parts
from halflap.models.config import AttentionConfig, BlockConfig, LinearConfig, MLPConfig, ModelConfig
from halflap.models.count import cache_bytes, count_block_parameters, count_parameters
from halflap.models.decoder import Decoder
from halflap.models.model import HybridModel
from halflap.models.sharing import with_source
from halflap.progress import Progress

SMALL_VOCABULARY = 256
LARGER_THAN_CACHE = 4
"""How many times the last-level cache a stack reads, so that nearly nothing of one pass is left for the next."""
MOST_COPIES = 64
HALF = 0.5
LEVELS = (1.0, 0.75, HALF, 0.25)
MIXES = 6
"""Stacks of each kind whose every size is drawn from LEVELS and its least, beside those of whole, half and least."""
WINDOW, NARROWEST = "window", 1 / 64
"""Windows are varied as sizes are, down to this share of the widest."""
SECONDS, LONG, LEAST_PASSES, MOST_PASSES = 0.3, 2.0, 3, 200
"""Passes are timed until so much time and so many passes are over; if they are long, until a longer time is."""


# ---- what is timed


def stacks(model: ModelConfig, condition: Condition, width: int, cache: int) -> list[Stack]:
    """The stacks from which the costs of `model`, and of all that it can be cut to, are fitted; the model itself last.

    width: bytes of a weight; cache: those of the last-level cache.
    """
    reads = min(LARGER_THAN_CACHE * cache, pass_bytes(model, condition, width))
    vocabulary = min(SMALL_VOCABULARY, model.vocab_size)

    def stack(block: BlockConfig, hidden: int) -> Stack:
        one, two = (Stack(hidden, vocabulary, block, copies).config(model) for copies in (1, 2))
        each = pass_bytes(two, condition, width) - pass_bytes(one, condition, width)
        return Stack(hidden, vocabulary, block, min(MOST_COPIES, max(2, -(-reads // each))))

    largest = _largest_of_each_kind(model)
    timed = (*_windowed(largest, condition.context), *_linear(model))
    found = [stack(*sized) for block in timed for sized in _grid(block, model.hidden_size)]
    main = max(largest, key=lambda block: sum(kind_of(block) == kind_of(other) for other in model.blocks))
    for hidden in (_cut(model.hidden_size, share) for share in (1.0, HALF, _least("hidden_size"))):
        found += [Stack(hidden, words, main, 2) for words in (vocabulary, max(vocabulary, reads // (width * hidden)))]
    return list(dict.fromkeys((*found, Stack(model.hidden_size, model.vocab_size, None, 1))))


def pass_bytes(config: ModelConfig, condition: Condition, width: int) -> int:
    """What a pass moves: weights, decode state, and the residual stream into and out of each block."""
    state = cache_bytes(config, condition.context, condition.batch, 8 * width, conv_bits=8 * width)
    stream = 2 * len(config.blocks) * condition.tokens * config.hidden_size
    return width * (count_parameters(config) + stream) + state


def _largest_of_each_kind(model: ModelConfig) -> list[BlockConfig]:
    found: dict[str, tuple[int, BlockConfig]] = {}
    for block, size in zip(model.blocks, count_block_parameters(model), strict=True):
        block = with_source(block, 0)
        if size > found.get(kind_of(block), (0, block))[0]:
            found[kind_of(block)] = size, block
    return [block for _, block in found.values()]


def _windowed(blocks: Sequence[BlockConfig], context: int) -> list[BlockConfig]:
    """The blocks, and with half of the context for a window those that see all of it: what they may become.

    A window that is there already is widened to that where other blocks may get it, or clipped to the context.
    """
    open_ended = [block for block in blocks if block.attention is not None and block.attention.window is None]
    widest = max(1, context // 2) if open_ended else 1
    found: dict[str, BlockConfig] = {}
    for block in blocks:
        own = None if block.attention is None else block.attention.window
        found[kind_of(block)] = block if own is None else _with_window(block, max(min(own, context), widest))
    for block in open_ended:
        narrowed = _with_window(block, widest)
        found.setdefault(kind_of(narrowed), narrowed)
    return list(found.values())


def _with_window(block: BlockConfig, window: int) -> BlockConfig:
    return changed_block(block, Change(window=window))


def _linear(model: ModelConfig) -> list[LinearConfig]:
    """What attention and MLPs may become, unless it is there already."""
    kinds = {type(block) for block in model.blocks}
    return [LinearConfig()] if kinds & {AttentionConfig, MLPConfig} and LinearConfig not in kinds else []


def _grid(block: BlockConfig, hidden: int) -> Iterator[tuple[BlockConfig, int]]:
    """Whole; half; each size alone at half, and at the least that a search chooses; all but the width so; mixes."""
    axes = {"hidden": _least("hidden_size")} | {row.axis: _least(row.size) for row in KINDS[type(block)].sizes}
    window = None if block.attention is None else block.attention.window
    if window is not None:
        axes[WINDOW] = NARROWEST
    whole, draw = dict.fromkeys(axes, 1.0), random.Random(f"{block}")
    shares: list[Mapping[str, float]] = [whole, dict.fromkeys(axes, HALF), axes | {"hidden": 1.0}]
    shares += [whole | {axis: share} for axis, least in axes.items() for share in (HALF, least)]
    shares += [{axis: draw.choice([*LEVELS, least]) for axis, least in axes.items()} for _ in range(MIXES)]
    whole_counts = block_counts(block)
    for share in shares:
        counts = {axis: _cut(count, share.get(axis, 1.0)) for axis, count in whole_counts.items()}
        cut = resize_block(block, counts)
        if window is not None:
            cut = _with_window(cut, max(1, round(window * share[WINDOW])))
        yield cut, _cut(hidden, share["hidden"])


def _least(size: str) -> float:
    """The smallest share of a size that a search chooses by itself; half of one that it leaves whole."""
    if size in LEFT_WHOLE and size not in SHARES:
        return HALF
    return min(1 - WIDENED_CUTS[0], *SHARES.get(size, (1.0,)))


def _cut(count: int, share: float) -> int:
    """In steps of 8 where that leaves several, as widths are chosen."""
    kept = max(1, round(count * share))
    return kept - kept % 8 if kept >= 32 and share < 1 else kept


# ---- how it is timed


def measure(
    model: ModelConfig,
    conditions: Sequence[Condition],
    machine: Mapping[str, Any],
    seconds_of: Callable[[ModelConfig, Condition], float],
    path: str | Path,
    *,
    width: int,
    cache: int,
    rounds: int = 3,
) -> CostTable:
    """Time every stack once a round, so that a slow minute hits few rounds of any; `path` is written after each time.

    An unfinished table of the same model, machine and conditions that lies there is gone on with.
    """
    rows: dict[Condition, Rows] = {c: dict.fromkeys(stacks(model, c, width, cache), ()) for c in conditions}
    table = CostTable(machine, model, rows)
    if Path(path).exists():
        earlier = CostTable.load(path)
        if _same_work(earlier, table):
            table = dataclasses.replace(earlier, models={})
    total = rounds * sum(map(len, table.rows.values()))
    with Progress("cost table", total, unit="timings") as progress:
        progress.start_at(sum(len(times) for timed in table.rows.values() for times in timed.values()))
        for turn in range(1, rounds + 1):
            for condition, timed in table.rows.items():
                for stack, times in timed.items():
                    if len(times) < turn:
                        progress.note(round=turn, phase=condition.phase, context=condition.context)
                        taken = seconds_of(stack.config(model), condition)
                        table = _with_time(table, condition, stack, taken)
                        table.save(path)
                        progress.advance()
    table = table.fitted()
    table.save(path)
    return table


def _same_work(one: CostTable, other: CostTable) -> bool:
    same = one.model == other.model and dict(one.machine) == dict(other.machine)
    return same and {c: set(rows) for c, rows in one.rows.items()} == {c: set(rows) for c, rows in other.rows.items()}


def _with_time(table: CostTable, condition: Condition, stack: Stack, seconds: float) -> CostTable:
    timed = table.rows[condition]
    return dataclasses.replace(table, rows={**table.rows, condition: {**timed, stack: (*timed[stack], seconds)}})


@torch.inference_mode()
def timer_of(model: HybridModel, condition: Condition) -> Callable[[float], float]:
    """seconds -> the median time of a decode step and its choice of a token, or of reading a batch of prompts, once
    warm, over passes of about so many seconds."""
    device = model.device
    run = (_decode_step if condition.phase == "decode" else _reading)(model, condition)

    @torch.inference_mode()
    def timed(seconds: float) -> float:
        run()
        times: list[float] = []
        while sum(times) < (seconds if len(times) >= LEAST_PASSES else LONG) and len(times) < MOST_PASSES:
            before = now(device)
            run()
            times.append(now(device) - before)
        return statistics.median(times)

    return timed


def _decode_step(model: HybridModel, condition: Condition) -> Callable[[], object]:
    """A step whose token is the last of `context`, from a cache of random content; each call rewinds it."""
    cache = Cache.create(model.config, condition.batch, condition.context, model.dtype, model.device)
    for state in parts(cache):
        for tensor in fields(state).values():
            tensor.normal_(std=0.1)  # zeros are as fast on this path, but nothing promises it
    cache.started, cache.used = True, condition.context - 1
    lengths = cache.lengths + cache.used
    tokens = torch.zeros(condition.batch, 1, dtype=torch.int64, device=model.device)
    decode = Decoder(model)

    def step() -> object:
        cache.lengths, cache.used = lengths, condition.context - 1
        return decode(tokens, cache=cache)[:, -1].argmax(-1)

    return step


def _reading(model: HybridModel, condition: Condition) -> Callable[[], object]:
    generator = torch.Generator().manual_seed(0)
    shape = (condition.batch, condition.context)
    prompts = torch.randint(0, model.config.vocab_size, shape, generator=generator).tolist()
    return lambda: prefill(model, prompts)[1].argmax(-1)
