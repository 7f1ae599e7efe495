"""/v1/chat/completions: templates, streams, log-probabilities, forms of answers and tools."""

from __future__ import annotations

import dataclasses
import json
import threading
import time
from typing import Any

import pytest

from halflap.data.chat import PLAIN, render
from halflap.inference.generate import generate
from halflap.inference.requests import Piece, Request, Usage
from halflap.inference.server.objects import ChatReply
from halflap.inference.stream import Stream

HELLO = [{"role": "user", "content": "the cat"}]
ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "sum of two",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 9}, "b": {"enum": ["x", "y"]}},
            "required": ["a", "b"],
            "additionalProperties": False,
        },
    },
}


def post(client: Any, messages: Any = HELLO, **body: Any) -> Any:
    response = client.post("/v1/chat/completions", json={"messages": messages, **body})
    assert response.status_code == 200, response.text
    return response if body.get("stream") else response.json()


def test_reply_is_what_the_template_leads_to(client: Any, model: Any, tokenizer: Any) -> None:
    messages = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "the "}, {"type": "text", "text": "cat"}]},
    ]
    text = "<system>be brief<eos><user>the cat<eos><assistant>"
    wanted = generate(model, [tokenizer.encode(text)], 10, tokenizer=tokenizer)[0]
    found = post(client, messages, max_completion_tokens=10, temperature=0)
    choice = found["choices"][0]
    assert choice["message"] == {"role": "assistant", "content": wanted.text, "refusal": None}
    assert choice["finish_reason"] == wanted.finish_reason and found["object"] == "chat.completion"
    assert found["usage"]["prompt_tokens"] == len(tokenizer.encode(text))


def test_bytes_of_tokens_make_up_the_text(client: Any) -> None:
    found = post(client, logprobs=True, top_logprobs=2, structured_outputs={"choice": ["a 🙃"]})["choices"][0]
    tokens = [token for token in found["logprobs"]["content"] if token["token"] != "<eos>"]
    assert b"".join(bytes(token["bytes"]) for token in tokens).decode() == found["message"]["content"] == "a 🙃"
    assert any("\ufffd" in token["token"] for token in tokens)


def test_stream_begins_with_the_role_and_ends_with_usage(client: Any, events: Any) -> None:
    body = {"max_tokens": 12, "seed": 5, "n": 2, "logprobs": True, "top_logprobs": 2}
    whole = post(client, **body)
    chunks = events(post(client, **body, stream=True, stream_options={"include_usage": True}))
    assert chunks[-1]["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"]
    for choice in whole["choices"]:
        mine = [c for chunk in chunks for c in chunk["choices"] if c["index"] == choice["index"]]
        assert mine[0]["delta"]["role"] == "assistant" and mine[-1]["delta"] == {}
        assert "".join(c["delta"].get("content", "") for c in mine) == choice["message"]["content"]
        assert [c["finish_reason"] for c in mine] == [None] * (len(mine) - 1) + [choice["finish_reason"]]
        scores = [token for c in mine if c["logprobs"] for token in c["logprobs"]["content"]]
        assert scores == choice["logprobs"]["content"]
        assert all(len(token["top_logprobs"]) == 2 for token in scores)
    without = events(post(client, max_tokens=3, stream=True))
    assert not any("usage" in chunk for chunk in without)


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_usage_runs_along_where_that_is_asked_for(client: Any, events: Any, path: str) -> None:
    asked = {"messages": HELLO} if "chat" in path else {"prompt": "the cat"}
    options = {"include_usage": True, "continuous_usage_stats": True}
    body = {**asked, "max_tokens": 6, "seed": 1, "n": 2, "ignore_eos": True, "stream": True, "stream_options": options}
    chunks = events(client.post(path, json=body))
    prompt = chunks[-1]["usage"]["prompt_tokens"]
    assert chunks[-1]["usage"]["completion_tokens"] == 12 and not chunks[-1]["choices"]
    for index in range(2):
        found = [chunk["usage"] for chunk in chunks[:-1] if chunk["choices"][0]["index"] == index]
        counts = [usage["completion_tokens"] for usage in found]
        assert counts == sorted(counts) and counts[0] == 1 and counts[-1] == 6
        assert all(usage["total_tokens"] == prompt + usage["completion_tokens"] for usage in found)
    alone = {**body, "stream_options": {"continuous_usage_stats": True}}
    assert not any("usage" in chunk for chunk in events(client.post(path, json=alone)))


def test_nothing_is_sent_before_the_first_token(make_client: Any, events: Any) -> None:
    """Load generators take the first chunk's time for that of the first token."""

    class Slow:
        def submit(self, request: Request) -> Stream:
            stream = Stream(request)
            threading.Timer(0.3, self.reply, [stream]).start()
            return stream

        def reply(self, stream: Stream) -> None:
            self.said = time.time()
            stream.put(Piece(0, "a", finish_reason="stop"))
            stream.end(Usage(1, 1, 0))

        def stats(self) -> dict[str, Any]:
            return {}

    engine, came = Slow(), []
    client = make_client(engine=engine)
    chunk = ChatReply.chunk
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ChatReply, "chunk", lambda *given: (came.append(time.time()), chunk(*given))[1])
        chunks = events(post(client, stream=True))
    assert [list(c["choices"][0]["delta"]) for c in chunks] == [["role", "content", "refusal"], ["content"], []]
    assert came[0] >= engine.said


def test_prefix_of_the_turn_before_is_found(client: Any) -> None:
    long = [{"role": "user", "content": "the cat sat on the mat " * 6}]
    first = post(client, long, max_tokens=8, temperature=0)
    turn = [*long, first["choices"][0]["message"], {"role": "user", "content": "sat"}]
    again = post(client, turn, max_tokens=4)
    assert again["usage"]["prompt_tokens_details"]["cached_tokens"] > 0


def test_json_forms(client: Any) -> None:
    pytest.importorskip("llguidance")
    schema = {"type": "object", "properties": {"k": {"enum": ["cat", "mat"]}}, "required": ["k"]}
    form = {"type": "json_schema", "json_schema": {"name": "k", "schema": schema | {"additionalProperties": False}}}
    found = post(client, response_format=form, seed=1)
    assert json.loads(found["choices"][0]["message"]["content"])["k"] in ("cat", "mat")
    assert found["choices"][0]["finish_reason"] == "stop"
    wrong = {"type": "json_schema", "json_schema": {"name": "k", "schema": {"type": "nonsense"}}}
    response = client.post("/v1/chat/completions", json={"messages": HELLO, "response_format": wrong})
    assert response.status_code == 400 and "json_schema" in response.json()["error"]["message"]


def test_a_schema_that_would_take_long_to_compile_is_refused(client: Any) -> None:
    pytest.importorskip("llguidance")
    schema = {"type": "object", "properties": {f"p{i}": {"type": "integer"} for i in range(6000)}}
    form = {"type": "json_schema", "json_schema": {"name": "k", "schema": schema}}
    response = client.post("/v1/chat/completions", json={"messages": HELLO, "response_format": form})
    assert response.status_code == 400 and "too big" in response.json()["error"]["message"]


def test_a_form_without_a_schema_is_any_object(client: Any) -> None:
    pytest.importorskip("llguidance")
    body = {"response_format": {"type": "json_schema", "json_schema": {"name": "k"}}, "max_tokens": 5}
    assert post(client, **body)["choices"][0]["message"]["content"].startswith("{")


def test_references_inside_a_tool_s_parameters_hold(client: Any) -> None:
    pytest.importorskip("llguidance")
    inner = {"type": "object", "properties": {"b": {"enum": ["x", "y"]}}, "required": ["b"]}
    inner["additionalProperties"] = False
    parameters = {
        "type": "object",
        "properties": {"a": {"$ref": "#/$defs/Inner"}},
        "required": ["a"],
        "additionalProperties": False,
        "$defs": {"Inner": inner},
    }
    tools = [ADD, {"type": "function", "function": {"name": "nest", "parameters": parameters}}]
    choice = {"type": "function", "function": {"name": "nest"}}
    (call,) = post(client, tools=tools, tool_choice=choice, seed=2)["choices"][0]["message"]["tool_calls"]
    assert json.loads(call["function"]["arguments"])["a"]["b"] in ("x", "y")
    assert post(client, tools=tools, tool_choice="required", seed=2)["choices"][0]["message"]["tool_calls"]


def test_an_answer_by_a_schema_or_a_call(client: Any) -> None:
    """Each seed gives the one or the other, and nothing else; a call that is required leaves no choice."""
    pytest.importorskip("llguidance")
    schema = {
        "type": "object",
        "properties": {"k": {"$ref": "#/$defs/kind"}},
        "required": ["k"],
        "additionalProperties": False,
        "$defs": {"kind": {"enum": ["cat", "mat"]}},
    }
    form = {"type": "json_schema", "json_schema": {"name": "k", "schema": schema}}
    seen = set()
    for seed in range(12):
        found = post(client, tools=[ADD], response_format=form, seed=seed)["choices"][0]
        calls, content = found["message"].get("tool_calls"), found["message"]["content"]
        seen.add(found["finish_reason"])
        if calls:
            assert {*json.loads(calls[0]["function"]["arguments"])} == {"a", "b"} and not content
        else:
            assert json.loads(content)["k"] in ("cat", "mat")
    assert seen == {"tool_calls", "stop"}
    forced = post(client, tools=[ADD], response_format=form, tool_choice="required")["choices"][0]
    assert forced["message"]["tool_calls"]


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "add"}}])
def test_a_call_that_is_required_comes(client: Any, events: Any, choice: Any) -> None:
    pytest.importorskip("llguidance")
    body = {"tools": [ADD], "tool_choice": choice, "seed": 2}
    found = post(client, **body)["choices"][0]
    (call,) = found["message"]["tool_calls"]
    assert call["function"]["name"] == "add" and found["message"]["content"] is None
    arguments = json.loads(call["function"]["arguments"])
    assert arguments["a"] in range(10) and arguments["b"] in ("x", "y")
    assert found["finish_reason"] == "tool_calls"
    deltas = [c["delta"] for chunk in events(post(client, **body, stream=True)) for c in chunk["choices"]]
    streamed = [call for delta in deltas for call in delta.get("tool_calls", [])]
    assert [c["function"] for c in streamed] == [call["function"]] and streamed[0]["index"] == 0


def test_marks_that_are_special_tokens_leave_bare_calls(make_service: Any, tokenizer: Any) -> None:
    from halflap.inference.server.tools import HERMES, WHOLE

    assert make_service().prompts.tool_format is HERMES
    special = dataclasses.replace(tokenizer, content=tokenizer.content.replace('"<pad>"', '"<tool_call>"'))
    assert make_service(tokenizer=special).prompts.tool_format is WHOLE


def test_what_clients_add_to_replies_may_come_back(client: Any) -> None:
    function = {"name": "add", "arguments": '{"a": 1}'}
    plain = {"id": "call_1", "type": "function", "function": function}
    added = plain | {"index": 0, "function": function | {"parsed_arguments": {"a": 1}}}
    counts = []
    others = {"parsed": None, "refusal": None, "reasoning": None, "reasoning_content": "so", "annotations": []}
    for call, more in ((plain, {}), (added, others)):
        messages = [*HELLO, {"role": "assistant", "content": None, "tool_calls": [call]} | more]
        counts.append(post(client, messages, tools=[ADD], max_tokens=4)["usage"]["prompt_tokens"])
    assert counts[0] == counts[1]
    refusal = {"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]}
    assert post(client, [*HELLO, refusal, *HELLO], max_tokens=4)["choices"]


def test_what_clients_add_to_messages_changes_nothing(client: Any) -> None:
    cached = {"type": "text", "text": "the cat", "cache_control": {"type": "ephemeral"}}
    spoken = [{"role": "user", "content": [cached], "type": "text", "reasoning": None}]
    harmless = {"top_k": -1, "top_logprobs": 0, "stop": ""}
    found = post(client, spoken, max_tokens=6, seed=3, **harmless)
    assert found["choices"] == post(client, max_tokens=6, seed=3)["choices"]


def test_answers_of_tools_go_through_the_template(client: Any) -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    messages = [
        *HELLO,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "3"},
    ]
    assert post(client, messages, tools=[ADD], max_tokens=4)["usage"]["prompt_tokens"] > 20
    fewer = post(client, messages, tools=[ADD], tool_choice="none", max_tokens=4)["usage"]["prompt_tokens"]
    assert fewer < post(client, messages, tools=[ADD], max_tokens=4)["usage"]["prompt_tokens"]


def test_without_a_template_turns_are_written_plainly(make_client: Any, tokenizer: Any, model: Any) -> None:
    plain = dataclasses.replace(tokenizer, chat_template=None)
    text = render(PLAIN, HELLO, add_generation_prompt=True)
    wanted = generate(model, [tokenizer.encode(text)], 6, tokenizer=tokenizer)[0].text
    found = post(make_client(tokenizer=plain), max_tokens=6, temperature=0)
    assert found["choices"][0]["message"]["content"] == wanted.lstrip()


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{{ ''.__class__.__mro__ }}",
        "{% for i in %}",
        "{{ 'a' * 10**12 }}",
    ],
)
def test_bad_templates_end_in_an_error_object(make_client: Any, tokenizer: Any, template: str) -> None:
    client = make_client(tokenizer=tokenizer.with_chat_template(template))
    response = client.post("/v1/chat/completions", json={"messages": HELLO})
    assert response.status_code == 400 and "chat template" in response.json()["error"]["message"]
    assert client.get("/health").status_code == 200


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "robot", "content": "a"}]}, "messages[0].role"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages[0].content[0].type",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"text": "b"}]}]},
            "messages[0].content[1].type",
        ),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": 5}]}]}, "messages[0].content[0].text"),
        ({"messages": [{"role": "assistant", "content": None, "audio": {"id": "x"}}]}, "messages[0].audio"),
        ({"messages": HELLO, "tool_choice": "required"}, "tool_choice"),
        (
            {"messages": HELLO, "tools": [ADD], "tool_choice": {"type": "function", "function": {"name": "no"}}},
            "tool_choice",
        ),
        ({"messages": HELLO, "top_logprobs": 3}, "top_logprobs"),
        ({"messages": HELLO, "functions": []}, "functions"),
        ({"messages": HELLO, "response_format": {"type": "regex"}}, "response_format.type"),
        ({"messages": HELLO, "max_tokens": 0}, "max_tokens"),
    ],
)
def test_wrong_bodies_are_refused(client: Any, body: dict[str, Any], param: str) -> None:
    response = client.post("/v1/chat/completions", json=body)
    assert response.status_code == 400 and response.json()["error"]["param"].startswith(param), response.text
