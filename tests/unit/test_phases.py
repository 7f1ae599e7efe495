"""Training in phases: batches and rates as functions of the step, borders, resuming, and plans that are refused."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from halflap.data.batch import Batch
from halflap.errors import HalflapError
from halflap.models.config import AttentionConfig, MLPConfig, ModelConfig, RopeConfig
from halflap.models.model import HybridModel, initialize
from halflap.train.config import Fit
from halflap.train.fit import fit
from halflap.train.objectives.language import NextToken
from halflap.train.phases import Phase, Plan, read_plan, weights_for_low_scores

LENGTH = 8


def simulated(plan: Plan) -> list[tuple[int, int, int, int]]:
    """(phase, first slot, rows, tokens before) of every step, one step at a time."""
    found, tokens, slot = [], 0, 0
    for number, phase in enumerate(plan.phases):
        border = tokens + phase.tokens
        while tokens < border:
            rows = phase.batch_size or next(rows for start, rows in reversed(plan.ramp) if start <= tokens)
            found.append((number, slot, rows, tokens))
            slot += rows * plan.world
            tokens += rows * plan.world * plan.sequence_length
    return found


rates = st.one_of(st.none(), st.floats(0, 1))
phases = st.builds(
    Phase,
    tokens=st.integers(1, 300),
    start=rates,
    end=st.floats(0, 1),
    shape=st.sampled_from(["linear", "cosine", "constant"]),
    batch_size=st.one_of(st.none(), st.integers(1, 5)),
)
ramps = st.lists(st.tuples(st.integers(1, 500), st.integers(1, 6)), max_size=3, unique_by=lambda pair: pair[0])
plans = st.builds(
    lambda phases, ramp, first, world: Plan(tuple(phases), LENGTH, ((0, first), *sorted(ramp)), world),
    st.lists(phases, min_size=1, max_size=4),
    ramps,
    st.integers(1, 6),
    st.integers(1, 2),
)


@settings(max_examples=50)
@given(plans)
def test_steps_are_those_of_a_loop_that_counts_tokens(plan: Plan) -> None:
    """So a batch changes at the first step that begins at or after its threshold, and no row is skipped or repeated."""
    steps = simulated(plan)
    assert plan.steps == len(steps)
    for step, (_, slot, rows, tokens) in enumerate(steps):
        assert plan.rows(step) == (slot, rows)
        assert plan.tokens_before(step) == tokens
    last = steps[-1]
    assert plan.tokens == last[3] + last[2] * plan.world * LENGTH


@settings(max_examples=50)
@given(plans)
def test_rates_go_from_start_to_end_and_a_phase_begins_where_the_last_ended(plan: Plan) -> None:
    steps = simulated(plan)
    before = 0.0
    for number, phase in enumerate(plan.phases):
        own = [step for step, row in enumerate(steps) if row[0] == number]
        values = [plan.learning_rate(step) for step in own]
        start = before if phase.start is None else phase.start
        low, high = sorted((start, phase.end))  # type: ignore[type-var]
        assert values[-1] == phase.end
        assert all(low - 1e-12 <= value <= high + 1e-12 for value in values)  # type: ignore[operator]
        taken = plan.tokens_before(own[-1] + 1) - plan.tokens_before(own[0])
        share = (plan.tokens_before(own[0] + 1) - plan.tokens_before(own[0])) / taken
        left = {"linear": 1 - share, "cosine": (1 + math.cos(math.pi * share)) / 2, "constant": 0.0}[phase.shape]
        assert values[0] == pytest.approx(phase.end + (start - phase.end) * left)  # type: ignore[operator]
        before = phase.end or 0.0


def test_tokens_may_be_amounts_as_in_flags() -> None:
    said = {"phases": [{"tokens": "1K", "end": "1e-3"}, {"tokens": 2e3, "end": 1e-4}], "ramp": [[0, 1], ["2K", 4]]}
    plan = read_plan(said, 100, 8, 1)
    assert [phase.tokens for phase in plan.phases] == [1000, 2000] and plan.ramp == ((0, 1), (2000, 4))


def test_the_ramp_of_the_340b() -> None:
    plan = Plan(
        (Phase(8_000_000_000_000, 1e-4, 1e-5, "cosine"),), 4096, ((0, 768), (200 * 10**9, 1536), (400 * 10**9, 2304))
    )
    assert [stretch.rows for stretch in plan.stretches] == [768, 1536, 2304]
    counts = [
        b - a for a, b in zip([s.step for s in plan.stretches], [*(s.step for s in plan.stretches[1:]), plan.steps])
    ]
    assert counts == [63_579, 31_789, 805_325]  # whole steps; the published ones are rounded down
    assert plan.learning_rate(0) == pytest.approx(1e-4) and plan.learning_rate(plan.steps - 1) == 1e-5


def test_constant_phases_stay_where_the_last_ended() -> None:
    plan = Plan((Phase(80, end=1e-3), Phase(80, shape="constant"), Phase(80, end=0.0)), LENGTH, ((0, 2),))
    found = [plan.learning_rate(step) for step in range(plan.steps)]
    assert found == pytest.approx([2e-4, 4e-4, 6e-4, 8e-4, 1e-3, *[1e-3] * 5, 8e-4, 6e-4, 4e-4, 2e-4, 0])


def test_blends_are_in_proportion_to_whole_steps() -> None:
    plan = Plan((Phase(100, end=1.0), Phase(60, end=1.0, weights=(0, 1)), Phase(1, end=1.0)), LENGTH, ((0, 2),))
    assert plan.ends == (112, 176, 192)
    assert plan.blend((3, 1)) == [(112 / 192, (3, 1)), (64 / 192, (0, 1)), (16 / 192, (0, 1))]


# ---- in the loop

CONFIG = ModelConfig(
    "nemotron", 31, 8, (AttentionConfig(2, 1, 4, rope=RopeConfig(fraction=0.5)), MLPConfig(16)), norm="layer1p"
)
PLAN = Plan((Phase(48, end=3e-3), Phase(80, end=1e-3, shape="cosine", batch_size=3)), LENGTH, ((0, 1), (24, 2)))


def batches(seen: list[list[int]]) -> Callable[[int], Batch]:
    """Rows that bear the number of their slot."""

    def batch(step: int) -> Batch:
        slot, count = PLAN.rows(step)
        rows = [
            torch.randint(31, (LENGTH,), generator=torch.Generator().manual_seed(s)) for s in range(slot, slot + count)
        ]
        seen.append(list(range(slot, slot + count)))
        tokens = torch.stack(rows)
        return Batch(tokens, tokens, torch.ones(tokens.shape))

    return batch


def train(directory: Path, stops: tuple[int, ...] = ()) -> tuple[HybridModel, list[list[int]], dict[int, float]]:
    """Train to the end, interrupted before these steps and gone on with each time: model, slots of all steps, rates."""
    seen: list[list[int]] = []
    rates: dict[int, float] = {}
    take = batches(seen)

    def log(row: dict[str, Any]) -> None:
        if "lr" in row:
            rates[row["step"]] = row["lr"]

    model = HybridModel(CONFIG)
    for stop in (*stops, None):

        def interrupted(step: int, stop: int | None = stop) -> Batch:
            if step == stop:
                raise KeyboardInterrupt
            return take(step)

        model = HybridModel(CONFIG)
        initialize(model, 0)
        settings = Fit(sequence_length=LENGTH, save_every=0)
        with contextlib.suppress(KeyboardInterrupt):
            fit(
                model,
                NextToken(),
                interrupted,
                settings,
                tokens=PLAN.tokens,
                directory=directory,
                progress=False,
                plan=PLAN,
                log=log,
            )
    return model, seen, rates


def test_interrupted_at_every_step_the_same_batches_and_rates_follow(tmp_path: Path) -> None:
    model, seen, rates = train(tmp_path / "whole")
    assert [slot for rows in seen for slot in rows] == list(range(sum(map(len, seen))))
    assert [len(rows) for rows in seen] == [1, 1, 1, 2, 2, 3, 3, 3, 3]
    assert list(rates) == list(range(1, PLAN.steps + 1))
    again, after, following = train(tmp_path / "parts", tuple(range(1, PLAN.steps)))
    assert after == seen and following == rates
    for one, other in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_run_ends_with_its_plan_though_padding_counts_nowhere(tmp_path: Path) -> None:
    def padded(step: int) -> Batch:
        batch = batches([])(step)
        batch.weights[:, 4:] = 0
        return batch

    model = HybridModel(CONFIG)
    initialize(model, 0)
    result = fit(model, NextToken(), padded, Fit(sequence_length=LENGTH), tokens=PLAN.tokens, plan=PLAN, progress=False)
    assert result["steps"] == PLAN.steps and result["tokens"] == PLAN.tokens / 2


def test_pretrain_takes_phases(halflap: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, word in (("a", "grey sea"), ("b", "high hill")):
        rows = [json.dumps({"text": f"The {word} number {n}. " * 12}) for n in range(40)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows))
    (tmp_path / "phases.yaml").write_text(
        "phases:\n"
        "- {tokens: 256, end: 1e-3, weights: [1, 0]}\n"
        "- {tokens: 1K, shape: cosine, end: 1.0e-4, weights: {scores: [0.9, 0.2], temperature: 0.5, cap: 0.7}}\n"
        "ramp: [[0, 2], [512, 4]]\n"
    )
    words = ("pretrain", "nemotron-4-tiny", "--data", "a.jsonl", "b.jsonl", "--phases", "phases.yaml", "--out", "run")
    found = halflap(*words, "--fit.sequence-length", 64, "--json").json
    assert found["steps"] == 7
    assert found["model_flops_per_second"].keys() == {"megatron", "6n"}
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    rates = [row["lr"] for row in rows if "lr" in row]
    assert (
        rates[:2] == pytest.approx([5e-4, 1e-3])
        and rates[-1] == 1e-4
        and rates == sorted(rates[:2]) + sorted(rates[2:])[::-1]
    )


# ---- weights by score, and what is refused


def test_weak_areas_get_more_up_to_a_cap() -> None:
    even = weights_for_low_scores([0.5, 0.5])
    assert even == (0.5, 0.5)
    weights = weights_for_low_scores([0.9, 0.2, 0.6], temperature=0.5)
    assert sum(weights) == pytest.approx(1) and weights[1] > weights[2] > weights[0]
    assert weights[1] / weights[0] == pytest.approx(math.exp(0.7 / 0.5))
    capped = weights_for_low_scores([0.9, 0.0, 0.6], temperature=0.1, cap=0.5)
    assert capped[1] == 0.5 and sum(capped) == pytest.approx(1)
    assert weights_for_low_scores([0.9, 0.0], temperature=0.1, cap=0.5) == (0.5, 0.5)


@pytest.mark.parametrize(
    "data, said",
    [
        ({"phase": []}, "no 'phase'; it has phases and ramp"),
        ({}, "no list under `phases`"),
        ({"phases": []}, "has no phases"),
        ({"phases": [{"end": 1.0}]}, "phase 0: a phase has tokens=0"),
        ({"phases": [{"tokens": 5}]}, "phase 0: a linear phase has no end"),
        ({"phases": [{"tokens": 5, "end": 1.0, "lr": 2}]}, "phase 0 has no field 'lr'"),
        ({"phases": [{"tokens": 5, "end": -1.0}]}, "end=-1.0, which is no learning rate"),
        ({"phases": [{"tokens": 5, "end": "fast"}]}, "phase 0: could not convert string to float: 'fast'"),
        (
            {"phases": [{"tokens": 5, "end": 1.0, "shape": "step"}]},
            "shape='step'; allowed are constant, linear, cosine",
        ),
        ({"phases": [{"tokens": 5, "end": 1.0, "batch_size": 0}]}, "batch_size=0"),
        ({"phases": [{"tokens": 5, "end": 1.0, "weights": [1]}]}, "1 weights and there are 2 paths"),
        ({"phases": [{"tokens": 5, "end": 1.0, "weights": {"score": [1]}}]}, "weights of phase 0 have no 'score'"),
        (
            {"phases": [{"tokens": 5, "end": 1.0, "weights": {"scores": [1, 2], "cap": 0.1}}]},
            "cap is 0.1; 2 shares need",
        ),
        ({"phases": [{"tokens": 5, "end": 1.0}], "ramp": [[1, 2]]}, "ascending from 0"),
        ({"phases": [{"tokens": 5, "end": 1.0}], "ramp": [[0, 2, 3]]}, r"list of \[tokens, rows\]"),
        ({"phases": [{"tokens": 5, "end": 1.0}], "ramp": [["much", 2]]}, r"list of \[tokens, rows\]"),
        ({"phases": [{"tokens": 5, "end": 1.0}], "ramp": 4}, r"list of \[tokens, rows\]"),
    ],
)
def test_plans_that_are_refused(data: dict[str, Any], said: str) -> None:
    with pytest.raises(HalflapError, match=said):
        read_plan(data, LENGTH, 2, 2)
