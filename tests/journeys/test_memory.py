"""What does not fit in memory is refused before any work; logits that are stored stand in for a teacher."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from halflap.amounts import parse_amount
from halflap.commands import memory, students
from halflap.commands.config_compress import CompressRecipe
from halflap.commands.sections import Budgets, CompressSettings
from halflap.compress.axes import Sizes, resize
from halflap.models.count import count_parameters
from halflap.models.model import HybridModel
from halflap.models.presets import preset

TINY = preset("nemotron-h-tiny")
FIT = ("--fit.sequence-length", 32, "--fit.batch-size", 4)


@pytest.fixture
def place(cut_place: Path) -> Path:
    return cut_place


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The dtypes in which teachers were loaded."""
    found: list[str] = []
    load = students.Teacher.load

    def watched(teacher: students.Teacher, dtype: str = "float32") -> HybridModel:
        found.append(dtype)
        return load(teacher, dtype)

    monkeypatch.setattr(students.Teacher, "load", watched)
    return found


def test_what_does_not_fit_is_refused_before_any_work(
    halflap: Callable[..., Any], place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loads: list[str]
) -> None:
    whole, student = (
        count_parameters(TINY),
        json.loads(halflap("inspect", place / "pruned", "--json").out)["parameters"],
    )
    text = ("--data", place / "text.jsonl", "--tokens", 256, *FIT)
    distill = ("distill", place / "pruned", *text)
    free = 4 * whole + 16 * student
    monkeypatch.setattr(memory, "free_memory", lambda _: free - 1)
    outcome = halflap(*distill, "--out", tmp_path / "refused")
    assert outcome.status == 1 and "distill holds the teacher as float32" in outcome.err
    assert "the student in training" in outcome.err and "--top-k 64" in outcome.err
    sizes = ("--sizes.drop-blocks", 1, 4, "--eval-tokens", 200)
    outcome = halflap("compress", place / "teacher", *text, *sizes, "--out", tmp_path / "all")
    assert outcome.status == 1 and "compress holds the teacher as float32" in outcome.err
    assert "score, search, prune and verify" in outcome.err
    assert not loads and not list(tmp_path.glob("*/corpus")), "no text was read, and no teacher"
    monkeypatch.setattr(memory, "free_memory", lambda _: free)
    assert halflap(*distill, "--out", tmp_path / "done").status == 0
    monkeypatch.setattr(memory, "free_memory", lambda _: 16 * student)
    assert halflap(*distill, "--loss", "next_token", "--out", tmp_path / "text").status == 0


def test_stored_logits_stand_in_for_the_teacher_and_are_told_of(
    halflap: Callable[..., Any], place: Path, tmp_path: Path, loads: list[str]
) -> None:
    text = ("--data", place / "text.jsonl", "--tokens", 256, *FIT, "--top-k", 8, "--top-k-in", tmp_path / "logits")
    distill = ("distill", place / "pruned", *text)
    first = halflap(*distill, "--out", tmp_path / "first", "--json").json["teacher_logits"]
    assert loads == ["float32"] and first["error"] > 0
    again = halflap(*distill, "--out", tmp_path / "again", "--json").json["teacher_logits"]
    assert loads == ["float32"] and again == first, "all is stored"
    words = ("compress", place / "teacher", *text, "--sizes.drop-blocks", 1, 4, "--eval-tokens", 200)
    words = (*words, "--depth-metric", "block_influence", "--calibration-tokens", 128, "--out", tmp_path / "all")
    result = halflap(*words, "--json").json
    said = f"lose {first['error']:.3g} nats a token"
    assert result["teacher_logits"]["bytes_per_token"] == pytest.approx(first["bytes_per_token"], rel=0.1)
    assert "teacher's largest logits" in halflap(*words).out
    for card in ("first", "all"):
        assert "teacher's largest logits, as stored, take" in (tmp_path / card / "checkpoint" / "README.md").read_text()
    assert said in (tmp_path / "first" / "checkpoint" / "README.md").read_text()
    assert "nats a token of its distribution" in Path(result["report"]).read_text()


def test_a_dry_run_counts_the_teacher_of_the_lineage(halflap: Callable[..., Any], place: Path) -> None:
    words = ("distill", place / "pruned", "--data", place / "text.jsonl", "--tokens", 256, "--dry-run", "--json")
    result = halflap(*words).json
    assert result["memory_bytes"] == 16 * result["parameters"] + 4 * count_parameters(TINY)


def test_a_teacher_teaches_in_the_dtype_that_it_is_said_to(
    halflap: Callable[..., Any], place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loads: list[str]
) -> None:
    """As on a GPU: beside the student, and for logits that are stored."""
    monkeypatch.setattr(students.Teacher, "teaches_in", "bfloat16")
    words = ("distill", place / "pruned", "--data", place / "text.jsonl", "--tokens", 256, *FIT)
    for name, more in (("beside", ("--intermediate", "blocks")), ("stored", ("--top-k", 8))):
        assert halflap(*words, *more, "--out", tmp_path / name).status == 0
    assert loads == ["bfloat16", "bfloat16"]


def test_a_teacher_is_loaded_to_teach_in_the_dtype_of_the_arithmetic_on_a_gpu(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    for device, dtype, expected in (
        ("cuda", "auto", "bfloat16"),
        ("cuda", "float32", "float32"),
        ("cpu", "bfloat16", "float32"),
    ):
        teacher = students.Teacher(None, place, torch.device(device), dtype, 0)  # type: ignore[arg-type]
        assert teacher.teaches_in == expected


@pytest.mark.parametrize(
    ("given", "share"),
    [
        ({"budgets": Budgets(params=parse_amount("50%"))}, 0.95 * 0.5),
        ({"budgets": Budgets(params=parse_amount("25%")), "loss_settings": CompressSettings(steps=2)}, 0.95 * 0.5),
        ({"budgets": Budgets(params=parse_amount("50%"), flops=parse_amount("50%"))}, 0),
        ({"budgets": Budgets(memory=parse_amount("50%", "bytes"))}, 0),
        ({"elastic": ()}, 1),
        ({"sizes": Sizes(num_blocks=len(TINY.blocks))}, 1),
    ],
)
def test_the_least_student_of_a_recipe(given: dict[str, Any], share: float) -> None:
    whole = count_parameters(TINY)
    found = memory.least_student(CompressRecipe(model="teacher", **given), TINY)
    assert found == pytest.approx(share * whole, abs=1)


def test_sizes_tell_their_student() -> None:
    sizes = Sizes(hidden_size=64, mamba_num_heads=8)
    exact = count_parameters(resize(TINY, tuple(range(len(TINY.blocks))), sizes))
    assert memory.least_student(CompressRecipe(model="teacher", sizes=sizes), TINY) == exact
    fewer = Sizes(hidden_size=64, mamba_num_heads=8, drop_blocks=(0, 1))
    dropped = count_parameters(resize(TINY, tuple(range(2, len(TINY.blocks))), sizes))
    assert memory.least_student(CompressRecipe(model="teacher", sizes=fewer), TINY) == dropped
    some = dataclasses.replace(sizes, num_blocks=len(TINY.blocks) - 2)
    assert 0 < memory.least_student(CompressRecipe(model="teacher", sizes=some), TINY) <= dropped
