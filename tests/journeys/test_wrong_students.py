"""A student that is not what its plan makes of the teacher is no result, and the command fails."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from halflap.compress import verify

FIT = ("--fit.sequence-length", 32, "--fit.batch-size", 4)


@pytest.fixture
def place(cut_place: Path) -> Path:
    return cut_place


def _edited(value: Any, name: str, to: Any) -> Any:
    """The JSON value with every field `name` in it set."""
    if isinstance(value, list):
        return [_edited(item, name, to) for item in value]
    if isinstance(value, dict):
        return {key: to if key == name else _edited(item, name, to) for key, item in value.items()}
    return value


@pytest.mark.parametrize(
    ("name", "to", "says"),
    [
        ("activation", "silu", "blocks[1].activation is 'silu', and this checkpoint's is 'relu2'"),
        ("norm_eps", 1e-3, "norm_eps is 0.001, and this checkpoint's is 1e-05"),
    ],
)
def test_a_plan_whose_teacher_was_edited_is_refused(
    halflap: Callable[..., Any], place: Path, tmp_path: Path, name: str, to: Any, says: str
) -> None:
    plan = json.loads((place / "pruned" / "checkpoint" / "pruning_plan.json").read_text())
    (tmp_path / "edited.json").write_text(json.dumps(_edited(plan, name, to)))
    words = ("prune", place / "teacher", "--plan", tmp_path / "edited.json", "--out", tmp_path / "run")
    outcome = halflap(*words)
    assert outcome.status == 1 and says in outcome.err and "make it again" in outcome.err
    assert not (tmp_path / "run" / "checkpoint").exists()


def test_a_student_that_is_not_certified_is_no_result(
    halflap: Callable[..., Any], place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where rounding were an error: the order of sums alone makes a difference."""
    monkeypatch.setitem(verify.WIDE_TOLERANCE, torch.float64, 0.0)
    teacher, text = place / "teacher", ("--data", place / "text.jsonl", "--tokens", "1K", *FIT)
    heads = ("--sizes.mamba-num-heads", 8)
    scored = ("score", teacher, "--data", place / "text.jsonl", "--tokens", 512, "--sequence-length", 32)
    assert halflap(*scored, "--out", tmp_path / "scored").status == 0
    words = ("prune", teacher, "--importance", tmp_path / "scored", *heads, "--out", tmp_path / "run")
    for _ in range(2):  # the second finds the certificate of the first
        outcome = halflap(*words, "--json")
        assert outcome.status == 1 and "is not its masked teacher" in outcome.err
        assert json.loads(outcome.out)["passed"] is False
    assert not (tmp_path / "run" / "status.json").exists()
    words = ("compress", teacher, *text, "--importance", tmp_path / "scored", *heads, "--out", tmp_path / "all")
    outcome = halflap(*words)
    assert outcome.status == 1 and "is not its masked teacher" in outcome.err
    assert (tmp_path / "all" / "pruned" / "certificate.json").exists()
    assert not (tmp_path / "all" / "checkpoint").exists() and not (tmp_path / "all" / "training").exists()
