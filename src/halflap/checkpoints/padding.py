"""Unequal blocks padded with zeros to equal widths, so that the stock classes, which have one width a kind, load them.

A padded neuron, query head, Mamba head, channel or state has zero weights and adds nothing. Only a Mamba block's gated
norm notices: its mean runs over more channels, so with `kept` of `total` its gain times sqrt(kept / total) and its eps
times kept / total give the same output. The stock class has one eps for all norms; where that of a padded block would
differ, the common one is kept and the difference, of the order of eps, is measured by `halflap export`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from halflap.errors import HalflapError
from halflap.models.config import AttentionConfig, BlockConfig, Mamba2Config, MLPConfig, ModelConfig
from halflap.models.layout import Dim, dim_size, layout, shape

# What a kind's blocks may differ in and be padded to the largest of. Heads grow within their group, so groups cannot.
WIDTHS: dict[type, tuple[str, ...]] = {
    AttentionConfig: ("num_attention_heads",),
    Mamba2Config: ("num_heads", "head_dim", "state_size"),
    MLPConfig: ("intermediate_size",),
}


def padded_config(config: ModelConfig) -> ModelConfig:
    """The config with every kind's widths at their largest. Raises HalflapError for what zeros cannot make equal."""
    blocks: list[BlockConfig] = []
    for block in config.blocks:
        kind = [other for other in config.blocks if type(other) is type(block)]
        largest = {name: max(getattr(other, name) for other in kind) for name in WIDTHS.get(type(block), ())}
        blocks.append(dataclasses.replace(block, **largest))
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
    alike = (dataclasses.replace(b, norm_eps=eps) if isinstance(b, Mamba2Config) else b for b in blocks)
    return dataclasses.replace(config, blocks=tuple(alike))


def _without_eps(block: BlockConfig) -> BlockConfig:
    return dataclasses.replace(block, norm_eps=0.0) if isinstance(block, Mamba2Config) else block


def pad_tensors(
    config: ModelConfig, padded: ModelConfig, tensors: Iterable[tuple[str, Tensor]]
) -> Iterator[tuple[str, Tensor]]:
    """The tensors of `padded` from those of `config`, one at a time; what is equal in size passes through."""
    small, large = layout(config), layout(padded)
    for name, tensor in tensors:
        result = pad(tensor, small[name], large[name])
        yield name, result * _gain(config, padded, name)


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
    before, after = config.blocks[int(parts[1])], padded.blocks[int(parts[1])]
    assert isinstance(before, Mamba2Config) and isinstance(after, Mamba2Config)
    return math.sqrt(before.inner_size / after.inner_size)
