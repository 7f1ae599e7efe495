"""Guesses of a smaller model with the same tokenizer, which writes ahead of the replies it follows.

It reads a reply's text in passes of its own, about one between two steps, on the same grid as the model reads prompts;
until that is done the reply goes without guesses. What it has read it remembers in a prefix cache of its own, so that
the next turn of a conversation is not read anew. Legend: B batch, T time.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from halflap.errors import HalflapError
from halflap.inference.chooser import choose_rows
from halflap.inference.memory import Budget
from halflap.inference.prefix_cache import PrefixCache
from halflap.inference.replies import Reply
from halflap.inference.rows import OneRow
from halflap.inference.speculate import Average
from halflap.models import slots
from halflap.models.cache import Cache
from halflap.models.config import ModelConfig
from halflap.models.decoder import Decoder
from halflap.models.model import HybridModel


class Draft:
    """A `Speculator` (speculate.py).

    Its rows are all as long as the longest; where they and as many of the model's would not fit the budget, the longest
    replies go without guesses. remembered: bytes of its prefix cache, 0 for none.
    """

    def __init__(
        self, model: HybridModel, config: ModelConfig, prefill_chunk: int, budget: Budget, remembered: int = 0
    ) -> None:
        if model.config.vocab_size != config.vocab_size:
            raise HalflapError(
                f"the draft model has {model.config.vocab_size} tokens and the model {config.vocab_size}; both must "
                "share one tokenizer: use a draft of the same family of checkpoints"
            )
        self._model, self._decode, self._chunk = model, Decoder(model), prefill_chunk
        self._dtype, self._device, self._budget = model.dtype, model.device, budget
        self._cache = slots.empty(model.config, model.dtype, model.device)
        self._rows: list[Reply] = []  # those of the cache
        self._read: list[int] = []  # tokens of each in it
        self._begun: dict[Reply, Cache] = {}  # those that are still being read, in caches of one row
        self._found: dict[Reply, int] = {}  # tokens that the prefix cache had of others when it was first asked
        self._one_row = OneRow(model)
        self._prefix = PrefixCache(remembered, self._one_row) if remembered else None
        self._seconds, self._reading = Average(), Average()  # of a guess, and of a token read

    def remove(self, reply: Reply) -> None:
        self._begun.pop(reply, None)
        self._found.pop(reply, None)
        if reply not in self._rows:
            return
        index = self._rows.index(reply)
        if self._prefix is not None:
            self._prefix.store([*reply.prompt, *reply.tokens][: self._read[index]], self._cache, index)
        slots.move(self._cache, len(self._rows) - 1, index)
        self._rows[index], self._read[index] = self._rows[-1], self._read[-1]
        del self._rows[-1], self._read[-1]
        if not self._rows:
            slots.resize(self._cache, 0, 0)

    def guess(self, wanted: Mapping[Reply, int]) -> dict[Reply, list[int]]:
        ahead = max(wanted.values())
        while self._rows and not self._fit(self._rows, ahead):
            self.remove(max(self._rows, key=lambda reply: reply.length))
        self._read_some([reply for reply in wanted if reply not in self._rows], ahead)
        if not any(reply in wanted for reply in self._rows):
            return {}
        started, most = time.perf_counter(), [wanted.get(reply, 0) for reply in self._rows]
        logits = self._catch_up(max(most))
        guesses: list[list[int]] = [[] for _ in self._rows]
        running = slots.fork(slots.view(self._cache, len(self._rows)))
        for step in range(max(most)):
            if step:
                last = torch.tensor([[row[-1] if row else 0] for row in guesses], device=self._device)
                logits = self._decode(last, cache=running)[:, 0]
            writing = [row for row, count in enumerate(most) if count > step]
            chosen = choose_rows(logits[writing], [self._rows[row].chooser for row in writing], step)
            for row, token in zip(writing, chosen, strict=True):
                guesses[row].append(token)
        self._seconds.add((time.perf_counter() - started) / max(most))
        return dict(zip(self._rows, guesses, strict=True))

    def cost(self) -> float:
        return self._seconds.value or 0.0

    def reading(self, reply: Reply) -> float:
        """0 until a pass has been measured."""
        if self._reading.value is None or reply in self._rows:
            return 0.0
        if reply in self._begun:
            return (reply.length - int(self._begun[reply].lengths[0])) * self._reading.value
        if reply not in self._found:
            self._found[reply] = 0 if self._prefix is None else self._prefix.known(_text(reply))
        return (reply.length - self._found[reply]) * self._reading.value

    # ---- reading

    def _read_some(self, replies: Sequence[Reply], ahead: int) -> None:
        """About one pass of the texts of replies that have no row yet, short ones first."""
        spent = 0
        for reply in sorted(replies, key=lambda reply: reply.length):
            if not self._fit([*self._rows, *self._begun.keys() - {reply}, reply], ahead):
                continue
            while spent < self._chunk and reply not in self._rows:
                spent += self._read_pass(reply)

    def _read_pass(self, reply: Reply) -> int:
        """Read a text up to the next border of the grid, give it a row at its end; how many tokens that were."""
        text = _text(reply)
        row = self._begun[reply] = self._begun.get(reply) or self._begin(text)
        start = int(row.lengths[0])
        end = min(len(text), (start // self._chunk + 1) * self._chunk)
        if start < end:
            started = time.perf_counter()
            self._model.hidden_states(torch.tensor([text[start:end]], device=self._device), cache=row)
            self._reading.add((time.perf_counter() - started) / (end - start))
            if self._prefix is not None:
                self._prefix.store(text[:end], row, 0)
        if end == len(text):
            del self._begun[reply]
            self._room(len(self._rows) + 1, len(text))
            slots.insert(self._cache, row, len(self._rows))
            self._rows.append(reply)
            self._read.append(len(text))
        return end - start

    def _begin(self, text: Sequence[int]) -> Cache:
        """A cache of one row with what is known of a text in it."""
        hit = None if self._prefix is None else self._prefix.find(text, len(text))
        return self._one_row(len(text)) if hit is None else hit.cache

    def _fit(self, replies: Sequence[Reply], ahead: int) -> bool:
        longest = max(reply.length for reply in replies) + ahead
        return self._budget.fits([(len(replies), longest + slots.GROW)])

    def _catch_up(self, ahead: int) -> Tensor:
        """Read what replies grew by; the logits (B, V) of what comes next."""
        count = len(self._rows)
        texts = [reply.tokens[read - len(reply.prompt) :] for reply, read in zip(self._rows, self._read, strict=True)]
        longest = max(map(len, texts))
        self._read = [read + len(text) for read, text in zip(self._read, texts, strict=True)]
        self._room(count, max(self._read) + longest + ahead)
        tokens = torch.tensor([[*text, *[0] * (longest - len(text))] for text in texts], device=self._device)
        lengths = torch.tensor([len(text) for text in texts], device=self._device)
        part = slots.view(self._cache, count)
        ragged = any(len(text) < longest for text in texts)
        last = torch.arange(count, device=self._device), lengths - 1
        if self._decode.is_native(tokens, [part]):
            logits = self._decode(tokens, part, lengths if ragged else None)[last]
        else:
            hidden = self._model.hidden_states(tokens, cache=part, lengths=lengths if ragged else None)
            logits = self._model.logits(hidden[last])
        slots.absorb(self._cache, part)
        return logits

    def _room(self, rows: int, tokens: int) -> None:
        slots.resize(self._cache, max(rows, len(self._cache.lengths)), slots.rounded(self._cache, tokens))


def _text(reply: Reply) -> list[int]:
    """All but the token that is to be read next."""
    return [*reply.prompt, *reply.tokens[:-1]]
