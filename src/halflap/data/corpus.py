"""Token shards on disk: documents of token ids one after the other, memory-mapped, with a manifest.

    manifest.json            written last: counts, tokenizer and source digests, the list of shards
    shard-00000.tokens       little-endian uint16 (uint32 from 65536 tokens of vocabulary on), no header
    shard-00000.starts.npy   int64, where each document of the shard begins
    build.json               only while unfinished: the shards complete so far

A document is `[bos] tokens eos` and lies in one shard. An interrupted build goes on after its last complete shard,
provided that the documents before it are still the same; their running digest decides that, not file dates.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
import hashlib
import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from halflap.data.distinct import Documents, Tally
from halflap.data.shards import Settings, Shard, check_shard, tokenised, write_shard
from halflap.data.text import list_files, read_documents
from halflap.data.tokenizer import Tokenizer
from halflap.errors import HalflapError
from halflap.files import digest_file, write_json
from halflap.progress import Progress

FORMAT_VERSION = 1


@dataclass(frozen=True)
class Source:
    path: str
    digest: str


@dataclass(frozen=True)
class Manifest:
    """The content of manifest.json; `bytes` are the UTF-8 bytes of all documents written."""

    settings: Settings
    tally: Tally
    sources: tuple[Source, ...]
    shards: tuple[Shard, ...]
    format_version: int = FORMAT_VERSION

    @property
    def tokens(self) -> int:
        return sum(shard.tokens for shard in self.shards)

    @property
    def documents(self) -> int:
        return sum(shard.documents for shard in self.shards)

    @property
    def bytes(self) -> int:
        return sum(shard.bytes for shard in self.shards)

    @property
    def digest(self) -> str:
        """Names the token content: sha256 over the shards' sha256."""
        return hashlib.sha256("".join(shard.sha256 for shard in self.shards).encode()).hexdigest()

    def to_json(self) -> dict[str, Any]:
        totals = {"tokens": self.tokens, "documents": self.documents, "bytes": self.bytes, "digest": self.digest}
        return {"kind": "halflap corpus", **totals, **dataclasses.asdict(self)}

    @staticmethod
    def from_json(content: dict[str, Any]) -> Manifest:
        return Manifest(
            Settings(**content["settings"]),
            Tally(**content["tally"]),
            tuple(Source(**source) for source in content["sources"]),
            tuple(Shard(**shard) for shard in content["shards"]),
            content["format_version"],
        )


# ---- reading


@dataclass(frozen=True, eq=False)
class Corpus:
    """An opened corpus: one stream of `tokens` ids that never is in memory as a whole."""

    path: Path
    manifest: Manifest

    @property
    def tokens(self) -> int:
        return self.manifest.tokens

    @property
    def documents(self) -> int:
        return self.manifest.documents

    @property
    def starts(self) -> NDArray[np.int64]:
        """Stream position of each document's first token, and the stream's length last; (documents + 1,)."""
        return self._starts

    @functools.cached_property
    def _starts(self) -> NDArray[np.int64]:
        parts = [
            np.load(self.path / s.starts) + base for s, base in zip(self.manifest.shards, self._bases, strict=False)
        ]
        return np.concatenate([*parts, [self.tokens]]).astype(np.int64)

    def read(self, start: int, stop: int) -> NDArray[np.int64]:
        """Token ids [start, stop) of the stream, as a new array."""
        if not 0 <= start <= stop <= self.tokens:
            raise IndexError(f"tokens {start}:{stop} of a stream of {self.tokens}")
        parts = []
        index = bisect.bisect_right(self._bases, start) - 1
        while start < stop:
            base, end = self._bases[index], min(stop, self._bases[index + 1])
            parts.append(self._maps[index][start - base : end - base])
            start, index = end, index + 1
        return np.concatenate(parts).astype(np.int64) if parts else np.zeros(0, np.int64)

    def document(self, index: int) -> NDArray[np.int64]:
        """Token ids of one document, its end token included."""
        return self.read(int(self.starts[index]), int(self.starts[index + 1]))

    @functools.cached_property
    def _bases(self) -> list[int]:
        return [0, *np.cumsum([shard.tokens for shard in self.manifest.shards]).tolist()]

    @functools.cached_property
    def _maps(self) -> list[NDArray[np.generic]]:
        dtype = self.manifest.settings.numpy_dtype
        return [np.memmap(self.path / shard.file, dtype=dtype, mode="r") for shard in self.manifest.shards]


def is_corpus(path: str | Path) -> bool:
    """Whether a folder holds token shards rather than text."""
    return (Path(path) / "manifest.json").is_file()


def open_corpus(path: str | Path, tokenizer: Tokenizer | None = None, *, verify: bool = False) -> Corpus:
    """Open a finished corpus, checking file sizes (and with `verify` every byte).

    Raises HalflapError when it is missing, unfinished, damaged, of a newer format, or made by another tokenizer.
    """
    folder = Path(path)
    if not is_corpus(folder):
        if (folder / "build.json").is_file():
            raise HalflapError(
                f"the corpus {str(folder)!r} is unfinished; give its command again and it goes on where it stopped"
            )
        raise HalflapError(f"{str(folder)!r} is no corpus (it has no manifest.json); make one with `halflap corpus`")
    manifest = _read_manifest(folder / "manifest.json")
    if tokenizer is not None and tokenizer.digest != manifest.settings.tokenizer_digest:
        raise HalflapError(
            f"the corpus {str(folder)!r} was made by tokenizer {manifest.settings.tokenizer_digest[:12]} and is to be "
            f"read with {tokenizer.digest[:12]}; they must be the same: make a corpus with the model's tokenizer"
        )
    for shard in manifest.shards:
        check_shard(folder, shard, manifest.settings, verify)
    return Corpus(folder, manifest)


def _read_manifest(file: Path) -> Manifest:
    try:
        content = json.loads(file.read_text("utf-8"))
        version = content["format_version"]
        if version == FORMAT_VERSION:
            return Manifest.from_json(content)
    except (ValueError, KeyError, TypeError) as error:
        raise HalflapError(f"{str(file)!r} is no readable corpus manifest ({error}); build the corpus again") from error
    raise HalflapError(
        f"{str(file)!r} has format version {version}, and {FORMAT_VERSION} is read here; build the corpus again or "
        "update halflap"
    )


# ---- building


def build_corpus(
    sources: Sequence[str | Path],
    tokenizer: Tokenizer,
    out: str | Path,
    *,
    field: str = "text",
    keep: Callable[[str], bool] | None = None,
    shard_tokens: int = 1 << 24,
    add_bos: bool = False,
) -> Manifest:
    """Tokenise the documents of `sources` into `out`, without exact duplicates and those that `keep` refuses.

    A finished corpus of the same documents and settings is found and returned; one of others is an error. Memory:
    a batch of text, and 16 bytes (about 100 in Python) for each document to find duplicates by.
    """
    folder, settings = Path(out), _settings(tokenizer, field, shard_tokens, add_bos)
    inputs = tuple(Source(str(file), digest_file(file)) for file in list_files(sources))
    documents = Documents(read_documents(sources, field), keep)
    if is_corpus(folder):
        return _same_or_refused(folder, settings, documents)
    shards = _resume(folder, settings, documents)
    if shards is None:
        _remove(folder, "build.json", "shard-*.tokens", "shard-*.starts.npy")
        documents, shards = Documents(read_documents(sources, field), keep), []
    _remove(folder, ".shard-*.tmp")  # what a killed process was writing
    with Progress("tokenise", unit="tokens") as progress:
        progress.start_at(sum(shard.tokens for shard in shards))
        batches = tokenised(documents, tokenizer, settings, progress.advance)
        for first in batches:
            shards.append(write_shard(folder, len(shards), itertools.chain([first], batches), settings))
            state = {"settings": settings, "tally": documents.tally, "shards": shards}
            write_json(folder / "build.json", {name: _plain(value) for name, value in state.items()})
    if not shards:
        raise HalflapError(
            f"no document was left to tokenise: of {documents.seen}, {documents.excluded} were not to be kept; "
            "give more documents, or text of its own to judge on (--eval-data)"
        )
    manifest = Manifest(settings, documents.tally, inputs, tuple(shards))
    write_json(folder / "manifest.json", manifest.to_json())
    (folder / "build.json").unlink(missing_ok=True)
    return manifest


def _settings(tokenizer: Tokenizer, field: str, shard_tokens: int, add_bos: bool) -> Settings:
    eos, bos = tokenizer.eos_id, tokenizer.bos_id if add_bos else None
    if eos is None or (add_bos and bos is None):
        raise HalflapError(
            f"the tokenizer names no {'end' if eos is None else 'begin'} token, which documents are marked by; set "
            f"{'eos' if eos is None else 'bos'}_token in its tokenizer_config.json"
        )
    if shard_tokens < 1:
        raise HalflapError(f"shard_tokens is {shard_tokens}; it must be at least 1: choose e.g. {1 << 24}")
    dtype = "uint16" if tokenizer.vocab_size < 65536 else "uint32"
    return Settings(tokenizer.digest, tokenizer.vocab_size, eos, bos, dtype, field, shard_tokens)


def _resume(folder: Path, settings: Settings, documents: Documents) -> list[Shard] | None:
    """The shards that an interrupted build completed, with `documents` moved past them; None to start over."""
    try:
        state = json.loads((folder / "build.json").read_text("utf-8"))
        shards = [Shard(**shard) for shard in state["shards"]]
        for shard in shards:
            check_shard(folder, shard, settings, verify=True)
        same = state["settings"] == _plain(settings) and documents.skip_to(Tally(**state["tally"]))
    except (OSError, ValueError, KeyError, TypeError):  # absent, or not left behind by a build: nothing to go on from
        return None
    return shards if same else None


def _remove(folder: Path, *patterns: str) -> None:
    for pattern in patterns:
        for file in folder.glob(pattern):
            file.unlink()


def _plain(value: Any) -> Any:
    return [_plain(item) for item in value] if isinstance(value, list) else dataclasses.asdict(value)


def _same_or_refused(folder: Path, settings: Settings, documents: Documents) -> Manifest:
    manifest = _read_manifest(folder / "manifest.json")
    for _ in documents:
        pass
    different = [
        name
        for name, now in dataclasses.asdict(settings).items()
        if now != dataclasses.asdict(manifest.settings)[name] and name != "shard_tokens"
    ]
    if documents.tally.text_digest != manifest.tally.text_digest:
        different.append("documents")
    if different:
        raise HalflapError(
            f"{str(folder)!r} already holds a corpus that differs in {', '.join(different)}; choose another directory "
            "(--out) or delete it"
        )
    open_corpus(folder)
    return manifest
