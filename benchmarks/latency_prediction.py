"""How well a cost table predicts: predicted against measured seconds of a pass for random students, decode and prefill.

    python benchmarks/latency_prediction.py [--sizes 55m] [--contexts 512 4096] [--students 20]

For each teacher and condition the table is measured as `halflap bench --blocks` does. `equal` students draw every size
from what a search tries down to half of it, and lose up to a quarter of their blocks; `unequal` ones, as many, draw for
each block one of the variants of method puzzle: cut to as little as a tenth, windowed, key/value heads averaged,
linear, gone. They and the teacher take turns at being timed. `error` is |predicted / measured - 1|, `bias` the median
of predicted / measured - 1, of all students and of either kind; `fit` is the error of the table's own stacks, each left
out in turn.
"""

from __future__ import annotations

import random
import statistics
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common import SIZES, Report, arguments, interleave
from halflap.commands.timing import measure_costs, seconds_of
from halflap.compress.axes import Sizes, kept_after, resize
from halflap.compress.cost_model import Condition
from halflap.compress.cost_table import CostTable
from halflap.compress.costs import Budget
from halflap.compress.grid import SearchSpace, choices
from halflap.compress.library import library_of
from halflap.compress.programme import Programme, student_of
from halflap.models.config import ModelConfig
from halflap.models.count import count_parameters
from halflap.models.presets import preset

CPU = torch.device("cpu")


def random_student(teacher: ModelConfig, draw: random.Random) -> ModelConfig:
    """One of the sizes that a search would try on every axis, and random blocks gone."""
    space = SearchSpace(max_width_cut=0.5, max_depth_cut=0.25)
    sizes = {name: draw.choice(values) for name, values in choices(teacher, space, with_depth=True).items()}
    order = list(range(len(teacher.blocks)))
    draw.shuffle(order)
    chosen: dict[str, Any] = sizes
    return resize(teacher, kept_after(teacher, Sizes(**chosen), tuple(order)), Sizes(**chosen))


def unequal_students(teacher: ModelConfig, context: int, count: int) -> list[ModelConfig]:
    """Of all choices that the rules of puzzle's library allow the best by random scores, so that any may come."""
    library, draw = library_of(teacher, length=context), np.random.default_rng(0)
    programme, blocks = Programme(library, Budget(params=1e15)), library.covers.sum(0)
    found = []
    for _ in range(count):
        scores = draw.uniform(-1, 0, len(blocks)) * blocks  # so that what goes together goes as often
        (choice,) = programme.choices(scores, gap=1e-2)
        found.append(student_of(teacher, library.variants(choice.options)))
    return found


def main() -> None:
    defaults: dict[str, Any] = {"contexts": [512, 4096], "batches": [1, 8], "students": 20}
    chosen = arguments(__doc__, quick={"sizes": ["tiny"], "contexts": [32], "batches": [1], "students": 3}, **defaults)
    report = Report("latency_prediction", chosen.out, chosen.threads)
    for size in chosen.sizes:
        teacher = preset(SIZES.get(size, f"nemotron-h-{size}"))
        draw = random.Random(size)
        equal = [random_student(teacher, draw) for _ in range(chosen.students)]
        conditions = [
            Condition(phase, context, batch)
            for phase in ("decode", "prefill")
            for context in chosen.contexts
            for batch in chosen.batches
        ]
        for condition in conditions:
            unequal = unequal_students(teacher, condition.context, chosen.students)
            models = {"teacher": teacher}
            models |= {f"equal {number}": student for number, student in enumerate(equal)}
            models |= {f"unequal {number}": student for number, student in enumerate(unequal)}
            with tempfile.TemporaryDirectory() as place:
                table = measure_costs(teacher, [condition], CPU, "float32", Path(place) / "costs.json", chosen.repeats)
            found, rows = errors(models, condition, table, chosen.repeats)
            report.add(size=size, **vars(condition), **found)
            report.rows[-1]["models"] = rows
    report.write()


def errors(
    models: dict[str, ModelConfig], condition: Condition, table: CostTable, repeats: int
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """How far predictions are off the median time of each model in turns, and the times."""
    taken: dict[str, list[float]] = {name: [] for name in models}

    def timed(name: str) -> None:
        taken[name].append(seconds_of(models[name], condition, CPU, "float32"))

    interleave({name: lambda name=name: timed(name) for name in models}, repeats, warm_up=0)
    rows = []
    for name, config in models.items():
        measured, predicted = statistics.median(taken[name]), table.seconds(config, condition)
        size = {"parameters": count_parameters(config), "blocks": len(config.blocks)}
        spread = max(taken[name]) - min(taken[name])
        rows.append({"name": name, **size, "seconds": measured, "seconds_spread": spread, "predicted": predicted})
    off = {row["name"]: row["predicted"] / row["seconds"] - 1 for row in rows if row["name"] != "teacher"}
    found = summary("", list(off.values()))
    for kind in ("equal", "unequal"):
        found |= summary(f"{kind}_", [error for name, error in off.items() if name.startswith(kind)])
    costs = table.models[condition]
    return found | {
        "fit_median_error": costs.median_error,
        "fit_worst_error": costs.worst_error,
        "whole_over_sum": costs.scale,
    }, rows


def summary(prefix: str, off: list[float]) -> dict[str, float]:
    return {
        f"{prefix}median_error": statistics.median(map(abs, off)),
        f"{prefix}worst_error": max(map(abs, off)),
        f"{prefix}bias": statistics.median(off),
    }


if __name__ == "__main__":
    main()
