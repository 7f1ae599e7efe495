"""How well a model predicts text: loss, perplexity and bits a byte, with bootstrap intervals.

Each document is scored on its own, in windows of `context` tokens that start every `stride`: a window reads tokens
[s, s + context) and predicts the token after each; what an earlier window predicted is not scored again. So every
token but a document's first is scored once (the first too, when the tokenizer puts a beginning token before a text).
Bits a byte divide by the UTF-8 bytes of the scored tokens, which makes models of different tokenizers comparable.
The end tokens between documents are not text and not scored. Legend: U units resampled, R resamples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from halflap.checkpoints.streamed import AnyModel
from halflap.errors import HalflapError
from halflap.evaluate.documents import Document, Floats
from halflap.inference.generate import require_positions
from halflap.inference.log_probs import length_batches, padded_batch, score_batches
from halflap.models.config import ModelConfig
from halflap.progress import Progress

MOST_CONTEXT = 2048  # window when none is asked for and the model reads as much
DOCUMENT_UNITS = 20  # with fewer documents their windows are resampled instead
RESAMPLES = 1000
BUFFERED_BATCHES = 32  # windows sorted by length together, so that a batch pads little


@dataclass(frozen=True)
class Window:
    """Tokens [start, end) of a document are read; the last `scored` of tokens [start + 1, end + 1) are scored."""

    document: int
    start: int
    end: int
    scored: int


@dataclass(frozen=True)
class HeldOut:
    """Loss in nats a token. Intervals hold the middle 95 % of bootstrap resamples of documents or windows."""

    loss: float
    perplexity: float
    bits_per_byte: float
    tokens: int
    bytes: int
    documents: int
    context: int
    stride: int
    intervals: dict[str, tuple[float, float]]
    resampled: str

    def to_json(self) -> dict[str, Any]:
        """`loss`, `perplexity`, `bits_per_byte`, each with its `_interval`, and what they were measured on."""
        numbers: dict[str, Any] = {}
        for name in ("loss", "perplexity", "bits_per_byte"):
            numbers[name] = getattr(self, name)
            numbers[f"{name}_interval"] = list(self.intervals[name]) if name in self.intervals else None
        rest = ("tokens", "bytes", "documents", "context", "stride", "resampled")
        return numbers | {name: getattr(self, name) for name in rest}


# ---- windows


def default_context(config: ModelConfig) -> int:
    return min(config.max_position_embeddings, MOST_CONTEXT)


def windows(documents: Sequence[Document], context: int, stride: int, limit: int | None = None) -> list[Window]:
    """All windows in order; every scored token falls into exactly one, and `limit` cuts the last one short."""
    found: list[Window] = []
    left = math.inf if limit is None else limit
    for number, document in enumerate(documents):
        last, scored_to = len(document.tokens) - 1, document.first - 1  # indices of tokens
        start = 0
        while scored_to < last and left > 0:
            end = min(start + context, last)
            scored = int(min(end - scored_to, left))
            end = scored_to + scored
            if scored > 0:
                found.append(Window(number, start, end, scored))
            scored_to, left, start = max(scored_to, end), left - max(scored, 0), start + stride
    return found


# ---- scoring


def evaluate_text(
    model: AnyModel,
    documents: Sequence[Document],
    *,
    context: int | None = None,
    stride: int | None = None,
    tokens: int | None = None,
    batch_size: int = 4,
    seed: int = 0,
) -> HeldOut:
    """Score documents in windows of `context` (default the model's, at most 2048) every `stride` (default the window).

    `tokens` bounds the tokens scored; `batch_size` full windows are read at once and does not change the result
    beyond rounding; `seed` is the bootstrap's. A streamed model takes all windows through a block before it reads the
    next one. Raises HalflapError when nothing is left to score or sizes are wrong.
    """
    context = default_context(model.config) if context is None else context
    stride = context if stride is None else stride
    _check_sizes(model.config, context, stride, batch_size)
    found = windows(documents, context, stride, tokens)
    if not found:
        raise HalflapError(
            f"{len(documents)} documents hold no token to score (a document's first token is only read); "
            "give longer text"
        )
    loss = _window_losses(model, documents, found, context * batch_size)
    counts = np.array([window.scored for window in found], float)
    sizes = np.array([_scored_bytes(documents[w.document], w) for w in found], float)
    if not np.isfinite(loss).all():
        raise HalflapError(
            f"the loss is {loss.sum()} (not a number) in {int((~np.isfinite(loss)).sum())} of {len(loss)} windows; "
            "the weights are broken or overflow: try --dtype float32"
        )
    owners = np.array([window.document for window in found])
    by_document = len(set(owners.tolist())) >= DOCUMENT_UNITS
    units = np.stack([loss, counts, sizes], 1)
    if by_document:
        units = np.stack([np.bincount(owners, column).astype(float) for column in units.T], 1)
        units = units[units[:, 1] > 0]
    return HeldOut(
        **_numbers(*units.sum(0)),
        tokens=int(counts.sum()),
        bytes=round(float(sizes.sum())),
        documents=len(set(owners.tolist())),
        context=context,
        stride=stride,
        intervals=_intervals(units, seed),
        resampled="documents" if by_document else "windows",
    )


def _check_sizes(config: ModelConfig, context: int, stride: int, batch_size: int) -> None:
    for name, value in (("context", context), ("stride", stride), ("batch_size", batch_size)):
        if value < 1:
            raise HalflapError(f"{name} is {value}; it must be at least 1: choose a larger one")
    if stride > context:
        raise HalflapError(
            f"the stride {stride} is larger than the context {context}, which would leave tokens unscored; "
            f"choose at most {context}"
        )
    require_positions(config, context, "a window takes")


def _scored_bytes(document: Document, window: Window) -> float:
    return float(document.token_bytes[window.end + 1 - window.scored : window.end + 1].sum())


def _window_losses(
    model: AnyModel, documents: Sequence[Document], found: Sequence[Window], batch_tokens: int
) -> Floats:
    """Summed loss of each window's scored tokens, in nats."""
    losses = np.zeros(len(found))
    longest = max(window.end - window.start for window in found)
    buffer = max(BUFFERED_BATCHES, BUFFERED_BATCHES * batch_tokens // longest)
    batches = [
        [start + i for i in indices]
        for start in range(0, len(found), buffer)
        for indices in length_batches([w.end - w.start for w in found[start : start + buffer]], batch_tokens)
    ]
    device = model.device

    def padded(indices: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        batch = [found[i] for i in indices]
        sequences = [documents[w.document].tokens[w.start : w.end + 1] for w in batch]
        return padded_batch(sequences, [w.scored for w in batch], device)

    total = 0.0
    with Progress("evaluate text", sum(window.scored for window in found), unit="tokens") as progress:
        for indices, (scores, wanted) in zip(batches, score_batches(model, map(padded, batches)), strict=True):
            rows = wanted.nonzero()[:, 0]
            zeros = torch.zeros(len(indices), dtype=torch.float64, device=device)
            sums = zeros.index_add(0, rows, -scores.log_probs.double())
            losses[indices] = sums.cpu().numpy()
            total += float(sums.sum())
            progress.advance(len(rows))
            progress.note(loss=f"{total / progress.done:.4f}")
    return losses


# ---- numbers


def _numbers(loss: float, tokens: float, size: float) -> dict[str, float]:
    mean = float(loss / tokens)
    bits = float(loss / math.log(2) / size) if size else math.nan
    return {"loss": mean, "perplexity": math.exp(min(mean, 700.0)), "bits_per_byte": bits}


def _intervals(units: Floats, seed: int) -> dict[str, tuple[float, float]]:
    """Percentile intervals from R resamples of U units (loss, tokens, bytes), (U, 3); empty for a single unit."""
    if len(units) < 2:
        return {}
    generator = np.random.default_rng(seed)
    samples = np.stack([units[generator.integers(0, len(units), len(units))].sum(0) for _ in range(RESAMPLES)])
    low, high = np.percentile(samples[:, 0] / samples[:, 1], [2.5, 97.5])
    found = {"loss": (float(low), float(high)), "perplexity": (math.exp(min(low, 700)), math.exp(min(high, 700)))}
    if (samples[:, 2] > 0).all():
        bits = np.percentile(samples[:, 0] / math.log(2) / samples[:, 2], [2.5, 97.5])
        found["bits_per_byte"] = (float(bits[0]), float(bits[1]))
    return found
