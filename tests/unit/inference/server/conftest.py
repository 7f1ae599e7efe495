"""A server over a tiny model of random weights, asked in process."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest

pytest.importorskip("starlette", reason="starlette is not installed: pip install -e '.[serve]'")

TEXT = ["the cat sat on the mat, ünïcödé 日本語 🙂 ", 'User: hi\n\nAssistant: {"name": "add", "arguments": {"a": 1}} ']
TEMPLATE = (
    "{% if tools %}[tools {{ tools | tojson }}]{% endif %}"
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}"
    "{% for c in m.get('tool_calls', []) %}<tool_call>{{ c['function'] | tojson }}</tool_call>{% endfor %}<eos>"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
NAME = "tiny"


@pytest.fixture(scope="package")
def tokenizer() -> Any:
    from halflap.data.tokenizer import train_tokenizer

    return train_tokenizer(TEXT * 4, 300, progress=False).with_chat_template(TEMPLATE)


@pytest.fixture(scope="package")
def model(tokenizer: Any) -> Any:
    import torch

    from halflap.models.model import HybridModel, initialize
    from halflap.models.presets import preset

    config = dataclasses.replace(
        preset("nemotron-h-tiny"), vocab_size=tokenizer.vocab_size, max_position_embeddings=512, eos_token_id=2
    )
    model = HybridModel(config).eval()
    initialize(model, seed=0)
    with torch.no_grad():  # blocks that count, so that texts vary
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and name.startswith(("blocks.", "head.")) and "A_log" not in name:
                parameter.mul_(4)
    return model


@pytest.fixture(scope="package")
def engine(model: Any, tokenizer: Any) -> Iterator[Any]:
    from halflap.inference.engine import Engine
    from halflap.inference.requests import EngineSettings

    with Engine(model, tokenizer, EngineSettings(max_batch=4, max_context=512, prefix_cache=1 << 24)) as engine:
        yield engine


@pytest.fixture
def make_service(engine: Any, tokenizer: Any, model: Any) -> Iterator[Callable[..., Any]]:
    """make_service(engine=..., tokenizer=..., **limits) is a Service."""
    from halflap.inference.server.config import ServerSettings
    from halflap.inference.server.prompts import Prompts
    from halflap.inference.server.service import Service

    made: list[Prompts] = []

    def make(*, engine: Any = engine, tokenizer: Any = tokenizer, **limits: Any) -> Service:
        made.append(Prompts(tokenizer, model.config))
        return Service(engine, made[-1], ServerSettings(**{"name": NAME, "max_context": 512, **limits}))

    yield make
    for prompts in made:
        prompts.close()


@pytest.fixture
def make_client(make_service: Any) -> Callable[..., Any]:
    from starlette.testclient import TestClient

    from halflap.inference.server.app import application

    return lambda **limits: TestClient(application(make_service(**limits)), raise_server_exceptions=False)


@pytest.fixture
def client(make_client: Any) -> Any:
    return make_client()


@pytest.fixture
def events() -> Callable[[Any], list[dict[str, Any]]]:
    """events(response) are the objects of a stream, which must end as streams end."""
    return _events


def _events(response: Any) -> list[dict[str, Any]]:
    assert response.headers["content-type"].startswith("text/event-stream"), response.text
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]
