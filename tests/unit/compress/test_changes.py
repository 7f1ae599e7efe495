"""Averaged key/value heads and shorter windows in a plan: cut models equal their masked teachers; composing."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from halflap.checkpoints.checkpoint import load_model, save_model
from halflap.checkpoints.streamed import part_names
from halflap.commands.students import build
from halflap.compress.axes import readers_of
from halflap.compress.compose import compose
from halflap.compress.kinds import Change
from halflap.compress.masked import masked_teacher
from halflap.compress.plan import PruningPlan
from halflap.compress.prune import apply_plan
from halflap.compress.verify import plans_by_axis
from halflap.errors import HalflapError
from halflap.models.cache import Cache
from halflap.models.config import AttentionConfig, MLPConfig, ModelConfig, RopeConfig
from halflap.models.model import HybridModel, initialize
from halflap.models.presets import hymba

TEACHER = "t" * 64
CONFIG = ModelConfig(
    "nemotron_h",
    40,
    32,
    (
        AttentionConfig(8, 4, 8, RopeConfig()),
        MLPConfig(24),
        AttentionConfig(8, 4, 8, bias=True, window=6),
        AttentionConfig(4, 4, 8, value_head_dim=6),
        MLPConfig(24, "silu", gated=True, bias=True),
    ),
)
TOKENS = torch.randint(0, 40, (2, 20), generator=torch.Generator().manual_seed(0))
EQUAL = 1e-12  # float64; only the order of sums differs


@pytest.fixture(scope="module")
def model() -> HybridModel:
    model = HybridModel(CONFIG).double().eval()
    initialize(model, 0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(10 if parameter.ndim > 1 else 1).add_(0.1 * torch.randn_like(parameter))
    return model


@torch.no_grad()
def distance(one: HybridModel, other: HybridModel) -> float:
    return float((one(TOKENS) - other(TOKENS)).abs().max())


PLANS = {
    "pool": PruningPlan(TEACHER, CONFIG, changes={0: Change(pool=2), 3: Change(pool=4)}),
    "window": PruningPlan(TEACHER, CONFIG, changes={2: Change(window=2), 0: Change(window=5)}),
    "linear": PruningPlan(TEACHER, CONFIG, changes={i: Change(linear=True) for i in (0, 1, 2, 3, 4)}),
    "linear and cut": PruningPlan(
        TEACHER,
        CONFIG,
        (0, 1, 2, 3),
        {
            "hidden": (5, *range(0, 32, 3)),
            "blocks.1.neuron": (3, 7, 5),
            "blocks.2.query": ((1,), (0,), (1,), (0,)),
            "blocks.3.kv": (3, 1),
        },
        changes={1: Change(linear=True), 2: Change(linear=True), 3: Change(linear=True)},
    ),
    "cut too": PruningPlan(
        TEACHER,
        CONFIG,
        (0, 2, 3),
        {
            "hidden": tuple(range(0, 32, 2)),
            "blocks.0.query": ((1,), (0,), (1,), (0,)),
            "blocks.2.kv": (3, 1),
            "blocks.3.value_channel": (0, 5),
        },
        changes={0: Change(pool=2), 2: Change(pool=2, window=3), 3: Change(pool=2)},
    ),
}


@pytest.mark.parametrize("name", PLANS)
def test_parts_of_a_changed_student_are_made_of_what_they_name(model: HybridModel, name: str) -> None:
    """As it is read a block at a time: of all that the plan names, and of nothing else."""
    plan, tensors, whole = PLANS[name], model.state_dict(), build(model, PLANS[name]).state_dict()
    for names in part_names(plan.student).values():
        given = ((other, tensors[other]) for other in plan.teacher_names(names))
        made = dict(apply_plan(plan, given, names))
        assert made.keys() == set(names) and all(torch.equal(made[one], whole[one]) for one in names)


@pytest.mark.parametrize("name", PLANS)
def test_a_changed_student_is_its_masked_teacher(model: HybridModel, name: str) -> None:
    plan = PLANS[name]
    reference = masked_teacher(model, plan)
    assert distance(build(model, plan), reference) < EQUAL < 1e-3 < distance(model, reference)
    for one in plans_by_axis(plan).values():
        assert distance(build(model, one), masked_teacher(model, one)) < EQUAL
    assert "changes" in plans_by_axis(plan)


def test_what_shares_keys_and_values_has_one_window() -> None:
    config = hymba(6, hidden=32, mlp=24, heads=(4, 2), state=4, window=16, meta=3, vocab=40, original_context=None)
    ((source, (reader,)),) = readers_of(config).items()
    model = HybridModel(config).double().eval()
    initialize(model, 0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(10 if parameter.ndim > 1 else 1)
    plan = PruningPlan(
        TEACHER, config, changes={0: Change(window=9), **dict.fromkeys((source, reader), Change(window=4))}
    )
    reference = masked_teacher(model, plan)
    assert distance(build(model, plan), reference) < EQUAL < 1e-3 < distance(model, reference)
    with pytest.raises(
        HalflapError, match=f"block {reader} reads the .* of block {source} .*, whose window is 4 where"
    ):
        PruningPlan(TEACHER, config, changes={source: Change(window=4)})


@pytest.mark.parametrize("name", PLANS)
def test_changes_are_written_and_read(name: str) -> None:
    plan = PLANS[name]
    assert PruningPlan.from_json(plan.to_json()) == plan
    unchanged = dataclasses.replace(plan, changes={})
    assert "changes" not in unchanged.to_json() and unchanged.digest != plan.digest


def test_a_linear_block_is_cut_further_and_saved(model: HybridModel, tmp_path: Path) -> None:
    first = PLANS["linear and cut"]
    second = PruningPlan("s", first.student, (0, 1, 3), {"hidden": (1, 2, 3)}, changes={0: Change(linear=True)})
    both = compose(second, first)
    assert distance(build(build(model, first), second), build(model, both)) < EQUAL
    student = build(model, first).float()
    assert student.config.pattern() == "*LLL" and student.config != CONFIG
    save_model(student, tmp_path, dtype="float32")
    again = load_model(tmp_path)
    assert torch.equal(again(TOKENS), student(TOKENS))
    cache = Cache.create(student.config, 2)
    steps = [student(part, cache=cache) for part in TOKENS.split(7, 1)]
    assert torch.allclose(torch.cat(steps, 1), student(TOKENS), atol=1e-4)


def test_averages_of_averages_compose(model: HybridModel) -> None:
    first = PLANS["cut too"]
    second = PruningPlan("s", first.student, (0, 2), {"hidden": (1, 2, 3)}, changes={0: Change(2, 4), 2: Change(2)})
    both = compose(second, first)
    assert both.changes == {0: Change(4, 4), 3: Change(4)}
    assert distance(build(build(model, first), second), build(model, both)) < EQUAL
    with pytest.raises(HalflapError, match="averages key/value heads of block 0 and the second cuts"):
        compose(PruningPlan("s", first.student, keep={"blocks.0.kv": (0,)}), first)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({0: Change(pool=3)}, "block 0 cannot have 3 of its 4 key/value heads averaged"),
        ({1: Change(pool=2)}, "block 1 cannot have 2 of its 0 key/value heads"),
        ({1: Change(window=2)}, "block 1 cannot have a window of 2"),
        ({2: Change(window=7)}, r"its window \(6\) can only shrink"),
        ({0: Change(pool=2, linear=True)}, "cannot become linear"),
        ({9: Change(pool=2)}, "changes block 9, which it drops or which is none"),
    ],
)
def test_impossible_changes_are_refused(changes: dict[int, Change], words: str) -> None:
    with pytest.raises(HalflapError, match=words):
        PruningPlan(TEACHER, CONFIG, changes=changes)
