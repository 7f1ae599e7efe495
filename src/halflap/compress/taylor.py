"""Importance from gradients: how much the loss would change, to first order, if an index were silenced.

A gate of value 1 that multiplies an activation a (B, T, C) channel by channel has the derivative sum_t a * dl/da, with
l a row's mean next-token loss. Its absolute value is the first-order Taylor criterion (Molchanov et al. 2017, eq. 8; a
head's gate adds up its channels, Michel et al. 2019), and rows are joined as those of activations are: their mean, or
the L2 norm, which is the squared criterion of Molchanov et al. 2019. Activations are those of `sites.py`, B and C of
Mamba-2 before their convolution; a block's gate is on what its mixer adds to the residual stream.

Weights need no gradient, so a pass takes the memory of a training pass over a micro-batch without theirs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from halflap.compress.axes import block_of, short_name
from halflap.compress.check import check_scores
from halflap.compress.importance import Importance, Scoring
from halflap.compress.partial import NOWHERE, Scratch, Sums, resumable
from halflap.compress.sites import Site, sites
from halflap.compress.watch import BATCHES, activation, widths_of
from halflap.data.batch import Batch
from halflap.errors import HalflapError
from halflap.models.model import HybridModel
from halflap.ops.vocabulary_loss import cross_entropy_sum
from halflap.progress import Progress


def taylor(
    model: HybridModel,
    batches: Sequence[Batch],
    scorings: Sequence[Scoring],
    scratch: Scratch = NOWHERE,
    seed: int = 0,
) -> list[Importance]:
    """Scores of each scoring, and of blocks, from one forward and backward pass over the batches.

    `Scoring.sequence` has no say here, and "flap" has no gradient: it is refused by the recipe. A block's score is the
    mean over rows whatever `Scoring.batch` says.
    """
    del seed
    sums: Sums = {}
    ways = sorted({scoring.batch for scoring in scorings} | {"mean"})
    progress = Progress("score gradients", len(batches), unit="batches")
    with progress, _gradients_of_activations(model):
        for batch in resumable(batches, sums, "taylor", scratch, progress, model.embedding.weight.device):
            for key, gates in _gates(model, batch, scorings):
                for way in ways:
                    _add(sums, f"{key}|{way}", BATCHES[way][0](gates.abs()).sum(0))
            counts = (batch.weights > 0).sum(1)
            _add(sums, "rows", (counts > 0).sum().double())
            _add(sums, "tokens", counts.sum().double())
            progress.advance()
            if not all(bool(total.isfinite().all()) for total in sums.values()):
                check_scores(activation(model, [batch], [Scoring()])[0], model.config)  # gradients do not say where
                break
    return _results(model, scorings, sums)


def _add(sums: Sums, name: str, value: Tensor) -> None:
    sums[name] = sums[name] + value if name in sums else value


@contextmanager
def _gradients_of_activations(model: HybridModel) -> Iterator[None]:
    """Gradients reach every activation and no weight."""
    wanted = [parameter.requires_grad for parameter in model.parameters()]
    model.requires_grad_(False)
    handle = model.embedding.register_forward_hook(lambda _, args, output: output.requires_grad_())
    try:
        with torch.enable_grad():
            yield
    finally:
        handle.remove()
        for parameter, flag in zip(model.parameters(), wanted, strict=True):
            parameter.requires_grad_(flag)


def _gates(model: HybridModel, batch: Batch, scorings: Sequence[Scoring]) -> Iterator[tuple[str, Tensor]]:
    """Derivatives of every row's loss for its gates: (B, C) of each site, (B, heads) of queries, (B, 1) of blocks."""
    seen: dict[tuple[Any, bool], Tensor] = {}
    mixers = [Site(f"blocks.{index}", "", block.mixer, True) for index, block in enumerate(model.blocks)]  # type: ignore[arg-type]
    watched = [*sites(model, scorings), *mixers]
    handles = [site.hook(partial(seen.__setitem__, (site.module, site.is_output))) for site in watched]
    try:
        loss = _loss(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    gradients = dict(zip(seen, torch.autograd.grad(loss, list(seen.values())), strict=True))
    for site in watched:
        place = site.module, site.is_output
        gates = _products(seen[place].detach()[..., site.channels], gradients[place][..., site.channels])
        yield site.key, _joined(model, site, gates)


def _joined(model: HybridModel, site: Site, gates: Tensor) -> Tensor:
    """One gate for all channels of a query head, and for all of a block."""
    axis = short_name(site.name)
    if axis == "query":
        attention = model.config.blocks[block_of(site.name) or 0].attention
        assert attention is not None
        return gates.unflatten(-1, (attention.num_attention_heads, -1)).sum(-1)
    return gates.sum(-1, keepdim=True) if axis.isdigit() else gates


def _loss(model: HybridModel, batch: Batch) -> Tensor:
    """Sum over rows of their mean next-token losses."""
    weights = batch.weights / batch.weights.sum(1, keepdim=True).clamp_min(torch.finfo(batch.weights.dtype).tiny)
    hidden = model.hidden_states(batch.tokens, segments=batch.segments).flatten(0, 1)
    return cross_entropy_sum(hidden, model.head_weight, batch.targets.flatten(), weights.flatten())


def _products(a: Tensor, gradient: Tensor) -> Tensor:
    """Sums over time (B, C) of a * gradient, row by row, added up in float32 or wider."""
    wide = torch.promote_types(a.dtype, torch.float32)
    rows = zip(a, gradient, strict=True)
    return torch.stack([(one.to(wide) * other.to(wide)).sum(0) for one, other in rows]).double()


def _results(model: HybridModel, scorings: Sequence[Scoring], sums: Sums) -> list[Importance]:
    rows = sums.get("rows")
    if rows is None or not rows:
        raise HalflapError("no calibration text was read, so nothing can be scored; give at least one document")

    def found(way: str, name: str, source: str) -> Tensor:
        return BATCHES[way][1](sums[f"{name}@{source}|{way}"], sums["rows"])

    blocks = torch.cat([found("mean", f"blocks.{index}", "") for index in range(len(model.blocks))])
    common = Importance("taylor", {}, {"taylor": blocks.float().cpu()}, tokens=int(sums["tokens"]))
    return [
        dataclasses.replace(
            common, widths=widths_of(model, scoring, partial(found, scoring.batch)), scoring=_fields(scoring)
        )
        for scoring in scorings
    ]


def _fields(scoring: Scoring) -> dict[str, str]:
    return {name: value for name, value in dataclasses.asdict(scoring).items() if name != "sequence"}
