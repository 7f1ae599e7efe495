"""openai's client against `halflap serve --replicas 2`: what the front passes on is what the engine says."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

openai = pytest.importorskip("openai", reason="openai is not installed: pip install -e '.[interop]'")
HELLO = [{"role": "user", "content": "Attention looks back"}]
TOOL = {
    "type": "function",
    "function": {
        "name": "look",
        "parameters": {
            "type": "object",
            "properties": {"at": {"enum": ["word", "state"]}},
            "required": ["at"],
            "additionalProperties": False,  # a random model would add some until its context is full
        },
    },
}


@pytest.fixture(scope="module")
def url(make_checkpoint: Any, serving: Any) -> Iterator[str]:
    words = ["--replicas", "2", "--api-key", "k", "--served-model-name", "tiny", "--max-context", "512"]
    with serving(make_checkpoint("nemotron-h-tiny", unequal=True), *words, "--prefix-cache", "16MiB") as url:
        yield url


@pytest.fixture(scope="module")
def client(url: str) -> Any:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="k", max_retries=0)


def test_chat_and_streams(client: Any) -> None:
    assert client.models.list().data[0].id == "tiny"
    body = {"model": "tiny", "messages": HELLO, "max_completion_tokens": 12, "seed": 1}
    whole = client.chat.completions.create(**body)
    chunks = list(client.chat.completions.create(**body, stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    pieces = client.completions.create(model="tiny", prompt="The", max_tokens=5, stream=True)
    assert [piece.choices[0].finish_reason for piece in pieces][-1] in ("stop", "length")


def test_conversations_find_what_was_read_of_them(client: Any) -> None:
    talks = {number: [{"role": "user", "content": f"This is talk {number}."}] for number in range(4)}
    for turn in range(3):
        for messages in talks.values():
            reply = client.chat.completions.create(model="tiny", messages=messages, max_tokens=4, temperature=0)
            if turn:
                assert reply.usage.prompt_tokens_details.cached_tokens > 0
            said = reply.choices[0].message.content
            messages += [{"role": "assistant", "content": said}, {"role": "user", "content": "Go on."}]


def test_tools_and_errors(client: Any, url: str) -> None:
    reply = client.chat.completions.create(model="tiny", messages=HELLO, tools=[TOOL], tool_choice="required")
    assert reply.choices[0].message.tool_calls[0].function.name == "look"
    with pytest.raises(openai.NotFoundError, match="this server has 'tiny'"):
        client.chat.completions.create(model="gpt", messages=HELLO)
    with pytest.raises(openai.BadRequestError, match="context has 512"):
        client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "word " * 800}])
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{url}/v1", api_key="no").models.list()
    with client.completions.create(model="tiny", prompt="a", max_tokens=400, stream=True) as stream:
        next(iter(stream))  # and hangs up
    assert client.completions.create(model="tiny", prompt="a", max_tokens=1).usage.completion_tokens == 1
