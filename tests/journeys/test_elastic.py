"""One checkpoint of many sizes through the command line: what `compress --elastic` leaves, what is cut from it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from halflap.checkpoints.checkpoint import Checkpoint, load_model, save_model
from halflap.checkpoints.config import read_lineage
from halflap.commands import elastic as elastic_verb
from halflap.compress.axes import axes_of, block_of
from halflap.compress.elastic import Elastic
from halflap.compress.plan import PruningPlan, kept_count
from halflap.compress.slices import Slice
from halflap.data.tokenizer import train_tokenizer
from halflap.models.count import count_parameters
from halflap.models.model import HybridModel, initialize
from halflap.models.presets import preset

Cli = Callable[..., Any]
SMALL = ("--calibration-tokens", 256, "--score-tokens", 256, "--eval-tokens", 200, "--shortlist", 2, "--first-look", 0)
FIT = ("--fit.sequence-length", 32, "--fit.batch-size", 4, "--fit.learning-rate", 1e-3, "--tokens", "1K")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher with random weights and a tokenizer, and text."""
    folder = tmp_path_factory.mktemp("elastic")
    documents = [" ".join(f"ha{(7 * i + j * j) % 23}" for j in range(60)) for i in range(80)]
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    train_tokenizer(documents, 300).save(folder / "tokenizer")
    model = HybridModel(preset("nemotron-h-tiny"))
    initialize(model, 0)
    save_model(model, folder / "teacher", tokenizer_from=folder / "tokenizer", dtype="float32")
    return folder


@pytest.fixture(scope="module")
def run(place: Path) -> Path:
    """What `compress --elastic` leaves of it, with its result."""
    from halflap.cli import main

    words = ("compress", place / "teacher", "--data", place / "text.jsonl", "--elastic", "85%", "70%", *SMALL, *FIT)
    assert main([str(word) for word in (*words, "--out", place / "run", "--quiet")]) == 0
    return place / "run"


def test_it_leaves_one_checkpoint_and_a_row_for_each_size(run: Path, place: Path) -> None:
    result = json.loads((run / "status.json").read_text())["result"]
    whole = count_parameters(preset("nemotron-h-tiny"))
    assert result["verified"] and result["whole"]["parameters"] == result["teacher"]["parameters"] == whole
    assert [row["budget"] for row in result["nested"]] == ["params 85%", "params 70%"]
    assert result["student"].items() <= result["nested"][-1].items() and 0.65 < result["parameters_ratio"] <= 0.7
    assert [0.95 < row["parameters"] / whole / share <= 1 for row, share in zip(result["nested"], (0.85, 0.7))]
    assert all(row["loss"] > 0 and row["loss_as_cut"] > 0 and row["tokens_trained"] for row in result["nested"])
    for name in ("report.html", "arms.json", "sorted/certificate.json", "nested/70%/search.json"):
        assert (run / name).exists(), name
    assert Checkpoint.open(run).config == Checkpoint.open(place / "teacher").config
    assert [step["verb"] for step in read_lineage(run / "checkpoint")] == ["sort", "distill"]
    card = (run / "checkpoint" / "README.md").read_text()
    assert "## What can be cut from it" in card and "params 70%" in card and "## How it does" in card
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert any({"whole", "85%", "70%", "forward_kl"} <= row.keys() for row in rows)
    assert any({"held_out_loss", "held_out_loss_70%"} <= row.keys() for row in rows)


def test_the_sorted_checkpoint_loads_in_stock_transformers(run: Path, place: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tokens = torch.arange(1, 20)[None]
    logits = []
    for directory in (place / "teacher", run / "sorted"):
        stock = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
        assert type(stock).__name__ == "NemotronHForCausalLM"
        with torch.no_grad():
            logits.append(stock(tokens).logits)
    assert (logits[0] - logits[1]).abs().max() < 1e-4 * logits[0].abs().max()  # float32 sums in another order


def test_a_trained_size_that_is_cut_is_what_was_trained(halflap: Cli, run: Path, tmp_path: Path) -> None:
    result = halflap("prune", run, "--from-elastic", "--params", "70%", "--out", tmp_path / "run", "--json").json
    assert result["verified"] and result["remark"] == "the size trained for params 70%"
    model, student, tokens = load_model(run), load_model(tmp_path / "run"), torch.arange(1, 30)[None]
    elastic = Elastic.load(run / "checkpoint", len(model.config.blocks))
    plan = elastic.plan_for(model.config, Checkpoint.open(run).digest, elastic.nested[-1].sizes)
    assert plan == PruningPlan.load(tmp_path / "run" / "checkpoint" / "pruning_plan.json")
    with torch.no_grad():
        sliced = Slice(plan)(model)
        assert torch.equal(sliced.hidden_states(tokens), student.hidden_states(tokens))
        assert torch.equal(sliced.head_weight, student.head_weight)
    assert read_lineage(tmp_path / "run" / "checkpoint")[-1]["verb"] == "prune"


def test_a_size_between_trained_ones_lies_between_them(halflap: Cli, run: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    result = halflap("prune", run / "checkpoint", "--from-elastic", "--params", "78%", "--out", out, "--json").json
    assert 0.7 < result["ratio"] <= 0.78 and result["verified"]
    config = Checkpoint.open(run).config
    elastic, digest = Elastic.load(run / "checkpoint", len(config.blocks)), Checkpoint.open(run).digest
    above, below = (elastic.plan_for(config, digest, one.sizes) for one in elastic.nested)
    plan = PruningPlan.load(out / "checkpoint" / "pruning_plan.json")
    assert {*below.keep_blocks} <= {*plan.keep_blocks} <= {*above.keep_blocks}
    for name, axis in axes_of(config).items():
        if block_of(name) in (None, *below.keep_blocks):
            few, kept, many = (kept_count(axis, one.keep) for one in (below, plan, above))
            assert few <= kept <= many, name


def test_lists_say_what_may_be_tried_between_trained_sizes(halflap: Cli, run: Path, tmp_path: Path) -> None:
    one = ("prune", run / "checkpoint", "--from-elastic", "--params", "78%", "--out")
    listed = halflap(*one, tmp_path / "run", "--space.hidden-size", 84, "--json").json
    assert listed["ratio"] <= 0.78 and Checkpoint.open(tmp_path / "run").config.hidden_size == 84
    outside = halflap(*one, tmp_path / "other", "--space.hidden-size", 40)
    assert outside.status == 1 and "space.hidden_size has 40, and between the sizes trained" in outside.err


def test_sizes_are_cut_too(halflap: Cli, run: Path, tmp_path: Path) -> None:
    sizes = ("--sizes.mamba-num-heads", 8, "--sizes.num-blocks", 5)
    result = halflap("prune", run / "sorted", "--from-elastic", *sizes, "--out", tmp_path / "run", "--json").json
    assert result["verified"] and len(result["pattern"]) == 5
    plan = json.loads((tmp_path / "run" / "checkpoint" / "pruning_plan.json").read_text())
    heads = [table for name, table in plan["keep"].items() if name.endswith(".head")]
    assert heads and all(row == list(range(len(row))) for table in heads for row in table)


def test_it_ends_the_same_after_an_interruption(
    halflap: Cli, run: Path, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    importance = ("--importance", run / "importance.safetensors")
    words = ("compress", place / "teacher", "--data", place / "text.jsonl", "--elastic", "85%", "70%", *importance)
    words = (*words, *SMALL[2:], *FIT, "--out", tmp_path / "run")
    steps, deal = [], elastic_verb.deal

    def interrupted(*given: Any) -> Any:
        steps.append(given)
        if len(steps) == 4:
            raise KeyboardInterrupt
        return deal(*given)

    monkeypatch.setattr(elastic_verb, "deal", interrupted)
    assert halflap(*words).status == 130
    assert halflap(*words).status == 0
    one, other = (load_model(place).state_dict() for place in (run, tmp_path / "run"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_what_does_not_go_together_is_said(halflap: Cli, place: Path, run: Path, tmp_path: Path) -> None:
    compress = ("compress", place / "teacher", "--data", place / "text.jsonl", *SMALL)
    prune = ("prune", run, "--from-elastic")
    cases = (
        ((*compress, "--elastic", "--controls", "random"), "controls was given with elastic"),
        ((*compress, "--elastic", "--sizes.num-blocks", 5), "sizes was given with elastic"),
        ((*compress, "--elastic", "--norm-correction", "calibrated"), "choose masked or none"),
        ((*compress, "--elastic", "--top-k", 8), "--top-k-from live"),
        ((*compress, "--elastic", "half"), "elastic: 'half' is not an amount"),
        ((*compress, "--elastic", "throughput", "0"), "elastic is 'throughput 0', and a budget is above 0"),
        ((*compress, "--elastic", "50%", "--params", "75%"), "which is also given as --params"),
        ((*compress, "--elastic", "100%"), "the model itself is within it"),
        ((*compress, "--elastic", "50%", "2%"), "cannot be met"),
        ((*compress, "--params", "2%"), "cannot be met"),
        ((*prune, "--params", "70%", "--importance", run / "importance.safetensors"), "from_elastic and importance"),
        ((*prune, "--params", "70%", "--norm-correction", "none"), "which its students keep"),
        (prune, "nothing says how small"),
        (("prune", place / "teacher", "--from-elastic", "--params", "70%"), "is not an elastic checkpoint"),
    )
    for number, (words, said) in enumerate(cases):
        outcome = halflap(*words, "--out", tmp_path / str(number))
        assert outcome.status and said in outcome.err, (words, outcome.err)
    assert not list(tmp_path.glob("*/importance.safetensors"))


def test_the_recipe_of_a_bare_flag_comes_back(halflap: Cli, place: Path, tmp_path: Path) -> None:
    words = ("compress", place / "teacher", "--data", place / "text.jsonl")
    shown = halflap(*words, "--elastic", "--show").out
    assert "elastic: []" in shown and "elastic: null" in halflap(*words, "--show").out
    (tmp_path / "recipe.yaml").write_text(shown)
    assert halflap(*words, "--config", tmp_path / "recipe.yaml", "--show").out == shown
