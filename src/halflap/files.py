"""Files that appear whole or not at all, and the digest that names their content.

A write goes to a temporary name in the same directory, is flushed to the disk, and takes its final name by
`os.replace`, which is atomic within one file system. A killed process leaves at most a hidden `.*.tmp` file behind,
which the next run in that directory removes.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Literal

from halflap.errors import HalflapError

FULL_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_TEXT: dict[str, Any] = {"encoding": "utf-8", "newline": "\n"}


@contextmanager
def atomic_write(path: str | os.PathLike[str], mode: Literal["wb", "w"] = "wb") -> Iterator[IO[Any]]:
    """Open a temporary file that becomes `path` when the `with` block ends well and is deleted when it raises.

    Yields the open file (UTF-8 with `\\n` line ends when `mode` is "w"); a library that wants a path instead of a
    file may write to `file.name`. Missing parent directories are created. Raises HalflapError when the disk is full.
    """
    final = Path(path)
    final.parent.mkdir(parents=True, exist_ok=True)
    temporary = final.with_name(f".{final.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with full_disk_named(final.parent):
            with open(temporary, mode, **({} if mode == "wb" else _TEXT)) as file:
                yield file
            sync(temporary)  # by name, not by descriptor: the block may have written through the path
            os.replace(temporary, final)
            sync(final.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def full_disk_named(directory: str | os.PathLike[str], *, by_numpy: bool = False) -> Iterator[None]:
    """Turn the operating system's complaint about a full disk into the sentence a user gets.

    by_numpy: NumPy writes, whose complaint about an array that it could not write whole has no number.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in FULL_DISK and not (by_numpy and error.errno is None):
            raise
        raise HalflapError(
            f"the disk under {os.fspath(directory)} is full ({error.strerror or error}); what was there before stays "
            "until new files are whole: free some space or choose another --out"
        ) from error


def sync(path: str | os.PathLike[str]) -> None:
    """Flush a file, or the entries of a directory, to the disk."""
    if os.name == "nt" and Path(path).is_dir():
        return  # Windows opens no directories; its rename is flushed with the volume's journal
    descriptor = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: str | os.PathLike[str], value: object) -> None:
    """Write `value` as indented JSON, whole or not at all; NaN and infinity, which JSON lacks, are refused."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    with atomic_write(path, "w") as file:
        file.write(text + "\n")


def digest_file(path: str | os.PathLike[str]) -> str:
    """The sha256 of a file's bytes, as 64 hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
