"""Mixes of distillation losses: with next-token loss, a live teacher's k best, and inner states."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from halflap.commands.teaching import Origin
from halflap.compress.plan import PruningPlan
from halflap.compress.prune import apply_plan
from halflap.data.batch import Batch
from halflap.errors import HalflapError
from halflap.models.config import AttentionConfig, Mamba1Config, Mamba2Config, MLPConfig, ModelConfig
from halflap.models.model import HybridModel, initialize
from halflap.models.patterns import parse_pattern
from halflap.models.presets import hymba
from halflap.train.config import Fit
from halflap.train.fit import fit
from halflap.train.objectives.distillation import LOSSES, Distillation, TopKDistillation
from halflap.train.objectives.intermediate import (
    InnerStates,
    WithProjections,
    pair_states,
    proportional_map,
)
from halflap.train.objectives.language import NextToken
from halflap.train.teacher_logits import TopKTeacher, store_teacher_logits

ROWS, LENGTH, VOCAB = 2, 16, 40
BLOCKS: dict[str, Any] = {
    "M": Mamba2Config(4, 4, 2, 4, chunk_size=8),
    "S": Mamba1Config(16, 4, 2),
    "*": AttentionConfig(2, 1, 4),
    "-": MLPConfig(16),
}
TEACHER = ModelConfig("nemotron_h", VOCAB, 12, parse_pattern("M-*M-", BLOCKS), initializer_range=0.4)
NARROW = {**BLOCKS, "M": Mamba2Config(2, 4, 2, 4, chunk_size=8)}
STUDENT = dataclasses.replace(TEACHER, hidden_size=8, blocks=parse_pattern("M-*", NARROW))
SETTINGS = Fit(batch_size=ROWS, sequence_length=LENGTH, micro_batch_size=1, learning_rate=1e-2, save_every=1)
MAP = (0, 1, 2)


def make(config: ModelConfig, seed: int) -> HybridModel:
    model = HybridModel(config)
    initialize(model, seed)
    return model


def batches(step: int, vocab: int = VOCAB) -> Batch:
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(vocab, (ROWS, LENGTH), generator=generator)
    weights = torch.ones(ROWS, LENGTH)
    weights[:, -1] = 0
    segments = torch.ones(ROWS, LENGTH, dtype=torch.long)
    segments[:, 9:] = 2
    return Batch(tokens, (tokens + 1) % vocab, weights, segments)


def number(scalar: torch.Tensor) -> float:
    return float(scalar.detach())


def inner_states(
    student: ModelConfig, teacher: ModelConfig, kinds: Any, block_map: Any = MAP, **more: Any
) -> InnerStates:
    return InnerStates(student, teacher, pair_states(student, teacher, kinds, block_map), **more)


def test_a_share_of_next_token_loss_is_mixed_in() -> None:
    student, teacher, batch = make(STUDENT, 1), make(TEACHER, 0), batches(0)
    plain = number(Distillation(teacher, loss="reverse_kl").loss(student, batch).sum)
    text = number(NextToken().loss(student, batch).sum)
    terms = Distillation(teacher, loss="reverse_kl", next_token_share=0.25).loss(student, batch)
    assert number(terms.sum) == pytest.approx(0.75 * plain + 0.25 * text, rel=1e-5)
    count = ROWS * (LENGTH - 1)
    assert {n: tuple(map(float, v)) for n, v in terms.metrics.items()} == {
        "reverse_kl": (pytest.approx(plain), count),
        "next_token": (pytest.approx(text), count),
    }


@pytest.mark.parametrize("tail", ["bucket", "renormalise"])
@pytest.mark.parametrize("k", [4, VOCAB])
def test_a_live_teachers_k_best_teach_what_stored_ones_do(k: int, tail: Any, tmp_path: Path) -> None:
    student, teacher = make(STUDENT, 1), make(TEACHER, 0)
    live = number(Distillation(teacher, top_k=k, tail=tail).loss(student, batches(0)).sum)
    store_teacher_logits(teacher, batches, 1, tmp_path, k=k, dtype="float32")
    stored = TopKDistillation(tail).loss(student, TopKTeacher(tmp_path).read(0, batches(0)))
    assert number(stored.sum) == pytest.approx(live, rel=2e-3)  # float16
    full = number(Distillation(teacher).loss(student, batches(0)).sum)
    if k == VOCAB:
        assert live == pytest.approx(full, rel=1e-5)
    elif tail == "bucket":
        assert live < full


def test_the_last_block_maps_to_the_last() -> None:
    assert proportional_map(3, 3) == (0, 1, 2)
    assert proportional_map(2, 6) == (2, 5)
    assert proportional_map(4, 6) == (0, 2, 3, 5)


def test_blocks_may_be_named_in_any_order_and_share_a_teachers() -> None:
    student, teacher, batch = make(STUDENT, 1), make(TEACHER, 0), batches(0)
    sums = []
    for blocks in ((0, 2), (2, 0)):
        inner = InnerStates(STUDENT, TEACHER, pair_states(STUDENT, TEACHER, ("blocks",), (1, 1, 1), blocks))
        terms = Distillation(teacher, inner=inner).loss(student, batch)
        sums.append(number(terms.sum))
    assert sums[0] == sums[1]


@pytest.mark.parametrize("distance", ["mse", "cosine"])
def test_inner_states_of_equal_width_equal_plain_ones(distance: Any) -> None:
    config = dataclasses.replace(TEACHER, blocks=TEACHER.blocks[:3])
    student, teacher, batch = make(config, 1), make(TEACHER, 0), batches(0)
    inner = inner_states(config, TEACHER, ("embedding", "blocks", "mamba_x"), (0, 1, 4), distance=distance)
    assert not list(inner.parameters())

    def states(model: HybridModel) -> dict[str, torch.Tensor]:
        found: dict[str, torch.Tensor] = {}
        handles = [
            module.register_forward_hook(lambda _, __, output, name=name: found.__setitem__(name, output))
            for name, module in model.named_modules()
        ]
        model.hidden_states(batch.tokens, segments=batch.segments)
        for handle in handles:
            handle.remove()
        x = found["blocks.0.mixer.in_proj"][..., 16:32]  # after z
        return {
            "embedding": found["embedding"],
            **{n: found[f"blocks.{n}"] for n in "0124" if f"blocks.{n}" in found},
            "x": x,
        }

    mine, known = states(student), states(teacher)
    pairs = [("embedding", "embedding"), ("0", "0"), ("1", "1"), ("2", "4"), ("x", "x")]
    expected = 0.0
    for own, other in pairs:
        a, b = mine[own], known[other]
        each = (a - b).square().mean(-1) if distance == "mse" else 1 - F.cosine_similarity(a, b, dim=-1)
        expected += number((each * batch.weights).sum())
    terms = Distillation(teacher, inner=inner, inner_weight=0.5).loss(student, batch)
    plain = number(Distillation(teacher).loss(student, batch).sum)
    assert float(terms.metrics["inner_states"][0]) == pytest.approx(expected, rel=1e-4)
    assert number(terms.sum) == pytest.approx(plain + 0.5 * expected, rel=1e-4)


def test_the_balanced_weight_makes_both_losses_equal_and_takes_no_gradient() -> None:
    student, teacher, batch = make(STUDENT, 1), make(TEACHER, 0), batches(0)
    inner = inner_states(STUDENT, TEACHER, ("blocks",))
    terms = Distillation(teacher, inner=inner).loss(WithProjections(student, inner), batch)
    outer, states, factor = (float(terms.metrics[name][0]) for name in ("logits", "inner_states", "inner_weight"))
    assert number(terms.sum) == pytest.approx(2 * outer, rel=1e-5) and factor == pytest.approx(outer / states, rel=1e-5)
    parameters = list(student.parameters())
    fixed = Distillation(teacher, inner=inner, inner_weight=factor).loss(WithProjections(student, inner), batch)
    balanced, constant = (torch.autograd.grad(t.sum, parameters, allow_unused=True) for t in (terms, fixed))
    for one, other in zip(balanced, constant, strict=True):
        torch.testing.assert_close(one, other)


def train(directory: Path, stop_at: int | None = None, seed: int = 0) -> tuple[InnerStates, dict[str, Any]]:
    """What a fit with projections learns from its directory's state on; with stop_at, it is interrupted there."""
    student, teacher = make(STUDENT, 1), make(TEACHER, 0)
    inner = inner_states(STUDENT, TEACHER, ("embedding", "blocks", "mamba_x"), seed=seed)

    def until(step: int) -> Batch:
        if step == stop_at:
            raise KeyboardInterrupt
        return batches(step)

    model, objective = WithProjections(student, inner), Distillation(teacher, inner=inner)
    fit(model, objective, until, SETTINGS, tokens=4 * ROWS * (LENGTH - 1), directory=directory, progress=False)
    return inner, student.state_dict()


def test_projections_are_learned_saved_and_not_exported(tmp_path: Path) -> None:
    inner, student = train(tmp_path / "whole")
    start = inner_states(STUDENT, TEACHER, ("embedding", "blocks", "mamba_x")).state_dict()
    assert sorted(start) == ["projections.hidden_8_12.weight", "projections.mamba_x_8_16.weight"]
    assert all(not torch.equal(start[name], p) for name, p in inner.named_parameters())
    assert student.keys() == make(STUDENT, 1).state_dict().keys()
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "resumed", stop_at=2)
    resumed, again = train(tmp_path / "resumed", seed=9)
    assert all(torch.equal(p, resumed.state_dict()[name]) for name, p in inner.state_dict().items())
    assert all(torch.equal(student[name], again[name]) for name in student)


def test_the_students_map_starts_at_the_kept_channels() -> None:
    kept = (0, 1, 2, 4, 5, 7, 8, 11)
    inner = inner_states(STUDENT, TEACHER, ("embedding",), kept_hidden=kept)
    x = torch.randn(3, 8)
    projected: Any = inner.projections["hidden_8_12"]
    assert torch.equal(projected(x)[:, list(kept)], x) and not bool(projected(x)[:, 3].any())


def test_states_meet_without_the_scale_that_the_correction_of_norms_gave_the_stream() -> None:
    """Mamba heads are cut, all with one norm's eps, so that the whole stream is scaled; its embedding is not cut."""
    plan = PruningPlan("teacher", TEACHER, keep={f"blocks.{index}.head": ((0,), (1,)) for index in (0, 3)})
    origin = Origin.of(plan)
    assert origin.scale == pytest.approx(2**0.5)
    assert origin.then(Origin(tuple(range(5)), tuple(range(12)), 3.0)).scale == pytest.approx(3 * 2**0.5)
    teacher, student, batch = make(TEACHER, 0), HybridModel(plan.student), batches(0)
    student.load_state_dict(dict(apply_plan(plan, teacher.state_dict().items())))
    found = {}
    for scale in (1.0, origin.scale):
        inner = inner_states(plan.student, TEACHER, ("embedding",), range(5), stream_scale=scale)
        with inner.of_teacher(teacher, batch) as known:
            teacher.hidden_states(batch.tokens, segments=batch.segments)
        with inner.of_student(student, batch, known) as sums:
            student.hidden_states(batch.tokens, segments=batch.segments)
        found[scale] = number(sums[0])
    assert found[origin.scale] < 1e-10 < 1e-3 < found[1.0]


def test_meta_tokens_and_hybrid_heads() -> None:
    """The states of a Hymba are compared at the text's tokens, packed or not; a copy has nothing to learn."""
    config = hymba(
        4, hidden=32, mlp=48, heads=(2, 1), state=4, window=8, meta=3, vocab=64, context=64, original_context=32
    )
    student, teacher, other = make(config, 0), make(config, 0), make(config, 1)
    inner = inner_states(config, config, ("embedding", "blocks", "mamba_x"), range(len(config.blocks)))
    for segmented in (True, False):
        batch = batches(0, 64)
        batch = batch if segmented else dataclasses.replace(batch, segments=None)
        same = Distillation(teacher, inner=inner).loss(student, batch)
        assert abs(float(same.metrics["inner_states"][0])) < 1e-6
        assert float(Distillation(teacher, inner=inner).loss(other, batch).metrics["inner_states"][0]) > 1


def test_a_copy_of_the_teacher_has_nothing_to_learn_from_any_loss() -> None:
    teacher, student = make(TEACHER, 0), make(TEACHER, 0)
    inner = inner_states(TEACHER, TEACHER, ("blocks",), range(5), distance="cosine")
    for loss in LOSSES:
        terms = Distillation(teacher, loss=loss, inner=inner).loss(student, batches(0))
        gradients = torch.autograd.grad(terms.sum, list(student.parameters()), allow_unused=True)
        assert abs(number(terms.sum)) < 1e-3
        assert max(float(g.abs().max()) for g in gradients if g is not None) < 1e-3


def test_mistakes_are_named() -> None:
    with pytest.raises(HalflapError, match=r"block map is \[0, 9, 2\].*0 to 4"):
        pair_states(STUDENT, TEACHER, ("blocks",), (0, 9, 2))
    with pytest.raises(HalflapError, match="intermediate block 3 does not exist"):
        pair_states(STUDENT, TEACHER, ("blocks",), MAP, (3,))
    with pytest.raises(HalflapError, match="'mamba_x' has no pair"):
        pair_states(STUDENT, TEACHER, ("mamba_x",), (1, 1, 1))
    with pytest.raises(HalflapError, match="skew_alpha is 1"):
        Distillation(make(TEACHER, 0), loss="skew_kl", skew_alpha=1)
    with pytest.raises(HalflapError, match="top_k is 41"):
        Distillation(make(TEACHER, 0), top_k=41)
