"""GGUF files opened, and dequantized to a checkpoint directory.

Reading goes through the `gguf` package; one tensor is in memory at a time. What tensors are called and how they are
stored is in `gguf_names.py`, what the keys mean in `gguf_metadata.py`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from halflap.checkpoints.checkpoint import Checkpoint, write_checkpoint
from halflap.checkpoints.config import lineage_step
from halflap.checkpoints.gguf_metadata import READERS, Fields, read_config
from halflap.checkpoints.gguf_names import ROPE_FREQUENCIES, change, stored
from halflap.checkpoints.gguf_tokenizer import tokenizer_files
from halflap.checkpoints.names import match_tensors
from halflap.errors import HalflapError
from halflap.files import digest_file
from halflap.models.config import ModelConfig
from halflap.models.layout import layout, shape

LINEAGE, EXACT_A_LOG = "halflap.lineage", "halflap.A_log"


@dataclass(frozen=True)
class GgufFile:
    """An opened GGUF file: its config and keys; weights are read when asked for."""

    path: Path
    config: ModelConfig
    fields: Fields
    entries: Mapping[str, Any]  # by our names, in the order of the layout

    @property
    def matrix_types(self) -> set[str]:
        """Types of what is not a vector, e.g. "Q4_K"."""
        return {entry.tensor_type.name for entry in self.entries.values() if len(entry.shape) > 1}

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """(our name, tensor) one at a time, as the layout has them; bfloat16, float16 and float32 are exact."""
        from gguf.quants import dequantize

        # read, not taken from the package's memory map, whose pages would all count as the process's in the end
        raw = lambda entry: np.fromfile(self.path, np.uint8, int(entry.n_bytes), offset=int(entry.data_offset))
        exact = np.asarray(self.fields.get(EXACT_A_LOG, ()), np.float32)
        for name, entry in self.entries.items():
            stored_values = raw(entry).view(entry.data.dtype).reshape(entry.data.shape)
            values = dequantize(stored_values, entry.tensor_type)
            tensor = torch.from_numpy(values if values.flags.writeable else values.copy()).reshape(_shape(entry))
            how = change(self.config, name)
            result = how.back(tensor)
            if name.endswith(".A_log") and len(exact):
                kept, exact = torch.from_numpy(exact[: result.numel()].copy()), exact[result.numel() :]
                if torch.equal(how.there(kept).reshape(-1), tensor.reshape(-1)):
                    result = kept
            yield name, result


def open_gguf(file: str | Path) -> GgufFile:
    """Open a GGUF file and check that its tensors fit its keys.

    Raises HalflapError for a broken file, another architecture, and tensors that are missing, unknown or misshapen.
    """
    file = Path(file)
    reader = _open(file)
    fields: Fields = {name: field.contents() for name, field in reader.fields.items()}
    found = {tensor.name: tensor for tensor in reader.tensors}
    architecture = fields.get("general.architecture")
    if architecture not in READERS:
        raise HalflapError(
            f"{file} holds a model of architecture {architecture!r}; allowed are {', '.join(READERS)}: "
            "use a GGUF of one of these"
        )
    shapes = {name: _shape(tensor) for name, tensor in found.items()}
    config = read_config(fields, shapes, lambda: torch.tensor(found[ROPE_FREQUENCIES].data.copy()))
    expected = {item.name: item for item in stored(config, architecture)}
    dims = layout(config)
    for name, item in expected.items():
        if shapes.get(name) == item.shape:  # as the layout has it, which is what the check below speaks of
            shapes[name] = shape(dims[item.ours])
    names = {item.ours: name for name, item in expected.items()}
    wanted = {ours: shape(size) for ours, size in dims.items()}
    matched = match_tensors(str(file), wanted, names, shapes, ignored=(r"^rope_freqs\.weight$",))
    return GgufFile(file, config, fields, {ours: found[matched[ours]] for ours in dims})


def import_gguf(
    file: str | Path, out: str | Path, dtype: str = "auto", *, tokenizer_from: str | Path | None = None
) -> Checkpoint:
    """Write the model and tokenizer of a GGUF file as a checkpoint directory.

    dtype: "auto" is bfloat16 when the matrices are stored so, else float32 (a dequantized value has no shorter exact
    form). tokenizer_from replaces the tokenizer inside the file. Raises HalflapError for a broken file, another
    architecture, and a tokenizer that cannot be rebuilt.
    """
    opened = open_gguf(file)
    files = {} if tokenizer_from is not None else tokenizer_files(opened.fields)
    matrices = opened.matrix_types
    if dtype == "auto":
        dtype = "bfloat16" if matrices <= {"BF16", "F32"} and "BF16" in matrices else "float32"
    step = lineage_step("import", {opened.path.name: digest_file(opened.path)}, stored_as=", ".join(sorted(matrices)))
    return write_checkpoint(
        out,
        opened.config,
        opened.tensors(),
        dtype=dtype,
        tokenizer_from=tokenizer_from,
        lineage=[*json.loads(opened.fields.get(LINEAGE, "[]")), step],
        extra_files=files,
        license=opened.fields.get("general.license"),
    )


def _open(file: Path) -> Any:
    try:
        import gguf
    except ImportError:
        raise HalflapError(
            "reading a GGUF file needs the package gguf: install it with `pip install 'halflap[gguf]'`"
        ) from None
    if not file.exists():
        raise HalflapError(f"{file} does not exist: give a GGUF file")
    try:
        return gguf.GGUFReader(file)
    except Exception as error:  # the package raises whatever its parsing runs into
        raise HalflapError(f"{file} is truncated or not a GGUF file ({error}): copy or download it again") from None


def _shape(tensor: Any) -> tuple[int, ...]:
    """GGUF lists dimensions fastest first; ours are slowest first."""
    return tuple(int(n) for n in reversed(tensor.shape))
