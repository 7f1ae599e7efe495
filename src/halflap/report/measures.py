"""Candidates of the search, loss curves and speed, picked out of search.json, metrics.jsonl and bench.json."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from halflap.report import units
from halflap.report.artifacts import Fact, Node, RunFiles, derive
from halflap.report.plots import CandidatePoint, Curve, thinned

COLORS = 6
SIZES = {
    "num_blocks": "blocks",
    "hidden_size": "hidden",
    "intermediate_size": "neurons",
    "mamba_num_heads": "Mamba heads",
    "mamba_head_dim": "channels",
    "ssm_state_size": "state",
    "num_attention_heads": "query heads",
    "num_key_value_heads": "key/value heads",
}


# ---- candidates


@dataclass(frozen=True)
class Candidate:
    """One row of the search: its sizes, and its losses as cut and after the short distillation."""

    number: int
    sizes: str
    parameters: Fact
    zero_shot: Fact | None
    refined: Fact | None
    chosen: bool

    @property
    def best(self) -> float:
        found = self.refined or self.zero_shot
        return math.inf if found is None else float(found)

    def point(self) -> CandidatePoint:
        parts = [f"{units.count(float(self.parameters))} parameters"]
        parts += [f"{units.loss(float(self.zero_shot))} as cut"] if self.zero_shot else []
        parts += [f"{units.loss(float(self.refined))} after distillation"] if self.refined else []
        zero_shot, refined = (float(fact) if fact is not None else None for fact in (self.zero_shot, self.refined))
        detail = f"{', '.join(parts)}; {self.sizes}"
        return CandidatePoint(
            f"Candidate {self.number}", float(self.parameters), zero_shot, refined, self.chosen, detail
        )


def read_candidates(runs: Sequence[RunFiles]) -> tuple[Node, list[Candidate]] | None:
    """The candidates of the first search.json, the chosen one first, then by loss."""
    for run in runs:
        node = run.document("search.json")
        rows = node.get("candidates") if node is not None else None
        if node is None or rows is None:
            continue
        found = [_candidate(int(key) + 1, row) for key, row in rows.items()]
        known = [candidate for candidate in found if candidate is not None]
        return node, sorted(
            known, key=lambda candidate: (not candidate.chosen, candidate.refined is None, candidate.best)
        )
    return None


def _candidate(number: int, row: Node) -> Candidate | None:
    parameters = (row.get("costs") or row).number("params", "parameters")
    if parameters is None:
        return None
    chosen = row.fact("chosen")
    sizes = describe_sizes(row.get("sizes") or row)
    return Candidate(
        number, sizes, parameters, row.number("loss"), row.number("refined_loss"), bool(chosen and chosen.value)
    )


def describe_sizes(node: Node) -> str:
    """The sizes that a candidate sets, in a line."""
    parts = [f"{node.value[name]:,} {word}" for name, word in SIZES.items() if isinstance(node.value.get(name), int)]
    dropped = node.get("drop_blocks")
    if dropped is not None and isinstance(dropped.value, list) and dropped.value:
        parts.append(f"without block{'s' if len(dropped.value) > 1 else ''} {', '.join(map(str, dropped.value))}")
    return ", ".join(parts) or "as the teacher"


# ---- loss curves


@dataclass(frozen=True)
class Series:
    """One run's losses: `train` and `held_out` curves in nats a token, and their last values as facts."""

    name: str
    color: int
    curves: tuple[Curve, ...]
    first: Fact | None
    last_train: Fact | None
    last_held_out: Fact | None
    tokens: Fact
    divergence: bool


def read_series(runs: Sequence[tuple[str, RunFiles]]) -> list[Series]:
    """Every series of every run's metrics.jsonl that has losses against tokens; `runs` are (shown name, files)."""
    found = []
    for shown, run in runs:
        groups: dict[tuple[str, ...], list[Node]] = {}
        for row in run.metrics:
            if row.number("tokens") is not None:
                key = tuple(str(value) for value in row.value.values() if isinstance(value, str))
                groups.setdefault(key, []).append(row)
        for key, rows in groups.items():
            name = shown if len(groups) == 1 else f"{shown}, {' '.join(key)}" if key else shown
            series = _series(name, rows, len(found) % COLORS)
            if series is not None:
                found.append(series)
    return found


def _series(name: str, rows: Sequence[Node], color: int) -> Series | None:
    held_out = [(row, fact) for row in rows if (fact := row.number("held_out_loss")) is not None]
    train = [(row, fact) for row in rows if (fact := row.number("loss")) is not None]
    divergence = any(row.number(key) is not None for row, _ in train[:1] for key in ("kl", "forward_kl", "divergence"))
    # What a distilled student minimises is a divergence, which does not belong on the axis of next-token losses.
    plain = [(row, fact) for row in rows if (fact := row.number("next_token_loss", "cross_entropy")) is not None]
    shown = plain if divergence else train
    curves = [
        Curve(
            name, split, thinned([(float(row.number("tokens") or math.nan), float(fact)) for row, fact in pairs]), color
        )
        for split, pairs in (("train", shown), ("held-out", held_out))
        if len(pairs) > (0 if split == "held-out" else 1)
    ]
    if not train and not held_out:
        return None
    tokens = rows[-1].number("tokens")
    assert tokens is not None
    first = held_out[0][1] if held_out else None
    last_held_out = held_out[-1][1] if held_out else None
    return Series(name, color, tuple(curves), first, train[-1][1] if train else None, last_held_out, tokens, divergence)


# ---- speed


@dataclass(frozen=True)
class SpeedRow:
    """One cell of the grid with each model's numbers, in the order of `Speed.models`."""

    prompt: int
    output: int
    batch: int
    dtype: str
    cells: tuple[dict[str, Fact | None], ...]


@dataclass(frozen=True)
class Speed:
    """bench.json side by side: `metrics` are (key, heading, format, higher is better)."""

    models: tuple[str, ...]
    rows: tuple[SpeedRow, ...]
    hardware: str
    kernels: str
    metrics: tuple[tuple[str, str, str, bool], ...]

    def ratio(self, row: SpeedRow, key: str) -> Fact | None:
        """The last model's number over the first's."""
        first, last = row.cells[0].get(key), row.cells[-1].get(key)
        if len(row.cells) < 2 or first is None or last is None or not float(first):
            return None
        return derive(float(last) / float(first), last, first)


METRICS: tuple[tuple[str, str, str, bool], ...] = (
    ("prefill_tokens_per_second", "Prefill", "rate", True),
    ("decode_tokens_per_second", "Decode", "rate", True),
    ("time_to_first_token_ms", "First token after", "milliseconds", False),
    ("peak_memory_bytes", "Peak memory", "size", False),
    ("cache_bytes", "Cache", "size", False),
)


def read_speed(runs: Sequence[RunFiles]) -> Speed | None:
    """All bench.json of the runs side by side; the teacher first when one is named so."""
    tables = [
        table for run in runs if (node := run.document("bench.json")) is not None for table in _tables(run.name, node)
    ]
    if not tables:
        return None
    tables.sort(key=lambda table: table[0] != "teacher")
    names = tuple(name for name, _ in tables)
    cells: dict[tuple[int, int, int, str], list[Node | None]] = {}
    for position, (_, table) in enumerate(tables):
        for _, row in table.get("rows").items():  # type: ignore[union-attr]
            prompt, output, batch = (int(row.value.get(name) or 0) for name in ("prompt", "output", "batch"))
            cells.setdefault((prompt, output, batch, row.text("dtype") or ""), [None] * len(tables))[position] = row
    rows = tuple(
        SpeedRow(
            *key,
            tuple(
                {name: _metric(node, name) for key, *_ in METRICS for name in (key, f"{key}_spread")} for node in nodes
            ),
        )
        for key, nodes in sorted(cells.items())
    )
    shown = tuple(
        metric for metric in METRICS if any(cell[metric[0]] is not None for row in rows for cell in row.cells)
    )
    return Speed(names, rows, _words(tables[0][1], "hardware"), _words(tables[0][1], "kernels"), shown)


def _tables(name: str, node: Node) -> Iterator[tuple[str, Node]]:
    if node.get("rows") is not None:
        yield node.text("model_name") or name, node
        return
    for key, child in node.items():
        if child.get("rows") is not None:
            yield key, child


def _metric(row: Node | None, name: str) -> Fact | None:
    return row.number(name) if row is not None else None


def _words(node: Node, key: str) -> str:
    found = node.get(key)
    if found is None:
        return ""
    if isinstance(found.value, dict):
        return ", ".join(f"{name.replace('_', ' ')} {units.plain(child.value)}" for name, child in found.items())
    return str(found.value)
