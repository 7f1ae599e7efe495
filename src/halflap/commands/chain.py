"""Compression in steps: each student is cut from the one before, and all are taught by the first teacher.

Budgets fall by the same factor at each step, and each step gets the same share of the tokens. A step's student has
recovered from its cut before the next one, so that importance is measured on a model that works; the first teacher
stays the teacher, because a student is worse than it was and would hand its errors on. Each step but the last is a run
of `compress` of its own in `steps/`, found again when the command is repeated; the last is the run itself.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from halflap.amounts import WHOLE, Amount
from halflap.commands.config_compress import CompressRecipe
from halflap.commands.sections import Budgets
from halflap.commands.students import budget_of, has_ceiling
from halflap.compress.axes import Sizes
from halflap.compress.cost_table import CostTable
from halflap.compress.costs import BUDGETS, costs
from halflap.errors import RecipeError
from halflap.models.config import ModelConfig


def check_steps(recipe: CompressRecipe) -> None:
    """Raise RecipeError when there are several steps and no budget to divide among them."""
    if recipe.loss_settings.steps > 1 and not has_ceiling(recipe.budgets):
        raise RecipeError(
            f"steps is {recipe.loss_settings.steps} and only sizes are given; steps divide a budget: give one "
            "(--params 25%, ...), or run `halflap compress` once for each of the sizes"
        )


def recipes_of_steps(
    recipe: CompressRecipe, teacher: ModelConfig, place: Path, table: CostTable | None = None
) -> list[CompressRecipe]:
    """A recipe for each step, the last in the run's own directory; `model` is still the first teacher's.

    Sizes and importance given in the recipe are of the last and of the first step alone.
    """
    count = recipe.loss_settings.steps
    if count == 1:
        return [recipe]
    loss = dataclasses.replace(recipe.loss_settings, steps=1, teacher_correction=0)
    each = recipe.tokens // count
    found = []
    for number in range(1, count + 1):
        last = number == count
        directory = place if last else place / "steps" / str(number)
        found.append(
            dataclasses.replace(
                recipe,
                tokens=recipe.tokens - each * (count - 1) if last else max(1, each),
                importance=recipe.importance if number == 1 else None,
                budgets=_budgets_at(recipe.budgets, teacher, number / count, table),
                sizes=recipe.sizes if last else Sizes(),
                controls=recipe.controls if last else (),
                loss_settings=loss,
                common=dataclasses.replace(recipe.common, out=str(directory), overwrite=False),
            )
        )
    return found


def _budgets_at(budgets: Budgets, teacher: ModelConfig, share: float, table: CostTable | None) -> Budgets:
    """Ceilings `share` of the way, by factors, from the teacher's own costs; absolute: each step cuts another model."""
    final = budget_of(budgets, teacher, table)
    whole = costs(teacher, final)
    found: dict[str, Any] = {}
    for name in BUDGETS:
        amount: Amount | None = getattr(budgets, name)
        if amount is None:
            continue
        end, start = amount.of(whole.get(name, 0.0)), whole.get(name)
        value = end if start is None or start <= 0 else start ** (1 - share) * end**share
        found[name] = Amount(round(value) if amount.unit in WHOLE else value, amount.unit)
    return dataclasses.replace(budgets, **found)
