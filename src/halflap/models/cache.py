"""What a decoded sequence keeps: keys and values, convolution tails, SSM states.

Rows of a batch may have unequal lengths: row b's next token goes to position `meta + lengths[b]`, where `meta` are the
meta tokens that stand before every row. Their part of the state is the same for all rows and computed once a model
(`HybridModel.meta_state`). A windowed block holds the meta tokens, its window and the newest token, and no more at any
time. SSM states are float32 whatever the model's dtype (section 4.7 of the Nemotron-H notes), or bfloat16 where that is
asked for: half the bytes, rounded to 8 bits after each pass, while all sums within one are float32. Recurrent state
cannot be cropped: to go back, clone, or `hold` a pass and `commit` as many of its tokens as turned out right. Rows of a
batch that come and go: slots.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from halflap.models.config import AttentionConfig, BlockConfig, Mamba1Config, Mamba2Config, ModelConfig


@dataclass
class KeyValueState:
    """keys (B, K, slots, head_dim) and values (B, K, slots, value_dim).

    Without a window, slot p holds position p. With one, the first `meta` slots hold the meta tokens and position p
    comes to slot meta + (p - meta) % (window + 1): where the token lay that has just left p's window.
    """

    keys: Tensor
    values: Tensor
    window: int | None = None
    meta: int = 0

    def append(self, key: Tensor, value: Tensor, positions: Tensor, uniform: bool, used: int) -> tuple[Tensor, Tensor]:
        """Write (B, K, T, h) at `positions` (B, T) and return all keys and values up to `used` tokens.

        With a window only one token at a time; the order of the slots then means nothing.
        """
        if self.window is not None:
            used = min(used, self.meta + self.window + 1)
            positions = self._slots(positions)
        self.reserve(used)
        if uniform and self.window is None:
            start = used - key.shape[2]
            self.keys[:, :, start:used] = key
            self.values[:, :, start:used] = value
        else:
            for held, new in ((self.keys, key), (self.values, value)):
                held.scatter_(2, positions[:, None, :, None].expand_as(new), new.to(held.dtype))
        return self.keys[:, :, :used], self.values[:, :, :used]

    def look_back(self, key: Tensor, value: Tensor, before: Tensor, past: int, used: int) -> tuple[Tensor, Tensor]:
        """Of a windowed block: keys and values of the meta tokens, the `past` positions before the new ones, the new.

        Where a row has not so many, there is something that must be masked. Nothing is kept of the new ones.
        """
        assert self.window is not None
        self.reserve(min(used, self.meta + self.window + 1))
        slots = self._slots(before[:, None] + torch.arange(-past, 0, device=key.device))
        slots = slots.clamp(max=self.keys.shape[2] - 1)[:, None, :, None]
        views = []
        for held, new in ((self.keys, key), (self.values, value)):
            earlier = held.gather(2, slots.expand(-1, held.shape[1], -1, held.shape[3]))
            views.append(torch.cat([held[:, :, : self.meta], earlier, new.to(held.dtype)], 2))
        return views[0], views[1]

    def keep(self, key: Tensor, value: Tensor, before: Tensor, counts: Tensor | int) -> None:
        """Of a windowed block: keep what its window needs of the first counts[b] new tokens of row b."""
        newest, index = self._newest(before, counts)
        for held, new in ((self.keys, key), (self.values, value)):
            taken = new.gather(2, index.clamp(0, new.shape[2] - 1).expand(-1, new.shape[1], -1, new.shape[3]))
            held[:, :, self.meta :] = torch.where(newest, taken.to(held.dtype), held[:, :, self.meta :])

    def start_from(self, other: KeyValueState) -> None:
        """Take the meta tokens of a state of one row for all rows."""
        self.keys[:, :, : self.meta] = other.keys[:, :, : self.meta]
        self.values[:, :, : self.meta] = other.values[:, :, : self.meta]

    def _slots(self, positions: Tensor) -> Tensor:
        assert self.window is not None
        return self.meta + (positions - self.meta) % (self.window + 1)

    def _newest(self, before: Tensor, counts: Tensor | int) -> tuple[Tensor, Tensor]:
        """For each slot behind the meta tokens, (B, 1, slots, 1): is it a new token's, and which one's."""
        assert self.window is not None
        slots = torch.arange(self.keys.shape[2] - self.meta, device=before.device)
        last = (before + counts - 1)[:, None]
        position = last - (last - self.meta - slots) % (self.window + 1)  # the newest that belongs there
        index = (position - before[:, None])[:, None, :, None]
        return index >= 0, index

    def reserve(self, slots: int) -> None:
        """Have at least so many slots, at most doubling them; a window never needs more than its own."""
        have = self.keys.shape[2]
        if slots <= have:
            return
        capacity = max(slots, 2 * have)
        if self.window is not None:
            capacity = min(capacity, self.meta + self.window + 1)
        for name in ("keys", "values"):
            old = getattr(self, name)
            new = old.new_zeros(*old.shape[:2], capacity, old.shape[3])
            new[:, :, :have] = old
            setattr(self, name, new)


@dataclass
class ConvSSMState:
    """conv (B, W-1, conv_size), the last inputs of the convolution; ssm, (B, H, P, N), of Mamba-1 (B, I, N)."""

    conv: Tensor
    ssm: Tensor

    def wide(self) -> Tensor:
        """The SSM state in float32 or wider, as passes over several tokens compute with it."""
        return self.ssm.to(torch.promote_types(self.ssm.dtype, torch.float32))

    def start_from(self, other: ConvSSMState) -> None:
        self.conv.copy_(other.conv)  # copied even for one row: steps advance states in place, and `other` is for all
        self.ssm.copy_(other.ssm)


@dataclass
class HybridState:
    """Of a hybrid block; `attention` is None where the keys and values are another block's."""

    attention: KeyValueState | None
    ssm: ConvSSMState

    def start_from(self, other: HybridState) -> None:
        self.ssm.start_from(other.ssm)
        if self.attention is not None and other.attention is not None:
            self.attention.start_from(other.attention)


State = KeyValueState | ConvSSMState
BlockState = State | HybridState
Held = list[Callable[[Tensor], None]]  # what each block does once it is known how many tokens of each row count


@dataclass
class Cache:
    """States of all blocks (None for blocks that keep nothing) and the tokens seen by each row, meta tokens apart."""

    blocks: list[BlockState | None]
    lengths: Tensor  # (B,) int64
    used: int = 0  # the longest row
    uniform: bool = True  # all rows equally long
    meta: int = 0  # meta tokens before every row
    started: bool = False  # the meta tokens' state is in
    decode_window_compat: bool = False
    held: Held | None = None

    @staticmethod
    def create(
        config: ModelConfig,
        batch: int,
        capacity: int = 256,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        *,
        decode_window_compat: bool = False,
        ssm_dtype: torch.dtype | None = None,
    ) -> Cache:
        """An empty cache; key/value memory is taken for `capacity` tokens and doubles when they do not suffice.

        ssm_dtype: of SSM states, float32 or wider where it is None.
        decode_window_compat: one-token steps see window - 1 earlier tokens, as Hymba's released decoder does, and not
        window as in training.
        """
        meta = config.num_meta_tokens
        wide = ssm_dtype or torch.promote_types(dtype, torch.float32)
        blocks = [_state(block, batch, capacity, meta, dtype, device, wide) for block in config.blocks]
        lengths = torch.zeros(batch, dtype=torch.int64, device=device)
        return Cache(blocks, lengths, meta=meta, decode_window_compat=decode_window_compat)

    @staticmethod
    def for_meta_tokens(config: ModelConfig, dtype: torch.dtype, device: torch.device | str) -> Cache:
        """One row in which the meta tokens are ordinary tokens; all of them see all before, so windows do not count."""
        count = config.num_meta_tokens
        wide = torch.promote_types(dtype, torch.float32)
        blocks = [_state(block, 1, count, 0, dtype, device, wide, windows=False) for block in config.blocks]
        return Cache(blocks, torch.zeros(1, dtype=torch.int64, device=device))

    def start_from(self, meta_state: Cache) -> None:
        """Put the meta tokens (`for_meta_tokens`, after a pass over them) before every row."""
        for state, other in zip(self.blocks, meta_state.blocks, strict=True):
            if state is not None:
                state.start_from(other)  # type: ignore[arg-type]
        self.started = True

    def hold(self) -> None:
        """Let the next pass over several tokens leave every state as it is; `commit` then says how many count."""
        self.held = []

    def commit(self, counts: Tensor) -> None:
        """Advance by the first counts[b] tokens of row b in the pass that was held: no projection is computed again."""
        for advance in self.held or ():
            advance(counts)
        self.held = None
        self.advance(counts)

    def advance(self, counts: Tensor) -> None:
        """Count the tokens (B,) just read."""
        self.lengths = self.lengths + counts
        self.used = int(self.lengths.max())
        self.uniform = bool((self.lengths == self.lengths[0]).all())

    @property
    def dtype(self) -> torch.dtype:
        """Of keys, values and convolution tails."""
        return next((t.dtype for state in parts(self) for t in fields(state).values()), torch.float32)

    @property
    def ssm_dtypes(self) -> set[torch.dtype]:
        """Of SSM states; empty where no block has one."""
        return {state.ssm.dtype for state in parts(self) if isinstance(state, ConvSSMState)}

    def select(self, rows: Tensor | list[int]) -> Cache:
        """A new cache of the given rows, repeats allowed (beam reorder, one prompt to many samples)."""
        index = torch.as_tensor(rows, device=self.lengths.device)
        blocks = [mapped(state, lambda _, tensor: tensor.index_select(0, index)) for state in self.blocks]
        return self.of_rows(blocks, self.lengths[index])

    def of_rows(self, blocks: list[BlockState | None], lengths: Tensor) -> Cache:
        """The same kind of cache with rows of these states and lengths (B,)."""
        used, uniform = int(lengths.max()), bool((lengths == lengths[0]).all())
        return dataclasses.replace(self, blocks=blocks, lengths=lengths, used=used, uniform=uniform, held=None)

    def row(self, index: int) -> Cache:
        return self.select([index])

    def clone(self) -> Cache:
        """An independent copy: the snapshot to return to."""
        return self.select(list(range(len(self.lengths))))

    def nbytes(self, *, tokens_only: bool = False) -> int:
        """Bytes held now; with `tokens_only` the key/value bytes count written tokens, not capacity."""
        total = 0
        for state in parts(self):
            for tensor in fields(state).values():
                share = 1.0
                if tokens_only and isinstance(state, KeyValueState) and tensor.shape[2]:
                    share = min(self.meta + self.used, tensor.shape[2]) / tensor.shape[2]
                total += round(tensor.nbytes * share)
        return total


def _state(
    block: BlockConfig,
    batch: int,
    capacity: int,
    meta: int,
    dtype: torch.dtype,
    device: torch.device | str,
    ssm_dtype: torch.dtype,
    windows: bool = True,
) -> BlockState | None:
    attention = keys = None
    if block.attention is not None and block.attention.key_value_source is None:
        attention, window = block.attention, block.attention.window if windows else None
        slots = meta + (capacity if window is None else min(capacity, window + 1))
        keys = _key_values(attention, (batch, slots), window, meta, dtype, device)
    if block.ssm is None:
        return keys
    ssm = _conv_ssm(block.ssm, batch, dtype, device, ssm_dtype)
    return ssm if block.attention is None else HybridState(keys, ssm)


def _key_values(
    block: AttentionConfig,
    size: tuple[int, int],
    window: int | None,
    meta: int,
    dtype: torch.dtype,
    device: torch.device | str,
) -> KeyValueState:
    batch, slots = size
    keys, values = (
        torch.zeros(batch, block.num_key_value_heads, slots, width, dtype=dtype, device=device)
        for width in (block.head_dim, block.value_dim)
    )
    return KeyValueState(keys, values, window, meta)


def _conv_ssm(
    block: Mamba1Config | Mamba2Config,
    batch: int,
    dtype: torch.dtype,
    device: torch.device | str,
    ssm_dtype: torch.dtype,
) -> ConvSSMState:
    if isinstance(block, Mamba2Config):
        channels, inner = block.conv_size, (block.num_heads, block.head_dim)
    else:
        channels, inner = block.inner_size, (block.inner_size,)
    conv = torch.zeros(batch, block.conv_kernel - 1, channels, dtype=dtype, device=device)
    return ConvSSMState(conv, torch.zeros(batch, *inner, block.state_size, dtype=ssm_dtype, device=device))


def parts(cache: Cache) -> Iterator[State]:
    """Every key/value and every convolution and SSM state, in the order of the blocks."""
    for state in cache.blocks:
        if isinstance(state, HybridState):
            yield from (state.ssm,) if state.attention is None else (state.attention, state.ssm)
        elif state is not None:
            yield state


def fields(state: State) -> dict[str, Tensor]:
    """Its tensors by name."""
    return {name: value for name, value in vars(state).items() if isinstance(value, Tensor)}


def mapped(state: BlockState | None, function: Callable[[State, Tensor], Tensor]) -> Any:
    """The state of a block with a function applied to its tensors."""
    if isinstance(state, HybridState):
        return HybridState(mapped(state.attention, function), mapped(state.ssm, function))
    if state is None:
        return None
    return dataclasses.replace(state, **{name: function(state, tensor) for name, tensor in fields(state).items()})
