"""A student of half the parameters against its teacher, random weights, our engine: prefill and decode.

The student has the likeliest sizes that a search would try for half of the parameters. Both are measured as `halflap
bench` does, in turns. `share` is the speed-up as a part of the ratio of their parameters: 1 where a model of half the
weights is twice as fast. `spread` is the interquartile range of a rate.
"""

from __future__ import annotations

from typing import Any

import torch

from common import Report, arguments, our_model, random_model
from halflap.compress.axes import kept_after, resize
from halflap.compress.costs import Budget
from halflap.compress.space import fitting
from halflap.evaluate.bench import bench_in_turns
from halflap.models.config import ModelConfig
from halflap.models.count import count_parameters


def half_of(teacher: ModelConfig) -> ModelConfig:
    order = tuple(range(len(teacher.blocks)))
    sizes = fitting(teacher, Budget(params=0.5 * count_parameters(teacher)), drop_order=order).candidates[0].sizes
    return resize(teacher, kept_after(teacher, sizes, order), sizes)


def main() -> None:
    defaults: dict[str, Any] = {"prompt": 2048, "output": 128, "batches": [1, 8], "dtype": "float32"}
    chosen = arguments(__doc__, quick={"sizes": ["55m"], "prompt": 32, "output": 4, "batches": [1]}, **defaults)
    report = Report("student_speed", chosen.out, chosen.threads)
    for size in chosen.sizes:
        teacher = our_model(size)
        models = {"teacher": teacher, "student": random_model(half_of(teacher.config))}
        models = {name: model.to(getattr(torch, chosen.dtype)).eval() for name, model in models.items()}
        parameters = {name: count_parameters(model.config) for name, model in models.items()}
        ratio = parameters["teacher"] / parameters["student"]
        for batch in chosen.batches:
            taken = bench_in_turns(
                {name: lambda model=model: model for name, model in models.items()},
                [chosen.prompt], [chosen.output], [batch], rounds=chosen.repeats,
            )  # fmt: skip
            for phase in ("prefill", "decode"):
                rate = f"{phase}_tokens_per_second"
                rates = {name: {"median": row[rate], "spread": row[f"{rate}_spread"]} for name, (row,) in taken.items()}
                speed_up = rates["student"]["median"] / rates["teacher"]["median"]
                report.add(
                    size=size, phase=phase, prompt=chosen.prompt, output=chosen.output, batch=batch,
                    dtype=chosen.dtype, parameter_ratio=ratio, speed_up=speed_up, share=speed_up / ratio,
                    **{f"{name}_tokens_per_second": of_side for name, of_side in rates.items()},
                )  # fmt: skip
                report.rows[-1]["parameters"] = parameters
    report.write()


if __name__ == "__main__":
    main()
