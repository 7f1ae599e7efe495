"""Rows of fixed length cut from a stream of documents.

Row r holds stream positions [rT, rT + T); a document longer than the rest of its row goes on in the next one, where
it starts anew as segment 1. The last row is padded. No target crosses a document's border: the last token of a
document (its end token) predicts nothing, whatever follows it in the row. Legend: T tokens of a row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


class Stream(Protocol):
    """Documents one after the other; `starts` (documents + 1,) ends with the stream's length."""

    @property
    def tokens(self) -> int: ...
    @property
    def starts(self) -> Ints: ...
    def read(self, start: int, stop: int) -> Ints: ...


@dataclass(frozen=True, eq=False)
class Row:
    """tokens, targets, segments (T,) int64 and weights (T,) float32, as in `Batch`."""

    tokens: Ints
    targets: Ints
    weights: NDArray[np.float32]
    segments: Ints


def count_rows(stream: Stream, length: int) -> int:
    """How many rows of `length` tokens hold the stream, a padded last one included."""
    return -(-stream.tokens // length)


def cut_row(stream: Stream, index: int, length: int, padding: int = 0) -> Row:
    """Row `index` of the stream; `padding` is the token id after the stream's end (segment 0, weight 0)."""
    start = index * length
    stop = min(start + length, stream.tokens)
    tokens, targets = np.full(length, padding, np.int64), np.full(length, padding, np.int64)
    weights, segments = np.zeros(length, np.float32), np.zeros(length, np.int64)
    text = stream.read(start, min(stop + 1, stream.tokens))
    filled, following = stop - start, len(text) - 1
    tokens[:filled] = text[:filled]
    targets[:following] = text[1:]
    # number of documents begun up to and including each position
    first, last = np.searchsorted(stream.starts, (start, stop), side="right")
    begins = stream.starts[first : last + 1]  # those after the row's first token, one past the row included
    number = np.searchsorted(begins, np.arange(start, start + len(text)), side="right") + 1
    segments[:filled] = number[:filled]
    weights[:following] = number[1:] == number[:-1]
    return Row(tokens, targets, weights, segments)
