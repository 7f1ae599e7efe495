"""Bodies in and events out: sizes, time limits, and clients that hang up.

A reply is written as fast as its reader takes it: what the engine makes meanwhile waits in the request's own stream,
at most one piece a token, and the server holds one event. Nobody else waits for a slow reader.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from halflap.inference.requests import Piece
from halflap.inference.server.errors import ApiError, HungUp
from halflap.inference.stream import Stream

T = TypeVar("T")
PATIENCE = 10.0  # seconds for the last events to be read
PAUSE = 30.0  # seconds that a body may stand still
DROP = "halflap.drop"  # in the state of a scope: ends the connection without waiting for what is still to be read


async def read_body(request: Request, most: int) -> bytes:
    """The whole body. Raises ApiError for one too large or not JSON by its type, HungUp for a client that goes, and
    TimeoutError when nothing comes for a while."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, f"Content-Type is {kind!r}; it must be application/json: set the header", code="media_type")
    too_large = ApiError(413, f"the body has more than {most:,} bytes; send less", code="body_too_large")
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length) > most:
        raise too_large
    parts, size, coming = [], 0, request.stream()
    try:
        while True:
            async with asyncio.timeout(PAUSE):
                part = await anext(coming, None)
            if part is None:
                break
            size += len(part)
            if size > most:
                raise too_large
            parts.append(part)
    except ClientDisconnect:
        raise HungUp from None
    return b"".join(parts)


async def until_hang_up(receive: Receive, work: Awaitable[T]) -> T:
    """The result of `work`, unless the client goes first: then it is cancelled and HungUp raised."""
    task = asyncio.ensure_future(work)
    watch = asyncio.ensure_future(_hang_up(receive))
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise HungUp
        return task.result()
    finally:
        for waiting in (task, watch):
            waiting.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)


async def _hang_up(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def pieces(streams: Sequence[Stream], n: int) -> AsyncIterator[tuple[int, Piece]]:
    """(choice, piece) of all streams as they come; choice c of stream r is r * n + c."""
    if len(streams) == 1:
        async for piece in streams[0]:
            yield piece.choice, piece
        return
    ready: asyncio.Queue[tuple[int, Piece] | None] = asyncio.Queue(maxsize=1)

    async def forward(index: int, stream: Stream) -> None:
        async for piece in stream:
            await ready.put((index * n + piece.choice, piece))
        await ready.put(None)

    tasks = [asyncio.create_task(forward(i, stream)) for i, stream in enumerate(streams)]
    try:
        left = len(tasks)
        while left:
            if (item := await ready.get()) is None:
                left -= 1
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()


async def encoded(events: AsyncIterator[dict[str, Any]]) -> AsyncGenerator[str, None]:
    """Each object as JSON."""
    async for event in events:
        yield json.dumps(event, ensure_ascii=False)


class EventStream(Response):
    """Server-sent events, each the JSON of an object, then `[DONE]`; `ended` hears the status, 499 for a hang-up.

    An ApiError on the way, or of `limit`, in which all is sent, is an event of its own, as the status has gone out. Who
    does not read that either loses the connection: closing it would wait for the reader.
    """

    def __init__(
        self,
        events: AsyncGenerator[str, None],
        limit: contextlib.AbstractAsyncContextManager[None],
        ended: Callable[[int], None],
    ) -> None:
        self.status_code, self.background = 200, None
        self._events, self._limit, self._ended = events, limit, ended
        self._status = 499  # until the last byte has gone out
        self.init_headers({"content-type": "text/event-stream", "cache-control": "no-store", "x-accel-buffering": "no"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # Some servers raise in `send` once the client has gone.
        try:
            with contextlib.suppress(HungUp, OSError, TimeoutError):
                await until_hang_up(receive, self._send(send))
        finally:
            self._ended(self._status)
            if self._status == 499 and (drop := scope.get("state", {}).get(DROP)):
                drop()
                await _hang_up(receive)  # or the server would call the reply incomplete

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        status = 200
        try:
            async with self._limit, contextlib.aclosing(self._events) as events:
                async for event in events:
                    await self._event(send, event)
        except ApiError as error:
            status = error.status
            async with asyncio.timeout(PATIENCE):
                await self._event(send, json.dumps(error.body(), ensure_ascii=False))
        async with asyncio.timeout(PATIENCE):
            await self._event(send, "[DONE]")
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        self._status = status

    async def _event(self, send: Send, text: str) -> None:
        body = f"data: {text}\n\n".encode(errors="replace")
        await send({"type": "http.response.body", "body": body, "more_body": True})
