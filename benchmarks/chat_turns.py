"""Time to the first token of each of 20 turns of a conversation, with the prefix cache and with `--prefix-cache off`.

    python benchmarks/chat_turns.py [--model DIR] [--sizes 55m 205m] [--turns 20] [--words 60] [--tokens 64]

Two servers hold the same conversation, greedy, with its replies in it, a turn of one and then the same of the other, so
one of them always rests; each of `--repeats` conversations has texts of its own. `cached` are the tokens of the prompt
that the cache held at the last turn. Goal: with the cache the time grows with what is new, not with the conversation.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from common import Report, arguments, spread
from front import WORDS, Turn, reply
from served import Served, serving, write_model

SIDES = {"cached": "1GiB", "off": "off"}  # --prefix-cache


def main() -> None:
    quick = {"sizes": ["nemotron-h-tiny"], "turns": 3, "words": 4, "tokens": 4, "context": 400}
    chosen = arguments(__doc__, quick, model="", turns=20, words=60, tokens=64, context=8192)
    report = Report("chat_turns", chosen.out, chosen.threads)
    for size in [chosen.model] if chosen.model else chosen.sizes:
        with tempfile.TemporaryDirectory() as folder:
            directory = Path(chosen.model or f"{folder}/model")
            if not chosen.model:
                write_model(size, directory, chosen.context)
            for row in rows(directory, chosen):
                report.add(model=Path(size).name, **row)
    report.write()


def rows(directory: Path, chosen: Any) -> list[dict[str, Any]]:
    """A row a turn, and one of the last turn over the first."""
    start = lambda cache: serving(directory, "--prefix-cache", cache, threads=chosen.threads)
    with start(SIDES["cached"]) as cached, start(SIDES["off"]) as off:
        talks = [talk({"cached": cached, "off": off}, number, chosen) for number in range(-1, chosen.repeats)][1:]
    found = []
    for turn in range(chosen.turns):
        turns = {name: [talk[turn][name] for talk in talks] for name in SIDES}
        seconds = {f"{name}_ms": spread([1 / (1e3 * took.first) for took in taken]) for name, taken in turns.items()}
        last = turns["cached"][-1]
        speed_up = seconds["off_ms"]["median"] / seconds["cached_ms"]["median"]
        found.append({"turn": turn + 1, "prompt": last.prompt, "cached": last.cached, **seconds, "speed_up": speed_up})
    growth = {f"{name}_growth": found[-1][f"{name}_ms"]["median"] / found[0][f"{name}_ms"]["median"] for name in SIDES}
    return [*found, {"turns": chosen.turns, **growth}]


def talk(servers: dict[str, Served], number: int, chosen: Any) -> list[dict[str, Turn]]:
    """What each turn took on each server; the first server's replies are what both go on from."""
    messages: list[dict[str, str]] = []
    taken = []
    for turn in range(chosen.turns):
        question = " ".join(WORDS[(i * 7 + turn) % len(WORDS)] for i in range(chosen.words))
        messages.append({"role": "user", "content": f"talk {number}, {turn}: {question}"})
        replies = {name: reply(server.port, messages, chosen.tokens) for name, server in servers.items()}
        messages.append({"role": "assistant", "content": replies["cached"][0]})
        taken.append({name: took for name, (_, took) in replies.items()})
    return taken


if __name__ == "__main__":
    main()
