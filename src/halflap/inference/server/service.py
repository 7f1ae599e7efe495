"""What every endpoint works with, and the one way a request is answered."""

from __future__ import annotations

import asyncio
import dataclasses
import time
import uuid
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from halflap.errors import HalflapError
from halflap.inference import requests as engine_requests
from halflap.inference.requests import Usage
from halflap.inference.server.asked import Asked
from halflap.inference.server.config import ServerSettings
from halflap.inference.server.errors import ApiError, HungUp, invalid
from halflap.inference.server.exchange import EventStream, encoded, pieces, until_hang_up
from halflap.inference.server.gate import STOPPED, Gate
from halflap.inference.server.metrics import Metrics
from halflap.inference.server.objects import Replies, usage_object
from halflap.inference.server.prompts import Prompts
from halflap.inference.stream import Stream

B = TypeVar("B", bound=BaseModel)
Prepare = Callable[[Callable[[], None]], tuple[Asked, Replies]]
THREADS = 4  # that encode texts at once; each may hold a hundred times the bytes of its text


class Answers(Protocol):
    """What a server needs of an engine; inference/engine.py is one."""

    def submit(self, request: engine_requests.Request) -> Stream: ...

    def stats(self) -> dict[str, Any]: ...


class Service(Gate):
    """An engine and the limits it is offered under."""

    def __init__(self, engine: Answers, prompts: Prompts, settings: ServerSettings) -> None:
        self.engine, self.prompts = engine, prompts
        self.metrics = Metrics(engine.stats)
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="prompts")
        super().__init__(settings, self.metrics.requests, self.metrics.active)

    async def body(self, request: Request, kind: type[B]) -> B:
        """The checked body. Raises ApiError."""
        body = await run_in_threadpool(_checked, kind, await self.raw_body(request))
        self.check_model(getattr(body, "model", None))
        return body

    # ---- the answer

    async def answer(self, request: Request, choices: int, prepare: Prepare) -> Response:
        """Run what `prepare` makes of a body that asks for so many choices; a whole object, or a stream of events.

        `prepare` runs in a worker thread, and what it refuses is status 400. What it is given raises HungUp once nobody
        waits any more.
        """
        began, starting = time.monotonic(), _Starting()
        self.enter(choices)

        def ended() -> None:
            starting.give_up()
            self.leave(choices)
            if starting.streams:
                self.metrics.whole.observe(time.monotonic() - began)

        def streamed(status: int) -> None:
            ended()
            self.count(request.scope["path"], status)

        try:
            async with self.within():
                work = asyncio.get_running_loop().run_in_executor(self._threads, self._start, prepare, starting)
                asked, replies = await until_hang_up(request.receive, work)
                events = self._events(asked, starting.streams, replies, began)
                if not asked.stream:
                    await until_hang_up(request.receive, _drained(events))
        except BaseException:
            ended()
            raise
        if asked.stream:
            left = max(0.001, self.settings.seconds - (time.monotonic() - began))
            return EventStream(encoded(events), self.within(left), streamed)
        ended()
        return JSONResponse(replies.whole(_usage(starting.streams)))

    def _start(self, prepare: Prepare, starting: _Starting) -> tuple[Asked, Replies]:
        group = uuid.uuid4().hex  # whoever asks for much at once takes turns with the others
        try:
            asked, replies = prepare(starting.require_reader)
            for request in asked.requests:  # a grammar takes time to compile
                starting.require_reader()
                starting.add(self.engine.submit(dataclasses.replace(request, group=group)), self.metrics.count)
        except HalflapError as error:
            raise ApiError(400, str(error), code="invalid_value") from None
        return asked, replies

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


class _Starting:
    """The streams of a request as a worker thread makes them, while its client may go or its time may end."""

    def __init__(self) -> None:
        self.streams: list[Stream] = []
        self.given_up = False

    def add(self, stream: Stream, hear: Callable[[Usage], None]) -> None:
        stream.at_end(hear)
        self.streams.append(stream)
        if self.given_up:  # perhaps too early to know of this one
            stream.cancel()

    def require_reader(self) -> None:
        if self.given_up:
            raise HungUp

    def give_up(self) -> None:
        self.given_up = True
        for stream in self.streams:
            stream.cancel()


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
