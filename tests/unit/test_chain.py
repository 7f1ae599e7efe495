"""Compression in steps: what each step may cost lies between the teacher and the budget, by equal factors."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from halflap.amounts import parse_amount
from halflap.commands.chain import recipes_of_steps
from halflap.commands.config_compress import CompressRecipe
from halflap.commands.sections import Budgets, CompressSettings
from halflap.commands.students import budget_of
from halflap.models.presets import preset

TINY = preset("nemotron-h-tiny")


@pytest.mark.parametrize("seconds", [3.0, 0.7, 1e-4])
def test_steps_keep_a_throughput_of_any_size(seconds: float) -> None:
    table: Any = SimpleNamespace(seconds=lambda *_: seconds)
    budgets = Budgets(throughput=parse_amount("150%", "rate", largest_share=100.0), context=64)
    recipe = CompressRecipe("teacher", budgets=budgets, loss_settings=CompressSettings(steps=2))
    found = [budget_of(step.budgets, TINY, table) for step in recipes_of_steps(recipe, TINY, Path(), table)]
    assert [one.throughput for one in found] == pytest.approx([1.5**0.5 / seconds, 1.5 / seconds], rel=1e-12)
    assert [one.ceilings["latency"] for one in found] == pytest.approx([seconds / 1.5**0.5, seconds / 1.5])
