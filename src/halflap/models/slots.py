"""A cache whose rows come and go: sequences lie in its first rows, so a pass over them copies nothing.

`view` the running rows, pass it to the model, and `absorb` it: states that were advanced in place are there already,
others are copied back. A row that leaves is overwritten by the last one (`move`). Key/value memory has as many slots as
the longest row needs and may grow a little at a time: a growth costs about as much as two steps' reading of it.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from halflap.models.cache import Cache, ConvSSMState, KeyValueState, State, fields, mapped, parts
from halflap.models.config import ModelConfig

GROW = 128  # tokens that room is made for at once
UNLIMITED = 1 << 60


def trimmed(state: State, tokens: int) -> dict[str, Tensor]:
    """Its tensors, without key/value slots beyond those of `tokens` tokens."""
    slots = _slots(state, tokens)
    return {name: t if slots is None else t[:, :, :slots] for name, t in fields(state).items()}


def empty(
    config: ModelConfig, dtype: torch.dtype, device: torch.device | str, ssm_dtype: torch.dtype | None = None
) -> Cache:
    """A cache without rows that `resize` makes room in. Its rows begin with the meta tokens by being inserted so."""
    cache = Cache.create(config, 0, 0, dtype, device, ssm_dtype=ssm_dtype)
    cache.started = True
    return cache


def resize(cache: Cache, rows: int, tokens: int) -> None:
    """Make it hold so many rows, each of up to `tokens` tokens; what fits of the old is kept."""
    kept = min(rows, len(cache.lengths))
    for state in parts(cache):
        slots = _slots(state, tokens)
        for name, old in fields(state).items():
            shape = [rows, *old.shape[1:]]
            if slots is not None:
                shape[2] = slots
            if list(old.shape) == shape:
                continue
            new = old.new_zeros(shape)
            _copy(new[:kept], old[:kept], slots)
            setattr(state, name, new)
    lengths = cache.lengths.new_zeros(rows)
    lengths[:kept] = cache.lengths[:kept]
    cache.lengths = lengths


def capacity(cache: Cache) -> tuple[int, int]:
    """Rows, and the tokens that each has room for; UNLIMITED where none of its states grows any more."""
    tokens = UNLIMITED
    for state in parts(cache):
        if isinstance(state, KeyValueState):
            have = state.keys.shape[2] - state.meta
            tokens = min(tokens, have if state.window is None or have <= state.window else UNLIMITED)
    return len(cache.lengths), tokens


def rounded(cache: Cache, tokens: int) -> int:
    """A row length to `resize` to so that `tokens` tokens fit: what is there, or a little more than asked."""
    have = capacity(cache)[1]
    return have if tokens <= have else -(-tokens // GROW) * GROW


def view(cache: Cache, rows: int) -> Cache:
    """The first `rows` rows: its tensors are parts of the cache's own."""
    blocks = [mapped(state, lambda _, tensor: tensor[:rows]) for state in cache.blocks]
    return cache.of_rows(blocks, cache.lengths[:rows])


def absorb(cache: Cache, viewed: Cache) -> None:
    """Take over what a pass over a `view` left: only what was not advanced in place is copied.

    There must have been room for the new tokens (`resize`).
    """
    rows = len(viewed.lengths)
    for mine, theirs in zip(parts(cache), parts(viewed), strict=True):
        for name, new in fields(theirs).items():
            place = getattr(mine, name)[:rows]
            if new.data_ptr() != place.data_ptr():
                place.copy_(new)
    cache.lengths[:rows] = viewed.lengths


def move(cache: Cache, source: int, target: int) -> None:
    """Row `source` also becomes row `target`."""
    if source == target:
        return
    for state in parts(cache):
        for tensor in fields(state).values():
            tensor[target] = tensor[source]
    cache.lengths[target] = cache.lengths[source]


def insert(cache: Cache, row: Cache, slot: int) -> None:
    """Copy a cache of one row to row `slot`, which must be long enough."""
    length = int(row.lengths[0])
    for mine, theirs in zip(parts(cache), parts(row), strict=True):
        slots = _slots(mine, length)
        for name, new in fields(theirs).items():
            _copy(getattr(mine, name)[slot : slot + 1], new[:1], slots)
    cache.lengths[slot] = length


def take(cache: Cache, slot: int) -> Cache:
    """A copy of row `slot` that holds no more than its tokens need."""
    length = int(cache.lengths[slot])

    def taken(state: State, tensor: Tensor) -> Tensor:
        row, held = tensor[slot : slot + 1], _slots(state, length)
        return (row if held is None else row[:, :, :held]).clone()

    return cache.of_rows([mapped(state, taken) for state in cache.blocks], cache.lengths[slot : slot + 1].clone())


def fork(cache: Cache) -> Cache:
    """A cache to run ahead with, while `cache` stays where it is and has room for what comes.

    Recurrent states and windows are copies; keys and values of whole attention are written behind those of `cache`.
    """

    def forked(state: State, tensor: Tensor) -> Tensor:
        return tensor if isinstance(state, KeyValueState) and state.window is None else tensor.clone()

    blocks = [mapped(state, forked) for state in cache.blocks]
    return dataclasses.replace(cache, blocks=blocks, lengths=cache.lengths.clone(), held=None)


def _slots(state: State, tokens: int) -> int | None:
    """Key/value slots of a row of `tokens` tokens."""
    if isinstance(state, ConvSSMState):
        return None
    return state.meta + (tokens if state.window is None else min(tokens, state.window + 1))


def _copy(target: Tensor, source: Tensor, slots: int | None) -> None:
    """Rows into as many rows, of keys and values what both hold, at most `slots`."""
    if slots is not None:
        slots = min(slots, source.shape[2], target.shape[2])
        target, source = target[:, :, :slots], source[:, :, :slots]
    target.copy_(source)
