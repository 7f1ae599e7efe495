"""A process with an engine behind a Unix socket: started, watched, started again after it ended, and stopped."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

import httpx2

from halflap.errors import HalflapError
from halflap.processes import python_command

STARTING, WATCHING = 0.2, 5.0  # seconds between looks at a replica that is not ready yet, and at one that is
HUNG = 60.0  # seconds without an answer, after which it is started again
FIRST_PAUSE, LAST_PAUSE = 1.0, 60.0  # seconds before it is started again; each pause is twice the one before
STABLE = 60.0  # seconds of life after which the pauses begin anew
PATIENCE = 5.0  # seconds to end in when told to
LAST_WORDS = 20  # lines
LONGEST_LINE = 10_000

Say = Callable[[str], None]


@dataclass(frozen=True)
class Launch:
    """How a replica is started: its name in logs, its command, what it changes in the environment (None takes a
    variable out), and the Unix socket at which it answers. Its folder must be nobody else's."""

    name: str
    command: tuple[str, ...]
    socket: Path
    environment: Mapping[str, str | None] = field(default_factory=dict)


class Replica:
    """A process and the way to it.

    ready: it takes requests. answered: it once did. running: texts that it is writing. served: requests it has had.
    """

    def __init__(self, number: int, launch: Launch) -> None:
        self.number, self.launch = number, launch
        self.client = httpx2.AsyncClient(
            transport=httpx2.AsyncHTTPTransport(
                uds=str(launch.socket),
                limits=httpx2.Limits(max_connections=None, max_keepalive_connections=32, keepalive_expiry=5),
            ),
            base_url="http://replica",
            timeout=httpx2.Timeout(None, connect=5.0),
            headers={"accept-encoding": "identity"},
        )
        self.ready = self.answered = False
        self.running = self.served = self.restarts = 0
        self.last_words: deque[str] = deque(maxlen=LAST_WORDS)

    async def answers(self) -> bool:
        """Whether it says that it is well."""
        try:
            return (await self.client.get("/health", timeout=10.0)).status_code == 200
        except httpx2.HTTPError:
            return False


@contextlib.asynccontextmanager
async def kept(replicas: Sequence[Replica], *, lost: Callable[[Replica], None], say: Say) -> AsyncIterator[None]:
    """Replicas that run, from when all of them answer until the end of the context.

    One that ends is told to `lost` and started again. Raises HalflapError when one ends before it ever answered.
    """
    tasks = [asyncio.create_task(_keep(replica, lost, say)) for replica in replicas]
    try:
        while not all(replica.ready for replica in replicas):
            if failed := next((task for task in tasks if task.done()), None):
                await failed  # raises
            await asyncio.sleep(STARTING / 2)
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for replica in replicas:
            await replica.client.aclose()


async def _keep(replica: Replica, lost: Callable[[Replica], None], say: Say) -> NoReturn:
    pause, name = FIRST_PAUSE, replica.launch.name
    while True:
        began = time.monotonic()
        status = await _life(replica, say)
        lost(replica)
        if not replica.answered:
            words = "".join(f"\n    {line}" for line in replica.last_words) or " nothing"
            raise HalflapError(f"{name} {_ending(status)} before it could answer; the last it said:{words}")
        pause = FIRST_PAUSE if time.monotonic() - began > STABLE else pause
        say(f"{name} {_ending(status)}; it is started again in {pause:g} s")
        await asyncio.sleep(pause)
        pause = min(2 * pause, LAST_PAUSE)
        replica.restarts += 1


async def _life(replica: Replica, say: Say) -> int:
    """Start the process and wait for its end; gives its status. Cancelled, it is stopped."""
    launch = replica.launch
    launch.socket.unlink(missing_ok=True)
    replica.last_words.clear()
    changed = {**os.environ, **launch.environment}
    process = await asyncio.create_subprocess_exec(
        *(*python_command(), "-m", "halflap.inference.front.tether", str(os.getpid()), *launch.command),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        env={name: value for name, value in changed.items() if value is not None},
        start_new_session=True,  # Ctrl-C is for the front, which tells its replicas
    )
    assert process.stdout is not None
    log = asyncio.create_task(_log(replica, process.stdout, say))
    watch = asyncio.create_task(_watch(replica, process, say))
    try:
        return await process.wait()
    finally:
        watch.cancel()
        replica.ready = False
        await _stop(process)
        await asyncio.wait({log}, timeout=1.0)
        log.cancel()


async def _watch(replica: Replica, process: asyncio.subprocess.Process, say: Say) -> None:
    began = time.monotonic()
    while not await replica.answers():
        await asyncio.sleep(STARTING)
    replica.ready = replica.answered = True
    say(f"{replica.launch.name} answers after {time.monotonic() - began:.0f} s")
    heard = time.monotonic()
    while time.monotonic() - heard < HUNG:
        await asyncio.sleep(WATCHING)
        if await replica.answers():
            replica.ready, heard = True, time.monotonic()
    say(f"{replica.launch.name} has not answered for {HUNG:g} s and is ended")
    await _stop(process)


async def _stop(process: asyncio.subprocess.Process) -> None:
    """End a process politely, then by force, and whatever it left behind in its session."""
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(process.wait(), PATIENCE)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    await process.wait()


async def _log(replica: Replica, output: asyncio.StreamReader, say: Say) -> None:
    """Each line that the process writes, under its name."""
    rest = b""
    while part := await output.read(1 << 16):
        *lines, rest = (rest + part).split(b"\n")
        for line in [*lines, *([rest] if len(rest) > LONGEST_LINE else [])]:
            if text := line.decode(errors="replace").rstrip():
                replica.last_words.append(text)
                say(f"{replica.launch.name}: {text}")
        rest = b"" if len(rest) > LONGEST_LINE else rest
    if rest:
        replica.last_words.append(rest.decode(errors="replace"))


def _ending(status: int) -> str:
    if status >= 0:
        return f"ended with status {status}"
    name = signal.Signals(-status).name if -status in set(signal.Signals) else str(-status)
    return f"was ended by {name}{' (is the memory full?)' if name == 'SIGKILL' else ''}"
