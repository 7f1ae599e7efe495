"""A text has at least its bytes over the longest token's tokens."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
import tokenizers
from tokenizers import decoders
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Metaspace

from halflap.data.token_bytes import longest_token
from halflap.data.tokenizer import train_tokenizer
from halflap.inference.replies import Texts

TEXT = "the cat sat on the mat, ünïcödé 日本語 🙂        <eos>\n\n"


@pytest.fixture(scope="module")
def content() -> str:
    return train_tokenizer([TEXT] * 4, 400, progress=False).content


def changed(content: str, **parts: Any) -> str:
    return json.dumps(json.loads(content) | parts)


def test_single_tokens_read_as_within_a_text() -> None:
    """A decoder that takes the space before a text away does not take that of a token."""
    core = tokenizers.Tokenizer(WordLevel({"\u2581cat": 0, "cat": 1, "<unk>": 2}, unk_token="<unk>"))
    core.pre_tokenizer, core.decoder = Metaspace(), decoders.Metaspace()
    tokenizer = dataclasses.replace(train_tokenizer([TEXT] * 4, 300, progress=False), content=core.to_str())
    assert tokenizer.decode([0]) == "cat" and tokenizer.decode([1, 0]) == "cat cat"
    assert [Texts(tokenizer)[token] for token in (0, 1)] == [" cat", "cat"]


def test_no_text_has_fewer_tokens(content: str) -> None:
    tokenizer = train_tokenizer([TEXT] * 4, 400, progress=False)
    longest = tokenizer.longest_token
    assert longest is not None
    for text in (TEXT, TEXT * 9, "<eos>" * 7, "the cat sat on the mat" * 50, " " * 1000, "日本語" * 30):
        assert len(tokenizer.encode(text)) * longest >= len(text.encode())
    vocabulary = json.loads(content)["model"]["vocab"]
    spelled = (tokenizer.decode([i]) for i in vocabulary.values())
    assert longest == max(len(text.encode()) for text in spelled if "\ufffd" not in text)


def test_texts_that_are_composed_first_shrink(content: str) -> None:
    plain = longest_token(content)
    assert plain is not None
    assert longest_token(changed(content, normalizer={"type": "NFC"})) == 4 * plain
    steps = [{"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]
    assert longest_token(changed(content, normalizer={"type": "Sequence", "normalizers": steps})) == plain


@pytest.mark.parametrize(
    "parts",
    [
        {"normalizer": {"type": "Strip", "strip_left": True, "strip_right": True}},
        {"normalizer": {"type": "Replace", "pattern": {"Regex": " +"}, "content": " "}},
        {"normalizer": {"type": "Replace", "pattern": {"String": "  "}, "content": ""}},
        {"pre_tokenizer": {"type": "Whitespace"}},
        {"pre_tokenizer": None},
        {"pre_tokenizer": {"type": "Split", "pattern": {"String": " "}, "behavior": "Removed", "invert": False}},
        {"added_tokens": [{"id": 0, "content": "<pad>", "lstrip": True, "rstrip": False}]},
        {"model": {"type": "WordPiece", "unk_token": "a", "vocab": {"a": 0}}},
        {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}},
    ],
)
def test_where_text_may_vanish_there_is_no_bound(content: str, parts: dict[str, Any]) -> None:
    assert longest_token(changed(content, **parts)) is None


def test_tokens_that_fall_back_to_bytes_are_bounded(content: str) -> None:
    vocabulary = [*(f"<0x{byte:02X}>" for byte in range(256)), "▁▁▁", "ab"]
    model = {"type": "BPE", "byte_fallback": True, "vocab": {token: i for i, token in enumerate(vocabulary)}}
    parts: dict[str, Any] = {"model": model, "pre_tokenizer": None, "added_tokens": []}
    assert longest_token(changed(content, **parts)) == 9
    model["byte_fallback"] = False
    assert longest_token(changed(content, **parts)) is None
