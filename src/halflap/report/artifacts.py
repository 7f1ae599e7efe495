"""What a run directory holds, read whole and never guessed at: every value remembers its file and its JSON pointer.

A missing file is simply absent; a file that cannot be read is named in `problems`, which the page shows. Files that
belong to a checkpoint are looked for beside the run, in `checkpoint/` and in `pruned/` (what `compress` leaves).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from halflap.errors import HalflapError

RUN_DOCUMENTS = (
    "status.json",
    "environment.json",
    "inputs.json",
    "search.json",
    "scores.json",
    "training.json",
    "bench.json",
    "latency.json",
    "arms.json",
    "analysis.json",
    "study.json",
)
CHECKPOINT_DOCUMENTS = ("halflap.json", "config.json", "lineage.json", "pruning_plan.json", "certificate.json")
FOLDERS = ("", "checkpoint/", "pruned/")
NAMES = (*RUN_DOCUMENTS, *(folder + name for folder in FOLDERS for name in CHECKPOINT_DOCUMENTS))
MARKS = (
    *RUN_DOCUMENTS,
    "recipe.yaml",
    "metrics.jsonl",
    "importance.safetensors",
    "pruning_plan.json",
    "checkpoint",
    "pruned",
)


class Source(NamedTuple):
    """Where a value stands: the file, and the JSON pointer, line or tensor inside it."""

    path: Path
    pointer: str = ""


@dataclass(frozen=True)
class Fact:
    """A value with the places it comes from; a computed one names all it was computed from."""

    value: Any
    sources: tuple[Source, ...] = ()

    def __float__(self) -> float:
        return float(self.value)


def derive(value: Any, *parts: Fact) -> Fact:
    """A value computed from `parts`."""
    return Fact(value, tuple(dict.fromkeys(source for part in parts for source in part.sources)))


@dataclass(frozen=True)
class Node:
    """A piece of a JSON document that knows where it stands."""

    path: Path
    value: Any
    pointer: str = ""

    def get(self, *keys: str | int) -> Node | None:
        """The piece under `keys`; None when any of them is missing or holds null."""
        value, pointer = self.value, self.pointer
        for key in keys:
            value = _member(value, key)
            pointer = f"{pointer}/{str(key).replace('~', '~0').replace('/', '~1')}"
        return None if value is None else Node(self.path, value, pointer)

    def items(self) -> Iterator[tuple[str, Node]]:
        """Members of an object or a list, by key or position; nothing for anything else."""
        keys = (
            list(self.value)
            if isinstance(self.value, dict)
            else range(len(self.value))
            if isinstance(self.value, list)
            else ()
        )
        for key in keys:
            if (child := self.get(key)) is not None:
                yield str(key), child

    def text(self, *keys: str | int) -> str | None:
        node = self.get(*keys)
        return None if node is None or isinstance(node.value, (dict, list)) else str(node.value)

    def fact(self, *keys: str | int) -> Fact | None:
        """The value under `keys` with its place; None when it is missing, a container, or not a finite number."""
        node = self.get(*keys)
        if node is None or isinstance(node.value, (dict, list)):
            return None
        if isinstance(node.value, float) and not math.isfinite(node.value):
            return None
        return Fact(node.value, (Source(node.path, node.pointer),))

    def number(self, *names: str) -> Fact | None:
        """The first of `names` that holds a number."""
        for name in names:
            found = self.fact(name)
            if found is not None and isinstance(found.value, (int, float)) and not isinstance(found.value, bool):
                return found
        return None

    def interval(self, *names: str) -> tuple[Fact, Fact] | None:
        """The first of `names` that holds a pair of numbers."""
        for name in names:
            node = self.get(name)
            if node is not None and isinstance(node.value, list) and len(node.value) == 2:
                low, high = node.fact(0), node.fact(1)
                if low is not None and high is not None:
                    return low, high
        return None


def _member(value: Any, key: str | int) -> Any:
    if isinstance(value, dict):
        return value.get(key)
    return value[key] if isinstance(value, list) and isinstance(key, int) and key < len(value) else None


@dataclass(frozen=True)
class RunFiles:
    """The artifacts of one run directory; `documents` are keyed by their name below it."""

    path: Path
    documents: dict[str, Node] = field(default_factory=dict)
    metrics: tuple[Node, ...] = ()
    recipe: str | None = None
    problems: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return self.path.resolve().name

    def document(self, *names: str) -> Node | None:
        """The first of `names` that the run holds."""
        return next((self.documents[name] for name in names if name in self.documents), None)

    @property
    def importance(self) -> Path | None:
        path = self.path / "importance.safetensors"
        return path if path.is_file() else None


def read_run(path: Path) -> RunFiles:
    """Read every known artifact below `path`.

    Raises HalflapError when `path` is no directory or holds nothing a run would.
    """
    if not path.is_dir():
        what = "a file" if path.exists() else "not there"
        raise HalflapError(
            f"{str(path)!r} is {what}; a report is made from run directories: give the --out of a finished run"
        )
    if not any((path / mark).exists() for mark in MARKS):
        raise HalflapError(
            f"{str(path)!r} is no run directory: none of {', '.join(RUN_DOCUMENTS[:4])}, metrics.jsonl, checkpoint/ "
            "is in it; give the --out of a finished run"
        )
    documents: dict[str, Node] = {}
    problems: list[str] = []
    for name in NAMES:
        try:
            documents[name] = Node(path / name, json.loads((path / name).read_text(encoding="utf-8")))
        except (FileNotFoundError, NotADirectoryError):
            continue
        except (OSError, ValueError) as error:
            problems.append(f"{path.name}/{name} cannot be read: {error}")
    recipe = path / "recipe.yaml"
    text = recipe.read_text(encoding="utf-8") if recipe.is_file() else None
    return RunFiles(path, documents, tuple(_metrics(path / "metrics.jsonl", problems)), text, tuple(problems))


def _metrics(path: Path, problems: list[str]) -> Iterator[Node]:
    """Rows of a JSON Lines file; a line cut short by a kill is reported and passed over."""
    if not path.is_file():
        return
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            problems.append(f"{path.parent.name}/{path.name} line {number} is not JSON and was left out")
            continue
        if isinstance(row, dict):
            yield Node(path, row, f"line {number} ")
