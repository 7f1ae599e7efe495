"""Models trained and judged side by side: the student, and the controls that say what its steps are worth.

scratch        the student's shape from random weights, on the same text
group_blind    Mamba heads ranked without regard for their groups, distilled alike
random         indices kept at random, distilled alike
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from halflap.checkpoints.checkpoint import load_model
from halflap.checkpoints.config import lineage_step, read_json, read_lineage
from halflap.commands import shortlist, students, teaching
from halflap.commands.config_compress import CompressRecipe
from halflap.commands.corpora import Corpora, held_out_batches
from halflap.commands.sections import LossSettings
from halflap.commands.students import Teacher
from halflap.commands.teaching import Tutor
from halflap.compress.axes import Sizes
from halflap.compress.controls import blind_heads, blind_tensors
from halflap.compress.importance import Importance
from halflap.compress.kinds import block_sizes
from halflap.compress.metrics import collect
from halflap.compress.plan import PruningPlan
from halflap.compress.ranking import plan_by_block
from halflap.data.loader import Loader
from halflap.files import write_json
from halflap.models.model import HybridModel, initialize
from halflap.report.arms import Arm, Arms
from halflap.run import Run

TRAINING = "training.json"
SAID = ("teacher_logits", "block_map")
"""What the teacher's stored logits take and lose, and the teacher's blocks whose states are learned."""


@dataclass(frozen=True)
class Setting:
    """What all arms of a `compress` run share."""

    recipe: CompressRecipe
    run: Run
    teacher: Teacher
    plan: PruningPlan
    importance: Importance
    loader: Loader
    corpora: Corpora
    tutor: Tutor

    @property
    def pruned(self) -> Path:
        return self.run.path / "pruned"


def train_and_judge(setting: Setting) -> dict[str, dict[str, Any]]:
    """Train the student and the controls and judge all on the held-out text; rows by arm, kept as scores.json too.

    An arm whose row is there is passed over; one whose training was interrupted goes on.
    """
    rows = _read_rows(setting)
    for name in ("teacher", "pruned", "student", *setting.recipe.controls):
        if name not in rows:
            row = _arm(setting, name, rows)
            if row is None:
                continue
            rows[name] = row
            setting.run.save_json("scores.json", rows)
    write_table(setting.run.path, rows, NAMES, setting.teacher.seed, setting.corpora.held_out_is)
    return rows


# ---- arms


def _arm(setting: Setting, name: str, rows: Mapping[str, Mapping[str, Any]]) -> dict[str, Any] | None:
    """One row of the table, of which `rows` are there; None for a control that this student does not have."""
    judged = {"teacher": setting.tutor.teacher.checkpoint.path, "pruned": setting.pruned}
    if name in judged:
        return _judge(setting, load_model(judged[name], "float32")) | {"tokens_trained": 0}
    start = STARTS[name](setting)
    if start is None:
        return None
    as_cut = {}
    if name == "student":
        as_cut = {"loss_as_cut": rows["pruned"]["loss"]}
    elif name != "scratch":
        as_cut = {"loss_as_cut": _judge(setting, start)["loss"]}
    place = setting.run.path if name == "student" else setting.run.path / "arms" / name
    trained = _train(setting, name, start, place)
    return _judge(setting, load_model(place / "checkpoint", "float32")) | trained | as_cut


def _judge(setting: Setting, model: HybridModel) -> dict[str, Any]:
    recipe = setting.recipe
    return students.judge(model, setting.corpora, setting.teacher, recipe.eval_tokens, recipe.eval_context)


def _train(setting: Setting, name: str, start: HybridModel, place: Path) -> dict[str, Any]:
    """Train an arm into `place`/checkpoint; training.json is written last and says that it is done."""
    recipe, summary = setting.recipe, place / TRAINING
    if summary.exists():
        return {name: value for name, value in read_json(summary).items() if name != "said"}
    before = _short_tokens(setting) if name == "student" else 0
    tutor = setting.tutor
    done = teaching.distill_into(
        start,
        tutor.teacher,
        setting.loader,
        recipe.fit,
        tokens=max(1, recipe.tokens - before),
        directory=place / "training",
        loss=LossSettings(loss="next_token") if name == "scratch" else recipe.loss_settings,
        log=lambda row: setting.run.log({"phase": "train", "arm": name, **row}),
        held_out=held_out_batches(setting.corpora.held_out, recipe.fit, recipe.tokens),
        origin=tutor.origin_after(setting.plan),
    )
    numbers = {"tokens": done["tokens"] + before, "loss": done["loss"], "continues_short_distillation": bool(before)}
    if name == "scratch":
        students.save_trained(place / "checkpoint", start, setting.pruned, lineage_step("pretrain", {}, **numbers), [])
    else:
        step = lineage_step("distill", {"teacher": tutor.teacher.digest}, **numbers)
        students.save_trained(place / "checkpoint", start, setting.pruned, step)
    rate = done["tokens_per_second"]
    trained = {
        "tokens_trained": numbers["tokens"],
        "seconds": done["tokens"] / max(rate, 1e-9),
        "tokens_per_second": rate,
    }
    write_json(summary, trained | {"said": {name: done[name] for name in SAID if name in done}})
    return trained


def said(run: Path) -> dict[str, Any]:
    """What is to be said of the student's training beside its numbers, once it is done: see SAID."""
    return read_json(run / TRAINING).get("said", {})


def _short_tokens(setting: Setting) -> int:
    """Tokens of the short distillation that the student goes on from; 0 when there was none."""
    short = shortlist.winner(setting.run.path, setting.plan)
    return 0 if short is None else read_lineage(short)[-1]["tokens"]


def _start_student(setting: Setting) -> HybridModel:
    """The winner of a short distillation goes on from there; blocks that the search trained are taken as they are."""
    if short := shortlist.winner(setting.run.path, setting.plan):
        return load_model(short, "float32")
    return students.with_trained_blocks(load_model(setting.pruned, "float32"), setting.plan, setting.run.path)


def _start_scratch(setting: Setting) -> HybridModel:
    model = HybridModel(setting.plan.student)
    initialize(model, setting.teacher.seed)
    return model


def _start_group_blind(setting: Setting) -> HybridModel | None:
    """None when the student keeps all its Mamba heads: there is then nothing to be blind to."""
    heads = blind_heads(setting.plan, setting.importance)
    if not heads:
        return None
    tensors = blind_tensors(setting.plan, heads, setting.teacher.load().state_dict().items())
    return students.fill(setting.plan.student, tensors)


def _start_random(setting: Setting) -> HybridModel:
    """As many indices and the same blocks as the student, drawn at random."""
    teacher, plan = setting.teacher, setting.plan
    model = teacher.load()
    scores = collect(model, [], "random", teacher=teacher.digest, seed=teacher.seed + 1)
    correction = "masked" if plan.norm_correction == "calibrated" else plan.norm_correction
    drawn = plan_by_block(
        *(scores, teacher.digest, teacher.config, _sizes(plan), correction),
        hidden_size=plan.student.hidden_size,
        changes=plan.changes,
    )
    return students.build(model, drawn)


def _sizes(plan: PruningPlan) -> dict[int, Sizes]:
    """What the plan cuts each block to, before other changes."""
    cut = dataclasses.replace(plan, changes={}, norm_correction="none", dropped={}).student
    found = {}
    for index, block in zip(plan.keep_blocks, cut.blocks, strict=True):
        sizes: dict[str, Any] = block_sizes(block)
        found[index] = Sizes(**sizes)
    return found


STARTS: Mapping[str, Callable[[Setting], HybridModel | None]] = {
    "student": _start_student,
    "scratch": _start_scratch,
    "group_blind": _start_group_blind,
    "random": _start_random,
}


# ---- the table


def _read_rows(setting: Setting) -> dict[str, dict[str, Any]]:
    file = setting.run.path / "scores.json"
    return read_json(file) if file.exists() else {}


NAMES = {
    "teacher": "teacher",
    "pruned": "pruned only",
    "student": "pruned + distilled",
    "scratch": "same shape from scratch",
    "group_blind": "group-blind, distilled",
    "random": "random ranking, distilled",
}


def write_table(
    directory: Path,
    rows: Mapping[str, Mapping[str, Any]],
    names: Mapping[str, str],
    seed: int,
    judged_on: str,
) -> None:
    """Write arms.json for the report: judgements by arm, in words where `names` has them."""
    table = []
    for name, row in rows.items():
        table.append(
            Arm(
                name=names.get(name, name),
                parameters=row["parameters"],
                loss=row["loss"],
                loss_ci=tuple(row["loss_interval"]) if row["loss_interval"] else None,  # type: ignore[arg-type]
                bits_per_byte=row["bits_per_byte"],
                perplexity=row["perplexity"],
                tokens_trained=row["tokens_trained"],
                seconds=row.get("seconds"),
                loss_as_cut=row.get("loss_as_cut"),
                role=name if name in ("teacher", "pruned", "student") else "control",  # type: ignore[arg-type]
            )
        )
    resampled = next(iter(rows.values()))["resampled"]
    Arms(tuple(table), (seed,), judged_on, f"95 % bootstrap over {resampled}").save(directory / "arms.json")
