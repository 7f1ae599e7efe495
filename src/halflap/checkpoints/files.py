"""Safetensors on disk: a reader that touches only the tensor asked for, a writer that streams.

Format (safetensors): 8 bytes little-endian header length, a JSON header `{name: {dtype, shape, data_offsets}}`, raw
row-major data. Reading goes through plain reads, not a memory map, so resident memory is one tensor and a truncated
file is an error instead of a bus error. Writing needs all dtypes and shapes first, because the header precedes the
data; then each tensor goes to its place as it comes, in any order.

A write never touches the files it replaces until everything is on the disk. The last step is one atomic rename:
`model.safetensors` itself, or the index that names the new shards; a process killed anywhere leaves the old or the new.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from halflap.errors import HalflapError
from halflap.files import full_disk_named, sync, write_json

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
CODES: dict[torch.dtype, str] = {dtype: code for code, dtype in DTYPES.items()}

ALIGNMENT = 64  # bytes of a cache line
PIECE = 1 << 24  # bytes moved by one system call, which takes no more than 2 GiB anyway
SAMPLE_ALL = 1 << 20  # tensors up to 1 MiB are digested whole
SAMPLE_BLOCKS, SAMPLE_BLOCK = 16, 1 << 14  # of larger ones 16 blocks of 16 KiB, evenly spread, both ends included


class TensorSpec(NamedTuple):
    """A tensor's type code (a key of `DTYPES`) and shape."""

    code: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.code].itemsize


class Entry(NamedTuple):
    """Where a tensor's bytes are."""

    spec: TensorSpec
    file: Path
    start: int


def read_header(path: Path) -> dict[str, Entry]:
    """The tensors of one safetensors file; a truncated or corrupt file raises HalflapError naming it and what to do."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        head = file.read(8)
        length = int.from_bytes(head, "little")
        if head.startswith(b"version "):
            raise HalflapError(f"{path} is a Git LFS pointer, not weights: fetch the file itself with `git lfs pull`")
        if len(head) < 8 or length > size - 8:
            raise HalflapError(
                f"{path} is truncated or not safetensors (it has {size} bytes, its header alone should take {length}): "
                "copy or download it again"
            )
        text = file.read(length)
    try:
        header = json.loads(text)
        entries = {
            name: _entry(path, name, item, 8 + length, size) for name, item in header.items() if name != "__metadata__"
        }
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        if isinstance(error, HalflapError):
            raise
        raise HalflapError(f"the header of {path} is corrupt ({error}): copy or download the file again") from None
    end = max((entry.start + entry.spec.nbytes for entry in entries.values()), default=8 + length)
    if end != size:
        raise HalflapError(
            f"{path} is corrupt: its header describes {end} bytes and the file has {size}: copy or download it again"
        )
    return entries


def _entry(path: Path, name: str, item: Mapping, base: int, size: int) -> Entry:
    code, shape, (start, end) = item["dtype"], tuple(int(n) for n in item["shape"]), item["data_offsets"]
    if code not in DTYPES:
        raise HalflapError(
            f"tensor {name} of {path} has type {code!r}; allowed are {', '.join(DTYPES)}: convert the checkpoint first"
        )
    spec = TensorSpec(code, shape)
    if min(shape, default=1) < 0 or start < 0 or end - start != spec.nbytes:
        raise ValueError(f"tensor {name} of shape {shape} and type {code} cannot occupy bytes {start} to {end}")
    if base + end > size:
        raise HalflapError(
            f"{path} is truncated: tensor {name} ends at byte {base + end} and the file has {size}: "
            "copy or download it again"
        )
    return Entry(spec, path, base + start)


def open_tensors(directory: Path) -> dict[str, Entry]:
    """All tensors of a checkpoint directory, from `model.safetensors` or an index and its shards; headers only.

    Raises HalflapError for a missing shard or tensor (by name) and for a directory with pickled weights only.
    """
    if (directory / SINGLE).exists():
        return read_header(directory / SINGLE)
    if (directory / INDEX).exists():
        return _open_shards(directory)
    shards = sorted(directory.glob("*.safetensors"))
    if len(shards) == 1:
        return read_header(shards[0])
    if shards:
        raise HalflapError(
            f"{directory} has {len(shards)} safetensors files but no {INDEX} that says what is where: "
            "copy the index too"
        )
    pickled = sorted(path.name for pattern in PICKLED for path in directory.glob(pattern))
    if pickled:
        raise HalflapError(
            f"{directory} has only pickled weights ({pickled[0]}), which can run code when opened and are not read; "
            "convert them to safetensors first (transformers: from_pretrained, then save_pretrained)"
        )
    raise HalflapError(f"{directory} has no weights: expected {SINGLE} or {INDEX} with its shards")


def _open_shards(directory: Path) -> dict[str, Entry]:
    index = directory / INDEX
    try:
        places: dict[str, str] = dict(json.loads(index.read_text("utf-8"))["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
        raise HalflapError(f"{index} is corrupt ({error}): copy or download it again") from None
    entries: dict[str, Entry] = {}
    shards = sorted(set(places.values()))
    for shard in shards:
        if Path(shard).name != shard:
            raise HalflapError(f"{index} names a shard outside its directory ({shard!r}): use a plain file name")
        if not (directory / shard).exists():
            raise HalflapError(
                f"shard {shard} (one of {len(shards)}) is missing in {directory}: copy or download it too"
            )
        found = read_header(directory / shard)
        entries |= {name: entry for name, entry in found.items() if places.get(name, shard) == shard}
    if lost := sorted(set(places) - set(entries)):
        raise HalflapError(
            f"tensor {lost[0]} is not in shard {places[lost[0]]} where {index} puts it: "
            "copy or download the shard again"
        )
    return entries


def read_tensor(entry: Entry) -> Tensor:
    """Read one tensor; no other byte of the file is touched."""
    tensor = _empty(entry.spec)
    view = _bytes(tensor)
    with open(entry.file, "rb", buffering=0) as file:
        file.seek(entry.start)
        done = 0
        while done < len(view):
            count = file.readinto(view[done : done + PIECE])
            if not count:
                raise HalflapError(f"{entry.file} became shorter while it was read: copy or download it again")
            done += count
    return tensor


def _empty(spec: TensorSpec) -> Tensor:
    """Memory for a tensor from NumPy, which asks for large pages: small ones cost more at first touch than reading."""
    memory = np.empty(spec.nbytes + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    return torch.from_numpy(memory[start : start + spec.nbytes]).view(DTYPES[spec.code]).reshape(spec.shape)


def _bytes(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, shared, not copied."""
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


def digest_entry(entry: Entry) -> bytes:
    """A sha256 over a tensor's type, shape and bytes; above 1 MiB over 16 blocks of 16 KiB of them, evenly spread.

    The trade-off: a full hash of 16 GB takes 10 seconds or more, this takes well under one, and any training step,
    cast or pruning changes nearly every block; what it can miss is a hand edit of a few values of a large tensor.
    """
    digest = hashlib.sha256(f"{entry.spec.code}{list(entry.spec.shape)}".encode())
    size = entry.spec.nbytes
    with open(entry.file, "rb", buffering=0) as file:
        if size <= SAMPLE_ALL:
            file.seek(entry.start)
            digest.update(file.read(size))
        else:
            for block in range(SAMPLE_BLOCKS):
                file.seek(entry.start + block * (size - SAMPLE_BLOCK) // (SAMPLE_BLOCKS - 1))
                digest.update(file.read(SAMPLE_BLOCK))
    return digest.digest()


@dataclass(frozen=True)
class _Shard:
    final: str
    header: bytes
    offsets: dict[str, int]
    size: int


def write_shards(
    directory: Path,
    specs: Mapping[str, TensorSpec],
    tensors: Iterable[tuple[str, Tensor]],
    *,
    max_shard_bytes: int = 4_000_000_000,
) -> None:
    """Write `tensors` (in any order, each name of `specs` once, cast to its type) holding one of them at a time.

    Replaces the weights of `directory` at the end, in one atomic step. Raises HalflapError for an unexpected,
    repeated, missing or wrongly shaped tensor and for a full disk; then the temporary files are gone and the old
    weights are as they were.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise HalflapError(
            f"directory {str(directory)!r} cannot be made ({error.strerror}); give another directory"
        ) from None
    _remove_leftovers(directory)
    shards = _plan(directory, specs, max_shard_bytes)
    needed = sum(shard.size for shard in shards)
    free = shutil.disk_usage(directory).free
    if needed > free:
        raise HalflapError(
            f"writing {needed / 1e6:,.1f} MB of weights to {directory} needs more than the {free / 1e6:,.1f} MB free "
            "there: free some space or choose another --out"
        )
    tag = f"{os.getpid()}-{uuid.uuid4().hex[:8]}"
    temporary = {shard.final: directory / f".{shard.final}.{tag}.tmp" for shard in shards}
    try:
        with full_disk_named(directory):
            _write_data(shards, temporary, specs, tensors)
            _commit(directory, shards, temporary, needed)
    finally:
        for path in temporary.values():
            path.unlink(missing_ok=True)


def _plan(directory: Path, specs: Mapping[str, TensorSpec], max_shard_bytes: int) -> list[_Shard]:
    groups: list[list[str]] = [[]]
    filled = 0
    for name, spec in specs.items():
        if groups[-1] and filled + spec.nbytes > max_shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += spec.nbytes
    if len(groups) == 1:
        names = [SINGLE]
    else:
        names = [f"model-{number:05}-of-{len(groups):05}.safetensors" for number in range(1, len(groups) + 1)]
        if any((directory / name).exists() for name in names):  # the old shards must outlive a kill: take fresh names
            tag = uuid.uuid4().hex[:6]
            names = [name.replace("model-", f"model-{tag}-") for name in names]
    return [_shard(final, {name: specs[name] for name in group}) for final, group in zip(names, groups)]


def _shard(final: str, specs: Mapping[str, TensorSpec]) -> _Shard:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    starts: dict[str, int] = {}
    for name, (code, shape) in specs.items():
        end = position + TensorSpec(code, shape).nbytes
        header[name] = {"dtype": code, "shape": list(shape), "data_offsets": [position, end]}
        starts[name], position = position, end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    base = 8 + len(text)
    return _Shard(
        final,
        len(text).to_bytes(8, "little") + text,
        {name: base + start for name, start in starts.items()},
        base + position,
    )


def _write_data(
    shards: list[_Shard],
    temporary: Mapping[str, Path],
    specs: Mapping[str, TensorSpec],
    tensors: Iterable[tuple[str, Tensor]],
) -> None:
    place = {name: (shard, offset) for shard in shards for name, offset in shard.offsets.items()}
    for shard in shards:
        with open(temporary[shard.final], "wb") as file:
            file.write(shard.header)
    for name, tensor in tensors:
        if name not in place:
            what = "comes twice or" if name in specs else "is not among the tensors announced and"
            raise HalflapError(f"tensor {name} {what} cannot be written: give each tensor of the layout once")
        shard, offset = place.pop(name)
        if tuple(tensor.shape) != specs[name].shape:
            raise HalflapError(
                f"tensor {name} has shape {tuple(tensor.shape)} and the config says {specs[name].shape}: "
                "correct one of them"
            )
        data = _bytes(tensor.detach().to("cpu", DTYPES[specs[name].code]).contiguous())
        with open(temporary[shard.final], "r+b", buffering=0) as file:
            file.seek(offset)
            done = 0
            while done < len(data):
                done += file.write(data[done : done + PIECE])
    if place:
        raise HalflapError(
            f"{len(place)} tensors never came, the first is {next(iter(place))}: give each tensor of the layout once"
        )


def _commit(directory: Path, shards: list[_Shard], temporary: Mapping[str, Path], total: int) -> None:
    old = _listed(directory)
    for path in temporary.values():
        sync(path)
    if len(shards) > 1:
        for shard in shards:
            os.replace(temporary[shard.final], directory / shard.final)
        places = {name: shard.final for shard in shards for name in shard.offsets}
        sync(directory)
        write_json(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": places})
        (directory / SINGLE).unlink(missing_ok=True)  # readers prefer it to the index: this is the switch
    else:
        os.replace(temporary[SINGLE], directory / SINGLE)
        (directory / INDEX).unlink(missing_ok=True)
    for name in old - {shard.final for shard in shards}:
        (directory / name).unlink(missing_ok=True)
    sync(directory)


def _listed(directory: Path) -> set[str]:
    """Names of the shards that an index in `directory` lists."""
    try:
        names = set(json.loads((directory / INDEX).read_text("utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return set()
    return {n for n in names if isinstance(n, str) and Path(n).name == n and n.endswith(".safetensors")}


def _remove_leftovers(directory: Path) -> None:
    """Delete temporary weight files of processes that are gone."""
    for path in directory.glob(".model*.safetensors.*-*.tmp"):
        owner = path.name.rsplit(".", 2)[-2].split("-")[0]
        if owner.isdigit() and not _alive(int(owner)):
            path.unlink(missing_ok=True)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True
