"""Batches as a pure function of (seed, index): a resumed run needs the index and nothing else.

The rows of every corpus are shuffled anew each epoch, corpora are blended by exact shares, and slot p of the one
global order is row p % (rows of a step) of micro-batch p // (rows of a step). Rank r of w takes its own slots of
each micro-batch, so w ranks together see what one rank with w times the micro-batch sees.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch

from halflap.data.batch import Batch
from halflap.data.corpus import Corpus
from halflap.data.order import Blend, key_of, shuffled
from halflap.data.packing import Row, count_rows, cut_row
from halflap.errors import HalflapError

Packing = Literal["segments", "stream"]
PACKINGS: tuple[str, ...] = ("segments", "stream")
Phases = Sequence[tuple[float, Sequence[float]]]


class Loader:
    """Rows of `sequence_length` tokens, `micro_batch_size` of them a batch, from one corpus or a blend.

    corpora         opened corpora of one tokenizer
    weights         share of rows (so of tokens) of each corpus; by default in proportion to their sizes
    packing         "segments" numbers the documents of a row so that models keep them apart; "stream" does not
    rank, world     this process among those that share every micro-batch
    phases          (fraction of `total_tokens`, weights) one after the other, in place of `weights`; after the last
                    the blend stays
    """

    def __init__(
        self,
        corpora: Sequence[Corpus],
        *,
        sequence_length: int,
        micro_batch_size: int,
        seed: int = 0,
        weights: Sequence[float] | None = None,
        packing: Packing = "segments",
        rank: int = 0,
        world: int = 1,
        phases: Phases = (),
        total_tokens: int | None = None,
    ) -> None:
        _check(corpora, sequence_length, micro_batch_size, packing, rank, world)
        self.corpora = tuple(corpora)
        self.sequence_length, self.micro_batch_size, self.seed = sequence_length, micro_batch_size, seed
        self.packing: Packing = packing
        self.rank, self.world = rank, world
        self.rows = tuple(count_rows(corpus, sequence_length) for corpus in corpora)
        self.blend = _blend(self.corpora, self.rows, weights, phases, total_tokens, sequence_length)

    @property
    def tokens_per_batch(self) -> int:
        """Tokens of one micro-batch of all ranks together."""
        return self.micro_batch_size * self.world * self.sequence_length

    def batch(self, index: int) -> Batch:
        """This rank's part of micro-batch `index`, on the CPU."""
        return self.rows_from(index * self.world * self.micro_batch_size, self.micro_batch_size)

    def rows_from(self, slot: int, count: int) -> Batch:
        """This rank's `count` of the rows that all ranks take from a slot of the global order on, on the CPU."""
        first = slot + self.rank * count
        rows = [self.row(slot) for slot in range(first, first + count)]
        return collate(rows, with_segments=self.packing == "segments")

    def row(self, slot: int) -> Row:
        """The row at a slot of the global order."""
        source, number = self.blend.locate(slot)
        epoch, position = divmod(number, self.rows[source])
        key = key_of(self.seed, source, epoch)
        corpus = self.corpora[source]
        index = shuffled(position, self.rows[source], key)
        return cut_row(corpus, index, self.sequence_length, padding=corpus.manifest.settings.eos_id)

    def epochs(self, batches: int) -> tuple[float, ...]:
        """How often each corpus has been read after `batches` micro-batches."""
        counts = self.blend.counts(batches * self.world * self.micro_batch_size)
        return tuple(count / rows for count, rows in zip(counts, self.rows, strict=True))


def collate(rows: Sequence[Row], *, with_segments: bool = True) -> Batch:
    """Stack rows of equal length into a batch."""

    def stack(name: str) -> torch.Tensor:
        return torch.from_numpy(np.stack([getattr(row, name) for row in rows]))

    segments = stack("segments") if with_segments else None
    return Batch(stack("tokens"), stack("targets"), stack("weights"), segments)


def _blend(
    corpora: Sequence[Corpus],
    rows: Sequence[int],
    weights: Sequence[float] | None,
    phases: Phases,
    total_tokens: int | None,
    length: int,
) -> Blend:
    if not phases:
        return Blend.of([(0, _matching(rows if weights is None else weights, corpora))])
    fractions = [fraction for fraction, _ in phases]
    if weights is not None or total_tokens is None:
        raise HalflapError("phases of a blend need total_tokens and replace weights; give total_tokens and no weights")
    if min(fractions) <= 0 or not math.isclose(sum(fractions), 1, abs_tol=1e-6):
        raise HalflapError(
            f"the phases of a blend last {fractions} of the run; these must be above 0 and sum to 1: correct them"
        )
    slots = total_tokens / length
    starts = [round(slots * sum(fractions[:number])) for number in range(len(phases))]
    return Blend.of([(start, _matching(w, corpora)) for start, (_, w) in zip(starts, phases, strict=True)])


def _matching(weights: Sequence[float], corpora: Sequence[Corpus]) -> Sequence[float]:
    if len(weights) != len(corpora):
        raise HalflapError(
            f"{len(weights)} blend weights were given for {len(corpora)} corpora; give one for each (--data.weights)"
        )
    return weights


def _check(
    corpora: Sequence[Corpus], sequence_length: int, micro_batch_size: int, packing: str, rank: int, world: int
) -> None:
    if not corpora:
        raise HalflapError("no corpus was given to load batches from; give at least one")
    for name, value in (("sequence_length", sequence_length), ("micro_batch_size", micro_batch_size), ("world", world)):
        if value < 1:
            raise HalflapError(f"{name} is {value}; it must be at least 1: choose a larger one")
    if not 0 <= rank < world:
        raise HalflapError(f"rank is {rank}; it must be from 0 to {world - 1}, as there are {world}: correct it")
    if packing not in PACKINGS:
        raise HalflapError(f"packing is {packing!r}; allowed are {', '.join(PACKINGS)}: choose one (--data.packing)")
    if len({corpus.manifest.settings.tokenizer_digest for corpus in corpora}) > 1:
        paths = ", ".join(str(corpus.path) for corpus in corpora)
        raise HalflapError(f"the corpora {paths} were made by different tokenizers; make them again with one")
