"""`score` through the command line: many scorings of one pass, kills, short text, removal one by one, odd settings."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from halflap.checkpoints.checkpoint import save_model
from halflap.compress import partial
from halflap.compress.importance import Importance
from halflap.data.tokenizer import train_tokenizer
from halflap.models.config import AttentionConfig, Mamba2Config, MLPConfig, ModelConfig
from halflap.models.model import HybridModel, initialize

CONFIG = ModelConfig(
    "nemotron_h", 300, 16, (Mamba2Config(4, 4, 2, 4), MLPConfig(16), AttentionConfig(4, 2, 4), MLPConfig(16))
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher of four blocks with its tokenizer, and text of 40 short documents."""
    folder = tmp_path_factory.mktemp("score")
    generator = random.Random(0)
    words = [f"{first}{second}" for first in ("ha", "ma", "sta", "ga") for second in ("te", "d", "lf", "mba")]
    documents = [" ".join(generator.choices(words, k=generator.randint(30, 90))) for _ in range(40)]
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    train_tokenizer(documents, 300).save(folder / "tokenizer")
    model = HybridModel(CONFIG)
    initialize(model, 0)
    save_model(model, folder / "teacher", tokenizer_from=folder / "tokenizer")
    return folder


def words(place: Path, out: Path, *more: object, tokens: int = 512, rows: int = 2) -> tuple[object, ...]:
    common = ("--data", place / "text.jsonl", "--tokens", tokens, "--sequence-length", 16, "--batch-size", rows)
    return ("score", place / "teacher", *common, "--out", out, *more)


def test_one_pass_leaves_a_file_for_every_scoring(halflap: Callable[..., Any], place: Path, tmp_path: Path) -> None:
    many = (
        "--mamba-source",
        "x",
        "z",
        "flap",
        "--sequence-aggregation",
        "mean",
        "signed_mean",
        "--depth-metric",
        "hidden_mse",
    )
    result = halflap(*words(place, tmp_path / "many", *many, "--depth-average", "rank", "--json")).json
    assert len(result["others"]) == 5 and result["ranks_blocks"] == "hidden_mse_rank" and result["remark"] is None
    name = "importance-mamba-flap-sequence-signed-mean.safetensors"
    assert str(tmp_path / "many" / name) in result["others"]
    first, other = (Importance.load(tmp_path / "many" / file) for file in ("importance.safetensors", name))
    assert first.scoring["mamba"] == "x" and other.scoring == {
        **first.scoring,
        "mamba": "flap",
        "sequence": "signed_mean",
    }
    assert first.depth.keys() == {"block_influence", "hidden_mse", "hidden_mse_rank"}
    alone = halflap(*words(place, tmp_path / "z", "--mamba-source", "z", "--depth-metric", "hidden_mse", "--json")).json
    assert alone["ranks_blocks"] == "hidden_mse"
    alone = Importance.load(alone["path"])
    twin = Importance.load(tmp_path / "many" / "importance-mamba-z.safetensors")
    assert all(bool((alone.widths[axis] == twin.widths[axis]).all()) for axis in alone.widths)
    cut = ("prune", place / "teacher", "--sizes.mamba-num-heads", 2, "--importance", tmp_path / "many" / name)
    assert halflap(*cut, "--out", tmp_path / "cut", "--json").json["verified"]
    shown = halflap(*words(place, tmp_path / "many", *many, "--depth-average", "rank"))
    assert "other scorings of the same pass" in shown.out and "hidden mse rank (which ranks)" in shown.out


@pytest.mark.parametrize("metric", ["activation", "taylor"])
@pytest.mark.parametrize("passes", [3, 17, 20])
def test_a_killed_score_ends_in_the_same_bytes(
    metric: str, passes: int, halflap: Callable[..., Any], place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in the pass of widths, which are 16 batches, or in a round of removals after it."""
    monkeypatch.setattr(partial, "SECONDS_BETWEEN_SAVES", 0.0)
    more = ("--metric", metric, "--depth-metric", "loss", "--depth-iterative", 2)
    halflap(*words(place, tmp_path / "whole", *more))
    whole, run = (tmp_path / "whole" / "importance.safetensors").read_bytes(), HybridModel.enter
    count = 0

    def killed(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        if count == passes:
            raise KeyboardInterrupt
        return run(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(HybridModel, "enter", killed)
        assert halflap(*words(place, tmp_path / "killed", *more)).status == 130
        assert (tmp_path / "killed" / "scoring").is_dir()
        result = halflap(*words(place, tmp_path / "killed", *more, "--json")).json
    assert (tmp_path / "killed" / "importance.safetensors").read_bytes() == whole
    assert count == 16 + 2 * 2 + 1 and len(result["removed"]) == 2  # no pass but the killed one was made twice
    assert not (tmp_path / "killed" / "scoring").exists()


def test_blocks_score_alike_however_rows_are_batched(halflap: Callable[..., Any], place: Path, tmp_path: Path) -> None:
    depths = []
    for rows in (1, 4, 32):
        assert halflap(*words(place, tmp_path / str(rows), tokens=1024, rows=rows)).status == 0
        depths.append(Importance.load(tmp_path / str(rows) / "importance.safetensors").depth)
    for name, depth in depths[0].items():
        for other in depths[1:]:
            torch.testing.assert_close(depth, other[name], rtol=1e-4, atol=1e-7)


def test_text_that_is_too_short_is_said(halflap: Callable[..., Any], place: Path, tmp_path: Path) -> None:
    outcome = halflap(*words(place, tmp_path / "run", tokens=1_000_000))
    found = Importance.load(tmp_path / "run" / "importance.safetensors")
    says = f"1,000,000 tokens of calibration text were asked for, and there were {found.tokens:,}: all were read"
    assert outcome.status == 0 and says in outcome.out and found.tokens > 1000
    short = tmp_path / "short.txt"
    short.write_text("hate mad")  # not even a row, which is then read once
    run = ("score", place / "teacher", "--data", short, "--out", tmp_path / "one", "--json", "--sequence-length", 64)
    result = halflap(*run, "--data.held-out", 0).json
    assert 0 < result["tokens"] < 16 and f"there were {result['tokens']}:" in result["remark"]


def test_removed_blocks_are_the_first_to_go(halflap: Callable[..., Any], place: Path, tmp_path: Path) -> None:
    result = halflap(*words(place, tmp_path / "run", "--depth-iterative", 1, "--json")).json
    cut = ("prune", place / "teacher", "--importance", tmp_path / "run", "--sizes.num-blocks", 3)
    halflap(*cut, "--out", tmp_path / "cut", "--json").json  # noqa: B018
    plan = json.loads((tmp_path / "cut" / "checkpoint" / "pruning_plan.json").read_text())
    assert len(result["removed"]) == 1 and not {*result["removed"]} & {*plan["keep_blocks"]}


@pytest.mark.parametrize("metric", ["taylor", "block_influence"])
def test_one_pass_depth_metrics_rank_beside_any_width_metric(
    metric: str, halflap: Callable[..., Any], place: Path, tmp_path: Path
) -> None:
    for width in ("activation", "taylor", "weight_norm"):
        result = halflap(*words(place, tmp_path / width, "--metric", width, "--depth-metric", metric, "--json")).json
        assert result["ranks_blocks"] == metric and len(result["depth"][metric]) == 4


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (("--mamba-source", "x", "x"), "mamba_source is ('x', 'x'); it must be at least one value and each once"),
        (("--mamba-source", "y"), "y"),
        (("--metric", "random", "--neuron-source", "pre"), "metric is random, which reads no activations"),
        (("--metric", "taylor", "--sequence-aggregation", "l2"), "sequence_aggregation means nothing"),
        (("--metric", "taylor", "--mamba-source", "x", "flap"), "flap is a score of its own"),
        (("--depth-metric", "block_influence", "--depth-average", "rank"), "depth_average was given with depth_metric"),
        (("--depth-metric", "taylor", "--depth-iterative", 2), "depth_iterative was given with depth_metric taylor"),
        (("--metric", "random", "--depth-iterative", 1), "depth_iterative was given with metric random"),
        (("--depth-iterative", 0), "at least 1"),
    ],
)
def test_settings_that_mean_nothing_are_refused(
    more: Any, says: str, halflap: Callable[..., Any], place: Path, tmp_path: Path
) -> None:
    outcome = halflap(*words(place, tmp_path / "run", *more))
    assert outcome.status == 2 and says in outcome.err


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (("--depth-iterative", 4), "depth_iterative is 4; the model has 4 blocks"),
        (("--hybrid-source", "x"), "this nemotron_h model (M-*-) has no hybrid blocks: leave out --hybrid-source"),
    ],
)
def test_what_the_model_does_not_have_is_refused(
    more: Any, says: str, halflap: Callable[..., Any], place: Path, tmp_path: Path
) -> None:
    outcome = halflap(*words(place, tmp_path / "run", *more))
    assert outcome.status == 1 and says in outcome.err


def test_settings_beside_an_importance_file_are_refused(
    halflap: Callable[..., Any], place: Path, tmp_path: Path
) -> None:
    halflap(*words(place, tmp_path / "run"))
    run = ("compress", place / "teacher", "--data", place / "text.jsonl", "--params", "70%", "--tokens", 64)
    outcome = halflap(*run, "--importance", tmp_path / "run", "--mamba-source", "z", "--out", tmp_path / "c")
    assert outcome.status == 2 and "importance is a file" in outcome.err
