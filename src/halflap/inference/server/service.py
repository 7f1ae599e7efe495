"""What every endpoint works with, and the one way a request is answered."""

from __future__ import annotations

import dataclasses
import time
import uuid
from collections.abc import AsyncIterator, Callable
from typing import Any, Protocol, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from halflap.errors import HalflapError
from halflap.inference import requests as engine_requests
from halflap.inference.server.asked import Asked
from halflap.inference.server.config import ServerSettings
from halflap.inference.server.errors import ApiError, invalid
from halflap.inference.server.exchange import EventStream, encoded, pieces, until_hang_up
from halflap.inference.server.gate import STOPPED, Gate
from halflap.inference.server.metrics import Metrics
from halflap.inference.server.objects import Replies, usage_object
from halflap.inference.server.prompts import Prompts
from halflap.inference.stream import Stream

B = TypeVar("B", bound=BaseModel)


class Answers(Protocol):
    """What a server needs of an engine; inference/engine.py is one."""

    def submit(self, request: engine_requests.Request) -> Stream: ...

    def stats(self) -> dict[str, Any]: ...


class Service(Gate):
    """An engine and the limits it is offered under."""

    def __init__(self, engine: Answers, prompts: Prompts, settings: ServerSettings) -> None:
        self.engine, self.prompts = engine, prompts
        self.metrics = Metrics(engine.stats)
        super().__init__(settings, self.metrics.requests, self.metrics.active)

    async def body(self, request: Request, kind: type[B]) -> B:
        """The checked body. Raises ApiError."""
        body = await run_in_threadpool(_checked, kind, await self.raw_body(request))
        self.check_model(getattr(body, "model", None))
        return body

    async def prepared(self, prepare: Callable[..., Any], body: BaseModel) -> Any:
        """`prepare(body, prompts, settings)` in a worker thread, what it refuses as status 400."""
        try:
            return await run_in_threadpool(prepare, body, self.prompts, self.settings)
        except HalflapError as error:
            raise ApiError(400, str(error), code="invalid_value") from None

    # ---- the answer

    async def answer(self, request: Request, asked: Asked, replies: Replies) -> Response:
        """Run what was asked; a whole object, or a stream of events."""
        began, choices = time.monotonic(), sum(each.n for each in asked.requests)
        self.enter(choices)
        try:
            streams = await run_in_threadpool(self._submit, asked)  # a grammar takes time to compile
        except BaseException:
            self.leave(choices)
            raise

        def ended(status: int) -> None:
            for stream in streams:
                stream.cancel()
            self.leave(choices)
            self.metrics.whole.observe(time.monotonic() - began)
            if asked.stream:
                self.count(request.scope["path"], status)

        events = self._events(asked, streams, replies, began)
        if asked.stream:
            return EventStream(encoded(events), self.within(), ended)
        try:
            async with self.within():
                await until_hang_up(request.receive, _drained(events))
        finally:
            ended(200)
        return JSONResponse(replies.whole(_usage(streams)))

    def _submit(self, asked: Asked) -> list[Stream]:
        streams: list[Stream] = []
        group = uuid.uuid4().hex  # whoever asks for much at once takes turns with the others
        try:
            for request in asked.requests:
                streams.append(self.engine.submit(dataclasses.replace(request, group=group)))
                streams[-1].at_end(self.metrics.count)
        except HalflapError as error:
            for stream in streams:
                stream.cancel()
            raise ApiError(400, str(error), code="invalid_value") from None
        return streams

    async def _events(
        self, asked: Asked, streams: list[Stream], replies: Replies, began: float
    ) -> AsyncIterator[dict[str, Any]]:
        """Chunks as they come, with the usage last if wanted. Raises ApiError when the engine failed."""
        last = None
        async for choice, piece in pieces(streams, asked.n):
            now = time.monotonic()
            (self.metrics.first if last is None else self.metrics.between).observe(now - (last or began))
            last = now
            if piece.finish_reason == "error":
                reasons = [stream.error for stream in streams if stream.error]
                raise ApiError(500, reasons[0] if reasons else "the engine failed; send the request again")
            if piece.finish_reason == "cancelled":
                raise ApiError(503, STOPPED)
            for chunk in replies.add(choice, piece):
                yield chunk
        if asked.include_usage:
            yield replies.chunk([], _usage(streams))


def _checked(kind: type[B], raw: bytes) -> B:
    try:
        return kind.model_validate_json(raw)
    except ValidationError as error:
        raise invalid(error) from None


async def _drained(events: AsyncIterator[dict[str, Any]]) -> None:
    async for _ in events:
        pass


def _usage(streams: list[Stream]) -> dict[str, Any]:
    return usage_object([stream.usage for stream in streams if stream.usage is not None])
