"""A request to a replica and its reply back, as it comes.

A stream is passed on event by event, so that a replica that dies in the middle of one leaves whole events and an error.
What a client hears of errors has the same form whatever engine stands behind.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import httpx2
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from halflap.inference.front.affinity import Affinity, Load, Place, choose, places
from halflap.inference.front.metrics import FrontMetrics
from halflap.inference.front.replica import Replica
from halflap.inference.server.config import ServerSettings
from halflap.inference.server.errors import TYPES, ApiError
from halflap.inference.server.exchange import EventStream, until_hang_up
from halflap.inference.server.gate import Gate
from halflap.inference.server.openapi import document
from halflap.inference.server.site import site

Body = dict[str, Any]
DONE = b"[DONE]"


@dataclass(frozen=True)
class Asked:
    """A request as replicas get it: its JSON, the model's name in it, texts it asks for, and where it is hashed."""

    content: bytes
    model: Any
    texts: int
    places: Sequence[Place]


def read(raw: bytes, amend: Callable[[Body], Body] | None = None) -> Asked:
    """The parts of a body that the front goes by. Raises ApiError when it is no JSON object."""
    try:
        body = json.loads(raw)
    except (ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise ApiError(400, f"the body is not JSON ({reason}); send one JSON object", code="invalid_json") from None
    if not isinstance(body, dict):
        raise ApiError(400, f"the body is {raw[:40]!r}; allowed: a JSON object; change it", code="invalid_value")
    prompt, n = body.get("prompt", body.get("continuations")), body.get("n")
    prompts = len(prompt) if isinstance(prompt, list) and prompt and isinstance(prompt[0], str | list) else 1
    texts = prompts * (n if type(n) is int and 0 < n < 1000 else 1)
    content = raw if amend is None else json.dumps(amend(body)).encode()
    return Asked(content, body.get("model"), texts, places(body))


class Front(Gate):
    """Replicas, and the limits that all of them together are offered under."""

    def __init__(
        self,
        replicas: Sequence[Replica],
        settings: ServerSettings,
        posts: Collection[str],
        amend: Callable[[str, Body], Body] | None = None,
    ) -> None:
        """posts: the paths that replicas answer; amend(path, body): the body that a replica gets instead."""
        self.replicas = {replica.number: replica for replica in replicas}
        self.posts, self._amend = posts, amend
        self.affinity = Affinity()
        self.metrics = FrontMetrics(replicas)
        super().__init__(settings, self.metrics.requests, self.metrics.active)

    def lost(self, replica: Replica) -> None:
        """A replica has ended, and what it remembered with it."""
        self.affinity.forget(replica.number)

    def health(self) -> dict[str, Any]:
        """`ok` while one replica is ready."""
        ready = any(replica.ready for replica in self.replicas.values())
        status = "stopping" if self.stopping else "ok" if ready else "unavailable"
        return {
            "status": status,
            "replicas": {r.launch.name: "ready" if r.ready else "starting" for r in self.replicas.values()},
        }

    async def relay(self, request: Request) -> Response:
        """The reply of one of the replicas. Raises ApiError and HungUp."""
        path, raw = request.scope["path"], await self.raw_body(request)
        amend = self._amend
        asked = await run_in_threadpool(read, raw, None if amend is None else lambda body: amend(path, body))
        self.check_model(asked.model if asked.model is None else str(asked.model))
        began = time.monotonic()
        self.enter(asked.texts)
        stack = contextlib.AsyncExitStack()
        stack.callback(self.leave, asked.texts)
        stack.callback(lambda: self.metrics.whole.observe(time.monotonic() - began))
        try:
            async with self.within():
                reply = await until_hang_up(request.receive, stack.enter_async_context(self._asked(path, asked)))
                if not reply.headers.get("content-type", "").startswith("text/event-stream"):
                    content = await until_hang_up(request.receive, _whole(reply))
                    await stack.aclose()
                    return _passed_on(reply, content)
        except BaseException:
            await stack.aclose()
            raise
        limit = self.within(max(0.001, self.settings.seconds - (time.monotonic() - began)))
        return _Stream(stack, self._timed(events(reply), began), limit, lambda status: self.count(path, status))

    @contextlib.asynccontextmanager
    async def _asked(self, path: str, asked: Asked) -> AsyncIterator[httpx2.Response]:
        """The reply of a replica, its body still to come; leaving the context hangs up. Raises ApiError."""
        headers = {"content-type": "application/json"}
        while True:
            replica = self._choose(asked)
            replica.running += asked.texts
            replica.served += 1
            try:
                request = replica.client.build_request("POST", path, content=asked.content, headers=headers)
                reply = await replica.client.send(request, stream=True)
                try:
                    if reply.status_code != 503:
                        yield reply
                        return
                    replica.ready = False  # it is stopping
                finally:
                    await reply.aclose()
            except (httpx2.ConnectError, httpx2.ConnectTimeout):  # it has not heard of the request: another may have it
                replica.ready = False
            except httpx2.HTTPError:
                raise _lost() from None
            finally:
                replica.running -= asked.texts

    def _choose(self, asked: Asked) -> Replica:
        loads = {n: Load(replica.running, replica.served) for n, replica in self.replicas.items() if replica.ready}
        if not loads:
            message = "no replica is ready to answer; come again in a moment"
            raise ApiError(503, message, code="no_replica", headers={"Retry-After": "2"})
        worth = self.affinity.worth(asked.places)
        number = choose(worth, loads)
        self.metrics.beginnings.labels("known" if number in worth else "new").inc()
        self.affinity.remember(asked.places, number)
        return self.replicas[number]

    async def _timed(self, texts: AsyncGenerator[str, None], began: float) -> AsyncGenerator[str, None]:
        async with contextlib.aclosing(texts):
            first = True
            async for text in texts:
                if first:
                    self.metrics.first.observe(time.monotonic() - began)
                    first = False
                yield text


def application(front: Front) -> Starlette:
    """The ASGI application of a front."""
    return site(
        front,
        dict.fromkeys(front.posts, front.relay),
        health=front.health,
        metrics=front.metrics.text,
        described=document(front.settings, front.posts),
    )


class _Stream(EventStream):
    """Events of a replica, which is let go when they end."""

    def __init__(
        self,
        stack: contextlib.AsyncExitStack,
        texts: AsyncGenerator[str, None],
        limit: contextlib.AbstractAsyncContextManager[None],
        ended: Callable[[int], None],
    ) -> None:
        super().__init__(texts, limit, ended)
        self._stack = stack

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._stack:
            await super().__call__(scope, receive, send)


async def events(reply: httpx2.Response) -> AsyncGenerator[str, None]:
    """The JSON of each event, up to `[DONE]`. Raises ApiError when the stream breaks off before that."""
    rest, done = b"", False
    try:
        async for part in reply.aiter_raw():
            *whole, rest = (rest + part).replace(b"\r\n", b"\n").split(b"\n\n")
            for event in whole:
                lines = event.split(b"\n")
                data = b" ".join(line[5:].strip() for line in lines if line.startswith(b"data:"))
                done = done or data == DONE
                if data and not done:
                    yield data.decode(errors="replace")
    except httpx2.HTTPError:
        if not done:
            raise _lost() from None
    if not done:
        raise _lost()


async def _whole(reply: httpx2.Response) -> bytes:
    try:
        return await reply.aread()
    except httpx2.HTTPError:
        raise _lost() from None


def _lost() -> ApiError:
    message = "the replica that was writing this reply has ended; send the request again"
    return ApiError(503, message, code="replica_lost", headers={"Retry-After": "1"})


def _passed_on(reply: httpx2.Response, content: bytes) -> Response:
    """A whole reply; an error in OpenAI's form, however the engine put it."""
    if reply.status_code < 400:
        return Response(content, reply.status_code, media_type=reply.headers.get("content-type"))
    headers = {name: reply.headers[name] for name in ("retry-after",) if name in reply.headers}
    return JSONResponse({"error": error_object(reply.status_code, content)}, reply.status_code, headers)


def error_object(status: int, content: bytes) -> dict[str, Any]:
    """OpenAI's error object of what an engine said with this status."""
    try:
        said = json.loads(content)
    except (ValueError, RecursionError):
        said = content.decode(errors="replace")[:1000]
    about = said.get("error", said) if isinstance(said, Mapping) else said
    fields = about if isinstance(about, Mapping) else {}
    message = fields.get("message") or fields.get("detail") or (about if isinstance(about, str) else json.dumps(about))
    kind = TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
    param, code = (value if isinstance(value := fields.get(name), str) else None for name in ("param", "code"))
    message = message if isinstance(message, str) else json.dumps(message)
    return {"message": message, "type": kind, "param": param, "code": code}
