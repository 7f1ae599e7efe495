"""Clients that connect and say nothing, or only half of it, take no place from those that ask."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import logging
import resource
import socket
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from halflap.inference.requests import Piece, Request
from halflap.inference.server import connections, exchange, run
from halflap.inference.server.run import Server, listen_unix
from halflap.inference.stream import Stream

POST = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 9\r\n\r\n{"
HEALTH = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"


class Door:
    """A server at a Unix socket, in this process."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.server: Any = None

    def deaf(self, words: bytes) -> socket.socket:
        """A client that asks and reads nothing."""
        client = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        client.connect(str(self.path))
        client.sendall(words)
        return client

    async def emptied(self) -> None:
        while self.server.server_state.connections:
            await asyncio.sleep(0.01)

    async def open(self, words: bytes = b"") -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await asyncio.open_unix_connection(str(self.path))
        writer.write(words)
        return reader, writer

    async def status(self, words: bytes) -> int:
        reader, writer = await self.open(words)
        try:
            return int((await reader.readline()).split()[1])
        finally:
            writer.close()


@pytest.fixture
def play(make_service: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """play(scene, most=..., **limits) runs scene(door) against a server with places for so many connections."""
    from halflap.inference.server.app import application

    with tempfile.TemporaryDirectory(prefix="halflap-") as folder:

        @contextlib.asynccontextmanager
        async def opened(**limits: Any) -> AsyncIterator[Door]:
            door = Door(Path(folder) / "s")
            service = make_service(**limits)
            door.server = server = Server(application(service), service)
            server.capture_signals = contextlib.nullcontext  # type: ignore[method-assign]
            listener = listen_unix(str(door.path))
            task = asyncio.create_task(server.serve(sockets=[listener]))
            while not server.started:
                await asyncio.sleep(0.01)
            try:
                yield door
            finally:
                server.should_exit = True
                await task

        def play(scene: Any, most: int = 100, **limits: Any) -> None:
            monkeypatch.setattr("halflap.inference.server.run.affordable", lambda _: most)

            async def played() -> None:
                async with asyncio.timeout(30), opened(**limits) as door:
                    await scene(door)

            asyncio.run(played())

        yield play


def test_the_one_that_has_waited_longest_makes_room(play: Any) -> None:
    async def scene(door: Door) -> None:
        idle = [await door.open() for _ in range(6)]
        await asyncio.sleep(0.05)
        for _ in range(2):
            assert await door.status(HEALTH) == 200
        ends = [reader.at_eof() or await ended(reader) for reader, _ in idle]
        assert ends[:2] == [True, True] and ends[-1] is False

    play(scene, most=4)


async def ended(reader: asyncio.StreamReader) -> bool:
    try:
        return await asyncio.wait_for(reader.read(1), 0.05) == b""
    except TimeoutError:
        return False


def test_those_that_are_answered_stay_and_one_too_many_is_told(play: Any) -> None:
    async def scene(door: Door) -> None:
        busy = [await door.open(POST) for _ in range(3)]
        await asyncio.sleep(0.1)
        reader, writer = await door.open()
        reply = await reader.read()
        assert reply.startswith(b"HTTP/1.1 503 ") and b"retry-after: 1\r\n" in reply
        assert json.loads(reply.partition(b"\r\n\r\n")[2])["error"]["type"] == "service_unavailable_error"
        assert not any([await ended(reader) for reader, _ in busy])
        for _, writer in busy:
            writer.close()
        await asyncio.sleep(0.1)
        assert await door.status(HEALTH) == 200

    play(scene, most=3)


@pytest.mark.parametrize("words", [b"", b"GET /health HT", HEALTH + b"GET /he"])
def test_silence_ends(play: Any, monkeypatch: pytest.MonkeyPatch, words: bytes) -> None:
    monkeypatch.setattr(connections, "SILENCE", 0.3)

    async def scene(door: Door) -> None:
        reader, writer = await door.open(words)

        async def trickle() -> None:  # a byte now and then is no request
            while True:
                await asyncio.sleep(0.05)
                writer.write(b"x" if words else b"")

        task = asyncio.create_task(trickle())
        with contextlib.suppress(ConnectionError):
            await asyncio.wait_for(reader.read(), 5)
        task.cancel()

    play(scene)


def test_a_body_that_stands_still_is_told(play: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchange, "PAUSE", 0.2)

    async def scene(door: Door) -> None:
        assert await door.status(POST) == 408

    play(scene)


class Flood:
    """An engine that says more at once than sockets hold."""

    def submit(self, request: Request) -> Stream:
        stream = Stream(request)
        for _ in range(100):
            stream.put(Piece(0, "a" * (1 << 16)))
        return stream

    def stats(self) -> dict[str, Any]:
        return {}


def asked(**body: Any) -> bytes:
    text = json.dumps({"prompt": "a", "stream": True} | body).encode()
    return POST.replace(b"Content-Length: 9\r\n\r\n{", b"Content-Length: %d\r\n\r\n" % len(text)) + text


def test_a_client_that_reads_nothing_is_dropped_when_its_time_is_over(
    play: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(exchange, "PATIENCE", 0.2)

    async def scene(door: Door) -> None:
        clients = [door.deaf(asked()) for _ in range(3)]
        await asyncio.sleep(0.1)
        assert len(door.server.server_state.connections) == 3
        await door.emptied()
        for client in clients:
            client.close()

    play(scene, engine=Flood(), seconds=0.5)
    assert not capsys.readouterr().err


def test_a_client_that_reads_no_whole_reply_is_dropped(play: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "PATIENCE", 0.2)

    async def scene(door: Door) -> None:
        client = door.deaf(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" * 400)  # one after the other, until one finds no room
        await asyncio.sleep(0.1)
        assert len(door.server.server_state.connections) == 1
        await door.emptied()
        client.close()

    play(scene, seconds=0.3)


def test_the_want_of_descriptors_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    async def scene() -> None:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(connections.complaints())
        full = OSError(errno.EMFILE, "Too many open files")
        for _ in range(100):
            loop.call_exception_handler({"message": "accept", "exception": full})
        loop.call_exception_handler({"message": "another"})

    with caplog.at_level(logging.ERROR):
        asyncio.run(scene())
    assert [record.getMessage().partition(" (")[0] for record in caplog.records] == [
        "connections have to wait",
        "another",
    ]


def test_the_limit_of_descriptors_is_raised() -> None:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if hard != resource.RLIM_INFINITY and hard < 1024:
        pytest.skip(f"the system allows {hard} descriptors")
    code = (
        "import resource; from halflap.inference.server.connections import affordable; "
        f"resource.setrlimit(resource.RLIMIT_NOFILE, (256, {hard})); "
        "print(affordable(1), affordable(2), *resource.getrlimit(resource.RLIMIT_NOFILE)); "
        "resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256)); print(affordable(1), affordable(2))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    one, two, soft, still, low, half = map(int, found.stdout.split())
    assert soft == (1 << 16 if hard == resource.RLIM_INFINITY else min(hard, 1 << 16)) and still == hard
    assert soft - 300 < one < soft and two == one // 2
    assert 80 < low < 128 and half == low // 2
