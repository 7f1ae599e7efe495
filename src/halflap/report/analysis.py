"""analysis.json as two figures and a table: where attention goes, what each branch is worth, meta tokens by domain."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from halflap.report.artifacts import RunFiles
from halflap.report.plots import Drawing, Frame, both, tick
from halflap.report.svg import element, group, picture

TARGETS = {"meta": "meta tokens", "first": "first token", "self": "itself", "others": "other tokens"}
BRANCHES = {"attention": "attention", "ssm": "SSM", "mlp": "MLP", "linear": "linear map"}
COLOURS = {"ssm": "mamba2"}  # class of a branch where it is not its own name


@dataclass(frozen=True)
class PackingView:
    """What packing costs: of the whole model, and of each part by block, (KL in nats a token, share of the most)."""

    weights: str
    whole: float
    names: tuple[str, ...]
    rows: tuple[tuple[str, tuple[tuple[float, float] | None, ...]], ...]


@dataclass(frozen=True)
class AnalysisView:
    """What the page shows; figures are None where a model has nothing of the kind."""

    file: Path
    targets: tuple[tuple[str, str], ...]
    attention: Markup | None
    branches: tuple[tuple[str, str], ...]
    removal: Markup | None
    domains: tuple[str, ...]
    similarity: tuple[tuple[float, ...], ...]
    packing: PackingView | None


def read_analysis(runs: Sequence[RunFiles]) -> AnalysisView | None:
    """Of the first run that has an analysis."""
    for run in runs:
        node = run.document("analysis.json")
        if node is None or not isinstance(node.value, dict) or not isinstance(node.value.get("layers"), list):
            continue
        data = node.value
        layers = data["layers"]
        attending = [layer for layer in layers if "attention" in layer]
        named = [name for name in TARGETS if any(layer["attention"].get(name) for layer in attending)]
        present = [name for name in BRANCHES if any(name in layer["loss_added_without"] for layer in layers)]
        return AnalysisView(
            node.path,
            tuple((f"share-{name}", TARGETS[name]) for name in named),
            both(attention_plot(attending, named)) if attending else None,
            tuple((f"kind-{COLOURS.get(name, name)}", BRANCHES[name]) for name in present),
            both(removal_plot(layers)),
            tuple(data.get("domains") or ()),
            tuple(tuple(row) for row in data.get("similarity") or ()),
            _packing(data.get("quantization")),
        )
    return None


def _packing(found: dict[str, Any] | None) -> PackingView | None:
    """The costs as a table of blocks by parts; parts of one name in a block that several matrices have are summed."""
    if found is None:
        return None
    names = tuple(dict.fromkeys(part["slice"] for part in found["parts"]))
    rows: dict[str, dict[str, float]] = {}
    for part in found["parts"]:
        row = rows.setdefault("vocabulary" if part["block"] is None else str(part["block"]), {})
        row[part["slice"]] = row.get(part["slice"], 0.0) + part["kl"]
    most = max((value for row in rows.values() for value in row.values()), default=0.0) or 1.0
    table = tuple(
        (label, tuple(None if name not in row else (row[name], max(0.0, row[name]) / most) for name in names))
        for label, row in rows.items()
    )
    return PackingView(found["weights"], found["whole"]["kl"], names, table)


def attention_plot(layers: Sequence[dict[str, Any]], targets: Sequence[str]) -> Drawing:
    """A stacked bar a block: the share of attention on each target."""

    def draw(width: int, height: int) -> Markup:
        frame = Frame.over(width, height, (-0.6, len(layers) - 0.4), (0.0, 1.0))
        x, y = frame.x, frame.y
        half = min(14.0, 0.4 * (x(1.0) - x(0.0)))
        names = {float(place): str(layer["block"]) for place, layer in enumerate(layers)}
        bars = []
        for place, layer in enumerate(layers):
            low, parts = 0.0, []
            for name in targets:
                share = layer["attention"][name]
                top, bottom = y(min(1.0, low + share)), y(low)
                title = element("title", f"block {layer['block']}: {share:.1%} on {TARGETS[name]}")
                box = {"x": x(float(place)) - half, "y": top, "width": 2 * half, "height": max(0.0, bottom - top)}
                parts.append(element("rect", title, **box, class_=f"share-{name}"))
                low += share
            bars.append(group(parts))
        axes = frame.axes("block", "share of attention", lambda value: names.get(value, ""), tick)
        label = f"Where the attention of {len(layers)} blocks goes, as stacked shares"
        return picture(width, height, label, [axes, *bars])

    return draw


def removal_plot(layers: Sequence[dict[str, Any]]) -> Drawing:
    """Bars beside each other for each block's branches: loss added when the branch gives zero."""
    values = [value for layer in layers for value in layer["loss_added_without"].values()]
    low, high = min(0.0, *values), max(values, default=1.0) * 1.05 or 1.0

    def draw(width: int, height: int) -> Markup:
        frame = Frame.over(width, height, (-0.6, len(layers) - 0.4), (low, high))
        x, y = frame.x, frame.y
        room = min(28.0, 0.8 * (x(1.0) - x(0.0)))
        names = {float(place): str(layer["block"]) for place, layer in enumerate(layers)}
        bars = []
        for place, layer in enumerate(layers):
            removed = layer["loss_added_without"]
            wide = room / max(1, len(removed))
            for number, (name, value) in enumerate(removed.items()):
                top, bottom = sorted((y(value), y(0.0)))
                title = element("title", f"block {layer['block']} without {BRANCHES[name]}: {value:+.3f} nats a token")
                box = {"x": x(float(place)) - room / 2 + number * wide, "y": top, "width": 0.9 * wide}
                class_ = f"bar kind-{COLOURS.get(name, name)}"
                bars.append(element("rect", title, **box, height=max(0.5, bottom - top), class_=class_))
        axes = frame.axes("block", "loss added, nats a token", lambda value: names.get(value, ""), tick)
        return picture(width, height, f"Loss added by leaving out branches of {len(layers)} blocks", [axes, *bars])

    return draw
