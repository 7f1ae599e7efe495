"""`evaluate --tasks probes` as a user meets it: JSON, the table, models without a tokenizer, and what is wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import halflap as package
from halflap.checkpoints.checkpoint import save_model
from halflap.data.tokenizer import train_tokenizer
from halflap.evaluate.probes import PROBES, generator
from halflap.models.model import HybridModel, initialize
from halflap.models.presets import preset

Cli = Callable[..., Any]


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint of 512 ids and positions, without a tokenizer."""
    directory = tmp_path_factory.mktemp("probes") / "bare"
    network = HybridModel(preset("llama-tiny"))
    initialize(network, 0)
    save_model(network, directory)
    return directory


@pytest.fixture(scope="module")
def model(bare: Path) -> Path:
    """The same with one."""
    directory = bare.parent / "model"
    network = HybridModel(preset("llama-tiny"))
    initialize(network, 0)
    save_model(network, directory)
    pages = [probe.text(generator(name, 0, 0), 30, 0).text for name, probe in PROBES.items()]
    train_tokenizer([" ".join(pages)], 500, progress=False).save(directory)
    return directory


def test_all_probes(halflap: Cli, model: Path, tmp_path: Path) -> None:
    words = ("evaluate", model, "--tasks", "probes", "--probes.length", 300, "--limit", 2, "--out", tmp_path / "run")
    result = halflap(*words, "--json").json
    assert list(result["tasks"]) == list(PROBES) and result["loss"] is None
    for name, found in result["tasks"].items():
        assert found["form"] == "text" and found["items"] == 2 and found["loss"] > 4
        assert {"acc", "acc_stderr", "choice_acc", "choice_acc_stderr", "chance", "loss_stderr"} <= set(found)
        assert [cell["length"] for cell in found["by_length"]] == [300]
        assert len(found["by_length"][0]["acc_interval"]) == 2 and ("by_depth" in found) == (name == "probe_needle")
    assert json.loads((tmp_path / "run/scores.json").read_text()) == result
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [row["task"] for row in rows if row.get("phase") == "probe"] == list(PROBES)


def test_ids_for_a_model_without_a_tokenizer(halflap: Cli, bare: Path) -> None:
    words = ("evaluate", bare, "--tasks", "probe_needle", "probe_mqar", "--limit", 3)
    result = halflap(*words, "--probes.length", 64, 96, "--json").json
    for name in ("probe_needle", "probe_mqar"):
        found = result["tasks"][name]
        assert found["form"] == "ids" and found["items"] == 6 and "token_acc" in found and "choice_acc" not in found
        assert [cell["length"] for cell in found["by_length"]] == [64, 96]
    given = package.evaluate(bare, tasks=["probe_mqar"], probes_length=[64, 96], limit=3)
    assert given["tasks"]["probe_mqar"] == result["tasks"]["probe_mqar"]
    shown = halflap(*words, "--probes.length", 64).out
    assert "probe_mqar" in shown and "tokens right" in shown and "by depth" in shown and "50%" in shown


def test_the_table(halflap: Cli, model: Path) -> None:
    shown = halflap("evaluate", model, "--tasks", "probe_phonebook", "--probes.length", 200, "--limit", 2).out
    assert "probe_phonebook" in shown and "likeliest" in shown and "chance" in shown


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tasks", "probe_nedle"], "did you mean 'probe_needle'"),
        (["--tasks", "probes", "--probes.length", "64"], "give a larger --probes.length"),
        (["--tasks", "probes", "--probes.length", "513"], "the longest probe takes 513 positions"),
        (["--tasks", "probes", "--probes.length", "300", "--context", "200"], "does not fit the context of 200"),
    ],
)
def test_what_is_wrong(halflap: Cli, model: Path, words: list[str], message: str) -> None:
    outcome = halflap("evaluate", model, *words, "--limit", 1)
    assert (outcome.status, outcome.out) == (1, "")
    assert message in outcome.err and outcome.err.count("\n") == 1


def test_other_tasks_need_a_tokenizer(halflap: Cli, bare: Path) -> None:
    outcome = halflap("evaluate", bare, "--tasks", "probe_mqar", "lambada_local")
    assert outcome.status == 1 and "no tokenizer.json" in outcome.err
