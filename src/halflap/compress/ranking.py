"""From scores and target sizes to kept indices: group-aware and nested, ties to the lower index, kept in order.

Mamba heads are bound to their group (its B, C and norm), so they are ranked within it, and all heads of a block share
one set of channels. Nested (Taghibakhshi et al. 2025, section 3): channels are ranked over all heads first, and
heads then by their kept channels only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from halflap.compress.axes import Sizes, block_counts, check_sizes, depth_units, target_counts
from halflap.compress.importance import Importance
from halflap.compress.plan import Kept, PruningPlan, Row
from halflap.errors import HalflapError
from halflap.models.config import AttentionConfig, BlockConfig, Mamba2Config, MLPConfig, ModelConfig

# Of several depth scores in a file, the first of these is used: removal says more than influence (spec section 2.2).
DEPTH_ORDER: tuple[str, ...] = ("kl", "loss", "logit_mse", "hidden_mse", "block_influence", "weight_norm", "random")


def plan_for(
    importance: Importance, teacher: str, config: ModelConfig, sizes: Sizes, norm_correction: str = "masked"
) -> PruningPlan:
    """The plan that reaches the sizes and keeps what scores highest. Raises HalflapError on sizes that cannot be."""
    check_sizes(config, sizes)
    blocks = kept_blocks(importance, config, sizes)
    keep: dict[str, Kept] = {}
    hidden = sizes.hidden_size or config.hidden_size
    if hidden < config.hidden_size:
        keep["hidden"] = _row(top(importance.widths["hidden"].sum(0), hidden))
    for index in blocks:
        block = config.blocks[index]
        keep |= RANKERS[type(block)](importance.widths, f"blocks.{index}", block, target_counts(block, sizes))
    dropped = dropped_energy(importance, config, blocks, keep) if norm_correction == "calibrated" else {}
    return PruningPlan(teacher, config, blocks, keep, norm_correction, dropped, importance.digest)


def top(scores: Tensor, count: int) -> Tensor:
    """Indices (..., count), ascending, of the largest scores along the last dimension."""
    return torch.sort(scores, dim=-1, descending=True, stable=True).indices[..., :count].sort(dim=-1).values


# ---- depth


def kept_blocks(importance: Importance, config: ModelConfig, sizes: Sizes) -> Row:
    """Blocks that stay, ascending: all but `drop_blocks`, or the `num_blocks` that score highest."""
    everything = tuple(range(len(config.blocks)))
    if sizes.drop_blocks:
        return tuple(index for index in everything if index not in sizes.drop_blocks)
    if sizes.num_blocks is None or sizes.num_blocks == len(everything):
        return everything
    dropped = drop_order(importance, config)[: len(everything) - sizes.num_blocks]
    return tuple(index for index in everything if index not in dropped)


def drop_order(importance: Importance, config: ModelConfig) -> Row:
    """All blocks, the least important first; blocks of one layer together, by the sum of their scores.

    The best of every kind goes last of all: without any attention, say, a model is another kind of model, which stock
    transformers cannot decode with a cache.
    """
    metric = next((name for name in DEPTH_ORDER if name in importance.depth), None)
    if metric is None:
        raise HalflapError(
            "the importance file has no score of whole blocks, so none can be dropped; run `halflap score` again with "
            "--depth-metric, or name them with --sizes.drop-blocks"
        )
    scores = importance.depth[metric].tolist()
    units = sorted(depth_units(config), key=lambda unit: sum(scores[index] for index in unit))
    best = {type(config.blocks[index]): unit for unit in units for index in unit}
    units.sort(key=lambda unit: unit in best.values())  # stable
    return tuple(index for unit in units for index in unit)


# ---- width


def nested_ranking(scores: Tensor, heads: int, channels: int) -> tuple[Tensor, Tensor]:
    """Kept heads (G, heads) of each group, and kept channels (channels,) of all of them, from scores (G, H/G, P)."""
    kept_channels = top(torch.linalg.vector_norm(scores.double(), dim=(0, 1)), channels)
    by_head = torch.linalg.vector_norm(scores.double()[..., kept_channels], dim=-1)
    return top(by_head, heads), kept_channels


def _rank_mamba2(
    widths: Mapping[str, Tensor], prefix: str, block: BlockConfig, count: Mapping[str, int]
) -> dict[str, Kept]:
    assert isinstance(block, Mamba2Config)
    keep: dict[str, Kept] = {}
    if count["head"] < block.heads_per_group or count["channel"] < block.head_dim:
        heads, channels = nested_ranking(widths[f"{prefix}.inner"], count["head"], count["channel"])
        keep = {f"{prefix}.head": _table(heads), f"{prefix}.channel": _row(channels)}
    if count["state"] < block.state_size:
        keep[f"{prefix}.state"] = _table(top(widths[f"{prefix}.state"], count["state"]))
    return keep


def _rank_attention(
    widths: Mapping[str, Tensor], prefix: str, block: BlockConfig, count: Mapping[str, int]
) -> dict[str, Kept]:
    assert isinstance(block, AttentionConfig)
    if count == block_counts(block):
        return {}
    scores, keep = widths[f"{prefix}.query"], dict[str, Kept]()
    if count["kv"] < block.num_key_value_heads:
        kv = top(torch.linalg.vector_norm(scores.double(), dim=-1), count["kv"])
        scores, keep[f"{prefix}.kv"] = scores[kv], _row(kv)
    if count["query"] < block.queries_per_key_value_head:
        keep[f"{prefix}.query"] = _table(top(scores, count["query"]))
    return keep


def _rank_mlp(
    widths: Mapping[str, Tensor], prefix: str, block: BlockConfig, count: Mapping[str, int]
) -> dict[str, Kept]:
    assert isinstance(block, MLPConfig)
    if count["neuron"] == block.intermediate_size:
        return {}
    return {f"{prefix}.neuron": _row(top(widths[f"{prefix}.neuron"], count["neuron"]))}


RANKERS: dict[type, Callable[..., dict[str, Kept]]] = {
    Mamba2Config: _rank_mamba2,
    AttentionConfig: _rank_attention,
    MLPConfig: _rank_mlp,
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
    if "hidden" in keep:
        for name in [*(f"blocks.{index}.norm" for index in blocks), "norm"]:
            energy, means = importance.energy.get(f"{name}.weight"), importance.mean.get(f"{name}.bias")
            if energy is None:
                continue
            kept = energy[list(keep["hidden"])]
            if means is not None:  # the student's norm subtracts this mean, so its square is lost too
                mean = float(means[list(keep["hidden"])].double().mean())
                dropped[f"{name}.bias"] = (mean,)
                kept = kept.double() - mean**2
            dropped[f"{name}.weight"] = (_lost(energy, kept),)
    for index in blocks:
        block, name = config.blocks[index], f"blocks.{index}.mixer.norm.weight"
        energy = importance.energy.get(name)
        cut = f"blocks.{index}.head" in keep or f"blocks.{index}.channel" in keep
        if isinstance(block, Mamba2Config) and energy is not None and cut:
            heads: Any = keep.get(f"blocks.{index}.head", (tuple(range(block.heads_per_group)),) * block.num_groups)
            channels: Any = keep.get(f"blocks.{index}.channel", tuple(range(block.head_dim)))
            dropped[name] = tuple(
                _lost(own, own[list(row)][:, list(channels)]) for own, row in zip(energy, heads, strict=True)
            )
    return dropped


def _lost(whole: Tensor, kept: Tensor) -> float:
    total = float(whole.double().sum())
    return max(0.0, 1 - float(kept.double().sum()) / total) if total > 0 else 0.0
