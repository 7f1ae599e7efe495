"""A checkpoint without tokenizer files can be cut, certified, and, on token shards, measured, trained and judged."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from halflap.data.tokenizer import train_tokenizer

FIT = ("--fit.sequence-length", 16, "--fit.batch-size", 2)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Token shards with their tokenizer beside them."""
    from halflap.cli import main

    folder = tmp_path_factory.mktemp("text")
    texts = [f"{n} halves and {n * n} laps, joined at {n % 7} joints" for n in range(60)]
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    train_tokenizer(texts, 259, progress=False).save(folder / "tokenizer")
    data = ("--data", folder / "text.jsonl")
    words = ("corpus", *data, "--tokenizer", folder / "tokenizer", "--out", folder / "shards", "--quiet")
    assert main([str(word) for word in words]) == 0
    return folder / "shards"


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    from halflap.checkpoints.checkpoint import save_model
    from halflap.models.model import HybridModel, initialize
    from halflap.models.presets import preset

    model = HybridModel(preset("nemotron-h-tiny"))
    initialize(model, seed=0)
    save_model(model, tmp_path / "teacher")
    return tmp_path / "teacher"


def test_prune_and_verify_need_no_tokenizer(halflap: Callable[..., Any], teacher: Path, tmp_path: Path) -> None:
    out = tmp_path / "student"
    assert halflap("prune", teacher, "--sizes.drop-blocks", 1, "--out", out, "--json").json["verified"]
    assert halflap("verify", out, "--json").json["passed"]
    assert not (out / "checkpoint" / "tokenizer.json").exists()
    plan = ("--plan", out / "checkpoint" / "pruning_plan.json")
    both = halflap("prune", teacher, *plan, "--params", "50%", "--out", tmp_path / "both")
    assert both.status == 2 and "a plan and a budget" in both.err


def test_token_shards_bring_their_tokenizer(
    halflap: Callable[..., Any], teacher: Path, shards: Path, tmp_path: Path
) -> None:
    data = ("--data", shards)
    scored = halflap("score", teacher, *data, "--tokens", 200, "--sequence-length", 16, "--out", tmp_path / "s")
    assert scored.status == 0, scored.err
    judged = halflap("evaluate", teacher, *data, "--tokens", 200, "--json").json
    assert judged["tokens"] == 200 and judged["bits_per_byte"] > 0
    importance = ("--importance", tmp_path / "s" / "importance.safetensors")
    budget = (*importance, "--params", "60%", "--tokens", 100, "--score-tokens", 64, "--eval-data", shards, *FIT)
    done = halflap("compress", teacher, *data, *budget, "--out", tmp_path / "c", "--json").json
    assert done["student"]["parameters"] <= 0.6 * done["teacher"]["parameters"]


def test_text_needs_a_tokenizer(halflap: Callable[..., Any], teacher: Path, shards: Path, tmp_path: Path) -> None:
    done = halflap("score", teacher, "--data", shards.parent / "text.jsonl", "--out", tmp_path / "s")
    assert done.status == 1 and "holds no tokenizer.json" in done.err
