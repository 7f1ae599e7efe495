"""The clock on made-up times: what corrects predictions, what is in time, and what is said of the late."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from halflap.amounts import Amount
from halflap.commands import timing
from halflap.commands.clock import SPARE, Clock, agreed, in_time_first
from halflap.commands.sections import Budgets
from halflap.commands.students import Teacher, open_teacher
from halflap.compress.axes import Sizes
from halflap.compress.cost_model import REST, Condition, CostModel
from halflap.compress.cost_table import CostTable
from halflap.compress.costs import Budget
from halflap.compress.space import Candidate, Fitting
from halflap.errors import HalflapError
from halflap.models.config import ModelConfig
from halflap.recipe import Common

AT = Condition("decode", 64, 1)


@pytest.fixture(scope="module")
def teacher(teacher_place: Path) -> Teacher:
    return open_teacher(teacher_place / "teacher", Common())


def table_of(teacher: Teacher) -> CostTable:
    """A model's time is its number of blocks in seconds."""
    kinds = {kind: defaultdict(float, block=1.0) for kind in ("attention", "mamba2", "mlp")}
    return CostTable({}, teacher.config, {}, {AT: CostModel(kinds | {REST: defaultdict(float)}, 0.0, 0.0)})


def shape(teacher: Teacher, blocks: int) -> ModelConfig:
    return dataclasses.replace(teacher.config, blocks=teacher.config.blocks[:blocks])


class Times:
    """Passes that take `pace` times as many seconds as there are blocks, the teacher's one; all `slow` times that."""

    def __init__(self, teacher: ModelConfig, pace: float, slow: float = 1.0) -> None:
        self.teacher, self.pace, self.slow, self.timed = teacher, pace, slow, 0

    def __call__(self, configs: dict[str, ModelConfig], *_: Any) -> dict[str, list[float]]:
        self.timed += 1
        paces = {name: 1.0 if config == self.teacher else self.pace for name, config in configs.items()}
        return {name: [self.slow * paces[name] * len(config.blocks)] * 3 for name, config in configs.items()}


def clock_with(teacher: Teacher, tmp_path: Path, ceiling: float, relative: bool = True) -> Clock:
    budget = Budget(latency=ceiling, context=64, table=table_of(teacher))
    return Clock(budget, relative, teacher, tmp_path / "clock.json")


def finder(clock: Clock, least: int = 1) -> Any:
    """As a search does: all numbers of blocks that are predicted to be in time, the largest first."""

    def find(known: float | None) -> Fitting:
        ceiling, pace = clock.budget.at_pace(known).ceilings["latency"], known or 1.0
        fit = [count for count in range(7, least - 1, -1) if pace * count <= ceiling]
        if not fit:
            raise HalflapError("nothing is that fast")
        found = tuple(Candidate(Sizes(num_blocks=count), {"latency": pace * count}, 0.0) for count in fit)
        return Fitting(found, len(found))

    return find


def first(*words: Any) -> tuple[Candidate, str | None]:
    found = in_time_first(*words)
    return found.candidates[0], found.remark


def shape_of(teacher: Teacher) -> Any:
    return lambda candidate: shape(teacher, candidate.sizes.num_blocks)


def test_students_that_are_slower_than_predicted_are_cut_further(
    teacher: Teacher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    times = Times(teacher.config, 1.4)
    monkeypatch.setattr(timing, "in_turns", times)
    clock = clock_with(teacher, tmp_path, 6.1)
    found = agreed(clock, finder(clock), shape_of(teacher))
    assert [one.sizes.num_blocks for one in found.candidates] == [4, 3, 2, 1]
    assert found.candidates[0].costs["latency"] == pytest.approx(5.6)
    assert found.remark == (
        "the likeliest students took 40.0% more than the cost table tells, and predicted times were corrected by that"
    )
    before = times.timed
    assert agreed(clock, finder(clock), shape_of(teacher)) == found and times.timed == before, "timings are kept"


def test_nothing_is_corrected_where_the_likeliest_use_their_budget(
    teacher: Teacher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However the clock differs from what is predicted; and the teacher itself needs nothing to spare."""
    monkeypatch.setattr(timing, "in_turns", Times(teacher.config, 1.16))
    clock = clock_with(teacher, tmp_path, 6.1)
    only = Fitting((Candidate(Sizes(num_blocks=5), {"latency": 5.0}, 0.0),), 1)
    assert agreed(clock, lambda _: only, shape_of(teacher)) is only

    whole = clock_with(teacher, tmp_path, 7.0)
    only = Fitting((Candidate(Sizes(num_blocks=7), {"latency": 7.0}, 0.0),), 1)
    assert whole.in_time(teacher.config) and agreed(whole, lambda _: only, shape_of(teacher)) is only


def test_a_prediction_that_is_right_leaves_something_to_spare(
    teacher: Teacher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timing, "in_turns", Times(teacher.config, 1.0))
    clock = clock_with(teacher, tmp_path, 5.05)
    best, remark = first(clock, finder(clock), shape_of(teacher))
    assert best.sizes.num_blocks == 4 and remark is None


def test_a_time_that_does_not_bind_corrects_nothing(
    teacher: Teacher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timing, "in_turns", Times(teacher.config, 0.5))
    clock = clock_with(teacher, tmp_path, 6.9)
    clock = dataclasses.replace(clock, budget=dataclasses.replace(clock.budget, params=100))
    small = Fitting((Candidate(Sizes(num_blocks=3), {"latency": 3.0, "params": 98}, 0.0),), 1)
    assert agreed(clock, lambda _: small, shape_of(teacher)) is small


def test_where_corrected_predictions_refuse_the_clock_decides(
    teacher: Teacher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timing, "in_turns", Times(teacher.config, 1.01))
    clock = clock_with(teacher, tmp_path, 4.13)
    best, remark = first(clock, finder(clock, least=4), shape_of(teacher))
    assert best.sizes.num_blocks == 4 and remark is None

    monkeypatch.setattr(timing, "in_turns", Times(teacher.config, 1.2))
    clock = clock_with(teacher, tmp_path / "other", 4.13)
    (tmp_path / "other").mkdir()
    best, remark = first(clock, finder(clock, least=4), shape_of(teacher))
    assert best.sizes.num_blocks == 4 and remark is not None
    assert "none of the likeliest students is within the budget by the clock" in remark
    assert "this one has 4,800 ms a pass (decode at context 64, batch 1) where 4,130 ms" in remark
    assert remark.endswith("or raise --latency")


def test_prune_passes_over_what_is_late(teacher: Teacher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of five blocks each is in time but the likeliest, which no correction of all would tell."""

    def in_turns(configs: dict[str, ModelConfig], *_: Any) -> dict[str, list[float]]:
        late = len(configs["student"].blocks) == 5
        return {"teacher": [7.0], "student": [len(configs["student"].blocks) * (1.5 if late else 1.0)]}

    monkeypatch.setattr(timing, "in_turns", in_turns)
    clock = clock_with(teacher, tmp_path, 5.3)
    best, remark = first(clock, finder(clock), shape_of(teacher))
    assert best.sizes.num_blocks == 4 and remark is None


@pytest.mark.parametrize("relative", [True, False])
def test_a_slow_minute_is_not_the_students(
    teacher: Teacher,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    relative: bool,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(timing, "in_turns", Times(teacher.config, 1.0, slow=2.0))
    clock = clock_with(teacher, tmp_path, 5.5, relative)
    assert clock.seconds(shape(teacher, 5)) == 5 and clock.in_time(shape(teacher, 5))
    assert not clock.in_time(shape(teacher, 6)) and SPARE * 5 < 0.5
    assert "the teacher's pass takes 2.0 times what it took" in capsys.readouterr().err


def test_seconds_of_another_models_table_are_those_that_passed(
    teacher: Teacher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such a table only predicts the teacher's time; a share is of that prediction."""
    monkeypatch.setattr(timing, "in_turns", Times(teacher.config, 1.0, slow=1.2))
    for relative, seconds in ((True, 5.0), (False, 6.0)):
        clock = clock_with(teacher, tmp_path, 5.5, relative)
        other = dataclasses.replace(table_of(teacher), model=shape(teacher, 6))
        clock = dataclasses.replace(clock, budget=dataclasses.replace(clock.budget, table=other))
        assert clock.seconds(shape(teacher, 5)) == pytest.approx(seconds)


@pytest.mark.parametrize(
    ("latency", "ceiling", "within", "advice"),
    [
        (Amount(0.6, "seconds", share=True), 8.4, False, "--latency 50.400%"),
        (Amount(0.8, "seconds", share=True), 11.2, True, None),
        (Amount(9.0, "seconds"), 9.0, False, "--latency 8.1e+03ms"),
        (Amount(11.0, "seconds"), 11.0, True, None),
    ],
)
def test_a_share_is_judged_by_what_the_teacher_takes_now(
    teacher: Teacher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, latency: Amount, ceiling: float, within: bool,
    advice: str | None,
) -> None:  # fmt: skip
    """Of a table that was measured when the machine was twice as fast."""
    monkeypatch.setattr(timing, "in_turns", Times(teacher.config, 1.0, slow=2.0))
    budgets, table = Budgets(latency=latency, context=64), table_of(teacher)
    row = timing.judge_latency(tmp_path / "latency.json", budgets, table, teacher, shape(teacher, 5), 4.9)
    assert row["seconds"] == 10 and row["teacher_seconds"] == 14 and row["predicted_seconds"] == 4.9
    assert row["budget_seconds"] == pytest.approx(ceiling) and row["within_budget"] is within
    said = timing.excess(row, budgets, table, teacher.config)
    assert (said is None) == (advice is None) and (advice is None or advice in (said or ""))
