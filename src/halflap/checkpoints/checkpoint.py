"""Checkpoints: open one, stream it, load a model from it, write one.

On disk a checkpoint is a Hugging Face directory (config.json, model*.safetensors, tokenizer files) with halflap.json
and lineage.json beside. Tensors stream one at a time under our names; `A_log`, `D` and `dt_bias` are float32 in a
loaded model whatever the file holds (numerics of the SSM), and a stream keeps the file's own types.
"""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from json import dumps
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from halflap import __version__
from halflap.checkpoints import files
from halflap.checkpoints.card import CARD, license_of, model_card
from halflap.checkpoints.config import (
    FAMILIES,
    GENERATION,
    Lineage,
    end_ids,
    family_of,
    file_names,
    find_directory,
    not_stock_because,
    read_config,
    read_ends,
    read_json,
    read_lineage,
    read_quantization,
    uses_own_names,
    write_config,
)
from halflap.checkpoints.files import CODES, DTYPES, Entry, TensorSpec
from halflap.checkpoints.names import match_tensors
from halflap.errors import HalflapError
from halflap.files import atomic_write, write_json
from halflap.models.config import ModelConfig
from halflap.models.model import HybridModel
from halflap.models.quantization import FLOAT, PACKED, SCALE, Quantization, matrices, split_part, stored
from halflap.models.quantized import prepare, unpack_matrix

__all__ = ["FAMILIES", "Checkpoint", "load_model", "read_config", "save_model", "write_checkpoint"]

FLOATS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
FLOAT_CODES = ("F32", "BF16", "F16", "F64")  # of what is not packed
ALWAYS_WIDE = (".A_log", ".D", ".dt_bias")  # float32 or wider in a model, and where a type is asked for on disk
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json", GENERATION),
)


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint: its config and where each tensor is; weights are read when asked for.

    Of a packed checkpoint (`quantization`) the entries are the parts of packed matrices, see `models/quantization.py`.
    """

    path: Path
    config: ModelConfig
    entries: Mapping[str, Entry]  # by our names, in the order of the layout
    lineage: list[dict[str, Any]]
    quantization: Quantization | None = None

    @staticmethod
    def open(path: str | Path, *, packed: bool = False) -> Checkpoint:
        """Open a Hugging Face directory or a run directory: read config and tensor headers, check that they fit.

        packed: whether the caller knows what to do with packed weights.
        Raises HalflapError, in one sentence, for everything that can be wrong with the files.
        """
        directory = find_directory(path)
        config = read_config(directory)
        family = family_of(config)
        own = uses_own_names(directory)
        quantization = read_quantization(directory, config)
        if quantization is not None and not packed:
            raise HalflapError(
                f"{directory} holds {quantization.name} weights, which are for running alone: take the checkpoint that "
                "they were made from, or write plain ones with `halflap export --quantize off`"
            )
        wanted = stored(config, quantization)
        entries = files.open_tensors(directory)
        ignored = (*family.ignored, r"^lm_head\.weight$") if config.tie_word_embeddings else family.ignored
        found = match_tensors(
            str(directory),
            {name: shape for name, (_, shape) in wanted.items()},
            _spelled(wanted, file_names(config, own=own), quantization),
            {name: entry.spec.shape for name, entry in entries.items()},
            prefixes=() if own else family.prefixes,
            ignored=ignored,
        )
        ordered = {ours: entries[found[ours]] for ours in wanted}
        if config.tie_word_embeddings and "lm_head.weight" in entries:
            _check_tied_head(directory, entries["lm_head.weight"], ordered["embedding.weight"])
        for name, entry in ordered.items():
            code, allowed = entry.spec.code, wanted[name][0]
            if code not in ((allowed,) if allowed else FLOAT_CODES):
                raise HalflapError(
                    f"tensor {name} in {directory} is {code}{'' if allowed else ', a quantized type'}; allowed is "
                    f"{allowed or ', '.join(FLOAT_CODES)}: dequantize the checkpoint first"
                )
        return Checkpoint(directory, config, ordered, read_lineage(directory), quantization)

    @property
    def family(self) -> str:
        return self.config.family

    @property
    def depth_unit(self) -> int:
        """Blocks that must be dropped together."""
        return family_of(self.config).depth_unit

    @property
    def dtypes(self) -> dict[str, str]:
        """Our name to the stored type, e.g. "bfloat16"; given to `write_checkpoint` it keeps every type."""
        return {name: _name(DTYPES[entry.spec.code]) for name, entry in self.entries.items()}

    @cached_property
    def dtype(self) -> str:
        """The type most of the stored bytes have, what packed matrices consist of left out."""
        sizes: dict[str, int] = {}
        for entry in (
            self.entries[name] for name, (code, _) in stored(self.config, self.quantization).items() if not code
        ):
            sizes[entry.spec.code] = sizes.get(entry.spec.code, 0) + entry.spec.nbytes
        return _name(DTYPES[max(sizes, key=lambda code: sizes[code])])

    @cached_property
    def nbytes(self) -> int:
        return sum(entry.spec.nbytes for entry in self.entries.values())

    @cached_property
    def digest(self) -> str:
        """Names the content, as 64 hexadecimal digits: the same config and tensors, however sharded and spelled.

        Tensors above 1 MiB are sampled (`files.digest_entry` says what that may miss).
        """
        total = sha256(dumps(self.config.to_json(), sort_keys=True).encode())
        if self.quantization is not None:
            total.update(dumps(self.quantization.to_json(), sort_keys=True).encode())
        for name, entry in self.entries.items():
            total.update(name.encode() + files.digest_entry(entry))
        return total.hexdigest()

    def read(self, name: str) -> Tensor:
        """One tensor by our name, as stored."""
        if name not in self.entries:
            raise HalflapError(
                f"{self.path} has no parameter {name!r}: take a name of the layout, e.g. {next(iter(self.entries))}"
            )
        return files.read_tensor(self.entries[name])

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor as stored, one at a time, in the order of the layout."""
        for name in self.entries:
            yield name, self.read(name)

    def read_plain(self, name: str) -> Tensor:
        """One parameter of the layout by our name; a packed matrix in float32."""
        matrix = matrices(self.config, self.quantization).get(name) if self.quantization else None
        return (
            self.read(name)
            if matrix is None
            else unpack_matrix({p: self.read(name + p) for p in matrix.parts()}, matrix)
        )


def _check_tied_head(directory: Path, head: Entry, embedding: Entry) -> None:
    if head.spec.shape != embedding.spec.shape or not torch.equal(
        files.read_tensor(head), files.read_tensor(embedding)
    ):
        raise HalflapError(
            f"{directory} has an lm_head.weight that differs from its embedding, and its config says "
            "tie_word_embeddings: set that to false in config.json if the head was trained, else delete the tensor"
        )


def load_model(path: str | Path, dtype: str = "float32", device: str | torch.device = "cpu") -> HybridModel:
    """The model of a checkpoint in evaluation mode; "auto" is the stored type.

    Memory stays at the model's own size and one tensor: the model is built without storage and filled as tensors come.
    """
    checkpoint = Checkpoint.open(path, packed=True)
    wanted = float_dtype(checkpoint.dtype if dtype == "auto" else dtype)
    model = fill_model(checkpoint.config, checkpoint.tensors(), wanted, device, checkpoint.quantization)
    known = end_ids(checkpoint.config)
    model.more_ends = tuple(i for i in read_ends(checkpoint.path, checkpoint.config) if i not in known)
    return model


def fill_model(
    config: ModelConfig,
    tensors: Iterable[tuple[str, Tensor]],
    dtype: torch.dtype,
    device: str | torch.device = "cpu",
    quantization: Quantization | None = None,
) -> HybridModel:
    """A model in evaluation mode from a stream of (our name, tensor), the parts of packed matrices as they are."""
    model = empty_model(config, quantization)
    model.load_state_dict({n: place(n, t, dtype, device) for n, t in tensors}, strict=True, assign=True)
    return model.eval()


def empty_model(config: ModelConfig, quantization: Quantization | None = None) -> HybridModel:
    """A model whose parameters have shapes and no storage (device "meta"), to be filled by `load_state_dict`."""
    with torch.device("meta"), _NoInitialisation():
        model = HybridModel(config)
        if quantization is not None:
            prepare(model, quantization)
    return model


class _NoInitialisation(TorchFunctionMode):
    """Skip random initialisation: without storage nothing can be filled, and torch takes seconds to find that out."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs.get("tensor", args[0] if args else None)
        return func(*args, **kwargs)


def float_dtype(name: str) -> torch.dtype:
    """The torch type of a name that users give."""
    if name not in FLOATS:
        raise HalflapError(f"dtype {name!r} is not known; allowed are {', '.join(FLOATS)}: choose one of them")
    return FLOATS[name]


def place(name: str, tensor: Tensor, dtype: torch.dtype, device: str | torch.device) -> Tensor:
    """A parameter on its device and in the dtype to compute in; itself where it is so already."""
    if split_part(name)[1] not in FLOAT:
        return tensor.to(device)
    if name.endswith(ALWAYS_WIDE):
        dtype = torch.promote_types(dtype, torch.float32)
    return tensor.to(device, dtype)


def save_model(
    model: HybridModel,
    directory: str | Path,
    *,
    dtype: str | None = None,
    tokenizer_from: str | Path | None = None,
    lineage: Lineage = (),
    extra_files: Mapping[str, str | bytes] | None = None,
) -> Checkpoint:
    """Write a model; without `dtype` every parameter keeps its own type."""
    state, small = model.state_dict(), dict(extra_files or {})
    if model.more_ends and tokenizer_from is None and not (Path(directory) / GENERATION).exists():
        ends = {"eos_token_id": [*end_ids(model.config), *model.more_ends]}
        small.setdefault(GENERATION, dumps(_special_ids(model.config) | ends, indent=2) + "\n")
    return write_checkpoint(
        directory,
        model.config,
        state.items(),
        dtype=dtype or {name: _name(tensor.dtype) for name, tensor in state.items()},
        tokenizer_from=tokenizer_from,
        lineage=lineage,
        extra_files=small,
        quantization=model.quantization,
    )


def write_checkpoint(
    directory: str | Path,
    config: ModelConfig,
    tensors: Iterable[tuple[str, Tensor]],
    *,
    dtype: str | Mapping[str, str] = "auto",
    tokenizer_from: str | Path | None = None,
    lineage: Lineage = (),
    extra_files: Mapping[str, str | bytes] | None = None,
    max_shard_bytes: int = 4_000_000_000,
    license: str | None = None,
    quantization: Quantization | None = None,
) -> Checkpoint:
    """Write a stream of (our name, tensor) as a checkpoint directory, one tensor in memory at a time, and open it.

    dtype: a type for all (`A_log`, `D`, `dt_bias` stay float32 or wider), "auto" for the first tensor's, or our name to
    type. The stock class's config and tensor names are used where it can express the model, ours where not.
    tokenizer_from: directory whose tokenizer files travel along, and its licence unless another is given.
    extra_files: name to content. quantization: how matrices of the stream are packed, as by `pack_tensors`.
    Raises HalflapError for tensors that do not fit the config and for a full disk; old weights survive that.
    """
    directory = Path(directory)
    reason = not_stock_because(config, quantization)
    tensors = iter(tensors)
    if dtype == "auto":
        first = next(tensors, None)
        tensors = itertools.chain([] if first is None else [first], tensors)
        dtype = "float32" if first is None else _name(first[1].dtype)
    announced = _specs(config, dtype, quantization)
    names = _spelled(announced, file_names(config, own=reason is not None), quantization)
    specs = {names[ours]: spec for ours, spec in announced.items()}
    spelled = ((names.get(ours, ours), tensor) for ours, tensor in tensors)
    files.write_shards(directory, specs, spelled, max_shard_bytes=max_shard_bytes)
    most = max((s for n, s in announced.items() if split_part(n)[1] in FLOAT), key=lambda spec: spec.nbytes)
    small = dict(extra_files or {})
    license = license or (license_of(tokenizer_from) if tokenizer_from is not None else None)
    small.setdefault(CARD, model_card(directory, config, lineage, license, quantization=quantization))
    write_config(directory, config, _name(DTYPES[most.code]), __version__, quantization)
    write_json(directory / "lineage.json", {"steps": [dict(step) for step in lineage]})
    if tokenizer_from is not None:
        copy_tokenizer(Path(tokenizer_from), directory)
    if GENERATION not in small and not (directory / GENERATION).exists():
        write_json(directory / GENERATION, _special_ids(config))
    for name, content in small.items():
        if name == CARD:  # the last
            _forbid_cache(directory)
        with atomic_write(directory / name) as file:
            file.write(content.encode() if isinstance(content, str) else content)
    return Checkpoint.open(directory, packed=True)


def _forbid_cache(directory: Path) -> None:
    """Where config.json says use_cache false, which stock `generate` does not read, generation_config.json says it."""
    file = directory / GENERATION
    if not read_json(directory / "config.json").get("use_cache", True) and file.exists():
        write_json(file, read_json(file) | {"use_cache": False})


def _special_ids(config: ModelConfig) -> dict[str, Any]:
    """What stock transformers needs to stop at the end token when the source brings no generation_config.json."""
    stored = config.to_json()
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    return {name: stored[name] for name in names if stored.get(name) is not None}


def _specs(
    config: ModelConfig, dtype: str | Mapping[str, str], quantization: Quantization | None
) -> dict[str, TensorSpec]:
    specs = {}
    for name, (code, shape) in stored(config, quantization).items():
        if code is None:
            code = CODES[_stored_type(name, dtype)]
        specs[name] = TensorSpec(code, shape)
    return specs


def _stored_type(name: str, dtype: str | Mapping[str, str]) -> torch.dtype:
    """The type that a tensor of our name is written in; kept rows and scales have that of their matrix."""
    parameter, suffix = split_part(name)
    given = dtype if isinstance(dtype, str) else dtype.get(name) or dtype.get(parameter)
    if given is None:
        raise HalflapError(f"no dtype is given for tensor {name}: name one for every parameter of the layout")
    chosen = float_dtype(given)
    if suffix == SCALE and chosen == torch.float16:
        return torch.bfloat16  # a scale may lie below float16's range
    wide = isinstance(dtype, str) and name.endswith(ALWAYS_WIDE)
    return torch.promote_types(chosen, torch.float32) if wide else chosen


def _spelled(names: Iterable[str], table: Mapping[str, str], quantization: Quantization | None) -> dict[str, str]:
    """Our names, those of parts among them, to the file's; table: our parameter to the file's."""
    spelled = {PACKED: ""} if quantization is not None and quantization.number == "float" else {}
    parts = {name: split_part(name) for name in names}
    return {name: table[parameter] + spelled.get(suffix, suffix) for name, (parameter, suffix) in parts.items()}


def copy_tokenizer(source: Path, directory: Path) -> list[str]:
    """Copy the tokenizer files that `source` (a checkpoint or run directory) has; returns their names."""
    if not source.is_dir():
        raise HalflapError(
            f"{source} is no directory and tokenizer files should come from it: give a checkpoint directory"
        )
    if not (source / "config.json").exists() and (source / "checkpoint").is_dir():
        source = source / "checkpoint"
    copied = []
    for name in TOKENIZER_FILES:
        if (source / name).exists() and source.resolve() != directory.resolve():
            with open(source / name, "rb") as read, atomic_write(directory / name) as write:
                shutil.copyfileobj(read, write)
            copied.append(name)
    return copied


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
