"""Text as what is scored: token ids and the bytes of each token's text, from documents or from token shards."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from halflap.data.corpus import Corpus, is_corpus, open_corpus
from halflap.data.text import read_documents
from halflap.data.tokenizer import Tokenizer
from halflap.errors import HalflapError
from halflap.inference.generate import with_prefix
from halflap.progress import Progress

ENCODED_AT_ONCE = 64  # documents

Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Document:
    """Token ids, and the UTF-8 bytes of each one's text; `first` is the index of the first token that is scored."""

    tokens: NDArray[np.int64]
    token_bytes: Floats
    first: int = 1

    @property
    def scored(self) -> int:
        return max(0, len(self.tokens) - self.first)


def documents_of(
    sources: Iterable[str | Path | Corpus],
    tokenizer: Tokenizer,
    *,
    field: str = "text",
    limit: int | None = None,
    join: bool = False,
) -> list[Document]:
    """The documents of files and folders of text, then those of each corpus or folder of token shards.

    `limit` ends the text, and each corpus, after so many scored tokens; `join` makes one document of all text. Raises
    HalflapError for token shards to be joined, or made by another tokenizer.
    """
    listed = list(sources)
    texts = [source for source in listed if not isinstance(source, Corpus) and not is_corpus(source)]
    shards = [source for source in listed if isinstance(source, Corpus) or is_corpus(source)]
    if join and shards:
        raise HalflapError(f"{shards[0]} is a folder of token shards, which --data.join cannot join; give its text")
    documents: list[Document] = []
    if texts:
        read = read_documents(texts, field)
        documents = tokenise(["\n\n".join(read)] if join else read, tokenizer, limit=limit)
    for source in shards:
        corpus = source if isinstance(source, Corpus) else open_corpus(source, tokenizer)
        documents += corpus_documents(corpus, tokenizer, limit=limit)
    return documents


def tokenise(texts: Iterable[str], tokenizer: Tokenizer, *, limit: int | None = None) -> list[Document]:
    """Documents of texts, until `limit` scored tokens are together; special tokens spelt in a text are plain text."""
    lengths = byte_lengths(tokenizer)
    documents: list[Document] = []
    scored = 0
    with Progress("tokenise", unit="documents") as progress:
        for part in _parts(texts, ENCODED_AT_ONCE):
            for text, ids in zip(part, tokenizer.encode_batch(part, parse_special=False), strict=True):
                documents.append(_text_document(text, with_prefix(tokenizer, ids), len(tokenizer.prefix_ids), lengths))
                scored += documents[-1].scored
            progress.advance(len(part))
            if limit is not None and scored >= limit:
                break
    return documents


def _text_document(text: str, ids: list[int], prefix: int, lengths: Floats) -> Document:
    tokens = np.array(ids, np.int64)
    sizes = lengths[tokens]
    sizes[:prefix] = 0
    if (counted := sizes.sum()) > 0:  # a normaliser (lower case, ...) may change the text: share its real bytes out
        sizes = sizes * (len(text.encode()) / counted)
    return Document(tokens, sizes, max(1, prefix))


def corpus_documents(corpus: Corpus, tokenizer: Tokenizer, *, limit: int | None = None) -> list[Document]:
    """The documents of token shards without their beginning and end marks, scored as their text would be."""
    lengths = byte_lengths(tokenizer)
    marks = (corpus.manifest.settings.eos_id, corpus.manifest.settings.bos_id)
    documents: list[Document] = []
    scored = 0
    for index in range(corpus.documents):
        ids = corpus.document(index)
        ids = ids[int(ids[0] == marks[1]) : len(ids) - int(ids[-1] == marks[0])]
        prefix = len(tokenizer.prefix_ids)
        tokens = np.array(with_prefix(tokenizer, ids.tolist()), np.int64)
        sizes = lengths[tokens]
        sizes[:prefix] = 0
        documents.append(Document(tokens, sizes, max(1, prefix)))
        scored += documents[-1].scored
        if limit is not None and scored >= limit:
            break
    return documents


def byte_lengths(tokenizer: Tokenizer) -> Floats:
    """UTF-8 bytes of each token's text (V,)."""
    return np.array([len(tokenizer.token_bytes(i)) for i in range(tokenizer.vocab_size)], float)


def _parts(texts: Iterable[str], size: int) -> Iterator[list[str]]:
    part: list[str] = []
    for text in texts:
        part.append(text)
        if len(part) == size:
            yield part
            part = []
    if part:
        yield part
