"""The recipe section `data`: which text, in which shares, in rows of which length. Pure data: no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from halflap.errors import HalflapError


@dataclass(frozen=True)
class Data:
    """Text to train on or to read."""

    paths: tuple[str, ...] = ()
    """Text files (.txt .jsonl .json .parquet, plain or .gz .xz .zst), folders of them, or folders of token shards."""

    field: str = "text"
    """Column with the text."""

    weights: tuple[float, ...] | None = None
    """Share of each path in the blend; by default in proportion to its size."""

    sequence_length: int = 1024
    """Tokens of a row."""

    packing: Literal["segments", "stream"] = "segments"
    """Keep the documents packed into a row apart (segments), or let the model read across their borders (stream)."""

    held_out: float = 0.05
    """Share of the documents, chosen by a hash of their text, kept back to judge on when no text is given for it."""

    def __post_init__(self) -> None:
        if self.sequence_length < 1:
            raise HalflapError(
                f"data.sequence_length is {self.sequence_length}; it must be at least 1: choose e.g. 1024"
            )
        if not 0 <= self.held_out < 1:
            raise HalflapError(f"data.held_out is {self.held_out}; it must be at least 0 and below 1: choose e.g. 0.05")
        if self.weights is not None and len(self.weights) != len(self.paths):
            raise HalflapError(
                f"data.weights has {len(self.weights)} shares for {len(self.paths)} paths; give one for each, or none"
            )
