"""Which row comes when: shuffling and blending as pure functions of a position, with nothing to store or resume.

Shuffling is a keyed permutation by a balanced Feistel network with cycle walking (Black & Rogaway 2002), so any
position of any epoch is found without a table. Blending gives slot p to a source such that after any number of slots
each source has its exact share of them, to within less than two however many sources there are (mostly within one):
a binary tree over the sources divides the slots at each node by rounding.
"""

from __future__ import annotations

import heapq
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
class Split:
    """Sources in two parts; of n slots the first part gets round(share * n), the second the others."""

    share: Fraction
    first: Split | int
    second: Split | int

    def first_count(self, slots: int) -> int:
        return math.floor(self.share * slots + Fraction(1, 2))


@dataclass(frozen=True)
class Phase:
    """From slot `start` on, sources are drawn by this tree."""

    start: int
    sources: Split | int


@dataclass(frozen=True)
class Blend:
    """Sources by slot: one phase, or several that take over from each other at given slots."""

    phases: tuple[Phase, ...]
    offsets: tuple[tuple[int, ...], ...]  # rows each source gave before each phase

    @staticmethod
    def of(phases: Sequence[tuple[int, Sequence[float]]]) -> Blend:
        """A blend from (first slot, weights) of each phase; weights need not sum to 1."""
        made = tuple(Phase(start, _tree(weights)) for start, weights in phases)
        offsets = [(0,) * len(phases[0][1])]
        for phase, following in itertools.pairwise(made):
            offsets.append(_counts(phase.sources, following.start - phase.start, offsets[-1]))
        return Blend(made, tuple(offsets))

    def locate(self, slot: int) -> tuple[int, int]:
        """The source of a slot, and how many rows that source gave before."""
        number = self._phase(slot)
        node, before = self.phases[number].sources, slot - self.phases[number].start
        while isinstance(node, Split):
            first = node.first_count(before)
            if node.first_count(before + 1) > first:
                node, before = node.first, first
            else:
                node, before = node.second, before - first
        return node, self.offsets[number][node] + before

    def counts(self, slots: int) -> tuple[int, ...]:
        """How many of the first `slots` slots each source gets."""
        number = self._phase(slots)
        return _counts(self.phases[number].sources, slots - self.phases[number].start, self.offsets[number])

    def _phase(self, slot: int) -> int:
        return max(i for i, phase in enumerate(self.phases) if phase.start <= slot)


def _tree(weights: Sequence[float]) -> Split | int:
    """Huffman's tree: any two levels at least halve a share, and with it the rounding passed down."""
    if not all(math.isfinite(weight) and weight >= 0 for weight in weights) or not sum(weights) > 0:
        raise HalflapError(
            f"blend weights are {list(weights)}; each must be a number of at least 0 and one above 0: correct them "
            "(--data.weights)"
        )
    # str, because what was written is meant: 0.1 is a tenth
    heap: list[tuple[Fraction, int, Split | int]] = [(Fraction(str(w)), -i, i) for i, w in enumerate(weights) if w]
    heapq.heapify(heap)
    while len(heap) > 1:
        (small, order, second), (large, _, first) = heapq.heappop(heap), heapq.heappop(heap)
        heapq.heappush(heap, (small + large, order, Split(large / (small + large), first, second)))
    return heap[0][2]


def _counts(node: Split | int, slots: int, offsets: Sequence[int]) -> tuple[int, ...]:
    """`offsets` plus the slots of each source among the first `slots`."""
    counts, parts = list(offsets), [(node, slots)]
    while parts:
        node, slots = parts.pop()
        if isinstance(node, Split):
            first = node.first_count(slots)
            parts += [(node.first, first), (node.second, slots - first)]
        else:
            counts[node] += slots
    return tuple(counts)
