"""Unequal blocks padded with zeros to equal widths, so that the stock classes, which have one width a kind, load them.

Where a layer of a stock class is attention and MLP and one of them is gone, a block of zeros stands in its place. A
padded neuron, query head, key/value head, Mamba head, group, channel or state has zero weights and adds nothing. Only a
Mamba block's gated norm notices when a group grows: its mean runs over more channels, so with `kept` of `total` in a
group its gain times sqrt(kept / total) and its eps times kept / total give the same output. The stock class has one eps
for all norms, and nothing else can stand in for it: what the norm reads has passed SiLUs, so no weight scales it. There
the common eps is kept, and the difference, of the order of eps, is measured by `halflap export`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import torch
from torch import Tensor

from halflap.checkpoints.config import family_of
from halflap.errors import HalflapError
from halflap.models.config import AttentionConfig, BlockConfig, Mamba2Config, MLPConfig, ModelConfig
from halflap.models.layout import Dim, dim_size, layout, shape

# What a kind's blocks may differ in and be padded to the largest of.
WIDTHS: dict[type, tuple[str, ...]] = {
    AttentionConfig: (),
    Mamba2Config: ("head_dim", "state_size"),
    MLPConfig: ("intermediate_size",),
}
# Heads sit in groups: both the number of groups and the heads of each grow to the largest.
GROUPED: dict[type, tuple[str, str]] = {
    AttentionConfig: ("num_key_value_heads", "num_attention_heads"),
    Mamba2Config: ("num_groups", "num_heads"),
}
LAYER = AttentionConfig, MLPConfig
"""What a layer of a stock Transformer is made of, in this order."""
SEARCHED = 4  # how many times the fewest heads are tried for a number that divides the hidden size


def padded_config(config: ModelConfig) -> ModelConfig:
    """The config with every kind's widths at their largest and all layers whole.

    Raises HalflapError for what zeros cannot make equal.
    """
    blocks: list[BlockConfig] = []
    for block in config.blocks:
        kind = [other for other in config.blocks if type(other) is type(block)]
        largest = {name: max(getattr(other, name) for other in kind) for name in WIDTHS.get(type(block), ())}
        blocks.append(dataclasses.replace(block, **largest, **_heads(config, kind)))
    for kind in WIDTHS:
        forms = {block for block in blocks if type(block) is kind}
        if len({_without_eps(block) for block in forms}) > 1:
            one, other = (dataclasses.asdict(block) for block in sorted(forms, key=str)[:2])
            field = next(name for name in one if one[name] != other[name])
            raise HalflapError(
                f"{kind.kind} blocks differ in {field} ({one[field]} and {other[field]}), which zeros cannot make "
                "equal; keep the checkpoint as it is and run it in halflap"
            )
    eps = config.norm_eps
    alike = [dataclasses.replace(b, norm_eps=eps) if isinstance(b, Mamba2Config) else b for b in blocks]
    of_kind = {type(block): block for block in alike}
    whole = (of_kind[LAYER[at % 2]] if i is None else alike[i] for at, i in enumerate(_in_layers(config)))
    return dataclasses.replace(config, blocks=tuple(whole))


def _in_layers(config: ModelConfig) -> list[int | None]:
    """The blocks by index, with None where one is missing from a layer of attention and MLP."""
    indices: list[int | None] = []
    pairs = family_of(config).depth_unit == len(LAYER) and {type(block) for block in config.blocks} == {*LAYER}
    for index, block in enumerate(config.blocks):
        if pairs and not isinstance(block, LAYER[len(indices) % 2]):
            indices.append(None)
        indices.append(index)
    return indices + [None] * (pairs and len(indices) % 2)


def _heads(config: ModelConfig, kind: list[BlockConfig]) -> dict[str, int]:
    """Groups and heads for all blocks of a kind: the most groups times the most heads of one."""
    if type(kind[0]) not in GROUPED:
        return {}
    outer, inner = GROUPED[type(kind[0])]
    groups = max(getattr(block, outer) for block in kind)
    each = max(getattr(block, inner) // getattr(block, outer) for block in kind)
    if config.family == "llama":  # whose stock class wants a hidden size that its heads divide
        tried = [(g, n) for g in range(groups, SEARCHED * groups + 1) for n in range(each, SEARCHED * each + 1)]
        fitting = [(g, n) for g, n in tried if config.hidden_size % (g * n) == 0]
        groups, each = min(fitting, key=lambda pair: (pair[0] * pair[1], pair[0]), default=(groups, each))
    return {outer: groups, inner: groups * each}


def widened_norms(config: ModelConfig, padded: ModelConfig) -> int:
    """How many blocks have a gated norm that pads into its groups, so that their output is equal up to eps only."""
    return sum(_kept(before, after) != 1 for before, after in zip(config.blocks, padded.blocks))


def _without_eps(block: BlockConfig) -> BlockConfig:
    return dataclasses.replace(block, norm_eps=0.0) if isinstance(block, Mamba2Config) else block


def own_name(config: ModelConfig, padded: ModelConfig, name: str) -> str | None:
    """What a parameter of the padded model, or of the model itself, is in the model; None in a block of zeros."""
    if len(padded.blocks) == len(config.blocks) or not name.startswith("blocks."):
        return name
    _, at, rest = name.split(".", 2)
    index = _in_layers(config)[int(at)]
    return None if index is None else f"blocks.{index}.{rest}"


def padded_reader(config: ModelConfig, padded: ModelConfig, read: Callable[[str], Tensor]) -> Callable[[str], Tensor]:
    """Gives a parameter of `padded` by its name there, from those of `config` that `read` gives by theirs."""
    small, large = layout(config), layout(padded)

    def read_padded(name: str) -> Tensor:
        own = own_name(config, padded, name)
        if own is None:
            return torch.zeros(shape(large[name]))
        return pad(read(own), small[own], large[name]) * _gain(config, padded, own)

    return read_padded


def pad(tensor: Tensor, small: tuple[Dim, ...], large: tuple[Dim, ...]) -> Tensor:
    """Zeros of the large layout with the tensor in the leading indices of every axis."""
    if shape(small) == shape(large):
        return tensor
    result = tensor
    for dimension, (before, after) in enumerate(zip(small, large)):
        if dim_size(before) != dim_size(after):
            grown = result.new_zeros((*result.shape[:dimension], dim_size(after), *result.shape[dimension + 1 :]))
            result = grown.index_copy_(dimension, _places(before, after), result)
    return result


def _places(small: Dim, large: Dim) -> Tensor:
    """Where each index of a dimension goes, int64."""
    parts, start = [], 0
    for before, after in zip(small, large):
        grid = torch.arange(dim_size((after,))).view([axis.size for axis in after])
        parts.append(start + grid[tuple(slice(axis.size) for axis in before)].reshape(-1))
        start += dim_size((after,))
    return torch.cat(parts)


def _gain(config: ModelConfig, padded: ModelConfig, name: str) -> float:
    parts = name.split(".")
    if parts[0] != "blocks" or parts[2:] != ["mixer", "norm", "weight"]:
        return 1.0
    return math.sqrt(_kept(config.blocks[int(parts[1])], padded.blocks[int(parts[1])]))


def _kept(before: BlockConfig, after: BlockConfig) -> float:
    """The share of a padded group's channels that were there before; 1 for blocks without groups."""
    if not isinstance(before, Mamba2Config) or not isinstance(after, Mamba2Config):
        return 1.0
    return (before.heads_per_group * before.head_dim) / (after.heads_per_group * after.head_dim)
