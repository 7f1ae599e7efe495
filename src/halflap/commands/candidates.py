"""Which students a search tries, and how they are judged: by loss as cut, then after a short distillation.

homogeneous    one size an axis for all blocks, of those that no axis could exceed
puzzle         a variant for each block, chosen by a programme from scores in the teacher's place (puzzle.py)
"""

from __future__ import annotations

import dataclasses
from functools import partial

from halflap.commands import arms, puzzle, students
from halflap.commands.config_compress import CompressRecipe, SearchRecipe
from halflap.commands.sections import Budgets, SearchSettings
from halflap.commands.students import Teacher
from halflap.commands.teaching import Tutor
from halflap.compress.axes import SearchSpace, Sizes, check_sizes
from halflap.compress.importance import Importance
from halflap.compress.plan import PruningPlan
from halflap.compress.ranking import drop_order, plan_for
from halflap.compress.search import SearchResult, Trial
from halflap.compress.search import search as search_candidates
from halflap.compress.space import Fitting, fitting
from halflap.data.loader import Loader
from halflap.models.model import HybridModel
from halflap.run import Run

SEARCH = "search.json"


def search(
    recipe: SearchRecipe | CompressRecipe,
    run: Run,
    teacher: Teacher,
    importance: Importance,
    loader: Loader,
    tutor: Tutor,
) -> SearchResult:
    """Losses of the likeliest candidates as cut, and of the best after a short distillation if tokens are given."""
    settings: SearchSettings = recipe.settings
    fixed = recipe.sizes if isinstance(recipe, CompressRecipe) else Sizes()
    batches = students.choosing(loader, settings.score_tokens)
    model = teacher.load()
    if settings.method == "puzzle":
        candidates, plan_of = puzzle.propose(recipe, run, teacher, model, importance, loader)
    else:
        candidates = alike(teacher, importance, recipe.budgets, fixed, recipe.space)
        plan_of = partial(_plan_of_sizes, recipe, teacher, importance, fixed)

    def build(plan: PruningPlan) -> HybridModel:
        return students.with_trained_blocks(students.build(model, plan), plan, run.path)

    def loss_as_cut(plan: PruningPlan) -> float:
        return students.next_token_loss(build(plan), batches, teacher)

    def loss_after_distillation(plan: PruningPlan) -> float:
        student = arms.short_distillation(run.path, teacher, plan, build, loader, recipe, tutor)
        return students.next_token_loss(student, batches, teacher)

    return search_candidates(
        candidates,
        plan_of,
        loss_as_cut,
        made_from={
            "teacher": teacher.digest,
            "importance": importance.digest,
            "budgets": {name: str(value) for name, value in vars(recipe.budgets).items() if value is not None},
            "norm_correction": recipe.norm_correction,
            "settings": dataclasses.asdict(settings),
        },
        path=run.path / SEARCH,
        shortlist=settings.shortlist,
        refine=loss_after_distillation if settings.shortlist_tokens else None,
        refined=settings.refined,
    )


def _plan_of_sizes(
    recipe: SearchRecipe | CompressRecipe, teacher: Teacher, importance: Importance, fixed: Sizes, trial: Trial
) -> PruningPlan:
    sizes = with_dropped(trial.sizes, fixed)
    return plan_for(importance, teacher.digest, teacher.config, sizes, recipe.norm_correction)


def alike(teacher: Teacher, importance: Importance, budgets: Budgets, fixed: Sizes, space: SearchSpace) -> Fitting:
    """Sizes of all blocks that fit the budgets; those given as `fixed` are not varied."""
    check_sizes(teacher.config, fixed)
    order = drop_order(importance, teacher.config) if importance.depth else None
    given = {name: (value,) for name, value in vars(fixed).items() if value and name != "drop_blocks"}
    if fixed.drop_blocks:
        rest = [index for index in range(len(teacher.config.blocks)) if index not in fixed.drop_blocks]
        order = (*fixed.drop_blocks, *rest)
        given["num_blocks"] = (len(rest),)
    return fitting(
        teacher.config, students.budget_of(budgets, teacher.config), dataclasses.replace(space, **given), order
    )


def with_dropped(sizes: Sizes, fixed: Sizes) -> Sizes:
    """Blocks named to be dropped stay named."""
    return dataclasses.replace(sizes, num_blocks=None, drop_blocks=fixed.drop_blocks) if fixed.drop_blocks else sizes
