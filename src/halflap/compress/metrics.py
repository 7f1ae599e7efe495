"""How importance is measured: one table of metrics."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from halflap.compress.axes import block_of, short_name
from halflap.compress.check import check_scores
from halflap.compress.importance import DEFAULT_SCORING, Importance, Scoring, score_shapes
from halflap.compress.partial import NOWHERE, Scratch
from halflap.compress.taylor import taylor
from halflap.compress.watch import activation
from halflap.data.batch import Batch
from halflap.errors import HalflapError
from halflap.models.config import ModelConfig
from halflap.models.layout import dim_size, is_offset_gain, layout
from halflap.models.model import HybridModel


def weight_norm(
    model: HybridModel, batches: Sequence[Batch], scorings: Sequence[Scoring], scratch: Scratch = NOWHERE, seed: int = 0
) -> list[Importance]:
    """The L2 norm of all weights that an index touches; reads no text."""
    del batches, scorings, scratch, seed
    parameters = dict(model.named_parameters())
    return [weight_norm_of(model.config, ((name, parameters[name]) for name in layout(model.config)))]


def weight_norm_of(config: ModelConfig, tensors: Iterable[tuple[str, Tensor]]) -> Importance:
    """`weight_norm` from a stream of (name, tensor) in the order of the layout."""
    squares = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in score_shapes(config).items()}
    depth = torch.zeros(len(config.blocks), dtype=torch.float64)
    dims_of = layout(config)
    for name, tensor in tensors:
        dims = dims_of[name]
        square = (tensor.detach().double().cpu() + is_offset_gain(config, name)).square()
        if name.startswith("blocks."):
            depth[int(name.split(".")[1])] += square.sum()
        for dimension, dim in enumerate(dims):
            along = square.movedim(dimension, 0).reshape(square.shape[dimension], -1).sum(1)
            for span, part in zip(dim, along.split([dim_size((span,)) for span in dim]), strict=True):
                _add_span(squares, block_of(name), [axis.name for axis in span], part.reshape([a.size for a in span]))
    widths = {name: square.sqrt().float() for name, square in squares.items()}
    return Importance("weight_norm", widths, {"weight_norm": depth.sqrt().float()})


def random(
    model: HybridModel, batches: Sequence[Batch], scorings: Sequence[Scoring], scratch: Scratch = NOWHERE, seed: int = 0
) -> list[Importance]:
    """Uniform random scores: the control that every metric has to beat."""
    del batches, scorings, scratch
    return [random_of(model.config, seed)]


def random_of(config: ModelConfig, seed: int) -> Importance:
    generator = torch.Generator().manual_seed(seed)
    widths = {name: torch.rand(shape, generator=generator) for name, shape in score_shapes(config).items()}
    return Importance("random", widths, {"random": torch.rand(len(config.blocks), generator=generator)})


# Scores by the axes of the spans that belong to them, each the first that the block has.
_SPANS: dict[tuple[str, ...], tuple[str, ...]] = {
    ("neuron",): ("neuron",),
    ("inner",): ("inner",),
    ("state",): ("state",),
    ("kv", "query", "head_dim"): ("query", "inner"),
    ("kv", "query", "value_channel"): ("query", "inner"),
    ("kv", "state"): ("state",),
    ("group", "head", "channel"): ("inner",),
    ("group", "state"): ("state",),
}


def _add_span(squares: dict[str, Tensor], block: int | None, axes: list[str], part: Tensor) -> None:
    if axes == ["hidden"]:
        squares["hidden"] += part / len(squares["hidden"])
        return
    short = tuple(short_name(axis) for axis in axes)
    for score in _SPANS.get(short, ()):
        if (target := squares.get(f"blocks.{block}.{score}")) is not None:
            if score == "query":
                part = part.sum(-1)
            elif short[-1] == "head_dim":  # of a query, which every channel of its head's output needs
                part = part.sum(-1, keepdim=True) / target.shape[-1]
            target += part
            return


Metric = Callable[[HybridModel, Sequence[Batch], Sequence[Scoring], Scratch, int], list[Importance]]

METRICS: dict[str, Metric] = {
    "activation": activation,
    "taylor": taylor,
    "weight_norm": weight_norm,
    "random": random,
}


def collect(
    model: HybridModel,
    batches: Iterable[Batch],
    metric: str = "activation",
    *,
    teacher: str = "",
    calibration: str = "",
    scoring: Scoring = DEFAULT_SCORING,
    seed: int = 0,
) -> Importance:
    """Importance by a row of `METRICS`; `teacher` and `calibration` are the digests it is filed under."""
    found = collect_all(model, list(batches), metric, [scoring], seed=seed)[0]
    return dataclasses.replace(found, teacher=teacher, calibration=calibration)


def collect_all(
    model: HybridModel,
    batches: Sequence[Batch],
    metric: str,
    scorings: Sequence[Scoring],
    *,
    scratch: Scratch = NOWHERE,
    seed: int = 0,
) -> list[Importance]:
    """Importance of every scoring, from one pass over the batches; one alone of a metric that reads no text.

    Raises HalflapError on an unknown metric, without text, and where scores are NaN or infinite; warns of an axis of a
    block whose scores are all 0, which says nothing about what to keep.
    """
    if metric not in METRICS:
        raise HalflapError(
            f"importance metric {metric!r} is not known; allowed are {', '.join(METRICS)}: correct --metric"
        )
    found = METRICS[metric](model, batches, scorings, scratch, seed)
    for importance in found:
        check_scores(importance, model.config)
    return found
