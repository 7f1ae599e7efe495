"""A model by its pattern: what an arm of a study says, and the width that gives it a parameter budget.

    pattern: S-*-            one symbol a block (M Mamba-2, S Mamba-1, * attention, H hybrid heads, - MLP)
    repeat: 4                how often the pattern is laid
    hidden_size: 256
    blocks:                  the config of each symbol, with the fields of models/config.py
      "*": {num_attention_heads: 8, num_key_value_heads: 2, head_dim: 32, rope: {}}
      "S": {inner_size: 512, state_size: 16, dt_rank: 16}
      "-": {intermediate_size: 512, activation: silu, gated: true}
    window: 128              attention sees so many tokens back, but for the global layers
    global_layers: [0, 3]    by number among the attention layers; first, before the middle and last when not given
    share_key_values: true   windowed layers share keys and values in groups (models/sharing.py)
    num_meta_tokens: 16

Other fields are those of ModelConfig. Pure data: no torch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from halflap.errors import HalflapError
from halflap.models.config import BLOCK_KINDS, BlockConfig, MLPConfig, ModelConfig, block_from_json
from halflap.models.count import count_parameters
from halflap.models.patterns import parse_pattern
from halflap.models.sharing import global_layers, sharing_groups, sources

KINDS = {kind.symbol: name for name, kind in BLOCK_KINDS.items()}
WIDTH_STEPS = (8, 1)
"""Neurons by which an MLP grows to meet a budget: kernels like eights, small models need ones."""
WITHIN = 0.005
"""Share of the budget by which a model may miss it, so that no two are further apart than 1 %."""


@dataclass(frozen=True)
class Stack:
    """The fields above; `extra` goes to ModelConfig as it is."""

    pattern: str
    hidden_size: int
    blocks: Mapping[str, Mapping[str, Any]]
    repeat: int = 1
    window: int | None = None
    global_layers: Sequence[int] | None = None
    share_key_values: bool = False
    num_meta_tokens: int = 0
    extra: Mapping[str, Any] = field(default_factory=dict)


def read_stack(data: Mapping[str, Any], where: str) -> Stack:
    """Raise HalflapError, naming `where` it stands, for an unknown or missing field or a symbol that is none."""
    own = {f.name for f in dataclasses.fields(Stack)} - {"extra"}
    known = own | {f.name for f in dataclasses.fields(ModelConfig)}
    for name in data:
        if name not in known:
            raise HalflapError(f"{where}: {name!r} is not a field of a model; it has {', '.join(sorted(known))}")
    for name in ("pattern", "hidden_size", "blocks"):
        if name not in data:
            raise HalflapError(f"{where} has no {name}; a model by its pattern needs pattern, hidden_size and blocks")
    for symbol in data["blocks"]:
        if symbol not in KINDS:
            raise HalflapError(f"{where}: blocks has {symbol!r}; allowed are {', '.join(KINDS)}: correct the symbol")
    extra = {name: value for name, value in data.items() if name not in own}
    return Stack(**{name: value for name, value in data.items() if name in own}, extra=extra)


def build(stack: Stack, vocab_size: int) -> ModelConfig:
    """The whole config. Raises HalflapError for what does not fit together."""
    kinds = {symbol: _block(KINDS[symbol], values) for symbol, values in stack.blocks.items()}
    blocks = list(parse_pattern(stack.pattern * stack.repeat, kinds))
    _limit_attention(stack, blocks)
    return ModelConfig(
        **{
            "family": "hymba",
            "vocab_size": vocab_size,
            "hidden_size": stack.hidden_size,
            "blocks": tuple(blocks),
            "num_meta_tokens": stack.num_meta_tokens,
            **stack.extra,
        }
    )


def _block(kind: str, values: Mapping[str, Any]) -> BlockConfig:
    if "attention" in values:  # the attention of hybrid heads can be nothing else
        values = {**values, "attention": {"kind": "attention", **values["attention"]}}
    return block_from_json({"kind": kind, **values})


def _limit_attention(stack: Stack, blocks: list[BlockConfig]) -> None:
    """Give windows and shared keys and values to all attention but the global layers', in place."""
    if stack.window is None:
        if stack.share_key_values:
            raise HalflapError("share_key_values needs a window: only windowed layers share keys and values; give one")
        return
    layers = [index for index, block in enumerate(blocks) if block.attention is not None]
    whole = global_layers(len(layers)) if stack.global_layers is None else tuple(stack.global_layers)
    if outside := [layer for layer in whole if not 0 <= layer < len(layers)]:
        raise HalflapError(
            f"global_layers names layer {outside[0]}; the {len(layers)} attention layers are 0 to {len(layers) - 1}"
        )
    shared = sources(sharing_groups(len(layers), whole)) if stack.share_key_values else {}
    for layer, index in enumerate(layers):
        if layer not in whole:
            source = layers[shared[layer]] if layer in shared else None
            blocks[index] = _attention(blocks[index], window=stack.window, key_value_source=source)


def _attention(block: BlockConfig, **changes: Any) -> BlockConfig:
    changed = dataclasses.replace(block.attention, **changes)  # type: ignore[type-var]
    return changed if block is block.attention else dataclasses.replace(block, attention=changed)  # type: ignore[call-arg]


def with_parameters(config: ModelConfig, target: int) -> ModelConfig:
    """The model with its MLPs, all alike, as wide as brings it to `target` parameters: by eights if that suffices.

    Raises HalflapError when it has no MLP, or misses the target by more than 0.5 %.
    """
    if not any(isinstance(block, MLPConfig) for block in config.blocks):
        raise HalflapError(
            f"the model {config.pattern()} has no MLP whose width could bring it to {target:,} parameters; add - blocks"
        )
    for step in WIDTH_STEPS:
        best = _nearest(config, target, step)
        if abs(count_parameters(best) / target - 1) <= WITHIN:
            return best
    raise HalflapError(
        f"the model {config.pattern()} comes to {count_parameters(best):,} parameters at best, more than 0.5 % from "
        f"the {target:,} of the others; change its other widths or its repeat"
    )


def _nearest(config: ModelConfig, target: int, step: int) -> ModelConfig:
    """The MLP width, a multiple of `step`, whose count is nearest; parameters grow with the width."""
    least, most = (count_parameters(_widened(config, width)) for width in (step, 2 * step))
    steps = max(1, 1 + round((target - least) / (most - least)))
    return _widened(config, steps * step)


def _widened(config: ModelConfig, width: int) -> ModelConfig:
    blocks = tuple(
        dataclasses.replace(block, intermediate_size=width) if isinstance(block, MLPConfig) else block
        for block in config.blocks
    )
    return dataclasses.replace(config, blocks=blocks)
