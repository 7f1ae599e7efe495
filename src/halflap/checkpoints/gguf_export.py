"""A model and its tokenizer as one GGUF file, for llama.cpp and what is built on it.

Written through the `gguf` package, a tensor at a time. Matrices take the type asked for, all else is float32, as
llama.cpp wants it. Beside llama.cpp's keys go the whole config and the lineage, and A_log, which A = -exp(A_log) in
float32 does not determine; so `halflap import` gives back what was exported.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from halflap.checkpoints.config import Lineage
from halflap.checkpoints.gguf_import import EXACT_A_LOG, LINEAGE
from halflap.checkpoints.gguf_metadata import OWN_CONFIG, architecture_of, metadata, rope_divisors
from halflap.checkpoints.gguf_names import ROPE_FREQUENCIES, Stored, change, stored
from halflap.checkpoints.gguf_tokenizer import end_fields, tokenizer_fields
from halflap.errors import HalflapError
from halflap.files import atomic_write, full_disk_named
from halflap.models.config import ModelConfig

TYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
FILE_TYPES = {"float32": 0, "float16": 1, "bfloat16": 32}  # llama.cpp's numbers for "mostly of this type"


def write_gguf(
    file: Path,
    config: ModelConfig,
    read: Callable[[str], Tensor],
    *,
    dtype: str,
    name: str,
    tokenizer_from: Path,
    lineage: Lineage = (),
    license: str | None = None,
    track: Callable[[Iterable[Stored]], Iterable[Stored]] = iter,
) -> None:
    """Write `file`, whole or not at all.

    read: a parameter by our name. dtype: of the matrices, "float32", "float16" or "bfloat16". The config must be one
    that `gguf_metadata.cannot_write` has nothing against. Raises HalflapError for another dtype, a tokenizer that
    llama.cpp would read otherwise, and a full disk.
    """
    if dtype not in TYPES:
        raise HalflapError(f"dtype {dtype!r} cannot be written to GGUF; allowed are {', '.join(TYPES)}: choose one")
    gguf = _package()
    items = list(stored(config, architecture_of(config)))
    fields = {
        "general.type": "model",
        "general.name": name,
        "general.file_type": FILE_TYPES[dtype],
        "general.quantization_version": 2,
        **({"general.license": license} if license else {}),
        **tokenizer_fields(tokenizer_from, config.vocab_size),
        **metadata(config),
        OWN_CONFIG: json.dumps(config.to_json()),
        LINEAGE: json.dumps([dict(step) for step in lineage]),
    }
    fields |= end_fields(tokenizer_from, config, fields)
    if logarithms := [read(item.ours).float() for item in items if item.ours.endswith(".A_log")]:
        fields[EXACT_A_LOG] = torch.cat(logarithms).tolist()
    with full_disk_named(file.parent, by_numpy=True), atomic_write(file) as temporary:
        writer = gguf.GGUFWriter(temporary.name, architecture_of(config))
        for key, value in fields.items():
            _add(writer, key, value, gguf)
        divisors = rope_divisors(config)
        if divisors is not None:
            writer.add_tensor_info(ROPE_FREQUENCIES, divisors.shape, np.dtype(np.float32), divisors.nbytes)
        for item in items:
            _announce(writer, item, dtype, gguf)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        if divisors is not None:
            writer.write_tensor_data(divisors.numpy())
        for item in track(items):
            writer.write_tensor_data(_values(change(config, item.ours).there(read(item.ours)), item, dtype))
        writer.close()


def _package() -> Any:
    try:
        import gguf
    except ImportError:
        raise HalflapError(
            "writing a GGUF file needs the package gguf: install it with `pip install 'halflap[gguf]'`"
        ) from None
    return gguf


def _add(writer: Any, key: str, value: Any, gguf: Any) -> None:
    """A key of the type that llama.cpp expects for such a value."""
    kinds = gguf.GGUFValueType
    if isinstance(value, list):
        writer.add_array(key, value)
    else:
        kind = {bool: kinds.BOOL, int: kinds.UINT32, float: kinds.FLOAT32, str: kinds.STRING}[type(value)]
        writer.add_key_value(key, value, kind)


def _announce(writer: Any, item: Stored, dtype: str, gguf: Any) -> None:
    kind = gguf.GGMLQuantizationType[TYPES[dtype if item.is_matrix else "float32"]]
    width = 2 if item.is_matrix and dtype != "float32" else 4
    size = int(np.prod(item.shape)) * width
    writer.add_tensor_info(item.name, item.shape, np.dtype(np.float32), size, raw_dtype=kind)


def _values(tensor: Tensor, item: Stored, dtype: str) -> np.ndarray:
    """The tensor in the file's type; numpy has no bfloat16, whose bits go as integers."""
    result = tensor.detach().cpu().to(getattr(torch, dtype if item.is_matrix else "float32")).contiguous()
    if tuple(result.shape) != item.shape:
        raise HalflapError(
            f"tensor {item.ours} has shape {tuple(result.shape)} and the config says {item.shape}: correct one of them"
        )
    return (result.view(torch.int16) if result.dtype == torch.bfloat16 else result).numpy()
