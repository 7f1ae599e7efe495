"""Log-probabilities of answers after their contexts; answers to the same question share its reading.

A question's tokens are read once into a cache, its row is repeated for its answers, and only the answers are read on.
Contexts with one answer, and short ones, are read together with it, right-padded, which causality makes exact.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from halflap.checkpoints.streamed import AnyModel
from halflap.inference.generate import prefill
from halflap.inference.log_probs import Scores, length_batches, padded_batch, score_batches, score_hidden
from halflap.models.model import HybridModel

SHARED_FROM = 16  # tokens of a context from which sharing it pays for the second pass


class Answer(NamedTuple):
    """log_prob of the whole continuation in nats; greedy: each of its tokens is the likeliest one there."""

    log_prob: float
    greedy: bool


def score_answers(
    model: AnyModel,
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    *,
    scored: Sequence[int] | None = None,
    batch_tokens: int = 8192,
    advance: Callable[[int], None] = lambda _: None,
) -> list[Answer]:
    """The answer of each (context, continuation), both token ids, the context not empty.

    With `scored` only the last `scored[i]` tokens of continuation i count, and the others are read. A batch holds at
    most `batch_tokens` padded tokens (or one row); `advance` hears how many pairs are done. A streamed model, which
    keeps no cache, reads each context with each of its answers.
    """
    counted = [len(continuation) for _, continuation in pairs] if scored is None else scored
    results = [Answer(0.0, True)] * len(pairs)
    asked: dict[tuple[int, ...], list[int]] = {}
    for index, (context, _) in enumerate(pairs):
        asked.setdefault(tuple(context), []).append(index)
    shared: list[list[int]] = []
    alone: list[int] = []
    for context, indices in asked.items():
        if len(indices) > 1 and len(context) >= SHARED_FROM and isinstance(model, HybridModel):
            shared.append(indices)
        else:
            alone += indices
    for batch in _question_batches(pairs, shared, batch_tokens):
        assert isinstance(model, HybridModel)
        for indices, scores, wanted in _score_shared(model, pairs, counted, batch, batch_tokens):
            _fill(results, indices, scores, wanted)
            advance(len(indices))
    sequences = [[*pairs[i][0], *pairs[i][1]] for i in alone]
    batches = list(length_batches([len(sequence) for sequence in sequences], batch_tokens))
    device = model.device
    padded = (
        padded_batch([sequences[row] for row in rows], [counted[alone[row]] for row in rows], device)
        for rows in batches
    )
    for rows, (scores, wanted) in zip(batches, score_batches(model, padded), strict=True):
        _fill(results, [alone[row] for row in rows], scores, wanted)
        advance(len(rows))
    return results


def _question_batches(
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]], questions: list[list[int]], batch_tokens: int
) -> list[list[list[int]]]:
    """Questions of nearly equal length together, so that all their rows, padded, hold at most `batch_tokens` tokens."""

    def length(question: list[int]) -> int:
        return len(pairs[question[0]][0]) + max(len(pairs[i][1]) for i in question)

    batches: list[list[list[int]]] = []
    rows = 0
    for question in sorted(questions, key=lambda q: (-length(q), q)):
        if not batches or (rows + len(question)) * length(batches[-1][0]) > batch_tokens:
            batches.append([])
            rows = 0
        batches[-1].append(question)
        rows += len(question)
    return batches


@torch.inference_mode()
def _score_shared(
    model: HybridModel,
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    counted: Sequence[int],
    questions: list[list[int]],
    batch_tokens: int,
) -> Iterator[tuple[list[int], Scores, Tensor]]:
    """Indices of answers, their scores, and where they stand (answers, T); all questions are read together."""
    contexts = [pairs[question[0]][0] for question in questions]
    cache, _ = prefill(model, [context[:-1] for context in contexts])
    answers = [(row, index) for row, question in enumerate(questions) for index in question]
    longest = max(len(pairs[index][0]) + len(pairs[index][1]) for _, index in answers)
    at_once = max(1, batch_tokens // longest)
    for start in range(0, len(answers), at_once):
        part = answers[start : start + at_once]
        sequences = [[pairs[index][0][-1], *pairs[index][1]] for _, index in part]
        counts = [counted[index] for _, index in part]
        tokens, targets, wanted = padded_batch(sequences, counts, model.device)
        lengths = torch.tensor([len(sequence) - 1 for sequence in sequences], device=tokens.device)
        hidden = model.hidden_states(tokens, cache=cache.select([row for row, _ in part]), lengths=lengths)
        yield [index for _, index in part], score_hidden(model, hidden[wanted], targets[wanted]), wanted


def _fill(results: list[Answer], indices: list[int], scores: Scores, wanted: Tensor) -> None:
    counts = wanted.sum(1).tolist()
    parts = zip(scores.log_probs.double().split(counts), scores.greedy.split(counts), strict=True)
    for index, (log_probs, greedy) in zip(indices, parts, strict=True):
        results[index] = Answer(float(log_probs.sum()), bool(greedy.all()))
