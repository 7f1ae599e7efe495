"""Method puzzle: score every variant of every block in the teacher's place, then choose under all budgets at once."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from halflap.commands import scoring, students
from halflap.commands.config_compress import CompressRecipe, SearchRecipe
from halflap.commands.students import Teacher
from halflap.compress import local
from halflap.compress.axes import Sizes
from halflap.compress.importance import Importance
from halflap.compress.library import WHOLE, Library, Option, Variant, library_of
from halflap.compress.plan import PruningPlan
from halflap.compress.programme import Programme
from halflap.compress.ranking import plan_of_variants
from halflap.compress.replace import Replacement, Scores, replacement, replacement_scores
from halflap.compress.search import Trial
from halflap.compress.space import Candidate, Fitting
from halflap.data.batch import Batch
from halflap.data.loader import Loader
from halflap.files import write_json
from halflap.models.model import HybridModel
from halflap.run import Run
from halflap.train.config import Fit

SCORES, FORMAT = "variant_scores.json", "halflap-variant-scores-1"


def propose(
    recipe: SearchRecipe | CompressRecipe,
    run: Run,
    teacher: Teacher,
    model: HybridModel,
    importance: Importance,
    loader: Loader,
) -> tuple[Fitting, Callable[[Trial], PruningPlan]]:
    """Candidates, the best sum of scores first, and the plan of each.

    As many candidates as the shortlist has places, or as differ enough. Raises HalflapError on a budget that cannot
    be met, before anything is scored.
    """
    settings, config = recipe.settings, teacher.config
    library = library_of(config, recipe.space)
    programme = Programme(library, students.budget_of(recipe.budgets, config))

    def plan_of(variants: tuple[Variant, ...]) -> PruningPlan:
        return plan_of_variants(importance, teacher.digest, config, variants, recipe.norm_correction)

    def plan_with(option: Option) -> PruningPlan:
        return plan_of(tuple(option.variant if i in option.blocks else WHOLE for i in range(len(config.blocks))))

    def make(option: Option) -> Replacement:
        plan, index = plan_with(option), option.blocks[0]
        return replacement(model, plan, index, local.trained_block(blocks, plan, index))

    blocks = run.path / students.BLOCKS
    if settings.block_tokens:
        _distill_blocks(blocks, model, library, plan_with, loader, settings.block_tokens, recipe.fit)
    batches = [batch.to(teacher.device) for batch in students.choosing(loader, settings.replacement_tokens)]
    made_from = {
        "teacher": teacher.digest,
        "importance": importance.digest,
        "text": scoring.text_digest(batches),
        "norm_correction": recipe.norm_correction,
        "block_tokens": settings.block_tokens,
    }
    scores = _scores(run.path / SCORES, made_from, model, batches, library, make)
    by_option = np.array([0.0 if o.variant == WHOLE else scores[o.name] for o in library.options])
    choices = programme.choices(by_option, settings.shortlist, settings.max_overlap)
    candidates = tuple(
        Candidate(Sizes(), choice.costs, choice.score, tuple(v.name for v in library.variants(choice.options)))
        for choice in choices
    )
    remark = None
    if len(candidates) < settings.shortlist:
        remark = (
            f"only {len(candidates)} of {settings.shortlist} candidates differ enough under the budget; raise "
            "--max-overlap for more alike"
        )
    if set(candidates[0].variants) == {WHOLE.name}:
        remark = "the teacher itself is within the budget: nothing is cut"
    fitting = Fitting(candidates, len(library.options), remark)
    return fitting, lambda trial: plan_of(library.named(trial.variants))


def _distill_blocks(
    blocks: Path,
    model: HybridModel,
    library: Library,
    plan_with: Callable[[Option], PruningPlan],
    loader: Loader,
    tokens: int,
    fit: Fit,
) -> None:
    """Train every variant on the first tokens of the text, block by block, but those whose files are there."""
    steps = max(1, round(tokens / loader.tokens_per_batch))
    for index in range(len(model.blocks)):
        own = [o for o in library.options if o.blocks == (index,) and o.variant != WHOLE and not o.variant.dropped]
        plans = [plan for plan in map(plan_with, own) if not local.block_file(blocks, plan, index).exists()]
        variants = [replacement(model, plan, index) for plan in plans]
        if variants:
            local.distill_block(model, variants, index, loader.batch, steps, fit)
        for plan, variant in zip(plans, variants, strict=True):
            local.save_block(blocks, plan, index, variant)


def _scores(
    file: Path,
    made_from: Mapping[str, Any],
    model: HybridModel,
    batches: list[Batch],
    library: Library,
    make: Callable[[Option], Replacement],
) -> Scores:
    """Measured once and kept in `file`, which holds what an interrupted measurement had."""
    known: dict[str, float] = {}
    if file.exists():
        data = json.loads(file.read_text("utf-8"))
        if data["format"] == FORMAT and data["made_from"] == made_from:
            known = data["scores"]

    def save(scores: Scores) -> None:
        tokens = sum(int((batch.weights > 0).sum()) for batch in batches)
        write_json(file, {"format": FORMAT, "made_from": made_from, "tokens": tokens, "scores": scores})

    return replacement_scores(model, batches, library, make, known, save)
