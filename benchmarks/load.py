"""Clients of an OpenAI server, in a process of their own: streams, and on request hang-ups, slow readers and nonsense.

    python benchmarks/load.py '{"port": 8000, "model": "m", "vocab": 4096, "clients": {"reader": 64}, "seconds": 300}'

Prints one JSON object. Every client has one request under way at a time, with random token ids, greedy and without an
end token, of the lengths that `prompts` and `tokens` span; with `requests` in place of `seconds` the clients share that
many. HTTP/1.1 is spoken by hand, a request a connection: a client library would take much of the cores that the server
is measured on.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

DEFAULTS = {"prompts": [16, 256], "tokens": [16, 128], "seed": 0, "seconds": None, "requests": None}
PAUSE = 0.05  # seconds of a slow reader between two lines


@dataclass
class Reply:
    """A stream as its reader saw it; times in seconds of one clock. `error` is set unless all of it came."""

    began: float
    status: int = 0
    arrivals: list[float] = field(default_factory=list)  # of pieces of text
    prompt_tokens: int = 0
    completion_tokens: int = 0
    error: str | None = None

    @property
    def tokens(self) -> int:
        """Written so far; before the usage has come, pieces."""
        return self.completion_tokens or len(self.arrivals)


def main() -> None:
    plan = DEFAULTS | json.loads(sys.argv[1])
    print(json.dumps(asyncio.run(run(plan))))


async def run(plan: Mapping[str, Any]) -> dict[str, Any]:
    """All clients together."""
    began, left = time.perf_counter(), itertools.count() if plan["requests"] is None else iter(range(plan["requests"]))
    end = None if plan["seconds"] is None else began + plan["seconds"]
    found = Found()
    names = [kind for kind, count in plan["clients"].items() for _ in range(count)]
    clients = (CLIENTS[kind](plan, number, left, end, found) for number, kind in enumerate(names))
    await asyncio.gather(*clients)
    return found.summary(time.perf_counter() - began)


def bodies(plan: Mapping[str, Any], number: int) -> Iterator[dict[str, Any]]:
    """The requests of one client, the same at every run."""
    chance = random.Random(f"{plan['seed']} {number}")
    while True:
        prompt = [chance.randrange(3, plan["vocab"]) for _ in range(chance.randint(*plan["prompts"]))]
        yield {
            "model": plan["model"], "prompt": prompt, "max_tokens": chance.randint(*plan["tokens"]), "temperature": 0,
            "ignore_eos": True, "stream": True, "stream_options": {"include_usage": True},
        }  # fmt: skip


# --- one request -----------------------------------------------------------------------------------------------------


def message(body: bytes, path: str = "/v1/completions", kind: str = "application/json") -> bytes:
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Type: {kind}\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


async def ask(port: int, body: Mapping[str, Any], *, most: int | None = None, pause: float = 0.0) -> Reply:
    """Read a stream to its end, or hang up after `most` pieces; `pause` seconds between lines."""
    reply, done = Reply(time.perf_counter()), False
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << (12 if pause else 20))
        try:
            writer.write(message(json.dumps(body).encode()))
            reply.status = int((await reader.readline()).split()[1])
            async for line in reader:
                done |= line.startswith(b"data: [DONE]")
                if line.startswith(b"data: {"):
                    _take(reply, json.loads(line[6:]))
                if most is not None and len(reply.arrivals) >= most:
                    return reply
                if pause:
                    await asyncio.sleep(pause)
        finally:
            writer.close()
    except (OSError, ValueError, IndexError) as error:
        reply.error = f"{type(error).__name__}: {error}"
    if reply.error is None and (reply.status != 200 or not done):
        reply.error = f"status {reply.status}" if reply.status != 200 else "the stream broke off"
    return reply


def _take(reply: Reply, event: Mapping[str, Any]) -> None:
    if "error" in event:
        reply.error = event["error"]["message"]
    if any(choice.get("text") for choice in event.get("choices", ())):
        reply.arrivals.append(time.perf_counter())
    if usage := event.get("usage"):
        reply.prompt_tokens, reply.completion_tokens = usage["prompt_tokens"], usage["completion_tokens"]


async def status_of(port: int, data: bytes) -> int:
    """What the server says to bytes; 0 where it only hangs up."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(data)
        said = await asyncio.wait_for(reader.readline(), 60)
        return int(said.split()[1]) if said else 0
    except ConnectionError:
        return 0
    finally:
        writer.close()


# --- clients ---------------------------------------------------------------------------------------------------------


async def reader(plan: Mapping[str, Any], number: int, left: Iterator[int], end: float | None, found: Found) -> None:
    """Reads everything at once."""
    for body in bodies(plan, number):
        if next(left, None) is None or (end is not None and time.perf_counter() >= end):
            return
        found.add(number, await ask(plan["port"], body))


async def slow_reader(plan: Mapping[str, Any], number: int, left: Iterator[int], end: float, found: Found) -> None:
    for body in bodies(plan, number):
        if time.perf_counter() >= end:
            return
        reply = await ask(plan["port"], body, pause=PAUSE)
        found.note("slow reader", reply.error)


async def hangs_up(plan: Mapping[str, Any], number: int, left: Iterator[int], end: float, found: Found) -> None:
    """Goes away after a few pieces, or before the first."""
    chance = random.Random(number)
    for body in bodies(plan, number):
        if time.perf_counter() >= end:
            return
        if chance.random() < 0.25:
            _, writer = await asyncio.open_connection("127.0.0.1", plan["port"])
            writer.write(message(json.dumps(body).encode()))
            await asyncio.sleep(chance.random())
            writer.close()
            found.note("hung up", None)
            continue
        reply = await ask(plan["port"], body, most=chance.randint(1, 8))
        found.note("hung up", reply.error)


async def nonsense(plan: Mapping[str, Any], number: int, left: Iterator[int], end: float, found: Found) -> None:
    """Sends what must be refused, and requests that stop half-way."""
    good = {"model": plan["model"], "prompt": [5, 6, 7], "max_tokens": 4}
    as_json = lambda **changes: message(json.dumps(good | changes).encode())
    wrong = {
        "not JSON": message(b'{"prompt": '),
        "not UTF-8": message(b'{"prompt": "\xff\xfe"}'),
        "unknown name": as_json(best_guess=1),
        "wrong type": as_json(max_tokens="many"),
        "no such token": as_json(prompt=[plan["vocab"] + 10**6]),
        "too long": as_json(max_tokens=10**8),
        "another model": as_json(model="no such model"),
        "another path": message(b"{}", "/v1/nothing"),
        "another type of body": message(json.dumps(good).encode(), kind="text/plain"),
        "no HTTP": b"\x16\x03\x01 what is this\r\n\r\n",
    }
    for name in itertools.cycle(wrong):
        if time.perf_counter() >= end:
            return
        status = await status_of(plan["port"], wrong[name])
        found.note("nonsense", None if 400 <= status < 500 else f"{name} got status {status}")
        _, writer = await asyncio.open_connection("127.0.0.1", plan["port"])
        writer.write(as_json()[:-10])
        await asyncio.sleep(0.2)
        writer.close()


CLIENTS = {"reader": reader, "slow_reader": slow_reader, "hangs_up": hangs_up, "nonsense": nonsense}


# --- what they found -------------------------------------------------------------------------------------------------


class Found:
    """What all clients saw. Times are those of readers alone."""

    def __init__(self) -> None:
        self.replies: list[Reply] = []
        self.tokens: Counter[int] = Counter()
        self.kinds: Counter[str] = Counter()
        self.errors: Counter[str] = Counter()

    def add(self, client: int, reply: Reply) -> None:
        self.replies.append(reply)
        self.tokens[client] += reply.tokens
        self.note("reader", reply.error)

    def note(self, kind: str, error: str | None) -> None:
        self.kinds[kind] += 1
        if error is not None:
            self.errors[f"{kind}: {error}"] += 1

    def summary(self, seconds: float) -> dict[str, Any]:
        """Seconds and tokens; `fairness` is Jain's index of the clients' tokens, 1 where all got the same."""
        replies = [reply for reply in self.replies if reply.arrivals]
        per_client = sorted(self.tokens.values())
        total = sum(per_client)
        first = [reply.arrivals[0] - reply.began for reply in replies]
        between = [b - a for reply in replies for a, b in itertools.pairwise(reply.arrivals)]
        return {
            "seconds": seconds,
            "requests": dict(self.kinds),
            "errors": dict(self.errors),
            "prompt_tokens": sum(reply.prompt_tokens for reply in self.replies),
            "completion_tokens": total,
            "tokens_per_client": {"least": per_client[0], "median": middle(per_client), "most": per_client[-1]},
            "fairness": total**2 / (len(per_client) * sum(n * n for n in per_client)) if total else 0.0,
            "seconds_to_first_token": percentiles(first),
            "seconds_between_pieces": percentiles(between),
        }


def percentiles(values: list[float]) -> dict[str, float]:
    ordered = sorted(values)
    at = lambda share: ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0
    return {"p50": at(0.5), "p99": at(0.99), "most": at(1.0)}


def middle(ordered: list[int]) -> int:
    return ordered[len(ordered) // 2]


if __name__ == "__main__":
    main()
