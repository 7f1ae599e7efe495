"""`compress --elastic`: one checkpoint whose axes are sorted by importance and of which several sizes are distilled
together; and `prune --from-elastic`, which cuts any size from it.

The whole and the nested sizes share their weights, so each is the first indices of the next. A budget's size is
searched among those that the size before it contains; a student between two trained sizes contains the smaller one and
lies in the larger. The checkpoint holds what they learned: a trained size that is cut from it is what was trained.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from halflap.checkpoints.checkpoint import Checkpoint, load_model
from halflap.checkpoints.config import lineage_step, read_json
from halflap.commands import arms, clock, scoring, searching, students, sweep, teaching, timing
from halflap.commands.cards import write_card
from halflap.commands.config_compress import CompressRecipe, PruneRecipe
from halflap.commands.corpora import Corpora, held_out_batches, training_loader
from halflap.commands.given import Given, with_dropped
from halflap.commands.sections import Budgets
from halflap.commands.students import Teacher, budget_of, has_ceiling, open_teacher
from halflap.commands.tables import joined
from halflap.commands.teaching import Tutor
from halflap.compress.axes import Sizes, largest_sizes
from halflap.compress.cost_table import CostTable
from halflap.compress.costs import BUDGETS, WITHIN, Budget, Costs, costs
from halflap.compress.elastic import Elastic, NestedSize, elastic_of, sort_plan
from halflap.compress.grid import between, choices
from halflap.compress.importance import Importance
from halflap.compress.plan import PruningPlan
from halflap.compress.prune import apply_plan
from halflap.compress.slices import Slice
from halflap.compress.space import Candidate, Fitting
from halflap.data.loader import Loader
from halflap.errors import RecipeError
from halflap.files import write_json
from halflap.models.model import HybridModel
from halflap.parallel import mesh
from halflap.report.page import build as build_report
from halflap.run import Run
from halflap.train.fit import fit
from halflap.train.losses import mean_loss
from halflap.train.numerics import resolve_dtype
from halflap.train.objectives.language import NextToken
from halflap.train.objectives.nested import Nested, deal

DEFAULT = ("75%", "50%")
SORTED, NESTED, WHOLE = "sorted", "nested", "whole"


@dataclass(frozen=True)
class Setting:
    """What training and judging share: the teacher, the sorted checkpoint, and what is nested in it."""

    recipe: CompressRecipe
    run: Run
    teacher: Teacher
    source: Teacher
    elastic: Elastic
    corpora: Corpora
    loader: Loader

    def plans(self, checkpoint: Checkpoint) -> dict[str, PruningPlan]:
        """The plan of each nested size for the sorted or the trained checkpoint, by its budget's value."""
        digest = checkpoint.digest
        return {
            value_of(one): self.elastic.plan_for(checkpoint.config, digest, one.sizes) for one in self.elastic.nested
        }


def value_of(one: NestedSize) -> str:
    """`75%` of `params 75%`."""
    return one.budget.split()[-1]


def check(recipe: CompressRecipe) -> None:
    """Raise RecipeError for what several sizes trained as one do not go with, before any work."""
    loss = recipe.loss_settings
    given = {
        "sizes": recipe.sizes != Sizes(),
        "method": recipe.settings.method != "homogeneous",
        "shortlist_tokens": recipe.settings.shortlist_tokens,
        "controls": recipe.controls,
        "steps": loss.steps > 1,
        "intermediate": loss.intermediate,
    }
    if found := next((name for name, is_given in given.items() if is_given), None):
        raise RecipeError(
            f"{found} was given with elastic, where each budget gets one size an axis, and all of them learn the "
            "teacher's outputs together: leave one of both out"
        )
    if loss.loss != "next_token" and loss.top_k and loss.top_k_from == "disk":
        raise RecipeError(
            f"top_k is {loss.top_k} and read from disk, and with elastic the teacher runs beside the students: add "
            "--top-k-from live"
        )
    if recipe.norm_correction == "calibrated":
        raise RecipeError(
            "norm_correction is calibrated, which measures the norms of one teacher, and elastic weights go on "
            "changing: choose masked or none"
        )
    budgets_of(recipe)


def budgets_of(recipe: CompressRecipe) -> tuple[str, dict[str, Budgets]]:
    """Which budget the nested sizes are of, and the budgets of each by its value."""
    words = recipe.elastic or DEFAULT
    if words[0].replace("-", "_") not in BUDGETS:
        words = ("params", *words)
    return words[0].replace("-", "_"), sweep.budgets_of(words, recipe.budgets, "elastic")


def compress(recipe: CompressRecipe, run: Run, teacher: Teacher, corpora: Corpora) -> dict[str, Any]:
    """Importance, sorted checkpoint, nested sizes, their joint distillation, judgement of each, page."""
    name, budgets = budgets_of(recipe)
    times = timing.table_for(next(iter(budgets.values())), teacher, run.path)
    budgets = _largest_first(name, budgets, teacher, times)
    length, seed = recipe.fit.sequence_length, recipe.common.seed
    measuring = training_loader(corpora, recipe.text, length, recipe.fit.micro_batch_rows, seed)
    training = training_loader(corpora, recipe.text, length, recipe.fit.batch_size, seed)
    given = Given(
        recipe, run.path, run.path, teacher, Importance("none", {}), measuring, training, Tutor(teacher), times
    )
    each = {value: dataclasses.replace(recipe, budgets=own) for value, own in budgets.items()}
    for one in each.values():
        searching.check_unmeasured(dataclasses.replace(given, recipe=one))
    importance, shortage = scoring.given_or_measured(recipe, run.path, teacher, measuring)

    certificate = students.prune(run.path / SORTED, teacher, sort_plan(importance, teacher.digest, teacher.config))
    source = open_teacher(run.path / SORTED, recipe.common, recipe.text.data)
    elastic = elastic_of(importance, teacher.config, recipe.norm_correction)
    elastic, remarks = _nest(elastic, dataclasses.replace(given, teacher=source), name, each)
    elastic.save(source.checkpoint.path)

    setting = Setting(recipe, run, teacher, source, elastic, corpora, training)
    trained = _train(setting)
    rows = _judge(setting, trained)
    write_card(run.checkpoint_dir, rows=rows, judged_on=corpora.held_out_is)
    arms.write_table(run.path, rows, {WHOLE: "whole, sorted and distilled"}, seed, corpora.held_out_is)
    smallest = rows[value_of(elastic.nested[-1])]
    return {
        "teacher": rows["teacher"],
        "student": smallest,
        "parameters_ratio": smallest["parameters"] / rows["teacher"]["parameters"],
        "whole": rows[WHOLE],
        "nested": [
            {"budget": one.budget, "sizes": one.sizes.to_json(), **rows[value_of(one)]} for one in elastic.nested
        ],
        "pattern": teacher.config.pattern(),
        "verified": None if certificate is None else certificate["passed"],
        "held_out": corpora.held_out_is,
        "remark": joined(shortage, *remarks),
        "report": str(build_report([run.path], run.path / "report.html")),
        "path": str(run.checkpoint_dir),
    }


def _nest(
    elastic: Elastic, given: Given, name: str, each: Mapping[str, CompressRecipe]
) -> tuple[Elastic, list[str | None]]:
    """With a size for each recipe's budgets, which come largest first, each within the one before; and remarks."""
    config, digest = given.teacher.config, given.teacher.digest
    given = dataclasses.replace(given, importance=elastic.ranking(config, digest))
    nested, remarks = list[NestedSize](), list[str | None]()
    for value, recipe in each.items():
        most = nested[-1].sizes if nested else Sizes()
        place = given.shared / NESTED / value
        found = searching.search(dataclasses.replace(given, recipe=recipe, place=place, most=most))
        nested.append(NestedSize(f"{name} {value}", found.chosen.sizes))
        remarks.append(found.remark and f"{value}: {found.remark}")
    return dataclasses.replace(elastic, nested=tuple(nested)), remarks


def _largest_first(
    name: str, budgets: Mapping[str, Budgets], teacher: Teacher, times: CostTable | None
) -> dict[str, Budgets]:
    """By the ceiling of the budget they differ in; raises RecipeError for one that the teacher itself is below."""
    cost = "latency" if name == "throughput" else name
    ceilings = {value: budget_of(own, teacher.config, times) for value, own in budgets.items()}
    for value, budget in ceilings.items():
        if costs(teacher.config, budget)[cost] <= budget.ceilings[cost]:
            better = "above its own, such as 130% 160%" if name == "throughput" else "below it, such as 75% 50%"
            raise RecipeError(
                f"elastic has {name} {value}, and the model itself is within it; the whole is always trained, so give "
                f"budgets {better}"
            )
    return {value: budgets[value] for value in sorted(budgets, key=lambda v: -ceilings[v].ceilings[cost])}


# ---- training and judging


def _train(setting: Setting) -> dict[str, Any]:
    """Train the sorted weights into the run's checkpoint; training.json is written last and says that it is done."""
    recipe, run, source = setting.recipe, setting.run, setting.source
    summary = run.path / "training.json"
    if summary.exists():
        return read_json(summary)
    model = source.load()
    whole: Callable[[HybridModel], Any] = lambda model: model
    slices = {value: Slice(plan) for value, plan in setting.plans(source.checkpoint).items()}
    parts: dict[str, Callable[[HybridModel], Any]] = {WHOLE: whole, **slices}
    rows, dtype = recipe.fit.batch_size, resolve_dtype(source.dtype, source.device)
    held_out = held_out_batches(setting.corpora.held_out, recipe.fit, recipe.tokens)

    def judged(model: Any) -> dict[str, float]:
        found = {
            value: mean_loss(part(model), NextToken(), held_out, source.device, dtype) for value, part in parts.items()
        }
        return {"loss" if value == WHOLE else f"loss_{value}": numbers["loss"] for value, numbers in found.items()}

    done = fit(
        model,
        Nested(teaching.objective_of(setting.teacher, recipe.loss_settings), parts),
        lambda step: deal(setting.loader.batch(step), (step * mesh.world_size() + mesh.rank()) * rows, len(parts)),
        recipe.fit,
        tokens=recipe.tokens,
        directory=run.path / "training",
        log=teaching.named_by(recipe.loss_settings, lambda row: run.log({"phase": "train", "arm": "elastic", **row})),
        held_out=judged if held_out else None,
        device=source.device,
        dtype=source.dtype,
        seed=source.seed,
    )
    step = lineage_step(
        "distill", {"teacher": setting.teacher.digest}, tokens=done["tokens"], loss=done["loss"], sizes=len(parts)
    )
    students.save_trained(run.checkpoint_dir, model, source.checkpoint.path, step, source.checkpoint.lineage)
    setting.elastic.save(run.checkpoint_dir)
    trained = {"tokens_trained": done["tokens"], "seconds": done["tokens"] / max(done["tokens_per_second"], 1e-9)}
    write_json(summary, trained)
    return trained


def _judge(setting: Setting, trained: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The teacher, the trained whole, and each nested size as `prune` writes it; rows are kept as scores.json too."""
    recipe, run, cut = setting.recipe, setting.run, setting.source.checkpoint
    final = Checkpoint.open(run.checkpoint_dir)
    file = run.path / "scores.json"
    rows: dict[str, dict[str, Any]] = read_json(file) if file.exists() else {}

    def judge(model: HybridModel) -> dict[str, Any]:
        return students.judge(model, setting.corpora, setting.teacher, recipe.eval_tokens, recipe.eval_context)

    if "teacher" not in rows:
        rows["teacher"] = judge(setting.teacher.load()) | {"tokens_trained": 0}
    before, after = setting.plans(cut), setting.plans(final)
    for value in (WHOLE, *after):
        if value in rows:
            continue
        if value == WHOLE:
            rows[value] = judge(load_model(final.path)) | trained
        else:
            as_cut = judge(_student(cut, before[value]))["loss"]
            rows[value] = judge(_student(final, after[value])) | trained | {"loss_as_cut": as_cut}
        run.save_json(file.name, rows)
    return rows


def _student(checkpoint: Checkpoint, plan: PruningPlan) -> HybridModel:
    """As cut from the stored weights and rounded as they are, to compute in float32."""
    return students.fill(plan.student, ((n, t.float()) for n, t in apply_plan(plan, checkpoint.tensors())))


# ---- cutting


def check_prune(recipe: PruneRecipe) -> None:
    """Raise RecipeError for what an elastic checkpoint says itself."""
    for name in ("importance", "plan"):
        if getattr(recipe, name) is not None:
            raise RecipeError(
                f"from_elastic and {name} were given; an elastic checkpoint is sorted, which says what is kept: leave "
                "out one of both"
            )


def plan_to_prune(recipe: PruneRecipe, teacher: Teacher, place: Path) -> tuple[PruningPlan, str | None, float | None]:
    """The plan for sizes or under budgets, with a remark and the predicted latency; `teacher` is the elastic model.

    Under budgets a trained size that comes within 5 % of one is taken. Else the student is the likeliest of those that
    contain the largest trained size below the budgets and are contained in the one above.
    """
    elastic = Elastic.load(teacher.checkpoint.path, len(teacher.config.blocks))
    if recipe.norm_correction not in ("masked", elastic.norm_correction):
        raise RecipeError(
            f"norm_correction is {recipe.norm_correction} and the elastic checkpoint was trained with "
            f"{elastic.norm_correction}, which its students keep: leave it out"
        )
    sizes, remark, seconds = recipe.sizes, None, None
    if has_ceiling(recipe.budgets):
        table = timing.table_for(recipe.budgets, teacher, place)
        budget = budget_of(recipe.budgets, teacher.config, table)
        found = clock.in_time_first(
            clock.clock_of(recipe.budgets, table, teacher, place / clock.CLOCK),
            lambda pace: _within(budget.at_pace(pace), recipe, elastic, teacher),
            lambda one: elastic.plan_for(teacher.config, teacher.digest, with_dropped(one.sizes, recipe.sizes)).student,
        )
        best, remark = found.candidates[0], found.remark
        sizes, seconds = with_dropped(best.sizes, recipe.sizes), best.costs.get("latency")
    return elastic.plan_for(teacher.config, teacher.digest, sizes), remark, seconds


def _within(budget: Budget, recipe: PruneRecipe, elastic: Elastic, teacher: Teacher) -> Fitting:
    """The students that fit, the likeliest first; a trained size alone."""
    importance = elastic.ranking(teacher.config, teacher.digest)
    if recipe.sizes != Sizes():  # what is fixed need not be a trained size's
        return searching.candidates(teacher, importance, budget, recipe.sizes, recipe.space)
    trained = [NestedSize("", Sizes()), *elastic.nested]
    spent = [_costs(one.sizes, elastic, teacher, budget) for one in trained]
    ceilings = budget.ceilings
    fits = [all(cost[name] <= limit for name, limit in ceilings.items()) for cost in spent]
    largest = fits.index(True) if any(fits) else len(trained)
    if 0 < largest < len(trained):
        cost, one = spent[largest], trained[largest]
        if any(cost[name] >= WITHIN * limit for name, limit in ceilings.items()):
            return Fitting((Candidate(one.sizes, cost, 0.0),), len(trained), f"the size trained for {one.budget}")
    least = trained[largest].sizes if largest < len(trained) else None
    grid = between(choices, least, trained[max(0, largest - 1)].sizes, recipe.space)
    return searching.candidates(teacher, importance, budget, Sizes(), recipe.space, grid)


def _costs(sizes: Sizes, elastic: Elastic, teacher: Teacher, budget: Budget) -> dict[str, float]:
    """As the search counts them."""
    count = Costs(teacher.config, budget, elastic.drop_order or None)
    return count.all({**largest_sizes(teacher.config), **sizes.to_json()})
