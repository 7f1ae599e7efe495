"""Replies grow with what is added to them, and what has been streamed is not kept."""

from __future__ import annotations

from typing import Any

import pytest

from halflap.inference.requests import Piece, Request, Token
from halflap.inference.server.asked import Asked
from halflap.inference.server.objects import ChatReply, CompletionReply


def asked(stream: bool) -> Asked:
    return Asked((Request((1,), 9),), 1, stream, include_usage=False, logprobs=True)


def piece(text: str, **more: Any) -> Piece:
    return Piece(0, text, (Token(3, text, -1.0),), **more)


def test_lists_of_log_probabilities_grow_in_place() -> None:
    reply = CompletionReply(asked(stream=False), "tiny", lambda token: b"")
    reply.add(0, piece("a"))
    begun = reply.whole({})["choices"][0]["logprobs"]["tokens"]
    for _ in range(3):
        reply.add(0, piece("b"))
    reply.add(0, piece("c", finish_reason="length"))
    (choice,) = reply.whole({})["choices"]
    assert choice["text"] == "abbbc" and choice["finish_reason"] == "length"
    assert choice["logprobs"]["tokens"] is begun and begun == [*"abbbc"]
    assert [len(values) for values in choice["logprobs"].values()] == [5] * 4


@pytest.mark.parametrize("kind", [CompletionReply, ChatReply])
def test_a_stream_keeps_nothing_of_what_it_has_sent(kind: Any) -> None:
    reply = kind(asked(stream=True), "tiny", lambda token: b"")
    sent = [chunk for text in "abc" for chunk in reply.add(0, piece(text))]
    assert len(sent) >= 3 and sent[-1]["choices"][0]["logprobs"]
    kept = str(reply.whole({})["choices"])
    assert "b" in str(sent[-2]) and "'b'" not in kept and "'c'" not in kept
