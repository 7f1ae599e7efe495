"""scores.json's tasks as rows with bars: lm-evaluation-harness and recall probes, the runs side by side.

A share of right answers is a bar with its 95 % interval, and a mark where a blind guess would be; a task without one
stands with its numbers. Of a probe the rows are over all its lengths; a table below goes by length, with the loss.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from halflap.report import strips, units
from halflap.report.artifacts import Fact, Node, RunFiles
from halflap.report.measures import COLORS

METRICS = {
    "acc": "accuracy",
    "acc_norm": "accuracy, by length of answer",
    "exact_match": "exact match",
    "choice_acc": "right answer is the likeliest",
    "token_acc": "tokens right",
}
"""Shares that are drawn, in words; of a probe `acc` says that greedy decoding gives the answer."""
WRITTEN = "answer is written"
DETAILS = ("items", "chance", "alias", "form")


@dataclass(frozen=True)
class Score:
    """One run's number on a task; `bar` is drawn where the number is a share."""

    task: str
    metric: str
    run: str
    color: int
    value: Fact
    kind: str
    interval: tuple[Fact, Fact] | None
    chance: Fact | None
    items: Fact | None
    bar: Markup | None


@dataclass(frozen=True)
class ByLength:
    """A probe's numbers at each length that was asked, None where it was not."""

    task: str
    metric: str
    run: str
    kind: str
    cells: tuple[tuple[Fact, tuple[Fact, Fact] | None] | None, ...]


@dataclass(frozen=True)
class Tasks:
    """All scores task by task, then run by run."""

    scores: tuple[Score, ...]
    lengths: tuple[int, ...]
    by_length: tuple[ByLength, ...]
    several: bool
    axis: Markup


def read_tasks(runs: Sequence[RunFiles]) -> Tasks | None:
    """Of all runs that were asked tasks; None when there is none."""
    asked: dict[str, list[tuple[str, int, Node]]] = {}
    names = set()
    for run in runs:
        node = run.document("scores.json")
        tasks = node.get("tasks") if node is not None else None
        for task, child in tasks.items() if tasks is not None else ():
            if isinstance(child.value, dict):
                names.add(run.name)
                asked.setdefault(task, []).append((run.name, (len(names) - 1) % COLORS, child))
    scores = tuple(score for task, rows in asked.items() for score in _scores(task, rows))
    if not scores:
        return None
    lengths = sorted(
        {int(cell.value["length"]) for rows in asked.values() for *_, node in rows for cell in _cells(node)}
    )
    by_length = tuple(row for task, rows in asked.items() for row in _by_length(task, rows, lengths))
    return Tasks(scores, tuple(lengths), by_length, len(names) > 1, strips.bar_axis())


def _scores(task: str, rows: Sequence[tuple[str, int, Node]]) -> Iterator[Score]:
    """Metric by metric, so that runs stand under each other."""
    found = dict.fromkeys(name for *_, node in rows for name in node.value)
    named = [name for name in found if name not in DETAILS and not name.endswith(("_stderr", "_interval"))]
    for metric in [name for name in named if name in METRICS] or named:
        for run, color, node in rows:
            if (value := node.number(metric)) is None:
                continue
            share = metric in METRICS
            interval = node.interval(f"{metric}_interval")
            chance = node.number("chance") if metric == "choice_acc" else None
            bar = _bar(f"{task}, {run}", value, interval, chance, color) if share else None
            kind = "percent" if share else "plain"
            items = node.number("items")
            yield Score(task, _named(metric, node), run, color, value, kind, interval, chance, items, bar)


def _named(metric: str, node: Node) -> str:
    if metric == "acc" and node.get("by_length") is not None:
        return WRITTEN
    return METRICS.get(metric, metric.replace("_", " "))


def _bar(of: str, value: Fact, interval: tuple[Fact, Fact] | None, chance: Fact | None, color: int) -> Markup:
    bounds = (float(interval[0]), float(interval[1])) if interval else None
    text = f"{of}: {units.percent(float(value))}"
    if bounds:
        text += f", 95 % from {units.percent(bounds[0])} to {units.percent(bounds[1])}"
    return strips.bar(float(value), bounds, None if chance is None else float(chance), text, color)


def _cells(node: Node) -> list[Node]:
    found = node.get("by_length")
    return [cell for _, cell in found.items() if cell.number("length") is not None] if found is not None else []


def _by_length(task: str, rows: Sequence[tuple[str, int, Node]], lengths: Sequence[int]) -> Iterator[ByLength]:
    """The graded share, of likeliest answers or of tokens, and the loss of the right answers."""
    for metric, kind in (("choice_acc", "percent"), ("token_acc", "percent"), ("loss", "loss")):
        for run, _, node in rows:
            cells = {int(cell.value["length"]): cell for cell in _cells(node)}
            shown = []
            for length in lengths:
                value = cells[length].number(metric) if length in cells else None
                shown.append(None if value is None else (value, cells[length].interval(f"{metric}_interval")))
            if any(shown):
                yield ByLength(task, METRICS.get(metric, "loss of right answers"), run, kind, tuple(shown))
