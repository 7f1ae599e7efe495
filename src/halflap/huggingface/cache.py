"""HalflapCache: keys, values, convolution tails and SSM states behind the cache protocol of transformers' generate().

The tensors are those of `models.cache.Cache`, which knows how long each row is; here is counted what transformers
counts, the columns of its padded batch. Recurrent states cannot be cropped, so assisted decoding is not offered.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import Cache as TransformersCache

from halflap.errors import HalflapError
from halflap.models.cache import Cache


class HalflapCache(TransformersCache):
    """Empty until its first pass, which knows the batch; `capacity` tokens are then reserved, and more as needed."""

    is_compileable = False  # pyright: ignore[reportAssignmentType]
    is_croppable = False  # pyright: ignore[reportAssignmentType]

    def __init__(self, capacity: int = 256) -> None:
        super().__init__(layers=[])
        self.capacity = capacity
        self.columns = 0
        self.state: Cache | None = None

    def begin(self, batch: int, columns: int, create: Callable[[int, int], Cache]) -> Cache:
        """The state for a pass over tokens (batch, columns), made by the first pass: `create(batch, capacity)`."""
        if self.state is None:
            self.state = create(batch, max(self.capacity, columns))
        elif len(self.state.lengths) != batch:
            raise HalflapError(
                f"past_key_values holds {len(self.state.lengths)} rows and the tokens have {batch}: pass as many rows, "
                "or repeat the cache with batch_repeat_interleave"
            )
        return self.state

    def advance(self, columns: int) -> None:
        """Count the columns of a pass that has been made."""
        self.columns += columns

    def __len__(self) -> int:
        return 0 if self.state is None else len(self.state.blocks)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.columns

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        return -1

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return self.columns + query_length, 0

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        return self.columns > 0

    @property
    def batch_size(self) -> int:
        return -1 if self.state is None else len(self.state.lengths)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes what row beam_idx[i] was."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.state is not None:
            self.state = self.state.select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.state is not None:
            self.batch_select_indices(torch.arange(self.batch_size).repeat_interleave(repeats))

    def reset(self) -> None:
        self.state, self.columns = None, 0

    def crop(self, *_: Any, **__: Any) -> None:
        raise HalflapError(
            "this cache holds recurrent states, which cannot go back to fewer tokens: keep a copy.deepcopy of it from "
            "then"
        )

    def update(self, *_: Any, **__: Any) -> Any:
        raise HalflapError("this cache is filled by halflap's own blocks: pass it to a HalflapForCausalLM")
