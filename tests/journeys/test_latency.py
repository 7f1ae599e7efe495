"""Budgets of time through the command line, on a device whose times are made up: tables, students, sweeps, refusals."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from halflap.checkpoints.config import read_config
from halflap.commands import sweep, timing
from halflap.compress.axes import Sizes
from halflap.compress.cost_model import Condition
from halflap.compress.plan import PruningPlan
from halflap.compress.search import Round, SearchResult, Trial, by_agreement, by_loss
from halflap.models.config import ModelConfig
from halflap.models.count import count_non_embedding_parameters

FIT = ("--fit.sequence-length", 32, "--fit.batch-size", 4, "--fit.learning-rate", 1e-3)
AT = ("--context", 64, "--batch", 2)


def made_up_seconds(config: ModelConfig, condition: Condition, *_: Any) -> float:
    return 1e-3 + len(config.blocks) * 1e-4 + 1e-8 * condition.tokens * count_non_embedding_parameters(config)


@pytest.fixture(scope="module")
def place(teacher_place: Path) -> Path:
    """A teacher with random weights and a tokenizer, text, and its importance."""
    from halflap.cli import main

    folder = teacher_place
    words = ("score", folder / "teacher", "--data", folder / "text.jsonl", "--tokens", "1K", "--sequence-length", 32)
    assert main([str(word) for word in (*words, "--out", folder / "scored", "--quiet")]) == 0
    return folder


@pytest.fixture(autouse=True)
def device(monkeypatch: pytest.MonkeyPatch) -> list[ModelConfig]:
    """The configs that were timed."""
    timed: list[ModelConfig] = []

    def timer_of(config: ModelConfig, *rest: Any) -> Callable[[float], float]:
        timed.append(config)
        return lambda _: made_up_seconds(config, *rest)

    monkeypatch.setattr(timing, "timer_of", timer_of)
    return timed


def test_a_table_then_students_within_its_times(
    halflap: Callable[..., Any], place: Path, tmp_path: Path, device: list[ModelConfig]
) -> None:
    words = ("bench", place / "teacher", "--blocks", "--prompt", 64, "--batch", 2, "--repeats", 1)
    result = halflap(*words, "--out", tmp_path / "bench", "--json").json
    assert [row["phase"] for row in result["rows"]] == ["decode", "prefill"]
    teacher = read_config(place / "teacher")
    decode = result["rows"][0]
    assert decode["seconds"] == pytest.approx(made_up_seconds(teacher, Condition("decode", 64, 2)))
    assert sum(decode["seconds_by_kind"].values()) == pytest.approx(decode["seconds"])
    shown = halflap(*words, "--out", tmp_path / "bench")
    assert "each left out in turn" in shown.out and "decode at context 64, batch 2" in shown.out
    device.clear()

    prune = ("prune", place / "teacher", "--importance", place / "scored", "--space.max-width-cut", 0.6)
    costs = ("--costs", tmp_path / "bench" / "costs.json")
    both = ("--latency", "60%", "--params", "90%")
    pruned = halflap(*prune, *AT, *costs, *both, "--out", tmp_path / "decode", "--json").json
    student = read_config(tmp_path / "decode" / "checkpoint")
    seconds = made_up_seconds(student, Condition("decode", 64, 2))
    assert seconds / decode["seconds"] == pytest.approx(0.6, rel=0.06)
    assert pruned["predicted_seconds"] == pytest.approx(seconds, rel=0.01) and pruned["ratio"] <= 0.9
    halflap(*prune, *AT, *costs, "--phase", "prefill", "--latency", "70%", "--out", tmp_path / "prefill")
    beside = [config for config in device if config != teacher]
    assert all(len(config.pattern()) >= 3 and config.vocab_size == 512 for config in beside), "no stack is measured"

    for changed, says in (
        (("--context", 128, "--batch", 2), "covers decode at context 64, batch 2; prefill at context 64, batch 2, and"),
        ((*AT, "--dtype", "bfloat16"), "was measured with dtype float32, and here it is bfloat16"),
    ):
        refused = halflap(*prune, *changed, *costs, "--latency", "60%", "--out", tmp_path / "refused")
        assert refused.status == 1 and says in refused.err and "halflap bench MODEL --blocks" in refused.err
    refused = halflap(*prune, *AT, *costs, "--latency", "1us", "--out", tmp_path / "refused")
    assert refused.status == 1 and "ms a pass (decode at context 64, batch 2)" in refused.err


def test_compress_measures_a_table_and_then_its_student(
    halflap: Callable[..., Any], place: Path, tmp_path: Path
) -> None:
    words = ("compress", place / "teacher", "--data", place / "text.jsonl", "--tokens", "1K", *FIT)
    small = ("--calibration-tokens", 256, "--score-tokens", 128, "--eval-tokens", 200, "--shortlist", 1)
    words = (*words, *small, "--importance", place / "scored", *AT, "--throughput", 350, "--latency", "80%")
    words = (*words, "--out", tmp_path / "run")
    result = halflap(*words, "--json").json
    row, student = result["latency"], read_config(tmp_path / "run" / "checkpoint")
    assert (row["phase"], row["context"], row["batch"]) == ("decode", 64, 2)
    assert row["seconds"] == pytest.approx(made_up_seconds(student, Condition("decode", 64, 2)))
    assert row["predicted_seconds"] == pytest.approx(row["seconds"], rel=0.05)
    assert row["predicted_seconds"] <= row["budget_seconds"] < row["teacher_seconds"]
    assert row["tokens_per_second"] == pytest.approx(2 / row["seconds"]) and row["within_budget"] is True
    assert "| budget, kept |" in (tmp_path / "run" / "checkpoint" / "README.md").read_text()
    assert {"costs.json", "latency.json"} <= {file.name for file in (tmp_path / "run").iterdir()}
    assert "It was predicted to take" in (tmp_path / "run" / "report.html").read_text()
    shown = halflap(*words).out
    assert "a pass" in shown and "predicted" in shown and "decode at context 64, batch 2" in shown


def students_take(monkeypatch: pytest.MonkeyPatch, place: Path, times: Callable[[ModelConfig], float]) -> None:
    """All but the teacher and stacks of blocks take so many times what sums over blocks tell."""
    teacher = read_config(place / "teacher")

    def timer_of(config: ModelConfig, condition: Condition, *_: Any) -> Callable[[float], float]:
        student = len({type(block) for block in config.blocks}) > 1 and config not in (teacher,)
        return lambda _: made_up_seconds(config, condition) * (times(config) if student else 1.0)

    monkeypatch.setattr(timing, "timer_of", timer_of)


@pytest.mark.parametrize("method", ["homogeneous", "minipuzzle", "puzzle"])
def test_predictions_are_corrected_by_the_clock(
    halflap: Callable[..., Any], place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """Students that take a sixth more than their blocks' sum are cut further, and by no more than that."""
    students_take(monkeypatch, place, lambda _: 7 / 6)
    words = ("search", place / "teacher", "--data", place / "text.jsonl", *FIT, *AT, "--importance", place / "scored")
    small = ("--score-tokens", 128, "--replacement-tokens", 128, "--shortlist", 2, "--method", method)
    words = (*words, *small, "--phase", "prefill", "--latency", "80%", "--out", tmp_path / "run")
    result = halflap(*words, "--json").json
    condition = Condition("prefill", 64, 2)
    share = made_up_seconds(PruningPlan.load(tmp_path / "run" / "search.json").student, condition) * 7 / 6
    share /= made_up_seconds(read_config(place / "teacher"), condition)
    assert (
        0.7 < share <= 0.8 and "took 16." in result["remark"] and "more than the cost table tells" in result["remark"]
    )
    best = result["candidates"][0]["costs"]["latency"] / made_up_seconds(read_config(place / "teacher"), condition)
    # sums of the same seconds in two orders
    assert share * (1 - 1e-12) <= best == pytest.approx(share, rel=0.03), (
        "what it is predicted to take leaves some to spare"
    )
    known = json.loads((tmp_path / "run" / "clock.json").read_text())
    assert all({"teacher", "student"} == set(times) for times in known.values())

    (tmp_path / "run" / "status.json").unlink()  # as if it had been killed: nothing is timed again
    monkeypatch.setattr(timing, "in_turns", lambda *_: pytest.fail("timed again"))
    assert halflap(*words, "--json").json["candidates"] == result["candidates"]


def test_what_the_clock_finds_late_is_not_shortlisted(
    halflap: Callable[..., Any], place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Students of fewer blocks, as no stack tells, take half as much again; the others what is predicted."""
    teacher = read_config(place / "teacher")
    students_take(monkeypatch, place, lambda config: 1.5 if len(config.blocks) < len(teacher.blocks) else 1.0)
    words = ("search", place / "teacher", "--data", place / "text.jsonl", *FIT, *AT, "--importance", place / "scored")
    words = (*words, "--score-tokens", 128, "--phase", "prefill", "--latency", "80%", "--out", tmp_path / "run")
    result = halflap(*words, "--json").json
    measured = [row for row in result["candidates"] if row["loss"] is not None]
    assert measured and {row["sizes"].get("num_blocks") for row in result["candidates"]} > {None}
    assert all(row["sizes"].get("num_blocks") is None for row in measured)


def test_prune_takes_the_first_that_the_clock_finds_in_time(
    halflap: Callable[..., Any], place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    students_take(monkeypatch, place, lambda _: 7 / 6)
    words = ("prune", place / "teacher", "--importance", place / "scored", *AT, "--latency", "80%")
    pruned = halflap(*words, "--out", tmp_path / "run", "--json").json
    condition = Condition("decode", 64, 2)
    seconds = made_up_seconds(read_config(tmp_path / "run" / "checkpoint"), condition) * 7 / 6
    assert seconds <= 0.8 * made_up_seconds(read_config(place / "teacher"), condition)
    assert pruned["predicted_seconds"] == pytest.approx(seconds, rel=0.03) and "were corrected" in pruned["remark"]


def test_a_student_that_is_slower_in_the_end_is_said_to_be(
    halflap: Callable[..., Any], place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once it is cut it takes three times what it took when it was chosen."""
    students_take(monkeypatch, place, lambda _: 3.0 if (tmp_path / "run" / "pruned").exists() else 1.0)
    words = ("compress", place / "teacher", "--data", place / "text.jsonl", "--tokens", "1K", *FIT, *AT)
    small = ("--eval-tokens", 200, "--shortlist", 1, "--score-tokens", 128, "--space.max-depth-cut", 0)
    words = (*words, *small, "--importance", place / "scored", "--latency", "90%", "--out", tmp_path / "run")
    measured = halflap(*words, "--json")
    assert "stacks of blocks is" in measured.err and "each left out in turn" in measured.err  # of the table
    result, row = measured.json, measured.json["latency"]
    assert row["within_budget"] is False
    over = f"{row['seconds'] / row['budget_seconds'] - 1:.1%}"
    tighter = f"--latency {0.9 * row['budget_seconds'] / row['seconds']:.3%}"
    assert f"the student's pass takes {over} more than its budget" in result["remark"] and tighter in result["remark"]
    assert "none of the likeliest" not in result["remark"], "when it was chosen it was in time"
    assert "which it EXCEEDS" in halflap(*words).out
    assert f"| budget, EXCEEDED by {over} |" in (tmp_path / "run" / "checkpoint" / "README.md").read_text()
    page = (tmp_path / "run" / "report.html").read_text()
    assert f"which the student exceeds by {over[:-1]}" in page


def test_steps_share_the_first_teachers_table(
    halflap: Callable[..., Any], place: Path, tmp_path: Path, device: list[ModelConfig]
) -> None:
    words = ("compress", place / "teacher", "--data", place / "text.jsonl", "--tokens", "1K", *FIT, "--steps", 2)
    small = ("--calibration-tokens", 256, "--score-tokens", 128, "--eval-tokens", 200, "--shortlist", 1)
    words = (*words, *small, *AT, "--latency", "50%", "--space.max-width-cut", 0.6, "--out", tmp_path / "run")
    result = halflap(*words, "--json").json
    shapes = [read_config(tmp_path / "run" / at / "checkpoint") for at in ("steps/1", ".")]
    whole, first, last = (
        made_up_seconds(config, Condition("decode", 64, 2)) for config in (read_config(place / "teacher"), *shapes)
    )
    assert first / whole == pytest.approx(0.5**0.5, rel=0.06) and last / whole == pytest.approx(0.5, rel=0.06)
    assert result["latency"]["teacher_seconds"] == pytest.approx(whole)
    assert not list(tmp_path.glob("run/steps/*/costs.json")), "one table serves all steps"


def test_puzzle_chooses_blocks_within_a_time(
    halflap: Callable[..., Any], place: Path, tmp_path: Path, device: list[ModelConfig]
) -> None:
    text = ("--importance", place / "scored", "--data", place / "text.jsonl", *FIT, *AT, "--method", "puzzle")
    few = ("--replacement-tokens", 128, "--score-tokens", 128, "--shortlist", 2)
    words = ("search", place / "teacher", *text, *few, "--latency", "70%", "--params", "90%")
    best = halflap(*words, "--out", tmp_path / "search", "--json").json["candidates"][0]
    condition, plan = Condition("decode", 64, 2), tmp_path / "search" / "search.json"
    student, whole = PruningPlan.load(plan).student, made_up_seconds(read_config(place / "teacher"), condition)
    assert best["costs"]["latency"] <= 0.7 * whole * (1 + 1e-6)
    assert made_up_seconds(student, condition) == pytest.approx(best["costs"]["latency"], rel=0.05)
    assert any(block.kind == "linear" for config in device for block in config.blocks)

    table = json.loads((tmp_path / "search" / "costs.json").read_text())
    del table["conditions"][0]["fit"]["coefficients"]["linear"]
    (tmp_path / "old.json").write_text(json.dumps(table))
    refused = halflap(*words, "--costs", tmp_path / "old.json", "--out", tmp_path / "refused")
    assert refused.status == 1 and "no times of linear blocks, which method puzzle may choose" in refused.err
    refused = halflap(*words[:-4], "--throughput", 1e9, "--out", tmp_path / "refused-too")
    assert refused.status == 1 and "tokens a second (decode at context 64, batch 2) cannot be met" in refused.err
    assert "lower --throughput" in refused.err and not list(tmp_path.glob("refused*/variant_scores.json"))


def test_a_sweep_finds_the_best_of_each_value(halflap: Callable[..., Any], place: Path, tmp_path: Path) -> None:
    words = ("search", place / "teacher", "--importance", place / "scored", "--data", place / "text.jsonl", *FIT)
    words = (*words, "--score-tokens", 128, "--shortlist", 2, "--out", tmp_path / "run")
    swept = (*words, "--sweep", "params", "60%", "75%", "--json")
    result = halflap(*swept).json
    assert [row["value"] for row in result["sweep"]["values"]] == ["60%", "75%"]
    teacher = halflap("inspect", place / "teacher", "--json").json["parameters"]
    for row, share in zip(result["sweep"]["values"], (0.6, 0.75), strict=True):
        best = result["candidates"][row["candidate"]]
        assert best["chosen"] and best["loss"] and 0.95 * share <= best["costs"]["params"] / teacher <= share
        alike = [r["loss"] for r in result["candidates"] if r["value"] == row["value"]]
        assert best["loss"] == min(alike) and json.loads(Path(row["path"]).read_text())["plan"] is not None
    shown = halflap(*swept[:-1]).out
    assert "60%" in shown and f"report: {result['report']}" in shown
    assert Path(result["report"]).read_text().count(", chosen") == 2
    pruned = halflap("prune", place / "teacher", "--plan", tmp_path / "run" / "search.json", "--out", tmp_path / "a")
    assert pruned.status == 1 and "best of several budgets" in pruned.err and "60%/search.json" in pruned.err
    one = result["sweep"]["values"][0]["path"]
    assert halflap("prune", place / "teacher", "--plan", one, "--out", tmp_path / "b").status == 0


def test_a_value_takes_what_a_tighter_one_found_where_that_is_better(tmp_path: Path) -> None:
    def result(params: float, loss: float) -> SearchResult:
        trial = Trial(Sizes(hidden_size=int(params)), {"params": params}, 0.0, loss)
        return SearchResult({"budgets": {}}, 1, (trial,))

    found = {"50%": result(48, 6.3), "60%": result(59, 6.4), "70%": result(68, 6.2), "80%": result(79, 6.2)}
    ceilings = {value: {"params": float(value[:-1])} for value in found}
    data = sweep.combined("params", found, ceilings, by_loss, tmp_path)
    assert [row["candidate"] for row in data["sweep"]["values"]] == [0, 0, 2, 2]  # the smaller of equals
    assert [row["chosen"] for row in data["candidates"]] == [True, False, True, False]
    assert data["sweep"]["values"][1]["path"].endswith("50%/search.json")
    assert data["sweep"]["values"][1]["remark"] == "its own best is behind that of 50%"

    def rated(params: float, loss: float, accuracy: float, rounds: tuple[Round, ...] = ()) -> SearchResult:
        trial = Trial(Sizes(hidden_size=int(params)), {"params": params}, 0.0, loss, accuracy, accuracy, rounds)
        return SearchResult({"budgets": {}}, 1, (trial,))

    agreeing = {"50%": rated(48, 2.8, 0.5), "60%": rated(59, 3.0, 0.6)}
    data = sweep.combined("params", agreeing, ceilings, by_agreement, tmp_path)
    assert [row["candidate"] for row in data["sweep"]["values"]] == [0, 1]  # as the method ranks them
    trained = {"50%": rated(48, 2.8, 0.5, (Round(2000, 2.0),)), "60%": rated(59, 3.0, 0.6, (Round(1000, 2.1),))}
    data = sweep.combined("params", trained, ceilings, by_loss, tmp_path)
    assert [row["candidate"] for row in data["sweep"]["values"]] == [0, 1]  # on unequal tokens: no comparison


def test_of_equal_losses_a_sweep_takes_the_faster(tmp_path: Path) -> None:
    found, losses = {}, {"110%": 2.0, "150%": 2.0005, "200%": 2.5}
    for value, loss in losses.items():
        seconds = 100 / float(value[:-1])
        trial = Trial(Sizes(), {"latency": seconds, "throughput": 1 / seconds}, 0.0, 3.0, rounds=(Round(1000, loss),))
        found[value] = SearchResult({"budgets": {}}, 1, (trial,))
    ceilings = {value: {"latency": 100 / float(value[:-1])} for value in found}
    for tolerance, taken in ((0.0, [0, 1, 2]), (0.001, [1, 1, 2])):
        data = sweep.combined("throughput", found, ceilings, by_loss, tmp_path, tolerance)
        assert [row["candidate"] for row in data["sweep"]["values"]] == taken


def test_the_page_of_a_sweep_of_memory_draws_memory(halflap: Callable[..., Any], place: Path, tmp_path: Path) -> None:
    words = ("search", place / "teacher", "--importance", place / "scored", "--data", place / "text.jsonl", *FIT)
    words = (*words, "--score-tokens", 128, "--shortlist", 2, "--out", tmp_path / "run")
    page = halflap(*words, "--sweep", "memory", "70%", "80%", "--json").json["report"]
    assert "MiB of memory against held-out loss" in Path(page).read_text()


def test_a_sweep_of_throughput_takes_more_than_the_teachers(
    halflap: Callable[..., Any], place: Path, tmp_path: Path
) -> None:
    words = ("search", place / "teacher", "--importance", place / "scored", "--data", place / "text.jsonl", *FIT, *AT)
    words = (*words, "--score-tokens", 128, "--shortlist", 2, "--out", tmp_path / "run")
    result = halflap(*words, "--sweep", "throughput", "120%", "150%", "--json").json
    whole = made_up_seconds(read_config(place / "teacher"), Condition("decode", 64, 2))
    for row, share in zip(result["sweep"]["values"], (1.2, 1.5), strict=True):
        assert result["candidates"][row["candidate"]]["costs"]["latency"] <= whole / share * (1 + 1e-6)
    refused = halflap(*words[:-2], "--params", "150%", "--out", tmp_path / "other")
    assert refused.status == 2 and "at most 100%" in refused.err


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--sweep", "size", "60%"), "'size' is no budget"),
        (("--sweep", "params"), "it names no value"),
        (("--sweep", "params", "a-lot"), "sweep: 'a-lot' is not an amount"),
        (("--sweep", "throughput", "0", "150%"), "sweep is 'throughput 0 150%', and a budget is above 0"),
        (("--sweep", "params", "60%", "--memory", "0MB"), "memory is 0B, and a budget is above 0: correct --memory"),
        (("--sweep", "latency", "20"), "sweep: '20' is not an amount that fits here: write a time with its unit"),
        (
            ("--sweep", "params", "60%", "--params", "50%"),
            "values of params, which is also given as --params",
        ),
    ],
)
def test_a_sweep_of_nothing_is_refused(
    halflap: Callable[..., Any], place: Path, tmp_path: Path, words: Any, says: str
) -> None:
    text = ("--importance", place / "scored", "--data", place / "text.jsonl")
    outcome = halflap("search", place / "teacher", *text, *words, "--out", tmp_path / "run")
    assert outcome.status == 2 and says in outcome.err


def test_a_table_needs_a_place(halflap: Callable[..., Any], place: Path) -> None:
    outcome = halflap("bench", place / "teacher", "--blocks")
    assert outcome.status == 2 and "--out DIR" in outcome.err
