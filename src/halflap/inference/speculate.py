"""Guessing tokens ahead, to have several checked in one pass: from the text itself, or by a smaller model.

A guess costs nothing but time: the model chooses every token as it would without (chooser.py), and a held pass advances
states by what came true alone. How far to guess follows from what guesses lately came to and from how long passes of
each width took, down to not at all. Legend: B batch, T time.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from halflap.errors import HalflapError
from halflap.inference.chooser import choose_rows
from halflap.inference.memory import Budget
from halflap.inference.replies import Reply
from halflap.models import slots
from halflap.models.cache import Cache
from halflap.models.config import ModelConfig
from halflap.models.decoder import Decoder
from halflap.models.model import HybridModel

LOOKUP = (4, 3, 2)  # tokens that must recur, the longest tried first
HOPE = 0.5  # the rate of guesses that come true, before any; a reply's drifts back to it while there are none,
DRIFT = 0.002  # so much a pass, so that it is tried again now and then
OF_REPLY, OF_ALL, OF_SECONDS = 0.85, 0.98, 0.9  # what older measurements count against a new one
WIDER = 0.06  # an unmeasured pass is taken to be so much slower a token
REMEASURE = 64  # passes after which one goes without guesses, to know what that takes


class Speculator(Protocol):
    """Begins to follow a reply when it is first asked about it."""

    def remove(self, reply: Reply) -> None:
        """It has ended or lost its slot."""
        ...

    def guess(self, wanted: Mapping[Reply, int]) -> dict[Reply, list[int]]:
        """At most so many tokens that may follow each reply."""
        ...

    def cost(self) -> float:
        """Seconds a guessed token takes."""
        ...


class Lookup:
    """What followed the last tokens when they last stood in prompt or reply (prompt lookup decoding)."""

    def __init__(self) -> None:
        self._known: dict[Reply, _Index] = {}

    def remove(self, reply: Reply) -> None:
        self._known.pop(reply, None)

    def guess(self, wanted: Mapping[Reply, int]) -> dict[Reply, list[int]]:
        return {reply: self._known.setdefault(reply, _Index()).follow(reply, count) for reply, count in wanted.items()}

    def cost(self) -> float:
        return 0.0


class _Index:
    """Where each run of tokens last ended."""

    def __init__(self) -> None:
        self._text: list[int] = []
        self._known = 0  # of the reply
        self._ends: dict[tuple[int, ...], int] = {}

    def follow(self, reply: Reply, count: int) -> list[int]:
        if not self._text:
            self._extend(reply.prompt)
        self._extend(reply.tokens[self._known :])
        self._known = len(reply.tokens)
        for size in LOOKUP:
            if (end := self._ends.get(tuple(self._text[-size:]))) is not None:
                return self._text[end : end + count]
        return []

    def _extend(self, tokens: Sequence[int]) -> None:
        for token in tokens:  # a run is entered once something follows it, so that the text's own end is never found
            for size in LOOKUP:
                if len(self._text) >= size:
                    self._ends[tuple(self._text[-size:])] = len(self._text)
            self._text.append(token)


class Draft:
    """A smaller model with the same tokenizer writes ahead.

    Its rows are all as long as the longest; where they and as many of the model's would not fit the budget, the longest
    replies go without guesses.
    """

    def __init__(self, model: HybridModel, config: ModelConfig, prefill_chunk: int, budget: Budget) -> None:
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
        self._seconds = Average()

    def _begin(self, reply: Reply) -> None:
        """Read its text so far."""
        text = [*reply.prompt, *reply.tokens[:-1]]
        row = Cache.create(self._model.config, 1, len(text), self._dtype, self._device)
        for start in range(0, len(text), self._chunk):
            self._model.hidden_states(torch.tensor([text[start : start + self._chunk]], device=self._device), cache=row)
        self._room(len(self._rows) + 1, len(text))
        slots.insert(self._cache, row, len(self._rows))
        self._rows.append(reply)
        self._read.append(len(text))

    def remove(self, reply: Reply) -> None:
        if reply not in self._rows:
            return
        index = self._rows.index(reply)
        slots.move(self._cache, len(self._rows) - 1, index)
        self._rows[index], self._read[index] = self._rows[-1], self._read[-1]
        del self._rows[-1], self._read[-1]
        if not self._rows:
            slots.resize(self._cache, 0, 0)

    def guess(self, wanted: Mapping[Reply, int]) -> dict[Reply, list[int]]:
        ahead = max(wanted.values())
        while self._rows and not self._fit(self._rows, ahead):
            self.remove(max(self._rows, key=lambda reply: reply.length))
        for reply in sorted(wanted, key=lambda reply: reply.length):
            if reply not in self._rows and self._fit([*self._rows, reply], ahead):
                self._begin(reply)
        if not self._rows:
            return {}
        started, most = time.perf_counter(), [wanted.get(reply, 0) for reply in self._rows]
        logits = self._catch_up(max(most))
        guesses: list[list[int]] = [[] for _ in self._rows]
        ahead = slots.fork(slots.view(self._cache, len(self._rows)))
        for step in range(max(most)):
            if step:
                last = torch.tensor([[row[-1] if row else 0] for row in guesses], device=self._device)
                logits = self._decode(last, cache=ahead)[:, 0]
            writing = [row for row, count in enumerate(most) if count > step]
            chosen = choose_rows(logits[writing], [self._rows[row].chooser for row in writing], step)
            for row, token in zip(writing, chosen, strict=True):
                guesses[row].append(token)
        self._seconds.add((time.perf_counter() - started) / max(most))
        return dict(zip(self._rows, guesses, strict=True))

    def _fit(self, replies: Sequence[Reply], ahead: int) -> bool:
        longest = max(reply.length for reply in replies) + ahead
        return self._budget.fits([(len(replies), longest + slots.GROW)])

    def cost(self) -> float:
        return self._seconds.value or 0.0

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
        hidden = self._model.hidden_states(tokens, cache=part, lengths=lengths if ragged else None)
        slots.absorb(self._cache, part)
        last = hidden[torch.arange(count, device=self._device), lengths - 1]
        return self._model.logits(last)

    def _room(self, rows: int, tokens: int) -> None:
        slots.resize(self._cache, max(rows, len(self._cache.lengths)), slots.rounded(self._cache, tokens))


class Average:
    """Of measurements, the latest counting most; None before the first."""

    def __init__(self, memory: float = OF_SECONDS) -> None:
        self.value: float | None = None
        self._memory = memory

    def add(self, value: float) -> None:
        self.value = value if self.value is None else self._memory * self.value + (1 - self._memory) * value


class Pace:
    """How far it pays to guess. `acceptance`: of all guesses so far the share that came true; replies begin with it."""

    def __init__(self) -> None:
        self.acceptance = HOPE
        self._seconds: dict[int, dict[int, Average]] = {}  # of passes, by width and rows
        self._since = 0

    def measured(self, rows: int, width: int, seconds: float) -> None:
        self._seconds.setdefault(width, {}).setdefault(rows, Average()).add(seconds)
        self._since = 0 if width == 1 else self._since + 1

    def observe(self, reply: Reply, guessed: int, right: int) -> None:
        """Note how many of a reply's guesses came true."""
        if not guessed:
            reply.acceptance += DRIFT * (HOPE - reply.acceptance)
        for outcome in [1.0] * right + [0.0] * (right < guessed):
            reply.acceptance += (1 - OF_REPLY) * (outcome - reply.acceptance)
            self.acceptance += (1 - OF_ALL) * (outcome - self.acceptance)

    def seconds(self, rows: int, most: int) -> list[float]:
        """What passes of 1 to 1 + most tokens a row take, for about as many rows; empty when that must be measured."""
        base = self._known(rows, 1)
        if base is None or self._since >= REMEASURE:
            return []
        wider = ((count, self._known(rows, 1 + count)) for count in range(1, 1 + most))
        return [base, *(max(base, known or base * (1 + WIDER * count)) for count, known in wider)]

    def reach(self, seconds: Sequence[float], acceptance: float, most: int, cost: float) -> int:
        """The number of guesses, each taking `cost` seconds, with the most tokens a second.

        k guesses, each true with a chance of a where those before were, yield 1 + a + .. + a^k tokens.
        """
        best, best_rate, expected = 0, 0.0, 0.0
        for count, taken in enumerate(seconds[: most + 1]):
            expected += acceptance**count
            if (rate := expected / (taken + cost * count)) > best_rate:
                best, best_rate = count, rate
        return best

    def _known(self, rows: int, width: int) -> float | None:
        """Seconds of such a pass, or of one with about as many rows."""
        measured = self._seconds.get(width)
        return measured[min(measured, key=lambda count: abs(count - rows))].value if measured else None
