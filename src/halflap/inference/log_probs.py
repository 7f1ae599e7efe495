"""Log-probabilities of given tokens, without ever holding a batch's logits (B, T, V).

The head is applied to chunks of the positions that are asked for; sums and softmax are in float32 (float64 for a
float64 model). Used to judge text, to answer multiple-choice tasks, and for a reference policy's log-probabilities.
Legend: B batch, T time, M positions asked for, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from halflap.checkpoints.passes import Input, digest_of, hidden_states_of, served_together
from halflap.checkpoints.streamed import AnyModel, StreamedModel
from halflap.files import atomic_write
from halflap.models.model import HybridModel

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Ids = Sequence[int] | NDArray[np.int64]

CHUNK_BYTES = 32 << 20  # of one chunk's wide logits
SMALLEST_CHUNK = 16


class Scores(NamedTuple):
    """log_probs (M,) in nats, wide; greedy (M,) bool: the token is the likeliest one there."""

    log_probs: Tensor
    greedy: Tensor


@torch.inference_mode()
def score_hidden(model: AnyModel, hidden: Tensor, targets: Tensor) -> Scores:
    """Scores of targets (M,) int64 read from normalised hidden states (M, D) by the model's head."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    chunk = max(SMALLEST_CHUNK, CHUNK_BYTES // (wide.itemsize * model.config.vocab_size))
    log_probs = torch.empty(len(targets), dtype=wide, device=hidden.device)
    greedy = torch.empty(len(targets), dtype=torch.bool, device=hidden.device)
    for start in range(0, len(targets), chunk):
        part = slice(start, start + chunk)
        logits = model.logits(hidden[part])
        picked = logits.gather(1, targets[part, None])[:, 0]
        log_probs[part] = picked - logits.logsumexp(-1)
        greedy[part] = logits.argmax(-1) == targets[part]
    return Scores(log_probs, greedy)


@torch.inference_mode()
def score_tokens(model: HybridModel, tokens: Tensor, targets: Tensor, wanted: Tensor) -> Scores:
    """Scores of targets (B, T), each following tokens (B, T) up to its place, where wanted (B, T) is True, row by row.

    Rows are right-padded: causality keeps padding from reaching anything before it.
    """
    hidden = model.hidden_states(tokens)
    return score_hidden(model, hidden[wanted], targets[wanted])


@torch.inference_mode()
def score_batches(model: AnyModel, batches: Iterable[tuple[Tensor, Tensor, Tensor]]) -> Iterator[tuple[Scores, Tensor]]:
    """`score_tokens` of each batch (tokens, targets, wanted), and its `wanted`, in order.

    A model in memory takes a batch when the one before has been used; one that is streamed takes all batches first,
    reads its weights once for many and, where it has a scratch directory, goes on after an interruption.
    """
    if not isinstance(model, StreamedModel):
        for tokens, targets, wanted in batches:
            yield score_tokens(model, tokens, targets, wanted), wanted
        return
    batches = list(batches)
    for part in served_together(model, [(tokens, None) for tokens, _, _ in batches]):
        yield from zip(_kept_scores(model, batches[part]), (wanted for _, _, wanted in batches[part]), strict=True)


def _kept_scores(model: StreamedModel, batches: Sequence[tuple[Tensor, Tensor, Tensor]]) -> list[Scores]:
    """Scores of the wanted targets; of a model with a scratch directory they are a file there once they are known."""
    inputs: list[Input] = [(tokens, None) for tokens, _, _ in batches]
    file = None
    if model.scratch is not None:
        asked = digest_of([*inputs, *((targets, wanted) for _, targets, wanted in batches)])
        file = model.scratch / f"scores-{asked}.pt"
        if file.exists():
            return [Scores(*one) for one in torch.load(file, weights_only=True)]
    states = zip(hidden_states_of(model, inputs), batches, strict=True)
    found = [score_hidden(model, hidden[wanted], targets[wanted]) for hidden, (_, targets, wanted) in states]
    if file is not None:
        with atomic_write(file) as out:
            torch.save([tuple(one) for one in found], out)
    return found


def sequence_log_probs(
    model: HybridModel, sequences: Sequence[Sequence[int]], *, batch_tokens: int = 8192
) -> list[Tensor]:
    """For each sequence of n token ids the log-probabilities (n - 1,) of all but the first, in nats, on the CPU."""
    results: list[Tensor] = [torch.empty(0)] * len(sequences)
    for indices in length_batches([len(sequence) for sequence in sequences], batch_tokens):
        tokens, targets, wanted = padded_batch([sequences[i] for i in indices], device=model.device)
        log_probs = score_tokens(model, tokens, targets, wanted).log_probs.cpu()
        for index, part in zip(indices, log_probs.split(wanted.sum(1).tolist()), strict=True):
            results[index] = part
    return results


def length_batches(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Indices in batches of nearly equal length, the longest first: `batch_tokens` padded tokens, or one row."""
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    batch: list[int] = []
    for index in order:
        if batch and (len(batch) + 1) * lengths[batch[0]] > batch_tokens:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def padded_batch(
    sequences: Iterable[Ids], scored: Sequence[int] | None = None, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor, Tensor]:
    """(tokens, targets, wanted), each (B, T): what is read, what follows, and where the last `scored[b]` targets are.

    Without `scored` every token but the first is a target. A sequence's last token is a target only.
    """
    rows = [torch.as_tensor(sequence, dtype=torch.int64) for sequence in sequences]
    time = max(1, max(len(row) for row in rows) - 1)
    tokens, targets = torch.zeros(len(rows), time, dtype=torch.int64), torch.zeros(len(rows), time, dtype=torch.int64)
    wanted = torch.zeros(len(rows), time, dtype=torch.bool)
    for index, row in enumerate(rows):
        read = max(0, len(row) - 1)
        tokens[index, :read], targets[index, :read] = row[:-1], row[1:]
        wanted[index, read - (read if scored is None else scored[index]) : read] = True
    return tokens.to(device), targets.to(device), wanted.to(device)
