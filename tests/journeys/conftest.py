"""What journeys set out from."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def cut_place(teacher_place: Path) -> Path:
    """The same, and a student without two of the teacher's blocks."""
    from halflap.cli import main

    words = ("prune", teacher_place / "teacher", "--sizes.drop-blocks", 1, 4, "--out", teacher_place / "pruned")
    assert main([str(word) for word in (*words, "--quiet")]) == 0
    return teacher_place
