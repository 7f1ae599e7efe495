"""A teacher's k best next-token log-probabilities, computed once, stored compressed, read by batch.

`manifest.json` says what was stored; `batch-00000012.npz` holds one batch: indices (uint16, or uint32 for a large
vocabulary) and log-probabilities (float16), each as byte planes of shape (bytes, k, M), because entries of equal
rank are alike and their high bytes nearly constant, which is what zlib finds; and the mass of all other tokens
(float32). Files appear whole, so an interrupted writing goes on where it stopped. A batch file carries the digest of
its tokens and refuses other ones. float16 costs at most 2^-11 of a log-probability, and reading restores the exact
total; lumping the tail makes the loss a lower bound of the full KL. When all is written, the manifest says the bytes a
token takes and what is lost: KL(full || stored with the rest spread evenly) on the first batch, in nats a token.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from halflap.data.batch import Batch
from halflap.errors import HalflapError
from halflap.files import atomic_write, write_json
from halflap.models.model import HybridModel
from halflap.ops.vocabulary_loss import top_k_error_sum, top_k_log_probs
from halflap.progress import track
from halflap.train.numerics import precision, resolve_dtype

FORMAT, MANIFEST = 1, "manifest.json"


@dataclass(frozen=True, eq=False)
class TeacherBatch(Batch):
    """A batch with what its teacher predicts: indices (B, T, k) int64 and log-probabilities (B, T, k) float32."""

    teacher_indices: Tensor | None = None
    teacher_log_probs: Tensor | None = None


@dataclass(frozen=True)
class Stored:
    """What storing has cost: bytes of all files, of a token on average, and nats a token of KL(full || stored)."""

    bytes: int
    bytes_per_token: float
    error: float


def store_teacher_logits(
    teacher: HybridModel,
    batches: Callable[[int], Batch],
    count: int,
    directory: str | Path,
    *,
    k: int = 64,
    digest: str = "",
    device: str = "cpu",
    dtype: str = "auto",
) -> Stored:
    """Store the teacher's k best of batches 0 ... count - 1 that are not yet there.

    digest names the teacher. Raises HalflapError when the directory holds another teacher's or another k.
    """
    place = Path(directory)
    manifest = _manifest_of(digest, teacher.config.vocab_size, k)
    _check_manifest(place, manifest)
    write_json(place / MANIFEST, manifest)
    teacher.to(device).eval()
    missing = [index for index in range(count) if not _file(place, index).exists()]
    for index in track(missing, "teacher"):
        batch = batches(index)
        with torch.no_grad(), precision(torch.device(device), resolve_dtype(dtype, device)):
            indices, log_probs = top_k_log_probs(_hidden(teacher, batch, device), teacher.head_weight, k)
        narrow = np.uint16 if teacher.config.vocab_size <= 1 << 16 else np.uint32
        with atomic_write(_file(place, index)) as file:
            np.savez_compressed(
                file,
                indices=_to_planes(indices.cpu().numpy().astype(narrow)),
                log_probs=_to_planes(log_probs.cpu().numpy().astype(np.float16)),
                rest=(1 - log_probs.exp().sum(1)).clamp_min(0).cpu().numpy(),
                tokens=np.frombuffer(_tokens_digest(batch), dtype=np.uint8),
            )
    known = TopKTeacher(place).read(0, batches(0))
    with torch.no_grad(), precision(torch.device(device), resolve_dtype(dtype, device)):
        stored = _cost(place, count, _error(teacher, known, device))
    write_json(place / MANIFEST, {**manifest, **dataclasses.asdict(stored)})
    return stored


def find_stored(
    directory: str | Path, batches: Callable[[int], Batch], count: int, *, k: int, digest: str, vocab_size: int
) -> Stored | None:
    """What storing batches 0 ... count - 1 has cost, for which no teacher is needed; None unless all of them are there.

    Raises HalflapError when the directory holds another teacher's, another k or the first batch with other tokens.
    """
    place, manifest = Path(directory), _manifest_of(digest, vocab_size, k)
    _check_manifest(place, manifest)
    if was_stored(place) and _file(place, 0).exists():
        TopKTeacher(place).read(0, batches(0))
    if not was_stored(place) or not all(_file(place, index).exists() for index in range(count)):
        return None
    return _cost(place, count, _read_manifest(place)["error"])


def was_stored(directory: str | Path) -> bool:
    """Whether some storing in this directory came to its end."""
    return "error" in _read_manifest(Path(directory))


def _cost(place: Path, count: int, error: float) -> Stored:
    size = sum(_file(place, index).stat().st_size for index in range(count))
    return Stored(size, size / sum(_stored_tokens(_file(place, index)) for index in range(count)), error)


def _stored_tokens(file: Path) -> int:
    with np.load(file) as stored:
        return len(stored["rest"])


class TopKTeacher:
    """Stored teacher outputs; `batches(loader.batch)` joins them to the batches they belong to."""

    def __init__(self, directory: str | Path) -> None:
        """Raises HalflapError when the directory holds no stored teacher."""
        self.path = Path(directory)
        try:
            manifest = json.loads((self.path / MANIFEST).read_text(encoding="utf-8"))
            self.vocab_size, self.k, self.digest = manifest["vocab_size"], manifest["k"], manifest["teacher"]
        except (OSError, ValueError, KeyError) as error:
            raise HalflapError(
                f"{self.path} holds no stored teacher outputs ({error}); store them first, or name their directory"
            ) from None

    def read(self, index: int, batch: Batch) -> TeacherBatch:
        """The batch with its teacher's outputs; HalflapError when they are missing, broken or of other tokens."""
        path = _file(self.path, index)
        try:
            with np.load(path, allow_pickle=False) as stored:
                digest = stored["tokens"].tobytes()
                ids = _from_planes(stored["indices"], np.uint16 if self.vocab_size <= 1 << 16 else np.uint32)
                log_probs = _from_planes(stored["log_probs"], np.float16).astype(np.float32)
                log_probs += np.log((1 - stored["rest"]) / np.exp(log_probs).sum(1))[:, None]
        except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
            raise HalflapError(
                f"the teacher's outputs for batch {index} cannot be read from {path} ({error}); delete that file if it "
                "is there and store the teacher's outputs again for at least as many steps as are trained"
            ) from None
        if digest != _tokens_digest(batch):
            raise HalflapError(
                f"{path} was stored for other tokens than batch {index} has now; data, seed, batch size and sequence "
                "length must be those of the storing: use them again or store anew"
            )
        shape = (*batch.tokens.shape, self.k)
        return TeacherBatch(
            **{field.name: getattr(batch, field.name) for field in dataclasses.fields(Batch)},
            teacher_indices=torch.from_numpy(ids.astype(np.int64)).view(shape),
            teacher_log_probs=torch.from_numpy(log_probs).view(shape),
        )

    def batches(self, batches: Callable[[int], Batch]) -> Callable[[int], TeacherBatch]:
        return lambda index: self.read(index, batches(index))


def _manifest_of(digest: str, vocab_size: int, k: int) -> dict[str, Any]:
    """What all that is stored in one directory has in common. Raises HalflapError on a k that cannot be."""
    if not 1 <= k <= vocab_size:
        raise HalflapError(f"k is {k}; the teacher's vocabulary allows 1 to {vocab_size}: correct k")
    return {"format": FORMAT, "teacher": digest, "vocab_size": vocab_size, "k": k}


def _read_manifest(place: Path) -> dict[str, Any]:
    """Empty where nothing is stored."""
    path = place / MANIFEST
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _check_manifest(place: Path, manifest: Mapping[str, Any]) -> None:
    found = _read_manifest(place)
    for name, value in manifest.items():
        if found and found.get(name) != value:
            raise HalflapError(
                f"{place} already holds teacher outputs with {name} {found.get(name)!r}, not {value!r}; "
                "give another directory or remove that one"
            )


def _file(place: Path, index: int) -> Path:
    return place / f"batch-{index:08d}.npz"


def _hidden(teacher: HybridModel, batch: Batch, device: str) -> Tensor:
    """Final hidden states (M, D)."""
    return teacher.hidden_states(batch.tokens.to(device), segments=_moved(batch.segments, device)).flatten(0, 1)


def _error(teacher: HybridModel, known: TeacherBatch, device: str) -> float:
    """Nats a token of KL(full || known)."""
    assert known.teacher_indices is not None and known.teacher_log_probs is not None
    indices, log_probs = (entry.flatten(0, 1).to(device) for entry in (known.teacher_indices, known.teacher_log_probs))
    total = top_k_error_sum(_hidden(teacher, known, device), teacher.head_weight, indices, log_probs)
    return float(total) / known.tokens.numel()


def _moved(tensor: Tensor | None, device: str) -> Tensor | None:
    return None if tensor is None else tensor.to(device)


def _tokens_digest(batch: Batch) -> bytes:
    """Of the tokens and of which of them see each other."""
    parts = [part.contiguous().numpy().tobytes() for part in (batch.tokens, batch.segments) if part is not None]
    return hashlib.blake2b(b"".join(parts), digest_size=16).digest()


def _to_planes(values: np.ndarray) -> np.ndarray:
    """(M, k) numbers of n bytes as (n, k, M) bytes."""
    rows, k = values.shape
    octets = np.ascontiguousarray(values).view(np.uint8).reshape(rows, k, values.itemsize)
    return np.ascontiguousarray(octets.transpose(2, 1, 0))


def _from_planes(planes: np.ndarray, dtype: type) -> np.ndarray:
    octets = np.ascontiguousarray(planes.transpose(2, 1, 0))
    return octets.view(dtype)[..., 0]
