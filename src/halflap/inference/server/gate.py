"""The way in and out of a server, whatever answers behind it: keys, bodies, the queue, counts.

Checks come in the order of their cost: stopping, key, type and size of the body, its fields, the queue, its texts, the
engine.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable

from prometheus_client import Counter, Gauge
from starlette.requests import Request
from starlette.responses import Response

from halflap.inference.server.config import ServerSettings
from halflap.inference.server.errors import ApiError, HungUp
from halflap.inference.server.exchange import EventStream, read_body

LOG = logging.getLogger(__name__)
STOPPED = "the server stopped before the reply was finished; ask another, or later"
Endpoint = Callable[[Request], Awaitable[Response]]


class Gate:
    """The limits that requests are taken under. `stopping` refuses what is new, `end()` ends what runs.

    requests counts them by path and status, active those being answered.
    """

    def __init__(self, settings: ServerSettings, requests: Counter, active: Gauge) -> None:
        self.settings = settings
        self.started = int(time.time())
        self.stopping = False
        self._requests, self._active_gauge = requests, active
        self._active = 0  # choices
        self._over = False
        self._limits: set[asyncio.Timeout] = set()
        self._keys = [key.strip().encode() for key in settings.keys]

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
                self.count(path, response.status_code)
            return response

        return answer

    def count(self, path: str, status: int) -> None:
        self._requests.labels(path, str(status)).inc()

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

    async def raw_body(self, request: Request) -> bytes:
        """The body as it came. Raises ApiError for one that is too large, too slow or not JSON by its type."""
        late = ApiError(408, "the body did not arrive in time; send it again", code="timeout")
        async with self.within(late=late):
            return await read_body(request, self.settings.body_bytes)

    @contextlib.asynccontextmanager
    async def within(self, seconds: float | None = None, *, late: ApiError | None = None) -> AsyncIterator[None]:
        """Raise `late` when what is inside takes longer (a request's time when not given); ApiError after `end()`."""
        try:
            async with asyncio.timeout(0 if self._over else seconds or self.settings.seconds) as limit:
                self._limits.add(limit)
                try:
                    yield
                finally:
                    self._limits.discard(limit)
        except TimeoutError:
            raise (ApiError(503, STOPPED) if self._over else late or self._late()) from None

    def end(self) -> None:
        """End every request with an error; from the event loop alone."""
        self._over = True
        for limit in self._limits:
            limit.reschedule(asyncio.get_running_loop().time())

    def _late(self) -> ApiError:
        message = f"the reply was not finished in {self.settings.seconds:g} seconds; ask for less, or later"
        return ApiError(504, message, code="timeout")

    def check_model(self, name: str | None) -> None:
        if name not in (None, self.settings.name):
            message = f"model is {name[:100]!r}; this server has {self.settings.name!r}: ask for that"
            raise ApiError(404, message, param="model", code="model_not_found")

    def enter(self, choices: int) -> None:
        """Take places of choices that may be active at once. Raises ApiError when there are not so many.

        A request that has more than there are at all is taken while it is the only one.
        """
        if self._active and self._active + choices > self.settings.choices:
            message = (
                f"{self._active} replies are written or wait, of {self.settings.choices} that may, and this request "
            )
            message += f"asks for {choices}; come again in a moment"
            raise ApiError(429, message, code="queue_full", headers={"Retry-After": "1"})
        self._active += choices
        self._active_gauge.inc()

    def leave(self, choices: int) -> None:
        self._active -= choices
        self._active_gauge.dec()
