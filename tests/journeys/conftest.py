"""What journeys set out from."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from halflap.checkpoints.checkpoint import save_model
from halflap.data.tokenizer import train_tokenizer
from halflap.models.model import HybridModel, initialize
from halflap.models.presets import preset


@pytest.fixture(scope="module")
def teacher_place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher with random weights and a tokenizer, and text."""
    folder, generator = tmp_path_factory.mktemp("teacher"), random.Random(0)
    documents = [" ".join(generator.choices(["half", "lap", "joint", "wood"], k=60)) for _ in range(60)]
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    train_tokenizer(documents, 280).save(folder / "tokenizer")
    model = HybridModel(preset("nemotron-h-tiny"))
    initialize(model, 0)
    save_model(model, folder / "teacher", tokenizer_from=folder / "tokenizer")
    return folder


@pytest.fixture(scope="module")
def cut_place(teacher_place: Path) -> Path:
    """The same, and a student without two of the teacher's blocks."""
    from halflap.cli import main

    words = ("prune", teacher_place / "teacher", "--sizes.drop-blocks", 1, 4, "--out", teacher_place / "pruned")
    assert main([str(word) for word in (*words, "--quiet")]) == 0
    return teacher_place
