"""Equivalences of the data layer: lossless text, pure batches, ranks that add up, exact blends, no leaks."""

import tempfile
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from halflap.data.corpus import build_corpus, open_corpus
from halflap.data.loader import Loader
from halflap.data.order import Blend, shuffled
from halflap.data.packing import count_rows, cut_row
from halflap.data.tokenizer import Tokenizer, train_tokenizer

UNICODE = st.text(st.characters(exclude_categories=("Cs",)), max_size=60)
few = settings(max_examples=40)


class Documents:
    def __init__(self, lengths):
        self.starts = np.cumsum([0, *lengths])
        self.tokens = int(self.starts[-1])
        self.ids = np.arange(self.tokens) + 10

    def read(self, start, stop):
        return self.ids[start:stop].copy()


@pytest.fixture(scope="module")
def tokenizer():
    texts = ["The quick brown fox <eos> jumps over the lazy dog. 123\r\n\t", "def f(x):\n        return 'é'"] * 9
    return train_tokenizer(texts, 320)


@settings(max_examples=200)
@given(text=UNICODE | st.sampled_from(["<eos><pad>", "a\r\n\r\n  b", "\x00", "e\u0301 é", "<bos> x <eos>"]))
def test_every_text_survives_encoding(tokenizer, text):
    for parse_special in (True, False):
        ids = tokenizer.encode(text, parse_special=parse_special)
        assert tokenizer.decode(ids) == text
        assert all(0 <= i < tokenizer.vocab_size for i in ids)
    assert not {0, 1, 2} & set(tokenizer.encode(text, parse_special=False))


@few
@given(texts=st.lists(UNICODE, max_size=5))
def test_a_batch_is_encoded_as_its_texts_one_by_one(tokenizer, texts):
    assert tokenizer.encode_batch(texts) == [tokenizer.encode(text) for text in texts]


@settings(max_examples=15)
@given(texts=st.lists(UNICODE.filter(bool), min_size=1, max_size=8, unique=True), shard_tokens=st.integers(1, 60))
def test_every_document_survives_a_corpus(tokenizer, texts, shard_tokens):
    with tempfile.TemporaryDirectory() as folder:
        sources = []
        for number, text in enumerate(texts):
            sources.append(Path(folder, f"{number}.txt"))
            sources[-1].write_bytes(text.removeprefix("\ufeff").encode())
        kept = [text for text in dict.fromkeys(text.removeprefix("\ufeff") for text in texts) if text]
        if not kept:
            return
        build_corpus(sources, tokenizer, Path(folder, "out"), shard_tokens=shard_tokens)
        corpus = open_corpus(Path(folder, "out"), tokenizer, verify=True)
        assert [tokenizer.decode(corpus.document(i)[:-1]) for i in range(corpus.documents)] == kept
        whole = corpus.read(0, corpus.tokens)
        pieces = [corpus.read(i, min(i + 7, corpus.tokens)) for i in range(0, corpus.tokens, 7)]
        assert np.array_equal(np.concatenate(pieces), whole)


@few
@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=12), row_length=st.integers(1, 12))
def test_rows_hold_the_stream_once_and_targets_stay_in_their_document(lengths, row_length):
    stream = Documents(lengths)
    document = np.repeat(np.arange(len(lengths)), lengths)
    rows = [cut_row(stream, i, row_length) for i in range(count_rows(stream, row_length))]
    real = [row.segments > 0 for row in rows]
    assert np.array_equal(np.concatenate([row.tokens[r] for row, r in zip(rows, real)]), stream.ids)
    # a position counts if and only if the next token of the stream is of its own document
    weights = np.concatenate([row.weights[r] for row, r in zip(rows, real)])
    assert np.array_equal(weights > 0, np.append(document[1:] == document[:-1], False))
    for index, row in enumerate(rows):
        here = document[index * row_length :][:row_length]
        filled = row.segments[: len(here)]
        assert np.array_equal(filled, here - here[0] + 1)  # 1, 2, ... in the order of the documents
        assert not row.segments[len(here) :].any()
        assert not row.weights[len(here) :].any()
        assert np.array_equal(row.targets[row.weights > 0], row.tokens[row.weights > 0] + 1)


@settings(max_examples=100)
@given(size=st.integers(1, 300), key=st.integers(0, 2**64 - 1))
def test_shuffling_is_a_permutation(size, key):
    assert sorted(shuffled(i, size, key) for i in range(size)) == list(range(size))


@few
@given(
    phases=st.integers(1, 9).flatmap(
        lambda n: st.lists(
            st.tuples(
                st.integers(1, 60), st.lists(st.integers(0, 30) | st.just(0.1), min_size=n, max_size=n).filter(any)
            ),
            min_size=1,
            max_size=3,
        )
    )
)
def test_blends_give_exact_shares_in_a_row_for_each_source(phases):
    starts = np.cumsum([0, *[length for length, _ in phases]]).tolist()
    blend = Blend.of([(start, weights) for start, (_, weights) in zip(starts, phases)])
    seen = [0] * len(phases[0][1])
    for number, (length, weights) in enumerate(phases):
        before = list(seen)
        total = sum(Fraction(str(weight)) for weight in weights)
        for slot in range(starts[number], starts[number] + length):
            source, nth = blend.locate(slot)
            assert nth == seen[source]  # a source's rows come in order, none twice, none left out
            seen[source] += 1
            for given_rows, earlier, weight in zip(seen, before, weights):
                share = Fraction(str(weight)) / total * (slot - starts[number] + 1)
                assert abs(given_rows - earlier - share) < 2
        assert blend.counts(starts[number] + length) == tuple(seen)


@pytest.fixture(scope="module")
def corpora(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    opened = []
    for name, count in (("a", 40), ("b", 15), ("c", 3)):
        (folder / name).mkdir()
        for number in range(count):
            (folder / name / f"{number}.txt").write_text(f"{name}{number} {'brown fox ' * (number % 6)}")
        build_corpus([folder / name], tokenizer, folder / f"{name}.corpus")
        opened.append(open_corpus(folder / f"{name}.corpus"))
    return opened


@few
@given(
    index=st.integers(0, 500),
    seed=st.integers(0, 2**40),
    rows=st.integers(1, 3),
    world=st.integers(1, 4),
    weights=st.none() | st.just([5, 3, 2]) | st.just([0, 1, 0]),
    packing=st.sampled_from(["segments", "stream"]),
)
def test_batches_depend_on_seed_and_index_alone_and_ranks_add_up(corpora, index, seed, rows, world, weights, packing):
    settings = {"sequence_length": 16, "seed": seed, "weights": weights, "packing": packing}
    ranks = [Loader(corpora, micro_batch_size=rows, rank=r, world=world, **settings) for r in range(world)]
    ranks[0].batch(7)  # an earlier request changes nothing
    parts = [loader.batch(index) for loader in ranks]
    whole = Loader(corpora, micro_batch_size=rows * world, **settings).batch(index)
    again = Loader(corpora, micro_batch_size=rows * world, **settings).batch(index)
    names = ["tokens", "targets", "weights"] + (["segments"] if packing == "segments" else [])
    for name in names:
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(whole, name))
        assert torch.equal(getattr(again, name), getattr(whole, name))


def test_a_tokenizer_survives_its_directory(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    loaded = Tokenizer.load(tmp_path)
    text = "The fox <eos> é 42"
    assert loaded.encode(text) == tokenizer.encode(text)
    assert loaded.digest == tokenizer.digest
