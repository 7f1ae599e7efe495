"""The shipped recipes: the tiny ones run from beginning to end, the published ones are read back whole."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
RECIPES = ROOT / "recipes"
TINY = ("tokenizer", "pretrain", "compress", "score", "search", "prune", "distill", "evaluate")


def test_the_tiny_recipes_are_a_journey(
    halflap: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "demo").symlink_to(ROOT / "demo")
    monkeypatch.chdir(tmp_path)
    found = {name: halflap(name, "--config", RECIPES / "tiny" / f"{name}.yaml", "--json").json for name in TINY}
    assert [row["name"] for row in found["compress"]["controls"]] == ["scratch", "group_blind", "random"]
    assert found["compress"]["verified"] and found["compress"]["parameters_ratio"] <= 0.5
    assert found["prune"]["verified"] and 0.57 <= found["prune"]["ratio"] <= 0.6
    assert found["distill"]["parameters"] == found["evaluate"]["parameters"] == found["prune"]["parameters"]
    assert found["evaluate"]["tokens"] == 4000


def test_every_recipe_is_listed_and_read(halflap: Callable[..., Any]) -> None:
    assert sorted(path.stem for path in (RECIPES / "tiny").iterdir()) == sorted(TINY)
    for path in sorted(RECIPES.glob("*/*.yaml")):
        written = yaml.safe_load(path.read_text(encoding="utf-8"))
        shown = yaml.safe_load(halflap(written["verb"], "--config", path, "--show").out)
        assert shown["out"] == written.get("out") and shown["verb"] == written["verb"], path
