"""The teacher with the cut indices masked: what a student must equal.

Made from the mixers' equations, by setting parameters to zero so that the cut indices carry nothing; it knows nothing
of layouts or of how a plan is applied. Its norms divide by all channels, the zeros included, which is what the
`masked` correction reproduces; for `none` and `calibrated` its gains and eps say that the mean is over the kept ones.
Where norms are LayerNorms, what carries nothing is not zero but the mean of the kept channels (`correction.py`).
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from halflap.compress.axes import block_of, short_name
from halflap.compress.correction import norms
from halflap.compress.plan import PruningPlan
from halflap.models.config import AttentionConfig, Mamba2Config, MLPConfig
from halflap.models.model import HybridModel


def masked_teacher(teacher: HybridModel, plan: PruningPlan) -> HybridModel:
    """A copy of the teacher in which the cut indices carry nothing, whatever the rest does."""
    model = _with_eps(teacher, plan)
    with torch.no_grad():
        hidden = _mask(teacher.config.hidden_size, plan.keep.get("hidden"))
        centred = teacher.config.norm == "layer1p"
        _silence(model.embedding.weight.T, hidden, centred)
        for norm in [model.norm, *(block.norm for block in model.blocks)] if centred else []:
            norm.weight[~hidden], norm.bias[~hidden] = -1, 0  # type: ignore[index]
        for index, block in enumerate(model.blocks):
            kept: dict[str, Any] = {short_name(n): k for n, k in plan.keep.items() if block_of(n) == index}
            mixer: Any = block.mixer
            output = MASKS[type(teacher.config.blocks[index])](mixer, kept)
            heard = hidden if index in plan.keep_blocks else torch.zeros_like(hidden)
            _silence(output.weight, heard, centred)
            if output.bias is not None:
                _silence(output.bias, heard, centred)
    return model


def _silence(rows: Tensor, kept: Tensor, centred: bool) -> None:
    """Rows (D, ...) of the other channels to zero, or to the mean of the kept ones, if any."""
    rows[~kept] = rows[kept].mean(0) if centred and bool(kept.any()) else 0.0


def _with_eps(teacher: HybridModel, plan: PruningPlan) -> HybridModel:
    """A copy whose norms divide by all channels (`masked`) or by the kept ones.

    A mean over all channels, the cut ones zero, is kept / total of the mean over the kept ones: gain * sqrt(kept /
    total) and eps * kept / total make up for it.
    """
    model = copy.deepcopy(teacher)
    if plan.norm_correction == "masked":
        return model
    modules = dict(model.named_modules())
    for norm in norms(plan.teacher_config, plan.student, plan.keep_blocks):
        module: Any = modules[norm.name.removesuffix(".weight")]
        gain = torch.ones_like(module.weight) * (norm.kept / norm.total) ** 0.5
        if norm.name in plan.scales:
            gain *= _spread(plan, norm.name, plan.scales[norm.name], len(gain))
        if norm.bias is None:
            module.weight.data *= gain
        else:
            module.bias.data += (1 + module.weight.data) * plan.dropped.get(norm.bias, (0.0,))[0]
            module.weight.data = (1 + module.weight.data) * gain - 1
        if norm.name.endswith("mixer.norm.weight"):
            mixer: Any = modules[norm.name.removesuffix(".norm.weight")]
            mixer.config = dataclasses.replace(mixer.config, norm_eps=mixer.config.norm_eps * norm.kept / norm.total)
        else:
            module.eps = module.eps * norm.kept / norm.total
    return model


def _spread(plan: PruningPlan, name: str, factors: tuple[float, ...], size: int) -> Tensor:
    """Factors of the kept groups at the places of their channels; channels of other groups carry nothing anyway."""
    block = block_of(name)
    config = None if block is None else plan.teacher_config.blocks[block]
    if len(factors) == 1 or not isinstance(config, Mamba2Config):
        return torch.full((size,), factors[0], dtype=torch.float64)
    spread = torch.ones(config.num_groups, size // config.num_groups, dtype=torch.float64)
    groups: Any = plan.keep.get(f"blocks.{block}.group", tuple(range(config.num_groups)))
    spread[list(groups)] = torch.tensor(factors, dtype=torch.float64)[:, None]
    return spread.flatten()


def _mask(size: int, kept: Any) -> Tensor:
    mask = torch.zeros(size, dtype=torch.bool)
    mask[list(range(size) if kept is None else kept)] = True
    return mask


def _nested_mask(parents: int, size: int, kept_parents: Any, table: Any) -> Tensor:
    """(parents, size) True where both the parent and the index within it are kept."""
    mask = torch.zeros(parents, size, dtype=torch.bool)
    rows = range(parents) if kept_parents is None else kept_parents
    for place, parent in enumerate(rows):
        mask[parent, list(range(size) if table is None else table[place])] = True
    return mask


def _mask_mamba2(mixer: Any, kept: Mapping[str, Any]) -> Any:
    """A zero gate z makes a channel zero before the norm; a zero kernel and bias make C zero after the convolution."""
    c: Mamba2Config = mixer.config
    heads = _nested_mask(c.num_groups, c.heads_per_group, kept.get("group"), kept.get("head"))
    inner = heads[..., None] & _mask(c.head_dim, kept.get("channel"))
    mixer.in_proj.weight[: c.inner_size][~inner.flatten()] = 0
    states = _nested_mask(c.num_groups, c.state_size, kept.get("group"), kept.get("state"))
    gone = torch.cat([torch.zeros(c.conv_size - states.numel(), dtype=torch.bool), ~states.flatten()])
    mixer.conv1d.weight[gone] = 0
    if mixer.conv1d.bias is not None:
        mixer.conv1d.bias[gone] = 0
    return mixer.out_proj


def _mask_attention(mixer: Any, kept: Mapping[str, Any]) -> Any:
    c: AttentionConfig = mixer.config
    heads = _nested_mask(c.num_key_value_heads, c.queries_per_key_value_head, kept.get("kv"), kept.get("query"))
    mixer.o_proj.weight[:, ~heads.flatten().repeat_interleave(c.head_dim)] = 0
    return mixer.o_proj


def _mask_mlp(mixer: Any, kept: Mapping[str, Any]) -> Any:
    mixer.down_proj.weight[:, ~_mask(mixer.config.intermediate_size, kept.get("neuron"))] = 0
    return mixer.down_proj


MASKS: dict[type, Callable[[Any, Mapping[str, Any]], Any]] = {
    Mamba2Config: _mask_mamba2,
    AttentionConfig: _mask_attention,
    MLPConfig: _mask_mlp,
}
