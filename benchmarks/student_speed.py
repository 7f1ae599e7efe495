"""Students of half the parameters against their teacher, random weights, our engine: prefill and decode.

A student has the likeliest sizes that a search would try for its budgets: half of the parameters (`params`), and with
it half of the time of a step at batch 1 by a table that is measured here (`params and latency`). All are measured as
`halflap bench` does, in turns. `share` is the speed-up as a part of the ratio of parameters: 1 where a model of half
the weights is twice as fast. `spread` is the interquartile range of a rate.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch

from common import Report, arguments, our_model, random_model
from halflap.commands.timing import measure_costs
from halflap.compress.axes import kept_after, resize
from halflap.compress.cost_model import Condition
from halflap.compress.costs import Budget
from halflap.compress.space import fitting
from halflap.evaluate.bench import bench_in_turns
from halflap.models.config import ModelConfig
from halflap.models.count import count_parameters


def students_of(teacher: ModelConfig, context: int, dtype: str) -> dict[str, ModelConfig]:
    half, step = 0.5 * count_parameters(teacher), Condition("decode", context, 1)
    with tempfile.TemporaryDirectory() as place:
        table = measure_costs(teacher, [step], torch.device("cpu"), dtype, Path(place) / "costs.json")
    faster = Budget(params=half, latency=0.5 * table.seconds(teacher, step), context=context, table=table)
    budgets = {"params": Budget(params=half), "params and latency": faster}
    return {name: likeliest(teacher, budget) for name, budget in budgets.items()}


def likeliest(teacher: ModelConfig, budget: Budget) -> ModelConfig:
    order = tuple(range(len(teacher.blocks)))
    sizes = fitting(teacher, budget, drop_order=order).candidates[0].sizes
    return resize(teacher, kept_after(teacher, sizes, order), sizes)


def main() -> None:
    defaults: dict[str, Any] = {"prompt": 2048, "output": 128, "batches": [1, 8], "dtype": "float32"}
    chosen = arguments(__doc__, quick={"sizes": ["55m"], "prompt": 32, "output": 4, "batches": [1]}, **defaults)
    report = Report("student_speed", chosen.out, chosen.threads)
    for size in chosen.sizes:
        teacher = our_model(size)
        students = students_of(teacher.config, chosen.prompt, chosen.dtype)
        models = {"teacher": teacher} | {name: random_model(student) for name, student in students.items()}
        models = {name: model.to(getattr(torch, chosen.dtype)).eval() for name, model in models.items()}
        for batch in chosen.batches:
            taken = bench_in_turns(
                {name: lambda model=model: model for name, model in models.items()},
                [chosen.prompt], [chosen.output], [batch], rounds=chosen.repeats,
            )  # fmt: skip
            for name in students:
                for phase in ("prefill", "decode"):
                    add_cell(report, phase, models["teacher"], models[name], taken["teacher"][0], taken[name][0],
                             size=size, budget=name, batch=batch, prompt=chosen.prompt, output=chosen.output,
                             dtype=chosen.dtype)  # fmt: skip
    report.write()


def add_cell(
    report: Report, phase: str, teacher: Any, student: Any, slow: dict[str, Any], fast: dict[str, Any], **cell: Any
) -> None:
    """slow, fast: the rows of `bench` of the two."""
    rate = f"{phase}_tokens_per_second"
    ratio = count_parameters(teacher.config) / count_parameters(student.config)
    speed_up = fast[rate] / slow[rate]
    report.add(
        **cell, phase=phase, parameter_ratio=ratio, speed_up=speed_up, share=speed_up / ratio,
        teacher_tokens_per_second=slow[rate], teacher_spread=slow[f"{rate}_spread"],
        student_tokens_per_second=fast[rate], student_spread=fast[f"{rate}_spread"],
    )  # fmt: skip
    report.rows[-1]["sizes"] = {
        name: {"parameters": count_parameters(model.config), "blocks": len(model.config.blocks),
               "hidden_size": model.config.hidden_size}
        for name, model in (("teacher", teacher), ("student", student))
    }  # fmt: skip


if __name__ == "__main__":
    main()
