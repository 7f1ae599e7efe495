"""importance.safetensors as rows of numbers ready to draw, with what a pruning plan kept of each.

Scores by name: `width/hidden` (L, D); `width/blocks.i.neuron` (F,), `.query` (K, H/K), `.inner` (G, H/G, P) and
`.state` (G, N); `depth/<metric>` (L,). Mamba heads and channels are the L2 norms of `inner` over the other axis.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
from numpy.typing import NDArray

from halflap.report.artifacts import Node

Floats = NDArray[np.float64]
MOST_CELLS = 96
"""Cells of a strip; more indices than that are averaged in equal bins."""


@dataclass(frozen=True)
class Row:
    """One block's scores in groups of cells; `kept` marks cells with a kept index, `whole` and `left` count indices."""

    block: int
    cells: tuple[tuple[float, ...], ...]
    kept: tuple[tuple[bool, ...], ...] | None
    whole: int
    left: int | None
    top_half_share: float


@dataclass(frozen=True)
class AxisMap:
    """The rows of one axis, `note` saying how its cells are ordered."""

    name: str
    unit: str
    kind: str
    note: str
    rows: tuple[Row, ...]

    @property
    def cut(self) -> bool:
        """Whether a block that stays lost an index."""
        return any(row.left not in (None, 0, row.whole) for row in self.rows)


@dataclass(frozen=True)
class Importance:
    """All of the file: `depth` by metric, `hidden` summed over blocks, `tensors` names for the links."""

    path: Path
    metric: str
    tokens: int | None
    calibration: str
    hidden: Floats | None
    hidden_kept: int | None
    depth: Mapping[str, Floats]
    axes: tuple[AxisMap, ...]


def read_importance(path: Path, plan: Node | None) -> Importance:
    """Raises OSError or ValueError when the file cannot be read; the page then says so."""
    try:
        with safetensors.safe_open(str(path), "np") as file:
            header = json.loads((file.metadata() or {}).get("halflap", "{}"))
            tensors = {name: np.asarray(file.get_tensor(name), float) for name in file.keys()}  # noqa: SIM118
    except safetensors.SafetensorError as error:
        raise ValueError(str(error)) from error
    keep = plan.value.get("keep", {}) if plan is not None and isinstance(plan.value, dict) else None
    stays = plan.value.get("keep_blocks") if plan is not None and isinstance(plan.value, dict) else None
    hidden = tensors.get("width/hidden")
    total = None if hidden is None else hidden.sum(0) if hidden.ndim > 1 else hidden
    left = None if keep is None or total is None else len(keep.get("hidden", range(len(total))))
    return Importance(
        path,
        str(header.get("metric", "")),
        header.get("tokens") or None,
        str(header.get("calibration", "")),
        total,
        left,
        {name.partition("/")[2]: values for name, values in tensors.items() if name.startswith("depth/")},
        tuple(axis for axis in _axes(tensors, keep, stays) if axis.rows),
    )


def _axes(tensors: Mapping[str, Floats], keep: Any, stays: Any) -> list[AxisMap]:
    inner, query, neuron, state = (_blocks(tensors, name) for name in ("inner", "query", "neuron", "state"))
    heads = {block: np.sqrt(np.square(score).sum(-1)) for block, score in inner.items()}
    channels = {block: np.sqrt(np.square(score).sum((0, 1))) for block, score in inner.items()}
    table = (
        ("Mamba heads", "heads", "mamba2", "in their groups", "head", "group", heads),
        ("Mamba head channels", "channels", "mamba2", "shared by all heads of a block", "channel", None, channels),
        ("Mamba states", "states", "mamba2", "in their groups", "state", "group", state),
        ("Query heads", "heads", "attention", "in groups of one key/value head", "query", "kv", query),
    )
    axes = [
        AxisMap(
            name, unit, kind, note, tuple(_row(i, s, _kept(i, s, axis, parent, keep, stays)) for i, s in scores.items())
        )
        for name, unit, kind, note, axis, parent, scores in table
    ]
    rows = tuple(_sorted_row(i, s, _kept(i, s, "neuron", None, keep, stays)) for i, s in neuron.items())
    return [*axes, AxisMap("MLP neurons", "neurons", "mlp", "most important first", rows)]


def _blocks(tensors: Mapping[str, Floats], name: str) -> dict[int, Floats]:
    found = {}
    for key, values in tensors.items():
        parts = key.partition("/")[2].split(".")
        if key.startswith("width/blocks.") and parts[-1] == name:
            found[int(parts[1])] = values
    return dict(sorted(found.items()))


def _kept(block: int, scores: Floats, axis: str, parent: str | None, keep: Any, stays: Any) -> NDArray[np.bool_] | None:
    """Which indices the plan keeps, in the shape of `scores`; None without a plan."""
    if keep is None:
        return None
    mask = np.zeros(scores.shape, bool)
    if stays is not None and block not in stays:
        return mask
    table = keep.get(f"blocks.{block}.{axis}")
    if parent is None:
        mask[slice(None) if table is None else list(table)] = True
        return mask
    parents = keep.get(f"blocks.{block}.{parent}", range(len(scores)))
    for number, row in enumerate(parents):
        mask[row, slice(None) if table is None else list(table[number])] = True
    return mask


def _row(block: int, scores: Floats, kept: NDArray[np.bool_] | None) -> Row:
    grid = scores if scores.ndim > 1 else scores[None]
    most = max(1, MOST_CELLS // len(grid))
    cells = tuple(_binned(values, most) for values in grid)
    marks = None
    if kept is not None:
        shown = kept if kept.ndim > 1 else kept[None]
        marks = tuple(tuple(value > 0.5 for value in _binned(values.astype(float), most)) for values in shown)
    return _finished(block, scores, kept, cells, marks)


def _sorted_row(block: int, scores: Floats, kept: NDArray[np.bool_] | None) -> Row:
    order = np.argsort(-scores, kind="stable")
    marks = None if kept is None else (tuple(value > 0.5 for value in _binned(kept[order].astype(float), MOST_CELLS)),)
    return _finished(block, scores, kept, (_binned(scores[order], MOST_CELLS),), marks)


def _finished(block: int, scores: Floats, kept: NDArray[np.bool_] | None, cells: Any, marks: Any) -> Row:
    ordered = np.sort(scores.ravel())[::-1]
    total = float(ordered.sum()) or 1.0
    share = float(ordered[: (len(ordered) + 1) // 2].sum()) / total
    return Row(block, cells, marks, scores.size, None if kept is None else int(kept.sum()), share)


def _binned(values: Sequence[float] | Floats, most: int) -> tuple[float, ...]:
    """Means of at most `most` equal runs of neighbours."""
    array = np.asarray(values, float)
    if len(array) <= most:
        return tuple(array.tolist())
    return tuple(float(part.mean()) for part in np.array_split(array, most))
