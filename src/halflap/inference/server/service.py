"""What every endpoint works with, and the one way a request is answered.

Checks come in the order of their cost: stopping, key, type and size of the body, its content, the queue, the engine.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Protocol, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from halflap.errors import HalflapError
from halflap.inference import requests as engine_requests
from halflap.inference.server.asked import Asked
from halflap.inference.server.config import ServerSettings
from halflap.inference.server.errors import ApiError, HungUp, invalid
from halflap.inference.server.exchange import EventStream, pieces, read_body, until_hang_up, within
from halflap.inference.server.metrics import Metrics
from halflap.inference.server.objects import Replies, usage_object
from halflap.inference.server.prompts import Prompts
from halflap.inference.stream import Stream

LOG = logging.getLogger(__name__)
B = TypeVar("B", bound=BaseModel)
Endpoint = Callable[[Request], Awaitable[Response]]


class Answers(Protocol):
    """What a server needs of an engine; inference/engine.py is one."""

    def submit(self, request: engine_requests.Request) -> Stream: ...

    def stats(self) -> dict[str, Any]: ...


class Service:
    """An engine and the limits it is offered under. `stopping` refuses what is new."""

    def __init__(self, engine: Answers, prompts: Prompts, settings: ServerSettings) -> None:
        self.engine, self.prompts, self.settings = engine, prompts, settings
        self.metrics = Metrics(engine.stats)
        self.started = int(time.time())
        self.stopping = False
        self._active = 0
        self._keys = [key.encode() for key in settings.keys]

    # ---- before

    def guarded(self, path: str, endpoint: Endpoint) -> Endpoint:
        """The endpoint behind the key, its errors as error objects, counted."""

        async def answer(request: Request) -> Response:
            try:
                self._admit(request)
                response = await endpoint(request)
            except ApiError as error:
                response = error.response()
            except HungUp:
                response = Response(status_code=499)
            except Exception:
                LOG.exception("a request to %s failed", path)
                response = ApiError(500, "the server failed on this request; its log says where").response()
            if not isinstance(response, EventStream):  # that one is counted when it ends
                self.metrics.requests.labels(path, str(response.status_code)).inc()
            return response

        return answer

    def _admit(self, request: Request) -> None:
        if self.stopping:
            raise ApiError(503, "the server is stopping; ask another, or later", headers={"Retry-After": "5"})
        if not self._keys:
            return
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        matches = [
            hmac.compare_digest(given.strip().encode("latin-1"), key) for key in self._keys
        ]  # all, whatever the first says
        if scheme.lower() != "bearer" or not any(matches):
            raise ApiError(
                401,
                "the API key is missing or wrong; send Authorization: Bearer KEY",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    async def body(self, request: Request, kind: type[B]) -> B:
        """The checked body. Raises ApiError."""
        try:
            async with asyncio.timeout(self.settings.seconds):
                raw = await read_body(request, self.settings.body_bytes)
        except TimeoutError:
            raise ApiError(408, "the body did not arrive in time; send it again", code="timeout") from None
        try:
            body = await run_in_threadpool(kind.model_validate_json, raw)
        except ValidationError as error:
            raise invalid(error) from None
        self.check_model(getattr(body, "model", None))
        return body

    def check_model(self, name: str | None) -> None:
        if name not in (None, self.settings.name):
            message = f"model is {name[:100]!r}; this server has {self.settings.name!r}: ask for that"
            raise ApiError(404, message, param="model", code="model_not_found")

    async def prepared(self, prepare: Callable[..., Any], body: BaseModel) -> Any:
        """`prepare(body, prompts, settings)` in a worker thread, what it refuses as status 400."""
        try:
            return await run_in_threadpool(prepare, body, self.prompts, self.settings)
        except HalflapError as error:
            raise ApiError(400, str(error), code="invalid_value") from None

    # ---- the answer

    async def answer(self, request: Request, asked: Asked, replies: Replies) -> Response:
        """Run what was asked; a whole object, or a stream of events."""
        began = time.monotonic()
        self._enter()
        try:
            streams = await run_in_threadpool(self._submit, asked)  # a grammar takes time to compile
        except BaseException:
            self._leave()
            raise

        def ended(status: int) -> None:
            for stream in streams:
                stream.cancel()
                if stream.usage is not None:
                    self.metrics.count(stream.usage)
            self._leave()
            self.metrics.whole.observe(time.monotonic() - began)
            if asked.stream:
                self.metrics.requests.labels(request.url.path, str(status)).inc()

        events = self._events(asked, streams, replies, began)
        if asked.stream:
            return EventStream(events, self.settings.seconds, ended)
        try:
            async with within(self.settings.seconds):
                await until_hang_up(request.receive, _drained(events))
        finally:
            ended(200)
        return JSONResponse(replies.whole(_usage(streams)))

    def _enter(self) -> None:
        """Take one of the places of requests that may be active at once. Raises ApiError when there is none."""
        if self._active >= self.settings.requests:
            message = f"{self._active} requests run or wait, as many as may; come again in a moment"
            raise ApiError(429, message, code="queue_full", headers={"Retry-After": "1"})
        self._active += 1
        self.metrics.active.inc()

    def _leave(self) -> None:
        self._active -= 1
        self.metrics.active.dec()

    def _submit(self, asked: Asked) -> list[Stream]:
        streams: list[Stream] = []
        try:
            for request in asked.requests:
                streams.append(self.engine.submit(request))
        except HalflapError as error:
            for stream in streams:
                stream.cancel()
            raise ApiError(400, str(error), code="invalid_value") from None
        return streams

    async def _events(
        self, asked: Asked, streams: list[Stream], replies: Replies, began: float
    ) -> AsyncIterator[dict[str, Any]]:
        """Chunks as they come, with the usage last if wanted. Raises ApiError when the engine failed."""
        for chunk in replies.begin():
            yield chunk
        last = None
        async for choice, piece in pieces(streams, asked.n):
            now = time.monotonic()
            (self.metrics.first if last is None else self.metrics.between).observe(now - (last or began))
            last = now
            if piece.finish_reason == "error":
                reasons = [stream.error for stream in streams if stream.error]
                raise ApiError(500, reasons[0] if reasons else "the engine failed; send the request again")
            if piece.finish_reason == "cancelled":
                raise ApiError(503, "the server stopped before the reply was finished; ask another, or later")
            for chunk in replies.add(choice, piece):
                yield chunk
        if asked.include_usage:
            yield replies.chunk([], _usage(streams))


async def _drained(events: AsyncIterator[dict[str, Any]]) -> None:
    async for _ in events:
        pass


def _usage(streams: list[Stream]) -> dict[str, Any]:
    return usage_object([stream.usage for stream in streams if stream.usage is not None])
