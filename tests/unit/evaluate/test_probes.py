"""Probes as data: the same item for the same seed and index, exact lengths, one right answer, found in the row."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from halflap.data.tokenizer import Tokenizer, train_tokenizer
from halflap.errors import HalflapError
from halflap.evaluate import probe_words
from halflap.evaluate.probe_ids import DEPTHS, END, FILLER, SEPARATOR
from halflap.evaluate.probe_prompts import WRITTEN, text_prompt
from halflap.evaluate.probe_texts import CANDIDATES, Page
from halflap.evaluate.probes import PROBES, generator, is_probe, probe_batch, probe_names

LENGTHS = (32, 63, 64, 200)


def page(name: str, seed: int, index: int, size: int) -> Page:
    return PROBES[name].text(generator(name, seed, index), size, index)


def test_names() -> None:
    assert probe_names(["probes"]) == list(PROBES) == probe_names([*PROBES, "probes"])
    assert probe_names(["probe_swde", "probe_copy"]) == ["probe_swde", "probe_copy"]
    assert is_probe("probe_swd") and not is_probe("lambada_local")
    with pytest.raises(HalflapError, match=r"'probe_nedle' is not known; did you mean 'probe_needle'"):
        probe_names(["probe_nedle"])


# ---- ids


@pytest.mark.parametrize("name", PROBES)
def test_batches_are_functions_of_seed_and_index(name: str) -> None:
    batch = probe_batch(name, 3, 2, 64, 100, rows=4)
    again = probe_batch(name, 3, 2, 64, 100, rows=4)
    rows = [probe_batch(name, 3, index, 64, 100) for index in range(8, 12)]
    for part in ("tokens", "targets", "weights"):
        assert torch.equal(getattr(batch, part), getattr(again, part))
        assert torch.equal(getattr(batch, part), torch.cat([getattr(row, part) for row in rows]))
    for other in (probe_batch(name, 4, 2, 64, 100, rows=4), probe_batch(name, 3, 3, 64, 100, rows=4)):
        assert not torch.equal(batch.tokens, other.tokens)
    assert len({tuple(row) for row in batch.tokens.tolist()}) == 4


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("name", PROBES)
def test_rows_have_exactly_the_length_and_ids_of_the_vocabulary(name: str, length: int) -> None:
    batch = probe_batch(name, 0, 0, length, 50, rows=6)
    assert batch.tokens.shape == batch.targets.shape == batch.weights.shape == (6, length)
    assert (batch.tokens.dtype, batch.targets.dtype, batch.weights.dtype) == (torch.int64, torch.int64, torch.float32)
    for ids in (batch.tokens, batch.targets):
        assert 0 <= int(ids.min()) and int(ids.max()) < 50
    assert ((batch.weights == 0) | (batch.weights == 1)).all() and (batch.weights.sum(1) > 0).all()
    if name != "probe_mqar":  # what is asked for is what is read next
        assert torch.equal(batch.tokens[:, 1:], batch.targets[:, :-1]) and (batch.weights[:, -1] == 1).all()


def test_ids_hold_what_they_ask_for_once() -> None:
    for row in range(6):
        asked = {name: probe_batch(name, 1, row, 128, 60) for name in PROBES}
        tokens = {name: batch.tokens[0].tolist() for name, batch in asked.items()}
        answers = {name: batch.targets[batch.weights > 0].tolist() for name, batch in asked.items()}
        assert answers["probe_copy"] == tokens["probe_copy"][2:65] and tokens["probe_copy"][65] == SEPARATOR

        marks = [place for place, token in enumerate(tokens["probe_needle"]) if token == SEPARATOR]
        assert len(marks) == 2 and tokens["probe_needle"][marks[0] + 1 :][:4] == answers["probe_needle"]
        assert marks[0] == round(DEPTHS[row % len(DEPTHS)] * 119)

        queries = (asked["probe_mqar"].weights[0] > 0).nonzero()[:, 0].tolist()
        keys, values = tokens["probe_mqar"][:16:2], tokens["probe_mqar"][1:16:2]
        assert len(set(keys)) == len(set(values)) == len(queries) == 8 and min(queries) >= 16
        assert [values[keys.index(tokens["probe_mqar"][q])] for q in queries] == answers["probe_mqar"]
        assert sum(token in keys for token in tokens["probe_mqar"]) == 16

        for name, key in (("probe_phonebook", 3), ("probe_swde", 2), ("probe_squad", 4)):
            whole, answer = [*tokens[name], END], answers[name]
            start = len(tokens[name]) + 1 - len(answer) - key
            stem = whole[start : start + key]
            found = [i for i in range(start - key) if whole[i : i + key] == stem]
            assert len(found) == 1 and whole[found[0] + key :][: len(answer)] == answer, name
        assert FILLER not in answers["probe_swde"]


@pytest.mark.parametrize(
    ("name", "length", "vocab", "message"),
    [
        ("probe_copy", 4, 50, "asked for 4 tokens; it takes at least 5"),
        ("probe_swde", 20, 50, "takes at least 21"),
        ("probe_mqar", 512, 32, "asked for 32 ids; it takes at least 68"),
        ("probe_phonebook", 64, 14, "takes at least 15"),
        ("probe_phonebook", 640, 15, "90 different keys of 2 ids, and 2 ids make 4; use a larger vocabulary"),
        ("probe_copi", 64, 50, "did you mean 'probe_copy'"),
    ],
)
def test_what_a_probe_cannot_be(name: str, length: int, vocab: int, message: str) -> None:
    with pytest.raises(HalflapError, match=message):
        probe_batch(name, 0, 0, length, vocab)


def test_wrong_counts() -> None:
    with pytest.raises(HalflapError, match="seed, index and rows are -1, 0 and 1"):
        probe_batch("probe_copy", -1, 0, 64, 50)


# ---- text


def test_words_stand_in_one_list() -> None:
    lists = [value for value in vars(probe_words).values() if isinstance(value, tuple)]
    found = [word for words in lists for word in words]
    assert len(found) == len(set(found)) and len(lists) == 11


@pytest.mark.parametrize("size", [8, 40])
@pytest.mark.parametrize("name", PROBES)
def test_pages_answer_their_questions_once(name: str, size: int) -> None:
    for index in range(5):
        made = page(name, 7, index, size)
        assert made == page(name, 7, index, size) != page(name, 8, index, size)
        assert len(made.questions) == (4 if name == "probe_mqar" else 1)
        for question in made.questions:
            assert 2 <= len(question.others) < CANDIDATES and question.answer not in question.others
            assert len(set(question.others)) == len(question.others)
            assert made.text.count(question.answer) >= 1 and question.answer.startswith(" ")
            if name == "probe_squad":
                place, what, deed = re.fullmatch(r"In (\w+), the (.+) was (\w+) by", question.given).groups()  # type: ignore[union-attr]
                told = f"In {place},{question.answer} has {deed} the {what}."
                assert made.text.count(told) == 1 and made.text.count(f"the {what}.") == 1
            elif name != "probe_copy":
                assert made.text.count(question.given) == made.text.count(question.given + question.answer) == 1
            if name == "probe_copy":
                assert all(sorted(other.split()) == sorted(question.answer.split()) for other in question.others)
            elif name != "probe_needle":
                counts = {made.text.count(choice) for choice in (question.answer, *question.others)}
                assert counts == {1} if name in ("probe_phonebook", "probe_squad", "probe_swde") else min(counts) >= 1


def test_needles_lie_as_deep_as_they_should() -> None:
    for index, depth in enumerate(DEPTHS):
        text = page("probe_needle", 0, index, 40).text
        sentences = text.strip().split(". ")
        assert next(i for i, sentence in enumerate(sentences) if "secret" in sentence) == round(40 * depth)


def test_more_parts_than_there_are_words_for() -> None:
    for name, most in (("probe_mqar", 40 * 74), ("probe_phonebook", 85 * 88), ("probe_squad", 40 * 74)):
        text = page(name, 0, 0, 9000).text
        assert text.count(". In" if name == "probe_squad" else ": ") + (name == "probe_squad") in (most, most + 2)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    text = " ".join(page(name, 0, index, 30).text for name in PROBES for index in range(3))
    return train_tokenizer([text], 600, progress=False)


@pytest.mark.parametrize("length", [300, 301, 900])
@pytest.mark.parametrize("name", PROBES)
def test_prompts_are_exactly_as_long_as_asked(name: str, length: int, tokenizer: Tokenizer) -> None:
    for index in range(2):
        prompt = text_prompt(name, 5, index, length, tokenizer)
        assert prompt == text_prompt(name, 5, index, length, tokenizer)
        read = [len(c.tokens) for question in prompt.questions for c in question.candidates]
        room = [len(question.given) + WRITTEN for question in prompt.questions] if PROBES[name].open else []
        assert len(prompt.page) + max(read + room) == length
        for question in prompt.questions:
            for candidate in question.candidates:
                assert candidate.tokens[: -candidate.scored] == question.given
            right = question.candidates[0]
            assert tokenizer.decode(right.tokens[-right.scored :]).strip() == question.answer
            whole = tokenizer.decode([*prompt.page, *right.tokens])
            made = whole[: -len(question.answer)].rstrip()
            assert made.endswith(tokenizer.decode(question.given)) and question.answer in made


def test_most_of_a_prompt_is_the_probe(tokenizer: Tokenizer) -> None:
    for name in PROBES:
        text = tokenizer.decode(text_prompt(name, 0, 0, 900, tokenizer).page)
        filled = text.rpartition(".\n\n")[0] if name in ("probe_copy", "probe_mqar", "probe_phonebook") else ""
        assert len(filled) < len(text) / 5, name


def test_a_prompt_that_does_not_fit(tokenizer: Tokenizer) -> None:
    with pytest.raises(
        HalflapError, match=r"probe_swde takes at least \d+ tokens with this tokenizer and is asked for 64"
    ):
        text_prompt("probe_swde", 0, 0, 64, tokenizer)


def test_depths_are_shared_by_both_forms() -> None:
    found = np.array(
        [probe_batch("probe_needle", 0, i, 128, 50).tokens[0].tolist().index(SEPARATOR) for i in range(10)]
    )
    assert (np.diff(found[:5]) > 20).all() and (found[:5] == found[5:]).all()
