"""The two minutes of README.md, with fewer tokens: every command works as it is printed."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
FEWER = {"100k": "2k", "50k": "1k", "8k": "1k"}


def commands() -> list[list[str]]:
    section = (ROOT / "README.md").read_text(encoding="utf-8").partition("## Two minutes")[2].partition("\n## ")[0]
    block = re.findall(r"```bash\n(.*?)```", section, re.DOTALL)[0].replace("\\\n", " ")
    return [[FEWER.get(word, word) for word in shlex.split(line)] for line in block.splitlines()]


def test_the_two_minutes_of_the_readme(
    halflap: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "demo").symlink_to(ROOT / "demo")
    monkeypatch.chdir(tmp_path)
    printed = {}
    for program, *words in commands():
        assert program == "halflap"
        outcome = halflap(*words, "--quiet")
        assert outcome.status == 0, f"{shlex.join(words)}: {outcome.err}"
        printed[words[0]] = outcome.out
    assert "519,660" in printed["inspect"]
    assert len(printed["generate"].strip()) > 0
    assert {"checkpoint", "pruned", "report.html", "status.json"} <= {file.name for file in Path("runs/half").iterdir()}


def test_the_readme_lists_every_verb() -> None:
    from halflap.cli import VERBS

    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [verb for verb in VERBS if f"`{verb}`" not in text] == []
