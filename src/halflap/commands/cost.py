"""`--dry-run`: what a run would read, compute and hold, from the recipe and the model's config alone."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path
from typing import Any

import torch

from halflap.checkpoints.config import find_directory, read_config
from halflap.commands import memory, operations, students, study
from halflap.commands.fleet import vllm_command
from halflap.commands.resolve import check_inputs, plan_of, shape_of
from halflap.commands.study_file import Study
from halflap.errors import HalflapError
from halflap.inputs import size_of
from halflap.models.config import ModelConfig
from halflap.models.count import count_parameters, flops_per_token
from halflap.models.presets import PRESETS
from halflap.recipe import Common, inputs_of, settings_of
from halflap.train.phases import Plan


def estimate(verb: str, recipe: Any) -> dict[str, Any]:
    """Bytes of input, parameters, tokens, floating-point operations and a floor for the memory; nothing is run.

    What is cut, by `search` and `compress`, is counted as its teacher, so that these figures are upper bounds.
    """
    check_inputs(recipe)
    if verb == "study":
        return {"verb": verb, **_study(recipe)}
    settings, inputs = settings_of(recipe), inputs_of(recipe)
    read = sum(size_of(Path(value)) for values in inputs.values() for value in values)
    result: dict[str, Any] = {"verb": verb, "input_bytes": read}
    if verb == "serve" and recipe.listening.engine == "vllm":
        result["command"] = vllm_command(recipe)
    names = {name: inputs[name][0] for name in ("model", "student", "shape", "teacher") if name in inputs}
    shapes = {name: shape_of(value) for name, value in names.items() if Path(value).is_dir() or value in PRESETS}
    if not shapes:
        return result
    main = next(iter(shapes.values()))
    if verb == "distill" and "teacher" not in shapes:
        with contextlib.suppress(HalflapError):  # the run itself says when there is none
            shapes["teacher"] = read_config(students.teacher_of(find_directory(recipe.student), None))
    result["parameters"] = count_parameters(main)
    phases = settings.get("phases")
    plan = plan_of(phases, recipe.fit, len(recipe.text.data)) if phases else None
    teacher = shapes.get("teacher")
    tokens = plan.tokens if plan else settings.get("tokens")
    if tokens:
        result["tokens"] = tokens
    if tokens or verb == "search":
        length = settings.get("fit.sequence_length") or settings.get("sequence_length") or 2048
        result["flops"] = operations.of(verb, recipe, main, teacher, tokens or 0, length)
    if plan:
        result["phases"] = _phases(plan, operations.of(verb, recipe, main, teacher, 1, plan.sequence_length))
    result["memory_bytes"] = _memory(verb, recipe, main, teacher)
    if verb == "serve":
        result["memory_bytes"] *= recipe.listening.replicas
    return result


def _study(recipe: Any) -> dict[str, Any]:
    """Each arm's share of the work over all seeds; what is cut from a teacher is counted as the teacher."""
    plan, shapes = study.arms_of(recipe)
    rows = []
    for name, shape in shapes.items():
        length, tokens, passes = plan.fit.sequence_length, plan.tokens, operations.TRAINING
        if name in plan.compressions:
            arm = plan.compressions[name]
            own = plan.compressions[str(arm.of)] if arm.control not in (None, "scratch") else arm
            length, tokens = own.recipe.fit.sequence_length, own.recipe.tokens
            passes += arm.control != "scratch"  # the teacher's own
        flops = tokens * passes * flops_per_token(shape, length, "prefill")
        if plan.recall is not None:
            asked = plan.recall.steps * plan.fit.batch_size * plan.recall.length
            flops += asked * operations.TRAINING * flops_per_token(shape, plan.recall.length, "prefill")
        row = {"arm": name, "parameters": count_parameters(shape), "tokens": len(plan.seeds) * tokens}
        rows.append(row | {"flops": len(plan.seeds) * flops})
    largest = max(shapes.values(), key=count_parameters)
    return {
        "seeds": list(plan.seeds),
        "parameters": count_parameters(largest),
        "tokens": sum(row["tokens"] for row in rows),
        "flops": sum(row["flops"] for row in rows),
        "arms": rows,
        "memory_bytes": recipe.workers * _memory_of_arm(recipe, plan, largest),
    }


def _memory_of_arm(recipe: Any, plan: Study, largest: ModelConfig) -> int:
    """Of an arm at a time: what is trained from scratch, or the most that a compression holds."""
    if plan.teacher is None:
        return _memory("pretrain", recipe, largest)
    recipes = [arm.recipe for arm in plan.compressions.values() if arm.control is None]
    return max(_memory("compress", dataclasses.replace(one, common=recipe.common), largest) for one in recipes)


def _phases(plan: Plan, each: int) -> list[dict[str, Any]]:
    """Each phase as one rank would run it: its tokens in whole steps, learning rates, blend and `each` token's work."""
    rows, before, first = [], 0, 0
    for number, (phase, end) in enumerate(zip(plan.phases, plan.ends, strict=True)):
        batches = [stretch for stretch in plan.stretches if stretch.phase == number]
        later = [stretch.step for stretch in plan.stretches if stretch.phase > number]
        stop = later[0] if later else plan.steps
        row: dict[str, Any] = {
            "phase": number,
            "tokens": end - before,
            "steps": stop - first,
            "batch_size": "-".join(dict.fromkeys(str(stretch.rows) for stretch in batches)),
            "first_learning_rate": plan.learning_rate(first),
            "last_learning_rate": plan.learning_rate(stop - 1),
        }
        if phase.weights is not None:
            row["blend"] = ":".join(f"{weight:g}" for weight in phase.weights)
        rows.append(row | {"flops": (end - before) * each})
        before, first = end, stop
    return rows


def _memory(verb: str, recipe: Any, main: ModelConfig, teacher: ModelConfig | None = None) -> int:
    """Weights as they are loaded; with training also gradients and two moments; activations come on top."""
    own, whole = count_parameters(main), count_parameters(teacher or main)
    width = 2 if _on_gpu(recipe.common) and recipe.common.dtype != "float32" else 4
    if verb == "distill":
        return memory.most(memory.distilling(whole, own, width, recipe.loss_settings))
    if verb == "compress":
        loss = recipe.loss_settings
        return memory.most(memory.compressing(whole, own, width, loss, bool(loss.teacher_correction)))
    return own * (memory.IN_TRAINING if verb == "pretrain" else 4)


def _on_gpu(common: Common) -> bool:
    return common.device == "cuda" or (common.device == "auto" and torch.cuda.is_available())
