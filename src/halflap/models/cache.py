"""What a decoded sequence keeps: keys and values, convolution tails, SSM states.

Rows of a batch may have unequal lengths: row b's next token goes to position `lengths[b]`. SSM states are float32
whatever the model's dtype (section 4.7 of the Nemotron-H notes). Recurrent state cannot be cropped: to go back, clone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from halflap.models.config import AttentionConfig, Mamba2Config, ModelConfig


@dataclass
class KeyValueState:
    """keys and values (B, K, capacity, head_dim)."""

    keys: Tensor
    values: Tensor

    def append(
        self, key: Tensor, value: Tensor, context_positions: Tensor, uniform: bool, used: int
    ) -> tuple[Tensor, Tensor]:
        """Write (B, K, T, h) at `context_positions` (B, T) and return all keys and values up to `used` tokens."""
        if used > self.keys.shape[2]:
            self._grow(max(used, 2 * self.keys.shape[2]))
        if uniform:
            start = used - key.shape[2]
            self.keys[:, :, start:used] = key
            self.values[:, :, start:used] = value
        else:
            index = context_positions[:, None, :, None].expand_as(key)
            self.keys.scatter_(2, index, key.to(self.keys.dtype))
            self.values.scatter_(2, index, value.to(self.values.dtype))
        return self.keys[:, :, :used], self.values[:, :, :used]

    def _grow(self, capacity: int) -> None:
        for name in ("keys", "values"):
            old = getattr(self, name)
            new = old.new_zeros(*old.shape[:2], capacity, old.shape[3])
            new[:, :, : old.shape[2]] = old
            setattr(self, name, new)


@dataclass
class ConvSSMState:
    """conv (B, W-1, conv_size), the last inputs of the convolution; ssm (B, H, P, N) float32."""

    conv: Tensor
    ssm: Tensor


BlockState = KeyValueState | ConvSSMState


@dataclass
class Cache:
    """States of all blocks (None for blocks that keep nothing) and the tokens seen by each row."""

    blocks: list[BlockState | None]
    lengths: Tensor  # (B,) int64
    used: int = 0  # the longest row
    uniform: bool = True  # all rows equally long

    @staticmethod
    def create(
        config: ModelConfig,
        batch: int,
        capacity: int = 256,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Cache:
        """An empty cache; key/value memory is taken for `capacity` tokens and doubles when they do not suffice."""
        blocks: list[BlockState | None] = []
        for block in config.blocks:
            if isinstance(block, AttentionConfig):
                shape = (batch, block.num_key_value_heads, capacity, block.head_dim)
                blocks.append(KeyValueState(*(torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))))
            elif isinstance(block, Mamba2Config):
                wide = torch.promote_types(dtype, torch.float32)
                conv = torch.zeros(batch, block.conv_kernel - 1, block.conv_size, dtype=dtype, device=device)
                ssm = torch.zeros(batch, block.num_heads, block.head_dim, block.state_size, dtype=wide, device=device)
                blocks.append(ConvSSMState(conv, ssm))
            else:
                blocks.append(None)
        return Cache(blocks, torch.zeros(batch, dtype=torch.int64, device=device))

    def select(self, rows: Tensor | list[int]) -> Cache:
        """A new cache of the given rows, repeats allowed (beam reorder, one prompt to many samples)."""
        index = torch.as_tensor(rows, device=self.lengths.device)
        blocks = [
            None if state is None else type(state)(*(t.index_select(0, index) for t in vars(state).values()))
            for state in self.blocks
        ]
        lengths = self.lengths[index]
        return Cache(blocks, lengths, int(lengths.max()), bool((lengths == lengths[0]).all()))

    def row(self, index: int) -> Cache:
        return self.select([index])

    def clone(self) -> Cache:
        """An independent copy: the snapshot to return to."""
        return self.select(list(range(len(self.lengths))))

    def nbytes(self, *, tokens_only: bool = False) -> int:
        """Bytes held now; with `tokens_only` the key/value bytes count written tokens, not capacity."""
        total = 0
        for state in self.blocks:
            for tensor in () if state is None else vars(state).values():
                share = self.used / tensor.shape[2] if tokens_only and isinstance(state, KeyValueState) else 1
                total += round(tensor.nbytes * share)
        return total
