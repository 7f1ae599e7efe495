"""Method puzzle through the command line: a variant for each block, unequal students, resuming, refusals."""

from __future__ import annotations

import dataclasses
import itertools
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from halflap.checkpoints import passes
from halflap.checkpoints.checkpoint import Checkpoint, load_model, save_model
from halflap.checkpoints.config import read_lineage
from halflap.commands import puzzle, shortlist
from halflap.compress import replace_streamed
from halflap.compress.costs import Budget, costs
from halflap.compress.importance import Importance, score_shapes
from halflap.compress.library import WHOLE, library_of
from halflap.compress.plan import PruningPlan
from halflap.compress.programme import Programme
from halflap.compress.ranking import plan_of_variants
from halflap.data.tokenizer import train_tokenizer
from halflap.hf import HalflapForCausalLM
from halflap.models.count import count_parameters
from halflap.models.model import HybridModel, initialize
from halflap.models.presets import hymba, preset

ROOT = Path(__file__).parents[2]
FIT = ("--fit.sequence-length", 32, "--fit.batch-size", 4, "--fit.learning-rate", 1e-3)
FEW = ("--replacement-tokens", 128, "--score-tokens", 128, "--shortlist", 2, "--method", "puzzle")
TEACHERS = {
    "nemotron-h-tiny": preset("nemotron-h-tiny"),
    "llama-tiny": preset("llama-tiny"),
    "hymba": hymba(
        6, hidden=64, mlp=96, heads=(4, 2), state=8, window=16, meta=4, vocab=512, context=128, original_context=64
    ),
}
LIMITS = {"nemotron-h-tiny": 0.7, "llama-tiny": 0.7, "hymba": 0.75}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher of each family with random weights, importance of each, and text."""
    from halflap.cli import main

    folder = tmp_path_factory.mktemp("puzzle")
    words = [f"{first}{second}" for first in ("ha", "ma", "sta", "ga") for second in ("te", "d", "lf", "mba")]
    generator = random.Random(0)
    documents = [" ".join(generator.choices(words, k=generator.randint(30, 90))) for _ in range(60)]
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    train_tokenizer(documents, 300).save(folder / "tokenizer")
    for name, config in TEACHERS.items():
        model = HybridModel(config)
        initialize(model, 0)
        save_model(model, folder / name, tokenizer_from=folder / "tokenizer")
        score = ("score", folder / name, "--data", folder / "text.jsonl", "--tokens", 512, "--sequence-length", 32)
        assert main([str(w) for w in (*score, "--out", folder / f"{name}-scored", "--quiet")]) == 0
    return folder


def search_words(place: Path, family: str) -> tuple[Any, ...]:
    limit = f"{100 * LIMITS[family]:g}%"
    scored = ("--importance", place / f"{family}-scored")
    return ("search", place / family, *scored, "--data", place / "text.jsonl", "--params", limit, *FEW, *FIT)


@pytest.mark.parametrize("family", TEACHERS)
def test_search_then_prune_then_verify(halflap: Callable[..., Any], place: Path, tmp_path: Path, family: str) -> None:
    result = halflap(*search_words(place, family), "--memory", "90%", "--out", tmp_path / "search", "--json").json
    best, whole = result["candidates"][0], count_parameters(TEACHERS[family])
    assert best["chosen"] and best["loss"] and best["costs"]["params"] <= LIMITS[family] * whole
    assert (
        len(best["variants"]) == len(TEACHERS[family].blocks)
        and best["variants"] != result["candidates"][1]["variants"]
    )
    shown = halflap(*search_words(place, family), "--memory", "90%", "--out", tmp_path / "search")
    assert f"of {len(best['variants'])} blocks" in shown.out
    pruned = ("prune", place / family, "--plan", tmp_path / "search" / "search.json", "--out", tmp_path / "pruned")
    cut = halflap(*pruned, "--json").json
    assert cut["parameters"] == best["costs"]["params"] and cut["verified"]
    assert halflap("verify", tmp_path / "pruned", "--tokens", 64, "--json").json["passed"]
    student = load_model(tmp_path / "pruned" / "checkpoint")
    plan = PruningPlan.load(tmp_path / "search" / "search.json")
    assert student.config == plan.student and len(plan.keep_blocks) == len(student.blocks)


def test_windows_and_channels_of_the_carried_teacher(halflap: Callable[..., Any], tmp_path: Path) -> None:
    """A choice whose scores are made up so that both are in it: certified, opened by the Auto classes, not by stock."""
    teacher = Checkpoint.open(ROOT / "demo" / "teacher")
    at: dict[str, Any] = {"context": 65536, "batch": 8}
    whole = costs(teacher.config, Budget(**at))
    budget = Budget(params=0.9 * whole["params"], memory=0.6 * whole["memory"], **at)
    library = library_of(teacher.config, length=512).saving(budget)
    wanted = [o.variant.change.window is not None or bool(o.variant.sizes.mamba_head_dim) for o in library.options]
    scores = np.array([0.0 if o.variant == WHOLE else 0.01 if w else 1.0 for o, w in zip(library.options, wanted)])
    (choice,) = Programme(library, budget).choices(scores)
    variants = library.variants(choice.options)
    widths = {name: torch.rand(size) for name, size in score_shapes(teacher.config).items()}
    plan = plan_of_variants(Importance("random", widths), teacher.digest, teacher.config, variants, "masked")
    assert any(v.change.window for v in variants) and any(v.sizes.mamba_head_dim for v in variants)
    plan.save(tmp_path / "plan.json")
    cut = halflap("prune", teacher.path, "--plan", tmp_path / "plan.json", "--out", tmp_path / "run", "--json")
    assert cut.json["verified"] and cut.json["parameters"] == choice.costs["params"]
    assert halflap("verify", tmp_path / "run", "--tokens", 64, "--json").json["passed"]
    student, tokens = tmp_path / "run" / "checkpoint", torch.randint(0, 4096, (2, 600))
    opened = AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32)
    assert type(opened) is HalflapForCausalLM
    with torch.no_grad():
        one, other = opened(tokens).logits, load_model(student)(tokens)
    assert float((one - other).abs().max()) <= 1e-5 * float(one.abs().max())
    refused = halflap("export", student, "--pad-to-stock", "--out", tmp_path / "stock")
    assert refused.status == 1 and "window" in refused.err


@pytest.mark.parametrize("name", ["llama-tiny", "nemotron-4-tiny"])
def test_an_mlp_and_an_attention_go_out_of_layers_that_stay(
    halflap: Callable[..., Any], tmp_path: Path, name: str
) -> None:
    """Chosen by made-up scores: certified, counted, on the card and the page, and opened by the Auto classes."""
    config = dataclasses.replace(preset(name), vocab_size=512)
    model = HybridModel(config)
    initialize(model, 0)
    teacher = save_model(model, tmp_path / "teacher")
    blocks = tuple(block for index, block in enumerate(config.blocks) if index not in (1, 4))
    budget = Budget(params=count_parameters(dataclasses.replace(config, blocks=blocks)))
    library = library_of(config).saving(budget)
    gone = [o.variant.dropped and o.blocks in ((1,), (4,)) for o in library.options]
    scores = np.array([0.0 if o.variant == WHOLE else 0.01 if g else 1.0 for o, g in zip(library.options, gone)])
    (choice,) = Programme(library, budget).choices(scores)
    widths = {part: torch.rand(size) for part, size in score_shapes(config).items()}
    variants = library.variants(choice.options)
    plan_of_variants(Importance("random", widths), teacher.digest, config, variants, "masked").save(tmp_path / "plan")
    cut = halflap("prune", teacher.path, "--plan", tmp_path / "plan", "--out", tmp_path / "run", "--json").json
    assert cut["verified"] and cut["parameters"] == budget.params == choice.costs["params"]
    assert halflap("verify", tmp_path / "run", "--tokens", 64, "--json").json["passed"]
    student, tokens = tmp_path / "run" / "checkpoint", torch.randint(0, 512, (2, 40))
    assert load_model(student).config.pattern() == "**--*-"
    opened = AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32)
    assert type(opened) is HalflapForCausalLM
    with torch.no_grad():
        one, other = opened(tokens).logits, load_model(student)(tokens)
        written = opened.generate(tokens, max_new_tokens=4, do_sample=False, pad_token_id=0, eos_token_id=None)
        again = load_model(student)(written[:, :-1])[:, 39:].argmax(-1)  # each pass as if there were no cache
    assert float((one - other).abs().max()) <= 1e-5 * float(one.abs().max()) and torch.equal(written[:, 40:], again)
    card = (student / "README.md").read_text()
    assert "Dropped blocks of the teacher: 1, 4." in card and "its blocks are not pairs of attention and MLP" in card
    assert halflap("report", tmp_path / "run", "--out", tmp_path / "page.html").status == 0
    assert "</i>dropped 2</span>" in (tmp_path / "page.html").read_text()
    for form, words in (("hf", "not pairs"), ("gguf", "no MLP follows" if "llama" in name else "GGUF is written of")):
        refused = halflap("export", student, "--format", form, "--out", tmp_path / form)
        assert refused.status == 1 and words in refused.err


def test_an_unequal_student_is_distilled_and_exported(halflap: Callable[..., Any], place: Path, tmp_path: Path) -> None:
    teacher = place / "nemotron-h-tiny"
    space = ("--space.max-depth-cut", 0, "--space.num-attention-heads", 4)
    halflap(*search_words(place, "nemotron-h-tiny"), *space, "--out", tmp_path / "search", "--json")
    halflap("prune", teacher, "--plan", tmp_path / "search" / "search.json", "--out", tmp_path / "pruned", "--json")
    student = load_model(tmp_path / "pruned")
    assert len(set(student.config.blocks)) > 3  # blocks of a kind differ
    text = ("--data", place / "text.jsonl", "--tokens", 256, *FIT)
    assert halflap("distill", tmp_path / "pruned", *text, "--out", tmp_path / "run", "--json").json["tokens"] >= 256
    padded = halflap("export", tmp_path / "run", "--pad-to-stock", "--out", tmp_path / "stock", "--json")
    assert padded.status == 0, padded.err
    tokens = torch.arange(24)[None]
    one, other = (load_model(tmp_path / name)(tokens) for name in ("run", "stock"))
    assert float((one - other).abs().max()) < 1e-2 * float(one.abs().max())


def test_compress_takes_it_all_the_way(halflap: Callable[..., Any], place: Path, tmp_path: Path) -> None:
    words = ("compress", place / "llama-tiny", "--data", place / "text.jsonl", "--tokens", 256, "--params", "70%")
    small = ("--calibration-tokens", 256, "--eval-tokens", 200, "--controls", "random", *FEW, *FIT)
    words = (*words, *small, "--shortlist-tokens", 128, "--refined", 1, "--out", tmp_path / "run")
    result = halflap(*words, "--json").json
    assert result["verified"] and result["parameters_ratio"] <= 0.7 and len(result["variants"]) == 8
    assert [row["name"] for row in result["controls"]] == ["random"]
    assert result["controls"][0]["parameters"] == result["student"]["parameters"]
    assert "of the teacher's parameters: " in halflap(*words).out
    assert (tmp_path / "run" / "variant_scores.json").exists()
    page = (tmp_path / "run" / "report.html").read_text()
    assert "blocks whole" in page and "as the teacher" not in page


def test_an_interrupted_search_ends_with_the_same_files(
    halflap: Callable[..., Any], place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = search_words(place, "nemotron-h-tiny")
    halflap(*words, "--out", tmp_path / "whole", "--json")
    make, made = puzzle.replacement, []

    def failing(*arguments: Any) -> Any:
        if len(made) == 9:
            raise KeyboardInterrupt
        made.append(arguments)
        return make(*arguments)

    monkeypatch.setattr(puzzle, "replacement", failing)
    halflap(*words, "--out", tmp_path / "cut", "--json")
    known = json.loads((tmp_path / "cut" / "variant_scores.json").read_text())["scores"]
    whole = json.loads((tmp_path / "whole" / "variant_scores.json").read_text())["scores"]
    assert 0 < len(known) < len(whole)
    monkeypatch.setattr(puzzle, "replacement", make)
    halflap(*words, "--out", tmp_path / "cut", "--json")
    for name in ("variant_scores.json", "search.json"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "cut" / name).read_bytes()


@pytest.mark.parametrize(
    ("more", "status", "words"),
    [
        (("--params", 1000), 1, "a budget of 1,000 parameters cannot be met: the smallest student of this library"),
        (("--space.hidden-size", 64), 1, "space.hidden_size was given; method puzzle chooses block by block"),
        (
            ("--stream", "--shortlist-tokens", 64),
            2,
            "and a distillation needs the teacher in memory, where its weights",
        ),
        (("--max-overlap", 2), 2, "max_overlap is 2.0; it must be from 0 to 1: correct --max-overlap"),
        (("--method", "jigsaw"), 2, "method"),
    ],
)
def test_refusals(
    halflap: Callable[..., Any], place: Path, tmp_path: Path, more: tuple[Any, ...], status: int, words: str
) -> None:
    given = list(search_words(place, "nemotron-h-tiny"))
    if more[0] in given:
        at = given.index(more[0])
        del given[at : at + 2]
    outcome = halflap(*given, *more, "--out", tmp_path / "run")
    assert outcome.status == status and words in outcome.err


def test_a_choice_far_below_its_budget_says_so(halflap: Callable[..., Any], place: Path, tmp_path: Path) -> None:
    """Two of three MLPs may become linear and nothing else may change: no student is near the budget."""
    given = list(search_words(place, "nemotron-h-tiny"))
    given[given.index("--params") + 1] = "99.9%"
    space = ("--space.max-width-cut", 0, "--space.max-depth-cut", 0)
    result = halflap(*given, *space, "--out", tmp_path / "run", "--json").json
    best = result["candidates"][0]
    assert best["costs"]["params"] < 0.95 * 0.999 * count_parameters(TEACHERS["nemotron-h-tiny"])
    assert f"more than 5 % below the budget: it has {best['costs']['params']:,} parameters where" in result["remark"]


def test_windows_that_rows_cannot_show_are_said(halflap: Callable[..., Any], place: Path, tmp_path: Path) -> None:
    given = list(search_words(place, "llama-tiny"))
    given[given.index("--params") : given.index("--params") + 2] = ["--memory", "99%"]
    space = ("--space.max-width-cut", 0, "--space.max-depth-cut", 0, "--space.window", 200, "--context", 512)
    result = halflap(*given, *space, "--out", tmp_path / "run", "--json").json
    assert "window 200" in result["candidates"][0]["variants"]
    assert "windows of 200 hide nothing in rows of 32 tokens" in result["remark"]


def test_sizes_and_puzzle_exclude_each_other(halflap: Callable[..., Any], place: Path, tmp_path: Path) -> None:
    words = ("compress", place / "llama-tiny", "--data", place / "text.jsonl", "--params", "70%", *FEW, *FIT)
    outcome = halflap(*words, "--sizes.intermediate-size", 64, "--out", tmp_path / "run")
    assert outcome.status == 2 and "sizes were given with method puzzle" in outcome.err


def test_trained_blocks_reach_the_student(halflap: Callable[..., Any], place: Path, tmp_path: Path) -> None:
    """As cut it is certified; the checkpoint beside has the blocks that learnt, and scores are of those."""
    words = (*search_words(place, "nemotron-h-tiny"), "--block-tokens", 256)
    found = halflap(*words, "--out", tmp_path / "search", "--json").json["candidates"][0]
    plain = halflap(*search_words(place, "nemotron-h-tiny"), "--out", tmp_path / "plain", "--json").json["candidates"]
    scores = [json.loads((tmp_path / run / "variant_scores.json").read_text())["scores"] for run in ("search", "plain")]
    dropped = next(name for name in scores[0] if "dropped" in name)
    assert scores[0][dropped] == scores[1][dropped] and scores[0] != scores[1] and found["loss"] != plain[0]["loss"]
    teacher = place / "nemotron-h-tiny"
    plan = tmp_path / "search" / "search.json"
    assert halflap("prune", teacher, "--plan", plan, "--out", tmp_path / "run", "--json").json["verified"]
    trained, cut = (load_model(tmp_path / "run" / part) for part in ("checkpoint", "pruned"))
    different = {k for k, t in trained.state_dict().items() if not torch.equal(t, cut.state_dict()[k])}
    assert different and all(name.startswith("blocks.") for name in different)
    assert read_lineage(tmp_path / "run" / "checkpoint")[-1]["verb"] == "distill_blocks"
    assert halflap("verify", tmp_path / "run", "--tokens", 64, "--json").json["passed"]


@pytest.mark.parametrize("block_tokens", [0, 64])
def test_a_block_at_a_time_it_says_the_same(
    halflap: Callable[..., Any], place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block_tokens: int
) -> None:
    """In several readings and killed on the way: the same scores, students and losses, with blocks that learnt too."""
    words = (*search_words(place, "hymba"), "--block-tokens", block_tokens, "--space.intermediate-size", 48)
    whole = halflap(*words, "--out", tmp_path / "whole", "--json").json["candidates"]
    monkeypatch.setattr(passes, "STREAMS_AT_ONCE", 600_000)
    save, saved = replace_streamed._commit, [0]

    def failing(*arguments: Any) -> None:
        saved[0] += 1
        if saved[0] == 30:
            raise KeyboardInterrupt
        save(*arguments)

    monkeypatch.setattr(replace_streamed, "_commit", failing)
    run = tmp_path / "run"
    assert halflap(*words, "--stream", "--out", run).status == 130
    known = json.loads((run / "variant_scores.json").read_text())["scores"]
    assert known and (run / "replacing").is_dir()
    assert halflap(*words, "--stream", "--out", run, "--json").json["candidates"] == whole
    assert not (run / "replacing").exists() and not (run / "streams").exists()
    scores = [(folder / "variant_scores.json").read_bytes() for folder in (run, tmp_path / "whole")]
    assert scores[0] == scores[1] and len(known) < len(json.loads(scores[0])["scores"])
    if block_tokens:
        for block in (tmp_path / "whole" / "blocks").iterdir():
            assert (run / "blocks" / block.name).read_bytes() == block.read_bytes()


def test_rounds_of_distillation_go_on_from_trained_blocks(
    halflap: Callable[..., Any], place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between two rounds, a search ends with the same files; the winner's weights wait for a long training."""
    given = search_words(place, "nemotron-h-tiny")
    words = [3 if before == "--shortlist" else word for before, word in itertools.pairwise(("", *given))]
    words += ["--block-tokens", 128, "--shortlist-tokens", 256, "--refined", 3, "--max-overlap", 0.9]
    found = halflap(*words, "--out", tmp_path / "whole", "--json").json["candidates"]
    assert [len(row["rounds"]) for row in found] == [2, 2, 1] and len({tuple(row["variants"]) for row in found}) == 3
    train, calls = shortlist.train, []

    def stopping(*arguments: Any) -> Any:
        if calls:
            raise KeyboardInterrupt
        calls.append(arguments)
        return train(*arguments)

    monkeypatch.setattr(shortlist, "train", stopping)
    halflap(*words, "--out", tmp_path / "cut", "--json")
    monkeypatch.setattr(shortlist, "train", train)
    shown = halflap(*words, "--out", tmp_path / "cut")
    assert "short distillation: 3 to " in shown.out and "variants of 7 blocks" in shown.out
    whole, cut = (tmp_path / name / "search.json" for name in ("whole", "cut"))
    assert whole.read_bytes() == cut.read_bytes()
    plan = PruningPlan.load(cut)
    assert load_model(tmp_path / "cut" / "shortlist" / plan.digest[:12] / "checkpoint").config == plan.student


def test_a_sweep_measures_its_variants_once(halflap: Callable[..., Any], place: Path, tmp_path: Path) -> None:
    given = list(search_words(place, "nemotron-h-tiny"))
    at = given.index("--params")
    words = (*given[:at], *given[at + 2 :], "--block-tokens", 128, "--sweep", "params", "60%", "80%")
    result = halflap(*words, "--out", tmp_path / "run", "--json").json
    assert [path.parent.name for path in tmp_path.rglob("variant_scores.json")] == ["run"]
    best = [result["candidates"][row["candidate"]] for row in result["sweep"]["values"]]
    assert best[0]["costs"]["params"] < best[1]["costs"]["params"] and best[0]["variants"] != best[1]["variants"]
    assert "blocks" in halflap(*words, "--out", tmp_path / "run").out
    plan = result["sweep"]["values"][0]["path"]
    halflap("prune", place / "nemotron-h-tiny", "--plan", plan, "--out", tmp_path / "pruned", "--json")
    assert read_lineage(tmp_path / "pruned" / "checkpoint")[-1]["verb"] == "distill_blocks"


def test_a_budget_that_cannot_be_met_costs_no_work(halflap: Callable[..., Any], place: Path, tmp_path: Path) -> None:
    words = search_words(place, "nemotron-h-tiny")
    refused = halflap(*words, "--memory", "1KiB", "--block-tokens", 128, "--out", tmp_path / "run")
    assert refused.status == 1, refused.err
    assert "1,024 bytes of memory cannot be met: the smallest student of this library has " in refused.err
    assert "; raise --memory" in refused.err and not (tmp_path / "run" / "blocks").exists()


def test_two_steps_with_blocks_that_became_linear(halflap: Callable[..., Any], place: Path, tmp_path: Path) -> None:
    words = ("compress", place / "nemotron-h-tiny", "--data", place / "text.jsonl", "--tokens", 512, "--steps", 2)
    small = ("--calibration-tokens", 256, "--eval-tokens", 200, *FEW, *FIT, "--params", "81%")
    small = (*small, "--space.max-width-cut", 0, "--space.max-depth-cut", 0)
    result = halflap(*words, *small, "--out", tmp_path / "run", "--json").json
    assert result["parameters_ratio"] <= 0.81 and result["verified"]
    assert any(block.kind == "linear" for block in load_model(tmp_path / "run" / "steps" / "1").config.blocks)
