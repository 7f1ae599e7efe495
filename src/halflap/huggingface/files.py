"""Directories of ours to the state of the transformers classes, and back.

Reading and writing is `checkpoints.checkpoint`'s, so a directory is the same whichever way it was made. Only names
differ: the network lies at `model.network`, and the language head at `lm_head`, where PEFT and TRL look for it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from torch import Tensor

from halflap.amounts import parse_amount
from halflap.checkpoints.checkpoint import Checkpoint
from halflap.checkpoints.config import family_of, find_directory
from halflap.checkpoints.names import expand
from halflap.errors import HalflapError
from halflap.models.config import ModelConfig
from halflap.models.layout import layout

HEAD, EMBEDDING = "lm_head.weight", "model.network.embedding.weight"
HUB = ("cache_dir", "force_download", "local_files_only", "token", "revision")
WANTED = ("*.json", "*.safetensors", "*.jinja", "tokenizer.model")


def module_name(ours: str) -> str:
    """The state-dict name of a parameter of ours."""
    return HEAD if ours == "head.weight" else f"model.network.{ours}"


def resolve(path: Any, fields: dict[str, Any]) -> Path:
    """The checkpoint's directory; takes out of `fields` what says where on the hub it is."""
    hub = {name: fields.pop(name) for name in HUB if fields.get(name) is not None}
    subfolder = fields.pop("subfolder", None) or ""
    if not Path(path).exists() and not Path(path).is_absolute():
        path = snapshot_download(str(path), allow_patterns=[*WANTED, *(f"{subfolder}/{w}" for w in WANTED)], **hub)
    return find_directory(Path(path) / subfolder)


def read_state(checkpoint: Checkpoint, config: ModelConfig) -> dict[str, Tensor]:
    """A checkpoint's tensors under the names of the module; a head that is to be untied starts as the embedding."""
    state = {module_name(name): tensor for name, tensor in checkpoint.tensors()}
    if checkpoint.config.tie_word_embeddings and not config.tie_word_embeddings:
        state[HEAD] = state[EMBEDDING].clone()
    return state


def translate(state: Mapping[str, Any], config: ModelConfig) -> dict[str, Any]:
    """A state dict under the names of files, ours or the family's, under those of the module; others pass through."""
    names: dict[str, str] = {}
    for table in ((), family_of(config).rows):
        try:
            names |= {theirs: module_name(ours) for ours, theirs in expand(config, table).items()}
        except LookupError:  # a family's table covers only what its stock class can express
            continue
    translated = {name if name.startswith("model.network.") else names.get(name, name): state[name] for name in state}
    if config.tie_word_embeddings and HEAD not in translated and EMBEDDING in translated:
        translated[HEAD] = translated[EMBEDDING]
    return translated


def collect(state: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """A module's state under our names. Raises HalflapError when adapters are still in it or the tie is broken."""
    found = {ours: state.get(module_name(ours)) for ours in layout(config)}
    if missing := [name for name, tensor in found.items() if tensor is None]:
        raise HalflapError(
            f"{len(missing)} parameters are not where they should be ({', '.join(missing[:3])}...), which is so while "
            "adapters are attached: save the PeftModel for the adapters alone, or call merge_and_unload() first"
        )
    head, embedding = state.get(HEAD), state.get(EMBEDDING)
    if config.tie_word_embeddings and head is not None and embedding is not None and not same(head, embedding):
        raise HalflapError(
            "the language head and the embedding differ and the config ties them; set "
            "model.config.tie_word_embeddings = False to save both"
        )
    return {name: tensor for name, tensor in found.items() if tensor is not None}


def same(a: Tensor, b: Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() or (a.shape == b.shape and bool((a.detach().cpu() == b.detach().cpu()).all()))


def shard_bytes(size: int | str) -> int:
    """What transformers calls max_shard_size: bytes, or text such as "5GB"."""
    return size if isinstance(size, int) else int(parse_amount(size, "bytes", share=False).value)


def stream(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in tensors.items():
        yield name, tensor.detach().cpu()
