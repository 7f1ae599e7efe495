"""The group-blind control: what pruning Mamba heads without regard for their groups costs. For experiments only.

Heads of a block are ranked over all groups, and the best are packed into the groups by position, whatever B, C and
norm they belonged to. The student has the shape of the group-aware one, and only that. A `PruningPlan` cannot say
this, on purpose; so the plan gives everything else, and the heads are handed over beside it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor

from halflap.compress.axes import axes_of, block_of, short_name
from halflap.compress.importance import Importance
from halflap.compress.plan import Kept, PruningPlan, Row, kept_count
from halflap.compress.prune import cut
from halflap.compress.ranking import top
from halflap.models.layout import Axis, Dim, Layout, Span, layout


def blind_heads(plan: PruningPlan, importance: Importance) -> dict[int, Row]:
    """For every block whose heads the plan cuts: equally many, the highest over all groups, by number in the block."""
    axes = axes_of(plan.teacher_config)
    heads = {}
    for name in plan.keep:
        index = block_of(name)
        if index is None or short_name(name) != "head":
            continue
        scores = importance.widths[f"blocks.{index}.inner"].double()
        channels = plan.keep.get(f"blocks.{index}.channel", tuple(range(scores.shape[-1])))
        by_head = torch.linalg.vector_norm(scores[..., list(channels)], dim=-1).flatten()
        count = scores.shape[0] * kept_count(axes[name], plan.keep)
        heads[index] = tuple(top(by_head, count).tolist())
    return heads


def blind_tensors(
    plan: PruningPlan, heads: Mapping[int, Row], tensors: Iterable[tuple[str, Tensor]]
) -> Iterator[tuple[str, Tensor]]:
    """`apply_plan` with the heads of these blocks replaced: (name, tensor) pairs of a student of the same shape."""
    source: Layout = {
        name: tuple(_blind(dim) for dim in dims) if block_of(name) in heads else dims
        for name, dims in layout(plan.teacher_config).items()
    }
    keep: dict[str, Kept] = {name: kept for name, kept in plan.keep.items() if short_name(name) != "head"}
    keep |= {f"blocks.{index}.all_heads": row for index, row in heads.items()}
    return cut(plan, source, keep, tensors)


def _blind(dim: Dim) -> Dim:
    return tuple(_blind_span(span) for span in dim)


def _blind_span(span: Span) -> Span:
    """(group, head, ...) as one axis of heads without groups."""
    if len(span) < 2 or short_name(span[1].name) != "head":
        return span
    group, head, *rest = span
    name = head.name.removesuffix("head") + "all_heads"
    return (Axis(name, group.size * head.size), *rest)
