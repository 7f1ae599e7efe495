"""Text probes as token ids of an exact length: as many parts as fit, and prose in front for the tokens that are left.

`length` counts all that the model gets to read: what the tokenizer puts before every text, the prose, the page, the
question and the answer, or the room for one that is written freely.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from halflap.data.tokenizer import Tokenizer
from halflap.errors import HalflapError
from halflap.evaluate.probe_texts import Page, prose
from halflap.evaluate.probes import PROBES, generator

WRITTEN = 48  # tokens of a free answer at most
FILLING, SENTENCES = " filling", 8  # the generator's name beside the probe's; sentences added at once
STEP, ESTIMATES = 8, 2  # parts by which the tokens of one part are first found out; how often they are


class Candidate(NamedTuple):
    """Tokens after the page: the question and an answer, of which the last `scored` are the answer's."""

    tokens: list[int]
    scored: int


class Asked(NamedTuple):
    """A question in ids: the prompt's tokens after the page, the right answer first among the candidates, its text."""

    given: list[int]
    candidates: list[Candidate]
    answer: str


class Prompt(NamedTuple):
    page: list[int]
    questions: list[Asked]


def text_prompt(name: str, seed: int, index: int, length: int, tokenizer: Tokenizer) -> Prompt:
    """Item `index` of a probe, `length` tokens long; raises HalflapError when its smallest form is longer."""
    probe = PROBES[name]
    room = length - len(tokenizer.prefix_ids)

    def page_of(size: int) -> Page:
        return probe.text(generator(name, seed, index), size, index)

    def encoded(size: int) -> tuple[Prompt, int]:
        prompt = _encode(page_of(size), tokenizer)
        return prompt, len(prompt.page) + max(map(tokens_after, prompt.questions))

    def tokens_after(question: Asked) -> int:
        longest = max(len(candidate.tokens) for candidate in question.candidates)
        return max(longest, len(question.given) + WRITTEN) if probe.open else longest

    prompt, needed = _largest(encoded, probe.least, room)
    if needed > room:
        raise HalflapError(
            f"{name} takes at least {needed + length - room} tokens with this tokenizer and is asked for {length}; "
            "give a larger --probes.length"
        )
    filling = _filling(name, seed, index, room - needed, tokenizer)
    return Prompt([*tokenizer.prefix_ids, *filling, *prompt.page], prompt.questions)


def _largest(encoded: Callable[[int], tuple[Prompt, int]], least: int, room: int) -> tuple[Prompt, int]:
    """About the most parts that take at most `room` tokens; `least` parts where not even those fit."""
    prompt, needed = encoded(least)
    size = least + STEP
    for _ in range(ESTIMATES):  # of the tokens of one part, each from a page nearer to the right size
        each = max(1.0, (encoded(size)[1] - needed) / (size - least))
        size = max(least + 1, least + int((room - needed) / each))
    while size > least:
        found, tokens = encoded(size)
        if tokens <= room:
            return found, tokens
        size -= max(1, int((tokens - room) / each))
    return prompt, needed


def _encode(page: Page, tokenizer: Tokenizer) -> Prompt:
    """Ids of a page and its questions, split where the tokens of the longer text begin to differ."""
    begun = [page.text + question.given for question in page.questions]
    ended = [[start + a for a in (q.answer, *q.others)] for start, q in zip(begun, page.questions)]
    ids = iter(tokenizer.encode_batch([page.text, *begun, *(text for texts in ended for text in texts)]))
    start, starts = next(ids), [next(ids) for _ in begun]
    start = start[: min(_shared(start, tokens) for tokens in starts)]
    questions = []
    for question, given, texts in zip(page.questions, starts, ended):
        wholes = [next(ids) for _ in texts]
        found = [Candidate(whole[len(start) :], len(whole) - _shared(given, whole)) for whole in wholes]
        questions.append(Asked(given[len(start) :], found, question.answer.strip()))
    return Prompt(start, questions)


def _shared(first: list[int], second: list[int]) -> int:
    """How many tokens both begin with."""
    return next((i for i, (a, b) in enumerate(zip(first, second)) if a != b), min(len(first), len(second)))


def _filling(name: str, seed: int, index: int, count: int, tokenizer: Tokenizer) -> list[int]:
    """The last `count` tokens of some prose and a blank line."""
    rng, sentences, ids = generator(name + FILLING, seed, index), [], []
    while len(ids) < count:
        sentences += prose(rng, max(SENTENCES, len(sentences)))
        ids = tokenizer.encode(" ".join(sentences) + "\n\n", parse_special=False)
    return ids[len(ids) - count :]
