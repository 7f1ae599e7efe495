"""What distillation holds in memory at once, teachers as they are loaded and students in training, and whether it fits.

Counted from shapes alone, as a floor: activations and copies come on top, so what is refused could not have worked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from halflap.commands.config_compress import CompressRecipe, DistillRecipe
from halflap.commands.device import DTYPES
from halflap.commands.sections import LossSettings
from halflap.commands.students import Teacher
from halflap.compress.axes import Sizes, block_types, resize
from halflap.compress.costs import BUDGETS
from halflap.compress.grid import SearchSpace
from halflap.compress.space import WITHIN
from halflap.errors import HalflapError
from halflap.models.config import ModelConfig
from halflap.models.count import count_block_parameters, count_non_embedding_parameters, count_parameters
from halflap.train.numerics import free_memory
from halflap.train.teacher_logits import was_stored

IN_TRAINING = 16
"""Bytes of a parameter: weight, gradient and two moments in float32."""
LOGITS = "teacher-logits"
"""Folder of a run with its teacher's largest logits."""

Held = Mapping[str, int]
"""What is held at the same time, by what it is, in bytes."""


def distilling(teacher: int, student: int, width: int, loss: LossSettings, *, stored: bool = False) -> list[Held]:
    """What each stage of a distillation holds, of models of so many parameters.

    width: bytes that a parameter of the teacher takes when it is loaded to teach; stored: its logits are there already.
    """
    training, taught = {"the student in training": IN_TRAINING * student}, {_as(width): width * teacher}
    if loss.loss == "next_token":
        return [training]
    if loss.top_k and loss.top_k_from == "disk":
        return [training] if stored else [taught, training]
    return [taught | training]


def compressing(
    teacher: int, student: int, width: int, loss: LossSettings, corrected: bool = False, *, stored: bool = False
) -> list[Held]:
    """The same of `compress`: importance, candidates and the teacher's judgement come of the teacher in float32.

    corrected: the teacher is trained first.
    """
    training = [{"the teacher in training": IN_TRAINING * teacher}] if corrected else []
    return [{_as(4): 4 * teacher}, *training, *distilling(teacher, student, width, loss, stored=stored)]


def most(stages: Sequence[Held]) -> int:
    """Bytes of the stage that holds most."""
    return max(sum(stage.values()) for stage in stages)


def check_distill(recipe: DistillRecipe, run: Path, teacher: Teacher, student: ModelConfig) -> None:
    """Raise HalflapError when a teacher and its student in training do not fit in free memory together."""
    loss = recipe.loss_settings
    whole, own = count_parameters(teacher.config), count_parameters(student)
    stored = was_stored(loss.top_k_in or run / LOGITS)
    mend = "distil on a machine with more memory"
    if loss.loss != "next_token" and not loss.top_k and loss.top_k_from == "disk":
        mend += (
            ", or from the teacher's largest logits (--top-k 64), which are stored before the student is trained, or "
            "on another machine (--top-k-in DIR)"
        )
    _check("distill", distilling(whole, own, _width(teacher), loss, stored=stored), teacher.device, mend)


def check_compress(recipe: CompressRecipe, run: Path, teacher: Teacher) -> None:
    """Raise HalflapError when a teacher and the least student of a recipe do not fit in free memory together."""
    loss = recipe.loss_settings
    own = least_student(recipe, teacher.config)
    stages = compressing(
        count_parameters(teacher.config),
        own,
        _width(teacher),
        loss,
        bool(loss.teacher_correction),
        stored=was_stored(loss.top_k_in or run / LOGITS),
    )
    mend = (
        "take score, search, prune and verify, which read the weights a block at a time, and distil their student on a "
        "machine with more memory"
    )
    _check("compress", stages, teacher.device, mend)


def least_student(recipe: CompressRecipe, teacher: ModelConfig) -> int:
    """Parameters that the largest student which a recipe trains has at the least; 0 where only a search can tell."""
    whole = count_parameters(teacher)
    if recipe.elastic is not None:
        return whole
    counts = {"params": count_parameters, "non_embedding_params": count_non_embedding_parameters}
    given = [name for name in BUDGETS if getattr(recipe.budgets, name) is not None]
    if not given:
        return _least_of_sizes(recipe.sizes, teacher)
    alone = (recipe.sizes, recipe.space, recipe.settings.method == "puzzle") == (Sizes(), SearchSpace(), False)
    if len(given) > 1 or given[0] not in counts or not alone:
        return 0
    before = counts[given[0]](teacher)
    share = min(1.0, getattr(recipe.budgets, given[0]).of(before) / before)
    return int(WITHIN * before * share ** (1 / recipe.loss_settings.steps))


def _least_of_sizes(sizes: Sizes, teacher: ModelConfig) -> int:
    """As if the smallest blocks were those that stay, where it is not said which go."""
    blocks = len(teacher.blocks)
    kept = blocks - len(sizes.drop_blocks) if sizes.num_blocks is None else sizes.num_blocks
    for name, those in block_types(teacher).items():
        if name != "num_blocks" and getattr(sizes, name) is not None:
            kept -= len(those) - getattr(sizes, name)
    cut = resize(teacher, tuple(range(blocks)), sizes)
    each = count_block_parameters(cut)
    may_stay = sorted(count for index, count in enumerate(each) if index not in sizes.drop_blocks)
    return count_parameters(cut) - sum(each) + sum(may_stay[: max(0, kept)])


def _width(teacher: Teacher) -> int:
    return 2 if teacher.teaches_in == "bfloat16" else 4


def _as(width: int) -> str:
    return f"the teacher as {DTYPES[width]}"


def _check(verb: str, stages: Sequence[Held], device: torch.device, mend: str) -> None:
    free = free_memory(device)
    if (needed := most(stages)) <= free:
        return
    held = next(stage for stage in stages if sum(stage.values()) == needed)
    parts = " and ".join(f"{what} ({_size(size)})" for what, size in held.items() if size)
    where = "on the GPU" if device.type == "cuda" else "here"
    raise HalflapError(f"{verb} holds {parts} at once, and {_size(free)} of memory are free {where}: {mend}")


def _size(count: int) -> str:
    return f"{count / 2**30:,.1f} GiB"
