"""The shipped studies of compression, from configs alone: every arm can be had from the teacher it is written for."""

from __future__ import annotations

import dataclasses
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from halflap.checkpoints.config import read_config
from halflap.commands import study_readings
from halflap.commands.students import budget_of
from halflap.commands.study_compressions import Compression
from halflap.commands.study_file import SHIPPED, SIZES, Study, read_study, shipped
from halflap.compress.axes import Sizes, check_sizes, kept_after, resize
from halflap.compress.grid import choices, choices_by_type
from halflap.compress.library import library_of
from halflap.compress.programme import Programme
from halflap.compress.space import fitting
from halflap.models.config import ModelConfig
from halflap.models.count import count_parameters
from halflap.models.presets import preset

ROOT = Path(__file__).resolve().parents[2]
COMPRESSIONS = [name for name in shipped() if "\nteacher:" in (SHIPPED / f"{name}.yaml").read_text()]
GRIDS = {"homogeneous": choices, "minipuzzle": choices_by_type}


plan_of = cache(read_study)


@cache
def teacher_of(plan_teacher: str) -> ModelConfig:
    return read_config(ROOT / plan_teacher) if (ROOT / plan_teacher).is_dir() else preset(plan_teacher)


def sizes_of(arm: Compression, teacher: ModelConfig, params: int | None = None) -> Sizes | None:
    """What an arm is cut to, or could be; None of method puzzle. Raises HalflapError when it cannot be met."""
    recipe = arm.recipe
    budget = budget_of(dataclasses.replace(recipe.budgets, latency=None), teacher)
    if params is not None:
        budget = dataclasses.replace(budget, params=params)
    if not budget.ceilings:
        check_sizes(teacher, recipe.sizes)
        return recipe.sizes
    if recipe.settings.method == "puzzle":
        Programme(library_of(teacher, recipe.space), budget)
        return None
    order = tuple(range(len(teacher.blocks)))
    found = fitting(teacher, budget, recipe.space, order, GRIDS[recipe.settings.method])
    assert found.remark is None, found.remark  # within 5 % of the budget
    return found.candidates[0].sizes


def parameters(sizes: Sizes, teacher: ModelConfig) -> int:
    return count_parameters(resize(teacher, kept_after(teacher, sizes, None), sizes))


@pytest.mark.parametrize("size", ["small", "paper"])
@pytest.mark.parametrize("name", COMPRESSIONS)
def test_every_arm_can_be_had(name: str, size: str) -> None:
    plan = plan_of(name, size)
    study_readings.check(plan)
    teacher = teacher_of(str(plan.teacher))
    cut = {arm: sizes_of(one, teacher) for arm, one in plan.compressions.items() if not one.leans_on}
    for one in plan.compressions.values():
        if "params" in one.match:
            reference: Any = cut[one.match["params"]]
            sizes_of(one, teacher, parameters(reference, teacher))
    if name == "cheap-score":
        counts = [parameters(sizes, teacher) for sizes in cut.values() if sizes is not None]
        assert len(counts) >= 8 and (size == "paper" or max(counts) / min(counts) <= 1.015)


@pytest.mark.parametrize("name", COMPRESSIONS)
def test_sizes_ask_for_the_same(name: str) -> None:
    plans: list[Study] = [plan_of(name, size) for size in SIZES]
    assert len({plan.arms for plan in plans}) == 1 and len(plans[1].seeds) >= 3
    for plan in plans:
        assert plan.asks and all((ROOT / path).exists() for path in (*plan.data, *plan.eval_data))
