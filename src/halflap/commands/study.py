"""`study`: several arms under identical settings; one directory an arm and seed, one table, one page.

An arm is a shape trained from scratch (study_shapes.py), at equal parameters, or what `compress` makes of a teacher
(study_students.py). Every arm and seed reads the same tokens in the same order with the same tokenizer and schedule. A
pair of arm and seed that is done is passed over, an interrupted one goes on; one that was begun on other text or with
other settings is refused.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from halflap.checkpoints.config import find_directory, read_config
from halflap.commands import study_readings, study_students
from halflap.commands.config import StudyRecipe
from halflap.commands.corpora import Corpora, choose_tokenizer, open_corpora, training_loader
from halflap.commands.device import choose_device
from halflap.commands.students import open_teacher
from halflap.commands.study_file import Study, place_of, read_study
from halflap.commands.study_shapes import Task, is_finished, train_and_judge
from halflap.commands.study_table import Results, rows_of, write_arms
from halflap.data.tokenizer import Tokenizer
from halflap.errors import HalflapError
from halflap.evaluate.probes import probe_batch
from halflap.inference.generate import require_positions
from halflap.models.config import ModelConfig
from halflap.parallel import fanout
from halflap.report.page import build as build_report
from halflap.run import Run


def study(recipe: StudyRecipe, run: Run) -> dict[str, Any]:
    """Train and judge every arm with every seed, measure speed, and write the table, the readings and the page."""
    how = {"cluster": _cluster(recipe), "processes": recipe.workers}
    plan = plan_of(recipe)
    recipe = _with_text(recipe, plan)
    teacher, times = None, None
    if plan.teacher is None:
        results, judged_on = _shapes(recipe, run, plan, **how)
    else:
        tutor = open_teacher(_teacher(plan.teacher), recipe.common, recipe.text.data)
        corpora = _corpora(recipe, run, plan, tutor.tokenizer)
        results, judged_on = study_students.train(recipe, run, plan, tutor, corpora, **how), corpora.held_out_is
        teacher = study_students.judge_teacher(run, plan, tutor, corpora)
        times = study_students.cost_table(run, plan, tutor)
    rows = rows_of(run, plan, results, times)
    write_arms(run, plan, rows, judged_on, teacher)
    found = {
        "study": plan.name,
        "size": plan.size,
        "asks": plan.asks,
        "baseline": plan.baseline,
        "teacher": teacher,
        "arms": rows,
        **study_readings.read(plan, rows),
    }
    run.save_json("study.json", found)
    return found | {
        "tokens": plan.tokens,
        "seeds": list(plan.seeds),
        "held_out": judged_on,
        "report": str(build_report([run.path], run.path / "report.html")),
    }


def arms_of(recipe: StudyRecipe) -> tuple[Study, dict[str, ModelConfig]]:
    """The study, and every arm's shape, or of one that is cut from a teacher the teacher's; nothing is trained or read.

    Raises HalflapError for what `study` itself would refuse by then.
    """
    plan = plan_of(recipe)
    _with_text(recipe, plan)
    if plan.teacher is not None:
        return plan, dict.fromkeys(plan.arms, read_config(find_directory(_teacher(plan.teacher))))
    size = plan.vocab_size if recipe.tokenizer is None else Tokenizer.load(recipe.tokenizer).vocab_size
    models = plan.models(size)
    check_demands(plan, models)
    return plan, models


def plan_of(recipe: StudyRecipe) -> Study:
    """What the study's file says, with what the recipe says instead."""
    given = {
        "tokens": recipe.tokens,
        "seeds": recipe.seeds,
        "eval_tokens": recipe.eval_tokens,
        "teacher": recipe.teacher,
    }
    plan = read_study(recipe.study, recipe.size, **given)
    study_readings.check(plan)
    return plan


def _with_text(recipe: StudyRecipe, plan: Study) -> StudyRecipe:
    """The recipe with the study's text where it names none. Raises HalflapError when that is not there."""
    data, judged = recipe.text.data or plan.data, recipe.eval_data or plan.eval_data
    for name, paths in (("data", data), ("eval-data", judged)):
        if absent := [path for path in paths if not Path(path).exists()]:
            raise HalflapError(
                f"study {plan.name} reads {absent[0]!r}, which is not there; stand in the project's folder, or name "
                f"text with --{name}"
            )
    return dataclasses.replace(recipe, text=dataclasses.replace(recipe.text, data=data), eval_data=judged)


def _teacher(name: str) -> str:
    if not Path(name).is_dir():
        raise HalflapError(
            f"the study's teacher is {name!r}, which is no directory here; stand in the project's folder, or name one "
            "with --teacher"
        )
    return name


def _corpora(recipe: StudyRecipe, run: Run, plan: Study, tokenizer: Tokenizer) -> Corpora:
    corpora = open_corpora(recipe.text, tokenizer, run.path / "corpus", recipe.eval_data)
    if not corpora.held_out:
        raise HalflapError(f"there is no text to judge on ({corpora.held_out_is}); name some with --eval-data")
    training_loader(corpora, recipe.text, plan.fit.sequence_length, plan.fit.batch_size, 0)  # what is wrong, now
    return corpora


def _cluster(recipe: StudyRecipe) -> fanout.Cluster | None:
    if recipe.ray is None:
        choose_device(recipe.common.device)  # a device that is not here is refused before any work
        return None
    fanout.require_ray()
    return fanout.Cluster(recipe.ray, recipe.ray_cpus, int(recipe.common.device == "cuda"))


# ---- shapes from scratch


def _shapes(recipe: StudyRecipe, run: Run, plan: Study, **how: Any) -> tuple[Results, str]:
    """The results of shapes of equal size, with one tokenizer; and what they were judged on."""
    tokenizer = choose_tokenizer(recipe.tokenizer, recipe.text, run.path, plan.vocab_size)
    tokenizer.save(run.path / "tokenizer")
    models = plan.models(tokenizer.vocab_size)
    check_demands(plan, models)
    corpora = _corpora(recipe, run, plan, tokenizer)
    tasks = _tasks(recipe, run, plan, models, corpora)
    what = f"{len(models)} arms, {len(plan.seeds)} seeds"
    found = fanout.map(train_and_judge, tasks, what=what, finished=is_finished, **how)
    return {arm: found[place :: len(models)] for place, arm in enumerate(models)}, corpora.held_out_is


def check_demands(plan: Study, models: Mapping[str, ModelConfig]) -> None:
    """Raise HalflapError, before anything is trained, for a probe that cannot be or an arm with too few positions."""
    needed = {"fit.sequence_length": plan.fit.sequence_length}
    if (recall := plan.recall) is not None:
        probe_batch(recall.probe, 0, 0, recall.length, recall.vocab_size)
        needed["recall.length"] = recall.length
    if plan.speed is not None:
        needed["speed's longest prompt and output"] = max(plan.speed.prompt) + max(plan.speed.output)
    for arm, config in models.items():
        for name, length in needed.items():
            require_positions(config, length, f"arm {arm!r}: {name} needs")


def _tasks(
    recipe: StudyRecipe, run: Run, plan: Study, models: Mapping[str, ModelConfig], corpora: Corpora
) -> list[Task]:
    """One a seed and arm, seed by seed, with whole paths: they may be read from another directory."""
    train, held_out = (tuple(c.path.resolve() for c in group) for group in (corpora.train, corpora.held_out))
    text = tuple(corpus.manifest.digest for corpus in (*corpora.train, *corpora.held_out))
    place, tokenizer = run.path.resolve(), (run.path / "tokenizer").resolve()
    return [
        Task(
            arm, seed, config, place_of(place, arm, seed), tokenizer, train, held_out,
            text, recipe.text.weights, recipe.text.packing, plan.tokens, plan.eval_tokens, plan.fit, plan.recall,
            recipe.common.device, recipe.common.dtype, context=plan.fit.sequence_length,
        )
        for seed in plan.seeds
        for arm, config in models.items()
    ]  # fmt: skip
