"""Certify that a student is its teacher with the cut indices masked.

Three statements, each checked by itself:
1. the stored tensors are, bit for bit, what the plan makes of the teacher;
2. in wide arithmetic, where storage rounds nothing, the logits of the cut teacher equal those of the masked teacher:
   for every axis alone, and for all of them together;
3. the stored student's logits equal the masked teacher's within the rounding of its dtype.

One block of the teacher is in memory at a time, so a model may be larger than memory. For the norm corrections `none`
and `calibrated` the masked teacher's norms divide by the kept channels (`masked.py`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from halflap.checkpoints.checkpoint import Checkpoint
from halflap.checkpoints.passes import Passes, carry, digest_of
from halflap.checkpoints.shelf import Held, Shelf, shelf_in
from halflap.checkpoints.streamed import StreamedModel
from halflap.compress.axes import AXES, axes_of, block_of, short_name
from halflap.compress.candidates import Source, part_of_student
from halflap.compress.correction import norms
from halflap.compress.kinds import Change
from halflap.compress.masked import mask_part
from halflap.compress.plan import Kept, PruningPlan, kept_count, kept_indices
from halflap.compress.prune import apply_plan
from halflap.errors import CheckFailed, HalflapError
from halflap.models.count import count_parameters
from halflap.ops import select

NO_CHANGES: Mapping[int, Change] = {}
WIDE_LIMIT = 300_000_000  # parameters up to which float64 is used

# Largest |difference of logits| / largest |logit| that counts as equal. Wide: only the order of sums differs, in some
# hundred operations of unit roundoff 1e-16 or 6e-8. Stored: gains, and with them whole channels, are rounded once to
# the stored dtype, and the errors of many blocks add up.
WIDE_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
STORED_TOLERANCE = {"float64": 1e-9, "float32": 1e-4, "float16": 2e-2, "bfloat16": 1e-1}


def verify(
    student: Checkpoint, teacher: Checkpoint, plan: PruningPlan, tokens: Tensor, scratch: Path | None = None
) -> dict[str, Any]:
    """The certificate of a student, on tokens (B, T) int64; `passed` only if everything holds.

    scratch: a directory where streams are kept between blocks, so that a killed comparison goes on.

    Raises HalflapError when plan, teacher and student do not belong together, or when the plan was edited or the
    student trained since.
    """
    _check_plan(student, teacher, plan)
    plan.check_teacher(teacher.digest, teacher.config)
    if student.config != plan.student:
        raise HalflapError(
            f"the student is a {student.config.pattern()} of width {student.config.hidden_size} and its plan makes a "
            f"{plan.student.pattern()} of width {plan.student.hidden_size}, or other norms; give this plan's student"
        )
    different = list(changed_tensors(student, apply_plan(plan, teacher.tensors())))
    if different:
        raise CheckFailed(
            f"{len(different)} of the student's tensors (first {different[0]}) are not what its plan makes of the "
            "teacher, so its weights were trained or changed after pruning; verify it as cut (`compress` keeps "
            "pruned/)",
            UNMEASURED
            | {"tensors_identical": False, "different_tensors": different, "plan": plan.digest}
            | {"teacher": teacher.digest, "student": student.digest},
        )
    dtype = torch.float64 if count_parameters(teacher.config) <= WIDE_LIMIT else torch.float32
    by_axis = plans_by_axis(plan)
    differences, scales = _compare(student, teacher, [*by_axis.values(), plan], tokens, dtype, scratch)
    axes = [
        _axis_row(size, one, error, scale, dtype)
        for (size, one), (error,), scale in zip(by_axis.items(), differences, scales, strict=False)
    ]
    (exact, stored), scale = differences[-1], scales[-1]
    if not math.isfinite(scale):
        broken = next((name for name, tensor in teacher.tensors() if not tensor.isfinite().all()), None)
        raise HalflapError(
            f"the teacher's logits are no finite numbers ({f'as those of tensor {broken}' if broken else scale}) "
            "and cannot be compared; take a checkpoint whose weights are finite"
        )
    tolerance, stored_tolerance = WIDE_TOLERANCE[dtype] * scale, STORED_TOLERANCE[student.dtype] * scale
    return {
        "passed": all(axis["passed"] for axis in axes) and exact <= tolerance and stored <= stored_tolerance,
        "max_abs_error": stored,
        "tolerance": stored_tolerance,
        "logit_scale": scale,
        "exact_max_abs_error": exact,
        "exact_tolerance": tolerance,
        "arithmetic": str(dtype).removeprefix("torch."),
        "stored": student.dtype,
        "tensors_identical": True,
        "tokens": tokens.numel(),
        "norm_correction": plan.norm_correction,
        "reference": _reference(plan),
        "axes": axes,
        "teacher": teacher.digest,
        "student": student.digest,
        "plan": plan.digest,
    }


def _check_plan(student: Checkpoint, teacher: Checkpoint, plan: PruningPlan) -> None:
    """Raise CheckFailed when the student's lineage, if it has one, says that another plan made it."""
    made_by = next((step["inputs"]["plan"] for step in reversed(student.lineage) if "plan" in step["inputs"]), None)
    if made_by not in (None, plan.digest):
        raise CheckFailed(
            f"the plan beside the student is {plan.digest[:12]}, and its lineage says that {made_by[:12]} made it, so "
            "the plan was edited since: put back the one it was cut by, or make the edited plan's own student with "
            "`halflap prune --plan`",
            UNMEASURED
            | {"plan": plan.digest, "made_by": made_by, "teacher": teacher.digest}
            | {"student": student.digest},
        )


UNMEASURED: dict[str, Any] = {"passed": False, "max_abs_error": None, "logit_scale": None, "axes": []}
"""Of a student that is refused before its logits are compared."""
REFERENCE = {
    "masked": "the teacher with the cut indices set to zero; norms divide by all channels",
    "none": "the teacher with the cut indices set to zero; norms divide by the kept channels",
    "calibrated": "the teacher with the cut indices set to zero; norms divide by the kept channels, gains calibrated",
}


def _reference(plan: PruningPlan) -> str:
    """What the certificate's logits are compared with, in words."""
    if plan.teacher_config.norm == "rms" or "hidden" not in plan.keep:
        return REFERENCE[plan.norm_correction]
    nothing = "zero, hidden channels to the mean of the kept ones, which LayerNorms subtract"
    return REFERENCE[plan.norm_correction].replace("zero", nothing, 1)


def changed_tensors(student: Checkpoint, expected: Iterable[tuple[str, Tensor]]) -> Iterator[str]:
    """Names of the student's tensors that differ in any bit from the expected, after the rounding of storage."""
    for name, tensor in expected:
        stored = student.read(name)
        if not torch.equal(stored.view(torch.uint8), tensor.to(stored.dtype).contiguous().view(torch.uint8)):
            yield name


# ---- axis by axis


def plans_by_axis(plan: PruningPlan) -> dict[str, PruningPlan]:
    """For every size that the plan cuts, the plan that cuts only it; `num_blocks` drops only the blocks."""
    groups = AXES | {"mamba_num_groups": ("group",)}
    plans = {}
    everything = tuple(range(len(plan.teacher_config.blocks)))
    for size, names in groups.items():
        keep = {name: kept for name, kept in plan.keep.items() if short_name(name) in names}
        if keep:
            plans[size] = _only(plan, everything, _fill(plan, keep))
    if plan.keep_blocks != everything:
        plans["num_blocks"] = _only(plan, plan.keep_blocks, {})
    if plan.changes:
        keep = {name: kept for name, kept in plan.keep.items() if short_name(name) == "kv"}
        plans["changes"] = _only(plan, everything, _fill(plan, keep), plan.changes)
    return plans


def _only(
    plan: PruningPlan,
    keep_blocks: tuple[int, ...],
    keep: Mapping[str, Kept],
    changes: Mapping[int, Change] = NO_CHANGES,
) -> PruningPlan:
    """The same kind of plan with fewer cuts; measured energies carry over where the norm is cut alike."""
    whole = {"norm_correction": "none", "dropped": {}}
    shape = dataclasses.replace(plan, keep_blocks=keep_blocks, keep=keep, changes=changes, **whole)
    dropped = {
        name: shares if len(shares := plan.dropped.get(name, ())) == norm.groups else (0.0,) * norm.groups
        for norm in norms(plan.teacher_config, shape.student, keep_blocks)
        if plan.norm_correction == "calibrated" and norm.kept != norm.total
        for name in (norm.name, norm.bias)
        if name is not None
    }
    return dataclasses.replace(shape, norm_correction=plan.norm_correction, dropped=dropped)


def _fill(plan: PruningPlan, keep: Mapping[str, Kept]) -> dict[str, Kept]:
    """A table with a row for each kept parent needs rows for all parents when the parent stays whole."""
    axes, filled = axes_of(plan.teacher_config), dict(keep)
    for name, table in keep.items():
        parent = axes[name].parent
        if parent is not None and parent in plan.keep and parent not in keep:
            rows: list[Any] = [table[0]] * axes[parent].size
            for place, index in enumerate(kept_indices(axes[parent], plan.keep)):
                rows[index] = table[place]
            filled[name] = tuple(rows)
    return filled


def _axis_row(size: str, plan: PruningPlan, error: float, scale: float, dtype: torch.dtype) -> dict[str, Any]:
    """What the certificate says of a plan that cuts one size alone."""
    axes = axes_of(plan.teacher_config)
    cut = [axes[name] for name in plan.keep]
    parents = [1 if axis.parent is None else axes[axis.parent].size for axis in cut]
    kept = sum(kept_count(axis, plan.keep) * count for axis, count in zip(cut, parents, strict=True))
    total = sum(axis.size * count for axis, count in zip(cut, parents, strict=True))
    if size == "changes":
        cut, kept, total = [], len(plan.changes), len(plan.teacher_config.blocks)
    if size == "num_blocks":
        kept, total = len(plan.keep_blocks), len(plan.teacher_config.blocks)
    return {
        "axis": size,
        "kept": kept,
        "total": total,
        "blocks": len({block_of(axis.name) for axis in cut} - {None}) or None,
        "max_abs_error": error,
        "logit_scale": scale,
        "passed": error <= WIDE_TOLERANCE[dtype] * scale,
    }


# ---- models, a block at a time


@torch.inference_mode()
def _compare(
    student: Checkpoint,
    teacher: Checkpoint,
    plans: Sequence[PruningPlan],
    tokens: Tensor,
    dtype: torch.dtype,
    scratch: Path | None,
) -> tuple[list[list[float]], list[float]]:
    """Of each plan the largest difference of its cut teacher's logits from those of its masked teacher, and the largest
    of the latter; of the last plan, after its own, the stored student's difference too.

    All go through a block of the teacher together, so that its tensors are read once; they, and one model's block made
    of them, are what is in memory.
    """
    source, inputs = Source(teacher, dtype), [(tokens, None)]
    masked = [
        Passes(f"masked-{number}", source.whole(), inputs, alter=partial(mask_part, plan))
        for number, plan in enumerate(plans)
    ]
    others = [[source.cut(plan, f"cut-{number}", inputs)] for number, plan in enumerate(plans)]
    others[-1].append(Passes("stored", StreamedModel.of(student, dtype), inputs, partial(part_of_student, plans[-1])))
    made_from = f"{teacher.digest} {student.digest} {plans[-1].digest} {dtype} {digest_of(inputs)}"
    shelf = shelf_in(scratch, made_from)
    carry([*masked, *(one for each in others for one in each)], teacher.config, shelf)
    differences, scales = [], []
    for one, each in zip(masked, others, strict=True):
        reference = _logits(one, shelf)
        scales.append(float(reference.abs().max()))
        differences.append([float((_logits(other, shelf) - reference).abs().max()) for other in each])
    shelf.remove()
    return differences, scales


def _logits(passes: Passes, shelf: Shelf | Held) -> Tensor:
    """(B, T, V), of the one input."""
    (logits,) = (select.linear(hidden, passes.model.head_weight) for hidden in passes.hidden_states(shelf))
    return logits
