"""Passes of one model, or of several that are made of the same checkpoint, a part of the weights at a time.

All are carried through a block before the next one is read, so that one reading of the weights serves them. Between two
blocks their streams are on a shelf: in memory, or on the disk, where a killed process goes on after the last block that
was done, to the same numbers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor

from halflap.checkpoints.shelf import Held, Shelf, shelf_in
from halflap.checkpoints.streamed import ENTRY, EXIT, Part, StreamedModel
from halflap.models.config import ModelConfig
from halflap.models.model import HybridModel
from halflap.models.streams import Stream
from halflap.progress import Progress

STREAMS_AT_ONCE = 2 << 30
"""Bytes of residual streams that one reading of the weights serves."""

Input = tuple[Tensor, Tensor | None]
"""Tokens (B, T) int64 and, of packed rows, segments (B, T)."""


@dataclass(frozen=True)
class Passes:
    """What a model is to read, under a name that no other model on the shelf has.

    at: the model's own part when all have come to a part of the common order, None where it has nothing there. alter:
    changes the weights of a part, named by the common order, once they are in memory.
    """

    name: str
    model: StreamedModel
    inputs: Sequence[Input]
    at: Callable[[Part], Part | None] = lambda part: part
    alter: Callable[[HybridModel, Part], None] = lambda model, part: None

    def step(self, part: Part, shelf: Shelf | Held) -> None:
        """Through the embedding or a block."""
        own = self.at(part)
        if own is None:
            for number in range(len(self.inputs)):
                shelf.keep(self._key(number))
            return
        with self.model.resident(own) as whole:
            self.alter(whole, part)
            for number, (tokens, segments) in enumerate(self.inputs):
                if isinstance(own, int):
                    stream = self._read(shelf, number).through(own, whole.blocks[own])  # type: ignore[arg-type]
                else:
                    stream = Stream(*whole.enter(tokens, segments))
                shelf.write(self._key(number), stream)

    def hidden_states(self, shelf: Shelf | Held) -> Iterator[Tensor]:
        """The normalised final hidden states (B, T, D) of each input; the head is in memory while they are taken."""
        with self.model.resident(EXIT) as whole:
            self.alter(whole, EXIT)
            for number in range(len(self.inputs)):
                last = self._read(shelf, number)
                yield whole.leave(last.hidden, last.context)

    def _read(self, shelf: Shelf | Held, number: int) -> Stream:
        return shelf.read(self._key(number), self.model.context_of(*self.inputs[number]))

    def _key(self, number: int) -> str:
        return f"{self.name}-{number}"


def carry(together: Sequence[Passes], config: ModelConfig, shelf: Shelf | Held) -> None:
    """Bring all passes behind the last block; config: of the model whose parts are the common order."""
    parts: list[Part] = [ENTRY, *range(len(config.blocks)), EXIT]
    start = 0 if shelf.done is None else shelf.done + 1
    with Progress("read block by block", len(parts) - 1, unit="parts") as progress:
        progress.start_at(start)
        for part, following in zip(parts[start:-1], parts[start + 1 :], strict=True):
            with ExitStack() as readers:
                for passes in together:
                    if (ahead := passes.at(following)) is not None:
                        readers.enter_context(passes.model.reading_ahead(ahead))
                for passes in together:
                    passes.step(part, shelf)
            shelf.commit()
            progress.advance()


def hidden_states_of(model: StreamedModel, inputs: Sequence[Input]) -> Iterator[Tensor]:
    """The normalised final hidden states (B, T, D) of each input, in order.

    The weights are read once for each part of `served_together`. While a result is taken, the model's head is there.
    """
    for part in served_together(model, inputs):
        passes = Passes("", model, inputs[part])
        shelf = shelf_in(model.scratch, f"{model.dtype} {digest_of(passes.inputs)}")
        carry([passes], model.config, shelf)
        yield from passes.hidden_states(shelf)
        shelf.remove()


def served_together(model: StreamedModel, inputs: Sequence[Input]) -> list[slice]:
    """Runs of inputs whose streams are of STREAMS_AT_ONCE bytes together, or of one input."""
    found: list[slice] = []
    start, held = 0, 0
    for number, given in enumerate(inputs):
        size = _bytes_of(model, given)
        if number > start and held + size > STREAMS_AT_ONCE:
            found.append(slice(start, number))
            start, held = number, 0
        held += size
    return [*found, slice(start, len(inputs))] if inputs else []


def copies_at_once(model: StreamedModel, inputs: Sequence[Input]) -> int:
    """How often STREAMS_AT_ONCE bytes hold the streams of all inputs."""
    return STREAMS_AT_ONCE // sum(_bytes_of(model, given) for given in inputs)


def _bytes_of(model: StreamedModel, given: Input) -> int:
    return stream_bytes(model.config, model.context_of(*given).positions.numel(), model.dtype)


def digest_of(inputs: Sequence[Input]) -> str:
    """Names the tokens and how they are packed, as 64 hexadecimal digits."""
    total = hashlib.sha256()
    for tokens, segments in inputs:
        for part in (tokens,) if segments is None else (tokens, segments):
            total.update(str(tuple(part.shape)).encode() + part.cpu().numpy().tobytes())
    return total.hexdigest()


def stream_bytes(config: ModelConfig, positions: int, dtype: torch.dtype) -> int:
    """What streams over so many positions take between two blocks: the residual stream, and shared keys and values."""
    wide = torch.promote_types(dtype, torch.float32) if config.residual_in_fp32 else dtype
    shared = 0
    for block in config.blocks:
        if block.attention is not None and block.attention.key_value_source is not None:
            a = block.attention
            shared = max(shared, a.num_key_value_heads * (a.head_dim + a.value_dim))
    return positions * (config.hidden_size * wide.itemsize + shared * dtype.itemsize)
