"""What the removal of one block does to the model: scores of whole blocks, by one metric or by several at once.

A block is removed by letting the residual stream pass it by; those that read its keys and values still do, and meta
tokens, which have no targets, count nowhere. Blocks before it are not run again: the stream is carried forward once and
every removal continues from there, so L scores cost about L / 2 passes.

    kl           mean over tokens of KL(p_full || p_without)                    Taghibakhshi et al. 2025
    loss         loss without the block minus loss with it                      Muralidharan et al. 2024
    hidden_mse   mean squared difference of what the language head reads        Nemotron-H (MiniPuzzle)
    logit_mse    sum (z_full - z_without)^2 / sum z_full^2

Every row is scored by itself. The plain average is over the tokens of all rows; MiniPuzzle averages ranks of rows, so
that no single text decides. One by one, the worst block goes and the rest are scored again, always against the full
model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from halflap.compress.axes import depth_units
from halflap.compress.partial import NOWHERE, Scratch, Sums, resumable
from halflap.compress.plan import Row
from halflap.compress.ranking import rank_blocks
from halflap.data.batch import Batch
from halflap.errors import HalflapError
from halflap.models.config import ModelConfig
from halflap.models.context import SequenceContext
from halflap.models.model import HybridModel
from halflap.ops.vocabulary_loss import cross_entropy_sum, kl_divergence_sum
from halflap.progress import Progress

ROWS = 1024  # tokens whose logits are held at once


class DepthScores(NamedTuple):
    """Scores (L,) float32 of blocks, higher is kept; NaN for blocks that are gone.

    mean  sum over all rows of a metric's numerator by that of its denominator
    rank  mean over rows of how many blocks score lower on the row, from 0 to L - 1
    """

    mean: Tensor
    rank: Tensor


class Removal(NamedTuple):
    """Scores of every block in the last round that had it, and the blocks that went, in that order."""

    scores: DepthScores
    removed: Row


DepthMetric = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], tuple[float, float]]
"""Head (V, D), final hidden states (M, D) with and without the block of a row's tokens that count, their targets and
weights (M,) -> numerator and denominator of the row's score."""


def depth_scores(
    model: HybridModel,
    batches: Sequence[Batch],
    metric: str = "kl",
    *,
    gone: Row = (),
    scratch: Scratch = NOWHERE,
) -> DepthScores:
    """`depth_scores_by` one metric."""
    return depth_scores_by((metric,), model, batches, gone=gone, scratch=scratch)[metric]


def depth_scores_by(
    metrics: Sequence[str],
    model: HybridModel,
    batches: Sequence[Batch],
    *,
    gone: Row = (),
    scratch: Scratch = NOWHERE,
) -> dict[str, DepthScores]:
    """Scores by metrics of `DEPTH_METRICS`, in one go, of the blocks that are left when those of `gone` are removed.

    Raises HalflapError on an unknown metric and without text.
    """
    for metric in metrics:
        if metric not in DEPTH_METRICS:
            raise HalflapError(
                f"depth metric {metric!r} does not remove blocks; those that do are {', '.join(DEPTH_METRICS)}: "
                "correct --depth-metric"
            )
    count, sums, device = len(model.blocks), dict[str, Tensor](), model.embedding.weight.device
    left, names = count - len(gone), "-".join(metrics)
    progress = Progress(title(metrics, gone), len(batches) * left, unit="passes")
    with torch.inference_mode(), progress:
        for batch in resumable(batches, sums, f"depth-{names}-{len(gone)}", scratch, progress, device):
            for metric, rows in _rows_without(model, batch, metrics, gone, progress).items():
                add_rows(sums, metric, *rows)
    return {metric: scores_of(sums, metric, gone) for metric in metrics}


def title(metrics: Sequence[str], gone: Row = ()) -> str:
    """What the progress of removals is called."""
    return f"remove blocks ({', '.join(metrics)}{f'; {len(gone)} gone' if gone else ''})"


def add_rows(sums: Sums, metric: str, over: Tensor, under: Tensor) -> None:
    """Add the numerators and denominators (B, L) of a batch's rows."""
    of_rows = torch.full_like(over, torch.nan).where(under == 0, over / under)
    lower = (of_rows[:, None, :] < of_rows[:, :, None]).sum(2)
    parts = {"over": over, "under": under, "rank": lower.double(), "rows": (under > 0).double()}
    for part, of_part in parts.items():
        name = f"{metric}.{part}"
        sums[name] = sums.get(name, torch.zeros(over.shape[1], dtype=torch.float64)) + of_part.sum(0).cpu()


def scores_of(sums: Sums, metric: str, gone: Row = ()) -> DepthScores:
    """Raises HalflapError without text, and where a block's removal gives NaN or infinity."""
    found = {name: sums.get(f"{metric}.{name}", torch.zeros(0)) for name in ("over", "under", "rank", "rows")}
    if not found["rows"].any():
        raise HalflapError("no calibration text was read, so no block can be scored; give at least one document")
    mean, rank = ((found[a] / found[b]).float() for a, b in (("over", "under"), ("rank", "rows")))  # NaN where gone
    for index in range(len(mean)):
        if index not in gone and not mean[index].isfinite():
            raise HalflapError(
                f"without block {index} the model's outputs are {mean[index]:g} by {metric}; check the weights with "
                "`halflap evaluate`"
            )
    return DepthScores(mean, rank)


def named(scores: Mapping[str, DepthScores]) -> dict[str, Tensor]:
    """Scores by metric as an importance file has them."""
    means = {metric: of.mean for metric, of in scores.items()}
    return means | {f"{metric}_rank": of.rank for metric, of in scores.items()}


def remove_one_by_one(config: ModelConfig, score: Callable[[Row], DepthScores], average: str, count: int) -> Removal:
    """Remove the block, or layer of blocks, that scores least, score the others again, until `count` are removed.

    score: gives the scores of those that are left when others are gone, as `depth_scores` does. average: "mean" or
    "rank", which of them decides, under the rules of `ranking.rank_blocks`. Raises HalflapError on a count that cannot
    be.
    """
    check_count(config, count)
    units = depth_units(config)
    removed: Row = ()
    scores = DepthScores(*(torch.full((len(config.blocks),), torch.nan),) * 2)
    while len(removed) < count:
        found = score(removed)
        scores = DepthScores(*(old.where(new.isnan(), new) for old, new in zip(scores, found, strict=True)))
        following = rank_blocks(getattr(scores, average).tolist(), config, removed)[len(removed)]
        removed += next(unit for unit in units if following in unit)
    return Removal(scores, removed)


def check_count(config: ModelConfig, count: int) -> None:
    """Raise HalflapError unless so many blocks can be removed."""
    total, step = len(config.blocks), len(depth_units(config)[0])
    if not 0 < count < total or count % step:
        raise HalflapError(
            f"depth_iterative is {count}; the model has {total} blocks, which leave in steps of {step}, and at least "
            "one step must stay: correct --depth-iterative"
        )


def _rows_without(
    model: HybridModel, batch: Batch, metrics: Sequence[str], gone: Row, progress: Progress
) -> dict[str, Tensor]:
    """Numerators and denominators (2, B, L) float64 of every row's scores without each block that is left, else 0."""
    full, stream, context = full_pass(model, batch)
    rows = {metric: torch.zeros(2, len(batch.tokens), len(model.blocks), dtype=torch.float64) for metric in metrics}
    for index, block in enumerate(model.blocks):
        if index in gone:
            continue
        with_it = block(stream, context)  # first, for the keys and values that later blocks read
        without = finish(model, stream, context, (*gone, *range(index + 1)))
        for metric in metrics:
            rows[metric][:, :, index] = compare_rows(metric, model.head_weight, full, without, batch)
        stream = with_it
        progress.advance()
    return rows


def compare_rows(metric: str, head: Tensor, full: Tensor, without: Tensor, batch: Batch) -> Tensor:
    """Numerators and denominators (2, B) float64 of the rows' scores, from final hidden states (B, T, D); else 0."""
    used = batch.weights > 0
    found = torch.zeros(2, len(used), dtype=torch.float64)
    for row in used.any(1).nonzero()[:, 0].tolist():
        of_row = (part[row][used[row]] for part in (full, without, batch.targets, batch.weights))
        found[:, row] = torch.tensor(DEPTH_METRICS[metric](head, *of_row), dtype=torch.float64)
    return found


def full_pass(model: HybridModel, batch: Batch) -> tuple[Tensor, Tensor, SequenceContext]:
    """Final hidden states, and what the first block was given: the stream (B, T, D) and the pass's context."""
    hidden, context = model.enter(batch.tokens, batch.segments)
    return finish(model, hidden, context, ()), hidden, context


def finish(model: HybridModel, stream: Tensor, context: SequenceContext, skipped: Row) -> Tensor:
    """Final hidden states (B, T, D) after all blocks but the skipped."""
    for index, block in enumerate(model.blocks):
        if index not in skipped:
            stream = block(stream, context)
    return model.leave(stream, context)


def _kl(head: Tensor, full: Tensor, without: Tensor, targets: Tensor, weights: Tensor) -> tuple[float, float]:
    del targets
    return float(kl_divergence_sum(without, head, full, head, weights)), float(weights.sum())


def _loss(head: Tensor, full: Tensor, without: Tensor, targets: Tensor, weights: Tensor) -> tuple[float, float]:
    before, after = (float(cross_entropy_sum(hidden, head, targets, weights)) for hidden in (full, without))
    return after - before, float(weights.sum())


def _hidden_mse(head: Tensor, full: Tensor, without: Tensor, targets: Tensor, weights: Tensor) -> tuple[float, float]:
    del head, targets
    difference = (full - without).double().square().mean(-1)
    return float(difference @ weights.double()), float(weights.sum())


def _logit_mse(head: Tensor, full: Tensor, without: Tensor, targets: Tensor, weights: Tensor) -> tuple[float, float]:
    del targets, weights
    changed = scale = 0.0
    for one, other in zip(full.split(ROWS), without.split(ROWS), strict=True):
        changed += float(F.linear(one - other, head).double().square().sum())
        scale += float(F.linear(one, head).double().square().sum())
    return changed, scale


DEPTH_METRICS: dict[str, DepthMetric] = {"kl": _kl, "loss": _loss, "hidden_mse": _hidden_mse, "logit_mse": _logit_mse}
