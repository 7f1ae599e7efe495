"""A front from start to stop: replicas first, then the door opens; the door shuts first, then replicas end."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import threading
from collections.abc import Callable, Iterator

from halflap.inference.front.relay import Front, application
from halflap.inference.front.replica import Say, kept
from halflap.inference.server.run import BACKLOG, Server

SIGNALS = (signal.SIGINT, signal.SIGTERM)


def run(front: Front, listener: socket.socket, *, ready: Callable[[], None], say: Say) -> None:
    """Serve until SIGTERM or Ctrl-C; then refuse what is new and let the rest finish within the grace.

    Raises HalflapError when a replica cannot be started, and KeyboardInterrupt when told to stop before all were ready.
    """
    if not asyncio.run(_run(front, listener, ready, say)):
        raise KeyboardInterrupt


async def _run(front: Front, listener: socket.socket, ready: Callable[[], None], say: Say) -> bool:
    told = asyncio.Event()
    loop = asyncio.get_running_loop()
    server = Server(application(front), front, descriptors=2)  # one to the replica

    def stop() -> None:
        server.should_exit = True
        loop.call_soon_threadsafe(told.set)

    with _signals_to(stop):
        async with contextlib.AsyncExitStack() as stack:
            replicas = kept(list(front.replicas.values()), lost=front.lost, say=say)
            starting = asyncio.create_task(stack.enter_async_context(replicas))
            waiting = asyncio.create_task(told.wait())
            await asyncio.wait({starting, waiting}, return_when=asyncio.FIRST_COMPLETED)
            waiting.cancel()
            if not starting.done():
                starting.cancel()
                await asyncio.gather(starting, return_exceptions=True)
                return False
            starting.result()
            listener.listen(BACKLOG)
            ready()
            # uvicorn handles the signals while it serves, and raises those it met again for us at the end.
            await server.serve(sockets=[listener])
    return True


@contextlib.contextmanager
def _signals_to(stop: Callable[[], None]) -> Iterator[None]:
    """Signals that end a server call `stop` inside; only the main thread hears any."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, lambda *_: stop()) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
