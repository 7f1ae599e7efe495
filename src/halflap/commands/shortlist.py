"""The best candidates of a search distilled for a while on the same batches, in rounds; the winner's weights stay.

All are in memory together and the teacher reads a batch once for all of them, or, where they do not fit, one after the
other on the teacher's largest logits, which are stored once. Which of the two is decided when a search begins and kept
in `shortlist/taught.json`, so that one that goes on elsewhere still ends the same. A candidate's training stays in
`shortlist/PLAN/training` from round to round; in the end only the winner's `checkpoint` is left.
"""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from halflap.checkpoints.config import lineage_step, read_json
from halflap.commands import students
from halflap.commands.memory import IN_TRAINING, LOGITS
from halflap.commands.sections import LossSettings
from halflap.commands.students import Teacher
from halflap.commands.teaching import Pupil, Tutor, distill_into, distill_together
from halflap.compress.plan import PruningPlan
from halflap.data.loader import Loader
from halflap.errors import HalflapError
from halflap.files import write_json
from halflap.models.count import count_parameters
from halflap.models.model import HybridModel
from halflap.train.config import Fit
from halflap.train.numerics import free_memory

SHARE_OF_MEMORY = 0.7
"""Of what is free; the rest is for activations."""
STORED_LOGITS = 64
"""The teacher's largest a token, where candidates share one pass of it and no number was given."""


class Shortlist(NamedTuple):
    """What all candidates share: the run's directory, that with trained blocks, the model they are cut from, who
    teaches, how, and on what.

    `tokens` is what the learning rate's schedule is over: those of a candidate that stays to the last round.
    """

    place: Path
    blocks: Path
    teacher: Teacher
    model: HybridModel
    tutor: Tutor
    loader: Loader
    fit: Fit
    loss: LossSettings
    tokens: int


def folder(place: Path, plan: PruningPlan) -> Path:
    """Where a candidate's training and, if it wins, its checkpoint lie in a run's directory."""
    return place / "shortlist" / plan.digest[:12]


def train(shared: Shortlist, plans: Sequence[PruningPlan], until: int) -> Iterator[tuple[HybridModel, dict[str, Any]]]:
    """Each candidate after `until` tokens of distillation in all, and what `fit` says; goes on from what was done."""
    _drop_trainings(shared, [folder(shared.place, plan) for plan in plans])
    pupils = (
        Pupil(
            students.with_trained_blocks(students.build(shared.model, plan), plan, shared.blocks),
            folder(shared.place, plan) / "training",
            shared.tutor.origin_after(plan),
        )
        for plan in plans
    )
    if _taught(shared, plans) == "in turn":
        yield from ((pupil.student, _train_alone(shared, pupil, until)) for pupil in pupils)
        return
    together = list(pupils)
    done = distill_together(
        together,
        shared.tutor.teacher,
        shared.loader,
        shared.fit,
        tokens=shared.tokens,
        until=until,
        loss=dataclasses.replace(shared.loss, top_k=0),
    )
    yield from ((pupil.student, result) for pupil, result in zip(together, done, strict=True))


def _train_alone(shared: Shortlist, pupil: Pupil, until: int) -> dict[str, Any]:
    """On the stored logits of a teacher, or on the text where there is none."""
    loss = shared.loss
    if loss.loss != "next_token":
        loss = dataclasses.replace(loss, top_k=loss.top_k or STORED_LOGITS, top_k_from="disk")
    return distill_into(
        pupil.student,
        shared.tutor.teacher,
        shared.loader,
        shared.fit,
        tokens=shared.tokens,
        until=until,
        directory=pupil.directory,
        loss=loss,
        log=lambda row: None,
        origin=pupil.origin,
        stored_in=shared.place / "shortlist" / LOGITS,
    )


def winner(place: Path, plan: PruningPlan) -> Path | None:
    """The checkpoint of a student that won a shortlist; None where there was none or it is not whole yet."""
    checkpoint = folder(place, plan) / "checkpoint"
    return checkpoint if students.is_whole(checkpoint) else None


def keep(shared: Shortlist, plan: PruningPlan, tokens: int) -> None:
    """Write the winner as it is after its `tokens`, for the long distillation to go on from; drop all trainings."""
    place = folder(shared.place, plan)
    if winner(shared.place, plan) is None:
        [(student, done)] = train(shared, [plan], tokens)
        cut = students.build(shared.model, plan).state_dict()
        students.write_student(place / "cut", shared.teacher, plan, iter(cut.items()))
        numbers = {"tokens": done["tokens"], "loss": done["loss"]}
        step = lineage_step("distill", {"teacher": shared.tutor.teacher.digest}, **numbers)
        students.save_trained(place / "checkpoint", student, place / "cut", step)
    _drop_trainings(shared, [])
    shutil.rmtree(shared.place / "shortlist" / LOGITS, ignore_errors=True)


def _drop_trainings(shared: Shortlist, but: Sequence[Path]) -> None:
    """Of candidates that are out."""
    for place in (shared.place / "shortlist").glob("*/training"):
        if place.parent not in but:
            shutil.rmtree(place, ignore_errors=True)
            with contextlib.suppress(OSError):  # the winner's folder is not empty
                place.parent.rmdir()


def _taught(shared: Shortlist, plans: Sequence[PruningPlan]) -> str:
    """Whether the candidates are taught "together" or "in turn", as was decided when the first round began."""
    file = shared.place / "shortlist" / "taught.json"
    if not file.exists():
        needed = IN_TRAINING * sum(count_parameters(plan.student) for plan in plans)
        free = free_memory(shared.teacher.device)
        how = "together" if needed <= SHARE_OF_MEMORY * free else "in turn"
        if how == "in turn":
            _check_storable(shared.loss, len(plans), needed, free)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, {"taught": how, "candidates": len(plans), "bytes_needed": needed, "bytes_free": free})
    return read_json(file)["taught"]


def _check_storable(loss: LossSettings, candidates: int, needed: int, free: int) -> None:
    if loss.loss == "next_token" or (loss.loss == "forward_kl" and loss.temperature == 1 and not loss.intermediate):
        return
    what = f"{loss.loss} at temperature {loss.temperature:g}{' with inner states' if loss.intermediate else ''}"
    raise HalflapError(
        f"{candidates} candidates need {needed:,} bytes to be distilled side by side and {free:,} are free; one after "
        f"another they learn from stored logits, which allow forward_kl at temperature 1 alone, and this is {what}: "
        "lower --refined, or choose that loss"
    )
