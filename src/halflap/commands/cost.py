"""`--dry-run`: what a run would read, compute and hold, from the recipe and the model's config alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from halflap.commands import study
from halflap.commands.fleet import vllm_command
from halflap.commands.resolve import check_inputs, plan_of, shape_of
from halflap.inputs import size_of
from halflap.models.config import ModelConfig
from halflap.models.count import count_parameters, flops_per_token
from halflap.models.presets import PRESETS
from halflap.recipe import inputs_of, settings_of
from halflap.train.phases import Plan

PASSES = {"pretrain": 3, "distill": 3, "compress": 3}
"""Forward passes that a token costs its model: training costs a backward pass, which is two."""


def estimate(verb: str, recipe: Any) -> dict[str, Any]:
    """Bytes of input, parameters, tokens, floating-point operations and a floor for the memory; nothing is run.

    The student of `compress` is counted as its teacher, so its figures are upper bounds.
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
    result["parameters"] = count_parameters(main)
    phases = settings.get("phases")
    plan = plan_of(phases, recipe.fit, len(recipe.text.data)) if phases else None
    if tokens := plan.tokens if plan else settings.get("tokens"):
        length = settings.get("fit.sequence_length") or settings.get("sequence_length") or 2048
        result |= {"tokens": tokens, "flops": _flops(verb, main, shapes.get("teacher"), settings, tokens, length)}
    if plan:
        each = _flops(verb, main, shapes.get("teacher"), {}, 1, plan.sequence_length)
        result["phases"] = _phases(plan, each)
    result["memory_bytes"] = _memory(verb, main, shapes.get("teacher"))
    if verb == "serve":
        result["memory_bytes"] *= recipe.listening.replicas
    return result


def _study(recipe: Any) -> dict[str, Any]:
    """Each arm's share of the work over all seeds; what is cut from a teacher is counted as the teacher."""
    plan, shapes = study.arms_of(recipe)
    rows = []
    for name, shape in shapes.items():
        length, tokens, passes = plan.fit.sequence_length, plan.tokens, PASSES["pretrain"]
        if name in plan.compressions:
            arm = plan.compressions[name]
            own = plan.compressions[str(arm.of)] if arm.control not in (None, "scratch") else arm
            length, tokens = own.recipe.fit.sequence_length, own.recipe.tokens
            passes += arm.control != "scratch"  # the teacher's own
        flops = tokens * passes * flops_per_token(shape, length, "prefill")
        if plan.recall is not None:
            asked = plan.recall.steps * plan.fit.batch_size * plan.recall.length
            flops += asked * PASSES["pretrain"] * flops_per_token(shape, plan.recall.length, "prefill")
        row = {"arm": name, "parameters": count_parameters(shape), "tokens": len(plan.seeds) * tokens}
        rows.append(row | {"flops": len(plan.seeds) * flops})
    largest = max(shapes.values(), key=count_parameters)
    return {
        "seeds": list(plan.seeds),
        "parameters": count_parameters(largest),
        "tokens": sum(row["tokens"] for row in rows),
        "flops": sum(row["flops"] for row in rows),
        "arms": rows,
        "memory_bytes": recipe.workers * _memory("pretrain" if plan.teacher is None else "distill", largest, None),
    }


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


def _flops(
    verb: str, main: ModelConfig, teacher: ModelConfig | None, settings: dict[str, Any], tokens: int, length: int
) -> int:
    """Forward and backward passes over the tokens, the teacher's forward passes, and the calibration's."""
    total = tokens * flops_per_token(main, length, "prefill") * PASSES.get(verb, 1)
    if verb in ("distill", "compress"):
        total += tokens * flops_per_token(teacher or main, length, "prefill")
    passes = settings.get("calibration_tokens", 0) + PASSES["pretrain"] * settings.get("teacher_correction", 0)
    return total + passes * flops_per_token(main, length, "prefill")


def _memory(verb: str, main: ModelConfig, teacher: ModelConfig | None) -> int:
    """Float32 weights; with training also gradients and two moments; activations come on top."""
    held = count_parameters(main) * 4 * (4 if verb in PASSES else 1)
    return held + (count_parameters(teacher or main) * 4 if verb in ("distill", "compress") else 0)
