"""Method puzzle: score every variant of every block in the teacher's place, then choose under all budgets at once."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from halflap.checkpoints.streamed import AnyModel, StreamedModel
from halflap.commands import scoring, students
from halflap.commands.given import Given
from halflap.commands.tables import joined
from halflap.compress import local
from halflap.compress.axes import Sizes
from halflap.compress.costs import Budget
from halflap.compress.library import DROPPED, WHOLE, Library, Option
from halflap.compress.partial import Scratch
from halflap.compress.plan import PruningPlan
from halflap.compress.programme import Programme
from halflap.compress.replace import Replacement, Scores, replacement, replacement_scores
from halflap.compress.replace_streamed import replacement_scores_streamed
from halflap.compress.search import SearchResult
from halflap.compress.space import Candidate, Fitting
from halflap.data.batch import Batch
from halflap.errors import HalflapError
from halflap.files import write_json
from halflap.models.model import HybridModel
from halflap.models.sharing import with_source

SCORES, FORMAT = "variant_scores.json", "halflap-variant-scores-1"
SCRATCH = "replacing"
"""Folder of a search with the streams of a teacher that is read a block at a time."""


def programme_of(given: Given, budget: Budget) -> Programme:
    """What is chosen from, of all variants those that save something, and under which budgets.

    Raises HalflapError for budgets that cannot be met.
    """
    library, times = given.library, given.times
    if times is not None:
        blocks = given.teacher.config.blocks
        made = (o.variant.of(blocks[i]) for o in library.options for i in o.blocks if not o.variant.dropped)
        if absent := times.unknown(budget.condition, (with_source(block, 0) for block in made)):
            raise HalflapError(
                f"the cost table has no times of {absent[0]} blocks, which method puzzle may choose; measure it again "
                "with `halflap bench MODEL --blocks`, or leave --costs out"
            )
    return Programme(library.saving(budget), budget)


def propose(given: Given, model: AnyModel, programme: Programme) -> Fitting:
    """Candidates, the best sum of scores first: as many as the shortlist has places, or as differ enough."""
    settings, library = given.recipe.settings, programme.library
    scores = _measured(given, model, library)
    by_option = np.array([0.0 if o.variant == WHOLE else scores[o.name] for o in library.options])
    choices = programme.choices(by_option, settings.shortlist, settings.max_overlap)
    candidates = tuple(
        Candidate(Sizes(), choice.costs, choice.score, tuple(v.name for v in library.variants(choice.options)))
        for choice in choices
    )
    return Fitting(candidates, len(library.options))


def remark(given: Given, result: SearchResult) -> str | None:
    """What a user must know of what was found: nothing cut, few candidates, below all that was allowed, or judged by
    too short a text."""
    best, budget, settings = result.chosen, given.budget, given.recipe.settings
    if set(best.variants) == {WHOLE.name}:
        return "the teacher itself is within the budget: nothing is cut"
    remarks = []
    if len(result.trials) < settings.shortlist:
        remarks.append(
            f"only {len(result.trials)} of {settings.shortlist} candidates differ enough under the budget; raise "
            "--max-overlap for more alike"
        )
    if short := budget.short(best.costs):
        remarks.append(
            f"the best choice stays more than 5 % below the budget: it has {short}; give finer lists, such as "
            "--space.intermediate-size, to use all of it"
        )
    chosen = {variant.change.window for row in result.trials for variant in given.library.named(row.variants)}
    if hidden := sorted(window for window in chosen if window and window + 1 >= given.scoring.sequence_length):
        remarks.append(
            f"windows of {', '.join(map(str, hidden))} hide nothing in rows of {given.scoring.sequence_length} tokens, "
            "so what they do was not measured; raise --fit.sequence-length, or give shorter ones with --space.window"
        )
    before = {"importance was measured": given.importance.tokens, "variants learnt": settings.block_tokens}
    tokens = settings.replacement_tokens
    return joined(
        *remarks,
        students.learning_remark(given.scoring, "variants", settings.block_tokens),
        students.choosing_remark(given.scoring, "variants", "--replacement-tokens", tokens, before),
    )


def _measured(given: Given, model: AnyModel, library: Library) -> Scores:
    """The score of every variant, once it has learnt what its block does, if the recipe has tokens for that."""
    teacher, settings = given.teacher, given.recipe.settings
    folder = given.shared / students.BLOCKS
    weights = model.shell if isinstance(model, StreamedModel) else model

    def plan_with(option: Option) -> PruningPlan:
        return given.plan_of_variants(library.alone(option))

    def make(option: Option) -> Replacement:
        plan, index = plan_with(option), option.blocks[0]
        return replacement(weights, plan, index, local.trained_block(folder, plan, index))

    if settings.block_tokens:
        _distill_blocks(given, model, library, plan_with, folder)
    batches = [batch.to(teacher.device) for batch in students.choosing(given.scoring, settings.replacement_tokens)]
    made_from = {
        "teacher": teacher.digest,
        "importance": given.importance.digest,
        "text": scoring.text_digest(batches),
        "norm_correction": given.recipe.norm_correction,
        "block_tokens": settings.block_tokens,
    }
    scores = _scores(given.shared / SCORES, made_from, model, batches, library, make)
    shutil.rmtree(given.shared / SCRATCH, ignore_errors=True)
    return scores


def _distill_blocks(
    given: Given, model: AnyModel, library: Library, plan_with: Callable[[Option], PruningPlan], folder: Path
) -> None:
    """Train every variant on the first tokens of the text, block by block, but those whose files are there."""
    loader, fit, config = given.scoring, given.recipe.fit, given.teacher.config
    steps = max(1, round(given.recipe.settings.block_tokens / loader.tokens_per_batch))

    def untrained(index: int) -> list[PruningPlan]:
        own = [o for o in library.options if o.blocks == (index,) and o.variant not in (WHOLE, DROPPED)]
        plans = [plan_with(option) for option in own if not library.follows(option)]
        return [plan for plan in plans if not local.block_file(folder, plan, index).exists()]

    def train(weights: HybridModel, index: int, plans: list[PruningPlan], lessons: local.Lessons) -> None:
        variants = [replacement(weights, plan, index) for plan in plans]
        local.distill_block(variants, index, lessons, steps, fit, config.num_meta_tokens)
        for plan, variant in zip(plans, variants, strict=True):
            local.save_block(folder, plan, index, variant)

    todo = {index: plans for index in range(len(config.blocks)) if (plans := untrained(index))}
    if not isinstance(model, StreamedModel):
        for index, plans in todo.items():
            train(model, index, plans, local.lessons_of(model, loader.batch, index))
    elif todo:
        batches = [loader.batch(step) for step in range(steps)]
        made_from = json.dumps({"teacher": given.teacher.digest, "text": scoring.text_digest(batches)})
        scratch = Scratch(given.shared / SCRATCH, made_from)
        for index, lessons in local.lessons_streamed(model, batches, scratch, [*todo]):
            for plan in todo[index]:  # one at a time: with its gradients it is several times what a block is
                train(model.shell, index, [plan], lessons)


def _scores(
    file: Path,
    made_from: Mapping[str, Any],
    model: AnyModel,
    batches: list[Batch],
    library: Library,
    make: Callable[[Option], Replacement],
) -> Scores:
    """Measured once and kept in `file`, which holds what an interrupted measurement had."""
    known = {option.name: 0.0 for option in library.options if library.follows(option)}
    if file.exists():
        data = json.loads(file.read_text("utf-8"))
        if data["format"] == FORMAT and data["made_from"] == made_from:
            known |= data["scores"]

    def save(scores: Scores) -> None:
        tokens = sum(int((batch.weights > 0).sum()) for batch in batches)
        write_json(file, {"format": FORMAT, "made_from": made_from, "tokens": tokens, "scores": scores})

    if isinstance(model, StreamedModel):
        scratch = Scratch(file.parent / SCRATCH, json.dumps(made_from))
        return replacement_scores_streamed(model, batches, library, make, scratch, known, save)
    return replacement_scores(model, batches, library, make, known, save)
