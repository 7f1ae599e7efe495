"""Processes behind a front: started, started again when they end, and never left behind."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from halflap.errors import HalflapError
from halflap.inference.front import replica as module
from halflap.inference.front.replica import Launch, Replica, kept

SERVER = """
import os, signal, socket, sys
if "stubborn" in sys.argv:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
listener = socket.socket(socket.AF_UNIX)
listener.bind(sys.argv[1])
listener.listen()
print("serving as", os.getpid(), os.environ.get("GIVEN"), os.environ.get("TAKEN"), flush=True)
while True:
    peer, _ = listener.accept()
    peer.recv(65536)
    peer.sendall(b"HTTP/1.1 200 OK\\r\\ncontent-length: 0\\r\\nconnection: close\\r\\n\\r\\n")
    peer.close()
"""


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is said while replicas are kept, with little patience."""
    for name, value in {"STARTING": 0.02, "WATCHING": 0.05, "FIRST_PAUSE": 0.05, "PATIENCE": 0.5}.items():
        monkeypatch.setattr(module, name, value)
    return []


def keep(
    folder: Path, said: list[str], scene: Callable[..., Awaitable[None]], *words: str, count: int = 1
) -> list[Replica]:
    """Run scene(replicas, lost) while processes of SERVER are kept; gives the replicas."""

    async def run() -> list[Replica]:
        environment = {"GIVEN": "something", "TAKEN": None}
        sockets = [folder / f"{number}.sock" for number in range(count)]
        commands = [(sys.executable, "-c", SERVER, str(socket), *words) for socket in sockets]
        launches = [Launch(f"replica {i}", c, s, environment) for i, (c, s) in enumerate(zip(commands, sockets))]
        replicas = [Replica(number, launch) for number, launch in enumerate(launches)]
        lost: list[Replica] = []
        async with asyncio.timeout(15), kept(replicas, lost=lost.append, say=said.append):
            await scene(replicas, lost)
        return replicas

    return asyncio.run(run())


def processes(said: list[str]) -> list[int]:
    return [int(line.split()[4]) for line in said if "serving as" in line]


def alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_replica_that_ends_is_started_again(folder: Path, said: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TAKEN", "away")

    async def scene(replicas: list[Replica], lost: list[Replica]) -> None:
        assert all(replica.ready for replica in replicas)
        os.kill(processes(said)[0], signal.SIGKILL)
        while not lost or not replicas[lost[0].number].ready:
            await asyncio.sleep(0.01)
        (replica,) = lost
        assert replica.restarts == 1

    replicas = keep(folder, said, scene, count=2)
    assert len(processes(said)) == 3 and not any(map(alive, processes(said)))
    assert not any(replica.ready for replica in replicas)
    text = "\n".join(said)
    assert "was ended by SIGKILL (is the memory full?); it is started again in" in text
    assert "something None" in text and "replica 1: serving as" in text and "replica 1 answers after" in text


def test_one_that_does_not_listen_to_reason_is_ended(folder: Path, said: list[str]) -> None:
    async def scene(replicas: list[Replica], lost: list[Replica]) -> None: ...

    keep(folder, said, scene, "stubborn")
    assert not any(map(alive, processes(said)))


def test_one_that_no_longer_answers_is_started_again(
    folder: Path, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "HUNG", 0.3)

    async def scene(replicas: list[Replica], lost: list[Replica]) -> None:
        answers = replicas[0].answers
        replicas[0].answers = lambda: asyncio.sleep(0, False)  # pyright: ignore[reportAttributeAccessIssue]
        while not lost:
            await asyncio.sleep(0.01)
        replicas[0].answers = answers
        while not replicas[0].ready:
            await asyncio.sleep(0.01)

    keep(folder, said, scene)
    assert any("has not answered for 0.3 s and is ended" in line for line in said)


def test_one_that_cannot_start_ends_the_others(folder: Path, said: list[str]) -> None:
    async def run() -> None:
        failing = "print('no such thing'); print('on line 2'); raise SystemExit(3)"
        commands = [(sys.executable, "-c", SERVER, str(folder / "0.sock")), (sys.executable, "-c", failing)]
        replicas = [Replica(n, Launch(f"replica {n}", c, folder / f"{n}.sock")) for n, c in enumerate(commands)]
        async with kept(replicas, lost=lambda replica: None, say=said.append):
            pytest.fail("entered")

    message = r"replica 1 ended with status 3 before it could answer; the last it said:\n +no such thing\n +on line 2$"
    with pytest.raises(HalflapError, match=message):
        asyncio.run(run())
    assert not any(map(alive, processes(said)))


@pytest.mark.skipif(sys.platform != "linux", reason="other systems cannot be asked to")
def test_a_tethered_process_ends_with_its_parent(tmp_path: Path) -> None:
    child = "import os, time; open('pid', 'w').write(str(os.getpid())); time.sleep(60)"
    parent = f"""
import os, subprocess, sys, time
words = [sys.executable, "-m", "halflap.inference.front.tether", str(os.getpid()), sys.executable, "-c", {child!r}]
subprocess.Popen(words)
while not os.path.exists("pid") or not open("pid").read():
    time.sleep(0.01)
os.kill(os.getpid(), 9)
"""
    source = str(Path(module.__file__).parents[3])
    environment = {**os.environ, "PYTHONPATH": source}
    subprocess.run([sys.executable, "-c", parent], cwd=tmp_path, env=environment, timeout=15)
    process = int((tmp_path / "pid").read_text())
    for _ in range(500):
        if not running(process):
            return
        asyncio.run(asyncio.sleep(0.01))
    os.kill(process, signal.SIGKILL)
    pytest.fail("it goes on")


def running(process: int) -> bool:
    """Alive and no zombie, which nobody may be there to bury."""
    try:
        stat: Any = Path(f"/proc/{process}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"
