"""From scores and target sizes to kept indices: group-aware and nested, ties to the lower index, kept in order.

Mamba heads are bound to their group (its B, C and norm), so they are ranked within it, and all heads of a block share
one set of channels. Nested (Taghibakhshi et al. 2025, section 3): channels are ranked over all heads first, and
heads then by their kept channels only. So are hybrid heads, where query heads stand in the group of their key/value
head. Key/value heads and value channels that several blocks read are ranked by the sum over these blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from halflap.compress.axes import (
    Sizes,
    check_sizes,
    counts_by_type,
    depth_units,
    kept_after,
    readers_of,
    target_counts,
)
from halflap.compress.correction import norms
from halflap.compress.importance import Importance
from halflap.compress.kinds import SHARED, Change, axis_name, block_counts, owner
from halflap.compress.library import Variant
from halflap.compress.plan import Kept, PruningPlan, Row, kept_indices
from halflap.compress.prune import dim_indices
from halflap.errors import HalflapError
from halflap.models.config import (
    AttentionConfig,
    BlockConfig,
    HybridConfig,
    LinearConfig,
    Mamba1Config,
    Mamba2Config,
    MLPConfig,
    ModelConfig,
)
from halflap.models.layout import layout

Widths = Mapping[str, Tensor]
"""Scores of `Importance.widths`."""

# Of several depth scores in a file that does not say which one ranks: removal says more than influence.
DEPTH_ORDER: tuple[str, ...] = (
    *("kl", "loss", "logit_mse", "hidden_mse", "taylor", "block_influence", "weight_norm", "random"),
)


def plan_for(
    importance: Importance,
    teacher: str,
    config: ModelConfig,
    sizes: Sizes,
    norm_correction: str = "masked",
    keep_kinds: bool = False,
) -> PruningPlan:
    """The plan that reaches the sizes and keeps what scores highest; keep_kinds: as of `drop_order`.

    Raises HalflapError on sizes that cannot be.
    """
    check_sizes(config, sizes)
    by_block = dict.fromkeys(kept_blocks(importance, config, sizes, keep_kinds), sizes)
    return plan_by_block(importance, teacher, config, by_block, norm_correction, hidden_size=sizes.hidden_size)


def plan_by_block(
    importance: Importance,
    teacher: str,
    config: ModelConfig,
    sizes: Mapping[int, Sizes],
    norm_correction: str = "masked",
    *,
    hidden_size: int | None = None,
    changes: Mapping[int, Change] | None = None,
) -> PruningPlan:
    """The plan that keeps these blocks, each at sizes of its own; those that share keys and values agree in theirs."""
    blocks = tuple(sorted(sizes))
    keep: dict[str, Kept] = {}
    hidden = hidden_size or config.hidden_size
    if hidden < config.hidden_size:
        keep["hidden"] = _row(top(importance.widths["hidden"].sum(0), hidden))
    keep |= _rank_shared(importance.widths, config, sizes)
    for index in blocks:
        block = config.blocks[index]
        keep |= RANKERS[type(block)](importance.widths, index, block, target_counts(block, sizes[index]), keep)
    dropped = {}
    if norm_correction == "calibrated":
        dropped = dropped_energy(importance, config, blocks, keep)
    return PruningPlan(teacher, config, blocks, keep, norm_correction, dropped, importance.digest, changes or {})


def plan_of_variants(
    importance: Importance, teacher: str, config: ModelConfig, variants: Sequence[Variant], norm_correction: str
) -> PruningPlan:
    """The plan that makes of each block its variant."""
    kept = {index: variant for index, variant in enumerate(variants) if not variant.dropped}
    sizes = {index: variant.sizes for index, variant in kept.items()}
    changes = {index: variant.change for index, variant in kept.items()}
    return plan_by_block(importance, teacher, config, sizes, norm_correction, changes=changes)


def top(scores: Tensor, count: int) -> Tensor:
    """Indices (..., count), ascending, of the largest scores along the last dimension."""
    return torch.sort(scores, dim=-1, descending=True, stable=True).indices[..., :count].sort(dim=-1).values


# ---- depth


def kept_blocks(importance: Importance, config: ModelConfig, sizes: Sizes, keep_kinds: bool = False) -> Row:
    """Blocks that stay, ascending: all but `drop_blocks`, or of all or of each type as many as asked, the best."""
    by_type = bool(counts_by_type(sizes))
    ranked = by_type or sizes.num_blocks not in (None, len(config.blocks))
    return kept_after(config, sizes, drop_order(importance, config, by_type, keep_kinds) if ranked else None)


def drop_order(importance: Importance, config: ModelConfig, by_type: bool = False, keep_kinds: bool = False) -> Row:
    """All blocks, the least important first; blocks of one layer together, by the sum of their scores.

    A block whose keys and values others read goes after them. keep_kinds: the best of every kind goes last of all, as a
    search chooses that is asked for a budget and not for a depth: without any attention, say, a model is another kind
    of model, which stock transformers cannot decode with a cache. `by_type`: for counts of each type; see
    `ranks_blocks`.
    """
    metric = ranks_blocks(importance, by_type)
    if metric is None:
        raise HalflapError(
            "the importance file has no score of whole blocks, so none can be dropped; run `halflap score` again with "
            "--depth-metric, or name them with --sizes.drop-blocks"
        )
    return rank_blocks(importance.depth[metric].tolist(), config, importance.removed, keep_kinds)


def ranks_blocks(importance: Importance, by_type: bool = False) -> str | None:
    """Which score ranks blocks: the one that the file names, else the first that there is; None where there is none.

    `by_type`: for counts of each type, MiniPuzzle's is the first: final hidden states, by ranks within each row.
    """
    order = ("hidden_mse_rank", "hidden_mse", *DEPTH_ORDER) if by_type else DEPTH_ORDER
    return importance.depth_metric or next((name for name in order if name in importance.depth), None)


def rank_blocks(scores: Sequence[float], config: ModelConfig, removed: Row = (), keep_kinds: bool = False) -> Row:
    """`drop_order` by these scores (L,), after the blocks that are removed already."""
    units = [unit for unit in depth_units(config) if not {*unit} & {*removed}]
    units.sort(key=lambda unit: sum(scores[index] for index in unit))
    if keep_kinds:
        best = {type(config.blocks[index]): unit for unit in units for index in unit}
        units.sort(key=lambda unit: unit in best.values())  # stable
    return (*removed, *(index for unit in _readers_first(units, config, removed) for index in unit))


def _readers_first(units: Sequence[Row], config: ModelConfig, removed: Row) -> list[Row]:
    """In this order, but that a unit waits for those that read its keys and values."""
    readers, waiting = readers_of(config), list(units)
    ordered: list[Row] = []
    while waiting:
        gone = {*removed, *(index for unit in ordered for index in unit)}
        unit = next(u for u in waiting if all({*readers.get(index, ())} <= gone | {*u} for index in u))
        waiting.remove(unit)
        ordered.append(unit)
    return ordered


# ---- width


def nested_ranking(scores: Tensor, heads: int, channels: int) -> tuple[Tensor, Tensor]:
    """Kept heads (G, heads) of each group, and kept channels (channels,) of all of them, from scores (G, H/G, P)."""
    kept_channels = top(torch.linalg.vector_norm(scores.double(), dim=(0, 1)), channels)
    by_head = torch.linalg.vector_norm(scores.double()[..., kept_channels], dim=-1)
    return top(by_head, heads), kept_channels


def _rank_mamba2(
    widths: Widths, index: int, block: Mamba2Config, count: Mapping[str, int], keep: Mapping[str, Kept]
) -> dict[str, Kept]:
    del keep
    prefix, found = f"blocks.{index}", dict[str, Kept]()
    if count["head"] < block.heads_per_group or count["channel"] < block.head_dim:
        heads, channels = nested_ranking(widths[f"{prefix}.inner"], count["head"], count["channel"])
        found = {f"{prefix}.head": _table(heads), f"{prefix}.channel": _row(channels)}
    if count["state"] < block.state_size:
        found[f"{prefix}.state"] = _table(top(widths[f"{prefix}.state"], count["state"]))
    return found


def _rank_shared(widths: Widths, config: ModelConfig, sizes: Mapping[int, Sizes]) -> dict[str, Kept]:
    """Key/value heads and value channels, the latter first, of every block that has its own."""
    keep: dict[str, Kept] = {}
    for index in sorted(sizes):
        block = config.blocks[index]
        if block.attention is None or owner(block, index) != index:
            continue
        own, count = block_counts(block), target_counts(block, sizes[index])
        cut = {axis for axis in SHARED & own.keys() if count[axis] < own[axis]}
        readers = [other for other in sizes if owner(config.blocks[other], other) == index] if cut else []
        scores = [_head_channels(widths, other).double() for other in readers]
        if "value_channel" in cut:
            total = torch.stack([torch.linalg.vector_norm(score, dim=(0, 1)) for score in scores]).sum(0)
            keep[f"blocks.{index}.value_channel"] = _row(channels := top(total, count["value_channel"]))
            scores = [score[..., channels] for score in scores]
        if "kv" in cut:
            total = torch.stack([torch.linalg.vector_norm(score, dim=(1, 2)) for score in scores]).sum(0)
            keep[f"blocks.{index}.kv"] = _row(top(total, count["kv"]))
    return keep


def _head_channels(widths: Widths, index: int) -> Tensor:
    """Scores (K, H/K, P) of query heads by output channel; of plain attention (K, H/K, 1)."""
    hybrid = widths.get(f"blocks.{index}.inner")
    return widths[f"blocks.{index}.query"][..., None] if hybrid is None else hybrid


def _rank_queries(
    widths: Widths, index: int, block: BlockConfig, count: Mapping[str, int], keep: Mapping[str, Kept]
) -> dict[str, Kept]:
    """By the kept channels, within the kept key/value heads."""
    if count["query"] == block_counts(block)["query"]:
        return {}
    scores = _head_channels(widths, index).double()
    for dim, axis in enumerate(("kv", "query", "value_channel")):
        if axis != "query" and (kept := keep.get(axis_name(block, index, axis))) is not None:
            scores = scores.index_select(dim, torch.tensor(kept))
    return {f"blocks.{index}.query": _table(top(torch.linalg.vector_norm(scores, dim=-1), count["query"]))}


def _rank_hybrid(
    widths: Widths, index: int, block: HybridConfig, count: Mapping[str, int], keep: Mapping[str, Kept]
) -> dict[str, Kept]:
    found = _rank_queries(widths, index, block, count, keep)
    if count["state"] < block.ssm.state_size:
        scores = widths[f"blocks.{index}.state"]
        if isinstance(block.ssm, Mamba1Config):
            found[f"blocks.{index}.state"] = _row(top(scores, count["state"]))
        else:
            groups: Any = keep.get(axis_name(block, index, "kv"), range(len(scores)))
            found[f"blocks.{index}.state"] = _table(top(scores[list(groups)], count["state"]))
    return found


def _rank_rows(
    widths: Widths, index: int, block: BlockConfig, count: Mapping[str, int], keep: Mapping[str, Kept]
) -> dict[str, Kept]:
    """Axes that are ranked by themselves."""
    del keep
    cut = [axis for axis, own in block_counts(block).items() if count[axis] < own]
    return {f"blocks.{index}.{axis}": _row(top(widths[f"blocks.{index}.{axis}"], count[axis])) for axis in cut}


RANKERS: dict[type, Callable[..., dict[str, Kept]]] = {
    Mamba2Config: _rank_mamba2,
    Mamba1Config: _rank_rows,
    AttentionConfig: _rank_queries,
    HybridConfig: _rank_hybrid,
    MLPConfig: _rank_rows,
    LinearConfig: _rank_rows,
}


def _row(indices: Tensor) -> Row:
    return tuple(indices.tolist())


def _table(indices: Tensor) -> tuple[Row, ...]:
    return tuple(tuple(row) for row in indices.tolist())


# ---- energy, for the calibrated norm correction


def dropped_energy(
    importance: Importance, config: ModelConfig, blocks: Row, keep: Mapping[str, Kept]
) -> dict[str, tuple[float, ...]]:
    """What every cut norm loses (see `correction.Dropped`), as the calibration text has it; empty if not measured."""
    dropped: dict[str, tuple[float, ...]] = {}
    shape = PruningPlan("", config, blocks, keep, "none").student
    table = layout(config)
    for norm in norms(config, shape, blocks):
        energy = importance.energy.get(norm.name)
        if norm.kept == norm.total or energy is None:
            continue
        kept = energy.double().flatten()[dim_indices(table[norm.name][0], keep)]
        if norm.bias is not None:  # the student's norm subtracts this mean, so its square is lost too
            mean = float(importance.mean[norm.bias].double()[dim_indices(table[norm.bias][0], keep)].mean())
            dropped[norm.bias] = (mean,)
            kept = kept - mean**2
        whole = energy.double()[None]
        if norm.groups > 1:
            whole = energy.double()[list(kept_indices(table[norm.name][0][0][0], keep))]
        dropped[norm.name] = tuple(map(_lost, whole.flatten(1), kept.reshape(norm.groups, -1)))
    return dropped


def _lost(whole: Tensor, kept: Tensor) -> float:
    total = float(whole.double().sum())
    return max(0.0, 1 - float(kept.double().sum()) / total) if total > 0 else 0.0
