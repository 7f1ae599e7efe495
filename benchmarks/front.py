"""`halflap serve` as one process and as replicas behind the front: conversations held side by side, token by token.

Each client holds a conversation of several turns, greedy, with its replies in it; the texts differ. Both servers have
the same cores in all. Reported are completion tokens a second of all clients, seconds to the first piece of text, and
the share of prompt tokens that the prefix cache held, which shows whether conversations go back to where they were.
"""

from __future__ import annotations

import http.client
import json
import statistics
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from common import Report, arguments, interleave, spread
from served import serving, write_model

TEXT = "attention looks back at every word and a state remembers what it was told of each"
WORDS = TEXT.split()


class Turn(NamedTuple):
    """What one reply took."""

    first: float  # seconds
    prompt: int
    cached: int
    completion: int


def reply(port: int, messages: list[dict[str, str]], tokens: int) -> tuple[str, Turn]:
    """One streamed reply."""
    body = {"messages": messages, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
    body |= {"stream": True, "stream_options": {"include_usage": True}}
    began, first, text, usage = time.perf_counter(), 0.0, "", {}
    connection = http.client.HTTPConnection("127.0.0.1", port)
    connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
    for line in connection.getresponse():
        if line.startswith(b"data: {"):
            chunk = json.loads(line[6:])
            usage = chunk.get("usage") or usage
            for choice in chunk["choices"]:
                if choice["delta"].get("content"):
                    first = first or time.perf_counter() - began
                    text += choice["delta"]["content"]
    connection.close()
    cached = usage["prompt_tokens_details"]["cached_tokens"]
    first = first or time.perf_counter() - began
    return text, Turn(first, usage["prompt_tokens"], cached, usage["completion_tokens"])


def conversation(port: int, name: str, turns: int, asked: int, tokens: int) -> list[Turn]:
    messages: list[dict[str, str]] = []
    taken = []
    for turn in range(turns):
        question = " ".join(WORDS[(i * 7 + turn) % len(WORDS)] for i in range(asked))
        messages.append({"role": "user", "content": f"{name}, {turn}: {question}"})
        text, took = reply(port, messages, tokens)
        messages.append({"role": "assistant", "content": text})
        taken.append(took)
    return taken


class Side:
    """All clients of a server; new conversations at every call."""

    def __init__(self, port: int, clients: int, chosen: Any) -> None:
        self.port, self.clients, self.chosen = port, clients, chosen
        self.runs = 0
        self.turns: list[Turn] = []

    def __call__(self) -> None:
        self.runs += 1
        hold = lambda client: conversation(
            self.port, f"run {self.runs} of {client}", self.chosen.turns, self.chosen.words, self.chosen.tokens
        )
        with ThreadPoolExecutor(self.clients) as pool:
            self.turns = [turn for turns in pool.map(hold, range(self.clients)) for turn in turns]


def main() -> None:
    quick = {"size": "nemotron-h-tiny", "clients": [2], "turns": 2, "tokens": 4}
    chosen = arguments(__doc__, quick, size="55m", clients=[1, 4, 16], replicas=2, turns=4, words=60, tokens=32)
    report = Report("front", chosen.out, chosen.threads)
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder) / "model"
        write_model(chosen.size, directory)
        memory = ("--prefix-cache", "512MiB")
        with (
            serving(directory, *memory, threads=chosen.threads) as alone,
            serving(directory, *memory, "--replicas", str(chosen.replicas), threads=chosen.threads) as shared,
        ):
            for clients in chosen.clients:
                ports = {"one_process": alone.port, "replicas": shared.port}
                sides = {name: Side(port, clients, chosen) for name, port in ports.items()}
                times = interleave(sides, chosen.repeats)
                for name, side in sides.items():
                    tokens, prompt = sum(t.completion for t in side.turns), sum(t.prompt for t in side.turns)
                    report.add(
                        side=name,
                        clients=clients,
                        tokens_per_second=spread(times[name], tokens),
                        seconds_to_first_token=statistics.median(t.first for t in side.turns),
                        cached_share=sum(t.cached for t in side.turns) / prompt,
                    )
    report.write()


if __name__ == "__main__":
    main()
