"""From a teacher to a smaller model: score, search, prune, verify, distill, and `compress`, which does all of it.

Every step leaves a file in the run's directory and is passed over when that file is there, so an interrupted run
goes on where it stopped. What a step does stands in students.py; what controls there are, in arms.py.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import torch

from halflap.checkpoints.checkpoint import Checkpoint, load_model
from halflap.checkpoints.config import find_directory, lineage_step, read_config, read_json
from halflap.commands import arms, chain, elastic, memory, scoring, searching, students, sweep, teaching, timing
from halflap.commands.cards import CERTIFICATE, write_card
from halflap.commands.config_compress import (
    CompressRecipe,
    DistillRecipe,
    PruneRecipe,
    ScoreRecipe,
    SearchRecipe,
    VerifyRecipe,
)
from halflap.commands.corpora import Corpora, held_out_batches, open_corpora, training_loader
from halflap.commands.device import must_stream
from halflap.commands.given import Given, keeps_kinds, with_dropped
from halflap.commands.resolve import plan_of
from halflap.commands.sections import Budgets, ScoreSettings
from halflap.commands.students import Teacher, budget_of, has_ceiling, open_teacher
from halflap.commands.tables import joined
from halflap.commands.teaching import Origin, Tutor
from halflap.compress.axes import Sizes, check_sizes, largest_sizes
from halflap.compress.cost_table import CostTable
from halflap.compress.importance import Importance
from halflap.compress.local import with_trained
from halflap.compress.plan import PLAN, PruningPlan, plan_file
from halflap.compress.ranking import plan_for, ranks_blocks
from halflap.errors import HalflapError, RecipeError
from halflap.inference.generate import require_positions
from halflap.models.count import count_non_embedding_parameters, count_parameters
from halflap.parallel import mesh
from halflap.recipe import inputs_of, settings_of
from halflap.report.page import build as build_report
from halflap.run import Run, open_run


def score(recipe: ScoreRecipe, run: Run) -> dict[str, Any]:
    """Measure the importance of every axis on calibration text."""
    teacher = open_teacher(recipe.model, recipe.common, recipe.text.data)
    corpora = open_corpora(recipe.text, teacher.tokenizer, run.path / "corpus")
    loader = training_loader(corpora, recipe.text, recipe.sequence_length, recipe.batch_size, recipe.common.seed)
    dtype = "bfloat16" if recipe.common.dtype == "bfloat16" else "float32"
    streamed = must_stream(teacher.config, dtype, teacher.device, recipe.stream)
    found = scoring.importance(
        run.path, teacher, loader, recipe.tokens, recipe.settings, dtype=dtype, streamed=streamed
    )
    others = sorted(str(path) for path in run.path.glob("importance-*.safetensors"))
    sizes = largest_sizes(teacher.config)
    return {
        "axes": [{"axis": name, "size": size} for name, size in sizes.items() if name != "num_blocks"],
        "depth": {name: scores.tolist() for name, scores in found.depth.items()},
        "metric": found.metric,
        "ranks_blocks": ranks_blocks(found),
        "removed": list(found.removed),
        "tokens": found.tokens,
        "streamed": streamed,
        "path": str(run.path / scoring.IMPORTANCE),
        "others": others,
        "remark": scoring.shortage(found, loader, recipe.tokens),
    }


def search(recipe: SearchRecipe, run: Run) -> dict[str, Any]:
    """Rank the sizes that fit the budgets, and draw them on a page."""
    if recipe.importance is None:
        raise RecipeError(
            "no importance was given; measure it with `halflap score` and name its file with --importance"
        )
    teacher = open_teacher(recipe.model, recipe.common, recipe.text.data)
    swept = sweep.budgets_of(recipe.sweep, recipe.budgets)
    if not swept:
        _require_target(recipe.budgets, Sizes())
    importance = scoring.read_importance(recipe.importance, teacher)  # before text, which takes long, is read
    if not recipe.text.data and not swept and recipe.settings.method == "homogeneous":
        table = timing.table_for(recipe.budgets, teacher, run.path)
        return _shown(searching.without_text(recipe, run.path, teacher, importance, table).to_json(), teacher, run)
    corpora = open_corpora(recipe.text, teacher.tokenizer, run.path / "corpus")
    fit, seed = recipe.fit, recipe.common.seed
    loader = training_loader(corpora, recipe.text, fit.sequence_length, fit.micro_batch_rows, seed)
    training = training_loader(corpora, recipe.text, fit.sequence_length, fit.batch_size, seed)
    first = next(iter(swept.values()), recipe.budgets)
    table = timing.table_for(first, teacher, run.path)
    each = {}
    for value, budgets in (swept or {"": recipe.budgets}).items():
        place = sweep.place_of(run.path, value) if swept else run.path
        one = dataclasses.replace(recipe, budgets=budgets, sweep=())
        tutor = Tutor(teacher)
        each[value] = Given(one, place, run.path, teacher, importance, loader, training, tutor, table)
        searching.check(each[value])  # before any work
    found = {value: searching.search(given) for value, given in each.items()}
    if swept:
        ceilings = {value: budget_of(own, teacher.config, table).ceilings for value, own in swept.items()}
        order, tolerance = searching.METHODS[recipe.settings.method].order, recipe.settings.loss_tolerance
        result = sweep.combined(recipe.sweep[0], found, ceilings, order, run.path, tolerance)
    else:
        result = found[""].to_json()
    return _shown(result, teacher, run)


def _shown(result: dict[str, Any], teacher: Teacher, run: Run) -> dict[str, Any]:
    shown = {name: value for name, value in result.items() if name != "plan"}
    page = build_report([run.path], run.path / "report.html")
    return shown | {
        "pattern": teacher.config.pattern(),
        "path": str(run.path / searching.SEARCH),
        "report": str(page),
    }


def prune(recipe: PruneRecipe, run: Run) -> dict[str, Any]:
    """Write the student of a plan, of given sizes, or of the likeliest sizes under budgets."""
    directory = find_directory(recipe.model)
    teacher = open_teacher(directory, recipe.common)
    plan, remark, seconds = _plan_to_prune(recipe, teacher, run.path)
    searched = None if recipe.plan is None else sweep.blocks_beside(plan_file(recipe.plan))
    if searched is None:
        certificate = students.prune(run.checkpoint_dir, teacher, plan)
    else:
        certificate = students.prune(run.path / "pruned", teacher, plan)
        _write_trained(run.checkpoint_dir, run.path / "pruned", plan, searched, teacher)
    student, whole = count_parameters(plan.student), count_parameters(teacher.config)
    return {
        "parameters": student,
        "non_embedding_parameters": count_non_embedding_parameters(plan.student),
        "ratio": student / whole,
        "pattern": plan.student.pattern(),
        "plan": str(run.checkpoint_dir / PLAN),
        "verified": None if certificate is None else certificate["passed"],
        **({} if seconds is None else {"predicted_seconds": seconds}),
        "remark": remark,
    }


def verify(recipe: VerifyRecipe, run: Run) -> dict[str, Any]:
    """Check that a pruned student is exactly its masked teacher, and leave the certificate beside it."""
    del run
    pruned = Path(recipe.student) / "pruned"
    directory = find_directory(pruned if pruned.is_dir() else recipe.student)
    if not (directory / PLAN).exists():
        raise HalflapError(f"{str(directory)!r} has no {PLAN}, so it is no pruned student; give one that is")
    plan = PruningPlan.load(directory / PLAN)
    teacher = Checkpoint.open(students.teacher_of(directory, recipe.teacher))
    must_stream(teacher.config, "float32", torch.device("cpu"), asked=True)
    certificate = students.certify(directory, teacher, plan, recipe.tokens, recipe.common.seed)
    return students.require_passed(certificate, directory)


def distill(recipe: DistillRecipe, run: Run) -> dict[str, Any]:
    """Train a student on its teacher's outputs."""
    directory = find_directory(recipe.student)
    teacher = open_teacher(students.teacher_of(directory, recipe.teacher), recipe.common, recipe.text.data)
    if recipe.teacher is None:
        students.check_unchanged(directory, teacher)
    memory.check_distill(recipe, run.path, teacher, read_config(directory))
    students.check_vocabulary(directory, teacher)
    corpora = open_corpora(recipe.text, teacher.tokenizer, run.path / "corpus", recipe.eval_data)
    phases = plan_of(recipe.loss_settings.phases, recipe.fit, len(corpora.train), mesh.world_size())
    loader = training_loader(
        corpora, recipe.text, recipe.fit.sequence_length, recipe.fit.batch_size, recipe.common.seed, phases
    )
    student = load_model(directory, "float32")
    result = teaching.distill_into(
        student,
        teacher,
        loader,
        recipe.fit,
        tokens=recipe.tokens,
        directory=run.path / "training",
        loss=recipe.loss_settings,
        log=lambda row: run.log({"phase": "distill", **row}),
        held_out=held_out_batches(corpora.held_out, recipe.fit, recipe.tokens),
        origin=_origin(directory, teacher),
        phases=phases,
    )
    if mesh.is_main():
        step = lineage_step("distill", {"teacher": teacher.digest}, tokens=result["tokens"], loss=result["loss"])
        students.save_trained(run.checkpoint_dir, student, directory, step)
        certificate = read_json(directory / CERTIFICATE) if (directory / CERTIFICATE).exists() else None
        write_card(run.checkpoint_dir, certificate=certificate, stored=result.get("teacher_logits"))
    return result | {"held_out": corpora.held_out_is, "parameters": count_parameters(student.config)}


def compress(recipe: CompressRecipe, run: Run, times: CostTable | None = None) -> dict[str, Any]:
    """Everything: the teacher corrected if asked, then in one or more steps what `_compress` does, and a page.

    With --elastic, in place of the steps, what `elastic.compress` does. `times` are those of the device that is meant
    where this process has but a share of it: they are taken as they are, and the student is not timed beside others.
    """
    if recipe.elastic is None:
        _require_target(recipe.budgets, recipe.sizes)
    else:
        elastic.check(recipe)
    if recipe.importance is not None and recipe.score_settings != ScoreSettings():
        raise RecipeError(
            "importance is a file, so nothing is measured, and settings of measuring were given; leave out one of both"
        )
    if recipe.importance is not None and recipe.loss_settings.teacher_correction:
        raise RecipeError(
            "importance is a file, which was measured on the teacher as it is, and teacher_correction trains it first; "
            "leave out one of both"
        )
    chain.check_steps(recipe)
    teacher = open_teacher(recipe.model, recipe.common, recipe.text.data)
    if recipe.importance is not None:
        scoring.read_importance(recipe.importance, teacher)  # before text and times, which take long
    check_sizes(teacher.config, recipe.sizes)
    memory.check_compress(recipe, run.path, teacher)
    if recipe.eval_context is not None:
        require_positions(teacher.config, recipe.eval_context, "a window that is judged takes")
    corpora = open_corpora(recipe.text, teacher.tokenizer, run.path / "corpus", recipe.eval_data)
    if not corpora.held_out:
        raise HalflapError(f"there is no text to judge on ({corpora.held_out_is}); name some with --eval-data")
    correction = None
    if recipe.loss_settings.teacher_correction:
        loader = training_loader(
            corpora, recipe.text, recipe.fit.sequence_length, recipe.fit.batch_size, recipe.common.seed
        )
        teacher, correction = teaching.corrected(recipe, run.path / "teacher", teacher, loader, run.log)
    corrected = {"teacher_correction": correction} if correction else {}
    if recipe.elastic is not None:
        return elastic.compress(recipe, run, teacher, corpora) | corrected
    table = times or timing.table_for(recipe.budgets, teacher, run.path)
    *before, last = chain.recipes_of_steps(recipe, teacher.config, run.path, table)
    tutor, source, steps = Tutor(teacher), teacher, []
    for step in before:
        step = dataclasses.replace(step, model=str(source.checkpoint.path))
        with open_run("compress", settings_of(step), inputs_of(step)) as inner:
            result = inner.result or inner.finish(
                _compress(step, inner, source, tutor, corpora, table, step.budgets if times is None else None)
            )
        steps.append({"path": str(inner.path), **{name: result[name] for name in ("parameters_ratio", "student")}})
        tutor = Tutor(teacher, tutor.origin_after(PruningPlan.load(inner.path / "pruned" / PLAN)))
        source = open_teacher(inner.checkpoint_dir, recipe.common, recipe.text.data)
    result = _compress(last, run, source, tutor, corpora, table, recipe.budgets if times is None else None)
    if steps:
        build_report([*(Path(step["path"]) for step in steps), run.path], Path(result["report"]))  # of the whole chain
        result["steps"] = steps
    return result | corrected


def _compress(
    recipe: CompressRecipe,
    run: Run,
    teacher: Teacher,
    tutor: Tutor,
    corpora: Corpora,
    times: CostTable | None,
    judged_by: Budgets | None,
) -> dict[str, Any]:
    """Importance, sizes, student, certificate, distillation, controls, judgement, page; `teacher` is what is cut.

    judged_by: the budgets that the student's time is held against, as they were asked; None where nothing is timed.
    """
    length, seed = recipe.fit.sequence_length, recipe.common.seed
    measuring = training_loader(corpora, recipe.text, length, recipe.fit.micro_batch_rows, seed)
    training = training_loader(corpora, recipe.text, length, recipe.fit.batch_size, seed)
    given = Given(recipe, run.path, run.path, teacher, Importance("none", {}), measuring, training, tutor, times)
    if has_ceiling(recipe.budgets):
        searching.check_unmeasured(given)
    importance, shortage = scoring.given_or_measured(recipe, run.path, teacher, measuring)
    chosen = _choose(dataclasses.replace(given, importance=importance, timed=judged_by is not None))
    certificate = students.prune(run.path / "pruned", teacher, chosen.plan)

    setting = arms.Setting(recipe, run, teacher, chosen.plan, importance, training, corpora, tutor)
    table = arms.train_and_judge(setting)
    latency = late = None
    if times is not None and judged_by is not None:
        file, shape = run.path / "latency.json", chosen.plan.student
        latency = timing.judge_latency(file, judged_by, times, tutor.teacher, shape, chosen.predicted)
        late = timing.excess(latency, judged_by, times, tutor.teacher.config)
    without = [name for name in recipe.controls if name not in table]
    left_out = f"{', '.join(without)} left out: the student keeps all its Mamba heads" if without else None
    said = arms.said(run.path)
    write_card(
        run.checkpoint_dir,
        certificate=certificate,
        rows=table,
        judged_on=corpora.held_out_is,
        latency=latency,
        stored=said.get("teacher_logits"),
    )
    return {
        "teacher": table["teacher"],
        "pruned": table["pruned"],
        "student": table["student"],
        "parameters_ratio": table["student"]["parameters"] / table["teacher"]["parameters"],
        "sizes": {name: value for name, value in vars(chosen.sizes).items() if value},
        "variants": list(chosen.variants),
        "pattern": teacher.config.pattern(),
        "verified": None if certificate is None else certificate["passed"],
        "latency": latency,
        "controls": [{"name": name, **table[name]} for name in recipe.controls if name in table],
        "held_out": corpora.held_out_is,
        **said,
        "remark": joined(shortage, chosen.remark, late, left_out),
        "report": str(build_report([run.path], run.path / "report.html")),
    }


# ---- steps


class _Chosen(NamedTuple):
    """What becomes of a teacher: as a plan, and as what a search says of it."""

    plan: PruningPlan
    sizes: Sizes
    variants: tuple[str, ...] = ()
    remark: str | None = None
    predicted: float | None = None
    """Seconds of a pass."""


def _choose(given: Given) -> _Chosen:
    """By a search where there is a budget, else the sizes that were given."""
    sizes, teacher = given.fixed, given.teacher
    if not has_ceiling(given.recipe.budgets):
        return _Chosen(
            plan_for(given.importance, teacher.digest, teacher.config, sizes, given.recipe.norm_correction), sizes
        )
    found = searching.search(given)
    best, plan = found.chosen, PruningPlan.from_json(found.plan or {})
    return _Chosen(plan, with_dropped(best.sizes, sizes), best.variants, found.remark, best.costs.get("latency"))


def _origin(student: Path, teacher: Teacher) -> Origin | None:
    """Where a student lies in its teacher, when it has the plan that cut it from this very shape."""
    if not (student / PLAN).exists():
        return None
    plan = PruningPlan.load(student / PLAN)
    return Origin.of(plan) if plan.teacher_config == teacher.config else None


def _require_target(budgets: Budgets, sizes: Sizes) -> None:
    if not has_ceiling(budgets) and sizes == Sizes():
        raise RecipeError(
            "nothing says how small the student shall be; give a budget (--params 50%, --memory 4GiB, ...) or sizes "
            "(--sizes.hidden-size 384, ...)"
        )


def _plan_to_prune(recipe: PruneRecipe, teacher: Teacher, place: Path) -> tuple[PruningPlan, str | None, float | None]:
    """From a plan, which a search leaves too, from sizes, or from budgets; with a remark and the predicted latency."""
    sizes = fixed = recipe.sizes
    file = Path(recipe.importance) if recipe.importance is not None else None
    if recipe.from_elastic:
        elastic.check_prune(recipe)
        _require_target(recipe.budgets, sizes)
        return elastic.plan_to_prune(recipe, teacher, place)
    if recipe.plan is not None:
        if has_ceiling(recipe.budgets) or sizes != Sizes():
            raise RecipeError(
                "a plan and a budget or sizes were given; the plan says what is kept: leave out the others"
            )
        others = (recipe.importance, recipe.space, recipe.norm_correction)
        if others != (PruneRecipe.importance, PruneRecipe.space, PruneRecipe.norm_correction):
            raise RecipeError(
                "a plan was given, and importance, space or norm_correction, which it has settled: leave out the others"
            )
        plan = PruningPlan.load(recipe.plan)
        plan.check_teacher(teacher.digest, teacher.config)
        return plan, None, None
    _require_target(recipe.budgets, sizes)
    only_drops = sizes == Sizes(drop_blocks=sizes.drop_blocks) and not has_ceiling(recipe.budgets)
    if file is None and not only_drops:
        raise RecipeError(
            "no importance was given; measure it with `halflap score` and name its file with --importance"
        )
    importance = Importance("none", {}) if file is None else scoring.read_importance(file, teacher)
    remark = seconds = None
    if has_ceiling(recipe.budgets):
        table = timing.table_for(recipe.budgets, teacher, place)
        found = searching.unmeasured(recipe.budgets, table, teacher, importance, fixed, recipe.space, place)
        best, remark = found.candidates[0], found.remark
        sizes, seconds = with_dropped(best.sizes, fixed), best.costs.get("latency")
    correction, keep_kinds = recipe.norm_correction, keeps_kinds(fixed)
    plan = plan_for(importance, teacher.digest, teacher.config, sizes, correction, keep_kinds)
    return plan, remark, seconds


def _write_trained(directory: Path, pruned: Path, plan: PruningPlan, searched: Path, teacher: Teacher) -> None:
    """The student with the blocks that the search has trained; `pruned` is it as cut. A block at a time."""
    tensors = with_trained(searched / students.BLOCKS, plan, Checkpoint.open(pruned).tensors())
    step = lineage_step("distill_blocks", {"teacher": teacher.digest, "plan": plan.digest})
    students.write_trained(directory, plan.student, tensors, pruned, step)
