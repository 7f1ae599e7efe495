"""Recall tasks as text, for models that read text: a page, and questions to it whose answers stand in it once.

Made from plain words, digits and names by a seeded generator; no tokenizer here. A page of `size` parts is followed by
a question's `given`, after which the answer is to be written. `others` are wrong answers of the same kind, which stand
in the page as often as the right one does, so that repeating at random gets chance (the needle's are new numbers).

Sources: Jelassi et al. 2024 (copying, phone book with two examples); Arora et al. 2023 (many pairs, many queries);
the needle in a haystack of Kamradt 2023; the completion form of SWDE and SQuAD of Arora et al. 2024, "Based".
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from numpy.random import Generator

from halflap.evaluate import probe_words as words
from halflap.evaluate.probe_ids import depth_of

CANDIDATES = 8  # the right answer and at most seven others
SPAN = 5  # words of a copy that are asked for
QUERIES = 4  # of a list of pairs
EXAMPLES = 2  # shown before the question to a phone book
NAMED = ("Maker", "Owner", "Designer")
PLACED = ("Origin", "Depot", "Showroom")
NUMBERED = ("Model", "Serial", "Stock")


class Question(NamedTuple):
    """What follows the page, the right answer (with its leading space) and wrong ones."""

    given: str
    answer: str
    others: tuple[str, ...]


class Page(NamedTuple):
    text: str
    questions: tuple[Question, ...]


def copy(rng: Generator, size: int, index: int) -> Page:
    """`size` words, and the same again but for the last five; wrong answers are those five in another order."""
    pool = (*words.ADJECTIVES, *words.OBJECTS, *words.VALUES)
    text = [pool[i] for i in rng.integers(len(pool), size=size)]
    again, last = " ".join(text[: -SPAN - 1]), f" {text[-SPAN - 1]}"
    orders = [" " + " ".join(order) for order in itertools.permutations(text[-SPAN:])]
    return Page(f"{' '.join(text)}\n\n{again}", (_question(rng, last, orders[0], orders),))


def mqar(rng: Generator, size: int, index: int) -> Page:
    """`size` lines `grey lamp: copper`, each key once; four of the keys are asked for, each after the list."""
    keys = _pairs(rng, size, words.ADJECTIVES, words.OBJECTS)
    values = [words.VALUES[i] for i in rng.integers(len(words.VALUES), size=len(keys))]
    asked = rng.choice(len(keys), min(QUERIES, len(keys)), replace=False)
    wrong = [f" {value}" for value in values]
    questions = tuple(_question(rng, f"{keys[i]}:", f" {values[i]}", wrong) for i in asked)
    return Page(_lines(f"{key}: {value}" for key, value in zip(keys, values)), questions)


def needle(rng: Generator, size: int, index: int) -> Page:
    """`size` sentences of prose, and one with a number of seven digits among them, as deep as `index` says."""
    sentences = prose(rng, size)
    given = f"The secret number of {words.PLACES[rng.integers(len(words.PLACES))]} is"
    right, *wrong = (f" {number}" for number in rng.choice(9_000_000, CANDIDATES, replace=False) + 1_000_000)
    sentences.insert(round(depth_of(index) * size), f"{given}{right}.")
    return Page(" ".join(sentences) + "\n\n", (_question(rng, given, right, wrong),))


def phonebook(rng: Generator, size: int, index: int) -> Page:
    """`size` lines `Rosa Hughes: 483-9201`, two of them again as examples; a third name is asked for."""
    names = _pairs(rng, size, words.FIRST_NAMES, words.LAST_NAMES)
    numbers = [f" {n // 10_000}-{n % 10_000:04}" for n in rng.choice(9_000_000, len(names), replace=False) + 1_000_000]
    lines = [f"{name}:{number}" for name, number in zip(names, numbers)]
    *shown, asked = rng.choice(len(names), EXAMPLES + 1, replace=False)
    book = _lines(lines) + "\n" + _lines(lines[i] for i in shown)
    wrong = [number for i, number in enumerate(numbers) if i not in shown]  # what stands there twice is no fair choice
    return Page(book, (_question(rng, f"{names[asked]}:", numbers[asked], wrong),))


def swde(rng: Generator, size: int, index: int) -> Page:
    """A page on one thing: nine lines `Maker: Rosa Hughes` between `size` sentences; one line's value is asked for."""
    people = _pairs(rng, len(NAMED), words.FIRST_NAMES, words.LAST_NAMES)
    places = [words.PLACES[i] for i in rng.choice(len(words.PLACES), len(PLACED), replace=False)]
    numbers = [str(number) for number in rng.choice(9000, len(NUMBERED), replace=False) + 1000]
    values: dict[str, str] = dict(zip((*NAMED, *PLACED, *NUMBERED), (*people, *places, *numbers)))
    title = _pairs(rng, 1, words.ADJECTIVES, words.OBJECTS)[0]
    lines = prose(rng, size)
    for attribute in rng.permutation(list(values)):
        lines.insert(rng.integers(len(lines) + 1), f"{attribute}: {values[attribute]}")
    asked = str(rng.choice(list(values)))
    alike = next(kind for kind in (NAMED, PLACED, NUMBERED) if asked in kind)
    question = _question(rng, f"{asked}:", f" {values[asked]}", [f" {values[name]}" for name in alike])
    return Page(f"The {title}\n" + _lines(lines) + "\n", (question,))


def squad(rng: Generator, size: int, index: int) -> Page:
    """`size` sentences on who did what; one is asked for the other way round, its name last."""
    people = _pairs(rng, size, words.FIRST_NAMES, words.LAST_NAMES)
    things = _pairs(rng, len(people), words.ADJECTIVES, words.OBJECTS)
    people = people[: len(things)]
    places = [words.PLACES[i] for i in rng.integers(len(words.PLACES), size=len(things))]
    deeds = [words.ACTIONS[i] for i in rng.integers(len(words.ACTIONS), size=len(things))]
    told = [f"In {at}, {who} has {did} the {what}." for at, who, did, what in zip(places, people, deeds, things)]
    asked = rng.integers(len(things))
    given = f"In {places[asked]}, the {things[asked]} was {deeds[asked]} by"
    question = _question(rng, given, f" {people[asked]}", [f" {name}" for name in people])
    return Page(" ".join(told) + "\n\n", (question,))


def prose(rng: Generator, size: int) -> list[str]:
    """`size` plain sentences that hold nothing of what is asked for."""
    lists = (words.QUALITIES, words.THINGS, words.DEEDS, words.QUALITIES, words.THINGS, words.MANNERS)
    drawn = zip(*([words_[i] for i in rng.integers(len(words_), size=size)] for words_ in lists))
    return ["The {} {} {} the {} {} {}.".format(*chosen) for chosen in drawn]


def _question(rng: Generator, given: str, answer: str, wrong: Sequence[str]) -> Question:
    """With up to seven different wrong answers, in random order."""
    different = sorted(set(wrong) - {answer})
    chosen = rng.permutation(len(different))[: CANDIDATES - 1]
    return Question(given, answer, tuple(different[i] for i in chosen))


def _pairs(rng: Generator, count: int, first: Sequence[str], second: Sequence[str]) -> list[str]:
    """At most `count` different pairs of words: there may not be as many."""
    total = len(first) * len(second)
    chosen = rng.choice(total, min(count, total), replace=False)
    return [f"{first[i // len(second)]} {second[i % len(second)]}" for i in chosen]


def _lines(lines: Iterable[str]) -> str:
    return "".join(f"{line}\n" for line in lines)
