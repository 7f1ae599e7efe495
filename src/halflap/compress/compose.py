"""Two plans as one: pruning twice equals one composed plan on the first teacher. No torch."""

from __future__ import annotations

from typing import Any

from halflap.compress.axes import axes_of, block_of, short_name
from halflap.compress.correction import Dropped
from halflap.compress.kinds import Change
from halflap.compress.plan import Kept, PruningPlan, kept_indices
from halflap.errors import HalflapError
from halflap.models.layout import Axis, layout


def compose(second: PruningPlan, first: PruningPlan) -> PruningPlan:
    """The plan of the first teacher that equals `second` applied to the student of `first`.

    Bit for bit without norm correction, to rounding with it. Raises HalflapError unless `second` was made for the
    student of `first` with the same norm correction.
    """
    if second.teacher_config != first.student or second.norm_correction != first.norm_correction:
        raise HalflapError(
            f"the second plan cuts a {second.teacher_config.pattern()} of width {second.teacher_config.hidden_size} "
            f"with norm correction {second.norm_correction!r}, and the first leaves a {first.student.pattern()} of "
            f"width {first.student.hidden_size} with {first.norm_correction!r}; give a plan for the first one's student"
        )
    axes = axes_of(first.student)
    changes = _compose_changes(first, second)
    settled = {index for index, change in first.changes.items() if change.pool > 1 or change.linear}
    keep = {}
    for name, axis in axes.items():
        own = first.teacher_name(name)
        if block_of(name) not in (None, *second.keep_blocks):
            continue
        if block_of(own) not in settled or short_name(own) == "value_channel":
            keep[own] = _compose_axis(first, second, axis, axes)
    stay = settled & {first.keep_blocks[index] for index in second.keep_blocks}
    keep |= {name: kept for name, kept in first.keep.items() if block_of(name) in stay and name not in keep}
    return PruningPlan(
        teacher=first.teacher,
        teacher_config=first.teacher_config,
        keep_blocks=tuple(first.keep_blocks[index] for index in second.keep_blocks),
        keep=keep,
        norm_correction=first.norm_correction,
        dropped=_compose_dropped(first, second),
        importance=second.importance,
        changes=changes,
    )


def _compose_changes(first: PruningPlan, second: PruningPlan) -> dict[int, Change]:
    """Averages of averages; what the second cuts of averaged heads has no place among the first teacher's."""
    found = {}
    for place, index in enumerate(first.keep_blocks):
        before, after = first.changes.get(index, Change()), second.changes.get(place, Change())
        if before.pool > 1 and {f"blocks.{place}.kv", f"blocks.{place}.query"} & second.keep.keys():
            raise HalflapError(
                f"the first plan averages key/value heads of block {index} and the second cuts what came of them, "
                "which one plan cannot say; apply them one after the other"
            )
        if place in second.keep_blocks:
            window = before.window if after.window is None else after.window
            found[index] = Change(before.pool * after.pool, window, before.linear or after.linear)
    return found


def _compose_axis(first: PruningPlan, second: PruningPlan, axis: Axis, axes: dict[str, Axis]) -> Kept:
    """`axis` is one of the student of `first`; what `second` keeps of it is looked up in what `first` kept."""
    own = axes_of(first.teacher_config)[first.teacher_name(axis.name)]
    if axis.parent is None:
        before = kept_indices(own, first.keep)
        return tuple(before[index] for index in kept_indices(axis, second.keep))
    parents = kept_indices(axes[axis.parent], second.keep)
    before = kept_indices(own, first.keep, axes[axis.parent].size)
    after = kept_indices(axis, second.keep, len(parents))
    return tuple(tuple(before[parent][index] for index in row) for parent, row in zip(parents, after, strict=True))


def _compose_dropped(first: PruningPlan, second: PruningPlan) -> Dropped:
    """Of the share 1 - f that the first cut leaves, the second leaves 1 - g; means add up."""
    table = layout(first.student)
    found: dict[str, tuple[float, ...]] = {}
    for name in dict.fromkeys([*first.dropped, *map(first.teacher_name, second.dropped)]):
        middle = first.student_name(name)
        if middle is None or block_of(middle) not in (None, *second.keep_blocks):
            continue
        before: tuple[float, ...] | None = first.dropped.get(name)
        after: tuple[float, ...] | None = second.dropped.get(middle)
        if before is not None and len(before) > 1:  # one a group: those of the groups that stay
            groups: Any = kept_indices(table[middle][0][0][0], second.keep)
            before = tuple(before[group] for group in groups)
        if before is None or after is None:
            found[name] = before or after or ()
        elif name.endswith("norm.bias"):  # the second shift is of channels that the first has multiplied
            gain = first.scales[name.replace(".bias", ".weight")][0]
            found[name] = tuple(mean + gain * more for mean, more in zip(before, after, strict=True))
        else:
            found[name] = tuple(1 - (1 - f) * (1 - g) for f, g in zip(before, after, strict=True))
    return found
