"""The README of a student: licence of its parent, what was cut, its certificate, its judgement, how to load it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from halflap.checkpoints.card import license_of, more_of
from halflap.checkpoints.checkpoint import Checkpoint, save_model
from halflap.commands.cards import write_card
from halflap.commands.students import certify, write_student
from halflap.commands.students import open_teacher as open_
from halflap.compress.kinds import Change
from halflap.compress.plan import PruningPlan
from halflap.compress.prune import apply_plan
from halflap.models.model import HybridModel, initialize
from halflap.models.presets import preset
from halflap.recipe import Common

ROW = {"parameters": 1234567, "loss": 2.5, "loss_interval": [2.4, 2.6], "perplexity": 12.18, "bits_per_byte": 1.1}


@pytest.fixture
def student(tmp_path: Path) -> Path:
    """A Nemotron-H of Apache licence without its last block and without some of its hidden channels."""
    model = HybridModel(preset("nemotron-h-tiny"))
    initialize(model, 0)
    save_model(model, tmp_path / "teacher")
    card = tmp_path / "teacher" / "README.md"
    card.write_text(card.read_text().replace("license: unknown", "license: apache-2.0"))
    teacher = open_(tmp_path / "teacher", Common())
    count = len(teacher.config.blocks)
    plan = PruningPlan(teacher.digest, teacher.config, tuple(range(count - 1)), {"hidden": tuple(range(64))})
    directory = tmp_path / "small" / "checkpoint"
    write_student(directory, teacher, plan, apply_plan(plan, teacher.checkpoint.tensors()))
    certify(directory, teacher.checkpoint, plan, tokens=32)
    return directory


def test_a_students_card(student: Path) -> None:
    digest = Checkpoint.open(student).digest
    write_card(student, rows={"teacher": ROW, "group_blind": {**ROW, "tokens_trained": 5000}}, judged_on="ten pages")
    text = (student / "README.md").read_text()
    assert "# small\n" in text and "license: apache-2.0" in text and license_of(student) == "apache-2.0"
    assert "| hidden size | 96 | 64 |" in text and "Dropped blocks of the teacher: " in text
    assert "as cut, before any training, it equals the teacher" in text
    assert "| group-blind | 1,234,567 | 5,000 | 2.5000 (2.4000 to 2.6000) | 12.18 | 1.1000 |" in text
    assert "Judged on ten pages." in text and 'AutoModelForCausalLM.from_pretrained("small/checkpoint")' in text
    assert "halflap export small/checkpoint --format gguf" in text and "prune: parameters" in text
    assert Checkpoint.open(student).digest == digest


def test_a_card_tells_of_blocks_that_became_something_else(tmp_path: Path) -> None:
    model = HybridModel(preset("nemotron-h-tiny"))
    initialize(model, 0)
    save_model(model, tmp_path / "teacher")
    teacher = open_(tmp_path / "teacher", Common())
    plan = PruningPlan(teacher.digest, teacher.config, changes={1: Change(linear=True), 3: Change(2, 32)})
    write_student(tmp_path / "changed", teacher, plan, apply_plan(plan, teacher.checkpoint.tensors()))
    text = (tmp_path / "changed" / "README.md").read_text()
    assert "| linear blocks | none | 1 |" in text and "| window | none | 32 |" in text and "nothing" not in text
    assert "Changed blocks of the teacher: 1 (linear), 3 (key/value heads averaged by 2, window 32)." in text


def test_an_export_keeps_what_a_students_card_says(halflap: Callable[..., Any], student: Path, tmp_path: Path) -> None:
    write_card(student, rows={"student": ROW}, judged_on="ten pages")
    before = (student / "README.md").read_text()
    result = halflap("export", student, "--out", tmp_path / "same", "--json").json
    text = (tmp_path / "same" / "README.md").read_text()
    said = before[before.index("## What was cut") : before.index("## How it came to be")]
    assert not result["padded"] and said in text and "Judged on ten pages." in said and "it equals the teacher" in said
    assert "2. export: " in text and "license: apache-2.0" in text and "All this is of" not in text
    for name in ("pruning_plan.json", "certificate.json"):
        assert (tmp_path / "same" / name).read_bytes() == (student / name).read_bytes()
    halflap("export", student, "--quantize", "int8", "--out", tmp_path / "packed")
    assert "before its weights were packed (int8" in (tmp_path / "packed" / "README.md").read_text()


def test_a_padded_export_says_that_its_widths_are(halflap: Callable[..., Any], student: Path, tmp_path: Path) -> None:
    teacher = open_(tmp_path / "teacher", Common())
    index = teacher.config.pattern().index("-")
    plan = PruningPlan(teacher.digest, teacher.config, keep={f"blocks.{index}.neuron": tuple(range(64))})
    write_student(tmp_path / "uneven", teacher, plan, apply_plan(plan, teacher.checkpoint.tensors()))
    words = ("export", tmp_path / "uneven", "--pad-to-stock", "--out", tmp_path / "padded", "--json")
    assert halflap(*words).json["padded"]
    text = (tmp_path / "padded" / "README.md").read_text()
    assert "## What was cut" in text and "before what made its layers unequal was padded with zeros" in text
    assert PruningPlan.load(tmp_path / "padded") == plan


def test_a_card_without_more_is_whole(tmp_path: Path) -> None:
    model = HybridModel(preset("hymba-tiny"))
    initialize(model, 0)
    save_model(model, tmp_path / "model")
    text = (tmp_path / "model" / "README.md").read_text()
    assert "## What was cut" not in text and "## How to load it" in text and "llama.cpp does not run it" in text
    assert license_of(tmp_path / "model") is None and license_of(tmp_path) is None and more_of(tmp_path / "model") == ""


@pytest.mark.parametrize(
    "text, found",
    [
        ("---\nlicense: mit\n---\n# x\nlicense: other\n", "mit"),
        ("---\nlicense: 'apache-2.0' \ntags: []\n---\n", "apache-2.0"),
        ("---\nlicense: unknown\n---\n", None),
        ("# x\nlicense: mit\n---\n", None),
        ("", None),
    ],
)
def test_the_licence_is_read_from_the_head_of_a_card(tmp_path: Path, text: str, found: str | None) -> None:
    (tmp_path / "README.md").write_text(text)
    assert license_of(tmp_path) == found
