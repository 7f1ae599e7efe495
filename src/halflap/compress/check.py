"""Scores that cannot rank anything: NaN and infinity are refused, zeros alone are warned of, by block and axis."""

from __future__ import annotations

import warnings

from halflap.compress.axes import block_of, short_name
from halflap.compress.importance import Importance
from halflap.errors import HalflapError
from halflap.models.config import ModelConfig

WORDS = {
    "norm": "hidden channels",
    "neuron": "neurons",
    "query": "query heads",
    "inner": "SSM channels",
    "state": "states",
}


def check_scores(importance: Importance, config: ModelConfig) -> None:
    """Raise HalflapError on NaN and infinity, of the first block that has them, and warn of axes that are all 0."""
    scores = {f"blocks.{index}.norm": row for index, row in enumerate(importance.widths["hidden"])}
    scores |= {name: value for name, value in importance.widths.items() if name != "hidden"}
    read = {"taylor": "gradients", "weight_norm": "weights"}.get(importance.metric, "activations")
    last = importance.metric == "weight_norm"  # hidden channels belong to all blocks
    for name, value in sorted(scores.items(), key=lambda item: (last and item[0].endswith(".norm"), block_of(item[0]))):
        index = block_of(name) or 0
        place = f"the {WORDS[short_name(name)]} of block {index} ({config.pattern()[index]})"
        if not bool(value.isfinite().all()):
            _check_depth(importance, index)  # what came into the block was it already
            raise _broken(f"{read} of {place} are NaN or infinite, so nothing can be ranked")
        if not bool(value.any()):
            warnings.warn(f"{read} of {place} are all 0, so which of them to cut is arbitrary", stacklevel=2)
    _check_depth(importance, len(config.blocks))
    for name, value in (*importance.energy.items(), *importance.mean.items()):
        if not bool(value.isfinite().all()):
            raise _broken(f"what the norm {name} puts out is NaN or infinite, so nothing can be ranked")


def _check_depth(importance: Importance, end: int) -> None:
    """Raise HalflapError on a block before `end` whose own score is NaN or infinite."""
    for name, value in importance.depth.items():
        if not bool(value[:end].isfinite().all()):
            index = int(value.isfinite().int().argmin())
            raise _broken(f"what block {index} puts out is NaN or infinite by {name}, so blocks cannot be ranked")


def _broken(what: str) -> HalflapError:
    return HalflapError(f"{what}; check the checkpoint with `halflap evaluate`")
