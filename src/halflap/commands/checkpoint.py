"""`inspect`, `import` and `export`: looking at a checkpoint, and bringing one in or out.

torch is imported inside the functions that move weights, so that `inspect` is quick.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from halflap.commands.config import ExportRecipe, ImportRecipe, InspectRecipe
from halflap.commands.resolve import shape_of
from halflap.errors import HalflapError, RecipeError
from halflap.files import write_json
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

EXPORT_CHECK_TOKENS = 64
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
        "cache_parts": {str(n): cache_parts(config, n, batch, kv_bits=recipe.cache_bits) for n in contexts},
        "cache_as_published": published_cache(config) if config.num_meta_tokens else None,
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


def export(recipe: ExportRecipe, run: Run) -> dict[str, Any]:
    """A checkpoint that stock tools load, and how far its logits are from the model's own."""
    from halflap.checkpoints.checkpoint import Checkpoint, copy_tokenizer, write_checkpoint
    from halflap.checkpoints.config import family_of, lineage_step
    from halflap.checkpoints.megatron import cannot_write, open_megatron, settings_of, write_megatron
    from halflap.checkpoints.padding import pad_tensors, padded_config

    opened = Checkpoint.open(recipe.model)
    obstacle = cannot_write if recipe.format == "megatron" else family_of(opened.config).cannot_write
    config, tensors = opened.config, opened.tensors()
    if reason := obstacle(config):
        if not recipe.pad_to_stock:
            raise HalflapError(
                f"{FORMS[recipe.format]} cannot hold this model, because {reason}; --pad-to-stock pads unequal widths "
                "with zeros, and halflap runs the model as it is"
            )
        config = padded_config(opened.config)
        tensors = pad_tensors(opened.config, config, tensors)
        if reason := obstacle(config):
            raise HalflapError(
                f"{FORMS[recipe.format]} cannot hold this model even padded, because {reason}; run it in halflap"
            )
    dtype = recipe.common.dtype
    types = opened.dtypes if dtype == "auto" else dict.fromkeys(opened.dtypes, dtype)
    lineage = [*opened.lineage, lineage_step("export", {opened.path.name: opened.digest}, format=recipe.format)]
    tensors = track(tensors, "export", len(opened.entries))
    if recipe.format == "megatron":
        write_megatron(run.path, config, tensors, types)
        write_json(run.path / "lineage.json", {"steps": lineage})
        copy_tokenizer(opened.path, run.path)
        written = open_megatron(run.path, settings_of(config))
    else:
        written = write_checkpoint(
            run.path,
            config,
            tensors,
            dtype=opened.dtypes if dtype == "auto" else dtype,
            tokenizer_from=opened.path,
            lineage=lineage,
        )
    return {
        "format": recipe.format,
        "path": str(run.path),
        "parameters": count_parameters(config),
        "padded": config != opened.config,
        "max_abs_error": _largest_difference(opened, written, recipe.common.seed),
    }


FORMS = {"hf": "stock classes", "megatron": "Megatron's form"}


def _largest_difference(one: Any, other: Any, seed: int) -> float:
    """Largest difference of the logits of two opened checkpoints on random tokens, in float32."""
    import torch

    from halflap.checkpoints.checkpoint import fill_model

    logits = []
    for opened in (one, other):
        model = fill_model(opened.config, opened.tensors(), torch.float32)
        generator = torch.Generator().manual_seed(seed)
        tokens = torch.randint(model.config.vocab_size, (2, EXPORT_CHECK_TOKENS), generator=generator)
        with torch.inference_mode():
            logits.append(model(tokens))
        del model  # one at a time: a large one may fill the memory
    return float((logits[0] - logits[1]).abs().max())


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
