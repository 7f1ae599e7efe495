"""What a run reads, by digest: one entry a file or folder, the sha256 of its content.

A folder's digest is that of its sorted (relative name, file digest) pairs; of a run directory of ours its `checkpoint/`
counts, and of a checkpoint what lies in it and not in folders below, which may hold runs. Digests of large files are
remembered by (path, size, time of change) in HALFLAP_CACHE (default ~/.cache/halflap), so that naming a 16 GB
checkpoint twice reads it once. No torch.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from halflap.files import digest_file, write_json

Inputs = dict[str, list[dict[str, Any]]]
SAID = {"README.md", "certificate.json", "importance.safetensors"}
"""Files beside a checkpoint that are not what it is."""
REMEMBER_FROM = 4 * 2**20
"""Bytes from which a digest is worth remembering."""


def digest_inputs(named: Mapping[str, Sequence[str]]) -> Inputs:
    """Field name to what it names: `path`, `files`, `bytes`, `sha256`; of a preset's name only the `path`."""
    remembered = _Remembered()
    entries = {name: [_entry(Path(value), remembered) for value in values] for name, values in named.items()}
    remembered.save()
    return entries


def content_of_inputs(inputs: Inputs) -> dict[str, list[str]]:
    """The inputs without their places: equal content elsewhere is the same input."""
    return {name: [entry.get("sha256") or entry["path"] for entry in entries] for name, entries in inputs.items()}


def checkpoint_of(path: Path) -> Path:
    """The checkpoint inside a run directory, or the path itself."""
    inner = path / "checkpoint"
    return inner if inner.is_dir() else path


def is_checkpoint(path: Path) -> bool:
    """Whether a folder is a checkpoint itself, ours or a foreign one."""
    return any((path / name).is_file() for name in ("config.json", "halflap.json"))


def size_of(path: Path) -> int:
    """Bytes of a file, or of a folder's files (of a run directory, of its checkpoint's); 0 for what does not exist."""
    path = checkpoint_of(path)
    files = _files(path) if path.is_dir() else [path] if path.exists() else []
    return sum(file.stat().st_size for file in files)


def _entry(path: Path, remembered: _Remembered) -> dict[str, Any]:
    path = checkpoint_of(path)
    if not path.exists():
        return {"path": str(path)}
    files = sorted(_files(path)) if path.is_dir() else [path]
    digests = [(str(file.relative_to(path)), remembered.digest(file)) for file in files]
    content = hashlib.sha256(json.dumps(digests).encode()).hexdigest() if path.is_dir() else digests[0][1]
    return {
        "path": str(path),
        "files": len(files),
        "bytes": sum(file.stat().st_size for file in files),
        "sha256": content,
    }


def _files(folder: Path) -> Iterator[Path]:
    """Of a checkpoint without what is said of it, which may be written later; links that lead nowhere are not there."""
    model = is_checkpoint(folder)
    for directory, folders, names in os.walk(folder):
        folders[:] = [] if model else [name for name in folders if not name.startswith(".")]
        files = (Path(directory) / name for name in names if not name.startswith(".") and not (model and name in SAID))
        yield from (file for file in files if file.exists())


def cache_file() -> Path:
    user = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("HALFLAP_CACHE") or user / "halflap") / "digests.json"


class _Remembered:
    """Digests of large files by path, size and time of change; a cache that cannot be read or written is no cache."""

    def __init__(self) -> None:
        self.path = cache_file()
        self.known: dict[str, Any] = {}
        self.changed = False
        with suppress(OSError, ValueError):
            content = json.loads(self.path.read_text(encoding="utf-8"))
            self.known = content if isinstance(content, dict) else {}

    def digest(self, file: Path) -> str:
        stat, key = file.stat(), str(file.resolve())
        if stat.st_size < REMEMBER_FROM:
            return digest_file(file)
        stamp = [stat.st_size, stat.st_mtime_ns, stat.st_ino]
        match self.known.get(key):
            case {"stamp": known, "sha256": str(digest)} if known == stamp:
                return digest
        digest = digest_file(file)
        self.known[key] = {"stamp": stamp, "sha256": digest}
        self.changed = True
        return digest

    def save(self) -> None:
        if self.changed:
            with suppress(OSError):
                write_json(self.path, dict(list(self.known.items())[-1000:]))
