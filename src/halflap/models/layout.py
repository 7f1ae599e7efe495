"""Every parameter's dimensions, written once per mixer as runs of grids of named axes.

A dimension (`Dim`) is a run of spans; a span is a small grid of axes in row-major order. Mamba-2's `in_proj` rows
are `z(group,head,channel) x(group,head,channel) B(group,state) C(group,state) dt(group,head)`. Counting, pruning,
load checks and optimiser groups read this table, so a coupling between parameters (heads to their group's B and C
and normalisation, query heads to their key/value head) is stated here and nowhere else.

Axis names: `vocab` and `hidden` are global; an axis of block i is `blocks.{i}.<name>`. An axis with a `parent` is
chosen per index of the parent (heads within their group). A block that reads another's keys and values has that block's
key/value heads, head channels and value channels. Pure data: no torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

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


class Axis(NamedTuple):
    """A named run of indices; `parent` names the axis it is chosen within."""

    name: str
    size: int
    parent: str | None = None


Span = tuple[Axis, ...]
Dim = tuple[Span, ...]
Layout = dict[str, tuple[Dim, ...]]


def dim_size(dim: Dim) -> int:
    """Elements along one dimension."""
    return sum(math.prod(axis.size for axis in span) for span in dim)


def shape(dims: tuple[Dim, ...]) -> tuple[int, ...]:
    return tuple(dim_size(dim) for dim in dims)


def _head_axes(block: AttentionConfig, prefix: str) -> tuple[Axis, Axis, Axis, Axis]:
    """Key/value heads, query heads within one, channels of a query and key head, channels of a value head."""
    owner = prefix if block.key_value_source is None else f"blocks.{block.key_value_source}"
    kv = Axis(f"{owner}.kv", block.num_key_value_heads)
    query = Axis(f"{prefix}.query", block.queries_per_key_value_head, parent=kv.name)
    channel = Axis(f"{owner}.head_dim", block.head_dim)
    value = channel if block.value_head_dim is None else Axis(f"{owner}.value_channel", block.value_head_dim)
    return kv, query, channel, value


def attention_layout(block: AttentionConfig, prefix: str, hidden: Axis) -> Layout:
    """Query heads are a grid (key/value head, query within it): query head i reads key/value head i // (H/K)."""
    kv, query, channel, value = _head_axes(block, prefix)
    rows, keys, values = ((kv, query, channel),), ((kv, channel),), ((kv, value),)
    residual, outputs = ((hidden,),), ((kv, query, value),)
    weights: Layout = {
        "q_proj.weight": (rows, residual),
        "k_proj.weight": (keys, residual),
        "v_proj.weight": (values, residual),
        "o_proj.weight": (residual, outputs),
    }
    biases: Layout = {
        "q_proj.bias": (rows,),
        "k_proj.bias": (keys,),
        "v_proj.bias": (values,),
        "o_proj.bias": (residual,),
    }
    table = weights | biases if block.bias else weights
    if block.key_value_source is not None:
        return {name: dims for name, dims in table.items() if name[0] not in "kv"}
    return table


def mamba2_layout(block: Mamba2Config, prefix: str, hidden: Axis) -> Layout:
    """Dao & Gu 2024, section 7; row order z, x, B, C, dt of the released checkpoints."""
    group = Axis(f"{prefix}.group", block.num_groups)
    head = Axis(f"{prefix}.head", block.heads_per_group, parent=group.name)
    channel = Axis(f"{prefix}.channel", block.head_dim)
    rows, inside = _mamba2_inner(block, prefix, (group, head, channel))
    residual: Dim = ((hidden,),)
    return {
        "in_proj.weight": (rows, residual),
        **inside,
        "out_proj.weight": (residual, ((group, head, channel),)),
    }


def _mamba2_inner(block: Mamba2Config, prefix: str, inner: Span) -> tuple[Dim, Layout]:
    """Rows of the projection into a Mamba-2 of channels `inner` (group, head, channel), and what follows it."""
    group, head, _ = inner
    bc, dt = (group, Axis(f"{prefix}.state", block.state_size, parent=group.name)), (group, head)
    one, tap = ((Axis("one", 1),),), ((Axis("tap", block.conv_kernel),),)
    weights: Layout = {
        "conv1d.weight": ((inner, bc, bc), one, tap),
        "conv1d.bias": ((inner, bc, bc),),
        "dt_bias": ((dt,),),
        "A_log": ((dt,),),
        "D": ((dt,),),
        "norm.weight": ((inner,),),
    }
    if not block.conv_bias:
        del weights["conv1d.bias"]
    return (inner, inner, bc, bc, dt), weights


def mamba1_layout(block: Mamba1Config, prefix: str, hidden: Axis) -> Layout:
    """Gu & Dao 2023; row order x, z of the released checkpoints."""
    inner, residual = (Axis(f"{prefix}.inner", block.inner_size),), ((hidden,),)
    rows, inside = _mamba1_inner(block, prefix, inner)
    return {"in_proj.weight": (rows, residual), **inside, "out_proj.weight": (residual, (inner,))}


def _mamba1_inner(block: Mamba1Config, prefix: str, inner: Span) -> tuple[Dim, Layout]:
    """Rows of the projection into a Mamba-1 of channels `inner`, and what follows it."""
    state, rank = (Axis(f"{prefix}.state", block.state_size),), (Axis(f"{prefix}.rank", block.dt_rank),)
    one, tap = ((Axis("one", 1),),), ((Axis("tap", block.conv_kernel),),)
    weights: Layout = {
        "conv1d.weight": ((inner,), one, tap),
        "conv1d.bias": ((inner,),),
        "x_proj.weight": ((rank, state, state), (inner,)),
        "dt_norm.weight": ((rank,),),
        "B_norm.weight": ((state,),),
        "C_norm.weight": ((state,),),
        "dt_proj.weight": ((inner,), (rank,)),
        "dt_bias": ((inner,),),
        "A_log": ((inner,), (state,)),
        "D": ((inner,),),
    }
    if not block.conv_bias:
        del weights["conv1d.bias"]
    if not block.inner_norms:
        del weights["dt_norm.weight"], weights["B_norm.weight"], weights["C_norm.weight"]
    return (inner, inner), weights


def hybrid_layout(block: HybridConfig, prefix: str, hidden: Axis) -> Layout:
    """Hymba, section 3: one projection with rows q, k, v (no k and v where they are another block's), then the SSM's.

    The branches are averaged channel by channel, so the SSM's channels are the attention's grid (key/value head,
    query, value channel); a Mamba-2 has a group for each key/value head.
    """
    a = block.attention
    kv, query, channel, value = _head_axes(a, prefix)
    if a.value_head_dim is None:  # values have channels of their own here: the SSM's
        value = Axis(value.name.replace("head_dim", "value_channel"), a.head_dim)
    inner, residual = (kv, query, value), ((hidden,),)
    shared = () if a.key_value_source is not None else ((kv, channel), (kv, value))
    make = _mamba1_inner if isinstance(block.ssm, Mamba1Config) else _mamba2_inner
    rows, inside = make(block.ssm, prefix, inner)  # type: ignore[arg-type]
    table: Layout = {
        "in_proj.weight": (((kv, query, channel), *shared, *rows), residual),
        **{f"ssm.{name}": dims for name, dims in inside.items()},
        "attention_norm.weight": ((inner,),),
        "ssm_norm.weight": ((inner,),),
        "out_proj.weight": (residual, (inner,)),
    }
    if isinstance(block.ssm, Mamba2Config):  # its gated group norm is the branch's norm
        del table["ssm_norm.weight"]
    return table


def mlp_layout(block: MLPConfig, prefix: str, hidden: Axis) -> Layout:
    neuron, residual = ((Axis(f"{prefix}.neuron", block.intermediate_size),),), ((hidden,),)
    inputs = ("gate_proj", "up_proj") if block.gated else ("up_proj",)
    weights: Layout = {f"{name}.weight": (neuron, residual) for name in inputs} | {
        "down_proj.weight": (residual, neuron)
    }
    biases: Layout = {f"{name}.bias": (neuron,) for name in inputs} | {"down_proj.bias": (residual,)}
    return weights | biases if block.bias else weights


def linear_layout(block: LinearConfig, prefix: str, hidden: Axis) -> Layout:
    del prefix
    residual: Dim = ((hidden,),)
    weights: Layout = {"out_proj.weight": (residual, residual)}
    return weights | {"out_proj.bias": (residual,)} if block.bias else weights


MIXER_LAYOUTS: dict[type, Callable[..., Layout]] = {
    AttentionConfig: attention_layout,
    Mamba2Config: mamba2_layout,
    MLPConfig: mlp_layout,
    Mamba1Config: mamba1_layout,
    HybridConfig: hybrid_layout,
    LinearConfig: linear_layout,
}


def mixer_layout(block: BlockConfig, index: int, hidden_size: int) -> Layout:
    """Parameters of one mixer by their names inside it."""
    return MIXER_LAYOUTS[type(block)](block, f"blocks.{index}", Axis("hidden", hidden_size))


def norm_layout(config: ModelConfig) -> Layout:
    """Parameters of a block's norm, or of the final one, by their names inside it."""
    hidden: Dim = ((Axis("hidden", config.hidden_size),),)
    return {"weight": (hidden,), "bias": (hidden,)} if config.norm == "layer1p" else {"weight": (hidden,)}


def is_offset_gain(config: ModelConfig, name: str) -> bool:
    """Whether a parameter holds a norm's gain less one."""
    block_norm = name.startswith("blocks.") and name.split(".", 2)[2] == "norm.weight"
    return config.norm == "layer1p" and (block_norm or name == "norm.weight")


def layout(config: ModelConfig) -> Layout:
    """Every parameter of the model: our name to its dimensions, in the order of the network."""
    hidden, vocab = ((Axis("hidden", config.hidden_size),),), ((Axis("vocab", config.vocab_size),),)
    table: Layout = {"embedding.weight": (vocab, hidden)}
    if config.num_meta_tokens:
        table["meta_tokens"] = (((Axis("meta", config.num_meta_tokens),),), hidden)
    for index, block in enumerate(config.blocks):
        table |= {f"blocks.{index}.norm.{name}": dims for name, dims in norm_layout(config).items()}
        for name, dims in mixer_layout(block, index, config.hidden_size).items():
            table[f"blocks.{index}.mixer.{name}"] = dims
    table |= {f"norm.{name}": dims for name, dims in norm_layout(config).items()}
    if not config.tie_word_embeddings:
        table["head.weight"] = (vocab, hidden)
    return table
