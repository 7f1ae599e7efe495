"""Times on this device: the cost table of a model, and how long a student really takes beside what was predicted."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from halflap import environment
from halflap.amounts import Amount
from halflap.checkpoints.checkpoint import Checkpoint, float_dtype
from halflap.checkpoints.config import read_json
from halflap.commands.config import BenchRecipe
from halflap.commands.device import check_memory, choose_device, choose_dtype
from halflap.commands.resolve import shape_of
from halflap.commands.sections import Budgets
from halflap.commands.students import Teacher, budget_of
from halflap.commands.tables import fit_text
from halflap.compress.cost_model import Condition
from halflap.compress.cost_table import CostTable
from halflap.compress.costs import Budget
from halflap.errors import RecipeError
from halflap.evaluate import block_times
from halflap.files import write_json
from halflap.inference.generate import require_positions
from halflap.models.config import ModelConfig
from halflap.models.model import HybridModel, initialize
from halflap.models.quantization import weight_bytes
from halflap.ops import select
from halflap.progress import say
from halflap.run import Run
from halflap.train.numerics import free_memory

COSTS = "costs.json"
ROUNDS = 3
LEAST_ROUNDS, MOST_ROUNDS, SECONDS_IN_TURNS = 3, 11, 20.0
"""Models that are compared take turns until so many seconds and the fewest rounds are over."""
BURST = 0.1  # seconds
SHARE_OF_MEMORY = 0.5
"""Of what is free, up to which compared models are held together; the rest is for their activations."""


def machine(device: torch.device, dtype: str) -> dict[str, Any]:
    """What a time depends on beside the model."""
    cuda = device.type == "cuda"
    return {
        "device": device.type,
        "name": torch.cuda.get_device_name(device) if cuda else environment.processor(),
        "threads": None if cuda else torch.get_num_threads(),
        "dtype": dtype,
        "kernels": "/".join(sorted(set(select.names(device.type).values()))),
        "torch": torch.__version__,
    }


def random_model(config: ModelConfig, dtype: torch.dtype, device: torch.device, seed: int = 0) -> HybridModel:
    """A model of a shape with random weights, built in `dtype` so that memory never holds more."""
    with torch.device("meta"):
        model = HybridModel(config).to(dtype)
    model.to_empty(device=device)
    initialize(model, seed)
    return model.eval()


def timer_of(config: ModelConfig, condition: Condition, device: torch.device, dtype: str) -> Callable[[float], float]:
    """Times passes of a model of this shape; how fast it is does not depend on what its weights are."""
    return block_times.timer_of(random_model(config, float_dtype(dtype), device), condition)


def seconds_of(config: ModelConfig, condition: Condition, device: torch.device, dtype: str) -> float:
    """A pass of a model of this shape."""
    return timer_of(config, condition, device, dtype)(block_times.SECONDS)


def in_turns(
    configs: Mapping[str, ModelConfig], condition: Condition, device: torch.device, dtype: str
) -> dict[str, list[float]]:
    """Seconds of a pass of each, one a round: short bursts, so that a slow minute hits all of them alike.

    Models stay in memory between rounds where all of them fit.
    """
    width = float_dtype(dtype).itemsize
    held = sum(block_times.pass_bytes(config, condition, width) for config in configs.values())
    fit = held < SHARE_OF_MEMORY * free_memory(device)
    kept: dict[str, Callable[[float], float]] = {}
    times: dict[str, list[float]] = {name: [] for name in configs}
    started = time.monotonic()
    for turn in range(MOST_ROUNDS):
        if turn >= LEAST_ROUNDS and time.monotonic() - started > SECONDS_IN_TURNS:
            break
        for name, config in configs.items():
            timer = kept.get(name) or timer_of(config, condition, device, dtype)
            times[name].append(timer(BURST))
            if fit:
                kept[name] = timer
            del timer  # else it would keep its model while the next is made
    return times


def has_room(teacher: Teacher, condition: Condition) -> bool:
    """Whether a pass of the teacher's shape can be timed while the teacher itself may be loaded."""
    moved = block_times.pass_bytes(teacher.config, condition, float_dtype(computed_in(teacher)).itemsize)
    return moved < SHARE_OF_MEMORY * free_memory(teacher.device)


def measure_costs(
    config: ModelConfig,
    conditions: Sequence[Condition],
    device: torch.device,
    dtype: str,
    path: str | Path,
    rounds: int = ROUNDS,
) -> CostTable:
    """The cost table of a model's blocks, kept in `path` while and after it is measured."""
    width = float_dtype(dtype).itemsize
    largest = max(block_times.pass_bytes(config, condition, width) for condition in conditions)
    check_memory(config, dtype, device, {"the cache": largest - weight_bytes(config, None, width)})
    require_positions(config, max(condition.context for condition in conditions), "the longest context has")
    cuda = device.type == "cuda"
    return block_times.measure(
        config,
        conditions,
        machine(device, dtype),
        lambda shape, condition: seconds_of(shape, condition, device, dtype),
        path,
        width=width,
        cache=torch.cuda.get_device_properties(device).L2_cache_size if cuda else environment.last_level_cache(),
        rounds=rounds,
    )


def computed_in(teacher: Teacher) -> str:
    """The dtype in which a teacher and its students run here."""
    dtype = choose_dtype(teacher.dtype, teacher.device)
    return teacher.checkpoint.dtype if dtype == "auto" else dtype


def table_for(budgets: Budgets, teacher: Teacher, place: Path) -> CostTable | None:
    """The table that a budget of time needs: the one named with --costs, or one measured now and kept in `place`.

    Of one that is measured it is said how far its fit is off.
    """
    condition = Condition(budgets.phase, budgets.context, budgets.batch)
    dtype = computed_in(teacher)
    if budgets.costs is not None:
        file = Path(budgets.costs) / COSTS if Path(budgets.costs).is_dir() else Path(budgets.costs)
        table = CostTable.load(file)
        table.check(str(file), machine(teacher.device, dtype), condition, teacher.config)
        return table
    if budgets.latency is None and budgets.throughput is None:
        return None
    table = measure_costs(teacher.config, [condition], teacher.device, dtype, place / COSTS)
    say(f"cost table {place / COSTS}: {fit_text(condition_row(table, condition))}")
    return table


def is_relative(budgets: Budgets, budget: Budget) -> bool:
    """Whether the ceiling on time is a share of the teacher's."""
    asked = getattr(budgets, budget.binding_time)
    return asked is not None and asked.share


def judge_latency(
    file: Path, budgets: Budgets, table: CostTable, teacher: Teacher, student: ModelConfig, predicted: float | None
) -> dict[str, Any]:
    """The student's and the teacher's pass, timed in turns, beside the prediction and the budget; kept in `file`.

    A share of the teacher's time is of the one that it takes in these turns.
    """
    if file.exists():
        return read_json(file)
    budget = budget_of(budgets, teacher.config, table)
    shapes = {"teacher": teacher.config, "student": student}
    times = in_turns(shapes, budget.condition, teacher.device, computed_in(teacher))
    ceiling = budget.ceilings.get("latency")
    if ceiling is not None and is_relative(budgets, budget):
        ceiling *= statistics.median(times["teacher"]) / table.seconds(teacher.config, budget.condition)
    found = latency_row(budget.condition, times, predicted or table.seconds(student, budget.condition), ceiling)
    write_json(file, found)
    return found


def latency_row(
    condition: Condition, times: Mapping[str, Sequence[float]], predicted: float, ceiling: float | None
) -> dict[str, Any]:
    """Seconds a pass, medians with the distance of the extremes as spread, and the student's throughput."""
    measured = statistics.median(times["student"])
    return {
        **vars(condition),
        "budget_seconds": ceiling,
        "within_budget": None if ceiling is None else measured <= ceiling,
        "predicted_seconds": predicted,
        "seconds": measured,
        "seconds_spread": max(times["student"]) - min(times["student"]),
        "teacher_seconds": statistics.median(times["teacher"]),
        "tokens_per_second": condition.tokens / measured,
    }


def excess(row: Mapping[str, Any], budgets: Budgets, table: CostTable, teacher: ModelConfig) -> str | None:
    """By how much a measured student exceeds its budget of time, and what then helps; None where it does not."""
    if row.get("within_budget") is not False:
        return None
    over, flag = row["seconds"] / row["budget_seconds"], budget_of(budgets, teacher, table).binding_time
    asked: Amount = getattr(budgets, flag)
    tighter = asked.value * over if flag == "throughput" else asked.value / over
    written = (
        f"{tighter:.3%}" if asked.share else f"{tighter:.4g}" if flag == "throughput" else f"{1e3 * tighter:.3g}ms"
    )
    return (
        f"the student's pass takes {over - 1:.1%} more than its budget ({1e3 * row['seconds']:,.3g} ms of "
        f"{1e3 * row['budget_seconds']:,.3g} ms, predicted {1e3 * row['predicted_seconds']:,.3g} ms): ask for as much "
        f"less (--{flag} {written}), or measure costs and student again on a device that does nothing else"
    )


def bench_blocks(recipe: BenchRecipe, run: Run) -> dict[str, Any]:
    """`bench --blocks`: measure and keep a cost table; how well it fits, and where the model's time goes."""
    if run.directory is None:
        raise RecipeError("bench --blocks measures for minutes and writes a cost table; say where with --out DIR")
    device, config = choose_device(recipe.common.device), shape_of(recipe.model)
    dtype = choose_dtype(recipe.common.dtype, device)
    if dtype == "auto":
        dtype = Checkpoint.open(recipe.model).dtype if Path(recipe.model).is_dir() else "float32"
    conditions = [Condition(*cell) for cell in itertools.product(recipe.phase, recipe.prompt, recipe.batch)]
    table = measure_costs(config, conditions, device, dtype, run.path / COSTS, recipe.repeats)
    return {
        "rows": [condition_row(table, condition) for condition in conditions],
        "hardware": dict(table.machine),
        "path": str(run.path / COSTS),
    }


def condition_row(table: CostTable, condition: Condition) -> dict[str, Any]:
    """The model's seconds, in all and by kind of block; errors of the fit, relative, over stacks that were left out."""
    costs = table.models[condition]
    return {
        **vars(condition),
        "seconds": table.seconds(table.model, condition),
        "stacks": len(table.rows[condition]) - 1,
        "median_error": costs.median_error,
        "worst_error": costs.worst_error,
        "whole_over_sum": costs.scale,
        "seconds_by_kind": costs.seconds_by_kind(table.model, condition),
    }
