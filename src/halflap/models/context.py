"""What one pass knows about its tokens: the only channel between the model and its mixers, and between mixers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from halflap.models.cache import Held, KeyValueState
from halflap.models.config import RopeConfig
from halflap.models.rope import rotary_tables, speeds
from halflap.ops.attention import cached_mask, packed_mask, within_window

Mask = Callable[[], Tensor | None]
Scan = Callable[[Tensor | None], tuple[Tensor, Tensor]]  # of the first tokens of each row, or all: output, final state


@dataclass(frozen=True)
class KeyValues:
    """Keys (B, K, S, head_dim) and values (B, K, S, value_dim) and which of them a pass's queries see.

    The last five are arguments of `ops.attention.attention`, in whose terms key s need not be at position s.
    """

    keys: Tensor
    values: Tensor
    mask: Mask
    starts: Tensor | None = None
    offset: int | None = 0
    window: int | None = None
    meta: int = 0


@dataclass
class SequenceContext:
    """One pass over tokens (B, T).

    positions (B, T) count from each document's start, its meta tokens included; runs (B, T) number the documents of a
    row, None when each row is one; lengths (B,) are the valid right-padded tokens of a cached pass, None when all are;
    `past` is True when the cache already holds something.
    """

    positions: Tensor
    runs: Tensor | None = None
    starts: Tensor | None = None  # (B, T) where each token's document begins in its row; None when each row is one
    places: Tensor | None = None  # of text between meta tokens, in packed rows; None when it follows the first `meta`
    lengths: Tensor | None = None
    past: bool = False
    uniform: bool = True  # all rows of the cache equally long
    used: int = 0  # positions of the longest row once this pass is written
    meta: int = 0  # meta tokens that every document begins with
    decode_window_compat: bool = False
    readers: Mapping[int, int] = field(default_factory=dict)  # block to the last that reads its keys and values
    held: Held | None = None  # takes what states are to do later; None: they advance at once
    block: int = 0  # the one that runs
    _shared: dict[int, KeyValues] = field(default_factory=dict)
    _masks: dict[object, Tensor | None] = field(default_factory=dict)
    _rotary: dict[tuple[RopeConfig, int, torch.dtype], tuple[Tensor, Tensor]] = field(default_factory=dict)

    @property
    def time(self) -> int:
        return self.positions.shape[1]

    def key_values(self, key: Tensor, value: Tensor, window: int | None, state: KeyValueState | None) -> KeyValues:
        """What this pass's queries may look at once key and value (B, K, T, h) are part of `state`, if there is one.

        Other blocks that read this block's find it under `shared`.
        """
        found = self._uncached(key, value, window) if state is None else self._cached(key, value, state)
        if self.block in self.readers:
            self._shared[self.block] = found
        return found

    def shared(self, source: int) -> KeyValues:
        """The keys and values of an earlier block."""
        found = self._shared[source]
        if self.used and self.readers[source] == self.block:
            del self._shared[source]  # of a cached pass, in which no block runs twice
        return found

    def fork(self) -> SequenceContext:
        """The same pass for another residual stream: keys and values shared so far are both's, later ones its own."""
        return dataclasses.replace(self, _shared=dict(self._shared))

    def forget(self, block: int) -> None:
        """Let go of keys and values whose last reader has run, in a pass in which no block runs twice."""
        for source in [source for source in self._shared if self.readers[source] <= block]:
            del self._shared[source]

    def shared_tensors(self) -> dict[int, tuple[Tensor, Tensor, int | None]]:
        """Keys, values and window that later blocks read, by the block that made them; None: all is seen."""
        return {source: (found.keys, found.values, found.window) for source, found in self._shared.items()}

    def share(self, source: int, key: Tensor, value: Tensor, window: int | None) -> None:
        """Put back keys and values of a pass without a cache, as `shared_tensors` gave them."""
        self._shared[source] = self._uncached(key, value, window)

    def _uncached(self, key: Tensor, value: Tensor, window: int | None) -> KeyValues:
        time = self.time
        if window is None or time <= self.meta + window + 1:  # then it hides nothing
            return KeyValues(key, value, lambda: self.attention_mask(time), self.starts)
        return KeyValues(key, value, lambda: self._window_mask(window), self.starts, 0, window, self.meta)

    def _cached(self, key: Tensor, value: Tensor, state: KeyValueState) -> KeyValues:
        window = state.window
        if window is None or self.time == 1:
            keys, values = state.append(key, value, self.positions, self.uniform, self.used)
            count = keys.shape[2]
            if window is not None and self.decode_window_compat:
                return KeyValues(keys, values, lambda: self._compat_mask(count, window), offset=None)
            offset = count - self.time if self.uniform else None
            return KeyValues(keys, values, lambda: self.attention_mask(count), offset=offset)
        before = self.positions[:, 0]
        past = min(self.used - self.time - self.meta, window)
        keys, values = state.look_back(key, value, before, past, self.used)
        if self.held is None:
            state.keep(key, value, before, self.time if self.lengths is None else self.lengths)
        else:
            self.held.append(lambda counts: state.keep(key, value, before, counts))
        whole = self.uniform or bool((before >= self.meta + past).all())  # every row has `past` tokens behind it
        return KeyValues(
            keys,
            values,
            lambda: self._chunk_mask(window, past, whole),
            offset=self.meta + past if whole else None,
            window=window,
            meta=self.meta,
        )

    def scanned(self, scan: Scan, leave: Callable[[Tensor, Tensor | None], None] | None) -> Tensor:
        """What `scan(lengths)` puts out; `leave(its final state, lengths)` moves a state, None where there is none.

        Of a held pass the scan alone runs again, and the state moves, once it is known how many tokens count.
        """
        if leave is None or self.held is None:
            y, final = scan(self.lengths)
            if leave is not None:
                leave(final, self.lengths)
            return y
        self.held.append(lambda counts: leave(scan(counts)[1], counts))
        return scan(None)[0]

    def attention_mask(self, keys: int) -> Tensor | None:
        """Mask (B, 1, T, keys), made once a pass; None where plain causal attention is meant."""
        return self._once(keys, lambda: self._make_mask(keys))

    def _make_mask(self, keys: int) -> Tensor | None:
        if self.runs is not None:
            return packed_mask(self.runs)
        if not self.past or (self.time == 1 and self.uniform):
            return None
        return cached_mask(self.positions, keys)

    def _window_mask(self, window: int) -> Tensor | None:
        """Of a pass without a cache: (B or 1, 1, T, T)."""

        def make() -> Tensor:
            steps = torch.arange(self.time, device=self.positions.device)
            seen = within_window(steps, steps, window, self.meta, self.starts)
            return seen if self.runs is None else seen & packed_mask(self.runs)

        return self._once(("window", window), make)

    def _chunk_mask(self, window: int, past: int, whole: bool) -> Tensor | None:
        """Of new tokens behind the meta tokens and `past` earlier ones: (B or 1, 1, T, meta + past + T)."""

        def make() -> Tensor:
            keys = torch.arange(self.meta + past + self.time, device=self.positions.device)
            seen = within_window(keys[self.meta + past :], keys, window, self.meta)
            if whole:
                return seen
            missing = (self.meta + past - self.positions[:, 0])[:, None]  # of `past`, what a row has not
            there = (keys < self.meta) | (keys >= self.meta + missing)
            return seen & there[:, None, None]

        return self._once(("chunk", window), make)

    def _compat_mask(self, keys: int, window: int) -> Tensor | None:
        """Of one new token: as always but for the slot of the token `window` positions back."""

        def make() -> Tensor:
            oldest = self.meta + (self.positions - window - self.meta) % (window + 1)
            full = self.positions >= self.meta + window
            slots = torch.arange(keys, device=self.positions.device)
            gone = full[..., None] & (slots == oldest[..., None])
            return cached_mask(self.positions, keys) & ~gone[:, None]

        return self._once(("compat", keys, window), make)

    def _once(self, key: object, make: Mask) -> Tensor | None:
        if key not in self._masks:
            self._masks[key] = make()
        return self._masks[key]

    def rotary(self, rope: RopeConfig, head_dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin (B, 1, T, rotary) of this pass, made once for all blocks with the same rotary embedding."""
        key = (rope, head_dim, dtype)
        if key not in self._rotary:
            wide = torch.promote_types(dtype, torch.float32)
            self._rotary[key] = rotary_tables(
                self.positions, speeds(rope, head_dim, self.positions.device, wide), dtype
            )
        return self._rotary[key]


@dataclass
class GroupedContext:
    """One pass for several caches: what lies between a block's projections knows what belongs to one cache alone, the
    projections see all. Each cache has rows of the pass (`along` 0), or a stretch of its only row (1).
    """

    groups: list[tuple[slice, SequenceContext]]
    along: int = 0

    @property
    def block(self) -> int:
        return self.groups[0][1].block

    @block.setter
    def block(self, index: int) -> None:
        for _, context in self.groups:
            context.block = index


Context = SequenceContext | GroupedContext


def by_group(function: Callable[..., Tensor], context: Context, state: Any, *tensors: Tensor | None) -> Tensor:
    """function(context, state, *tensors), for each group on its own where there are several.

    `state` is then a list, one for each group, and so are tensors (B, T, ...) cut and the results put together.
    """
    if isinstance(context, SequenceContext):
        return function(context, state, *tensors)
    results = [
        function(
            inner, part, *(None if tensor is None else stretch(tensor, where, context.along) for tensor in tensors)
        )
        for (where, inner), part in zip(context.groups, state, strict=True)
    ]
    return torch.cat(results, context.along)


def stretch(tensor: Tensor, where: slice, along: int) -> Tensor:
    """Rows (along 0) or columns (1) of a tensor (B, T, ...)."""
    return tensor[where] if along == 0 else tensor[:, where]
