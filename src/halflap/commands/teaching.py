"""Training a student on its teacher: whose outputs, by which losses, on which batches; and correcting a teacher first.

A student that was cut in several steps is taught by the first teacher, which is better than any of its students;
`Origin` says where the student's blocks and channels lie in it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from halflap.checkpoints.config import lineage_step, read_json
from halflap.commands import students
from halflap.commands.config_compress import CompressRecipe
from halflap.commands.memory import LOGITS
from halflap.commands.sections import LossSettings
from halflap.commands.students import Teacher, open_teacher
from halflap.compress.plan import PruningPlan
from halflap.data.batch import Batch
from halflap.data.loader import Loader
from halflap.files import write_json
from halflap.models.config import ModelConfig
from halflap.models.model import HybridModel
from halflap.train.config import Fit
from halflap.train.fit import Trainee, fit, fit_together
from halflap.train.losses import Objective
from halflap.train.objectives.distillation import Distillation, TopKDistillation
from halflap.train.objectives.intermediate import InnerStates, WithProjections, pair_states, proportional_map
from halflap.train.objectives.language import NextToken
from halflap.train.phases import Plan
from halflap.train.teacher_logits import TopKTeacher, find_stored, store_teacher_logits


@dataclass(frozen=True)
class Origin:
    """The teacher's block of each of a student's, the teacher's channel of each of its residual stream's, and by what
    the correction of norms multiplied that stream."""

    blocks: tuple[int, ...]
    hidden: tuple[int, ...]
    scale: float = 1.0

    @staticmethod
    def of(plan: PruningPlan) -> Origin:
        kept: Any = plan.keep.get("hidden", range(plan.teacher_config.hidden_size))
        return Origin(plan.keep_blocks, tuple(kept), plan.scales.get("embedding.weight", (1.0,))[0])

    def then(self, later: Origin) -> Origin:
        """Of a student of this one, whose own origin in this one is `later`."""
        blocks = tuple(self.blocks[index] for index in later.blocks)
        return Origin(blocks, tuple(self.hidden[index] for index in later.hidden), self.scale * later.scale)


@dataclass(frozen=True)
class Tutor:
    """Who teaches, and where what is being cut lies in it: None when the teacher itself is cut."""

    teacher: Teacher
    origin: Origin | None = None

    def origin_after(self, plan: PruningPlan) -> Origin:
        cut = Origin.of(plan)
        return cut if self.origin is None else self.origin.then(cut)


@dataclass(frozen=True)
class Lesson:
    """What `fit` trains, by which objective, on which batches; and what is to be said of it beside the result."""

    model: Any
    objective: Any
    batches: Callable[[int], Any]
    said: dict[str, Any] = field(default_factory=dict)


def distill_into(
    student: HybridModel,
    teacher: Teacher,
    loader: Loader,
    settings: Fit,
    *,
    tokens: int,
    directory: Path,
    loss: LossSettings,
    log: Callable[[dict[str, Any]], None],
    held_out: Sequence[Batch] = (),
    origin: Origin | None = None,
    phases: Plan | None = None,
    until: int | None = None,
    stored_in: Path | None = None,
) -> dict[str, Any]:
    """Train the student in place, on its teacher's outputs or on the text itself; goes on from a saved state.

    Outputs that are stored go to `stored_in`, by default where `loss` says or beside `directory`; `until` stops before
    the schedule's end.
    Returns what `fit` does and, where there are such, what the stored teacher costs and the map of blocks.
    """
    batches: Callable[[int], Any] = (
        loader.batch if phases is None else lambda step: loader.rows_from(*phases.rows(step))
    )
    if loss.loss != "next_token" and loss.top_k and loss.top_k_from == "disk":
        count = _steps(batches, until or tokens, loader.world) if phases is None else phases.steps
        place = stored_in or Path(loss.top_k_in or directory.parent / LOGITS)
        lesson = _stored(student, teacher, batches, count, loss, place)
    else:
        model = None if loss.loss == "next_token" else teacher.load(teacher.teaches_in)
        lesson = _lesson(student, teacher, model, batches, loss, origin)

    result = fit(
        lesson.model,
        lesson.objective,
        lesson.batches,
        settings,
        tokens=tokens if phases is None else phases.tokens,
        directory=directory,
        log=named_by(loss, log),
        held_out=held_out or None,
        device=teacher.device,
        dtype=teacher.dtype,
        seed=teacher.seed,
        plan=phases,
        until=until,
    )
    return result | lesson.said


def named_by(loss: LossSettings, log: Callable[[dict[str, Any]], None]) -> Callable[[dict[str, Any]], None]:
    """The log, in whose rows a divergence also stands under its own name, by which a report tells it from a loss."""

    def logged(row: dict[str, Any]) -> None:
        if loss.loss != "next_token" and "loss" in row:
            row = {**row, loss.loss: row.get(loss.loss, row.get("logits", row["loss"]))}
        log(row)

    return logged


def objective_of(teacher: Teacher, loss: LossSettings) -> Objective:
    """On what the teacher says while a student learns, inner states left out, or on the text itself."""
    return NextToken() if loss.loss == "next_token" else _distillation(teacher.load(teacher.teaches_in), loss)


class Pupil(NamedTuple):
    """One of several students that are taught together, its training's place, and where it lies in the teacher."""

    student: HybridModel
    directory: Path
    origin: Origin | None


def distill_together(
    pupils: Sequence[Pupil],
    teacher: Teacher,
    loader: Loader,
    settings: Fit,
    *,
    tokens: int,
    until: int,
    loss: LossSettings,
) -> list[dict[str, Any]]:
    """Train several students in place on the same batches; the teacher reads each of them once for all.

    Each ends as it would by `distill_into`, whose schedule is over `tokens` and which stops after `until`.
    Where inner states are learned the teacher runs for each student, as its states are handed over as they come.
    """
    model = None if loss.loss == "next_token" else teacher.load(teacher.teaches_in)
    shared = None if model is None or loss.intermediate else _distillation(model, loss, remember=True)
    trainees = []
    for student, directory, origin in pupils:
        if shared is not None:
            trainees.append(Trainee(student, shared, directory))
        else:
            lesson = _lesson(student, teacher, model, loader.batch, loss, origin)
            trainees.append(Trainee(lesson.model, lesson.objective, directory))
    return fit_together(
        trainees,
        loader.batch,
        settings,
        tokens=tokens,
        until=until,
        device=teacher.device,
        dtype=teacher.dtype,
        seed=teacher.seed,
    )


def _distillation(
    model: HybridModel, loss: LossSettings, inner: InnerStates | None = None, remember: bool = False
) -> Distillation:
    return Distillation(
        model,
        loss.temperature,
        loss.loss,
        skew_alpha=loss.skew_alpha,
        top_k=loss.top_k,
        tail=loss.top_k_tail,
        next_token_share=loss.next_token_share,
        inner=inner,
        inner_weight=loss.intermediate_weight,
        remember=remember,
    )


def _lesson(
    student: HybridModel,
    teacher: Teacher,
    model: HybridModel | None,
    batches: Callable[[int], Any],
    loss: LossSettings,
    origin: Origin | None,
) -> Lesson:
    """On what the teacher's `model` says while the student learns; without it on the text itself."""
    if model is None:
        return Lesson(student, NextToken(), batches)
    said: dict[str, Any] = {}
    inner = _inner_states(student.config, teacher, loss, origin, said)
    trained = inner is not None and any(True for _ in inner.parameters())
    objective = _distillation(model, loss, inner)
    return Lesson(WithProjections(student, inner) if trained and inner else student, objective, batches, said)


def _stored(
    student: HybridModel, teacher: Teacher, batches: Callable[[int], Any], steps: int, loss: LossSettings, place: Path
) -> Lesson:
    """On the teacher's largest logits, which are kept in `place`; it is loaded only if some are not there."""
    what: dict[str, Any] = {"k": loss.top_k, "digest": teacher.digest}
    stored = find_stored(place, batches, steps, vocab_size=teacher.config.vocab_size, **what)
    if stored is None:
        model, device = teacher.load(teacher.teaches_in), str(teacher.device)
        stored = store_teacher_logits(model, batches, steps, place, device=device, dtype=teacher.dtype, **what)
    objective = TopKDistillation(loss.top_k_tail, loss.next_token_share)
    said = {"teacher_logits": dataclasses.asdict(stored)}
    return Lesson(student, objective, TopKTeacher(place).batches(batches), said)


def _inner_states(
    student: ModelConfig, teacher: Teacher, loss: LossSettings, origin: Origin | None, said: dict[str, Any]
) -> InnerStates | None:
    """The losses on inner states; the map of blocks goes into `said`."""
    if not loss.intermediate:
        return None
    blocks = loss.block_map or (
        origin.blocks if origin else proportional_map(len(student.blocks), len(teacher.config.blocks))
    )
    pairs = pair_states(student, teacher.config, loss.intermediate, blocks, loss.intermediate_blocks)
    said["block_map"] = list(blocks)
    kept, scale = (origin.hidden, origin.scale) if origin else (None, 1.0)
    return InnerStates(student, teacher.config, pairs, loss.intermediate_loss, kept, scale, teacher.seed)


def _steps(batches: Callable[[int], Batch], tokens: int, world: int) -> int:
    """Steps until so many tokens with a target have been seen."""
    seen, step = 0.0, 0
    while seen < tokens:
        seen += float((batches(step).weights > 0).sum()) * world
        step += 1
    return step


def corrected(
    recipe: CompressRecipe, place: Path, teacher: Teacher, loader: Loader, log: Callable[..., None]
) -> tuple[Teacher, dict[str, Any]]:
    """The teacher after training on the text itself (Sreenivas et al. 2024), and of how many tokens to what loss.

    It is kept in `place`, whose summary is written last.
    Where the text is not what the teacher was trained on, its distribution is a poor guide there until it is corrected.
    """
    summary, checkpoint = place / "training.json", place / "checkpoint"
    if not summary.exists():
        model = teacher.load()
        done = distill_into(
            model,
            teacher,
            loader,
            recipe.fit,
            tokens=recipe.loss_settings.teacher_correction,
            directory=place / "training",
            loss=LossSettings(loss="next_token"),
            log=lambda row: log({"phase": "teacher_correction", **row}),
        )
        numbers = {"tokens": done["tokens"], "loss": done["loss"]}
        step = lineage_step("teacher_correction", {"teacher": teacher.digest}, **numbers)
        students.save_trained(checkpoint, model, teacher.checkpoint.path, step, teacher.checkpoint.lineage)
        write_json(summary, numbers)
    return open_teacher(checkpoint, recipe.common, recipe.text.data), read_json(summary)
