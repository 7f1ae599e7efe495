"""Documents from files and folders of text, and which of them are held out.

A `.txt` file is one document; `.jsonl`, `.json` (a list, or an object a line) and `.parquet` hold one in a column.
Each may be compressed by gzip, xz or zstd. Text is passed on unchanged, line ends included; empty documents are
skipped. What is held out depends on nothing but a document's text, so any two runs agree on it.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import itertools
import json
import lzma
import math
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, cast

from halflap.errors import HalflapError

COMPRESSIONS = ("", ".gz", ".xz", ".zst")
_BLANK = b" \t\r\n\xef\xbb\xbf"  # white space and the byte-order mark


def read_documents(paths: Sequence[str | Path], field: str = "text") -> Iterator[str]:
    """Yield the non-empty documents of files and folders (folders recursively, by sorted path).

    `field` names the column of `.jsonl`, `.json` and `.parquet`. Raises HalflapError for a missing path, an unknown
    kind of file, a missing column, broken or cut-off content, and when there is not one document.
    """
    found = False
    for file in list_files(paths):
        for text in _read_file(file, field):
            found = True
            yield text
    if not found:
        raise HalflapError(f"{_listed(paths)} holds no text; give files with at least one non-empty document")


def list_files(paths: Sequence[str | Path]) -> list[Path]:
    """The text files that `paths` stand for, in reading order; folders may hold hidden files and other kinds too."""
    if isinstance(paths, (str, Path)):
        raise HalflapError(f"data paths are a list, not {paths!r}: put the path into a list")
    if not paths:
        raise HalflapError("no data was given; name at least one text file or folder (--data)")
    return [file for path in paths for file in _expand(Path(path))]


def hash_position(text: str) -> float:
    """A document's place in [0, 1) by the sha256 of its text: a shuffle that everyone agrees on."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64


def held_out_from(documents: Iterable[str], share: float = 0.05) -> float:
    """The hash position from which on documents are held out: the last `share` of them, and at least one.

    Infinity, which holds nothing out, when fewer than two distinct documents are there. Raises HalflapError for a share
    outside [0, 1).
    """
    if not 0 <= share < 1:
        raise HalflapError(f"the held-out share is {share}; it must be at least 0 and below 1: choose e.g. 0.05")
    positions = sorted({hash_position(text) for text in documents})
    return positions[-max(1, round(share * len(positions)))] if len(positions) > 1 else math.inf


def cut_into_pieces(text: str, characters: int) -> list[str]:
    """A long text as pieces of about `characters`, cut at ends of paragraphs, else of lines, else anywhere."""
    pieces: list[str] = []
    start = 0
    while len(text) - start > 1.5 * characters:
        window = (start + characters // 2, start + characters)
        ends = (text.rfind(mark, *window) + len(mark) for mark in ("\n\n", "\n") if text.rfind(mark, *window) >= 0)
        end = next(ends, window[1])
        pieces.append(text[start:end])
        start = end
    return [*pieces, text[start:]]


# ---- files


def _expand(path: Path) -> list[Path]:
    if path.is_file():
        _kind(path)
        return [path]
    if not path.exists():
        raise HalflapError(
            f"data path {str(path)!r} does not exist (looked for {os.path.abspath(path)}); give an existing file or "
            "folder"
        )
    if (path / "manifest.json").exists():
        raise HalflapError(
            f"{str(path)!r} is a folder of token shards, and text is needed here; give the text it was made from"
        )
    inside = (file for file in path.rglob("*") if file.is_file() and _split_suffix(file)[0] in _READERS)
    files = [f for f in inside if not any(part.startswith(".") for part in f.relative_to(path).parts)]
    if not files:
        raise HalflapError(f"folder {str(path)!r} holds no file to read; allowed are {_allowed()}")
    return sorted(files, key=lambda file: file.relative_to(path).parts)


def _split_suffix(path: Path) -> tuple[str, str]:
    """The kind of content and the compression: `a.jsonl.xz` gives `.jsonl`, `.xz`."""
    suffixes = [suffix.lower() for suffix in path.suffixes] or [""]
    if suffixes[-1] in COMPRESSIONS and len(suffixes) > 1:
        return suffixes[-2], suffixes[-1]
    return suffixes[-1], ""


def _kind(path: Path) -> str:
    kind = _split_suffix(path)[0]
    if kind not in _READERS:
        raise HalflapError(
            f"{str(path)!r} is no kind of text file known here; allowed are {_allowed()}: rename or convert it"
        )
    return kind


def _allowed() -> str:
    return f"{', '.join(_READERS)}, each plain or {', '.join(COMPRESSIONS[1:])}"


def _listed(paths: Sequence[str | Path]) -> str:
    shown = ", ".join(repr(str(path)) for path in paths[:3])
    return shown + (f" and {len(paths) - 3} more" if len(paths) > 3 else "")


def _read_file(path: Path, field: str) -> Iterator[str]:
    try:
        with _open(path) as file:
            for place, value in _READERS[_kind(path)](path, file, field):
                text = _checked(value, place, field)
                if text:
                    yield text
    except (EOFError, gzip.BadGzipFile, zlib.error, lzma.LZMAError) as error:
        raise HalflapError(f"{str(path)!r} is damaged or cut off ({error}); copy or download it again") from error


def _open(path: Path) -> IO[bytes]:
    compression = _split_suffix(path)[1]
    if compression == ".gz":
        return cast(IO[bytes], gzip.open(path, "rb"))
    if compression == ".xz":
        return lzma.open(path, "rb")
    if compression == ".zst":
        return cast(IO[bytes], io.BufferedReader(_ZstdFile(path), 1 << 20))
    return open(path, "rb")


class _ZstdFile(io.RawIOBase):
    """Decompressed bytes of all frames of a `.zst` file; unlike the library's own reader it reports a cut-off file."""

    def __init__(self, path: Path) -> None:
        try:
            import zstandard
        except ImportError as error:
            raise HalflapError(f"reading {str(path)!r} needs the package zstandard; install halflap[data]") from error
        self._library = zstandard
        self._file = open(path, "rb")  # noqa: SIM115 - closed by close()
        self._frame: Any = None
        self._input = self._output = b""

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        self._file.close()
        super().close()

    def readinto(self, buffer: Any) -> int:
        while not self._output:
            self._input = self._input or self._file.read(1 << 18)
            if not self._input:
                if self._frame is not None:
                    raise EOFError("the compressed data ends before its end marker")
                return 0
            self._frame = self._frame or self._library.ZstdDecompressor().decompressobj()
            try:
                self._output = self._frame.decompress(self._input)
            except self._library.ZstdError as error:
                raise EOFError(str(error)) from error
            self._input = self._frame.unused_data if self._frame.eof else b""
            self._frame = None if self._frame.eof else self._frame
        size = min(len(buffer), len(self._output))
        buffer[:size], self._output = self._output[:size], self._output[size:]
        return size


# ---- kinds: each yields (place, value), the place as an error names it


def _read_txt(path: Path, file: IO[bytes], field: str) -> Iterator[tuple[str, object]]:
    del field
    try:
        yield str(path), file.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise HalflapError(
            f"{str(path)!r} is not UTF-8 text (byte {error.start} is 0x{error.object[error.start]:02x}); convert it"
        ) from error


def _read_jsonl(path: Path, file: IO[bytes], field: str) -> Iterator[tuple[str, object]]:
    yield from _read_lines(path, file, field)


def _read_lines(path: Path, lines: Iterable[bytes], field: str) -> Iterator[tuple[str, object]]:
    for number, line in enumerate(lines, 1):
        if line.strip(_BLANK):
            place = f"{path}:{number}"
            yield place, _column(_parse(line, place, cut_off=not line.endswith(b"\n")), place, field)


def _read_json(path: Path, file: IO[bytes], field: str) -> Iterator[tuple[str, object]]:
    """A list of objects, one object, or an object a line."""
    head = [file.readline()]
    while head[-1] and not head[-1].strip(_BLANK):
        head.append(file.readline())
    try:
        lines = isinstance(json.loads(head[-1].decode("utf-8-sig")), dict)
    except ValueError:
        lines = False
    if lines:
        yield from _read_lines(path, itertools.chain(head, file), field)
        return
    content = b"".join(head) + file.read()
    if not content.strip(_BLANK):
        return
    value = _parse(content, str(path))
    for number, row in enumerate(value if isinstance(value, list) else [value]):
        place = f"{path}[{number}]"
        yield place, _column(row, place, field)


def _read_parquet(path: Path, file: IO[bytes], field: str) -> Iterator[tuple[str, object]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise HalflapError(f"reading {str(path)!r} needs the package pyarrow; install halflap[data]") from error
    # parquet is read from its end, so a compressed one must be unpacked into memory
    source = file if not _split_suffix(path)[1] else pyarrow.BufferReader(file.read())
    try:
        table = pyarrow.parquet.ParquetFile(source)
        if field not in table.schema_arrow.names:
            raise _missing_column(field, str(path), table.schema_arrow.names)
        number = 0
        for batch in table.iter_batches(batch_size=1024, columns=[field]):
            for value in batch.column(0).to_pylist():
                yield f"{path} row {number}", value
                number += 1
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise HalflapError(f"{str(path)!r} is no readable parquet file ({error}); write or copy it again") from error


_READERS: dict[str, Callable[[Path, IO[bytes], str], Iterator[tuple[str, object]]]] = {
    ".txt": _read_txt,
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".parquet": _read_parquet,
}


# ---- values


def _parse(content: bytes, place: str, cut_off: bool = False) -> Any:
    try:
        return json.loads(content.decode("utf-8-sig"))
    except json.JSONDecodeError as error:
        line = f"{place}:{error.lineno}" if "\n" in error.doc.strip() else place
        hint = "the file seems cut off; copy it again" if cut_off else "correct that line"
        raise HalflapError(f"{line} is not valid JSON ({error.msg} at column {error.colno}); {hint}") from error
    except UnicodeDecodeError as error:
        raise HalflapError(f"{place} is not UTF-8 (byte {error.start}); convert the file to UTF-8") from error


def _column(row: Any, place: str, field: str) -> object:
    if not isinstance(row, dict):
        raise HalflapError(
            f"{place} holds {_type_name(row)}, and an object with a column {field!r} is needed; write one a document"
        )
    if field not in row:
        raise _missing_column(field, place, list(row))
    return row[field]


def _missing_column(field: str, place: str, columns: Sequence[str]) -> HalflapError:
    names = ", ".join(map(str, columns)) or "none"
    return HalflapError(
        f"{place} has no column {field!r}; its columns are {names}: name the one with the text (--data.field)"
    )


def _checked(value: object, place: str, field: str) -> str:
    if not isinstance(value, str):
        raise HalflapError(
            f"column {field!r} of {place} holds {_type_name(value)}, and text is needed; choose another column "
            "(--data.field) or leave such rows out"
        )
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise HalflapError(
                f"{place} holds half of a UTF-16 pair at character {error.start}, which is not text; correct or drop it"
            ) from error
    return value


def _type_name(value: object) -> str:
    names = {type(None): "null", dict: "an object", list: "a list", bool: "true/false", str: "a string"}
    return names.get(type(value), f"{value!r}"[:40])
