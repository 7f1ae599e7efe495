"""Apply a plan to a stream of tensors: a pure function, one tensor in memory at a time.

Each dimension is a run of spans, each span a grid of axes (`models/layout.py`); the kept sub-grid of every span is
selected and the spans are joined again. Nothing here knows of Mamba, attention or norms: the layout says it all.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from halflap.compress.axes import block_of
from halflap.compress.kinds import Change
from halflap.compress.plan import Kept, PruningPlan, kept_indices
from halflap.errors import HalflapError
from halflap.models.layout import Dim, Layout, Span, dim_size, is_offset_gain, layout, shape

WITHOUT = Change()

# NumPy's `take` moves 2-byte items 3 to 5x as fast as torch.index_select (20000x4096), into large pages.
_INTEGER = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def apply_plan(
    plan: PruningPlan,
    tensors: Iterable[tuple[str, Tensor]],
    names: Sequence[str] | None = None,
    dtype: torch.dtype | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """The student's (name, tensor) pairs from the teacher's, in the teacher's order and dtypes.

    names: of the student, where not all of it is wanted; the teacher's tensors are those it is made of. dtype: that
    what is kept is brought to before anything is computed of it. Tensors that lose nothing pass through as they are;
    others are new and contiguous. Raises HalflapError on a tensor that the teacher's layout does not have, or of
    another shape, and when one is missing.
    """
    yield from cut(plan, layout(plan.teacher_config), plan.keep, tensors, names, dtype)


def cut(
    plan: PruningPlan,
    source: Layout,
    keep: Mapping[str, Kept],
    tensors: Iterable[tuple[str, Tensor]],
    names: Sequence[str] | None = None,
    dtype: torch.dtype | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """`apply_plan` by another reading of the teacher's dimensions (see `controls.py`)."""
    missing = layout(plan.student)
    if names is not None:
        missing = {name: missing[name] for name in names}
    for student_name, student in _each(plan, source, keep, tensors, missing, dtype):
        del missing[student_name]
        yield student_name, student
    if missing:
        raise HalflapError(
            f"the teacher's tensors ended before {next(iter(missing))} of the student was made ({len(missing)} are "
            "missing); give a complete checkpoint"
        )


def cut_block(plan: PruningPlan, index: int, tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Parameters of the teacher's block `index` as the student has them, by their names inside the block."""
    own = ((name, tensor) for name, tensor in tensors if block_of(name) == index)
    made = _each(plan, layout(plan.teacher_config), plan.keep, own, layout(plan.student))
    return {name.split(".", 2)[2]: tensor for name, tensor in made}


def _each(
    plan: PruningPlan,
    source: Layout,
    keep: Mapping[str, Kept],
    tensors: Iterable[tuple[str, Tensor]],
    student_layout: Layout,
    dtype: torch.dtype | None = None,
) -> Iterator[tuple[str, Tensor]]:
    gains: dict[str, Tensor] = {}
    parts: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors:
        _check_source(name, tensor, source)
        student_name = plan.student_name(name)
        if student_name is None:
            continue
        selected = select(tensor, source[name], keep)
        selected = _changed(plan, name, selected if dtype is None else selected.to(dtype))
        index = block_of(name)
        if index is not None and plan.changes.get(index, WITHOUT).linear and ".mixer." in name:
            found = parts.setdefault(index, {})
            found[name.split(".mixer.")[1]] = scale(selected, plan.scales.get(name))
            if len(found) == sum(other.startswith(f"blocks.{index}.mixer.") for other in source):
                prefix = student_name.split(".mixer.")[0]
                yield from ((f"{prefix}.mixer.{leaf}", made) for leaf, made in _linear(plan, index, parts.pop(index)))
            continue
        dims = student_layout[student_name]
        student = _corrected(plan, name, selected, dims[0], gains, owned=selected is not tensor)
        del selected, tensor  # not held while the caller writes
        expected = shape(dims)
        assert tuple(student.shape) == expected, f"{name} became {student_name} {tuple(student.shape)}, not {expected}"
        yield student_name, student


def _linear(plan: PruningPlan, index: int, parts: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The product of the outer maps of a block whose parameters are cut already: W_down W_up, or W_o W_v by heads."""
    block = plan.teacher_config.blocks[index]
    last, first = ("o_proj", "v_proj") if block.attention else ("down_proj", "up_proj")
    stored = parts[f"{last}.weight"].dtype
    wide = {name: tensor.to(torch.promote_types(stored, torch.float32)) for name, tensor in parts.items()}

    def inner(tensor: Tensor) -> Tensor:
        """Rows of values once for each query head that reads them."""
        if block.attention is None:
            return tensor
        rows = plan.kept_heads(index)
        heads = tensor.unflatten(0, (rows[0], -1)).repeat_interleave(rows[1], 0)
        return heads.flatten(0, 1)

    yield "out_proj.weight", (wide[f"{last}.weight"] @ inner(wide[f"{first}.weight"])).to(stored)
    if f"{last}.bias" in wide:
        added = wide[f"{last}.weight"] @ inner(wide[f"{first}.bias"]) + wide[f"{last}.bias"]
        yield "out_proj.bias", added.to(stored)


def _changed(plan: PruningPlan, name: str, tensor: Tensor) -> Tensor:
    """Neighbouring key/value heads averaged, where the plan pools those of the block."""
    index = block_of(name)
    change = WITHOUT if index is None else plan.changes.get(index, WITHOUT)
    if index is None or change.pool == 1 or name.split(".")[-2] not in ("k_proj", "v_proj"):
        return tensor
    attention = plan.student.blocks[plan.keep_blocks.index(index)].attention
    assert attention is not None
    heads = tensor.unflatten(0, (attention.num_key_value_heads, change.pool, -1))
    return heads.to(torch.promote_types(tensor.dtype, torch.float32)).mean(1).flatten(0, 1).to(tensor.dtype)


def _corrected(
    plan: PruningPlan, name: str, tensor: Tensor, rows: Dim, gains: dict[str, Tensor], *, owned: bool
) -> Tensor:
    """A selected tensor with its factors and, for the bias of a LayerNorm, with its gain times the measured mean.

    rows: its first dimension. gains: of the norms met so far, which the biases after them need.
    """
    factors = plan.scales.get(name)
    if is_offset_gain(plan.teacher_config, name):
        gain = tensor.to(torch.promote_types(tensor.dtype, torch.float32)) + 1
        gains[name.replace(".weight", ".bias")] = gain
        return tensor if factors is None else (scale(gain, factors) - 1).to(tensor.dtype)
    if (mean := plan.dropped.get(name)) is not None and name.endswith("norm.bias"):
        if name not in gains:
            raise HalflapError(
                f"tensor {name} came before the gain of its norm, which correcting it needs; give the tensors in the "
                "order of the layout"
            )
        return (tensor + gains.pop(name) * mean[0]).to(tensor.dtype)
    return scale(tensor, factors, rows, in_place=owned)


def select(tensor: Tensor, dims: tuple[Dim, ...], keep: Mapping[str, Kept]) -> Tensor:
    """The kept sub-grid of a tensor, in memory of its own unless nothing is cut."""
    result = tensor
    for dimension, dim in enumerate(dims):
        index = dim_indices(dim, keep)
        if index is not None:
            result = _take(result, dimension, index)
    if result is not tensor and (_share_memory(result, tensor) or not result.is_contiguous()):
        result = result.clone(memory_format=torch.contiguous_format)
    return result


def _share_memory(one: Tensor, other: Tensor) -> bool:
    """Whether one is a view of the other, which `_is_view` does not tell of tensors made in inference mode."""
    return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()


def dim_indices(dim: Dim, keep: Mapping[str, Kept]) -> Tensor | None:
    """Kept positions (int64) along a dimension, in the student's order; None when it stays as it is."""
    if not any(axis.name in keep for span in dim for axis in span):
        return None
    parts, start = [], 0
    for span in dim:
        parts.append(start + _span_indices(span, keep))
        start += dim_size((span,))
    return torch.cat(parts)


def _span_indices(span: Span, keep: Mapping[str, Kept]) -> Tensor:
    """Kept positions in the row-major grid of a span; a child's row is found by the place of its parent's index."""
    positions = torch.zeros(1, dtype=torch.int64)
    places: dict[str, int] = {}
    for depth, axis in enumerate(span):
        if axis.parent is None:
            own = torch.tensor(kept_indices(axis, keep))
        else:
            parent = places[axis.parent]
            own = torch.tensor(kept_indices(axis, keep, positions.shape[parent + 1]))
            own = own.reshape(-1, *[1] * (depth - parent - 1), own.shape[1])
        positions = positions[..., None] * axis.size + own
        places[axis.name] = depth
    return positions.flatten()


def scale(tensor: Tensor, factors: tuple[float, ...] | None, rows: Dim = (), *, in_place: bool = False) -> Tensor:
    """Times one factor, or one for each span or equal part of the first dimension (see `correction.Scales`).

    Rounded once, to the tensor's own dtype.
    """
    if factors is None:
        return tensor
    if len(factors) == 1:  # torch multiplies narrow floats in float32
        return tensor.mul_(factors[0]) if in_place else tensor * factors[0]
    wide = torch.promote_types(tensor.dtype, torch.float32)
    parts = len(factors)
    sizes = [dim_size((span,)) for span in rows] if len(rows) > 1 else [len(tensor) // parts] * parts
    factor = torch.tensor(factors, dtype=wide).repeat_interleave(torch.tensor(sizes)).to(tensor.device)
    return (tensor.to(wide) * factor.reshape(-1, *[1] * (tensor.dim() - 1))).to(tensor.dtype)


def _take(tensor: Tensor, dimension: int, index: Tensor) -> Tensor:
    first, count = int(index[0]), len(index)
    if torch.equal(index, torch.arange(first, first + count)):
        return tensor.narrow(dimension, first, count)
    if tensor.device.type == "cpu" and not tensor.requires_grad:
        source = tensor.contiguous().view(_INTEGER[tensor.element_size()]).numpy()
        return torch.from_numpy(np.take(source, index.numpy(), axis=dimension)).view(tensor.dtype)
    return tensor.index_select(dimension, index.to(tensor.device))


def _check_source(name: str, tensor: Tensor, source: Layout) -> None:
    if name not in source:
        raise HalflapError(
            f"tensor {name!r} is not a parameter of the plan's teacher, so it cannot be cut; "
            "give the teacher's own checkpoint"
        )
    if tuple(tensor.shape) != shape(source[name]):
        raise HalflapError(
            f"tensor {name!r} is {tuple(tensor.shape)} and the plan's teacher has {shape(source[name])}; "
            "give the teacher's own checkpoint"
        )
