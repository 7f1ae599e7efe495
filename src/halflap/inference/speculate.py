"""Guessing tokens ahead, to have several checked in one pass: from the text itself, or by a smaller model (draft.py).

A guess costs nothing but time: the model chooses every token as it would without (chooser.py), and a held pass advances
states by what came true alone. How far to guess follows from what guesses lately came to and from how long passes of
each width took, down to not at all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from halflap.inference.replies import Reply

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

    def reading(self, reply: Reply) -> float:
        """Seconds to be spent on a reply before its first guess."""
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

    def reading(self, reply: Reply) -> float:
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

    def guesses(self, speculator: Speculator, rows: Sequence[Reply], most: int) -> dict[Reply, list[int]]:
        """What may follow, at most so many tokens, of the replies for which guessing pays."""
        cost, seconds = speculator.cost(), self.seconds(len(rows), most)
        wanted: dict[Reply, int] = {}
        for reply in rows:
            if reply.chooser.matcher is not None:
                continue
            count = self.reach(seconds, reply.acceptance, min(most, reply.left - 1), cost)
            reading = speculator.reading(reply)
            if count > 0 and self.pays(seconds, reply.acceptance, count, cost, reading, reply.left):
                wanted[reply] = count
        return speculator.guess(wanted) if wanted else {}

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

    @staticmethod
    def pays(seconds: Sequence[float], acceptance: float, count: int, cost: float, reading: float, left: int) -> bool:
        """Whether `left` tokens come sooner with `count` guesses a pass, `reading` seconds before them included."""
        if not reading or len(seconds) <= count:
            return True
        expected = sum(acceptance**power for power in range(1 + count))
        return reading + left * (seconds[count] + cost * count) / expected < left * seconds[0]

    def _known(self, rows: int, width: int) -> float | None:
        """Seconds of such a pass, or of one with about as many rows."""
        measured = self._seconds.get(width)
        return measured[min(measured, key=lambda count: abs(count - rows))].value if measured else None
