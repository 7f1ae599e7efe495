"""Which row comes when: shuffling and blending as pure functions of a position, with nothing to store or resume.

Shuffling is a keyed permutation by a balanced Feistel network with cycle walking (Black & Rogaway 2002), so any
position of any epoch is found without a table. Blending gives slot p to a source such that after any number of slots
each source has its exact share of them, to within about one: the first source's count is round(share * slots), and
the slots left over are divided among the other sources by the same rule.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from halflap.errors import HalflapError

ROUNDS = 6
_WORD = (1 << 64) - 1


def mix(value: int) -> int:
    """A well mixed 64-bit number from any (splitmix64, Steele et al. 2014)."""
    value = (value + 0x9E3779B97F4A7C15) & _WORD
    value = ((value ^ value >> 30) * 0xBF58476D1CE4E5B9) & _WORD
    value = ((value ^ value >> 27) * 0x94D049BB133111EB) & _WORD
    return value ^ value >> 31


def key_of(*numbers: int) -> int:
    """One 64-bit key from several numbers, their order included."""
    key = 0
    for number in numbers:
        key = mix(key ^ (number & _WORD))
    return key


def shuffled(position: int, size: int, key: int) -> int:
    """Where `position` of 0 .. size-1 goes under the permutation that `key` names."""
    if not 0 <= position < size:
        raise IndexError(f"position {position} of {size}")
    half = max(1, math.ceil(max(1, (size - 1).bit_length()) / 2))
    mask = (1 << half) - 1
    while True:
        left, right = position >> half, position & mask
        for turn in range(ROUNDS):
            left, right = right, left ^ mix(key ^ turn << 58 ^ right) & mask
        position = left << half | right
        if position < size:
            return position


@dataclass(frozen=True)
class Phase:
    """From slot `start` on, sources are drawn by these shares, which sum to 1."""

    start: int
    shares: tuple[Fraction, ...]


@dataclass(frozen=True)
class Blend:
    """Sources by slot: one phase, or several that take over from each other at given slots."""

    phases: tuple[Phase, ...]
    offsets: tuple[tuple[int, ...], ...]  # rows each source gave before each phase

    @staticmethod
    def of(phases: Sequence[tuple[int, Sequence[float]]]) -> Blend:
        """A blend from (first slot, weights) of each phase; weights need not sum to 1."""
        made = tuple(Phase(start, _shares(weights)) for start, weights in phases)
        offsets = [(0,) * len(made[0].shares)]
        for phase, following in itertools.pairwise(made):
            given = _counts(phase.shares, following.start - phase.start)
            offsets.append(tuple(a + b for a, b in zip(offsets[-1], given, strict=True)))
        return Blend(made, tuple(offsets))

    def locate(self, slot: int) -> tuple[int, int]:
        """The source of a slot, and how many rows that source gave before."""
        number = max(i for i, phase in enumerate(self.phases) if phase.start <= slot)
        phase, offset = self.phases[number], self.offsets[number]
        before, after = (_counts(phase.shares, slot - phase.start + extra) for extra in (0, 1))
        source = next(i for i, (a, b) in enumerate(zip(before, after, strict=True)) if b > a)
        return source, offset[source] + before[source]

    def counts(self, slots: int) -> tuple[int, ...]:
        """How many of the first `slots` slots each source gets."""
        number = max(i for i, phase in enumerate(self.phases) if phase.start <= slots)
        given = _counts(self.phases[number].shares, slots - self.phases[number].start)
        return tuple(a + b for a, b in zip(self.offsets[number], given, strict=True))


def _shares(weights: Sequence[float]) -> tuple[Fraction, ...]:
    if not all(math.isfinite(weight) and weight >= 0 for weight in weights) or not sum(weights) > 0:
        raise HalflapError(
            f"blend weights are {list(weights)}; each must be a number of at least 0 and one above 0: correct them "
            "(--data.weights)"
        )
    exact = [Fraction(str(weight)) for weight in weights]  # what was written: 0.1 is a tenth
    return tuple(weight / sum(exact) for weight in exact)


def _counts(shares: Sequence[Fraction], slots: int) -> tuple[int, ...]:
    """Slots of each source among the first `slots`; grows by one for exactly one source with every slot."""
    counts = [0] * len(shares)
    rest = Fraction(1)
    # large shares first: what rounding shifts to the others stays below one slot
    for source in sorted(range(len(shares)), key=lambda i: -shares[i]):
        if not shares[source]:
            break
        # round half up, in whole numbers
        counts[source] = math.floor(shares[source] / rest * slots + Fraction(1, 2))
        slots, rest = slots - counts[source], rest - shares[source]
    return tuple(counts)
