"""What can be cut of each kind of block: one row a kind. Pure data: no torch.

A row says how many indices each axis of a block has, what block remains at other counts, and which size asks for which
axis. Counts of an axis with a parent are per index of the parent: 112 Mamba heads in 8 groups are a count of 14. In a
hybrid block the SSM's channels are the attention's grid, so key/value heads, query heads and value channels are cut in
both at once. Rotated head channels and the rank of Mamba-1's time steps are never cut.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from halflap.errors import HalflapError
from halflap.models.config import (
    AttentionConfig,
    BlockConfig,
    HybridConfig,
    LinearConfig,
    Mamba1Config,
    Mamba2Config,
    MLPConfig,
)

Counts = Mapping[str, int]
"""Indices of each axis by short name, per index of the parent."""

SHARED = frozenset({"kv", "value_channel"})
"""Axes of a block that reads another's keys and values which are that other block's."""


class SizedAxis(NamedTuple):
    """A size, the axis cut to reach it, and the axis it is chosen within, with what people call that."""

    size: str
    axis: str
    parent: str | None = None
    parents: str = ""


class Kind(NamedTuple):
    """A kind of block; of its sizes, parents stand before what is chosen within them."""

    counts: Callable[[Any], dict[str, int]]
    resize: Callable[[Any, Counts], BlockConfig]
    sizes: tuple[SizedAxis, ...]


def _counts_mlp(block: MLPConfig) -> dict[str, int]:
    return {"neuron": block.intermediate_size}


def _resize_mlp(block: MLPConfig, count: Counts) -> MLPConfig:
    return dataclasses.replace(block, intermediate_size=count["neuron"])


def _counts_mamba2(block: Mamba2Config) -> dict[str, int]:
    return {
        "group": block.num_groups,
        "head": block.heads_per_group,
        "channel": block.head_dim,
        "state": block.state_size,
    }


def _resize_mamba2(block: Mamba2Config, count: Counts) -> Mamba2Config:
    return dataclasses.replace(
        block,
        num_heads=count["group"] * count["head"],
        head_dim=count["channel"],
        num_groups=count["group"],
        state_size=count["state"],
    )


def _counts_mamba1(block: Mamba1Config) -> dict[str, int]:
    return {"inner": block.inner_size, "state": block.state_size}


def _resize_mamba1(block: Mamba1Config, count: Counts) -> Mamba1Config:
    return dataclasses.replace(block, inner_size=count["inner"], state_size=count["state"])


def _counts_attention(block: AttentionConfig) -> dict[str, int]:
    heads = {"kv": block.num_key_value_heads, "query": block.queries_per_key_value_head}
    return heads if block.value_head_dim is None else heads | {"value_channel": block.value_head_dim}


def _resize_attention(block: AttentionConfig, count: Counts) -> AttentionConfig:
    return dataclasses.replace(
        block,
        num_attention_heads=count["kv"] * count["query"],
        num_key_value_heads=count["kv"],
        value_head_dim=count.get("value_channel", block.head_dim),
    )


def _counts_hybrid(block: HybridConfig) -> dict[str, int]:
    heads = _counts_attention(block.attention)
    return heads | {"value_channel": block.attention.value_dim, "state": block.ssm.state_size}


def _resize_hybrid(block: HybridConfig, count: Counts) -> HybridConfig:
    kv, query, channel = count["kv"], count["query"], count["value_channel"]
    ssm: Mamba1Config | Mamba2Config
    if isinstance(block.ssm, Mamba1Config):
        ssm = _resize_mamba1(block.ssm, {"inner": kv * query * channel, **count})
    else:
        ssm = _resize_mamba2(block.ssm, {"group": kv, "head": query, "channel": channel, **count})
    return dataclasses.replace(block, attention=_resize_attention(block.attention, count), ssm=ssm)


_QUERIES = SizedAxis("num_attention_heads", "query", "kv", "key/value heads")
_KEYS = SizedAxis("num_key_value_heads", "kv")
_STATES = SizedAxis("ssm_state_size", "state")

KINDS: dict[type, Kind] = {
    MLPConfig: Kind(_counts_mlp, _resize_mlp, (SizedAxis("intermediate_size", "neuron"),)),
    Mamba1Config: Kind(_counts_mamba1, _resize_mamba1, (SizedAxis("mamba_intermediate_size", "inner"), _STATES)),
    Mamba2Config: Kind(
        _counts_mamba2,
        _resize_mamba2,
        (
            SizedAxis("mamba_num_heads", "head", "group", "groups of shared B and C"),
            SizedAxis("mamba_head_dim", "channel"),
            _STATES,
        ),
    ),
    AttentionConfig: Kind(_counts_attention, _resize_attention, (_KEYS, _QUERIES)),
    LinearConfig: Kind(lambda block: {}, lambda block, count: block, ()),
    HybridConfig: Kind(
        _counts_hybrid, _resize_hybrid, (_KEYS, _QUERIES, SizedAxis("mamba_head_dim", "value_channel"), _STATES)
    ),
}

BLOCKS_OF: dict[type, str] = {
    Mamba2Config: "num_mamba_blocks",
    Mamba1Config: "num_mamba_blocks",
    AttentionConfig: "num_attention_blocks",
    MLPConfig: "num_mlp_blocks",
}
"""The size that says how many blocks of a type stay."""
BLOCK_COUNTS: tuple[str, ...] = tuple(dict.fromkeys(BLOCKS_OF.values()))

# A group keeps its own B, C and norm, so it can only go or move whole; no size asks for it, but a plan may say it.
PRUNABLE = frozenset(row.axis for kind in KINDS.values() for row in kind.sizes) | {"hidden", "group"}


def block_counts(block: BlockConfig) -> dict[str, int]:
    """How many indices each axis of a block has."""
    return KINDS[type(block)].counts(block)


def resize_block(block: BlockConfig, count: Counts) -> BlockConfig:
    """The block with these counts; the inverse of `block_counts`."""
    return KINDS[type(block)].resize(block, count)


@dataclass(frozen=True)
class Change:
    """What becomes of a block beside what is left of its axes.

    pool     so many neighbouring key/value heads are averaged into one, which all their query heads read
             (Ainslie et al. 2023); attention alone, and only where no other block reads them
    window   tokens that a query sees before itself, fewer than it did; what shares keys and values has the same
    linear   attention or an MLP becomes the product of its outer maps, W_o W_v or W_down W_up (Bercovich et al. 2024):
             what it does where a token sees itself alone, or the activation does nothing and the gate is open
    """

    pool: int = 1
    window: int | None = None
    linear: bool = False

    def check(self, block: BlockConfig, index: int, shared: bool, heads: int) -> None:
        """Raise HalflapError unless block `index` can be changed so.

        shared: other blocks read its keys and values, or it reads theirs; heads: its key/value heads that are kept.
        """
        own = block.attention
        if self.pool < 1:
            raise HalflapError(
                f"block {index} cannot have {self.pool} key/value heads averaged into one: choose 1 or more"
            )
        if self.linear and (shared or self.pool > 1 or not isinstance(block, AttentionConfig | MLPConfig)):
            raise HalflapError(
                f"block {index} ({block.kind}) cannot become linear; it must be attention that shares with no block "
                "and keeps its key/value heads apart, or an MLP: leave the change out"
            )
        if self.pool > 1 and (heads % self.pool or shared or not isinstance(block, AttentionConfig)):
            raise HalflapError(
                f"block {index} cannot have {self.pool} of its {heads} key/value heads averaged into one; it must be "
                "attention alone that shares with no block, and the number must divide its heads: leave the change out"
            )
        if self.window is not None and (own is None or not 0 < self.window <= (own.window or self.window)):
            raise HalflapError(
                f"block {index} cannot have a window of {self.window}: it must have attention, and its window "
                f"({own and own.window}) can only shrink: leave the change out"
            )


def changed_block(block: BlockConfig, change: Change) -> BlockConfig:
    """The block, its axes cut already, after a change."""
    attention = block.attention
    if change.linear and isinstance(block, AttentionConfig | MLPConfig):
        return LinearConfig(block.bias)
    if attention is None:
        return block
    changed = dataclasses.replace(
        attention,
        num_key_value_heads=attention.num_key_value_heads // change.pool,
        window=attention.window if change.window is None else change.window,
    )
    return changed if block is attention else dataclasses.replace(block, attention=changed)  # type: ignore[call-arg]


def block_sizes(block: BlockConfig) -> dict[str, int]:
    """The sizes of a block, by the names of `Sizes`."""
    count = block_counts(block)
    return {
        row.size: count[row.axis] * (1 if row.parent is None else count[row.parent]) for row in KINDS[type(block)].sizes
    }


def owner(block: BlockConfig, index: int) -> int:
    """The block whose keys and values block `index` reads: itself, or the producer of its group."""
    source = None if block.attention is None else block.attention.key_value_source
    return index if source is None else source


def axis_name(block: BlockConfig, index: int, axis: str) -> str:
    """The full name of an axis of block `index`."""
    return f"blocks.{owner(block, index) if axis in SHARED else index}.{axis}"
