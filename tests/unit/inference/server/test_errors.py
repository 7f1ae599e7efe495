"""Whatever a client sends or does, it gets an error object, and the next one is served."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest

from halflap.inference.requests import Piece, Request, Usage
from halflap.inference.stream import Stream

BODY = {"prompt": "the cat", "max_tokens": 2}
PATH = "/v1/completions"
POSTED = {
    "type": "http",
    "method": "POST",
    "path": PATH,
    "raw_path": b"",
    "query_string": b"",
    "headers": [(b"content-type", b"application/json")],
}  # of one request, as an ASGI server puts it


async def posted(app: Any, body: dict[str, Any], during: Callable[[], Awaitable[None]]) -> tuple[int, str]:
    """Status and text of what an application answers; `during` runs beside it, and the client stays."""
    messages = [{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}]
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        return messages.pop() if messages else await asyncio.Event().wait()  # type: ignore[func-returns-value]

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    await asyncio.wait_for(asyncio.gather(app(POSTED, receive, send), during()), 5)
    return sent[0]["status"], b"".join(message.get("body", b"") for message in sent).decode()


class Held:
    """An engine that says one piece and then nothing until it is let go."""

    def __init__(self) -> None:
        self.streams: list[Stream] = []

    def submit(self, request: Request) -> Stream:
        stream = Stream(request)
        stream.put(Piece(0, "a"))
        self.streams.append(stream)
        return stream

    def release(self) -> None:
        for stream in self.streams:
            stream.put(Piece(0, "b", finish_reason="stop"))
            stream.end(Usage(1, 2, 0))

    def stats(self) -> dict[str, Any]:
        return {"running": len(self.streams), "waiting_for": None, "cache_bytes": {"slots": 3}}


def refused(response: Any, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["message"]
    return error


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b'{"prompt": "\xff\xfe"}',
        b'{"prompt": "\\ud800"}',
        b"[1]",
        b"null",
        b'{"prompt": NaN}',
        b"[" * 100_000,
    ],
)
def test_bodies_that_are_no_json_object(client: Any, raw: bytes) -> None:
    refused(client.post(PATH, content=raw, headers={"Content-Type": "application/json"}), 400)
    assert client.post(PATH, json=BODY).status_code == 200


HI = {"role": "user", "content": "hi"}


@pytest.mark.parametrize(
    ("field", "value", "place"),
    [
        ("messages", [{"role": "user"}], "messages[0]"),
        ("messages", [HI, {"role": "tool", "tool_call_id": "a", "content": None}], "messages[1]"),
        ("response_format", {"type": "json_schema"}, "response_format.json_schema"),
        ("response_format", {"type": "text", "more": 1}, "response_format.more"),
        ("max_tokens", 10**6, "max_tokens"),
        ("max_completion_tokens", 10**6, "max_completion_tokens"),
    ],
)
def test_a_wrong_value_of_a_chat_is_named_as_it_was_written(client: Any, field: str, value: Any, place: str) -> None:
    body = {"messages": [HI], field: value}
    assert refused(client.post("/v1/chat/completions", json=body), 400)["param"] == place
    spoken = {"messages": [HI, {"role": "assistant", "content": None}], "max_tokens": 1}
    assert client.post("/v1/chat/completions", json=spoken).status_code == 200


@pytest.mark.parametrize(
    ("body", "place"),
    [
        ({"Temperature": 0.5}, "Temperature"),
        ({"max-tokens": 5}, "max-tokens"),
        ({"str": 5}, "str"),
        ({"prompt": [5, -1]}, "prompt[1]"),
        ({"prompt": [[5], "a"]}, "prompt[1]"),
        ({"prompt": {"a": 1}}, "prompt"),
    ],
)
def test_what_is_wrong_is_named(client: Any, body: dict[str, Any], place: str) -> None:
    error = refused(client.post(PATH, json=BODY | body), 400)
    assert error["param"] == place and place in error["message"]


def test_paths_methods_and_types(client: Any) -> None:
    refused(client.get("/v2/nothing"), 404)
    assert "POST" in refused(client.get(PATH), 405)["message"]
    refused(client.post(PATH, content=b"prompt=a", headers={"Content-Type": "application/x-www-form-urlencoded"}), 415)


def test_models(client: Any) -> None:
    (model,) = client.get("/v1/models").json()["data"]
    assert client.get(f"/v1/models/{model['id']}").json() == model and model["max_model_len"] == 512
    for name in ("other", "../../etc/passwd", "%2e%2e%2fetc", "tiny/../../x"):
        refused(client.get(f"/v1/models/{name}"), 404)
        assert refused(client.post(PATH, json={**BODY, "model": name}), 404)["code"] == "model_not_found"


def test_keys(make_client: Any) -> None:
    client = make_client(keys=("first", "zweiter-schlüssel"))
    for header in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "first"}, {"Authorization": "Bearer "}):
        assert refused(client.post(PATH, json=BODY, headers=header), 401)["code"] == "invalid_api_key"
        refused(client.get("/v1/models", headers=header), 401)
    for key in ("first", "zweiter-schlüssel"):
        header = {"Authorization": f"Bearer {key}".encode()}
        assert client.post(PATH, json=BODY, headers=header).status_code == 200
    assert client.get("/health").status_code == 200
    assert client.get("/openapi.json").json()["components"]["securitySchemes"]


def test_pages_of_other_origins(make_client: Any) -> None:
    page, other = "http://localhost:5173", "https://evil.example"
    asks = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,content-type"}
    client = make_client(origins=(page,), keys=("key",))
    may = client.options("/v1/chat/completions", headers={"Origin": page, **asks})  # browsers ask this without the key
    assert may.status_code == 200 and may.headers["access-control-allow-origin"] == page
    assert "authorization" in may.headers["access-control-allow-headers"].lower()
    for response in (
        client.get("/v1/models", headers={"Origin": page, "Authorization": "Bearer key"}),
        client.get("/v1/models", headers={"Origin": page}),  # what went wrong, the page may read too
    ):
        assert response.headers["access-control-allow-origin"] == page
    assert "access-control-allow-origin" not in client.options("/v1/models", headers={"Origin": other, **asks}).headers
    anyone = make_client(origins=("*",)).get("/v1/models", headers={"Origin": other})
    assert anyone.headers["access-control-allow-origin"] == "*"
    closed = make_client().get("/v1/models", headers={"Origin": page})
    assert "access-control-allow-origin" not in closed.headers


def test_large_bodies(make_client: Any) -> None:
    client = make_client(body_bytes=1000)
    refused(client.post(PATH, json={**BODY, "user": "x" * 1000}), 413)

    def parts() -> Iterator[bytes]:  # without a Content-Length
        for _ in range(100):
            yield b" " * 100

    refused(client.post(PATH, content=parts(), headers={"Content-Type": "application/json"}), 413)
    assert client.post(PATH, json=BODY).status_code == 200


def test_too_slow(make_client: Any, events: Any) -> None:
    engine = Held()
    client = make_client(engine=engine, seconds=0.2)
    assert refused(client.post(PATH, json=BODY), 504)["code"] == "timeout"
    chunks = events(client.post(PATH, json={**BODY, "stream": True}))
    assert chunks[0]["choices"][0]["text"] == "a" and chunks[-1]["error"]["code"] == "timeout"
    assert all(stream.cancelled for stream in engine.streams)


@pytest.mark.parametrize("stream", [True, False])
def test_the_end_of_the_grace_is_told(make_service: Any, stream: bool) -> None:
    from halflap.inference.server.app import application

    engine = Held()
    service = make_service(engine=engine)

    async def end() -> None:
        while not engine.streams:
            await asyncio.sleep(0.01)
        service.end()

    status, text = asyncio.run(posted(application(service), {**BODY, "stream": stream}, end))
    assert status == (200 if stream else 503) and "the server stopped before the reply was finished" in text
    assert not stream or text.endswith("data: [DONE]\n\n")
    assert engine.streams[0].cancelled and "halflap_requests_active 0.0" in service.metrics.text().decode()


def test_failures_of_the_engine_are_told(make_client: Any, events: Any) -> None:
    class Broken(Held):
        def submit(self, request: Request) -> Stream:
            stream = Stream(request)
            stream.put(Piece(0, "a"))
            stream.put(Piece(0, "", finish_reason="error"))
            stream.end(Usage(1, 1, 0), "the engine failed (out of memory); send the request again")
            return stream

    client = make_client(engine=Broken())
    assert "out of memory" in refused(client.post(PATH, json=BODY), 500)["message"]
    assert "out of memory" in events(client.post(PATH, json={**BODY, "stream": True}))[-1]["error"]["message"]

    class Bug(Held):
        def submit(self, request: Request) -> Stream:
            raise KeyError("secret")

    message = refused(make_client(engine=Bug()).post(PATH, json=BODY), 500)["message"]
    assert "secret" not in message


def test_stopping_refuses_what_is_new(make_service: Any) -> None:
    from starlette.testclient import TestClient

    from halflap.inference.server.app import application

    service = make_service()
    client = TestClient(application(service))
    service.stopping = True
    assert "Retry-After" in client.post(PATH, json=BODY).headers
    refused(client.post(PATH, json=BODY), 503)
    assert client.get("/health").status_code == 503


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_hangs_up_frees_its_place(make_service: Any, stream: bool) -> None:
    from halflap.inference.server.app import application

    engine = Held()
    service = make_service(engine=engine, choices=1)
    app = application(service)
    body = json.dumps({**BODY, "stream": stream}).encode()

    async def hang_up() -> None:
        arrived = asyncio.Event()
        messages = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> dict[str, Any]:
            if messages:
                return messages.pop()
            await arrived.wait()
            return {"type": "http.disconnect"}

        async def send(message: dict[str, Any]) -> None:
            pass

        task = asyncio.create_task(app(POSTED, receive, send))  # pyright: ignore[reportArgumentType]
        while not engine.streams:
            await asyncio.sleep(0.01)
        arrived.set()
        await asyncio.wait_for(task, 5)

    asyncio.run(hang_up())
    assert engine.streams[0].cancelled
    text = service.metrics.text().decode()
    assert 'status="499"' in text and "halflap_requests_active 0.0" in text


def test_a_client_that_goes_before_its_body_has_come_is_no_failure(make_service: Any) -> None:
    from halflap.inference.server.app import application

    service = make_service()
    messages = [{"type": "http.disconnect"}, {"type": "http.request", "body": b'{"pro', "more_body": True}]

    async def receive() -> dict[str, Any]:
        return messages.pop()

    async def send(message: dict[str, Any]) -> None:
        pass

    asyncio.run(application(service)(POSTED, receive, send))  # pyright: ignore[reportArgumentType]
    text = service.metrics.text().decode()
    assert 'status="499"' in text and 'status="500"' not in text


def test_a_reader_that_stops_reading_holds_up_nobody(make_service: Any) -> None:
    from halflap.inference.server.app import application

    service = make_service(seconds=0.3)
    app = application(service)
    body = json.dumps({"prompt": "the", "max_tokens": 400, "stream": True, "ignore_eos": True}).encode()

    async def stall() -> None:
        messages = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> dict[str, Any]:
            return messages.pop() if messages else await asyncio.Event().wait()  # type: ignore[func-returns-value]

        async def send(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.body":
                await asyncio.Event().wait()

        await asyncio.wait_for(app(POSTED, receive, send), 5)  # pyright: ignore[reportArgumentType]

    from halflap.inference.server import exchange

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exchange, "PATIENCE", 0.1)
        asyncio.run(stall())
    assert "halflap_requests_active 0.0" in service.metrics.text().decode()


def test_metrics_and_page(client: Any) -> None:
    client.post(PATH, json=BODY)
    client.post(PATH, json={})
    text = client.get("/metrics").text
    assert 'halflap_requests_total{path="/v1/completions",status="200"} 1.0' in text
    assert 'halflap_requests_total{path="/v1/completions",status="400"} 1.0' in text
    assert 'halflap_tokens_total{kind="completion"} 2.0' in text
    assert 'halflap_engine_cache_bytes{kind="slots"}' in text and "halflap_engine_prefix_cache" in text
    page = client.get("/")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert "http://" not in page.text and "https://" not in page.text


def test_openapi_describes_what_is_answered(client: Any) -> None:
    import jsonschema

    described = client.get("/openapi.json").json()
    assert set(described["paths"]) >= {"/v1/chat/completions", PATH, "/v1/score", "/v1/models", "/health", "/metrics"}
    schemas = described["components"]["schemas"]
    answers = {
        "Completion": client.post(PATH, json={**BODY, "logprobs": 1}),
        "ChatCompletion": client.post(
            "/v1/chat/completions", json={"messages": [{"role": "user", "content": "a"}], "max_tokens": 2}
        ),
        "Score": client.post("/v1/score", json={"context": "a", "continuations": ["b"]}),
        "Models": client.get("/v1/models"),
        "Health": client.get("/health"),
        "Error": client.post(PATH, json={}),
    }
    for name, answer in answers.items():
        jsonschema.validate(answer.json(), {**schemas[name], "components": described["components"]})
