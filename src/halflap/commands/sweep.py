"""`search --sweep`: one search for each of several values of a budget, and the best of each in one search.json.

What is best within a tight value may beat all that was tried within a looser one, which it also keeps; then it is the
best of both.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from halflap.amounts import Unit, parse_amount
from halflap.checkpoints.config import read_json
from halflap.commands.sections import Budgets
from halflap.commands.students import BLOCKS
from halflap.compress.costs import BUDGETS
from halflap.compress.search import Order, SearchResult, lowest_first
from halflap.errors import HalflapError, RecipeError
from halflap.files import write_json
from halflap.recipe import FASTEST

SWEEP = "sweep"
OF_UNIT: dict[str, Unit] = {"memory": "bytes", "latency": "seconds", "throughput": "rate"}
"""Units of the budgets that are no counts."""


def budgets_of(sweep: tuple[str, ...], beside: Budgets, flag: str = SWEEP) -> dict[str, Budgets]:
    """The budgets of each value by its spelling; those given `beside` are kept at every value. Empty without a sweep.

    flag: which gave them. Raises RecipeError for a budget that does not exist or is given beside, and for values that
    are none of its kind.
    """
    if not sweep:
        return {}
    name, values = sweep[0].replace("-", "_"), sweep[1:]
    if name not in BUDGETS or not values:
        what = f"{sweep[0]!r} is no budget" if name not in BUDGETS else "it names no value"
        raise RecipeError(
            f"{flag} is {' '.join(sweep)!r}, and {what}; write one of {', '.join(BUDGETS)} and its values: "
            f"--{flag} params 40% 50% 60%"
        )
    if getattr(beside, name) is not None:
        given = f"--{name.replace('_', '-')}"
        raise RecipeError(f"--{flag} has values of {name}, which is also given as {given}; leave out one of the two")
    try:
        most = FASTEST if name == "throughput" else 1.0
        amounts = [parse_amount(value, OF_UNIT.get(name, "count"), largest_share=most) for value in values]
    except HalflapError as error:
        raise RecipeError(f"{flag}: {error}") from None
    if any(amount.value <= 0 for amount in amounts):
        raise RecipeError(f"{flag} is {' '.join(sweep)!r}, and a budget is above 0: leave out the values that are not")
    changes: list[dict[str, Any]] = [{name: amount} for amount in amounts]
    return {str(change[name]): dataclasses.replace(beside, **change) for change in changes}


def place_of(directory: Path, value: str) -> Path:
    """Where the search of a value keeps its files."""
    return directory / SWEEP / value


def blocks_beside(search: Path) -> Path | None:
    """The run in which the blocks of a search.json were trained, itself or the sweep it belongs to; None without.

    Raises HalflapError when the search trained some and they are not there.
    """
    place = search.resolve().parent
    sweep = [place.parents[1]] if place.parent.name == SWEEP else []
    found = next((run for run in (place, *sweep) if (run / BLOCKS).is_dir()), None)
    if found is None and _trained_blocks(search):
        raise HalflapError(
            f"the blocks that {str(search)!r} trained are not beside it, in {BLOCKS}/; prune it where it was written, "
            "or move that directory as a whole"
        )
    return found


def _trained_blocks(search: Path) -> bool:
    data = read_json(search)
    settings = (data.get("made_from") or {}).get("settings") or {}
    return bool(settings.get("block_tokens"))


def combined(
    budget: str,
    found: Mapping[str, SearchResult],
    ceilings: Mapping[str, Mapping[str, float]],
    order: Order,
    directory: Path,
    tolerance: float = 0.0,
) -> dict[str, Any]:
    """All scored candidates, each value's best marked as chosen, and those bests by value; kept as search.json.

    ceilings: of each value, cost name to limit; order: the method's; tolerance: of losses that are equal. A best's
    `path` is the search that found it.
    """
    rows: list[dict[str, Any]] = []
    places: dict[str, int] = {}  # of each value's own best
    for value, result in found.items():
        places[value] = len(rows)
        scored = [row for row in result.to_json()["candidates"] if row["loss"] is not None]
        rows += [row | {"value": value, "chosen": False} for row in scored]
    best = []
    for value, result in found.items():
        winner = _best_within(value, found, ceilings[value], order, tolerance)
        rows[places[winner]]["chosen"] = True
        remark = result.remark if winner == value else f"its own best is behind that of {winner}"
        path = str(place_of(directory, winner) / "search.json")
        best.append({"value": value, "candidate": places[winner], "path": path, "remark": remark})
    first = next(iter(found.values())).to_json()
    data = {
        "format": first["format"],
        "made_from": {**first["made_from"], "budgets": {v: dict(r.made_from)["budgets"] for v, r in found.items()}},
        "tried": sum(result.tried for result in found.values()),
        "remark": "; ".join(f"{row['value']}: {row['remark']}" for row in best if row["remark"]) or None,
        "candidates": rows,
        "plan": None,
        "sweep": {"budget": budget.replace("-", "_"), "values": best},
    }
    write_json(directory / "search.json", data)
    return data


def _best_within(
    value: str, found: Mapping[str, SearchResult], limits: Mapping[str, float], order: Order, tolerance: float
) -> str:
    """The value whose search chose the best student within the limits of `value`.

    Only students that were distilled alike are compared, or as cut those that were not distilled.
    """
    own = found[value].chosen

    def may_take(other: str) -> bool:
        trial = found[other].chosen
        alike = [done.tokens for done in trial.rounds] == [done.tokens for done in own.rounds]
        return alike and all(trial.costs[name] <= limit for name, limit in limits.items())

    rivals = [value, *(other for other in found if other != value and may_take(other))]
    trials = [found[other].chosen for other in rivals]
    ranked = lowest_first(trials, lambda trial: trial.last_loss, tolerance) if own.rounds else order(trials, tolerance)
    return rivals[next(place for place, trial in enumerate(trials) if trial is ranked[0])]
