"""Every parameter's dimensions, written once per mixer as runs of grids of named axes.

A dimension (`Dim`) is a run of spans; a span is a small grid of axes in row-major order. Mamba-2's `in_proj` rows
are `z(group,head,channel) x(group,head,channel) B(group,state) C(group,state) dt(group,head)`. Counting, pruning,
load checks and optimiser groups read this table, so a coupling between parameters (heads to their group's B and C
and normalisation, query heads to their key/value head) is stated here and nowhere else.

Axis names: `vocab` and `hidden` are global; an axis of block i is `blocks.{i}.<name>`. An axis with a `parent` is
chosen per index of the parent (heads within their group). Pure data: no torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

from halflap.models.config import AttentionConfig, BlockConfig, Mamba2Config, MLPConfig, ModelConfig


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


def attention_layout(block: AttentionConfig, prefix: str, hidden: Axis) -> Layout:
    """Query heads are a grid (key/value head, query within it): query head i reads key/value head i // (H/K)."""
    kv = Axis(f"{prefix}.kv", block.num_key_value_heads)
    query = Axis(f"{prefix}.query", block.queries_per_key_value_head, parent=kv.name)
    channel = Axis(f"{prefix}.head_dim", block.head_dim)
    rows, shared, residual = ((kv, query, channel),), ((kv, channel),), ((hidden,),)
    weights: Layout = {
        "q_proj.weight": (rows, residual),
        "k_proj.weight": (shared, residual),
        "v_proj.weight": (shared, residual),
        "o_proj.weight": (residual, rows),
    }
    biases: Layout = {
        "q_proj.bias": (rows,),
        "k_proj.bias": (shared,),
        "v_proj.bias": (shared,),
        "o_proj.bias": (residual,),
    }
    return weights | biases if block.bias else weights


def mamba2_layout(block: Mamba2Config, prefix: str, hidden: Axis) -> Layout:
    """Dao & Gu 2024, section 7; row order z, x, B, C, dt of the released checkpoints."""
    group = Axis(f"{prefix}.group", block.num_groups)
    head = Axis(f"{prefix}.head", block.heads_per_group, parent=group.name)
    channel = Axis(f"{prefix}.channel", block.head_dim)
    state = Axis(f"{prefix}.state", block.state_size, parent=group.name)
    inner, bc, dt = (group, head, channel), (group, state), (group, head)
    residual, one, tap = ((hidden,),), ((Axis("one", 1),),), ((Axis("tap", block.conv_kernel),),)
    weights: Layout = {
        "in_proj.weight": ((inner, inner, bc, bc, dt), residual),
        "conv1d.weight": ((inner, bc, bc), one, tap),
        "conv1d.bias": ((inner, bc, bc),),
        "dt_bias": ((dt,),),
        "A_log": ((dt,),),
        "D": ((dt,),),
        "norm.weight": ((inner,),),
        "out_proj.weight": (residual, (inner,)),
    }
    if not block.conv_bias:
        del weights["conv1d.bias"]
    return weights


def mlp_layout(block: MLPConfig, prefix: str, hidden: Axis) -> Layout:
    neuron, residual = ((Axis(f"{prefix}.neuron", block.intermediate_size),),), ((hidden,),)
    inputs = ("gate_proj", "up_proj") if block.gated else ("up_proj",)
    weights: Layout = {f"{name}.weight": (neuron, residual) for name in inputs} | {
        "down_proj.weight": (residual, neuron)
    }
    biases: Layout = {f"{name}.bias": (neuron,) for name in inputs} | {"down_proj.bias": (residual,)}
    return weights | biases if block.bias else weights


MIXER_LAYOUTS: dict[type, Callable[..., Layout]] = {
    AttentionConfig: attention_layout,
    Mamba2Config: mamba2_layout,
    MLPConfig: mlp_layout,
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
    for index, block in enumerate(config.blocks):
        table |= {f"blocks.{index}.norm.{name}": dims for name, dims in norm_layout(config).items()}
        for name, dims in mixer_layout(block, index, config.hidden_size).items():
            table[f"blocks.{index}.mixer.{name}"] = dims
    table |= {f"norm.{name}": dims for name, dims in norm_layout(config).items()}
    if not config.tie_word_embeddings:
        table["head.weight"] = (vocab, hidden)
    return table
