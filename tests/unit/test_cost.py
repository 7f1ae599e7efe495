"""`pretrain --dry-run` with phases: what each phase reads and costs, and the whole."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

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
