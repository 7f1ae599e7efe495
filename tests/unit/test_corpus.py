"""Corpora: what is written, what is refused, and that an interrupted build leaves nothing half done."""

import json

import numpy as np
import pytest

import halflap.data.shards as shards
from halflap.data.corpus import build_corpus, is_corpus, open_corpus
from halflap.data.text import hash_position
from halflap.data.tokenizer import train_tokenizer
from halflap.errors import HalflapError

TEXTS = [f"Document {number} says {'word ' * (number % 7)}<eos> and ends.\n" for number in range(60)]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, 300)


@pytest.fixture
def source(tmp_path):
    return write(tmp_path / "source.jsonl", TEXTS)


def write(file, texts):
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return file


def documents(corpus, tokenizer):
    found = []
    for index in range(corpus.documents):
        ids = corpus.document(index)
        assert ids[-1] == tokenizer.eos_id
        assert tokenizer.eos_id not in ids[:-1]  # `<eos>` in the text is text
        found.append(tokenizer.decode(ids[:-1]))
    return found


def test_documents_come_back_whatever_the_shards(source, tokenizer, tmp_path):
    streams = []
    for number, size in enumerate((1 << 20, 100, 1)):
        manifest = build_corpus([source], tokenizer, tmp_path / str(number), shard_tokens=size)
        corpus = open_corpus(tmp_path / str(number), tokenizer, verify=True)
        assert documents(corpus, tokenizer) == TEXTS
        assert corpus.tokens == manifest.tokens == corpus.starts[-1]
        streams.append(corpus.read(0, corpus.tokens))
        assert (len(manifest.shards) > 1) == (size < 1 << 20)
    assert all(np.array_equal(streams[0], stream) for stream in streams)


def test_the_manifest_says_what_was_read(source, tokenizer, tmp_path):
    manifest = build_corpus([source], tokenizer, tmp_path / "out")
    content = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert content["documents"] == 60
    assert content["bytes"] == sum(len(text.encode()) for text in TEXTS)
    assert content["tokens"] == manifest.tokens
    assert content["settings"]["tokenizer_digest"] == tokenizer.digest
    assert content["settings"]["dtype"] == "uint16"
    assert content["sources"][0]["path"] == str(source)
    assert len(content["digest"]) == 64
    assert not (tmp_path / "out" / "build.json").exists()


def test_duplicates_and_unwanted_documents_are_left_out_and_counted(tokenizer, tmp_path):
    source = write(tmp_path / "a.jsonl", TEXTS + TEXTS[:10] + [""])
    manifest = build_corpus([source], tokenizer, tmp_path / "out", keep=lambda text: hash_position(text) <= 0.7)
    kept = [text for text in TEXTS if hash_position(text) <= 0.7]
    assert documents(open_corpus(tmp_path / "out"), tokenizer) == kept
    assert 0 < len(kept) < 60
    excluded = sum((hash_position(text) > 0.7) for text in TEXTS + TEXTS[:10])
    assert (manifest.tally.seen, manifest.tally.excluded) == (70, excluded)
    assert manifest.documents + manifest.tally.excluded + manifest.tally.duplicates == 70


def test_a_begin_token_can_be_added(source, tokenizer, tmp_path):
    build_corpus([source], tokenizer, tmp_path / "out", add_bos=True)
    corpus = open_corpus(tmp_path / "out")
    assert {int(corpus.document(i)[0]) for i in range(60)} == {tokenizer.bos_id}


def test_a_finished_corpus_is_found_again_and_another_refused(source, tokenizer, tmp_path):
    out = tmp_path / "out"
    first = build_corpus([source], tokenizer, out)
    written = (out / "manifest.json").stat().st_mtime_ns
    assert build_corpus([source], tokenizer, out) == first
    assert (out / "manifest.json").stat().st_mtime_ns == written
    with pytest.raises(HalflapError, match="already holds a corpus that differs in documents; choose another"):
        build_corpus([source], tokenizer, out, keep=lambda text: "1" in text)
    with pytest.raises(HalflapError, match="differs in tokenizer_digest, vocab_size"):
        build_corpus([source], train_tokenizer(TEXTS, 280), out)


class Interrupted(Exception):
    pass


def interrupted_build(monkeypatch, source, tokenizer, out, after, **options):
    """A build that fails when it wants the batch after the first `after`, in the middle of a shard."""
    calls = []
    real = shards._take

    def take(documents, characters):
        calls.append(1)
        if len(calls) > after:
            raise Interrupted
        return real(documents, characters)

    with monkeypatch.context() as patch:
        patch.setattr(shards, "_take", take)
        with pytest.raises(Interrupted):
            build_corpus([source], tokenizer, out, shard_tokens=150, **options)


@pytest.mark.parametrize("after", [0, 1, 3])
def test_an_interrupted_build_goes_on_where_it_stopped(monkeypatch, source, tokenizer, tmp_path, after):
    whole = build_corpus([source], tokenizer, tmp_path / "whole", shard_tokens=150)
    out = tmp_path / "out"
    interrupted_build(monkeypatch, source, tokenizer, out, after)
    assert not is_corpus(out)
    assert not list(out.glob(".*.tmp"))
    out.mkdir(exist_ok=True)
    (out / ".shard-00000.tokens.0123abcd.tmp").write_bytes(b"left by a killed process")
    if after > 1:
        with pytest.raises(HalflapError, match="is unfinished; give its command again"):
            open_corpus(out)
    assert build_corpus([source], tokenizer, out, shard_tokens=150) == whole
    assert documents(open_corpus(out, verify=True), tokenizer) == TEXTS
    assert {file.suffix for file in out.iterdir()} == {".json", ".tokens", ".npy"}


def test_a_resumed_build_does_not_tokenise_again(monkeypatch, source, tokenizer, tmp_path):
    out = tmp_path / "out"
    interrupted_build(monkeypatch, source, tokenizer, out, 4)
    finished = {file: file.stat().st_mtime_ns for file in out.glob("shard-*.tokens")}
    assert finished
    build_corpus([source], tokenizer, out, shard_tokens=150)
    assert all(file.stat().st_mtime_ns == written for file, written in finished.items())


@pytest.mark.parametrize("change", ["documents", "rule", "tokenizer", "damage", "state"])
def test_an_interrupted_build_of_something_else_starts_over(monkeypatch, source, tokenizer, tmp_path, change):
    out, keep = tmp_path / "out", None
    interrupted_build(monkeypatch, source, tokenizer, out, 4)
    texts = list(TEXTS)
    if change == "documents":
        texts[0] = "Another first document."
        write(source, texts)
    elif change == "rule":
        keep, texts = (lambda text: text != TEXTS[1]), TEXTS[:1] + TEXTS[2:]
    elif change == "tokenizer":
        tokenizer = train_tokenizer(TEXTS, 280)
    elif change == "damage":
        (out / "shard-00000.tokens").write_bytes(b"x")
    else:
        (out / "build.json").write_text('{"shards": ')
    build_corpus([source], tokenizer, out, shard_tokens=150, keep=keep)
    assert documents(open_corpus(out, tokenizer, verify=True), tokenizer) == texts


def test_damage_and_mismatch_are_refused(source, tokenizer, tmp_path):
    out = tmp_path / "out"
    build_corpus([source], tokenizer, out)
    with pytest.raises(HalflapError, match=r"was made by tokenizer .* must be the same"):
        open_corpus(out, train_tokenizer(TEXTS, 280))
    shard = out / "shard-00000.tokens"
    content = shard.read_bytes()
    shard.write_bytes(b"\x07\x00" + content[2:])
    open_corpus(out)
    with pytest.raises(HalflapError, match="its sha256 is not the manifest's"):
        open_corpus(out, verify=True)
    shard.write_bytes(content[:-2])
    with pytest.raises(HalflapError, match=r"damaged \(\d+ bytes, should be \d+ bytes\); build the corpus again"):
        open_corpus(out)
    shard.unlink()
    with pytest.raises(HalflapError, match=r"damaged \(missing"):
        open_corpus(out)


def test_other_folders_are_no_corpus(tokenizer, source, tmp_path):
    with pytest.raises(HalflapError, match="is no corpus"):
        open_corpus(tmp_path)
    build_corpus([source], tokenizer, tmp_path / "out")
    manifest = tmp_path / "out" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"format_version": 1', '"format_version": 9'))
    with pytest.raises(HalflapError, match="has format version 9, and 1 is read here"):
        open_corpus(tmp_path / "out")
    manifest.write_text('{"other": 1}')
    with pytest.raises(HalflapError, match="is no readable corpus manifest"):
        open_corpus(tmp_path / "out")


def test_nothing_left_to_tokenise_is_an_error(tokenizer, source, tmp_path):
    with pytest.raises(HalflapError, match="no document was left to tokenise: of 60, 60 were not to be kept"):
        build_corpus([source], tokenizer, tmp_path / "out", keep=lambda text: False)
    with pytest.raises(HalflapError, match="shard_tokens is 0"):
        build_corpus([source], tokenizer, tmp_path / "out", shard_tokens=0)


def test_large_vocabularies_take_four_bytes(tokenizer, source, tmp_path):
    content = json.loads(tokenizer.content)
    content["added_tokens"].append({**content["added_tokens"][0], "id": 70000, "content": "<far>"})
    content["model"]["vocab"]["<far>"] = 70000
    large = type(tokenizer)(json.dumps(content), tokenizer.config, tokenizer.special_tokens)
    assert large.vocab_size == 70001
    manifest = build_corpus([source], large, tmp_path / "out")
    assert manifest.settings.dtype == "uint32"
    assert documents(open_corpus(tmp_path / "out", large), large) == TEXTS
