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
from halflap.checkpoints.card import CARD, license_of, model_card
from halflap.checkpoints.checkpoint import Checkpoint, copy_tokenizer, write_checkpoint
from halflap.checkpoints.config import Lineage, family_of, lineage_step, read_ends
from halflap.checkpoints.gguf_export import TYPES, write_gguf
from halflap.checkpoints.gguf_import import open_gguf
from halflap.checkpoints.gguf_tokenizer import ENDS
from halflap.checkpoints.padding import own_name, padded_config, padded_reader, widened_norms
from halflap.checkpoints.passes import hidden_states_of
from halflap.checkpoints.streamed import StreamedModel
from halflap.commands.cards import CERTIFICATE, carried
from halflap.commands.config import ExportRecipe
from halflap.compress.plan import PLAN
from halflap.errors import HalflapError, RecipeError
from halflap.files import write_json
from halflap.models.config import ModelConfig
from halflap.models.count import count_parameters
from halflap.models.layout import layout
from halflap.models.quantization import Quantization, matrices
from halflap.models.quantized import pack_tensors
from halflap.progress import track
from halflap.run import Run

CHECK_TOKENS = 64
GGUF_FILE = "model.gguf"


@dataclass(frozen=True)
class Source:
    """What is written: a checkpoint under a config that may be padded, each of its parameters by name, how packed."""

    checkpoint: Checkpoint
    config: ModelConfig
    read: Callable[[str], Tensor]
    dtype: str
    lineage: Lineage
    quantization: Quantization | None = None

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """What a checkpoint of it holds; packed weights that stay so are copied as they are."""
        if self.quantization is not None and self.quantization == self.checkpoint.quantization:
            yield from track(self.checkpoint.tensors(), "export", len(self.checkpoint.entries))
            return
        names = layout(self.config)
        plain = ((name, self.read(name)) for name in track(names, "export", len(names)))
        yield from plain if self.quantization is None else pack_tensors(plain, self.config, self.quantization)

    @property
    def dtypes(self) -> dict[str, str]:
        """Our names to the types they are written in; a matrix that was packed has that of most others."""
        if self.dtype != "auto":
            return dict.fromkeys(layout(self.config), self.dtype)
        stored, common, before = self.checkpoint.dtypes, self.checkpoint.dtype, self.checkpoint.config
        named = {name: own_name(before, self.config, name) for name in layout(self.config)}
        return stored | {name: common if own is None else stored.get(own, common) for name, own in named.items()}


def export(recipe: ExportRecipe, run: Run) -> dict[str, Any]:
    """A checkpoint that stock tools load, and how far its logits are from the model's own."""
    source, form = _source(recipe), FORMS[recipe.format]
    path, written = form.write(source, run.path)
    before = source.checkpoint.config
    error, scale = _largest_difference(source.checkpoint, written, recipe.common.seed)
    result = {
        "format": recipe.format,
        "path": str(path),
        "parameters": count_parameters(source.config),
        "padded": source.config != before,
        "max_abs_error": error,
        "logit_scale": scale,
        "remark": _remark(source, recipe),
    }
    if source.quantization is not None:
        result |= {"weights": source.quantization.said(), "bytes": written.nbytes}
    return result


def _remark(source: Source, recipe: ExportRecipe) -> str | None:
    """What a user must know of a product that is not all it could be."""
    remarks, form = [], recipe.format
    if reason := FORMS[form].cannot_write(source.config):
        remarks.append(f"{FORMS[form].what} cannot hold this model, because {reason}; halflap runs it as it is")
    if widened := widened_norms(source.checkpoint.config, source.config):
        remarks.append(
            f"the gated norms of {widened} Mamba blocks were padded and are equal but for their eps, of which stock "
            "classes have one for all norms; look at max_abs_error"
        )
    if form == "gguf" and not (source.checkpoint.path / "tokenizer.json").exists():
        remarks.append("there is no tokenizer, so llama.cpp's library loads the file and its server does not")
    ends = read_ends(source.checkpoint.path, source.config)
    if form == "gguf" and len(ends) > len(ENDS):
        left = ", ".join(map(str, ends[len(ENDS) :]))
        remarks.append(f"a text of the model also ends at {left}, and GGUF has keys for {len(ENDS)} end tokens")
    return "; ".join(remarks) or None


def _source(recipe: ExportRecipe) -> Source:
    opened, form = Checkpoint.open(recipe.model, packed=True), FORMS[recipe.format]
    quantization = _quantization(recipe, opened)
    config, read = opened.config, opened.read_plain
    repacked = recipe.quantize is not None or quantization is not None  # asked for as it is, whoever opens it
    reason = form.cannot_write(config)
    if reason and (recipe.pad_to_stock or not repacked):
        if not recipe.pad_to_stock:
            help = "--pad-to-stock makes its layers equal with zeros, and " if _padding_helps(config, form) else ""
            raise HalflapError(
                f"{form.what} cannot hold this model, because {reason}; {help}halflap runs the model as it is"
            )
        config = padded_config(opened.config)
        if reason := form.cannot_write(config):
            raise HalflapError(f"{form.what} cannot hold this model even padded, because {reason}; run it in halflap")
        read = padded_reader(opened.config, config, opened.read_plain)
    packed = {"weights": quantization.said()} if quantization else {}
    step = lineage_step("export", {opened.path.name: opened.digest}, format=recipe.format, **packed)
    return Source(opened, config, read, recipe.common.dtype, [*opened.lineage, step], quantization)


def _quantization(recipe: ExportRecipe, opened: Checkpoint) -> Quantization | None:
    """How the weights are to be packed. Raises RecipeError for flags and HalflapError for weights that do not fit."""
    asked, before = recipe.quantize, opened.quantization
    if asked == "off" or (asked is None and before is None):
        if recipe.group_size or recipe.keep is not None:
            raise RecipeError("group_size and keep say how weights are packed; add --quantize int8, int4 or fp8")
        return None
    if recipe.format != "hf":
        found = f"{opened.path} holds {before.name} weights; " if before else ""
        raise RecipeError(f"{found}packed weights are written as --format hf alone; add --quantize off for plain ones")
    if before is None:
        try:
            wanted = Quantization.asked(str(asked), recipe.group_size, recipe.keep)
            some = matrices(opened.config, wanted)
        except HalflapError as error:
            raise RecipeError(str(error)) from error
        if not some:
            raise RecipeError("keep names all there is to pack; leave some of it out")
        return wanted
    if asked is not None or recipe.group_size or recipe.keep is not None or recipe.pad_to_stock:
        raise HalflapError(
            f"{opened.path} holds {before.name} weights already, and packing or padding them anew would add to their "
            "error; take the checkpoint that they were made from"
        )
    return before


def _padding_helps(config: ModelConfig, form: Form) -> bool:
    try:
        return form.cannot_write(padded_config(config)) is None
    except HalflapError:
        return False


def _write_hf(source: Source, directory: Path) -> tuple[Path, Any]:
    opened, config, packed = source.checkpoint, source.config, source.quantization
    changed = ["what made its layers unequal was padded with zeros"] if config != opened.config else []
    changed += [f"its weights were packed ({packed.said()})"] if packed and not opened.quantization else []
    beside = {
        file.name: file.read_text("utf-8") for name in (PLAN, CERTIFICATE) if (file := opened.path / name).exists()
    }
    more = carried(opened.path, changed)
    card = model_card(directory, config, source.lineage, license_of(opened.path), more, packed)
    written = write_checkpoint(
        directory,
        source.config,
        source.tensors(),
        dtype=source.dtypes if source.dtype == "auto" else source.dtype,
        tokenizer_from=opened.path,
        lineage=source.lineage,
        quantization=source.quantization,
        extra_files=beside | {CARD: card},
    )
    return directory, written


def _write_megatron(source: Source, directory: Path) -> tuple[Path, Any]:
    megatron.write_megatron(directory, source.config, source.tensors(), source.dtypes)
    write_json(directory / "lineage.json", {"steps": list(source.lineage)})
    copy_tokenizer(source.checkpoint.path, directory)
    return directory, megatron.open_megatron(directory, megatron.settings_of(source.config))


def _write_gguf(source: Source, directory: Path) -> tuple[Path, Any]:
    opened = source.checkpoint
    dtypes = source.dtypes
    matrices = {dtypes[name] for name, dims in layout(source.config).items() if len(dims) == 2}
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
    """Largest difference of the logits of two checkpoints on random tokens, in float32, and the largest logit.

    Each is read a block at a time, packed matrices in their plain form.
    """
    logits = []
    for opened in (one, other):
        if isinstance(opened, Checkpoint):
            model = StreamedModel.of(opened, torch.float32)
        else:
            model = StreamedModel.once(opened.config, opened.tensors(), torch.float32)
        generator = torch.Generator().manual_seed(seed)
        tokens = torch.randint(model.config.vocab_size, (2, CHECK_TOKENS), generator=generator)
        with torch.inference_mode():
            logits += [model.logits(hidden) for hidden in hidden_states_of(model, [(tokens, None)])]
    return float((logits[0] - logits[1]).abs().max()), float(logits[0].abs().max())
