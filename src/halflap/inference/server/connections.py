"""How many clients may be connected, and how long one may wait before it asks.

Each connection takes a file descriptor, and a process that has none left can be asked nothing any more. So there are
fewer connections than descriptors; those without a request end after a while, and when all places are taken the one
that has waited longest goes, so that whoever asks gets in.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
from collections.abc import Callable
from typing import Any

from uvicorn.protocols.http.auto import AutoHTTPProtocol

from halflap.inference.server.errors import ApiError
from halflap.inference.server.exchange import DROP

LOG = logging.getLogger(__name__)
SILENCE = 30.0  # seconds that a connection may be open without a whole request, whatever trickles in
AT_ONCE = 16  # connections accepted in one turn of the event loop; four turns later those too many are closed
SPARE = 64 + 4 * AT_ONCE  # descriptors for these, and for files, pipes and what else is opened while a server runs
MOST_FILES = 1 << 16  # some systems allow a billion, and children of ours may close each one that there might be
EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
QUIET = 60.0  # seconds between lines about the same want
Protocol: Any = AutoHTTPProtocol  # by h11, or by httptools where that is installed


def affordable(descriptors: int) -> int:
    """Connections of so many descriptors each that there is room for, once the limit is as high as it may be."""
    return max(1, (_files() - _open_files() - SPARE) // descriptors)


def _files() -> int:
    """Descriptors that this process may have, after raising its own limit towards the system's."""
    try:
        import resource  # absent on Windows
    except ImportError:
        return MOST_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, MOST_FILES)
    if soft != resource.RLIM_INFINITY and soft < most:
        with contextlib.suppress(OSError, ValueError):  # macOS names a limit and then allows less
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
            soft = most
    return MOST_FILES if soft == resource.RLIM_INFINITY else min(soft, MOST_FILES)


def _open_files() -> int:
    try:
        return len(os.listdir("/dev/fd"))
    except OSError:
        return 0


class Connections:
    """Those of one server: at most `most`, those that wait for a request longest first.

    patience: seconds that a connection may stay with more written to it than is read.
    """

    def __init__(self, most: int, patience: float) -> None:
        self.most, self.patience = most, patience
        self._open: set[Connection] = set()
        self._waiting: dict[Connection, asyncio.TimerHandle] = {}

    def came(self, connection: Connection) -> None:
        self._open.add(connection)
        if len(self._open) > self.most:
            if not self._waiting:
                self._open.discard(connection)
                return connection.refuse()
            longest = next(iter(self._waiting))
            self.went(longest)
            longest.transport.abort()
        self.changed(connection)

    def changed(self, connection: Connection) -> None:
        """A connection has begun or ended a request, or neither: time runs on while it waits."""
        if connection not in self._open:
            return
        if not connection.waits:
            self._answered(connection)
        elif connection not in self._waiting:
            loop = asyncio.get_running_loop()
            self._waiting[connection] = loop.call_later(SILENCE, connection.transport.abort)  # it may not even read

    def went(self, connection: Connection) -> None:
        self._open.discard(connection)
        self._answered(connection)

    def _answered(self, connection: Connection) -> None:
        if timer := self._waiting.pop(connection, None):
            timer.cancel()


class Connection(Protocol):
    """uvicorn's, counted; its own timer runs between a reply and the first byte after it alone."""

    def __init__(self, *args: Any, connections: Connections, **named: Any) -> None:
        super().__init__(*args, **named)
        self._places = connections
        self._unread: asyncio.TimerHandle | None = None
        self.app_state = {**self.app_state, DROP: lambda: self.transport.abort()}  # of each request's scope

    @property
    def waits(self) -> bool:
        """Whether no request is being read or answered."""
        return self.cycle is None or self.cycle.response_complete

    def refuse(self) -> None:
        """A reply for whoever reads it before asking."""
        error = ApiError(503, "too many clients are connected; come again in a moment", headers={"Retry-After": "1"})
        reply = error.response()
        lines = [b"HTTP/1.1 503 Service Unavailable", b"connection: close"]
        lines += [name + b": " + value for name, value in reply.raw_headers]
        self.transport.write(b"\r\n".join([*lines, b"", bytes(reply.body)]))
        self.transport.close()

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._places.came(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._places.went(self)
        self._read()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._places.changed(self)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._unread = asyncio.get_running_loop().call_later(self._places.patience, self.transport.abort)

    def resume_writing(self) -> None:
        self._read()
        super().resume_writing()

    def _read(self) -> None:
        if self._unread is not None:
            self._unread.cancel()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._places.changed(self)


def complaints() -> Callable[[asyncio.AbstractEventLoop, dict[str, Any]], None]:
    """An event loop's handler of errors that says once in a while that descriptors have run out, not at every try."""
    said = -QUIET

    def handle(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        nonlocal said
        error = context.get("exception")
        if not isinstance(error, OSError) or error.errno not in EXHAUSTED:
            loop.default_exception_handler(context)
        elif loop.time() >= said + QUIET:
            said = loop.time()
            LOG.error("connections have to wait (%s); raise the limit that `ulimit -n` shows", error)

    return handle
