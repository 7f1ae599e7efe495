"""Arms of a study that are cut from a teacher: each arm and seed is a run of `compress`, in `arms/ARM/seed-N`.

What arms have in common is done once: the text as token shards in `corpus/`, scores of one metric and seed as a run of
`score` in `scores/`, the teacher's judgement in `teacher.json`, its largest logits by seed in `teacher-logits/` where
arms learn from those, and the times of its blocks in `costs.json` where an arm has a budget of time. Arms that lean on
another arm's student come after it: budgets that are what it has, and its shape from random weights.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from halflap.amounts import Amount
from halflap.checkpoints.config import read_config, read_json
from halflap.commands import compress as verbs
from halflap.commands import scoring, searching, students, timing
from halflap.commands.config import StudyRecipe
from halflap.commands.config_compress import CompressRecipe, ScoreRecipe
from halflap.commands.corpora import Corpora, training_loader
from halflap.commands.given import Given
from halflap.commands.memory import LOGITS
from halflap.commands.sections import ScoreSettings, Text
from halflap.commands.students import Teacher
from halflap.commands.study_compressions import Compression
from halflap.commands.study_file import Study, place_of
from halflap.commands.study_shapes import Task, is_finished, train_and_judge
from halflap.commands.teaching import Tutor
from halflap.compress.axes import check_sizes, largest_sizes
from halflap.compress.cost_model import Condition
from halflap.compress.cost_table import CostTable
from halflap.compress.importance import Importance
from halflap.errors import HalflapError
from halflap.models.config import ModelConfig
from halflap.models.count import count_parameters
from halflap.parallel import fanout
from halflap.recipe import inputs_of, settings_of
from halflap.run import Run, finished_result, open_run

NO_BLIND_CUT = (
    "it is the control {control} of {of!r}, whose students keep all their Mamba heads, so that there is no such "
    "control; leave the arm out, or cut heads"
)


@dataclass(frozen=True)
class Cut:
    """One arm and seed in plain values: it may go to another process. `match`: budgets and whose student sets them."""

    arm: str
    recipe: CompressRecipe
    match: Mapping[str, Path]
    teacher: Mapping[str, Any]
    """The teacher's judgement."""


def judge_teacher(run: Run, plan: Study, teacher: Teacher, corpora: Corpora) -> dict[str, Any]:
    """The row of the teacher in tables, measured once."""
    file = run.path / "teacher.json"
    if not file.exists():
        row = students.judge(teacher.load(), corpora, teacher, plan.eval_tokens, plan.fit.sequence_length)
        run.save_json(file.name, row | {"tokens_trained": 0})
    return read_json(file)


def cost_table(run: Run, plan: Study, teacher: Teacher) -> tuple[CostTable, Condition] | None:
    """The times of the teacher's blocks, where an arm needs them, and what they are times of."""
    needing = [arm.recipe.budgets for arm in plan.compressions.values() if arm.needs_times]
    if not needing:
        return None
    one = needing[0]
    table = timing.table_for(dataclasses.replace(one, latency=Amount(1.0, "seconds", share=True)), teacher, run.path)
    assert table is not None
    return table, Condition(one.phase, one.context, one.batch)


def train(
    recipe: StudyRecipe, run: Run, plan: Study, teacher: Teacher, corpora: Corpora, **how: Any
) -> dict[str, list[dict[str, Any]]]:
    """The results of every arm, one a seed. `how`: processes and cluster of parallel.fanout."""
    arms = plan.compressions
    for name, arm in arms.items():
        with _named(name):
            check_sizes(teacher.config, arm.recipe.sizes)
            scoring.check_settings(teacher.config, arm.recipe.score_settings)
            _check_control(plan, arm, teacher.config)
    judged = judge_teacher(run, plan, teacher, corpora)
    times = cost_table(run, plan, teacher)
    pairs = [(seed, name) for seed in plan.seeds for name in arms]
    cuts = {
        (seed, name): Cut(
            name,
            _recipe(recipe, run, plan, teacher, corpora, name, seed),
            {budget: place_of(run.path, other, seed).resolve() for budget, other in arms[name].match.items()},
            judged,
        )
        for seed, name in pairs
        if arms[name].control is None
    }

    for (seed, _), cut in cuts.items():
        if seed == plan.seeds[0] and not cut.match and students.has_ceiling(cut.recipe.budgets):
            with _named(cut.arm):
                _check_reachable(cut.recipe, run, teacher, corpora, times[0] if times else None)

    def each(
        function: Callable[[Any], Any], items: Sequence[Any], words: str, finished: Callable[[Any], bool]
    ) -> list[Any]:
        return fanout.map(function, items, what=f"{len(items)} {words}", finished=finished, **how) if items else []

    scores = {one.common.out: one for cut in cuts.values() if (one := scoring_of(run, cut.recipe)) is not None}
    each(measure, [*scores.values()], "scores of importance", _is_finished)
    cuts = {pair: _with_scores(run, cut) for pair, cut in cuts.items()}
    each(cut_and_judge, [cut for cut in cuts.values() if not cut.match], "students", _is_cut)
    each(cut_and_judge, [cut for cut in cuts.values() if cut.match], "students like others", _is_cut)
    fresh = [(seed, name) for seed, name in pairs if arms[name].control == "scratch"]
    tasks = [_from_scratch(recipe, run, plan, teacher, corpora, name, seed) for seed, name in fresh]
    trained = dict(zip(fresh, each(train_and_judge, tasks, "from scratch", is_finished), strict=True))
    return {
        name: [trained.get((seed, name)) or _result(run, arm, name, seed) for seed in plan.seeds]
        for name, arm in arms.items()
    }


@contextmanager
def _named(arm: str) -> Iterator[None]:
    """Errors say whose they are."""
    try:
        yield
    except HalflapError as error:
        raise HalflapError(f"arm {arm!r}: {error}") from None


def _check_control(plan: Study, arm: Compression, teacher: ModelConfig) -> None:
    """Raise HalflapError for blind cuts of heads beside an arm that, by its sizes, cuts none."""
    if arm.control != "group_blind":
        return
    of = plan.compressions[str(arm.of)]
    kept = of.recipe.sizes.mamba_num_heads in (None, largest_sizes(teacher).get("mamba_num_heads"))
    if kept and not of.match and not students.has_ceiling(of.recipe.budgets):
        raise HalflapError(NO_BLIND_CUT.format(control=arm.control, of=arm.of))


def _check_reachable(
    recipe: CompressRecipe, run: Run, teacher: Teacher, corpora: Corpora, times: CostTable | None
) -> None:
    """Raise HalflapError for budgets that no student of that arm can meet: before others are trained."""
    if recipe.loss_settings.steps > 1:
        return
    loader = training_loader(
        corpora, recipe.text, recipe.fit.sequence_length, recipe.fit.batch_size, recipe.common.seed
    )
    none, tutor = Importance("none", {}), Tutor(teacher)
    searching.check_unmeasured(Given(recipe, run.path, run.path, teacher, none, loader, loader, tutor, times))


# ---- recipes


def _recipe(
    given: StudyRecipe, run: Run, plan: Study, teacher: Teacher, corpora: Corpora, name: str, seed: int
) -> CompressRecipe:
    """The arm's, with what all arms share."""
    arm = plan.compressions[name]
    recipe, out = arm.recipe, place_of(run.path, name, seed)
    train, held_out = (
        tuple(str(corpus.path.resolve()) for corpus in group) for group in (corpora.train, corpora.held_out)
    )
    beside = [one.control for one in plan.compressions.values() if one.of == name and one.control != "scratch"]
    loss, fit = recipe.loss_settings, recipe.fit
    same = f"seed-{seed}-top-{loss.top_k}-of-{fit.batch_size}x{fit.sequence_length}"
    logits = str((run.path / LOGITS / same).resolve()) if loss.top_k and not loss.teacher_correction else None
    costs = str((run.path / timing.COSTS).resolve()) if arm.needs_times else None
    return dataclasses.replace(
        recipe,
        model=str(teacher.checkpoint.path.resolve()),
        text=Text(data=train, weights=given.text.weights, packing=given.text.packing),
        eval_data=held_out,
        eval_context=plan.fit.sequence_length,
        controls=tuple(dict.fromkeys(beside)),
        budgets=dataclasses.replace(recipe.budgets, costs=costs),
        loss_settings=dataclasses.replace(loss, top_k_in=logits),
        common=dataclasses.replace(given.common, out=str(out.resolve()), seed=seed, json=False, overwrite=False),
    )


def scoring_of(run: Run, recipe: CompressRecipe) -> ScoreRecipe | None:
    """What measures an arm's importance; None where the arm does that itself: for each step, or a corrected teacher."""
    if recipe.loss_settings.steps > 1 or recipe.loss_settings.teacher_correction:
        return None
    found = ScoreRecipe(
        model=recipe.model,
        text=recipe.text,
        tokens=recipe.calibration_tokens,
        settings=recipe.score_settings,
        sequence_length=recipe.fit.sequence_length,
        batch_size=recipe.fit.micro_batch_rows,
        common=dataclasses.replace(recipe.common, out=None),
    )
    digest = hashlib.sha256(json.dumps(settings_of(found)).encode()).hexdigest()[:10]
    out = run.path.resolve() / "scores" / f"{recipe.score_settings.metric}-seed-{recipe.common.seed}-{digest}"
    return dataclasses.replace(found, common=dataclasses.replace(found.common, out=str(out)))


def _with_scores(run: Run, cut: Cut) -> Cut:
    scored = scoring_of(run, cut.recipe)
    if scored is None:
        return cut
    file = str(Path(str(scored.common.out)) / scoring.IMPORTANCE)
    return dataclasses.replace(
        cut, recipe=dataclasses.replace(cut.recipe, importance=file, score_settings=ScoreSettings())
    )


def _matched(cut: Cut, times: CostTable | None) -> CompressRecipe:
    """The recipe, with budgets that are what another arm's student has."""
    budgets = cut.recipe.budgets
    for name, place in cut.match.items():
        student = read_config(place)
        if name == "params":
            amount = Amount(count_parameters(student))
        else:
            assert times is not None
            condition = Condition(budgets.phase, budgets.context, budgets.batch)
            amount = Amount(times.seconds(student, condition), "seconds")
        budgets = dataclasses.replace(budgets, **{name: amount})
    return dataclasses.replace(cut.recipe, budgets=budgets)


# ---- work


def _is_finished(recipe: ScoreRecipe | CompressRecipe) -> bool:
    return finished_result(Path(str(recipe.common.out))) is not None


def _is_cut(cut: Cut) -> bool:
    return _is_finished(cut.recipe)


def measure(recipe: ScoreRecipe) -> None:
    with open_run("score", settings_of(recipe), inputs_of(recipe)) as run:
        if run.result is None:
            run.finish(verbs.score(recipe, run))


def cut_and_judge(cut: Cut) -> None:
    """A run of `compress` that finds the teacher judged; one that is finished is passed over, another's is refused."""
    with _named(cut.arm):
        _cut_and_judge(cut)


def _cut_and_judge(cut: Cut) -> None:
    costs = cut.recipe.budgets.costs  # measured by the study, which shares the device out among its workers
    times = None if costs is None else CostTable.load(costs)
    recipe = _matched(cut, times)
    with open_run("compress", settings_of(recipe), inputs_of(recipe)) as run:
        if run.result is None:
            if not recipe.loss_settings.teacher_correction and not (run.path / "scores.json").exists():
                run.save_json("scores.json", {"teacher": cut.teacher})
            run.finish(verbs.compress(recipe, run, times))
    for place in run.path.glob("**/training"):  # states to go on from, which a finished run is not
        shutil.rmtree(place)


def _from_scratch(
    given: StudyRecipe, run: Run, plan: Study, teacher: Teacher, corpora: Corpora, name: str, seed: int
) -> Task:
    arm = plan.compressions[name]
    train, held_out = (tuple(corpus.path.resolve() for corpus in group) for group in (corpora.train, corpora.held_out))
    return Task(
        arm=name,
        seed=seed,
        config=read_config(place_of(run.path, str(arm.of), seed)),
        place=place_of(run.path, name, seed).resolve(),
        tokenizer=teacher.tokenizer_place.resolve(),
        train=train,
        held_out=held_out,
        text=tuple(corpus.manifest.digest for corpus in (*corpora.train, *corpora.held_out)),
        weights=given.text.weights,
        packing=given.text.packing,
        tokens=arm.recipe.tokens,
        eval_tokens=plan.eval_tokens,
        fit=arm.recipe.fit,
        recall=None,
        device=given.common.device,
        dtype=given.common.dtype,
        context=plan.fit.sequence_length,
        followed=True,
    )


def _result(run: Run, arm: Compression, name: str, seed: int) -> dict[str, Any]:
    """What tables need of a student, or of a control that was trained beside one."""
    place = place_of(run.path, arm.of or name, seed)
    found = read_json(place / "status.json")["result"]
    role, checkpoint = arm.control or "student", place / "checkpoint"
    row, tokens = found["student"], sum(step["student"]["tokens_trained"] for step in found.get("steps", ()))
    if arm.control is not None:
        row = next((one for one in found["controls"] if one["name"] == role), None)
        checkpoint, tokens = place / "arms" / role / "checkpoint", 0
        if row is None:
            raise HalflapError(f"arm {name!r}: {NO_BLIND_CUT.format(control=role, of=arm.of)}")
    return {
        **row,
        "tokens_trained": row["tokens_trained"] + tokens,
        "training_tokens_per_second": row["tokens_per_second"],
        "run": str(place),
        "role": role,
        "checkpoint": str(checkpoint),
    }
