"""`--dry-run`: what each phase, pass, candidate and arm costs, and the whole."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from halflap.checkpoints.checkpoint import save_model
from halflap.models.count import flops_per_token
from halflap.models.model import HybridModel
from halflap.models.presets import preset

PHASES = """
phases:
- {tokens: 256, end: 1e-3, weights: [1, 0]}
- {tokens: 1K, shape: cosine, end: 1.0e-4}
ramp: [[0, 2], [512, 4]]
"""


def test_phases_are_told_one_by_one(
    halflap: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        Path(f"{name}.txt").write_text("some text")
    Path("phases.yaml").write_text(PHASES)
    words = ("pretrain", "llama-tiny", "--data", "a.txt", "b.txt", "--fit.sequence-length", 64, "--dry-run")
    plain = halflap(*words, "--tokens", "1K", "--json").json
    found = halflap(*words, "--phases", "phases.yaml", "--json").json
    first, second = found["phases"]
    assert (first["tokens"], first["steps"], first["batch_size"], first["blend"]) == (256, 2, "2", "1:0")
    assert (second["tokens"], second["steps"], second["batch_size"]) == (1024, 5, "2-4") and "blend" not in second
    assert first["last_learning_rate"] == 1e-3 and second["last_learning_rate"] == pytest.approx(1e-4)
    assert found["tokens"] == 1280 and found["flops"] == first["flops"] + second["flops"]
    assert found["flops"] / 1280 == plain["flops"] / 1000 and "phases" not in plain
    assert "2-4" in halflap(*words, "--phases", "phases.yaml").out


def flops(halflap: Callable[..., Any], *words: object) -> int:
    return halflap(*words, "--dry-run", "--json").json["flops"]


@pytest.fixture
def teacher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint as far as its shape goes, in a folder with some text."""
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("some text")
    model = HybridModel(preset("nemotron-h-tiny"))
    save_model(model, tmp_path / "teacher")
    return tmp_path / "teacher"


def test_scores_of_blocks_cost_what_they_read(halflap: Callable[..., Any], teacher: Path) -> None:
    words = ("score", teacher, "--data", "text.txt", "--tokens", 8192, "--sequence-length", 64)
    a_pass, blocks = flops_per_token(preset("nemotron-h-tiny"), 64, "prefill"), len(preset("nemotron-h-tiny").blocks)
    influence = flops(halflap, *words, "--depth-metric", "block_influence")
    assert influence == 8192 * a_pass  # of the same pass
    kl = flops(halflap, *words)
    assert 1024 * a_pass * blocks / 2 < kl - influence < 1024 * a_pass * (blocks + 2)
    assert kl < flops(halflap, *words, "--depth-iterative", 3) < influence + 3 * (kl - influence)
    assert flops(halflap, *words, "--metric", "taylor", "--depth-metric", "taylor") == 3 * influence
    assert flops(halflap, *words, "--metric", "random") == 0


def test_a_search_costs_what_it_tries(halflap: Callable[..., Any], teacher: Path) -> None:
    words = ("search", teacher, "--data", "text.txt", "--params", "50%", "--shortlist", 4, "--score-tokens", 1000)
    words = (*words, "--fit.sequence-length", 64)
    looking = flops(halflap, *words)
    words = (*words, "--first-look", 0)
    a_pass = flops_per_token(preset("nemotron-h-tiny"), 64, "prefill")
    plain = flops(halflap, *words)
    assert plain == 4 * 1000 * a_pass and looking == plain + 64 * 125 * a_pass
    short = flops(halflap, *words, "--shortlist-tokens", 500, "--rounds", "equal") - plain
    assert short == 3 * (3 * 500 + 1000) * a_pass + 500 * a_pass  # of three candidates, and of the teacher for all
    assert flops(halflap, *words[:4], *words[6:], "--sweep", "params", "40%", "60%") == 2 * plain
    few = ("--method", "puzzle", "--replacement-tokens", 100)
    puzzle = flops(halflap, *words, *few)
    assert puzzle > plain + 100 * a_pass and flops(halflap, *words, *few, "--block-tokens", 100) > puzzle


def test_compress_costs_all_its_parts(halflap: Callable[..., Any], teacher: Path) -> None:
    words = ("compress", teacher, "--data", "text.txt", "--tokens", 1000, "--fit.sequence-length", 64)
    words = (*words, "--eval-tokens", 100, "--calibration-tokens", 800, "--depth-metric", "block_influence")
    a_pass = flops_per_token(preset("nemotron-h-tiny"), 64, "prefill")
    plain = flops(halflap, *words, "--sizes.num-blocks", 5)
    assert plain == (800 + 4 * 1000 + 3 * 100) * a_pass
    assert flops(halflap, *words, "--sizes.num-blocks", 5, "--loss", "next_token") == plain - 1000 * a_pass
    controls = flops(halflap, *words, "--sizes.num-blocks", 5, "--controls", "scratch", "random")
    assert controls - plain == ((3 + 4) * 1000 + (1 + 2) * 100) * a_pass
    few = ("--params", "50%", "--shortlist", 2, "--score-tokens", 10, "--first-look", 0)
    assert flops(halflap, *words, *few) == plain + 20 * a_pass
    memory = halflap(*words, *few, "--dry-run", "--json").json
    assert memory["memory_bytes"] == 20 * memory["parameters"]  # the teacher beside a student in training
    stored = halflap(*words, *few, "--top-k", 8, "--dry-run", "--json").json
    assert stored["memory_bytes"] == 16 * memory["parameters"]
