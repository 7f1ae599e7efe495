"""The teacher with the cut indices masked: what a student must equal.

Made from the mixers' equations, by setting parameters to zero so that the cut indices carry nothing (where a hybrid
block normalises its attention, which no parameter silences, a hook does); it knows nothing of layouts or of how a plan
is applied. Its norms divide by all channels, the zeros included, which is what the
`masked` correction reproduces; for `none` and `calibrated` its gains and eps say that the mean is over the kept ones.
Where norms are LayerNorms, what carries nothing is not zero but the mean of the kept channels (`correction.py`).
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from halflap.checkpoints.streamed import ENTRY, EXIT, Part, part_names
from halflap.compress.axes import block_of
from halflap.compress.correction import norms
from halflap.compress.kinds import Change, axis_name, block_counts, changed_block
from halflap.compress.plan import PruningPlan
from halflap.models.config import AttentionConfig, HybridConfig, LinearConfig, Mamba1Config, Mamba2Config, MLPConfig
from halflap.models.model import HybridModel


def masked_teacher(teacher: HybridModel, plan: PruningPlan) -> HybridModel:
    """A copy of the teacher in which the cut indices carry nothing, whatever the rest does."""
    model = copy.deepcopy(teacher)
    for part in part_names(teacher.config):
        mask_part(plan, model, part)
    return model


@torch.no_grad()
def mask_part(plan: PruningPlan, model: HybridModel, part: Part) -> None:
    """Mask one part of a teacher in place, once; the other parts may be without weights."""
    _set_eps(model, plan, part)
    hidden = _mask(model.config.hidden_size, plan.keep.get("hidden"))
    centred = model.config.norm == "layer1p"
    if part == ENTRY or (part == EXIT and model.head is None):
        _silence(model.embedding.weight.T, hidden, centred)
    if part == ENTRY:
        if model.meta_tokens is not None:
            _silence(model.meta_tokens.T, hidden, centred)
        return
    norm: Any = model.norm if part == EXIT else model.blocks[part].norm  # type: ignore[index]
    if centred:
        norm.weight[~hidden], norm.bias[~hidden] = -1, 0
    if part == EXIT:
        return
    mixer: Any = model.blocks[part].mixer  # type: ignore[index]
    change, kept = plan.changes.get(part, Change()), _kept(plan, part)  # type: ignore[arg-type]
    _change(mixer, change, kept.get("kv"))
    output = MASKS[type(model.config.blocks[part])](mixer, kept)  # type: ignore[index]
    if change.linear:
        mixer.forward = partial(_outer, mixer)
    heard = hidden if part in plan.keep_blocks else torch.zeros_like(hidden)
    _silence(output.weight, heard, centred)
    if output.bias is not None:
        _silence(output.bias, heard, centred)


def _change(mixer: Any, change: Change, kept: Any) -> None:
    """Each of some neighbouring (kept) key/value heads their mean; a smaller window."""
    attention: AttentionConfig | None = mixer.config.attention
    if attention is None:
        return
    mixer.config = changed_block(mixer.config, dataclasses.replace(change, pool=1, linear=False))
    if change.pool > 1:
        heads = list(range(attention.num_key_value_heads) if kept is None else kept)
        for projection in (mixer.k_proj, mixer.v_proj):
            for tensor in projection.parameters():
                rows = tensor.unflatten(0, (attention.num_key_value_heads, -1))
                pools = rows[heads].unflatten(0, (-1, change.pool))
                rows[heads] = pools.mean(1, keepdim=True).expand_as(pools).flatten(0, 1)


def _outer(mixer: Any, x: Tensor, context: Any, state: Any = None) -> Tensor:
    """What an MLP without activation and gate puts out, or attention in which each token sees itself alone."""
    config = mixer.config
    if isinstance(config, MLPConfig):
        return mixer.down_proj(mixer.up_proj(x))
    heads = mixer.v_proj(x).unflatten(-1, (config.num_key_value_heads, config.value_dim))
    return mixer.o_proj(heads.repeat_interleave(config.queries_per_key_value_head, -2).flatten(-2))


def _kept(plan: PruningPlan, index: int) -> dict[str, Any]:
    """What the plan keeps of a block's axes, by short name; axes kept whole are left out."""
    block = plan.teacher_config.blocks[index]
    names = {axis: axis_name(block, index, axis) for axis in block_counts(block)}
    return {axis: plan.keep[name] for axis, name in names.items() if name in plan.keep}


def _silence(rows: Tensor, kept: Tensor, centred: bool) -> None:
    """Rows (D, ...) of the other channels to zero, or to the mean of the kept ones, if any."""
    rows[~kept] = rows[kept].mean(0) if centred and bool(kept.any()) else 0.0


def _set_eps(model: HybridModel, plan: PruningPlan, part: Part) -> None:
    """Have the norms of a part divide by all channels (`masked`) or by the kept ones.

    A mean over all channels, the cut ones zero, is kept / total of the mean over the kept ones: gain * sqrt(kept /
    total) and eps * kept / total make up for it.
    """
    if plan.norm_correction == "masked":
        return
    modules = dict(model.named_modules())
    names = set(part_names(model.config)[part])
    for norm in norms(plan.teacher_config, plan.student, plan.keep_blocks):
        if norm.name not in names:
            continue
        module: Any = modules[norm.name.removesuffix(".weight")]
        gain = torch.ones_like(module.weight) * (norm.kept / norm.total) ** 0.5
        if norm.name in plan.scales:
            gain *= _spread(plan, norm.name, plan.scales[norm.name], len(gain))
        if norm.bias is None:
            module.weight.data *= gain
        else:
            module.bias.data += (1 + module.weight.data) * plan.dropped.get(norm.bias, (0.0,))[0]
            module.weight.data = (1 + module.weight.data) * gain - 1
        if hasattr(module, "eps"):
            module.eps = module.eps * norm.kept / norm.total
        else:  # a gated group norm, whose eps its Mamba-2 has
            ssm: Any = modules[norm.name.removesuffix(".norm.weight")]
            ssm.config = dataclasses.replace(ssm.config, norm_eps=ssm.config.norm_eps * norm.kept / norm.total)


def _spread(plan: PruningPlan, name: str, factors: tuple[float, ...], size: int) -> Tensor:
    """Factors of the kept groups at the places of their channels; channels of other groups carry nothing anyway."""
    index = block_of(name)
    if len(factors) == 1 or index is None:
        return torch.full((size,), factors[0], dtype=torch.float64)
    config, kept = plan.teacher_config.blocks[index], _kept(plan, index)
    assert isinstance(config.ssm, Mamba2Config)
    spread = torch.ones(config.ssm.num_groups, size // config.ssm.num_groups, dtype=torch.float64)
    groups = kept.get("group", kept.get("kv", range(len(spread))))
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
    _silence_mamba2(mixer, mixer.in_proj.weight, kept)
    return mixer.out_proj


def _silence_mamba2(inner: Any, rows: Tensor, kept: Mapping[str, Any]) -> None:
    """A zero gate z makes a channel zero before the norm; a zero kernel and bias make C zero after the convolution.

    rows: of the projection, from the first of z.
    """
    c: Mamba2Config = inner.config
    heads = _nested_mask(c.num_groups, c.heads_per_group, kept.get("group"), kept.get("head"))
    channels = heads[..., None] & _mask(c.head_dim, kept.get("channel"))
    rows[: c.inner_size][~channels.flatten()] = 0
    states = _nested_mask(c.num_groups, c.state_size, kept.get("group"), kept.get("state"))
    gone = torch.cat([torch.zeros(c.conv_size - states.numel(), dtype=torch.bool), ~states.flatten()])
    inner.conv1d.weight[gone] = 0
    if inner.conv1d.bias is not None:
        inner.conv1d.bias[gone] = 0


def _mask_mamba1(mixer: Any, kept: Mapping[str, Any]) -> Any:
    _silence_mamba1(mixer, mixer.in_proj.weight, _mask(mixer.config.inner_size, kept.get("inner")), kept)
    return mixer.out_proj


def _silence_mamba1(inner: Any, rows: Tensor, channels: Tensor, kept: Mapping[str, Any]) -> None:
    """A zero gate z makes a channel zero, and what time steps, B and C read of it is zero; so are B and C of a state.

    rows: of the projection, from the first of x.
    """
    c: Mamba1Config = inner.config
    rows[c.inner_size :][~channels] = 0
    inner.x_proj.weight[:, ~channels] = 0
    states = ~_mask(c.state_size, kept.get("state"))
    inner.x_proj.weight[torch.cat([torch.zeros(c.dt_rank, dtype=torch.bool), states, states])] = 0


def _mask_attention(mixer: Any, kept: Mapping[str, Any]) -> Any:
    mixer.o_proj.weight[:, ~_attended(mixer.config, kept)] = 0
    return mixer.o_proj


def _attended(c: AttentionConfig, kept: Mapping[str, Any]) -> Tensor:
    """(H * value_dim,) True at the outputs of kept heads and value channels."""
    heads = _nested_mask(c.num_key_value_heads, c.queries_per_key_value_head, kept.get("kv"), kept.get("query"))
    return (heads[..., None] & _mask(c.value_dim, kept.get("value_channel"))).flatten()


def _mask_hybrid(mixer: Any, kept: Mapping[str, Any]) -> Any:
    """Channels are cut in both branches, before their norms."""
    c: HybridConfig = mixer.config
    channels = _attended(c.attention, kept)
    mixer.attention_norm.register_forward_pre_hook(lambda _, args: (args[0] * channels.to(args[0].device),))
    rows = mixer.in_proj.weight[sum(mixer.widths[:-1]) :]
    if isinstance(c.ssm, Mamba1Config):
        _silence_mamba1(mixer.ssm, rows, channels, kept)
    else:
        names = {"kv": "group", "query": "head", "value_channel": "channel"}
        _silence_mamba2(mixer.ssm, rows, {names.get(axis, axis): row for axis, row in kept.items()})
    return mixer.out_proj


def _mask_mlp(mixer: Any, kept: Mapping[str, Any]) -> Any:
    mixer.down_proj.weight[:, ~_mask(mixer.config.intermediate_size, kept.get("neuron"))] = 0
    return mixer.down_proj


MASKS: dict[type, Callable[[Any, Mapping[str, Any]], Any]] = {
    Mamba2Config: _mask_mamba2,
    Mamba1Config: _mask_mamba1,
    AttentionConfig: _mask_attention,
    HybridConfig: _mask_hybrid,
    MLPConfig: _mask_mlp,
    LinearConfig: lambda mixer, kept: mixer.out_proj,
}
