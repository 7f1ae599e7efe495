"""Listening until told to stop, and then letting what runs finish."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
import math
import socket
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import uvicorn
from starlette.applications import Starlette

from halflap.errors import HalflapError
from halflap.inference.server.app import application
from halflap.inference.server.connections import AT_ONCE, SILENCE, Connection, Connections, affordable, complaints
from halflap.inference.server.exchange import PATIENCE
from halflap.inference.server.gate import Gate
from halflap.inference.server.service import Service

BACKLOG = 2048
LAST_WORDS = 3  # seconds after the grace in which errors may go out


class Server(uvicorn.Server):
    """Refuses what is new from the first signal on; lets the rest finish within the grace, or until a second one.

    What the grace does not suffice for ends with an error that says so. descriptors: that a request takes, its
    connection's and those of what answers it.
    """

    def __init__(self, app: Starlette, gate: Gate, descriptors: int = 1) -> None:
        connections = Connections(affordable(descriptors), gate.settings.seconds + PATIENCE)
        config = uvicorn.Config(
            app,
            http=functools.partial(Connection, connections=connections),  # pyright: ignore[reportArgumentType]
            ws="none",
            log_level="error",  # its warnings are about what strangers send
            access_log=False,
            backlog=AT_ONCE,
            server_header=False,
            timeout_keep_alive=round(SILENCE),
            timeout_graceful_shutdown=max(1, math.ceil(gate.settings.grace)) + LAST_WORDS,
            lifespan="off",
            h11_max_incomplete_event_size=64 << 10,
        )
        super().__init__(config)
        self._gate, self._hurried = gate, False

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal begins the grace, a second ends it, a third drops every connection."""
        if self._gate.stopping and not self._hurried:
            self._hurried = True
            asyncio.get_running_loop().call_soon_threadsafe(self._gate.end)
            return
        self._gate.stopping = True
        super().handle_exit(sig, frame)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        asyncio.get_running_loop().set_exception_handler(complaints())
        for listener in sockets or ():  # the system's queue may be longer than what is accepted at once
            listener.listen(BACKLOG)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        over = asyncio.get_running_loop().call_later(self._gate.settings.grace, self._gate.end)
        try:
            await super().shutdown(sockets)
        finally:
            over.cancel()


def listen(host: str, port: int) -> socket.socket:
    """A socket bound to an address; port 0 takes a free one. Raises HalflapError when it cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except (OSError, OverflowError) as error:
        listener.close()
        raise HalflapError(
            f"--host {host} --port {port} cannot be listened on ({error}); choose another port, or 0 for any"
        ) from None
    return listener


def listen_unix(path: str) -> socket.socket:
    """A socket bound to a file, which its folder's permissions guard; one that nobody listens on any more is replaced.

    Raises HalflapError when it cannot be had.
    """
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        try:
            listener.bind(path)
        except OSError as error:
            if error.errno != errno.EADDRINUSE or not _is_left_over(path):
                raise
            Path(path).unlink()
            listener.bind(path)
    except OSError as error:
        listener.close()
        raise HalflapError(f"--uds {path} cannot be listened on ({error}); choose another path") from None
    return listener


def _is_left_over(path: str) -> bool:
    if not Path(path).is_socket():
        return False
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as trial:
        return trial.connect_ex(path) == errno.ECONNREFUSED


def address_of(listener: socket.socket) -> str:
    """Where a socket listens, as a URL (`unix:PATH` for a file)."""
    name = listener.getsockname()
    if listener.family == socket.AF_UNIX:
        return f"unix:{name}"
    host, port = name[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def run(service: Service, listener: socket.socket, *, ready: Callable[[], None] = lambda: None) -> None:
    """Serve until SIGTERM or Ctrl-C; then refuse what is new and let the rest finish within the grace."""
    server = Server(application(service), service)
    listener.listen(BACKLOG)  # who comes as soon as it is said may wait
    ready()
    with contextlib.suppress(KeyboardInterrupt):  # uvicorn raises the signal again when it has stopped
        server.run(sockets=[listener])
