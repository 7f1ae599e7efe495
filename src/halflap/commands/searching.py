"""The methods of `search`: what each tries, what it measures of a candidate as cut, and in which order it puts them.

All then distil the best of their shortlist for a while and choose by loss, if the recipe has tokens for that.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from halflap.checkpoints.shelf import STREAMS
from halflap.commands import puzzle, shortlist, students
from halflap.commands.candidates import Measure, measured
from halflap.commands.clock import CLOCK, agreed, clock_of, in_time_first
from halflap.commands.config_compress import CompressRecipe, SearchRecipe
from halflap.commands.device import must_stream
from halflap.commands.given import Given, keeps_kinds, with_dropped
from halflap.commands.scoring import text_digest
from halflap.commands.sections import Budgets, LossSettings
from halflap.commands.shortlist import Shortlist
from halflap.commands.students import Teacher
from halflap.commands.tables import joined
from halflap.compress.axes import Sizes, check_sizes, largest_sizes, resize
from halflap.compress.cost_table import CostTable
from halflap.compress.costs import BUDGETS, Budget, block_cost
from halflap.compress.grid import (
    ATTENTION_HEADS,
    STEPS,
    Grid,
    SearchSpace,
    between,
    choices,
    choices_by_type,
    go_together,
    widening,
)
from halflap.compress.importance import Importance
from halflap.compress.partial import Scratch
from halflap.compress.plan import PruningPlan
from halflap.compress.programme import Programme
from halflap.compress.ranking import drop_order, plan_for
from halflap.compress.search import (
    Look,
    Order,
    Round,
    Score,
    SearchResult,
    by_agreement,
    by_loss,
    ranked_search,
    stages,
    untried,
)
from halflap.compress.space import Candidate, Fitting, fitting
from halflap.data.batch import Batch
from halflap.errors import HalflapError, RecipeError
from halflap.models.config import ModelConfig
from halflap.models.model import HybridModel

SEARCH = "search.json"
Loaded = Callable[[], HybridModel | None]
"""Reads the model to cut candidates from when it is first needed; None where its weights are read a block at a time."""
FIRST_LOOK_SHARE = 8
"""A first look reads this fraction of the tokens: eight times the shortlist then costs as much as the shortlist."""


def check(given: Given) -> None:
    """Raise HalflapError for budgets that cannot be met, and for what the recipe's method does not do."""
    METHODS[given.recipe.settings.method].candidates(given, given.budget)


def check_unmeasured(given: Given) -> None:
    """The same before importance is measured: each budget alone, as if the blocks that cost most of it went first."""
    budgets = given.recipe.budgets
    for name in BUDGETS:
        if getattr(budgets, name) is not None:
            without: dict[str, Any] = {other: None for other in BUDGETS if other != name}
            recipe = dataclasses.replace(given.recipe, budgets=dataclasses.replace(budgets, **without))
            alone = dataclasses.replace(given, recipe=recipe)
            check(dataclasses.replace(alone, importance=_dearest_first(alone)))


def _dearest_first(given: Given) -> Importance:
    """An order of blocks in which no student costs more of the one budget than in another order.

    Blocks are compared at the smallest widths, as the smallest student has them.
    """
    config, budget = given.teacher.config, given.budget
    grid: dict[str, tuple[int, ...]] = {}
    if given.recipe.settings.method == "homogeneous":
        grid = choices(config, widening(config, given.recipe.space)[-1], False, STEPS[-1])
        grid |= {name: (value,) for name, value in given.fixed.to_json().items() if name in grid}
    heads = [name for name in ATTENTION_HEADS if name in grid]  # of which not every pair goes together
    sizes = {name: values[-1] for name, values in grid.items() if name not in (*heads, "num_blocks")}
    [cost] = budget.ceilings
    each: list[dict[str, Any]] = [
        sizes | dict(zip(heads, pair, strict=True)) for pair in itertools.product(*(grid[name] for name in heads))
    ]
    blocks = tuple(range(len(config.blocks)))
    shapes = [resize(config, blocks, Sizes(**one)) for one in each if go_together(one)] or [config]
    spent = [[block_cost(cost, small, budget, block) for block in small.blocks] for small in shapes]
    return Importance("none", {}, {"kl": -torch.tensor(min(spent, key=sum))})


def search(given: Given) -> SearchResult:
    """Search by the recipe's method; the result is in search.json too."""
    method = METHODS[given.recipe.settings.method]
    clock, model = given.clock, functools.cache(partial(_teacher, given))

    def find(pace: float | None) -> Fitting:
        return method.propose(given, model, method.candidates(given, given.budget.at_pace(pace)))

    found = agreed(clock, find, given.shape_of)
    result = _rank(given, model(), found)
    late = None if clock is None else clock.late(given.plan_for(result.chosen).student) or _fewer(given, result)
    if remark := joined(method.remark(given, result), late):
        result = dataclasses.replace(result, remark=joined(remark, result.remark))
        result.save(given.place / SEARCH)
    return result


def _fewer(given: Given, result: SearchResult) -> str | None:
    """Says so where the clock left fewer than were to be compared."""
    kept, places = sum(trial.loss is not None for trial in result.trials), given.recipe.settings.shortlist
    if kept >= min(places, len(result.trials)):
        return None
    return f"in time by the clock among the likeliest candidates: {kept}, where the shortlist has {places} places"


def _fitting(given: Given, budget: Budget, grid: Grid) -> Fitting:
    recipe = given.recipe
    if grid is choices_by_type and given.fixed.drop_blocks:
        raise RecipeError(
            "sizes.drop_blocks names blocks to drop, which --method minipuzzle chooses; leave it out, or give numbers "
            "of blocks (--space.num-attention-blocks, ...)"
        )
    if given.most != Sizes():
        grid = between(grid, None, given.most, recipe.space)
    return candidates(given.teacher, given.importance, budget, given.fixed, recipe.space, grid)


def _as_fitting(given: Given, model: Loaded, found: Fitting) -> Fitting:
    """Candidates that need no weights to be found."""
    return found


def _puzzle(given: Given, model: Loaded, programme: Programme) -> Fitting:
    return puzzle.propose(given, model() or given.teacher.stream(), programme)


def _teacher(given: Given) -> HybridModel | None:
    """The model to cut candidates from, or None when its weights are to be read a block at a time."""
    recipe, teacher = given.recipe, given.teacher
    asked = isinstance(recipe, SearchRecipe) and recipe.stream
    if not must_stream(teacher.config, "float32", teacher.device, asked):
        return teacher.load()
    if not isinstance(recipe, SearchRecipe):
        raise HalflapError(
            "compress trains a student beside its teacher, whose weights do not fit in memory; take score, search, "
            "prune and verify, which read them a block at a time, or a machine with more memory"
        )
    if recipe.settings.shortlist_tokens:
        raise RecipeError(
            f"shortlist_tokens is {recipe.settings.shortlist_tokens}, and a distillation needs the teacher in memory, "
            "where its weights do not fit or --stream has them read a block at a time: leave out --shortlist-tokens"
        )
    return None


def _student(given: Given, model: HybridModel, plan: PruningPlan) -> HybridModel:
    """A plan's student, with blocks that the search has trained."""
    return students.with_trained_blocks(students.build(model, plan), plan, given.shared)


def _score(given: Given, model: HybridModel | None, batches: list[Batch], measure: Measure) -> Score:
    """Measures students in turn; or, when there is no model, all by one reading of the teacher's checkpoint."""
    agree = measure is students.agreement

    def in_turn(plans: Sequence[PruningPlan]) -> Iterator[dict[str, float]]:
        asked = students.with_teacher_tokens_of(given.tutor.teacher, batches) if agree else batches
        assert model is not None
        for plan in plans:
            yield measure(_student(given, model, plan), asked, given.teacher)

    def together(plans: Sequence[PruningPlan]) -> Iterator[dict[str, float]]:
        made_of = _made_from(given.recipe, given.teacher, given.importance, given.times)
        made_from = json.dumps({**made_of, "text": text_digest(batches)})
        scratch = Scratch(given.place / STREAMS, made_from)
        trained = given.shared / students.BLOCKS
        return measured(given.teacher, plans, batches, measure, scratch, with_teacher=agree, trained=trained)

    return together if model is None else in_turn


class Method(NamedTuple):
    """What is tried, found from configs alone, so that budgets which cannot be met are refused before any work; the
    candidates that come of that; what is measured of a student as cut, in which order that puts them, and what is to be
    known of the result."""

    candidates: Callable[[Given, Budget], Any]
    propose: Callable[[Given, Loaded, Any], Fitting]
    measure: Measure
    order: Order
    remark: Callable[[Given, SearchResult], str | None] = lambda given, result: None


METHODS: dict[str, Method] = {
    # one size an axis for all blocks, ranked by loss
    "homogeneous": Method(partial(_fitting, grid=choices), _as_fitting, students.next_token_loss, by_loss),
    # numbers of blocks of each type and one width of the MLPs, ranked by accuracy and agreement with the teacher
    "minipuzzle": Method(partial(_fitting, grid=choices_by_type), _as_fitting, students.agreement, by_agreement),
    # a variant for each block, by how its score in the teacher's place adds up, ranked by loss
    "puzzle": Method(puzzle.programme_of, _puzzle, students.next_token_loss, by_loss, puzzle.remark),
}


def candidates(
    teacher: Teacher,
    importance: Importance,
    budget: Budget,
    fixed: Sizes,
    space: SearchSpace,
    grid: Grid = choices,
) -> Fitting:
    """Sizes that fit the budgets; those given as `fixed` are not varied."""
    check_sizes(teacher.config, fixed)
    by_type = grid is choices_by_type
    order = None
    if importance.depth or by_type:
        order = drop_order(importance, teacher.config, by_type, keeps_kinds(fixed))
    given = {name: (value,) for name, value in vars(fixed).items() if value and name != "drop_blocks"}
    whole = largest_sizes(teacher.config)
    if fixed.num_attention_heads == whole.get("num_attention_heads", 0):  # with a key/value head some of these would go
        given["num_key_value_heads"] = (whole["num_key_value_heads"],)
    if fixed.drop_blocks:
        rest = [index for index in range(len(teacher.config.blocks)) if index not in fixed.drop_blocks]
        order = (*fixed.drop_blocks, *rest)
        given["num_blocks"] = (len(rest),)
    return fitting(teacher.config, budget, dataclasses.replace(space, **given), order, grid)


def unmeasured(
    budgets: Budgets,
    table: CostTable | None,
    teacher: Teacher,
    importance: Importance,
    fixed: Sizes,
    space: SearchSpace,
    place: Path,
) -> Fitting:
    """Sizes that fit the budgets, as their cuts are expected to hurt, but ahead the likeliest that is in time."""
    budget = students.budget_of(budgets, teacher.config, table)

    def shape_of(candidate: Candidate) -> ModelConfig:
        sizes = with_dropped(candidate.sizes, fixed)
        return plan_for(importance, teacher.digest, teacher.config, sizes, keep_kinds=keeps_kinds(fixed)).student

    return in_time_first(
        clock_of(budgets, table, teacher, place / CLOCK),
        lambda pace: candidates(teacher, importance, budget.at_pace(pace), fixed, space),
        shape_of,
    )


def without_text(
    recipe: SearchRecipe, place: Path, teacher: Teacher, importance: Importance, table: CostTable | None
) -> SearchResult:
    """The result of a search that has nothing to measure candidates on; what `prune` takes is the first."""
    found = unmeasured(recipe.budgets, table, teacher, importance, Sizes(), recipe.space, place)
    remark = (
        "no text was given, so candidates stand as their cuts are expected to hurt; name some with --data to measure"
    )
    trials = tuple(map(untried, found.candidates))
    plan = plan_for(
        importance, teacher.digest, teacher.config, trials[0].sizes, recipe.norm_correction, keep_kinds=True
    )
    result = SearchResult(
        _made_from(recipe, teacher, importance, table),
        found.tried,
        trials,
        joined(found.remark, remark),
        plan.to_json(),
    )
    result.save(place / SEARCH)
    return result


def _rank(given: Given, model: HybridModel | None, found: Fitting) -> SearchResult:
    """Measure the likeliest as cut and, if tokens are given, the best of them after rounds of distillation."""
    recipe, settings, clock = given.recipe, given.recipe.settings, given.clock
    measure, order = METHODS[settings.method].measure, METHODS[settings.method].order
    batches = students.choosing(given.scoring, settings.score_tokens)
    look = None
    if min(settings.first_look, len(found.candidates)) > settings.shortlist:
        few = students.choosing(given.scoring, settings.score_tokens // FIRST_LOOK_SHARE)
        look = Look(settings.first_look, _score(given, model, few, measure))
    refined = min(settings.refined, settings.shortlist, len(found.candidates))
    rounds = stages(refined, settings.shortlist_tokens, settings.rounds == "halving")
    if not settings.shortlist_tokens:
        rounds = ()
    before = {
        "importance was measured": given.importance.tokens,
        "variants learnt": settings.block_tokens if settings.method == "puzzle" else 0,
        "candidates were distilled": rounds[-1].tokens if rounds else 0,
    }
    remark = students.choosing_remark(given.scoring, "candidates", "--score-tokens", settings.score_tokens, before)
    found = dataclasses.replace(found, remark=joined(found.remark, remark))
    shared = (
        None
        if model is None
        else Shortlist(
            given.place,
            given.shared,
            given.teacher,
            model,
            given.tutor,
            given.training,
            recipe.fit,
            recipe.loss_settings if isinstance(recipe, CompressRecipe) else LossSettings(),
            rounds[-1].tokens if rounds else 0,
        )
    )

    def refine(plans: Sequence[PruningPlan], tokens: int) -> list[Round]:
        assert shared is not None
        return [
            Round(done["tokens"], students.next_token_loss(student, batches, given.teacher)["loss"])
            for student, done in shortlist.train(shared, plans, tokens)
        ]

    result = ranked_search(
        found,
        given.plan_for,
        _score(given, model, batches, measure),
        made_from=_made_from(recipe, given.teacher, given.importance, given.times),
        path=given.place / SEARCH,
        shortlist=settings.shortlist,
        look=look,
        holds=None if clock is None else lambda plan: clock.in_time(plan.student),
        order=order,
        tolerance=settings.loss_tolerance,
        rounds=rounds,
        refine=refine,
    )
    if rounds and shared is not None:
        shortlist.keep(shared, given.plan_for(result.chosen), rounds[-1].tokens)
    return result


def _made_from(
    recipe: SearchRecipe | CompressRecipe, teacher: Teacher, importance: Importance, times: CostTable | None
) -> dict[str, Any]:
    return {
        "teacher": teacher.digest,
        "importance": importance.digest,
        "budgets": {name: str(value) for name, value in vars(recipe.budgets).items() if value is not None},
        "norm_correction": recipe.norm_correction,
        "settings": dataclasses.asdict(recipe.settings),
        **({} if times is None else {"costs": times.digest}),
    }
