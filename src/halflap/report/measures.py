"""Candidates of the search, loss curves and speed, picked out of search.json, metrics.jsonl and bench.json."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from halflap.report import units
from halflap.report.artifacts import Fact, Node, RunFiles, derive
from halflap.report.plots import CandidatePoint, Curve, thinned

COLORS = 8
SIZES = {
    "num_blocks": "blocks",
    "num_mamba_blocks": "Mamba blocks",
    "num_attention_blocks": "attention blocks",
    "num_mlp_blocks": "MLP blocks",
    "hidden_size": "hidden",
    "intermediate_size": "neurons",
    "mamba_num_heads": "Mamba heads",
    "mamba_intermediate_size": "Mamba channels",
    "mamba_head_dim": "channels",
    "ssm_state_size": "state",
    "num_attention_heads": "query heads",
    "num_key_value_heads": "key/value heads",
}


# ---- candidates


class Swept(NamedTuple):
    """A cost in search.json, what its axis is called, and what its numbers are multiplied with there."""

    cost: str
    axis: str
    scale: float = 1.0


SWEPT = {
    "non_embedding_params": Swept("non_embedding_params", "parameters without embeddings"),
    "memory": Swept("memory", "MiB of memory", 2.0**-20),
    "flops": Swept("flops", "FLOPs a token"),
    "latency": Swept("latency", "ms a pass", 1e3),
    "throughput": Swept("latency", "ms a pass", 1e3),
}


@dataclass(frozen=True)
class Candidate:
    """One row of the search: its sizes, what it says as cut, and its losses as cut and after each short distillation.

    `accuracy` and `agreement` are shares of the text's and of the teacher's tokens; `rounds` are (tokens, loss);
    `swept` is the cost whose budget had several values, as `SWEPT` measures it.
    """

    number: int
    sizes: str
    parameters: Fact
    zero_shot: Fact | None
    refined: Fact | None
    chosen: bool
    accuracy: Fact | None = None
    agreement: Fact | None = None
    rounds: tuple[tuple[Fact, Fact], ...] = ()
    swept: float | None = None

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
        cost = float(self.parameters) if self.swept is None else self.swept
        return CandidatePoint(f"Candidate {self.number}", cost, zero_shot, refined, self.chosen, detail)


def read_candidates(runs: Sequence[RunFiles]) -> tuple[Node, list[Candidate]] | None:
    """The candidates of the first search.json, the chosen one first, then by loss."""
    for run in runs:
        node = run.document("search.json")
        rows = node.get("candidates") if node is not None else None
        if node is None or rows is None:
            continue
        found = [_candidate(int(key) + 1, row, swept_by(node)) for key, row in rows.items()]
        known = [candidate for candidate in found if candidate is not None]
        return node, sorted(
            known, key=lambda candidate: (not candidate.chosen, candidate.refined is None, candidate.best)
        )
    return None


def swept_by(node: Node) -> Swept | None:
    """The cost over which a sweep's candidates are compared; None of another search, and of parameters."""
    budget = node.get("sweep", "budget")
    return SWEPT.get(str(budget.value)) if budget is not None else None


def _candidate(number: int, row: Node, by: Swept | None) -> Candidate | None:
    costs = row.get("costs") or row
    parameters = costs.number("params", "parameters")
    if parameters is None:
        return None
    spent = costs.number(by.cost) if by is not None else None
    chosen = row.fact("chosen")
    variants = row.get("variants")
    if variants is not None and variants.value:
        sizes = describe_variants(variants)
    else:
        sizes = describe_sizes(row.get("sizes") or row)
    rounds = row.get("rounds")
    found = [(done.number("tokens"), done.number("loss")) for _, done in rounds.items()] if rounds is not None else []
    return Candidate(
        number,
        sizes,
        parameters,
        row.number("loss"),
        row.number("refined_loss"),
        bool(chosen and chosen.value),
        row.number("accuracy"),
        row.number("agreement"),
        tuple((tokens, loss) for tokens, loss in found if tokens is not None and loss is not None),
        None if spent is None or by is None else float(spent) * by.scale,
    )


def rounds_of(candidates: Sequence[Candidate]) -> list[tuple[int, float]]:
    """How many candidates took part in each round, and on how many tokens they had been distilled then."""
    most = max((one.rounds for one in candidates), key=len, default=())
    return [(sum(len(one.rounds) > place for one in candidates), float(done[0])) for place, done in enumerate(most)]


def describe_sizes(node: Node) -> str:
    """The sizes that a candidate sets, in a line."""
    parts = [f"{node.value[name]:,} {word}" for name, word in SIZES.items() if isinstance(node.value.get(name), int)]
    dropped = node.get("drop_blocks")
    if dropped is not None and isinstance(dropped.value, list) and dropped.value:
        parts.append(f"without block{'s' if len(dropped.value) > 1 else ''} {', '.join(map(str, dropped.value))}")
    return ", ".join(parts) or "as the teacher"


def describe_variants(node: Node) -> str:
    """What becomes of how many blocks, in a line."""
    counts = Counter(str(name).replace("_", " ") for name in node.value)
    return "; ".join(f"{count} blocks {name}" for name, count in counts.most_common())


# ---- loss curves

DIVERGENCES = ("forward_kl", "reverse_kl", "symmetric_kl", "jensen_shannon", "skew_kl", "skew_reverse_kl")
"""What a distilled student minimises: not a next-token loss, so it gets axes of its own."""


@dataclass(frozen=True)
class Series:
    """One training: its curves in nats a token, and their ends as facts; `divergence` names what `train` measures."""

    name: str
    color: int
    train: Curve | None
    held_out: Curve | None
    first: Fact | None
    last_train: Fact | None
    last_held_out: Fact | None
    tokens: Fact
    divergence: str | None


def read_series(runs: Sequence[tuple[str, RunFiles]]) -> list[Series]:
    """Every training in every run's metrics.jsonl; `runs` are (shown name, files).

    Rows of one training share their arm, else all their text values; rows without a step are no training.
    """
    trainings: list[tuple[str, str, list[Node]]] = []
    for shown, run in runs:
        groups: dict[str, list[Node]] = {}
        for row in run.metrics:
            if row.number("tokens") is not None and row.number("step") is not None:
                words = [row.text("arm")] if row.text("arm") else [v for v in row.value.values() if isinstance(v, str)]
                groups.setdefault(" ".join(map(str, words)).replace("_", " "), []).append(row)
        trainings += [(shown, title if len(groups) > 1 else "", rows) for title, rows in groups.items()]
    several = len({shown for shown, *_ in trainings}) > 1
    found: list[Series] = []
    for shown, title, rows in trainings:
        name = f"{shown}, {title}" if title and several else title or shown
        if (series := _series(name, rows, len(found) % COLORS)) is not None:
            found.append(series)
    return found


def _series(name: str, rows: Sequence[Node], color: int) -> Series | None:
    held_out = [(row, fact) for row in rows if (fact := row.number("held_out_loss")) is not None]
    train = [(row, fact) for row in rows if (fact := row.number("loss")) is not None]
    if not train and not held_out:
        return None
    divergence = next((key for key in DIVERGENCES if train and train[-1][0].number(key) is not None), None)
    tokens = rows[-1].number("tokens")
    assert tokens is not None
    return Series(
        name,
        color,
        _curve(name, "train", train, color),
        _curve(name, "held-out", held_out, color),
        held_out[0][1] if held_out else None,
        train[-1][1] if train else None,
        held_out[-1][1] if held_out else None,
        tokens,
        divergence,
    )


def _curve(name: str, split: str, pairs: Sequence[tuple[Node, Fact]], color: int) -> Curve | None:
    points = [(float(row.number("tokens") or math.nan), float(fact)) for row, fact in pairs]
    return Curve(name, split, thinned(points), color) if len(points) > 1 else None


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
    """bench.json side by side: `metrics` are (key, heading, format)."""

    models: tuple[str, ...]
    rows: tuple[SpeedRow, ...]
    hardware: str
    kernels: str
    metrics: tuple[tuple[str, str, str], ...]

    def ratio(self, row: SpeedRow, key: str) -> Fact | None:
        """The last model's number over the first's."""
        first, last = row.cells[0].get(key), row.cells[-1].get(key)
        if len(row.cells) < 2 or first is None or last is None or not float(first):
            return None
        return derive(float(last) / float(first), last, first)


METRICS: tuple[tuple[str, str, str], ...] = (
    ("prefill_tokens_per_second", "Prefill", "rate"),
    ("decode_tokens_per_second", "Decode", "rate"),
    ("time_to_first_token_ms", "First token after", "milliseconds"),
    ("peak_memory_bytes", "Peak memory", "size"),
    ("cache_bytes", "Cache", "size"),
)
GRID = ("prompt", "output", "batch")
NUMBERS = tuple(name for key, *_ in METRICS for name in (key, f"{key}_spread"))


def read_speed(runs: Sequence[RunFiles], teacher: Fact | None = None, student: Fact | None = None) -> Speed | None:
    """All bench.json of the runs side by side, the largest model first where they differ.

    A model with as many parameters as the teacher or the student is called so, any other by its run's name.
    """
    tables = [
        table for run in runs if (node := run.document("bench.json")) is not None for table in _tables(run.name, node)
    ]
    if not tables:
        return None
    sizes = [_size(table) for _, table in tables]
    if max(sizes) > 1.02 * min(sizes):  # arms of equal size keep their order
        tables.sort(key=lambda table: (table[0] != "teacher", -_size(table[1])))
    known = {_count(student): "student", _count(teacher): "teacher"}
    names = [known.get(_size(table), name) if _size(table) else name for name, table in tables]
    if len(set(names)) < len(names):
        names = [name for name, _ in tables]
    cells: dict[tuple[int, int, int, str], list[Node | None]] = {}
    for position, (_, table) in enumerate(tables):
        for _, row in table.get("rows").items():  # type: ignore[union-attr]
            prompt, output, batch = (int(fact.value) if (fact := row.number(name)) else 0 for name in GRID)
            cells.setdefault((prompt, output, batch, row.text("dtype") or ""), [None] * len(tables))[position] = row
    rows = tuple(
        SpeedRow(*key, tuple({name: _metric(node, name) for name in NUMBERS} for node in nodes))
        for key, nodes in sorted(cells.items())
    )
    shown = tuple(metric for metric in METRICS if any(cell[metric[0]] for row in rows for cell in row.cells))
    return Speed(tuple(names), rows, _hardware(tables[0][1]), _kernels(tables[0][1]), shown)


def _size(table: Node) -> float:
    return _count(table.number("parameters"))


def _count(fact: Fact | None) -> float:
    return 0.0 if fact is None else float(fact)


def _tables(name: str, node: Node) -> Iterator[tuple[str, Node]]:
    if node.get("rows") is not None:
        yield node.text("model_name") or name, node
        return
    for key, child in node.items():
        if child.get("rows") is not None:
            yield key, child


def _metric(row: Node | None, name: str) -> Fact | None:
    return row.number(name) if row is not None else None


def _hardware(node: Node) -> str:
    """The machine in words; of unknown forms whatever they say."""
    found = node.get("hardware")
    if found is None or not isinstance(found.value, dict):
        return "" if found is None else str(found.value)
    parts = [found.text("gpu") or found.text("processor") or ""]
    for key, word in (("cores", "cores"), ("threads", "threads")):
        if (number := found.number(key)) is not None:
            parts.append(f"{units.count(number.value)} {word}")
    if (memory := found.number("memory_bytes")) is not None:
        parts.append(f"{units.size(memory.value)} memory")
    return ", ".join(part for part in parts if part)


def _kernels(node: Node) -> str:
    """The kernels that were chosen, each named once."""
    found = node.get("kernels", "ops") or node.get("kernels")
    if found is None or not isinstance(found.value, dict):
        return "" if found is None else str(found.value)
    return ", ".join(sorted({str(value) for value in found.value.values() if isinstance(value, str) and value}))
