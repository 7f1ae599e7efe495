"""Engines made of a few lines behind Unix sockets, and a front before them, in one event loop."""

from __future__ import annotations

import asyncio
import contextlib
import json
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("starlette", reason="starlette is not installed: pip install -e '.[serve]'")

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


@pytest.fixture
def folder() -> Iterator[Path]:
    """A short path, as sockets need."""
    with tempfile.TemporaryDirectory(prefix="halflap-") as path:
        yield Path(path)


class Engine:
    """Writes `words` of a stream, each when it is let (`allowed`); 200 and its name, what it was asked, otherwise."""

    def __init__(self, name: str) -> None:
        self.name, self.words = name, ["a", "b", "c"]
        self.allowed = asyncio.Semaphore(1000)
        self.asked: list[dict[str, Any]] = []
        self.hung_up = asyncio.Event()
        self.status, self.error = 200, b""
        self.breaks_off = False  # in the middle of an event, after the words

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def respond(status: int, body: bytes, kind: bytes = b"application/json") -> None:
            await send({"type": "http.response.start", "status": status, "headers": [(b"content-type", kind)]})
            await send({"type": "http.response.body", "body": body})

        if scope["path"] == "/health":
            return await respond(200, b"{}")
        if scope["path"] == "/metrics":
            text = f'# HELP n_total x\n# TYPE n_total counter\nn_total{{engine="{self.name}"}} {len(self.asked)}\n'
            return await respond(200, text.encode(), b"text/plain")
        body, more = b"", True
        while more:
            message = await receive()
            body, more = body + message["body"], message["more_body"]
        asked = json.loads(body)
        self.asked.append({"path": scope["path"], "headers": dict(scope["headers"]), **asked})
        if self.status != 200:
            return await respond(self.status, self.error)
        task = asyncio.ensure_future(self._stream(send) if asked.get("stream") else self._reply(respond))
        gone = asyncio.ensure_future(receive())
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            self.hung_up.set()
        for each in (task, gone):
            each.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task

    async def _reply(self, respond: Any) -> None:
        await self.allowed.acquire()
        await respond(200, json.dumps({"engine": self.name}).encode())

    async def _stream(self, send: Any) -> None:
        headers = [(b"content-type", b"text/event-stream; charset=utf-8")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        for word in self.words:
            await self.allowed.acquire()
            await self._send(send, f'data: {{"text": "{word}", "engine": "{self.name}"}}\n\n')
        if self.breaks_off:
            await self._send(send, 'data: {"text": "hal')
            raise ConnectionError("the engine fails on purpose")
        await self._send(send, "data: [DONE]\n\n")
        await send({"type": "http.response.body", "body": b""})

    async def _send(self, send: Any, text: str) -> None:
        await send({"type": "http.response.body", "body": text.encode(), "more_body": True})


@contextlib.asynccontextmanager
async def listening(app: Any, path: Path) -> AsyncIterator[None]:
    """An ASGI application at a Unix socket."""
    import uvicorn

    config = uvicorn.Config(app, uds=str(path), log_level="critical", lifespan="off", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    server.capture_signals = contextlib.nullcontext  # pyright: ignore[reportAttributeAccessIssue]
    task = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    try:
        yield
    finally:
        server.should_exit = True
        await task
        path.unlink(missing_ok=True)


class Stage:
    """Engines, the replicas that stand for them, the front, and a client of it."""

    def __init__(self, folder: Path, engines: list[Engine], **limits: Any) -> None:
        import httpx2

        from halflap.inference.front.relay import Front
        from halflap.inference.front.replica import Launch, Replica
        from halflap.inference.server.config import ServerSettings

        self.engines, self.folder = engines, folder
        sockets = [folder / f"{engine.name}.sock" for engine in engines]
        self.replicas = [Replica(i, Launch(f"replica {i}", (), socket)) for i, socket in enumerate(sockets)]
        for replica in self.replicas:
            replica.ready = True
        amend = limits.pop("amend", None)
        self.front = Front(
            self.replicas, ServerSettings(**{"name": "m", "max_context": 64, **limits}), (CHAT, COMPLETIONS), amend
        )
        transport = httpx2.AsyncHTTPTransport(uds=str(folder / "front.sock"))
        self.client = httpx2.AsyncClient(transport=transport, base_url="http://front", timeout=20)

    @contextlib.asynccontextmanager
    async def open(self) -> AsyncIterator[Stage]:
        from halflap.inference.front.relay import application

        async with contextlib.AsyncExitStack() as stack:
            for engine, replica in zip(self.engines, self.replicas):
                await stack.enter_async_context(listening(engine, replica.launch.socket))
                stack.push_async_callback(replica.client.aclose)
            await stack.enter_async_context(listening(application(self.front), self.folder / "front.sock"))
            await stack.enter_async_context(self.client)
            yield self

    async def post(self, path: str = COMPLETIONS, **body: Any) -> Any:
        return await self.client.post(path, json={"prompt": "x", **body})

    async def events(self, **body: Any) -> list[Any]:
        """The objects of a stream, which must end as streams end."""
        text = (await self.post(stream=True, **body)).text
        lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
        assert lines[-1] == "[DONE]", text
        return [json.loads(line) for line in lines[:-1]]


@pytest.fixture
def play(folder: Path) -> Callable[..., None]:
    """play(scene, engines=2, **limits) runs scene(stage)."""

    def play(scene: Any, engines: int = 2, **limits: Any) -> None:
        async def run() -> None:
            stage = Stage(folder, [Engine(f"e{i}") for i in range(engines)], **limits)
            async with asyncio.timeout(20), stage.open():
                await scene(stage)

        asyncio.run(run())

    return play
