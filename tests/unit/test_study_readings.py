"""Readings of a study from invented tables: verdicts of claims, crossings of curves, ranks."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from halflap.commands.study_file import Claim
from halflap.commands.study_readings import at_equal, crossing, judge, rank_correlation, tokens_to_reach


def row(tokens: float = 100, **measures: list[float]) -> dict[str, Any]:
    means = {name: sum(values) / len(values) for name, values in measures.items()}
    return {"tokens_trained": tokens, **means, **{f"{name}_by_seed": values for name, values in measures.items()}}


@pytest.mark.parametrize(
    "higher, verdict",
    [([2.2, 2.3, 2.25], "holds"), ([1.8, 1.7, 1.75], "reversed"), ([2.1, 1.9, 2.05], "open")],
)
def test_a_claim_holds_when_its_whole_interval_does(higher: list[float], verdict: str) -> None:
    rows = {"a": row(loss=[2.0, 2.1, 2.02]), "b": row(loss=higher)}
    found = judge(Claim("a is better", "a", "b"), rows)
    assert found["verdict"] == verdict and found["difference"] == pytest.approx(rows["a"]["loss"] - rows["b"]["loss"])


def test_one_seed_tells_nothing() -> None:
    rows = {"a": row(loss=[2.0]), "b": row(loss=[3.0])}
    assert judge(Claim("a is better", "a", "b"), rows)["verdict"] == "open"


@given(st.floats(0.05, 0.4), st.floats(3.0, 5.0), st.floats(1e3, 1e6))
def test_a_line_in_log_tokens_is_crossed_where_it_is(slope: float, start: float, reached: float) -> None:
    tokens = [500.0, 5e4, 2e6]
    losses = [start - slope * math.log(count) for count in tokens]
    found = crossing(tokens, losses, start - slope * math.log(reached))
    assert found is not None and math.isclose(found, reached, rel_tol=1e-6)


def test_tokens_to_reach_are_a_ratio_or_a_bound() -> None:
    rows = {
        "student": row(10, loss=[2.0, 2.5]),
        "short": row(100, loss=[3.0, 3.0]),
        "long": row(400, loss=[1.0, 2.5]),
    }
    found = tokens_to_reach(rows, "student", ["long", "short"])
    assert found["ratio_by_seed"] == pytest.approx([20, 40]) and found["longest"] == 40
    assert "takes 30 times its tokens (from 20 to 40 over the seeds)" in found["says"]
    bound = tokens_to_reach(rows | {"long": row(400, loss=[1.0, 2.6])}, "student", ["short", "long"])
    assert bound["ratio_by_seed"][1] is None and "more than 40 times its tokens in 1 of 2 seeds" in bound["says"]
    below = tokens_to_reach(rows | {"short": row(100, loss=[1.9, 2.0])}, "student", ["short", "long"])
    assert "takes 10 times its tokens or less" in below["says"]


def test_ranks_are_compared_seed_by_seed() -> None:
    cut = [4.0, 3.0, 5.0, 3.5]
    rows = {f"s{n}": row(loss_as_cut=[cut[n], cut[n]], loss=[cut[n] - 1, 9 - cut[n]]) for n in range(4)}
    found = rank_correlation(rows)
    assert found["spearman_by_seed"] == pytest.approx([1, -1]) and found["kendall_by_seed"] == pytest.approx([1, -1])
    assert found["chosen"] == "s1" and found["students"] == 4 and found["regret"] == pytest.approx(0)
    other = rank_correlation({**rows, "s3": row(loss_as_cut=[3.5, 3.5], loss=[1.0, 1.0])})
    assert other["regret"] == pytest.approx(3.0) and "s1, is number" in other["says"]


def test_what_lacks_a_measure_is_not_ranked_and_equal_students_have_no_ranks() -> None:
    rows = {f"s{n}": row(loss_as_cut=[2.0], loss=[float(n)]) for n in range(3)} | {"scratch": row(loss=[0.5])}
    found = rank_correlation(rows)
    assert found["students"] == 3 and found["spearman_by_seed"] == [None]
    assert "Spearman of no value, for there are no ranks" in found["says"]


def test_matched_arms_say_how_near_they_came() -> None:
    rows = {"a": {"parameters": 100}, "b": {"parameters": 97}}
    [found] = at_equal(rows, {"b": {"params": "a"}})
    assert found["share"] == pytest.approx(0.97) and found["says"].endswith("has 97.0 % of it")
