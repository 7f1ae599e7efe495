"""`inspect`, `import` and `export`: looking at a checkpoint, and bringing one in or out."""

from __future__ import annotations

from typing import Any

from halflap.commands.config import InspectRecipe
from halflap.commands.resolve import shape_of
from halflap.errors import RecipeError
from halflap.models.count import (
    Phase,
    cache_bytes,
    count_block_parameters,
    count_non_embedding_parameters,
    count_parameters,
    flops_per_token,
)
from halflap.models.presets import PRESETS
from halflap.run import Run

PHASES: tuple[Phase, ...] = ("decode", "prefill")


def inspect(recipe: InspectRecipe, run: Run) -> dict[str, Any]:
    """Counts and cache of a model from its config alone. `flops_per_token` is of decode at the first context."""
    if recipe.list_presets:
        return {"presets": [_preset_row(name) for name in PRESETS]}
    if recipe.model is None:
        raise RecipeError("inspect needs MODEL; give a directory, a preset or a YAML of a model, or --list the presets")
    config = shape_of(recipe.model)
    contexts, batch = recipe.context, recipe.batch
    flops = {phase: {str(n): flops_per_token(config, n, phase) for n in contexts} for phase in PHASES}
    parameters = count_block_parameters(config)
    blocks = config.to_json()["blocks"]
    return {
        "family": config.family,
        "pattern": config.pattern(),
        "parameters": count_parameters(config),
        "non_embedding_parameters": count_non_embedding_parameters(config),
        "flops_per_token": flops["decode"][str(contexts[0])],
        "flops": flops,
        "cache_bytes": {str(n): cache_bytes(config, n, batch, kv_bits=recipe.cache_bits) for n in contexts},
        "batch": batch,
        "hidden_size": config.hidden_size,
        "vocab_size": config.vocab_size,
        "tie_word_embeddings": config.tie_word_embeddings,
        "max_position_embeddings": config.max_position_embeddings,
        "blocks": [
            {"symbol": block.symbol, "kind": block.kind, "parameters": count} | data
            for block, count, data in zip(config.blocks, parameters, blocks)
        ],
    }


def _preset_row(name: str) -> dict[str, Any]:
    config = PRESETS[name]
    return {
        "preset": name,
        "family": config.family,
        "parameters": count_parameters(config),
        "blocks": len(config.blocks),
        "hidden_size": config.hidden_size,
        "pattern": config.pattern(),
    }
