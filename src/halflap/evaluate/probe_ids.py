"""Recall tasks as token ids, for models that are trained on the task itself. Pure numpy; one generator a row.

Id 0 fills what a row has no use for, 1 separates, 2 ends; what is remembered is drawn from the other ids. An answer
is a run of positions with weight 1, and nothing else of a row has weight. A row of T tokens has its last answer at
its end (MQAR apart, whose queries lie anywhere). Legend: T tokens of a row, V vocabulary.

Sources: copying and the phone book after Jelassi et al. 2024, "Repeat after me"; multi-query associative recall after
Arora et al. 2023, "Zoology"; the others are the id form of the texts in probe_texts.py.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from halflap.errors import HalflapError

FILLER, SEPARATOR, END = 0, 1, 2
SYMBOLS = 3  # the first id that means something
DIGITS = 10
NEEDLE = 4  # tokens of a needle
NUMBER = 4  # digits of a phone number
NAME = 2  # tokens of a name
ATTRIBUTES = 8  # of a page
LONGEST_VALUE = 4  # tokens
STEM = REST = 4  # tokens of a sentence that are asked with, and for
TOKENS_A_PAIR = 16  # of a row, for each key and value that it holds
POWER = 0.01  # of the law by which queries follow their pairs
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)  # where needles lie, row by row: 0 is the beginning

Ids = NDArray[np.int64]


class Row(NamedTuple):
    """tokens, targets (T,) int64 and weights (T,) float32, 1 where an answer is predicted."""

    tokens: Ids
    targets: Ids
    weights: NDArray[np.float32]


def depth_of(index: int) -> float:
    """Where the needle of item `index` lies."""
    return DEPTHS[index % len(DEPTHS)]


def copy(rng: Generator, index: int, length: int, vocab_size: int) -> Row:
    """SEPARATOR x1 .. xn SEPARATOR x1 .. xn; all of the second half is asked for."""
    _require("probe_copy", length, 5, vocab_size, SYMBOLS + 2)
    text = _symbols(rng, vocab_size, (length - 1) // 2)
    return _row([[SEPARATOR], text, [SEPARATOR], text], len(text), length)


def mqar(rng: Generator, index: int, length: int, vocab_size: int) -> Row:
    """k1 v1 .. kn vn, then each key once more at a random place, where its value is to be predicted.

    Keys come from the lower half of the ids, values from the upper. The value does not follow its query in the input;
    between queries stand ids that are no key of the row. The gaps follow a power law, as in the source.
    """
    pairs = max(1, length // TOKENS_A_PAIR)
    half = vocab_size // 2
    _require("probe_mqar", length, 8, vocab_size, 2 * (pairs + 2))
    keys = 1 + rng.choice(half - 1, pairs, replace=False)
    values = half + rng.choice(vocab_size - half, pairs, replace=False)
    noise = np.setdiff1d(np.arange(1, vocab_size), keys)
    tokens = noise[rng.integers(len(noise), size=length)]
    tokens[: 2 * pairs] = np.stack([keys, values], 1).ravel()
    space = (length - 2 * pairs) // 2
    chances = np.arange(1, space + 1) ** (POWER - 1)
    places = 2 * pairs + 2 * rng.choice(space, pairs, replace=False, p=chances / chances.sum())
    tokens[places] = keys
    targets, weights = np.full(length, FILLER), np.zeros(length, np.float32)
    targets[places], weights[places] = values, 1
    return Row(tokens, targets, weights)


def needle(rng: Generator, index: int, length: int, vocab_size: int) -> Row:
    """Random ids with SEPARATOR v1 .. v4 among them; at the end SEPARATOR again, and v1 .. v4 is asked for."""
    _require("probe_needle", length, 2 * NEEDLE + 4, vocab_size, SYMBOLS + 2)
    value = _symbols(rng, vocab_size, NEEDLE)
    hay = _symbols(rng, vocab_size, length + 1 - 2 * (1 + NEEDLE))
    place = round(depth_of(index) * len(hay))
    return _row([hay[:place], [SEPARATOR], value, hay[place:], [SEPARATOR], value], NEEDLE, length)


def phonebook(rng: Generator, index: int, length: int, vocab_size: int) -> Row:
    """Entries of two name ids, SEPARATOR and four of ten digit ids; one name again, and its number is asked for."""
    entry = NAME + 1 + NUMBER
    _require("probe_phonebook", length, 3 * entry, vocab_size, SYMBOLS + DIGITS + 2)
    count = (length + 1) // entry - 1
    names = SYMBOLS + DIGITS + _distinct(rng, count, vocab_size - SYMBOLS - DIGITS, NAME, "probe_phonebook")
    numbers = SYMBOLS + rng.integers(DIGITS, size=(count, NUMBER))
    book = np.concatenate([names, np.full((count, 1), SEPARATOR), numbers], 1)
    return _row([book.ravel(), book[rng.integers(count)]], NUMBER, length)


def swde(rng: Generator, index: int, length: int, vocab_size: int) -> Row:
    """A page of lines `attribute SEPARATOR value.. END` with prose between them; one attribute again, for its value."""
    line = 2 + LONGEST_VALUE + 1
    _require("probe_swde", length, 3 * line, vocab_size, SYMBOLS + ATTRIBUTES + 2)
    count = min(ATTRIBUTES, (length + 1) // line - 1)
    attributes = SYMBOLS + rng.permutation(ATTRIBUTES)[:count]
    sizes = rng.integers(1, LONGEST_VALUE + 1, size=count)
    lines = [[a, SEPARATOR, *_symbols(rng, vocab_size, n, ATTRIBUTES), END] for a, n in zip(attributes, sizes)]
    asked = lines[rng.integers(count)]
    prose = _symbols(rng, vocab_size, length + 1 - len(asked) - sum(map(len, lines)), ATTRIBUTES)
    borders = np.sort(rng.integers(len(prose) + 1, size=count))
    parts = [piece for pair in zip(np.split(prose, borders), lines) for piece in pair]
    return _row([*parts, prose[borders[-1] :], asked], len(asked) - 2, length)


def squad(rng: Generator, index: int, length: int, vocab_size: int) -> Row:
    """Sentences of eight ids and END, no two beginning alike; the beginning of one again, for its completion."""
    sentence = STEM + REST + 1
    _require("probe_squad", length, 3 * sentence, vocab_size, SYMBOLS + 4)
    count = (length + 1) // sentence - 1
    stems = SYMBOLS + _distinct(rng, count, vocab_size - SYMBOLS, STEM, "probe_squad")
    rests = _symbols(rng, vocab_size, count * REST).reshape(count, REST)
    passage = np.concatenate([stems, rests, np.full((count, 1), END)], 1)
    return _row([passage.ravel(), passage[rng.integers(count)]], REST + 1, length)


# ---- parts


def _row(parts: list, answer: int, length: int) -> Row:
    """Parts as inputs and next-token targets of `length` tokens, filled up in front; the last `answer` have weight."""
    sequence = np.concatenate([np.asarray(part, np.int64) for part in parts])
    sequence = np.concatenate([np.full(length + 1 - len(sequence), FILLER), sequence])
    weights = np.zeros(length, np.float32)
    weights[length - answer :] = 1
    return Row(sequence[:-1], sequence[1:], weights)


def _symbols(rng: Generator, vocab_size: int, count: int, taken: int = 0) -> Ids:
    return rng.integers(SYMBOLS + taken, vocab_size, size=count)


def _distinct(rng: Generator, count: int, symbols: int, width: int, name: str) -> Ids:
    """Rows (count, width) of numbers below `symbols`, no two equal."""
    if symbols**width < count:
        raise HalflapError(
            f"{name} needs {count} different keys of {width} ids, and {symbols} ids make {symbols**width}; "
            "use a larger vocabulary or shorter rows"
        )
    rows = np.zeros((0, width), np.int64)
    while len(rows) < count:
        rows = np.concatenate([rows, rng.integers(symbols, size=(count - len(rows), width))])
        rows = rows[np.sort(np.unique(rows, axis=0, return_index=True)[1])]
    return rows


def _require(name: str, length: int, least: int, vocab_size: int, fewest: int) -> None:
    if length < least:
        raise HalflapError(f"{name} is asked for {length} tokens; it takes at least {least}: give a larger length")
    if vocab_size < fewest:
        raise HalflapError(
            f"{name} of {length} tokens is asked for {vocab_size} ids; it takes at least {fewest}: "
            "use a larger vocabulary or shorter rows"
        )
