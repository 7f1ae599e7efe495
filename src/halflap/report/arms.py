"""The table of arms: models judged side by side on the same text, as `arms.json`, and as Markdown for a README.

    {"judged_on": "...", "interval": "95 % bootstrap over documents", "seeds": [1],
     "arms": [{"name", "description", "parameters", "loss_as_cut", "loss", "loss_ci": [low, high], "bits_per_byte",
               "perplexity", "tokens_trained", "seconds", "run", "role", "losses": [one a seed]}, ...]}

Losses are nats a token. `role` says what an arm is to the story; `run` is relative to the file.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from halflap.errors import HalflapError
from halflap.files import write_json
from halflap.report import units
from halflap.report.artifacts import Node

Role = Literal["teacher", "student", "pruned", "control"]


@dataclass(frozen=True)
class Arm:
    """One model and how it was judged; `tokens_trained` counts what its own training read, 0 for none.

    Of a teacher 0 means that nobody knows here what it was trained on.
    """

    name: str
    parameters: int
    loss: float
    loss_ci: tuple[float, float] | None = None
    bits_per_byte: float | None = None
    perplexity: float | None = None
    tokens_trained: int = 0
    seconds: float | None = None
    loss_as_cut: float | None = None
    description: str = ""
    role: Role = "control"
    run: str | None = None
    losses: tuple[float, ...] = ()


@dataclass(frozen=True)
class Arms:
    """Arms in the order they are shown; with several seeds `loss` is their mean and `loss_ci` their range."""

    arms: tuple[Arm, ...]
    seeds: tuple[int, ...] = field(default=())
    judged_on: str = ""
    interval: str = "95 % confidence interval"

    def save(self, path: Path) -> None:
        """Write `arms.json`, whole or not at all."""
        write_json(path, asdict(self))

    @staticmethod
    def load(path: Path) -> Arms:
        """Raise HalflapError when the file is not a table of arms."""
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise _not_arms(path, error) from None
        return read_arms(Node(path, data))


def read_arms(node: Node) -> Arms:
    """The table in an `arms.json`; names it does not know are passed over, a missing name, size or loss is an error."""
    data = node.value if isinstance(node.value, dict) else {}
    rows = data.get("arms")
    known = {f.name for f in fields(Arm)}
    try:
        arms = tuple(_arm({key: value for key, value in row.items() if key in known}) for row in rows or ())
    except (TypeError, ValueError, AttributeError) as error:
        raise _not_arms(node.path, error) from None
    texts = {key: data[key] for key in ("judged_on", "interval") if isinstance(data.get(key), str)}
    return Arms(arms, tuple(data.get("seeds") or ()), **texts)


def _not_arms(path: Path, error: Exception) -> HalflapError:
    needs = "it needs arms with name, parameters and loss: write it with Arms.save"
    return HalflapError(f"{str(path)!r} is not a table of arms ({error}); {needs}")


def _arm(values: dict[str, Any]) -> Arm:
    interval = values.get("loss_ci")
    values["loss_ci"] = (float(interval[0]), float(interval[1])) if interval else None
    values["losses"] = tuple(float(loss) for loss in values.get("losses") or ())
    return Arm(**values)


def across_seeds(tables: Sequence[Arms]) -> Arms:
    """One table from the tables of several seeds: means, and the range over the seeds as interval.

    Raises HalflapError when the tables do not hold the same arms.
    """
    names = [[arm.name for arm in table.arms] for table in tables]
    if not tables or any(other != names[0] for other in names[1:]):
        raise HalflapError(
            f"the tables hold different arms, {names}; every seed must run the same ones: repeat those missing"
        )
    arms = []
    for same in zip(*(table.arms for table in tables)):
        losses = tuple(arm.loss for arm in same)
        averaged = ("loss_as_cut", "bits_per_byte", "perplexity", "seconds")
        means = {name: _mean(getattr(arm, name) for arm in same) for name in averaged}
        low, high = min(losses), max(losses)
        arms.append(
            replace(same[0], loss=statistics.fmean(losses), loss_ci=(low, high), losses=losses, run=None, **means)
        )
    seeds = tuple(seed for table in tables for seed in table.seeds)
    return Arms(tuple(arms), seeds, tables[0].judged_on, f"range over {len(tables)} seeds")


def _mean(values: Any) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def arms_markdown(table: Arms) -> str:
    """The table as GitHub Markdown, with the interval's meaning as a line below it."""
    lines = [
        "| arm | parameters | tokens trained | loss as cut | held-out loss | interval | bits a byte | perplexity |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for arm in table.arms:
        name = f"**{arm.name}**" if arm.role == "student" else arm.name
        cells = (
            name + (f": {arm.description}" if arm.description else ""),
            units.count(arm.parameters),
            units.count(arm.tokens_trained) if arm.tokens_trained else "" if arm.role == "teacher" else "none",
            units.loss(arm.loss_as_cut) if arm.loss_as_cut is not None else "",
            units.loss(arm.loss),
            f"{units.loss(arm.loss_ci[0])} to {units.loss(arm.loss_ci[1])}" if arm.loss_ci else "",
            units.loss(arm.bits_per_byte) if arm.bits_per_byte is not None else "",
            units.perplexity(arm.perplexity) if arm.perplexity is not None else "",
        )
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    seeds = f" Seed{'s' if len(table.seeds) > 1 else ''} {', '.join(map(str, table.seeds))}." if table.seeds else ""
    judged = f" Judged on {table.judged_on}." if table.judged_on else ""
    text = "\n".join([*lines, "", f"Loss in nats a token; interval: {table.interval}.{judged}{seeds}"]) + "\n"
    return text.replace(units.SPACE, " ")
