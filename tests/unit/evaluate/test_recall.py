"""Asking probes: a model that looks things up is always right, one that knows nothing gets chance, and one learns."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from halflap.data.tokenizer import Tokenizer, train_tokenizer
from halflap.errors import HalflapError
from halflap.evaluate.probe_prompts import text_prompt
from halflap.evaluate.probes import PROBES, generator, probe_batch
from halflap.evaluate.recall import ask_ids, ask_text, probe_lengths, run_probes, summary, wilson
from halflap.inference.answers import score_answers
from halflap.models.cache import Cache
from halflap.models.config import AttentionConfig, MLPConfig, ModelConfig, RopeConfig
from halflap.models.model import HybridModel, initialize
from halflap.models.presets import preset
from halflap.train.config import Fit
from halflap.train.fit import fit
from halflap.train.objectives.language import NextToken

SURE = 20.0  # logit of a certain prediction


class Lookup:
    """A model made by hand: after each token it expects what followed where most of the text before was the same.

    The tokens read are kept as the keys of a cache's only block, so that a real Cache can repeat and reorder them.
    `knows=False` makes it expect everything alike.
    """

    def __init__(self, vocab_size: int, knows: bool = True) -> None:
        self.config = ModelConfig("llama", vocab_size, vocab_size, (AttentionConfig(1, 1, 1),))
        self.more_ends: tuple[int, ...] = ()
        self.head = torch.eye(vocab_size)
        self.dtype, self.device = torch.float32, torch.device("cpu")
        self.knows = knows

    def logits(self, hidden: Tensor) -> Tensor:
        return hidden @ self.head

    def hidden_states(self, tokens: Tensor, *, cache: Cache | None = None, lengths: Tensor | None = None) -> Tensor:
        hidden = torch.zeros(*tokens.shape, self.config.vocab_size)
        for row in range(len(tokens)):
            new = tokens[row] if lengths is None else tokens[row, : lengths[row]]
            before = self._remember(cache, row, new) if cache is not None else []
            if self.knows:
                for place, token in self._expected([*before, *new.tolist()], len(before)):
                    hidden[row, place, token] = SURE
        return hidden

    def __call__(self, tokens: Tensor, *, cache: Cache, lengths: Tensor | None = None) -> Tensor:
        return self.hidden_states(tokens, cache=cache, lengths=lengths)

    @staticmethod
    def _remember(cache: Cache, row: int, new: Tensor) -> list[int]:
        state: Any = cache.blocks[0]
        start, end = int(cache.lengths[row]), int(cache.lengths[row]) + len(new)
        if end > state.keys.shape[2]:
            state.keys = torch.nn.functional.pad(state.keys, (0, 0, 0, end - state.keys.shape[2]))
        before = state.keys[row, 0, :start, 0].long().tolist()
        state.keys[row, 0, start:end, 0] = new.float()
        cache.lengths[row] = end
        return before

    @staticmethod
    def _expected(text: list[int], first: int) -> list[tuple[int, int]]:
        """(place among the new, token expected there), from the longest earlier match of what ends there."""
        ids = np.array(text)
        shared = np.zeros(len(ids), int)  # tokens that the text up to each earlier place and up to here have in common
        found = []
        for here in range(len(ids)):
            shared = np.where(ids == ids[here], np.concatenate([[0], shared[:-1]]) + 1, 0)
            if here >= first and here and shared[:here].max() > 0:
                found.append((here - first, int(ids[shared[:here].argmax() + 1])))
        return found


class Setup(NamedTuple):
    tokenizer: Tokenizer
    lookup: Any
    blank: Any


@pytest.fixture(scope="module")
def setup() -> Setup:
    pages = [PROBES[name].text(generator(name, 0, i), 30, i).text for name in PROBES for i in range(2)]
    tokenizer = train_tokenizer([" ".join(pages)], 500, progress=False)
    return Setup(tokenizer, Lookup(tokenizer.vocab_size), Lookup(tokenizer.vocab_size, knows=False))


@pytest.mark.parametrize("name", PROBES)
def test_looking_up_ids_is_always_right(name: str) -> None:
    looked = summary(ask_ids(Lookup(60), name, 100, 12, seed=1, batch_tokens=500))  # type: ignore[arg-type]
    assert looked["acc"] == looked["token_acc"] == 1 and looked["loss"] < 1e-3 and looked["items"] == 12
    blank = summary(ask_ids(Lookup(60, knows=False), name, 100, 12, seed=1))  # type: ignore[arg-type]
    assert blank["acc"] < 0.1 and blank["loss"] == pytest.approx(math.log(60))


@pytest.mark.parametrize("name", [name for name in PROBES if name != "probe_squad"])  # the other way round: no lookup
def test_looking_up_text_is_always_right(name: str, setup: Setup) -> None:
    looked = summary(ask_text(setup.lookup, setup.tokenizer, name, 330, 5, seed=1))
    assert looked["acc"] == looked["choice_acc"] == 1 and looked["loss"] < 0.01


@pytest.mark.parametrize("name", PROBES)
def test_knowing_nothing_gets_chance(name: str, setup: Setup) -> None:
    found = summary(ask_text(setup.blank, setup.tokenizer, name, 330, 80, seed=2))
    assert found["acc"] == 0 and found["loss"] == pytest.approx(math.log(setup.tokenizer.vocab_size), rel=1e-5)
    low, high = found["choice_acc_interval"]
    assert low < found["chance"] < high and found["chance"] <= 1 / 3


def test_the_table_of_results(setup: Setup) -> None:
    rows: list[dict[str, Any]] = []
    names = ["probe_needle", "probe_mqar"]
    settings: dict[str, Any] = {"lengths": (330, 300), "limit": 5, "seed": 4}
    found = run_probes(setup.lookup, setup.tokenizer, names, **settings, log=rows.append)
    one_by_one = run_probes(setup.lookup, setup.tokenizer, names[:1], **settings, batch_size=1)
    assert found["probe_needle"] == one_by_one["probe_needle"]
    assert list(found) == names and found["probe_mqar"]["form"] == "text"
    needle = found["probe_needle"]
    assert needle["items"] == 10 and [cell["length"] for cell in needle["by_length"]] == [300, 330]
    assert [(cell["length"], cell["depth"], cell["items"]) for cell in needle["by_depth"]] == [
        (length, depth, 1) for length in (300, 330) for depth in (0.0, 0.25, 0.5, 0.75, 1.0)
    ]
    assert needle["acc"] == 1 and needle["acc_stderr"] == 0 and needle["by_length"][0]["acc_interval"][0] > 0.5
    assert "by_depth" not in found["probe_mqar"]
    assert [(row["task"], row["length"]) for row in rows] == [(n, length) for n in names for length in (300, 330)]


@pytest.mark.parametrize("name", ["nemotron-h-tiny", "llama-tiny"])
def test_a_real_model_is_asked_as_a_plain_pass_would(name: str, setup: Setup) -> None:
    """Shared readings, answers behind their questions and small batches change nothing but rounding."""
    model = HybridModel(dataclasses.replace(preset(name), vocab_size=setup.tokenizer.vocab_size)).double().eval()
    initialize(model, 1)
    prompt = text_prompt("probe_mqar", 3, 0, 300, setup.tokenizer)
    candidates = [candidate for question in prompt.questions for candidate in question.candidates]
    pairs, scored = [(prompt.page, c.tokens) for c in candidates], [c.scored for c in candidates]
    found = {size: score_answers(model, pairs, scored=scored, batch_tokens=size) for size in (1, 1000, 10**6)}
    for index, candidate in enumerate(candidates):
        tokens = torch.tensor([[*prompt.page, *candidate.tokens]])
        with torch.inference_mode():
            log_probs = model(tokens)[0, :-1].log_softmax(-1).gather(1, tokens[0, 1:, None])[-candidate.scored :]
        for answers in found.values():
            assert answers[index].log_prob == pytest.approx(float(log_probs.sum()), abs=1e-6)


def test_wilson() -> None:
    assert wilson(0.5, 100) == pytest.approx([0.4038, 0.5962], abs=1e-4)
    assert wilson(1.0, 10) == pytest.approx([0.7225, 1.0], abs=1e-4)
    assert wilson(0.0, 10) == pytest.approx([0.0, 0.2775], abs=1e-4)


def rotary(positions: int) -> ModelConfig:
    attention = AttentionConfig(2, 2, 8, rope=RopeConfig())
    return ModelConfig("llama", 64, 16, (attention,), max_position_embeddings=positions)


def test_lengths() -> None:
    assert probe_lengths(rotary(8192)) == (256, 512, 1024, 2048)
    assert probe_lengths(rotary(600)) == (256, 512) and probe_lengths(rotary(100)) == (100,)
    assert probe_lengths(rotary(8192), (4096, 64, 64)) == (64, 4096)
    assert probe_lengths(rotary(8192), context=512) == (256, 512)
    with pytest.raises(HalflapError, match=r"the longest probe takes 601 positions, .* embedding has 600"):
        probe_lengths(rotary(600), (256, 601))
    with pytest.raises(HalflapError, match="a probe of 512 tokens does not fit the context of 256"):
        probe_lengths(rotary(600), (512,), context=256)


def test_broken_weights_are_said(setup: Setup) -> None:
    setup.blank.head = setup.blank.head * torch.nan
    try:
        for ask in (
            lambda: ask_text(setup.blank, setup.tokenizer, "probe_needle", 330, 1, seed=0),
            lambda: ask_ids(setup.blank, "probe_needle", 64, 1, seed=0),
        ):
            with pytest.raises(HalflapError, match="not a number"):
                ask()
    finally:
        setup.blank.head = torch.eye(setup.tokenizer.vocab_size)


# ---- models that learn


def learnt(name: str, length: int, vocab_size: int, steps: int, rate: float = 3e-3) -> tuple[float, float]:
    """Share of answers right before and after training a small model on the probe, asked with another seed."""
    attention = AttentionConfig(4, 4, 16, rope=RopeConfig())
    model = HybridModel(ModelConfig("llama", vocab_size, 64, (attention, MLPConfig(128, gated=True)) * 2))
    initialize(model, 0)

    def asked() -> float:
        model.eval()
        return summary(ask_ids(model, name, length, 64, seed=10**6))["token_acc"]

    before, rows = asked(), 32
    settings = Fit(batch_size=rows, sequence_length=length, learning_rate=rate, weight_decay=0.0)
    batches: Callable[[int], Any] = lambda step: probe_batch(name, 0, step, length, vocab_size, rows=rows)
    tokens = steps * int((batches(0).weights > 0).sum())
    fit(model, NextToken(), batches, settings, tokens=tokens, progress=False)
    return before, asked()


def test_a_small_model_learns_to_copy() -> None:
    before, after = learnt("probe_copy", 17, 16, 200, 5e-3)
    assert before < 0.2 and after > 0.95


@pytest.mark.slow
def test_a_small_model_learns_which_value_belongs_to_which_key() -> None:
    before, after = learnt("probe_mqar", 32, 16, 1500, 2e-3)
    assert before < 0.2 and after > 0.9
