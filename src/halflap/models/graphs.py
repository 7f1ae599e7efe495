"""A decoded token as one CUDA graph: the launches of all blocks, recorded once and replayed by one call.

HALFLAP_CUDA_GRAPHS=1 switches it on for `Decoder`. A graph has fixed shapes and addresses, so a pass is recorded for
the memory of one cache and a number of key/value slots, which doubles as its rows grow: each row attends to all of them
under a mask. Tokens and lengths are read from tensors that are filled before a replay. A state that a block replaces,
instead of advancing it in place, is copied back to where it was.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from halflap.models.cache import BlockState, Cache, KeyValueState, fields, mapped, parts
from halflap.models.model import HybridModel, advance

LEAST_SLOTS = 256
MOST_GRAPHS = 16  # the oldest goes first

Step = Callable[[], Tensor]
Record = Callable[[Step, Step], tuple[Callable[[], None], Tensor]]  # (step, warm up) to (replay, where its logits are)


def chosen(model: HybridModel) -> bool:
    """Whether the setting asks for graphs and the model is where they are."""
    return os.environ.get("HALFLAP_CUDA_GRAPHS", "0") not in ("", "0") and model.device.type == "cuda"


@dataclass
class Recorded:
    """A pass over (B, 1) tokens of rows of (B,) lengths, to be filled in before `replay`; logits (B, 1, V) after it."""

    tokens: Tensor
    lengths: Tensor
    replay: Callable[[], None]
    logits: Tensor


def on_cuda(step: Step, warm_up: Step) -> tuple[Callable[[], None], Tensor]:
    """Record `step` in a CUDA graph after `warm_up`, which must launch the same kernels and may move other states."""
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        warm_up()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = step()
    return graph.replay, logits


class Graphs:
    """`model(tokens, cache=cache)` for one token a row, by replaying what `record` made of it."""

    def __init__(self, model: HybridModel, record: Record = on_cuda) -> None:
        self.model = model
        self._record = record
        self._recorded: dict[object, Recorded] = {}

    def takes(self, tokens: Tensor, cache: Cache) -> bool:
        """Whether this pass has the fixed form; the model itself runs any other."""
        if tokens.shape[1] != 1 or torch.is_grad_enabled() or torch.is_autocast_enabled(tokens.device.type):
            return False
        return cache.held is None and cache.used > 0 and (cache.started or not cache.meta)

    def __call__(self, tokens: Tensor, cache: Cache) -> Tensor:
        """Logits (B, 1, V) of tokens (B, 1); the cache is advanced."""
        slots = _slots(cache)
        key = (slots, cache.decode_window_compat, *((t.data_ptr(), t.shape, t.dtype) for t in _tensors(cache)))
        with torch.inference_mode():
            found = self._recorded.get(key)
            if found is None:
                while len(self._recorded) >= MOST_GRAPHS:
                    del self._recorded[next(iter(self._recorded))]
                found = self._recorded[key] = self._made(tokens, cache, slots)
            found.tokens.copy_(tokens)
            found.lengths.copy_(cache.lengths)
            found.replay()
        advance(cache, 1)
        return found.logits.clone()

    def _made(self, tokens: Tensor, cache: Cache, slots: int) -> Recorded:
        tokens, lengths = tokens.clone(), cache.lengths.clone()
        held, other = _as_it_lies(cache), _as_it_lies(cache.clone())
        replay, logits = self._record(
            lambda: fixed_pass(self.model, tokens, held, lengths, slots),
            lambda: fixed_pass(self.model, tokens, other, lengths, slots),
        )
        return Recorded(tokens, lengths, replay, logits)


def fixed_pass(model: HybridModel, tokens: Tensor, cache: Cache, lengths: Tensor, slots: int) -> Tensor:
    """Logits of one token of each row, at places `lengths` (B,), whose shapes and addresses depend on `slots` alone."""
    view = dataclasses.replace(
        cache, blocks=_copies(cache), lengths=lengths, used=slots - 1 - cache.meta, uniform=False
    )
    logits = model(tokens, cache=view)
    for state, moved in zip(parts(cache), parts(view), strict=True):
        for name, tensor in fields(state).items():
            if (new := getattr(moved, name)) is not tensor:
                tensor.copy_(new)
    return logits


def _slots(cache: Cache) -> int:
    """Key/value slots of a pass: a power of two, or all there are. Makes room for one more token first."""
    needed = cache.meta + cache.used + 1
    wanted = max(LEAST_SLOTS, 1 << (needed - 1).bit_length())
    for state in parts(cache):
        if isinstance(state, KeyValueState):
            if state.window is None:
                state.reserve(needed)
                wanted = min(wanted, state.keys.shape[2])
            else:
                state.reserve(state.meta + state.window + 1)
    return wanted


def _tensors(cache: Cache) -> Iterator[Tensor]:
    return (tensor for state in parts(cache) for tensor in fields(state).values())


def _as_it_lies(cache: Cache) -> Cache:
    """The same tensors, whatever becomes of the cache."""
    return dataclasses.replace(cache, blocks=_copies(cache))


def _copies(cache: Cache) -> list[BlockState | None]:
    """State objects of their own with the same tensors."""
    return [mapped(state, lambda _, tensor: tensor) for state in cache.blocks]
