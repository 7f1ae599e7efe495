"""Listening on a port until told to stop, and then letting what runs finish."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable
from types import FrameType

import uvicorn

from halflap.errors import HalflapError
from halflap.inference.server.app import application
from halflap.inference.server.service import Service


class _Server(uvicorn.Server):
    """Refuses what is new from the first signal on; the second ends what runs, too."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._service.stopping = True
        super().handle_exit(sig, frame)


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


def run(service: Service, listener: socket.socket, *, ready: Callable[[], None] = lambda: None) -> None:
    """Serve until SIGTERM or Ctrl-C; then refuse what is new and let the rest finish within the grace."""
    config = uvicorn.Config(
        application(service),
        log_level="warning",
        access_log=False,
        backlog=2048,
        server_header=False,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=max(1, round(service.settings.grace)),
        lifespan="off",
        h11_max_incomplete_event_size=64 << 10,
    )
    ready()
    with contextlib.suppress(KeyboardInterrupt):  # uvicorn raises the signal again when it has stopped
        _Server(config, service).run(sockets=[listener])
