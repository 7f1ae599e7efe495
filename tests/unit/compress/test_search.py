"""The search over candidates: what is measured, rankings merged, rounds of distillation, and going on."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from halflap.compress.axes import Sizes
from halflap.compress.costs import Budget
from halflap.compress.grid import SearchSpace
from halflap.compress.plan import PruningPlan
from halflap.compress.search import (
    Look,
    Round,
    SearchResult,
    Stage,
    Trial,
    by_agreement,
    by_loss,
    ranked_search,
    stages,
)
from halflap.compress.space import fitting
from halflap.errors import HalflapError
from halflap.models.count import count_parameters
from halflap.models.presets import preset

TINY = preset("nemotron-h-tiny")
FITTING = fitting(TINY, Budget(params=0.6 * count_parameters(TINY)), SearchSpace(max_width_cut=0.6))


def plan_for(trial: Trial) -> PruningPlan:
    hidden = trial.sizes.hidden_size
    keep = {"hidden": tuple(range(hidden))} if hidden else {}
    return PruningPlan("teacher", TINY, tuple(range(7)), keep)


class Losses:
    """Loss by hidden size, counting plans; raises after `limit` of them."""

    def __init__(self, limit: int = 99) -> None:
        self.calls: list[int] = []
        self.limit = limit

    def __call__(self, plans: Sequence[PruningPlan]) -> Iterator[dict[str, float]]:
        for plan in plans:
            if len(self.calls) >= self.limit:
                raise KeyboardInterrupt
            self.calls.append(plan.student.hidden_size)
            yield {"loss": plan.student.hidden_size / 100}


class Training:
    """Rounds in which the widest do best, as they do not as cut; remembers who took part, and may be stopped."""

    def __init__(self, limit: int = 99) -> None:
        self.calls: list[tuple[int, tuple[int, ...]]] = []
        self.limit = limit

    def __call__(self, plans: Sequence[PruningPlan], tokens: int) -> list[Round]:
        if len(self.calls) >= self.limit:
            raise KeyboardInterrupt
        self.calls.append((tokens, tuple(plan.student.hidden_size for plan in plans)))
        return [Round(tokens, 5 - plan.student.hidden_size / 100 - tokens / 1000) for plan in plans]


def run(path: Path, score: Losses, **more: Any) -> SearchResult:
    options = {"made_from": {"budget": 1}, "shortlist": 4} | more
    return ranked_search(FITTING, plan_for, score, path=path, **options)


@pytest.mark.parametrize("looking", [False, True])
def test_only_what_holds_is_shortlisted(tmp_path: Path, looking: bool) -> None:
    """Asked are up to three times as many as there are places; what does not hold is not measured."""
    score, asked = Losses(), list[int]()

    def holds(plan: PruningPlan) -> bool:
        asked.append(plan.student.hidden_size)
        return plan.student.hidden_size >= 72

    look = Look(9, Losses()) if looking else None
    result = run(tmp_path / "search.json", score, shortlist=3, holds=holds, look=look)
    assert len(score.calls) == 3 and min(score.calls) >= 72 and 3 < len(asked) <= 9
    assert len(result.trials) == len(FITTING.candidates) and result.chosen.loss is not None
    none = run(tmp_path / "none.json", Losses(), shortlist=3, holds=lambda plan: False, look=look)
    assert sum(trial.loss is not None for trial in none.trials) == 3, "no better guess than the likeliest"


def test_an_earlier_measurement_takes_this_searchs_costs(tmp_path: Path) -> None:
    """Predicted times may have been corrected since."""
    run(tmp_path / "search.json", Losses())
    dearer = [dataclasses.replace(one, costs={**one.costs, "latency": 2.0}) for one in FITTING.candidates]
    again = Losses()
    result = ranked_search(
        dataclasses.replace(FITTING, candidates=tuple(dearer)), plan_for, again,
        made_from={"budget": 1}, path=tmp_path / "search.json", shortlist=4,
    )  # fmt: skip
    assert not again.calls and all(trial.costs["latency"] == 2.0 for trial in result.trials)


def test_a_loss_that_is_no_number_names_its_candidate(tmp_path: Path) -> None:
    def broken(plans: Sequence[PruningPlan]) -> Iterator[dict[str, float]]:
        yield {"loss": 1.0}
        yield {"loss": float("nan")}

    with pytest.raises(HalflapError, match=r"loss of the candidate of hidden_size .* is nan, no number"):
        ranked_search(FITTING, plan_for, broken, made_from={}, path=tmp_path / "search.json", shortlist=4)
    assert SearchResult.load(tmp_path / "search.json").trials[0].loss == 1.0, "what was measured is kept"
    with pytest.raises(HalflapError, match="is not finished; give its command again"):
        PruningPlan.load(tmp_path / "search.json")


def test_the_lowest_loss_wins(tmp_path: Path) -> None:
    score = Losses()
    result = run(tmp_path / "search.json", score)
    assert len(score.calls) == 4 and len(result.trials) == len(FITTING.candidates) > 4
    measured = [trial.loss for trial in result.trials if trial.loss is not None]
    assert result.chosen.loss == min(measured) and measured == sorted(measured)
    assert SearchResult.load(tmp_path / "search.json") == result
    rows = json.loads((tmp_path / "search.json").read_text())["candidates"]
    assert rows[0]["chosen"] and not rows[1]["chosen"] and rows[0]["costs"]["params"]
    assert PruningPlan.load(tmp_path / "search.json") == plan_for(result.chosen)


class Glances(Losses):
    """On few tokens the narrowest does worst, which is not what the whole text says."""

    def __call__(self, plans: Sequence[PruningPlan]) -> Iterator[dict[str, float]]:
        for found in super().__call__(plans):
            yield {"loss": -found["loss"]}


def test_the_best_of_a_first_look_are_the_shortlist(tmp_path: Path) -> None:
    glances, score = Glances(), Losses()
    result = run(tmp_path / "search.json", score, look=Look(9, glances))
    assert len(glances.calls) == 9 and sorted(score.calls) == sorted(glances.calls)[-4:]
    assert sum(trial.glance is not None for trial in result.trials) == 9 < len(FITTING.candidates)
    assert result.chosen.loss == min(score.calls) / 100 and len(result.trials) == len(FITTING.candidates)
    assert SearchResult.load(tmp_path / "search.json") == result


def test_no_first_look_at_what_the_shortlist_holds(tmp_path: Path) -> None:
    glances = Glances()
    run(tmp_path / "search.json", Losses(), look=Look(4, glances))
    assert not glances.calls


@pytest.mark.parametrize(("glanced", "scored"), [(3, 0), (99, 2)])
def test_an_interrupted_look_goes_on_to_the_same_end(tmp_path: Path, glanced: int, scored: int) -> None:
    whole = run(tmp_path / "whole.json", Losses(), look=Look(9, Glances()))
    path = tmp_path / "search.json"
    with pytest.raises(KeyboardInterrupt):
        run(path, Losses(scored), look=Look(9, Glances(glanced)))
    glances, score = Glances(), Losses()
    assert run(path, score, look=Look(9, glances)) == whole
    assert len(glances.calls) == max(0, 9 - glanced) and len(score.calls) == 4 - scored
    assert path.read_bytes() == (tmp_path / "whole.json").read_bytes()


def test_rounds_keep_the_better_half(tmp_path: Path) -> None:
    score, refine = Losses(), Training()
    result = run(tmp_path / "search.json", score, refine=refine, rounds=(Stage(4, 100), Stage(2, 200)))
    (first, all_four), (then, best_two) = refine.calls
    assert (first, then) == (100, 200) and sorted(all_four) == sorted(score.calls)
    assert sorted(best_two) == sorted(score.calls)[2:]  # the widest, by the losses of the first round
    assert [len(trial.rounds) for trial in result.trials[:5]] == [2, 2, 1, 1, 0]
    assert result.chosen.refined_loss == min(trial.rounds[1].loss for trial in result.trials[:2])
    losses = [trial.rounds[0].loss for trial in result.trials[2:4]]
    assert losses == sorted(losses)
    rows = json.loads((tmp_path / "search.json").read_text())["candidates"]
    assert [done["tokens"] for done in rows[0]["rounds"]] == [100, 200]
    assert rows[0]["refined_loss"] == rows[0]["rounds"][-1]["loss"]
    assert SearchResult.load(tmp_path / "search.json") == result


@pytest.mark.parametrize(("scored", "trained"), [(2, 0), (99, 0), (99, 1)])
def test_an_interrupted_search_goes_on_to_the_same_end(tmp_path: Path, scored: int, trained: int) -> None:
    rounds = {"rounds": (Stage(4, 100), Stage(2, 200))}
    whole = run(tmp_path / "whole.json", Losses(), refine=Training(), **rounds)
    path = tmp_path / "search.json"
    with pytest.raises(KeyboardInterrupt):
        run(path, Losses(scored), refine=Training(trained), **rounds)
    score, refine = Losses(), Training()
    assert run(path, score, refine=refine, **rounds) == whole
    assert len(score.calls) == max(0, 4 - scored) and len(refine.calls) == 2 - trained
    score, refine = Losses(), Training()
    assert run(path, score, refine=refine, **rounds) == whole and not score.calls and not refine.calls
    assert path.read_bytes() == (tmp_path / "whole.json").read_bytes()


def test_another_search_starts_anew(tmp_path: Path) -> None:
    path = tmp_path / "search.json"
    run(path, Losses())
    score = Losses()
    run(path, score, made_from={"budget": 2})
    assert len(score.calls) == 4


def test_results_without_rounds_are_read(tmp_path: Path) -> None:
    """Such were written before there were any."""
    path = tmp_path / "search.json"
    result = run(path, Losses())
    data = json.loads(path.read_text())
    for row in data["candidates"]:
        del row["rounds"], row["accuracy"], row["agreement"]
    path.write_text(json.dumps(data))
    assert SearchResult.load(path) == result


def test_what_is_no_search_result_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "search.json"
    with pytest.raises(HalflapError, match="does not exist"):
        SearchResult.load(path)
    for text in ("", "[]", '{"format": "x"}', '{"format": "halflap-search-1"}'):
        path.write_text(text)
        with pytest.raises(HalflapError, match="search"):
            SearchResult.load(path)


def test_trials_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        FITTING.candidates[0].hurt = 0  # type: ignore[misc]


# ---- equal losses


def timed(loss: float, seconds: float | None, params: float = 0.0) -> Trial:
    times = {} if seconds is None else {"throughput": 1 / seconds, "latency": seconds}
    return Trial(Sizes(), {"params": params, **times}, 0.0, loss)


def test_the_faster_of_equal_losses_comes_first() -> None:
    """As Minitron-SSM chose between two of 1.380; what is equal does not depend on the order of trials."""
    trials = [timed(1.3800, 0.5), timed(1.3806, 0.4), timed(1.3809, 0.3), timed(1.3815, 0.1), timed(1.3822, 0.2)]
    for given_as in itertools.permutations(trials):
        assert [one.costs["latency"] for one in by_loss(given_as, 0.001)] == [0.3, 0.4, 0.5, 0.1, 0.2]
        assert by_loss(given_as) == trials
    untimed = [timed(1.3800, None, 9), timed(1.3800, None, 10), timed(1.3801, None, 1)]
    assert by_loss(reversed(untimed), 0.001) == untimed
    broken = [timed(1.0, 0.5), timed(float("nan"), 0.1)]
    assert len(by_loss(broken, 0.001)) == 2


def test_equal_losses_after_a_round_go_by_speed(tmp_path: Path) -> None:
    """The wider a candidate, the longer its pass; all end within the tolerance."""
    candidates = [dataclasses.replace(c, costs={"latency": c.sizes.hidden_size or 96}) for c in FITTING.candidates]
    known = dataclasses.replace(FITTING, candidates=tuple(candidates))
    more: dict[str, Any] = {"rounds": (Stage(4, 100),), "refine": Training(), "made_from": {}, "shortlist": 4}
    slow = ranked_search(known, plan_for, Losses(), path=tmp_path / "slow.json", **more)
    fast = ranked_search(known, plan_for, Losses(), path=tmp_path / "fast.json", tolerance=1.0, **more)
    assert slow.chosen.costs["latency"] == max(one.costs["latency"] for one in slow.trials[:4])
    assert fast.chosen.costs["latency"] == min(one.costs["latency"] for one in slow.trials[:4])


# ---- rankings merged


def trial(number: int, accuracy: float, agreement: float) -> Trial:
    return Trial(Sizes(num_blocks=number + 1), {}, 0.0, 3.0 + number / 100, accuracy, agreement)


@given(st.lists(st.tuples(*[st.sampled_from([x / 8 for x in range(8)])] * 2), min_size=1, max_size=12))
def test_the_first_are_the_best_of_either_ranking(values: list[tuple[float, float]]) -> None:
    trials = [trial(number, *pair) for number, pair in enumerate(values)]
    merged = by_agreement(trials)
    assert sorted(merged, key=lambda one: one.loss or 0) == trials
    assert by_agreement(reversed(trials)) == merged
    for name, count in itertools.product(("accuracy", "agreement"), range(1, len(trials) + 1)):
        # whoever is among the best `count` of one ranking stands before all who are in neither
        best = sorted((getattr(one, name) for one in trials), reverse=True)[count - 1]
        neither = [one for one in merged if place(trials, one) >= count]
        inside = [one for one in merged if getattr(one, name) > best]
        assert not neither or all(merged.index(one) < merged.index(neither[0]) for one in inside)


def place(trials: list[Trial], one: Trial) -> int:
    """The better of its places: how many are better by that number."""
    return min(sum(getattr(o, n) > getattr(one, n) for o in trials) for n in ("accuracy", "agreement"))


def test_a_dominant_candidate_comes_first_and_ties_go_by_loss() -> None:
    trials = [trial(0, 0.3, 0.5), trial(1, 0.5, 0.6), trial(2, 0.4, 0.4), trial(3, 0.3, 0.5)]
    assert [one.sizes.num_blocks for one in by_agreement(trials)] == [2, 1, 4, 3]


# ---- tokens of rounds


@given(st.integers(1, 40), st.integers(1, 10**7))
def test_rounds_cost_no_more_than_equal_shares(candidates: int, tokens: int) -> None:
    rounds = stages(candidates, tokens)
    spent, before = 0, 0
    for stage in rounds:
        spent += stage.candidates * (stage.tokens - before)
        before = stage.tokens
    steps = sum(stage.candidates * 2**number for number, stage in enumerate(rounds))
    assert spent <= max(candidates * tokens, steps) and spent >= candidates * tokens - steps
    assert rounds[0].candidates == candidates and rounds[-1].candidates == min(2, candidates)
    for one, after in itertools.pairwise(rounds):
        assert after.candidates == -(-one.candidates // 2) and after.tokens == 2 * one.tokens
    assert stages(candidates, tokens, halving=False) == (Stage(candidates, tokens),)


def test_eight_candidates_take_three_rounds() -> None:
    assert stages(8, 1000) == (Stage(8, 500), Stage(4, 1000), Stage(2, 2000))


@pytest.mark.parametrize(("share", "widened"), [(0.7, False), (0.4, True), (0.3, True)])
def test_a_budget_out_of_reach_of_the_usual_cuts_takes_larger_ones_and_says_so(share: float, widened: bool) -> None:
    whole = preset("nemotron-4-tiny")
    budget = Budget(params=share * count_parameters(whole))
    found = fitting(whole, budget, drop_order=(6, 7, 4, 5, 2, 3, 0, 1))
    assert all(candidate.costs["params"] <= share * count_parameters(whole) for candidate in found.candidates)
    assert ("larger cuts were allowed" in str(found.remark)) == widened
    usual = SearchSpace(max_width_cut=0.4, max_depth_cut=0.2)
    if widened:
        with pytest.raises(HalflapError, match="cannot be met"):
            fitting(whole, budget, usual, drop_order=(6, 7, 4, 5, 2, 3, 0, 1))
