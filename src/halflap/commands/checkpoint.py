"""`inspect` and `import`: looking at a checkpoint, and bringing one in.

torch is imported inside the functions that move weights, so that `inspect` is quick.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from halflap.commands.config import ImportRecipe, InspectRecipe
from halflap.commands.resolve import shape_of
from halflap.errors import HalflapError, RecipeError
from halflap.models.count import (
    Phase,
    cache_bytes,
    cache_parts,
    count_block_parameters,
    count_non_embedding_parameters,
    count_parameters,
    flops_per_token,
    published_cache,
)
from halflap.models.presets import PRESETS
from halflap.progress import track
from halflap.recipe import read_yaml
from halflap.report.shapes import describe
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
    bits = {"kv_bits": recipe.cache_bits, "ssm_bits": 2 * recipe.cache_bits}  # as the memory budget counts
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
        "cache_bytes": {str(n): cache_bytes(config, n, batch, **bits) for n in contexts},
        "cache_parts": {str(n): cache_parts(config, n, batch, **bits) for n in contexts},
        "cache_as_published": published_cache(config, contexts) if config.num_meta_tokens else None,
        "key_value_sources": {
            str(index): block.attention.key_value_source
            for index, block in enumerate(config.blocks)
            if block.attention is not None and block.attention.key_value_source is not None
        },
        "batch": batch,
        "num_meta_tokens": config.num_meta_tokens,
        "hidden_size": config.hidden_size,
        "vocab_size": config.vocab_size,
        "tie_word_embeddings": config.tie_word_embeddings,
        "max_position_embeddings": config.max_position_embeddings,
        "blocks": [
            {"symbol": block.symbol, "kind": block.kind, "parameters": count, "sizes": describe(block)} | data
            for block, count, data in zip(config.blocks, parameters, blocks)
        ],
    }


def import_(recipe: ImportRecipe, run: Run) -> dict[str, Any]:
    """A GGUF file, or a directory in another dialect of a known family, to a Hugging Face directory: the run's own."""
    from halflap.checkpoints.checkpoint import Checkpoint, write_checkpoint
    from halflap.checkpoints.config import lineage_step

    source, dtype = Path(recipe.source), recipe.common.dtype
    if source.is_file():
        if source.suffix != ".gguf":
            raise HalflapError(
                f"source is {recipe.source!r}; allowed are a .gguf file and a directory with config.json and "
                "*.safetensors: convert pickled weights (.bin, .pt) to safetensors first"
            )
        from halflap.checkpoints.gguf_import import import_gguf

        written = import_gguf(source, run.path, dtype)
    else:
        from halflap.checkpoints.megatron import CONFIG, is_megatron, open_megatron

        if is_megatron(source):
            opened = open_megatron(source, read_yaml(source / CONFIG, "model") if (source / CONFIG).exists() else None)
        else:
            opened = Checkpoint.open(source)
        written = write_checkpoint(
            run.path,
            opened.config,
            track(opened.tensors(), "import", len(opened.dtypes)),
            dtype=opened.dtypes if dtype == "auto" else dtype,
            tokenizer_from=opened.path,
            lineage=[*opened.lineage, lineage_step("import", {source.name: opened.digest})],
        )
    counted = count_parameters(written.config)
    return {"parameters": counted, "tensors": len(written.entries), "path": str(run.path), "dtype": written.dtype}


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
