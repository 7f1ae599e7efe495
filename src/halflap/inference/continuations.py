"""Log-probabilities of several continuations of one prompt, which is read once.

The prompt's state is repeated for as many continuations as memory and a pass hold, and these are read on together,
right-padded. The first token of each follows from the prompt alone. Legend: D hidden.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from halflap.inference.log_probs import length_batches
from halflap.inference.replies import Texts, score_next, score_prompt
from halflap.inference.requests import Token
from halflap.models import slots
from halflap.models.cache import Cache
from halflap.models.model import HybridModel

Ids = Sequence[int]


class Continuations:
    """`passes` reads them and fills `tokens`, of each continuation its scored ones.

    cache: of one row, the prompt's, which the last pass may change; hidden (D,): of its last token. count: how many of
    the likeliest tokens to report. at_once: rows that there is memory for.
    """

    def __init__(self, model: HybridModel, texts: Texts, asked: Sequence[Ids], count: int, at_once: int) -> None:
        self._model, self._texts, self._asked, self._count, self._at_once = model, texts, asked, count, at_once
        self.tokens: list[list[Token]] = [[] for _ in asked]

    def passes(self, cache: Cache, hidden: Tensor, chunk: int) -> Iterator[int]:
        """For each next() one pass of at most `chunk` tokens, padding included; the tokens read."""
        firsts = score_next(self._model.logits(hidden), [ids[0] for ids in self._asked], self._count, self._texts)
        for found, ids, score in zip(self.tokens, self._asked, firsts, strict=True):
            found.append(Token(ids[0], self._texts[ids[0]], *score))
        batches = self._batches(chunk)
        for rows in batches:
            if rows is batches[-1] and len(rows) == 1:
                running = cache
            else:
                running = slots.fork(cache) if len(rows) == 1 else cache.select([0] * len(rows))
            for start in range(0, max(len(self._asked[row]) for row in rows) - 1, chunk):
                yield self._read(running, rows, start, chunk)

    def _batches(self, chunk: int) -> list[list[int]]:
        """Which are read together; a lone one may be longer than a pass."""
        rows = [row for row, ids in enumerate(self._asked) if len(ids) > 1]
        batches = length_batches([len(self._asked[row]) - 1 for row in rows], chunk)
        return [
            [rows[i] for i in batch[start : start + self._at_once]]
            for batch in batches
            for start in range(0, len(batch), self._at_once)
        ]

    def _read(self, cache: Cache, rows: Sequence[int], start: int, chunk: int) -> int:
        parts = [self._asked[row][start : start + chunk + 1] for row in rows]  # each token is read, the next one scored
        counts = [len(part) - 1 for part in parts]
        width, device = max(counts), self._model.device
        tokens = torch.tensor([[*part[:-1], *[0] * (width - len(part) + 1)] for part in parts], device=device)
        lengths = torch.tensor(counts, device=device) if min(counts) < width else None
        hidden = self._model.hidden_states(tokens, cache=cache, lengths=lengths)
        wanted = torch.cat([hidden[row, :count] for row, count in enumerate(counts)])
        targets = [token for part in parts for token in part[1:]]
        scores = iter(score_prompt(self._model, wanted, targets, self._count, self._texts))
        for row, part in zip(rows, parts, strict=True):
            self.tokens[row] += [Token(token, self._texts[token], *next(scores)) for token in part[1:]]
        return sum(counts)
