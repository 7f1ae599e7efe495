"""Answers that share a context score as answers read with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from halflap.checkpoints.checkpoint import Checkpoint, save_model
from halflap.checkpoints.streamed import StreamedModel
from halflap.inference import answers as answers_module
from halflap.inference.answers import score_answers
from halflap.models.model import HybridModel, initialize


def numbers(length: int, seed: int) -> list[int]:
    return torch.randint(0, 256, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.fixture(scope="module")
def model(tiny_config: Any) -> HybridModel:
    model = HybridModel(tiny_config).double().eval()
    initialize(model, 0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("proj.weight"):
                parameter.mul_(6)
    return model


def slow(model: HybridModel, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    with torch.inference_mode():
        log_probs = model(torch.tensor([context + continuation[:-1]]))[0, -len(continuation) :].log_softmax(-1)
    target = torch.tensor(continuation)
    return float(log_probs.gather(1, target[:, None]).sum()), bool((log_probs.argmax(-1) == target).all())


@pytest.mark.parametrize("shared_from", [2, 16, 999])
@pytest.mark.parametrize("batch_tokens", [1, 90, 8192])
def test_answers(model: HybridModel, shared_from: int, batch_tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers_module, "SHARED_FROM", shared_from)
    contexts = [numbers(length, length) for length in (2, 40, 17, 1, 33)]
    pairs = [(context, numbers(length, length + 50)) for length in (1, 5, 3) for context in contexts]
    pairs += [(contexts[0], numbers(7, 9)), (numbers(25, 1), numbers(2, 2)), (contexts[1], numbers(1, 51))]
    done: list[int] = []
    got = score_answers(model, pairs, batch_tokens=batch_tokens, advance=done.append)
    assert sum(done) == len(pairs)
    for pair, answer in zip(pairs, got, strict=True):
        log_prob, greedy = slow(model, *pair)
        assert answer.log_prob == pytest.approx(log_prob, abs=1e-9) and answer.greedy == greedy


def test_greedy_answers_are_known(model: HybridModel) -> None:
    from halflap.inference.generate import generate

    context = numbers(30, 3)
    written = generate(model, [context], 4, ignore_eos=True)[0].tokens
    right, wrong = score_answers(model, [(context, written), (context, [*written[:-1], (written[-1] + 1) % 256])])
    assert right.greedy and not wrong.greedy


def test_nothing_asked(model: HybridModel) -> None:
    assert score_answers(model, []) == []


def test_a_streamed_model_answers_the_same(model: HybridModel, tmp_path: Path) -> None:
    save_model(model, tmp_path)
    streamed = StreamedModel.of(Checkpoint.open(tmp_path), torch.float64)
    pairs = [(numbers(20, seed), numbers(3 + seed, 9 - seed)) for seed in (0, 0, 1, 2)]
    expected = score_answers(model, pairs)
    for found, answer in zip(score_answers(streamed, pairs, batch_tokens=60), expected, strict=True):
        assert found.log_prob == pytest.approx(answer.log_prob, abs=1e-9) and found.greedy == answer.greedy
