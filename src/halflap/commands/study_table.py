"""The table of a study: each arm's numbers over the seeds and against other arms, with its speed where that was asked.

Speed is measured after all training, alone on the machine, the arms in turns.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from halflap.checkpoints.checkpoint import load_model
from halflap.checkpoints.config import read_config, read_json
from halflap.commands.evaluate import speed_of
from halflap.commands.study_file import Speed, Study
from halflap.commands.study_readings import MEASURES
from halflap.compress.cost_model import Condition
from halflap.compress.cost_table import CostTable
from halflap.evaluate.bench import bench_in_turns
from halflap.evaluate.paired import paired
from halflap.models.count import cache_bytes, count_non_embedding_parameters, count_parameters
from halflap.report.arms import Arm, Arms
from halflap.run import Run

STATE_BITS = {"kv_bits": 32, "ssm_bits": 32, "conv_bits": 32}  # speed is measured in float32
SPEEDS = ("prompt", "output", "batch", "prefill_tokens_per_second", "decode_tokens_per_second", "cache_bytes")

Results = Mapping[str, Sequence[Mapping[str, Any]]]
"""Of every arm, one a seed: its measures, `run` (whose metrics.jsonl has its training, as `role` if it has others too)
and `checkpoint`."""


def rows_of(run: Run, plan: Study, results: Results, times: tuple[CostTable, Condition] | None) -> list[dict[str, Any]]:
    """A row an arm; with a cost table each has its predicted latency too."""
    if times is not None:
        table, condition = times
        seconds = lambda result: table.seconds(read_config(result["checkpoint"]), condition)
        results = {
            arm: [{**one, "latency_seconds": seconds(one)} for one in results_of] for arm, results_of in results.items()
        }
    speed = {} if plan.speed is None else _speed(run, results, plan.speed)
    return [_row(run, plan, arm, results) | _speeds(results[arm][0], speed.get(arm)) for arm in results]


def _row(run: Run, plan: Study, arm: str, results: Results) -> dict[str, Any]:
    """What an arm is, how good it is over the seeds, and how it differs from the baseline and from the arm before."""
    own = results[arm]
    configs = [read_config(result["checkpoint"]) for result in own]
    compared = {
        key: results[other]
        for key, other in (("baseline", plan.baseline), ("previous", plan.against.get(arm)))
        if other is not None and other != arm
    }
    row: dict[str, Any] = {
        "name": arm,
        "previous": plan.against.get(arm),
        "runs": [str(Path(result["run"]).resolve().relative_to(run.path.resolve())) for result in own],
        "role": own[0].get("role"),
        "pattern": configs[0].pattern(),
        "parameters": count_parameters(configs[0]),
        "parameters_by_seed": [count_parameters(config) for config in configs],
        "non_embedding_parameters": count_non_embedding_parameters(configs[0]),
        "tokens_trained": own[0]["tokens_trained"],
        "training_tokens_per_second": statistics.median(result["training_tokens_per_second"] for result in own),
        "seconds": statistics.median(result["seconds"] for result in own),
    }
    for name in MEASURES:
        if (values := _values(own, name)) is None:
            continue
        row |= over_seeds(name, values)
        for key, others in compared.items():
            if (theirs := _values(others, name)) is not None:
                row[f"{name}_against_{key}"] = dataclasses.asdict(paired(values, theirs))
    return row


def _values(results: Sequence[Mapping[str, Any]], name: str) -> list[float] | None:
    values = [result[name] for result in results if result.get(name) is not None]
    return values if len(values) == len(results) else None


def over_seeds(name: str, values: Sequence[float]) -> dict[str, Any]:
    """Mean, standard deviation (None of one seed) and the values, under the measure's name."""
    spread = statistics.stdev(values) if len(values) > 1 else None
    return {name: statistics.fmean(values), f"{name}_spread": spread, f"{name}_by_seed": list(values)}


# ---- speed


def _speed(run: Run, results: Results, grid: Speed) -> dict[str, Any]:
    """Prefill, decode and cache of every arm's first seed, in the form of `bench`; kept once measured."""
    file = run.path / "bench.json"
    if not file.exists():
        checkpoints = {arm: of_arm[0]["checkpoint"] for arm, of_arm in results.items()}
        models = {arm: partial(load_model, checkpoint, "float32") for arm, checkpoint in checkpoints.items()}
        rows = bench_in_turns(models, grid.prompt, grid.output, grid.batch, repeats=3)
        cpu = torch.device("cpu")
        speeds = {arm: speed_of(read_config(checkpoints[arm]), cpu, of_arm) for arm, of_arm in rows.items()}
        run.save_json(file.name, speeds)
    return read_json(file)


def _speeds(result: Mapping[str, Any], speed: Mapping[str, Any] | None) -> dict[str, Any]:
    """Those at the longest text, and what its cache is counted to be."""
    if speed is None:
        return {}
    longest = max(speed["rows"], key=lambda cell: (cell["prompt"] + cell["output"], cell["batch"]))
    held = longest["prompt"] + longest["output"]
    counted = cache_bytes(read_config(result["checkpoint"]), held, longest["batch"], **STATE_BITS)
    return {name: longest[name] for name in SPEEDS} | {"cache_bytes_counted": counted}


# ---- arms.json


def write_arms(
    run: Run, plan: Study, rows: Sequence[Mapping[str, Any]], judged_on: str, teacher: Mapping[str, Any] | None
) -> None:
    """The table that pages show, the teacher first."""
    first = [] if teacher is None else [Arm(name="teacher", role="teacher", **_numbers(teacher))]
    arms = [
        Arm(
            name=row["name"],
            **_numbers(row),
            loss_ci=(min(row["loss_by_seed"]), max(row["loss_by_seed"])),
            seconds=row["seconds"],
            loss_as_cut=row.get("loss_as_cut"),
            description=row["pattern"] if len(row["pattern"]) <= 16 else f"{row['pattern'][:16]}…",
            run=row["runs"][0],
            losses=tuple(row["loss_by_seed"]),
        )
        for row in rows
    ]
    seeds = f"range over {len(plan.seeds)} seeds"
    Arms((*first, *arms), plan.seeds, judged_on, seeds).save(run.path / "arms.json")


def _numbers(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: row[name] for name in ("parameters", "loss", "bits_per_byte", "perplexity", "tokens_trained")}
