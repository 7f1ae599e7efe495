"""One shard of a corpus: a file of token ids and one of document starts, written whole and checked before use."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from halflap.data.tokenizer import Tokenizer
from halflap.errors import HalflapError
from halflap.files import atomic_write, digest_file, full_disk_named

BATCH_CHARACTERS = 1 << 22  # of text tokenised at once: enough to keep every core busy, small enough to forget


@dataclass(frozen=True)
class Settings:
    """What, besides the documents, decides the token files."""

    tokenizer_digest: str
    vocab_size: int
    eos_id: int
    bos_id: int | None
    dtype: str
    field: str
    shard_tokens: int

    @property
    def numpy_dtype(self) -> np.dtype[Any]:
        return np.dtype(self.dtype).newbyteorder("<")


@dataclass(frozen=True)
class Shard:
    """One complete shard; `bytes` are UTF-8 bytes of its text, `sha256` is that of the token file."""

    file: str
    starts: str
    tokens: int
    documents: int
    bytes: int
    sha256: str


def check_shard(folder: Path, shard: Shard, settings: Settings, verify: bool) -> None:
    file = folder / shard.file
    size, expected = file.stat().st_size if file.is_file() else -1, shard.tokens * settings.numpy_dtype.itemsize
    if size != expected or not (folder / shard.starts).is_file():
        found = f"{size} bytes" if size >= 0 else "missing"
        raise HalflapError(
            f"shard {str(file)!r} is damaged ({found}, should be {expected} bytes); build the corpus again"
        )
    if verify and digest_file(file) != shard.sha256:
        raise HalflapError(f"shard {str(file)!r} is damaged (its sha256 is not the manifest's); build the corpus again")


@dataclass(frozen=True)
class Tokenised:
    """Some whole documents as ids, with the length of each in tokens and their size in UTF-8 bytes."""

    ids: NDArray[np.generic]
    lengths: tuple[int, ...]
    bytes: int


def tokenised(
    documents: Iterable[str], tokenizer: Tokenizer, settings: Settings, advance: Callable[[float], None]
) -> Iterator[Tokenised]:
    head, dtype = [] if settings.bos_id is None else [settings.bos_id], settings.numpy_dtype
    limit = min(BATCH_CHARACTERS, 4 * settings.shard_tokens)
    while texts := _take(documents, limit):
        # ids of special tokens never come from the text itself: a document about `<eos>` does not end there
        encoded = [[*head, *ids, settings.eos_id] for ids in tokenizer.encode_batch(texts, parse_special=False)]
        ids = np.fromiter(itertools.chain.from_iterable(encoded), dtype)
        yield Tokenised(ids, tuple(map(len, encoded)), sum(len(text.encode()) for text in texts))
        advance(len(ids))


def _take(documents: Iterable[str], characters: int) -> list[str]:
    texts: list[str] = []
    size = 0
    for text in documents:
        texts.append(text)
        size += len(text)
        if size >= characters:
            break
    return texts


def write_shard(folder: Path, number: int, batches: Iterable[Tokenised], settings: Settings) -> Shard:
    """Write batches until the shard is full; it ends with a batch, so that the tally of documents fits the shards."""
    name = f"shard-{number:05d}"
    tokens = size = 0
    lengths: list[int] = []
    digest = hashlib.sha256()
    with atomic_write(folder / f"{name}.tokens") as file:
        for batch in batches:
            content = batch.ids.tobytes()
            file.write(content)
            digest.update(content)
            lengths += batch.lengths
            tokens, size = tokens + len(batch.ids), size + batch.bytes
            if tokens >= settings.shard_tokens:
                break
    with full_disk_named(folder, by_numpy=True), atomic_write(folder / f"{name}.starts.npy") as file:
        np.save(file, np.cumsum([0, *lengths[:-1]], dtype=np.int64))
    return Shard(f"{name}.tokens", f"{name}.starts.npy", tokens, len(lengths), size, digest.hexdigest())
