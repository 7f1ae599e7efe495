"""Training in phases: tokens, blend, learning rate and batch of each; all a function of the step alone. No torch.

A phase takes a whole number of steps, so blend and learning rate change together, on a step, and a resumed run needs
no memory of where it was. Rates are absolute; a phase begins where the one before ended unless it says otherwise.
Tokens are positions, padding included. Nemotron-4 340B's ramp is 768, 1536 and 2304 rows from 0, 200 and 400 billion
tokens, and its last 1 of 9 trillion has two blends and a steeper decay.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from halflap.amounts import parse_count
from halflap.errors import HalflapError

Shape = Literal["constant", "linear", "cosine"]
SHAPES: tuple[str, ...] = ("constant", "linear", "cosine")


@dataclass(frozen=True)
class Phase:
    """A stretch of training.

    tokens       at least so many, rounded up to whole steps
    start, end   learning rate; start None is where the phase before ended, 0 for the first; a constant one has `end`
    shape        how the rate goes from start to end
    weights      share of each source, None for those of the phase before
    batch_size   rows of a step on one rank, None for what the ramp says
    """

    tokens: int
    start: float | None = None
    end: float | None = None
    shape: Shape = "linear"
    weights: tuple[float, ...] | None = None
    batch_size: int | None = None

    def __post_init__(self) -> None:
        if type(self.tokens) is not int or self.tokens < 1:
            raise HalflapError(
                f"a phase has tokens={self.tokens!r}; it must be a whole number of at least 1: correct it"
            )
        if self.batch_size is not None and (type(self.batch_size) is not int or self.batch_size < 1):
            raise HalflapError(
                f"a phase has batch_size={self.batch_size!r}; it must be a whole number of at least 1: correct it"
            )
        for name in ("start", "end"):
            rate = getattr(self, name)
            if rate is not None and not (isinstance(rate, int | float) and 0 <= rate < math.inf):
                raise HalflapError(
                    f"a phase has {name}={rate!r}, which is no learning rate: give a number of at least 0"
                )
        if self.shape not in SHAPES:
            raise HalflapError(f"a phase has shape={self.shape!r}; allowed are {', '.join(SHAPES)}: choose one of them")
        if self.end is None and self.shape != "constant":
            raise HalflapError(f"a {self.shape} phase has no end, its last learning rate: add it")


class Stretch(NamedTuple):
    """Steps of one batch size within one phase: the first of them, and what was seen before it."""

    step: int
    slot: int  # rows of all ranks before
    tokens: int
    phase: int
    rows: int  # of a step on one rank


@dataclass(frozen=True)
class Plan:
    """Phases one after the other; `ramp` is (from so many tokens, rows of a step on one rank), from 0 on."""

    phases: tuple[Phase, ...]
    sequence_length: int
    ramp: tuple[tuple[int, int], ...]
    world: int = 1
    stretches: tuple[Stretch, ...] = field(init=False)
    steps: int = field(init=False)
    ends: tuple[int, ...] = field(init=False)  # tokens seen when each phase is over

    def __post_init__(self) -> None:
        if not self.phases:
            raise HalflapError("a plan of training has no phases: give at least one")
        thresholds = [tokens for tokens, _ in self.ramp]
        if (
            not thresholds
            or thresholds[0] != 0
            or thresholds != sorted(set(thresholds))
            or min(r for _, r in self.ramp) < 1
        ):
            raise HalflapError(
                f"the batch ramp is {[list(pair) for pair in self.ramp]}; it must be pairs of tokens, ascending from "
                "0, and rows of at least 1: correct it"
            )
        stretches, ends, steps = self._lay_out()
        for name, value in (("stretches", stretches), ("ends", ends), ("steps", steps)):
            object.__setattr__(self, name, value)

    def _lay_out(self) -> tuple[tuple[Stretch, ...], tuple[int, ...], int]:
        step = slot = tokens = 0
        stretches: list[Stretch] = []
        ends: list[int] = []
        for number, phase in enumerate(self.phases):
            border = tokens + phase.tokens
            while tokens < border:
                place = bisect.bisect_right(self.ramp, tokens, key=lambda pair: pair[0])
                rows = phase.batch_size or self.ramp[place - 1][1]
                ramps = phase.batch_size is None and place < len(self.ramp)
                until = min(border, self.ramp[place][0]) if ramps else border
                each = rows * self.world
                count = math.ceil((until - tokens) / (each * self.sequence_length))
                stretches.append(Stretch(step, slot, tokens, number, rows))
                step, slot, tokens = step + count, slot + count * each, tokens + count * each * self.sequence_length
            ends.append(tokens)
        return tuple(stretches), tuple(ends), step

    @property
    def tokens(self) -> int:
        """Of all phases, as rounded to whole steps."""
        return self.ends[-1]

    def rows(self, step: int) -> tuple[int, int]:
        """Slots of the global order that a step takes: the first, and how many on each rank."""
        at = self._stretch(step)
        return at.slot + (step - at.step) * at.rows * self.world, at.rows

    def tokens_before(self, step: int) -> int:
        """Tokens of all steps before."""
        return self.rows(step)[0] * self.sequence_length

    def learning_rate(self, step: int) -> float:
        """Rate of a step, which is that of its last token: a phase's last step has the phase's end."""
        number = self._stretch(step).phase
        phase, first = self.phases[number], self.ends[number - 1] if number else 0
        start, end = self._rates(number)
        share = min(1.0, (self.tokens_before(step + 1) - first) / (self.ends[number] - first))
        if phase.shape == "constant":
            return end
        return end + (start - end) * (1 - share if phase.shape == "linear" else (1 + math.cos(math.pi * share)) / 2)

    def blend(self, default: Sequence[float]) -> list[tuple[float, tuple[float, ...]]]:
        """(fraction of all rows, weights) of each phase; `default` until one says otherwise."""
        weights, found, before = tuple(default), [], 0
        for phase, end in zip(self.phases, self.ends, strict=True):
            weights = weights if phase.weights is None else phase.weights
            found.append(((end - before) / self.tokens, weights))
            before = end
        return found

    def _rates(self, number: int) -> tuple[float, float]:
        phase = self.phases[number]
        before = self._rates(number - 1)[1] if number else 0.0
        start = before if phase.start is None else phase.start
        return start, start if phase.end is None else phase.end

    def _stretch(self, step: int) -> Stretch:
        return self.stretches[bisect.bisect_right(self.stretches, step, key=lambda stretch: stretch.step) - 1]


def weights_for_low_scores(
    scores: Sequence[float], temperature: float = 1.0, cap: float | None = None
) -> tuple[float, ...]:
    """More of what goes badly: weights proportional to exp(-score / temperature), none above `cap` of the whole.

    scores: one a source, such as the accuracy of the model in its area. What a cap cuts off goes to the others in
    proportion. The published report says that areas of low accuracy got more weight, and not how.
    """
    if not scores or not temperature > 0:
        raise HalflapError(f"temperature is {temperature} for {len(scores)} scores; both must be above 0: correct them")
    if cap is not None and not 1 / len(scores) <= cap <= 1:
        raise HalflapError(
            f"cap is {cap}; {len(scores)} shares need one from {1 / len(scores):g} to 1: choose a larger one"
        )
    most = max(-score for score in scores)
    raw = [math.exp((-score - most) / temperature) for score in scores]
    capped: set[int] = set()
    while True:
        free = sum(weight for i, weight in enumerate(raw) if i not in capped)
        left = 1 - len(capped) * (cap or 1)
        shares = [cap or 1 if i in capped else left * weight / free for i, weight in enumerate(raw)]
        over = {i for i, share in enumerate(shares) if cap is not None and share > cap and i not in capped}
        if not over:
            return tuple(shares)
        capped |= over


FIELDS = ("tokens", "start", "end", "shape", "weights", "batch_size")


def read_plan(data: Mapping[str, Any], sequence_length: int, batch_size: int, sources: int, world: int = 1) -> Plan:
    """The plan in a mapping: `phases`, each with fields of `Phase`, and `ramp`, a list of [tokens, rows].

    A phase's weights may be {scores, temperature, cap} of `weights_for_low_scores`. Raises HalflapError naming what is
    wrong.
    """
    if unknown := sorted(set(data) - {"phases", "ramp"}):
        raise HalflapError(f"a plan of phases has no {unknown[0]!r}; it has phases and ramp: correct it")
    phases = data.get("phases")
    if not isinstance(phases, list) or not all(isinstance(phase, Mapping) for phase in phases):
        raise HalflapError("a plan of phases holds no list under `phases`; write one mapping a phase, with its tokens")
    ramp = data.get("ramp") or [[0, batch_size]]
    wrong = f"the batch ramp is {ramp!r}; write a list of [tokens, rows], whole numbers, from 0 tokens on"
    try:
        ramp = [[_whole(tokens), rows] for tokens, rows in ramp]
    except (TypeError, ValueError):
        raise HalflapError(wrong) from None
    if not all([type(number) for number in pair] == [int, int] for pair in ramp):
        raise HalflapError(wrong)
    made = tuple(_phase(number, phase, sources) for number, phase in enumerate(phases))
    return Plan(made, sequence_length, tuple((tokens, rows) for tokens, rows in ramp), world)


def _phase(number: int, data: Mapping[str, Any], sources: int) -> Phase:
    if unknown := sorted(set(data) - set(FIELDS)):
        raise HalflapError(f"phase {number} has no field {unknown[0]!r}; it has {', '.join(FIELDS)}: correct it")
    values = dict(data)
    if isinstance(weights := values.get("weights"), Mapping):
        if unknown := sorted(set(weights) - {"scores", "temperature", "cap"}):
            raise HalflapError(f"weights of phase {number} have no {unknown[0]!r}; give scores, temperature and cap")
        weights = weights_for_low_scores(**{"scores": (), **weights})
    if weights is not None:
        if len(weights) != sources:
            raise HalflapError(
                f"phase {number} has {len(weights)} weights and there are {sources} paths of text; give one for each"
            )
        values["weights"] = tuple(weights)
    try:
        for name in ("start", "end"):
            if isinstance(values.get(name), str):  # YAML reads 1e-4, which has no point, as text
                values[name] = float(values[name])
        return Phase(**{**values, "tokens": _whole(values.get("tokens", 0))})
    except ValueError as error:
        raise HalflapError(f"phase {number}: {error}") from None


def _whole(tokens: Any) -> Any:
    """A number of tokens that YAML reads as text (20M) or as a float (2e6)."""
    return parse_count(tokens) if isinstance(tokens, str | float) else tokens
