"""What the removal of one block does to the model: scores (L,) of whole blocks, one metric at a time.

A block is removed by letting the residual stream pass it by; those that read its keys and values still do, and meta
tokens, which have no targets, count nowhere. Blocks before it are not run again: the stream is carried forward once and
every removal continues from there, so L scores cost about L / 2 passes.

    kl           mean over tokens of KL(p_full || p_without)                    Taghibakhshi et al. 2025
    loss         loss without the block minus loss with it                      Muralidharan et al. 2024
    hidden_mse   mean squared difference of what the language head reads        Nemotron-H (MiniPuzzle)
    logit_mse    sum (z_full - z_without)^2 / sum z_full^2
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from halflap.data.batch import Batch
from halflap.errors import HalflapError
from halflap.models.meta import at_places, text_places
from halflap.models.model import HybridModel
from halflap.ops.vocabulary_loss import cross_entropy_sum, kl_divergence_sum
from halflap.progress import Progress

ROWS = 1024  # tokens whose logits are held at once

DepthMetric = Callable[[Tensor, Tensor, Tensor, Batch], float]
"""(full, without) final hidden states (M, D) of the tokens that count, head (V, D), batch -> sum over tokens."""


def depth_scores(model: HybridModel, batches: Iterable[Batch], metric: str = "kl") -> Tensor:
    """Scores (L,) float32 by a row of `DEPTH_METRICS`, a mean over the tokens of all batches; higher is kept."""
    if metric not in DEPTH_METRICS:
        raise HalflapError(
            f"depth metric {metric!r} is not known; allowed are block_influence, {', '.join(DEPTH_METRICS)}: "
            "correct --depth-metric"
        )
    batches = list(batches)
    totals = torch.zeros(len(model.blocks), dtype=torch.float64)
    count = 0.0
    progress = Progress(f"remove blocks ({metric})", len(batches) * len(model.blocks), unit="passes")
    with torch.inference_mode(), progress:
        for batch in batches:
            full, stream, context = _full_pass(model, batch)
            meta = model.config.num_meta_tokens
            places = text_places(batch.tokens, batch.segments, meta) if meta else None
            for index, block in enumerate(model.blocks):
                with_it = block(stream, context)  # first, for the keys and values that later blocks read
                without = _counted(_finish(model, stream, context, index + 1, places), batch)
                totals[index] += DEPTH_METRICS[metric](_counted(full, batch), without, model.head_weight, batch)
                stream = with_it
                progress.advance()
            count += float(batch.weights.sum())
    if not count:
        raise HalflapError("no calibration text was read, so no block can be scored; give at least one document")
    return (totals / count).float()


def _full_pass(model: HybridModel, batch: Batch) -> tuple[Tensor, Tensor, Any]:
    """Final hidden states, and what the first block was given: the stream (B, T, D) and the pass's context."""
    given: list[Any] = []
    handle = model.blocks[0].register_forward_pre_hook(lambda _, args: given.extend(args[:2]))
    try:
        full = model.hidden_states(batch.tokens, segments=batch.segments)
    finally:
        handle.remove()
    return full, given[0], given[1]


def _finish(model: HybridModel, stream: Tensor, context: Any, start: int, places: Tensor | None) -> Tensor:
    """Final hidden states (B, T, D) from the stream into block `start`; places: of the tokens between meta tokens."""
    for block in list(model.blocks)[start:]:
        stream = block(stream, context)
    if places is not None:
        stream = at_places(stream, places)
    return model.norm(stream).to(model.norm.weight.dtype)


def _counted(hidden: Tensor, batch: Batch) -> Tensor:
    """Rows (M, D) of the tokens that have a target."""
    return hidden[batch.weights > 0]


def _kl(full: Tensor, without: Tensor, head: Tensor, batch: Batch) -> float:
    weights = batch.weights[batch.weights > 0]
    return float(kl_divergence_sum(without, head, full, head, weights))


def _loss(full: Tensor, without: Tensor, head: Tensor, batch: Batch) -> float:
    used = batch.weights > 0
    before, after = (cross_entropy_sum(h, head, batch.targets[used], batch.weights[used]) for h in (full, without))
    return float(after - before)


def _hidden_mse(full: Tensor, without: Tensor, head: Tensor, batch: Batch) -> float:
    del head
    difference = (full - without).double().square().mean(-1)
    return float(difference @ batch.weights[batch.weights > 0].double())


def _logit_mse(full: Tensor, without: Tensor, head: Tensor, batch: Batch) -> float:
    """The ratio of a batch, weighted by its tokens."""
    changed = scale = 0.0
    for one, other in zip(full.split(ROWS), without.split(ROWS), strict=True):
        changed += float(F.linear(one - other, head).double().square().sum())
        scale += float(F.linear(one, head).double().square().sum())
    return changed / scale * float(batch.weights.sum())


DEPTH_METRICS: dict[str, DepthMetric] = {"kl": _kl, "loss": _loss, "hidden_mse": _hidden_mse, "logit_mse": _logit_mse}
