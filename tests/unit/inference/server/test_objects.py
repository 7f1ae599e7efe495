"""Replies grow with what is added to them, and what has been streamed is not kept."""

from __future__ import annotations

import dataclasses
import json
import re
from typing import Any

import pytest

from halflap.inference.requests import Piece, Request, Token
from halflap.inference.server.asked import Asked
from halflap.inference.server.objects import ChatReply, CompletionReply
from halflap.inference.server.tools import HERMES


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


@pytest.mark.parametrize("stream", [False, True])
def test_only_the_beginning_of_a_reply_is_trimmed(stream: bool) -> None:
    """Of a call too, of which no text comes before it is whole."""
    call = '{"name": "say", "arguments": {"text": "hello  world"}}'
    names = {"tool_format": HERMES, "tool_names": frozenset({"say"}), "trimmed": True}
    reply = ChatReply(dataclasses.replace(asked(stream), logprobs=False, **names), "tiny", lambda token: b"")
    pieces = [" ", "\n<tool_call>", *re.findall(r"\s*\S+", call), "</tool_call>"]
    chunks = [chunk for text in pieces for chunk in reply.add(0, Piece(0, text, ()))]
    chunks += reply.add(0, Piece(0, "", (), finish_reason="stop"))
    if stream:
        changes = [choice["delta"] for chunk in chunks for choice in chunk["choices"]]
        (found,) = [one for change in changes for one in change.get("tool_calls", ())]
    else:
        (found,) = reply.whole({})["choices"][0]["message"]["tool_calls"]
    assert json.loads(found["function"]["arguments"]) == {"text": "hello  world"}
