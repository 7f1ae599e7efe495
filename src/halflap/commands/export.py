"""`export`: a checkpoint in a form that other tools load, and how far its logits are from the model's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from halflap.checkpoints import gguf_metadata, megatron
from halflap.checkpoints.card import license_of
from halflap.checkpoints.checkpoint import Checkpoint, copy_tokenizer, fill_model, write_checkpoint
from halflap.checkpoints.config import Lineage, family_of, lineage_step
from halflap.checkpoints.gguf_export import TYPES, write_gguf
from halflap.checkpoints.gguf_import import open_gguf
from halflap.checkpoints.padding import padded_config, padder, widened_norms
from halflap.commands.config import ExportRecipe
from halflap.errors import HalflapError
from halflap.files import write_json
from halflap.models.config import ModelConfig
from halflap.models.count import count_parameters
from halflap.progress import track
from halflap.run import Run

CHECK_TOKENS = 64
GGUF_FILE = "model.gguf"


@dataclass(frozen=True)
class Source:
    """What is written: a checkpoint under a config that may be padded, and each tensor of that by name."""

    checkpoint: Checkpoint
    config: ModelConfig
    read: Callable[[str], Tensor]
    dtype: str
    lineage: Lineage

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        for name in track(self.checkpoint.entries, "export", len(self.checkpoint.entries)):
            yield name, self.read(name)


def export(recipe: ExportRecipe, run: Run) -> dict[str, Any]:
    """A checkpoint that stock tools load, and how far its logits are from the model's own."""
    source, form = _source(recipe), FORMS[recipe.format]
    path, written = form.write(source, run.path)
    before = source.checkpoint.config
    error, scale = _largest_difference(source.checkpoint, written, recipe.common.seed)
    return {
        "format": recipe.format,
        "path": str(path),
        "parameters": count_parameters(source.config),
        "padded": source.config != before,
        "max_abs_error": error,
        "logit_scale": scale,
        "remark": _remark(source, recipe.format),
    }


def _remark(source: Source, form: str) -> str | None:
    """What a user must know of a product that is not all it could be."""
    remarks = []
    if widened := widened_norms(source.checkpoint.config, source.config):
        remarks.append(
            f"the gated norms of {widened} Mamba blocks were padded and are equal but for their eps, of which stock "
            "classes have one for all norms; look at max_abs_error"
        )
    if form == "gguf" and not (source.checkpoint.path / "tokenizer.json").exists():
        remarks.append("there is no tokenizer, so llama.cpp's library loads the file and its server does not")
    return "; ".join(remarks) or None


def _source(recipe: ExportRecipe) -> Source:
    opened, form = Checkpoint.open(recipe.model), FORMS[recipe.format]
    config, read = opened.config, opened.read
    if reason := form.cannot_write(config):
        if not recipe.pad_to_stock:
            help = "--pad-to-stock pads unequal widths with zeros, and " if _padding_helps(config, form) else ""
            raise HalflapError(
                f"{form.what} cannot hold this model, because {reason}; {help}halflap runs the model as it is"
            )
        config = padded_config(opened.config)
        if reason := form.cannot_write(config):
            raise HalflapError(f"{form.what} cannot hold this model even padded, because {reason}; run it in halflap")
        pad = padder(opened.config, config)
        read = lambda name: pad(name, opened.read(name))
    step = lineage_step("export", {opened.path.name: opened.digest}, format=recipe.format)
    return Source(opened, config, read, recipe.common.dtype, [*opened.lineage, step])


def _padding_helps(config: ModelConfig, form: Form) -> bool:
    try:
        return form.cannot_write(padded_config(config)) is None
    except HalflapError:
        return False


def _write_hf(source: Source, directory: Path) -> tuple[Path, Any]:
    opened = source.checkpoint
    written = write_checkpoint(
        directory,
        source.config,
        source.tensors(),
        dtype=opened.dtypes if source.dtype == "auto" else source.dtype,
        tokenizer_from=opened.path,
        lineage=source.lineage,
    )
    return directory, written


def _write_megatron(source: Source, directory: Path) -> tuple[Path, Any]:
    stored = source.checkpoint.dtypes
    types = stored if source.dtype == "auto" else dict.fromkeys(stored, source.dtype)
    megatron.write_megatron(directory, source.config, source.tensors(), types)
    write_json(directory / "lineage.json", {"steps": list(source.lineage)})
    copy_tokenizer(source.checkpoint.path, directory)
    return directory, megatron.open_megatron(directory, megatron.settings_of(source.config))


def _write_gguf(source: Source, directory: Path) -> tuple[Path, Any]:
    opened = source.checkpoint
    matrices = {opened.dtypes[name] for name, entry in opened.entries.items() if len(entry.spec.shape) == 2}
    common = next(iter(matrices)) if len(matrices) == 1 else "float32"
    write_gguf(
        directory / GGUF_FILE,
        source.config,
        source.read,
        dtype=source.dtype if source.dtype != "auto" else common if common in TYPES else "float32",
        name=directory.resolve().name,
        tokenizer_from=opened.path,
        lineage=source.lineage,
        license=license_of(opened.path),
        track=partial(track, what="export"),
    )
    return directory / GGUF_FILE, open_gguf(directory / GGUF_FILE)


class Form(NamedTuple):
    """A target: what it is called, why it cannot hold a config or None, and how it is written and opened again."""

    what: str
    cannot_write: Callable[[ModelConfig], str | None]
    write: Callable[[Source, Path], tuple[Path, Any]]


FORMS: dict[str, Form] = {
    "hf": Form("stock classes", lambda config: family_of(config).cannot_write(config), _write_hf),
    "megatron": Form("Megatron's form", megatron.cannot_write, _write_megatron),
    "gguf": Form("GGUF", gguf_metadata.cannot_write, _write_gguf),
}


def _largest_difference(one: Any, other: Any, seed: int) -> tuple[float, float]:
    """Largest difference of the logits of two checkpoints on random tokens, in float32, and the largest logit."""
    logits = []
    for opened in (one, other):
        model = fill_model(opened.config, opened.tensors(), torch.float32)
        generator = torch.Generator().manual_seed(seed)
        tokens = torch.randint(model.config.vocab_size, (2, CHECK_TOKENS), generator=generator)
        with torch.inference_mode():
            logits.append(model(tokens))
        del model  # one at a time: a large one may fill the memory
    return float((logits[0] - logits[1]).abs().max()), float(logits[0].abs().max())
