"""From a teacher to a smaller model through the command line: what the verbs leave and refuse, and resuming."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from halflap.checkpoints.checkpoint import load_model, save_model
from halflap.checkpoints.config import read_lineage
from halflap.commands import scoring, shortlist, students
from halflap.commands.teaching import distill_together
from halflap.compress.importance import Importance
from halflap.data.tokenizer import train_tokenizer
from halflap.models.count import count_parameters
from halflap.models.model import HybridModel, initialize
from halflap.models.presets import hymba, preset

FIT = ("--fit.sequence-length", 32, "--fit.batch-size", 4, "--fit.learning-rate", 1e-3)
SMALL = ("--calibration-tokens", 512, "--score-tokens", 256, "--eval-tokens", 400, "--shortlist", 2)

TEACHERS = {
    "nemotron-h-tiny": preset("nemotron-h-tiny"),
    "llama-tiny": preset("llama-tiny"),
    "hymba": hymba(
        5, hidden=64, mlp=96, heads=(4, 2), state=8, window=16, meta=4, vocab=512, context=128, original_context=64
    ),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher of each family with random weights and a tokenizer, and text of 200 short documents."""
    folder = tmp_path_factory.mktemp("compress")
    words = [f"{first}{second}" for first in ("ha", "ma", "sta", "ga") for second in ("te", "d", "lf", "mba")]
    generator = random.Random(0)
    documents = [" ".join(generator.choices(words, k=generator.randint(30, 90))) for _ in range(200)]
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    train_tokenizer(documents, 300).save(folder / "tokenizer")
    for name, config in TEACHERS.items():
        model = HybridModel(config)
        initialize(model, 0)
        save_model(model, folder / name, tokenizer_from=folder / "tokenizer", dtype="bfloat16")
    return folder


@pytest.fixture(scope="module")
def scored(place: Path) -> Path:
    """Importance of the hybrid teacher, as `score` leaves it."""
    from halflap.cli import main

    words = ("score", place / "nemotron-h-tiny", "--data", place / "text.jsonl", "--tokens", "2K")
    assert main([str(w) for w in (*words, "--sequence-length", 32, "--out", place / "scored", "--quiet")]) == 0
    return place / "scored" / "importance.safetensors"


def test_score_leaves_importance_of_every_axis(scored: Path, place: Path) -> None:
    found = Importance.load(scored)
    assert set(found.depth) == {"block_influence", "kl", "kl_rank", "hidden_mse", "hidden_mse_rank"}
    assert found.tokens > 1900 and found.depth_metric == ""
    result = json.loads((place / "scored" / "status.json").read_text())["result"]
    assert {row["axis"] for row in result["axes"]} >= {"hidden_size", "mamba_num_heads", "num_attention_heads"}


def test_a_search_without_text_stands_as_cuts_are_expected_to_hurt(
    halflap: Callable[..., Any], place: Path, scored: Path, tmp_path: Path
) -> None:
    model = place / "nemotron-h-tiny"
    words = ("search", model, "--importance", scored, "--params", "70%")
    result = halflap(*words, "--out", tmp_path / "search", "--json").json
    hurts = [row["hurt"] for row in result["candidates"]]
    assert len(hurts) > 1 and hurts[0] == min(hurts) and all(row["loss"] is None for row in result["candidates"])
    assert "no text was given" in result["remark"] and result["candidates"][0]["chosen"]
    by_plan = halflap("prune", model, "--plan", tmp_path / "search", "--out", tmp_path / "plan", "--json").json
    by_budget = ("prune", model, "--importance", scored, "--params", "70%", "--out", tmp_path / "budget")
    assert by_plan["parameters"] == halflap(*by_budget, "--json").json["parameters"]
    refused = halflap(*words, "--method", "puzzle", "--out", tmp_path / "puzzle")
    assert refused.status == 1 and "no text was given" in refused.err and "--data" in refused.err


def test_search_then_prune_then_verify(halflap: Callable[..., Any], place: Path, scored: Path, tmp_path: Path) -> None:
    teacher = place / "nemotron-h-tiny"
    text = ("--data", place / "text.jsonl")
    search = halflap(
        *("search", teacher, "--importance", scored, *text, "--params", "60%", *FIT, "--shortlist", 2),
        *("--score-tokens", 256, "--out", tmp_path / "search", "--json"),
    ).json
    best, limit = search["candidates"][0], 0.6 * count_parameters(preset("nemotron-h-tiny"))
    assert best["chosen"] and best["loss"] and 0.95 * limit <= best["costs"]["params"] <= limit
    pruned = halflap(
        *("prune", teacher, "--plan", tmp_path / "search" / "search.json", "--out", tmp_path / "pruned", "--json"),
    ).json
    assert pruned["parameters"] == best["costs"]["params"] and pruned["verified"]
    checkpoint = tmp_path / "pruned" / "checkpoint"
    assert {"pruning_plan.json", "certificate.json", "tokenizer.json"} <= {file.name for file in checkpoint.iterdir()}
    assert read_lineage(checkpoint)[-1]["verb"] == "prune"
    again = halflap("verify", tmp_path / "pruned", "--tokens", 64, "--json").json
    assert again["passed"] and again["tokens"] == 64 and {row["axis"] for row in again["axes"]} == set(best["sizes"])
    same = halflap(
        "prune", teacher, "--plan", checkpoint / "pruning_plan.json", "--out", tmp_path / "again", "--json"
    ).json
    assert same["parameters"] == pruned["parameters"]
    one, other = (load_model(tmp_path / name).state_dict() for name in ("pruned", "again"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_sizes_need_no_search(halflap: Callable[..., Any], place: Path, scored: Path, tmp_path: Path) -> None:
    sizes = ("--sizes.mamba-num-heads", 8, "--sizes.num-blocks", 5, "--norm-correction", "calibrated")
    words = ("prune", place / "nemotron-h-tiny", "--importance", scored, *sizes)
    result = halflap(*words, "--out", tmp_path / "run", "--json").json
    assert len(result["pattern"]) == 5 and result["verified"]
    alone = ("prune", place / "nemotron-h-tiny", "--sizes.drop-blocks", 1, 4, "--out", tmp_path / "alone", "--json")
    assert halflap(*alone).json["pattern"] == "MM*M-"


def test_what_contradicts_is_refused_before_any_work(
    halflap: Callable[..., Any], place: Path, scored: Path, tmp_path: Path
) -> None:
    teacher = tmp_path / "teacher"
    shutil.copytree(place / "nemotron-h-tiny", teacher)
    assert halflap("prune", teacher, "--sizes.drop-blocks", 3, "--out", tmp_path / "pruned").status == 0
    generation = json.loads((tmp_path / "pruned" / "checkpoint" / "generation_config.json").read_text())
    assert generation["use_cache"] is False  # stock transformers has no cache for a model without attention
    for more in (("--importance", scored), ("--space.hidden-size", 64), ("--norm-correction", "none")):
        outcome = halflap("prune", teacher, "--plan", tmp_path / "pruned", *more, "--out", tmp_path / "again")
        assert outcome.status == 2 and "which it has settled" in outcome.err
    outcome = halflap("prune", teacher, "--importance", scored, "--throughput", 0, "--out", tmp_path / "again")
    assert outcome.status == 2 and "a budget is above 0" in outcome.err
    words = ("compress", teacher, "--data", place / "text.jsonl", "--tokens", "1K", "--params", "60%")
    outcome = halflap(*words, "--importance", scored, "--teacher-correction", "1K", "--out", tmp_path / "all")
    assert outcome.status == 2 and "teacher_correction trains it first" in outcome.err
    words = ("compress", place / "llama-tiny", "--data", place / "text.jsonl", "--tokens", "1K", "--params", "60%")
    outcome = halflap(*words, "--eval-context", 513, "--out", tmp_path / "all")
    assert outcome.status == 1 and "a window that is judged takes 513 positions" in outcome.err
    model = HybridModel(TEACHERS["nemotron-h-tiny"])
    initialize(model, 1)
    save_model(model, teacher, tokenizer_from=place / "tokenizer", dtype="bfloat16")
    words = ("distill", tmp_path / "pruned", "--data", place / "text.jsonl", "--tokens", "1K", *FIT)
    outcome = halflap(*words, "--out", tmp_path / "distilled")
    assert outcome.status == 1 and "has changed since" in outcome.err


def test_distill_goes_on_from_the_lineage(
    halflap: Callable[..., Any], place: Path, scored: Path, tmp_path: Path
) -> None:
    words = ("prune", place / "nemotron-h-tiny", "--importance", scored, "--params", "70%")
    halflap(*words, "--out", tmp_path / "pruned", "--json")
    text = ("--data", place / "text.jsonl", "--tokens", "1K", *FIT)
    result = halflap("distill", tmp_path / "pruned", *text, "--out", tmp_path / "run", "--json").json
    assert result["tokens"] >= 1000 and result["held_out_loss"] > 0
    assert [step["verb"] for step in read_lineage(tmp_path / "run" / "checkpoint")] == ["prune", "distill"]
    assert "as cut, before any training, it equals" in (tmp_path / "run" / "checkpoint" / "README.md").read_text()
    outcome = halflap("verify", tmp_path / "run", "--json")
    assert outcome.status == 1 and "trained or changed after pruning" in outcome.err
    findings = json.loads(outcome.out)
    assert not findings["passed"] and findings["different_tensors"]
    assert (findings["axes"], findings["max_abs_error"], findings["logit_scale"]) == ([], None, None)
    other = place / "other"
    shutil.copytree(tmp_path / "pruned" / "checkpoint", other)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    pieces = tokenizer["model"]["vocab"]
    one, two = list(pieces)[:2]
    pieces[one], pieces[two] = pieces[two], pieces[one]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    foreign = halflap("distill", other, *text, "--out", tmp_path / "foreign")
    assert foreign.status == 1 and "must read the same tokens" in foreign.err
    stored = halflap("distill", tmp_path / "pruned", *text, "--top-k", 8, "--out", tmp_path / "stored", "--json").json
    assert stored["steps"] == result["steps"]


@pytest.mark.parametrize("family", TEACHERS)
def test_compress_does_it_all(halflap: Callable[..., Any], place: Path, tmp_path: Path, family: str) -> None:
    controls = ("--controls", "scratch", "group_blind", "random")
    cut = ("--sizes.mamba-num-heads", 8) if family == "nemotron-h-tiny" else ()
    words = ("compress", place / family, "--data", place / "text.jsonl", "--tokens", "1K", "--params", "60%", *SMALL)
    out = tmp_path / "run"
    words = (*words, "--eval-context", 24)
    result = halflap(*words, *FIT, *cut, *controls, "--shortlist-tokens", 256, "--out", out, "--json").json
    scores = json.loads((out / "scores.json").read_text())
    assert {row["context"] for row in scores.values()} == {24}
    assert result["verified"] and 0.55 < result["parameters_ratio"] <= 0.6
    assert {"teacher", "pruned", "student"} <= set(scores)
    expected = ["scratch", "group_blind", "random"] if cut else ["scratch", "random"]
    assert [row["name"] for row in result["controls"]] == expected
    assert bool(cut) == (result["remark"] is None or "group_blind" not in result["remark"])
    for name in ("report.html", "search.json", "arms.json", "importance.safetensors", "pruned/certificate.json"):
        assert (out / name).exists(), name
    card = (out / "checkpoint" / "README.md").read_text()
    assert all(f"## {part}" in card for part in ("What was cut", "How it does", "How to load it"))
    control = (out / "arms" / "random" / "checkpoint" / "README.md").read_text()
    assert "it equals" in card and "it equals" not in control
    student = load_model(out / "checkpoint")
    assert sum(p.numel() for p in student.parameters()) == result["student"]["parameters"]
    assert read_lineage(out / "checkpoint")[-1]["continues_short_distillation"]
    finished = halflap(*words, *FIT, *cut, *controls, "--shortlist-tokens", 256, "--out", out, "--json")
    assert finished.json == result and "finished" in finished.err


@pytest.mark.parametrize("stop", ["in a round", "before the winner is kept", "while the winner is written"])
def test_minipuzzle_in_rounds_ends_the_same_after_an_interruption(
    halflap: Callable[..., Any], place: Path, scored: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: str
) -> None:
    small = ("--importance", scored, "--score-tokens", 256, "--eval-tokens", 400, "--shortlist", 6, "--refined", 4)
    words = ("compress", place / "nemotron-h-tiny", "--data", place / "text.jsonl", "--tokens", "2K", *small, *FIT)
    words = (*words, "--memory", "75%", "--context", 256, "--method", "minipuzzle")
    words = (*words, "--space.max-depth-cut", 0.5, "--space.mamba-num-heads", 12, 8)
    words = (*words, "--shortlist-tokens", 256, "--json")
    whole = halflap(*words, "--out", tmp_path / "whole").json
    found = json.loads((tmp_path / "whole" / "search.json").read_text())
    refined = [row for row in found["candidates"] if row["rounds"]]
    assert [len(row["rounds"]) for row in refined] == [2, 2, 1, 1]
    spent = sum(row["rounds"][-1]["tokens"] for row in refined)
    assert abs(spent - 4 * 256) <= 6 * 128, "the budget, but for a step a candidate and round"
    scores = [row for row in found["candidates"] if row["accuracy"] is not None]
    assert len(scores) == 6 and all(0 <= row["agreement"] <= 1 for row in scores)
    assert whole["sizes"]["num_mamba_blocks"] and whole["sizes"]["num_mlp_blocks"] and whole["verified"]
    step = read_lineage(tmp_path / "whole" / "checkpoint")[-1]
    assert step["continues_short_distillation"] and step["tokens"] >= 2000
    kept = [folder for folder in (tmp_path / "whole" / "shortlist").iterdir() if folder.is_dir()]
    assert len(kept) == 1 and not (kept[0] / "training").exists()

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    calls: list[int] = []

    def second_round(*rest: Any, **more: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return distill_together(*rest, **more)

    def half_written(directory: Path, *_: object, **__: object) -> None:
        directory.mkdir(parents=True)
        (directory / "config.json").write_text("{}")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if stop == "while the winner is written":
            patch.setattr(students, "save_trained", half_written)
        elif stop == "in a round":
            patch.setattr(shortlist, "distill_together", second_round)
        else:
            patch.setattr(shortlist, "keep", interrupted)
        assert halflap(*words, "--out", tmp_path / "run").status == 130
    result = halflap(*words, "--out", tmp_path / "run").json
    assert result | {"report": ""} == whole | {"report": "", "student": result["student"]}
    assert (tmp_path / "run" / "search.json").read_bytes() == (tmp_path / "whole" / "search.json").read_bytes()
    one, other = (load_model(tmp_path / name).state_dict() for name in ("run", "whole"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_candidates_that_do_not_fit_together_learn_from_stored_logits(
    halflap: Callable[..., Any], place: Path, scored: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shortlist, "free_memory", lambda _: 1000)
    words = ("search", place / "nemotron-h-tiny", "--importance", scored, "--data", place / "text.jsonl", *FIT)
    words = (*words, "--params", "60%", "--shortlist", 3, "--score-tokens", 256, "--shortlist-tokens", 256, "--json")
    result = halflap(*words, "--out", tmp_path / "run").json
    assert [len(row["rounds"]) for row in result["candidates"][:3]] == [2, 2, 1]
    taught = json.loads((tmp_path / "run" / "shortlist" / "taught.json").read_text())
    assert taught["taught"] == "in turn" and taught["bytes_needed"] > 1000
    assert not (tmp_path / "run" / "shortlist" / "teacher-logits").exists()
    equal = halflap(*words, "--rounds", "equal", "--out", tmp_path / "equal").json
    assert [len(row["rounds"]) for row in equal["candidates"][:3]] == [1, 1, 1]


def test_what_minipuzzle_does_not_do_is_said(
    halflap: Callable[..., Any], place: Path, scored: Path, tmp_path: Path
) -> None:
    text = ("--data", place / "text.jsonl", *FIT)
    words = ("compress", place / "nemotron-h-tiny", "--importance", scored, *text, "--params", "60%", *SMALL[2:])
    for name, (more, says) in enumerate(
        (
            (("--sizes.drop-blocks", 1, "--method", "minipuzzle"), "which --method minipuzzle chooses"),
            (("--space.num-mlp-blocks", 2), "search with --method minipuzzle"),
            (("--space.num-mlp-blocks", 9, "--method", "minipuzzle"), "the teacher has 3"),
        )
    ):
        outcome = halflap(*words, *more, "--out", tmp_path / str(name))
        assert outcome.status in (1, 2) and says in outcome.err.replace("\n", " ") and "Traceback" not in outcome.err
    words = ("compress", place / "llama-tiny", "--data", place / "text.jsonl", *SMALL, *FIT, "--params", "60%")
    outcome = halflap(*words, "--space.num-mlp-blocks", 2, "--method", "minipuzzle", "--out", tmp_path / "llama")
    assert outcome.status == 1 and "use sizes.num_blocks" in outcome.err.replace("\n", " ")


def test_distill_in_phases_by_a_mix_of_losses(
    halflap: Callable[..., Any], place: Path, scored: Path, tmp_path: Path
) -> None:
    cut = ("prune", place / "nemotron-h-tiny", "--importance", scored, "--params", "60%", "--out", tmp_path / "pruned")
    halflap(*cut)
    phases = {"phases": [{"tokens": 256, "end": 1e-3}, {"tokens": 256, "end": 1e-4, "batch_size": 2}]}
    (tmp_path / "phases.yaml").write_text(json.dumps(phases))
    words = ("distill", tmp_path / "pruned", "--data", place / "text.jsonl", *FIT, "--phases", tmp_path / "phases.yaml")
    losses = ("--loss", "skew_kl", "--skew-alpha", 0.2, "--next-token-share", 0.1)
    inner = ("--intermediate", "embedding", "blocks", "mamba_x", "--intermediate-loss", "cosine")
    result = halflap(*words, *losses, *inner, "--out", tmp_path / "run", "--json").json
    keep = json.loads((tmp_path / "pruned" / "checkpoint" / "pruning_plan.json").read_text())["keep_blocks"]
    assert result["steps"] == 2 + 4 and result["block_map"] == keep
    row = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert row["loss"] == pytest.approx(2 * (0.9 * row["skew_kl"] + 0.1 * row["next_token"]), rel=1e-3)
    student = load_model(tmp_path / "run" / "checkpoint")
    assert sum(p.numel() for p in student.parameters()) == count_parameters(student.config)
    stored = ("--top-k", 8, "--next-token-share", 0.5)
    result = halflap(*words, *stored, "--out", tmp_path / "stored", "--json").json
    assert result["steps"] == 6 and result["teacher_logits"]["error"] > 0
    outcome = halflap(*words, "--top-k", 8, "--loss", "reverse_kl", "--out", tmp_path / "wrong")
    assert outcome.status == 2 and "allow forward_kl at temperature 1" in outcome.err
    outcome = halflap(*words, *inner, "--block-map", 0, "--out", tmp_path / "wrong")
    assert outcome.status == 1 and "--block-map" in outcome.err


def test_compress_in_steps_after_correcting_the_teacher(
    halflap: Callable[..., Any], place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted in the last step: the first step and the teacher's correction are found, not done again."""
    teacher, out = place / "nemotron-h-tiny", tmp_path / "run"
    words = ("compress", teacher, "--data", place / "text.jsonl", "--tokens", "1K", "--params", "40%", *SMALL, *FIT)
    words = (*words, "--steps", 2, "--teacher-correction", 256, "--intermediate", "blocks", "--out", out, "--json")
    write = students.write_student

    def only_the_first(directory: Path, *rest: Any) -> Any:
        if directory == out / "pruned":
            raise KeyboardInterrupt
        return write(directory, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(students, "write_student", only_the_first)
        assert halflap(*words).status == 130
    done = [out / "steps" / "1" / "status.json", out / "teacher" / "checkpoint" / "model.safetensors"]
    before = [file.stat().st_mtime_ns for file in done]
    result = halflap(*words).json
    assert before == [file.stat().st_mtime_ns for file in done]
    assert result["parameters_ratio"] <= 0.4 < result["steps"][0]["parameters_ratio"] <= 0.4**0.5
    assert result["teacher_correction"]["tokens"] >= 256 and result["verified"]
    steps = read_lineage(out / "checkpoint")
    assert [step["verb"] for step in steps] == ["teacher_correction", "prune", "distill", "prune", "distill"]
    taught = {step["inputs"]["teacher"] for step in steps if step["verb"] == "distill"}
    assert taught == {steps[1]["inputs"]["teacher"]} != {steps[3]["inputs"]["teacher"]}
    assert "steps/1" in (out / "report.html").read_text()
    outcome = halflap(*words[:6], "--sizes.hidden-size", 64, "--steps", 2, "--out", tmp_path / "sizes")
    assert outcome.status == 2 and "steps divide a budget" in outcome.err


def test_an_interrupted_compress_goes_on(
    halflap: Callable[..., Any], place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted at the judgement, after everything else: nothing is measured, cut or trained twice."""
    words = ("compress", place / "nemotron-h-tiny", "--data", place / "text.jsonl", "--tokens", "1K", "--params", "60%")
    words = (*words, *SMALL, *FIT, "--out", tmp_path / "run", "--json")

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(students, "judge", interrupted)
        assert halflap(*words).status == 130
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "run" / "pruned").iterdir()}
    monkeypatch.setattr(scoring, "measure", interrupted)
    result = halflap(*words).json
    assert result["student"]["loss"] > 0
    assert before == {file: file.stat().st_mtime_ns for file in (tmp_path / "run" / "pruned").iterdir()}


@pytest.mark.parametrize(
    ("words", "status", "says"),
    [
        (("--params", "1K"), 1, "the smallest student of this search space has"),
        ((), 2, "nothing says how small"),
        (("--params", "50%", "--costs", "absent.json", "--latency", "5ms"), 1, "does not exist"),
        (("--sizes.mamba-num-heads", 7), 1, "choose 8"),
        (("--sizes.hidden-size", 1000), 1, "the teacher has 96"),
        (("--plan", "absent.json"), 1, "does not exist"),
    ],
)
def test_what_cannot_be_is_said(
    halflap: Callable[..., Any], place: Path, scored: Path, tmp_path: Path, words: Any, status: int, says: str
) -> None:
    outcome = halflap("prune", place / "nemotron-h-tiny", "--importance", scored, *words, "--out", tmp_path / "run")
    assert outcome.status == status and says in outcome.err and "Traceback" not in outcome.err


def test_importance_and_plans_of_another_teacher_are_refused(
    halflap: Callable[..., Any], place: Path, scored: Path, tmp_path: Path
) -> None:
    text = ("--data", place / "text.jsonl")
    for verb, more in (("prune", ()), ("search", text), ("compress", text)):
        other = (verb, place / "llama-tiny", "--importance", scored, "--params", "60%", *more)
        outcome = halflap(*other, "--out", tmp_path / verb)
        assert outcome.status == 1 and "score this checkpoint first" in outcome.err
    outcome = halflap("search", place / "llama-tiny", "--params", "60%", *text, "--out", tmp_path / "none")
    assert outcome.status == 2 and "no importance was given" in outcome.err
    assert not list(tmp_path.glob("*/corpus")), "text is read after what makes a run impossible"
    halflap("prune", place / "nemotron-h-tiny", "--importance", scored, "--params", "60%", "--out", tmp_path / "p")
    plan = tmp_path / "p" / "checkpoint" / "pruning_plan.json"
    outcome = halflap("prune", place / "llama-tiny", "--plan", plan, "--out", tmp_path / "b")
    assert outcome.status == 1 and "made for teacher" in outcome.err
    outcome = halflap("verify", place / "llama-tiny")
    assert outcome.status == 1 and "no pruned student" in outcome.err
    outcome = halflap("prune", place / "llama-tiny", "--params", "60%", "--out", tmp_path / "c")
    assert outcome.status == 2 and "halflap score" in outcome.err
