"""Several models trained on the same batches: each as if alone, the teacher read once, stopped and gone on with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from halflap.data.batch import Batch
from halflap.models.config import AttentionConfig, Mamba2Config, MLPConfig, ModelConfig
from halflap.models.model import HybridModel, initialize
from halflap.models.patterns import parse_pattern
from halflap.train.config import Fit
from halflap.train.fit import Trainee, fit, fit_together
from halflap.train.losses import mean_loss
from halflap.train.objectives.agreement import Agreement, with_teacher_tokens
from halflap.train.objectives.distillation import Distillation
from halflap.train.objectives.language import NextToken

ROWS, LENGTH, VOCAB = 4, 16, 31
BLOCKS = {"M": Mamba2Config(4, 4, 2, 4, chunk_size=8), "*": AttentionConfig(2, 1, 4), "-": MLPConfig(16)}
CONFIGS = [ModelConfig("nemotron_h", VOCAB, 8, parse_pattern(pattern, BLOCKS)) for pattern in ("M-*", "M*", "*-")]
SETTINGS = Fit(batch_size=ROWS, micro_batch_size=2, sequence_length=LENGTH, learning_rate=3e-3, save_every=3)
STEP = ROWS * LENGTH


def make(config: ModelConfig, seed: int = 0) -> HybridModel:
    model = HybridModel(config)
    initialize(model, seed)
    return model


def batches(step: int) -> Batch:
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(VOCAB, (ROWS, LENGTH), generator=generator)
    return Batch(tokens, (tokens * 3 + 1) % VOCAB, torch.ones(ROWS, LENGTH), torch.ones(ROWS, LENGTH, dtype=torch.long))


def students() -> list[HybridModel]:
    return [make(config, seed) for seed, config in enumerate(CONFIGS)]


def states(models: list[HybridModel]) -> list[dict[str, torch.Tensor]]:
    return [{name: p.detach().clone() for name, p in model.named_parameters()} for model in models]


def same(one: Any, other: Any) -> bool:
    return all(torch.equal(a[name], b[name]) for a, b in zip(one, other, strict=True) for name in a)


def together(
    models: list[HybridModel], teacher: HybridModel, folder: Path | None = None, steps: int = 6, **more: Any
) -> list[dict[str, Any]]:
    shared = Distillation(teacher, remember=True)
    trainees = [Trainee(m, shared, None if folder is None else folder / str(i)) for i, m in enumerate(models)]
    given: Any = {"batches": batches} | more
    return fit_together(trainees, settings=SETTINGS, tokens=steps * STEP, progress=False, **given)


def test_each_ends_as_alone_and_the_teacher_reads_a_batch_once() -> None:
    teacher, group, alone = make(CONFIGS[0], 9), students(), students()
    passes: list[int] = []
    teacher.register_forward_pre_hook(lambda *_: passes.append(1))
    teacher.blocks[0].register_forward_pre_hook(lambda *_: passes.append(1))
    results = together(group, teacher)
    assert len(passes) == 6 * 2, "one pass for each of two micro-batches of six steps"
    for model, result in zip(alone, results, strict=True):
        single = fit(model, Distillation(teacher), batches, SETTINGS, tokens=6 * STEP, progress=False)
        assert (single["loss"], single["tokens"]) == (result["loss"], result["tokens"])
    assert same(states(group), states(alone))


def test_stopping_before_the_end_and_going_on_is_the_same(tmp_path: Path) -> None:
    teacher, whole = make(CONFIGS[0], 9), students()
    together(whole, teacher, tmp_path / "whole")
    parts = students()
    done = together(parts, teacher, tmp_path / "parts", until=2 * STEP)
    assert [result["tokens"] for result in done] == [2 * STEP] * 3
    later = students()
    together(later[:2], teacher, tmp_path / "parts")  # the third is out
    assert same(states(later[:2]), states(whole[:2])) and same(states(later[2:]), states(students()[2:]))
    again = students()
    done = together(again, teacher, tmp_path / "parts", until=2 * STEP)
    assert [result["tokens"] for result in done] == [6 * STEP, 6 * STEP, 2 * STEP]


class StopAt:
    """NextToken that is interrupted at its n-th micro-batch."""

    def __init__(self, number: int) -> None:
        self.left, self.inner = number, NextToken()
        self.count: Callable[[Any], float] = self.inner.count

    def loss(self, model: Any, batch: Any) -> Any:
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        return self.inner.loss(model, batch)


@pytest.mark.parametrize("number", [0, 7, 8, 10, 21])
def test_an_interruption_between_two_of_them_is_caught_up(tmp_path: Path, number: int) -> None:
    def run(models: list[HybridModel], objective: Any) -> None:
        trainees = [Trainee(model, objective, tmp_path / str(i)) for i, model in enumerate(models)]
        fit_together(trainees, batches, SETTINGS, tokens=6 * STEP, progress=False)

    with pytest.raises(KeyboardInterrupt):
        run(students(), StopAt(number))
    resumed = students()
    run(resumed, NextToken())
    alone = students()
    for model in alone:
        fit(model, NextToken(), batches, SETTINGS, tokens=6 * STEP, progress=False)
    assert same(states(resumed), states(alone))


def test_accuracy_and_agreement_are_those_of_whole_logits() -> None:
    """Against argmax of float64 logits, token by token; ties of random logits do not happen."""
    teacher, student = make(CONFIGS[0], 9).double(), make(CONFIGS[1], 1).double()
    weights = torch.ones(ROWS, LENGTH)
    weights[0, 5:], weights[2] = 0, 0
    given = [batches(step) for step in range(3)]
    given[0] = Batch(given[0].tokens, given[0].targets, weights, given[0].segments)
    said = with_teacher_tokens(teacher, given, torch.device("cpu"), torch.float32)
    found = mean_loss(student, Agreement(), said, torch.device("cpu"), torch.float32)
    right = agreed = total = loss = 0.0
    for batch in given:
        with torch.no_grad():
            ours, theirs = (
                model.hidden_states(batch.tokens, segments=batch.segments) @ model.head_weight.T
                for model in (student, teacher)
            )
        for row in range(ROWS):
            for place in range(LENGTH):
                if batch.weights[row, place]:
                    best = int(ours[row, place].argmax())
                    right += best == int(batch.targets[row, place])
                    agreed += best == int(theirs[row, place].argmax())
                    loss -= float(ours[row, place].log_softmax(0)[batch.targets[row, place]])
                    total += 1
    assert found["accuracy"] == pytest.approx(right / total) and found["agreement"] == pytest.approx(agreed / total)
    assert found["loss"] == pytest.approx(loss / total) and 0 < agreed < total
    perfect = mean_loss(teacher, Agreement(), said, torch.device("cpu"), torch.float32)
    assert perfect["agreement"] == 1
