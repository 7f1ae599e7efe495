"""Elastic checkpoints: every axis sorted by importance once, so that the first indices of each are a student.

Sorting is a pruning plan that keeps everything in another order, so the sorted model is its teacher, to rounding. After
it, an index's importance is its place. What is ranked anew for every candidate otherwise, Mamba heads by the kept
channels alone, key/value heads by the kept readers, has one order for all sizes, so a student is a slice of every
student that is nowhere smaller, and several of them can be trained as one (Devvrit et al. 2024, MatFormer; of hybrid
models Nemotron Elastic, Taghibakhshi et al. 2025). `elastic.json` beside the weights has what they do not say.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from halflap.compress.axes import Sizes, axes_of, short_name
from halflap.compress.importance import SCORES, Importance, score_shapes
from halflap.compress.kinds import axis_name
from halflap.compress.plan import PruningPlan, Row
from halflap.compress.ranking import drop_order, plan_for
from halflap.errors import HalflapError
from halflap.files import write_json
from halflap.models.config import ModelConfig

FILE, FORMAT = "elastic.json", "halflap-elastic-1"


class NestedSize(NamedTuple):
    """A size that was trained inside an elastic checkpoint, and under which budget it was chosen (`params 75%`)."""

    budget: str
    sizes: Sizes


@dataclass(frozen=True)
class Elastic:
    """What a sorted checkpoint's weights do not say.

    drop_order       all blocks, the first to go first; empty when blocks were not scored
    norm_correction  of its students: `masked` or `none`, which weights alone decide
    nested           sizes trained beside the whole, each nowhere larger than the one before
    importance       digest of what it was sorted by
    """

    drop_order: Row
    norm_correction: str = "masked"
    nested: tuple[NestedSize, ...] = ()
    importance: str = ""

    def plan_for(self, config: ModelConfig, teacher: str, sizes: Sizes) -> PruningPlan:
        """The plan of these sizes for the elastic checkpoint of this digest: the first indices of every axis."""
        return plan_for(self.ranking(config, teacher), teacher, config, sizes, self.norm_correction)

    def ranking(self, config: ModelConfig, teacher: str) -> Importance:
        """Importance by which the first indices are kept and blocks go in order."""
        depth = {"nested": torch.zeros(len(config.blocks))} if self.drop_order else {}
        metric = "nested" if depth else ""
        return Importance(
            "nested", places(config), depth, teacher=teacher, depth_metric=metric, removed=self.drop_order
        )

    def save(self, directory: Path) -> None:
        nested = [{"budget": one.budget, "sizes": one.sizes.to_json()} for one in self.nested]
        write_json(
            directory / FILE,
            {
                "format": FORMAT,
                "drop_order": list(self.drop_order),
                "norm_correction": self.norm_correction,
                "nested": nested,
                "importance": self.importance,
            },
        )

    @staticmethod
    def load(directory: Path, blocks: int) -> Elastic:
        """Of a checkpoint directory with so many blocks; raises HalflapError when it is not elastic."""
        file = directory / FILE
        try:
            data: Mapping[str, Any] = json.loads(file.read_text("utf-8"))
            found = Elastic(
                tuple(data["drop_order"]),
                data["norm_correction"],
                tuple(NestedSize(row["budget"], Sizes.from_json(row["sizes"])) for row in data["nested"]),
                data["importance"],
            )
            whole = data["format"] == FORMAT and sorted(found.drop_order) in ([], list(range(blocks)))
        except FileNotFoundError:
            raise HalflapError(
                f"{str(directory)!r} is not an elastic checkpoint: it has no {FILE}; make one with `halflap compress "
                "MODEL --elastic`, or leave out --from-elastic and name --importance"
            ) from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise HalflapError(f"{str(file)!r} is damaged ({error!r}); make the elastic checkpoint again") from error
        if not whole:
            raise HalflapError(
                f"{str(file)!r} is of another format or of another model than the {blocks} blocks beside it; make the "
                "elastic checkpoint again"
            )
        return found


def sort_plan(importance: Importance, teacher: str, config: ModelConfig) -> PruningPlan:
    """The plan that keeps everything, the most important index of each axis first, ties in their order.

    What is chosen within a parent (heads of a group) is sorted within it. Groups of Mamba-2, rotated head channels and
    blocks stay where they are.
    """
    keep: dict[str, Any] = {}
    scores = _scores_by_axis(importance, config)
    for name, axis in axes_of(config).items():  # parents first
        if name not in scores:
            continue
        order = torch.sort(scores[name], dim=-1, descending=True, stable=True).indices
        parents = keep.get(axis.parent or "")
        keep[name] = (order if parents is None else order[parents]).tolist()
    return PruningPlan(teacher, config, None, keep, "none", importance=importance.digest)  # type: ignore[arg-type]


def elastic_of(importance: Importance, config: ModelConfig, norm_correction: str) -> Elastic:
    """Of a checkpoint sorted by this importance, before any size of it is chosen."""
    order = drop_order(importance, config, keep_kinds=True) if importance.depth else ()
    return Elastic(order, norm_correction, importance=importance.digest)


def places(config: ModelConfig) -> dict[str, Tensor]:
    """Scores (`importance.score_shapes`, float64) by which every ranking keeps the first indices: of each index, the
    product over its axes of how many follow it there, itself counted. Whole numbers, so no sum of them is rounded."""

    def grid(shape: tuple[int, ...]) -> Tensor:
        ramps = [torch.arange(size, 0, -1, dtype=torch.float64) for size in shape]
        return functools.reduce(lambda outer, ramp: outer[..., None] * ramp, ramps)

    return {name: grid(shape) for name, shape in score_shapes(config).items()}


def _scores_by_axis(importance: Importance, config: ModelConfig) -> dict[str, Tensor]:
    """Scores (n,), or (parents, n) of what is chosen within a parent, float64: norms over all else that is scored
    together, summed over the blocks that share the axis."""
    axes = axes_of(config)
    found = {"hidden": importance.widths["hidden"].double().sum(0)}
    for index, block in enumerate(config.blocks):
        for score, dims in SCORES[type(block)].items():
            values = importance.widths[f"blocks.{index}.{score}"].double()
            own = names = [axis_name(block, index, dim) for dim in dims]
            if values.ndim > len(names):  # a Mamba-2 beside attention has states of its own for every parent
                names = [axes[own[0]].parent, *own]  # type: ignore[list-item]
            for name in own:
                if short_name(name) == "group":
                    continue
                over = [dim for dim, other in enumerate(names) if other not in (name, axes[name].parent)]
                total = torch.linalg.vector_norm(values, dim=over) if over else values
                found[name] = found[name] + total if name in found else total
    return found
