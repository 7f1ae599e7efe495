"""Replies match what a body says of them, in OpenAI's words or in vLLM's, on both ways to ask for text."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

pytest.importorskip("llguidance", reason="llguidance is not installed")

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
WORDS = ["the cat", 'a "mat"', "ünïcödé 日本", "back\\slash\nline"]
SCHEMA = {"type": "object", "properties": {"k": {"enum": ["cat", "mat"]}}, "required": ["k"]}
SCHEMA["additionalProperties"] = False
RULES = 'start: "on " WHERE\nWHERE: "the mat" | "a cat"'


def texts(client: Any, path: str, **body: Any) -> list[str]:
    asked = {"messages": [{"role": "user", "content": "hi"}]} if path == CHAT else {"prompt": "hi"}
    response = client.post(path, json={"max_tokens": 40, "seed": 1, "n": 3, **asked, **body})
    assert response.status_code == 200, response.text
    choices = response.json()["choices"]
    return [choice["text"] if path == COMPLETIONS else choice["message"]["content"] for choice in choices]


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
@pytest.mark.parametrize(
    ("body", "matches"),
    [
        ({"structured_outputs": {"regex": "[ab]{2}-[0-9]"}}, lambda text: re.fullmatch("[ab]{2}-[0-9]", text)),
        ({"guided_regex": "[ab]{2}-[0-9]"}, lambda text: re.fullmatch("[ab]{2}-[0-9]", text)),
        ({"structured_outputs": {"choice": WORDS}}, WORDS.__contains__),
        ({"guided_choice": WORDS}, WORDS.__contains__),
        ({"structured_outputs": {"grammar": RULES}}, ["on the mat", "on a cat"].__contains__),
        ({"guided_grammar": RULES}, ["on the mat", "on a cat"].__contains__),
        ({"structured_outputs": {"json": SCHEMA}}, lambda text: json.loads(text)["k"] in ("cat", "mat")),
        ({"guided_json": json.dumps(SCHEMA)}, lambda text: json.loads(text)["k"] in ("cat", "mat")),
        ({"structured_outputs": {"json_object": True}}, lambda text: text.startswith("{")),
        ({"response_format": {"type": "json_object"}}, lambda text: text.startswith("{")),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "k", "schema": SCHEMA}}},
            lambda text: json.loads(text)["k"] in ("cat", "mat"),
        ),
    ],
    ids=lambda value: (
        "-".join([*value, *(k for v in value.values() if isinstance(v, dict) for k in v)])
        if isinstance(value, dict)
        else ""
    ),
)
def test_replies_match(client: Any, path: str, body: dict[str, Any], matches: Any) -> None:
    assert all(map(matches, texts(client, path, **body)))


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"guided_regex": "a", "structured_outputs": {"choice": ["b"]}}, "structured_outputs.choice"),
        ({"structured_outputs": {"choice": ["b"], "json": {}}}, "structured_outputs.choice"),
        ({"response_format": {"type": "json_object"}, "guided_json": {}}, "guided_json"),
        ({"guided_json": "{no"}, "guided_json"),
        ({"guided_choice": []}, "guided_choice"),
        ({"guided_choice": [""]}, "guided_choice[0]"),
        ({"structured_outputs": {"regexp": "a"}}, "structured_outputs.regexp"),
        ({"guided_grammar": "nonsense"}, ""),
        ({"guided_regex": "(a"}, ""),
    ],
)
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_what_cannot_be_matched_is_refused(client: Any, path: str, body: dict[str, Any], param: str) -> None:
    asked = {"messages": [{"role": "user", "content": "hi"}]} if path == CHAT else {"prompt": "hi"}
    error = client.post(path, json={**asked, **body}).json()["error"]
    assert error["type"] == "invalid_request_error" and (error["param"] or "") == param, error


def test_beside_tools_only_json_leaves_room_for_a_call(client: Any) -> None:
    tool = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
    body = {"messages": [{"role": "user", "content": "hi"}], "tools": [tool], "guided_choice": WORDS}
    assert client.post(CHAT, json=body).json()["error"]["param"] == "guided_choice"
    assert texts(client, CHAT, tools=[tool], tool_choice="none", guided_choice=WORDS)[0] in WORDS
    either = {"tools": [tool], "guided_json": SCHEMA, "n": 1}
    assert texts(client, CHAT, **either, seed=2)[0] is None or "k" in texts(client, CHAT, **either, seed=2)[0]
