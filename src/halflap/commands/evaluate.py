"""`evaluate` and `bench`: how good a model is, and how fast."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from halflap import environment
from halflap.checkpoints.checkpoint import Checkpoint, float_dtype, load_model
from halflap.checkpoints.config import find_directory, read_config, read_quantization
from halflap.checkpoints.streamed import AnyModel, StreamedModel
from halflap.commands import timing
from halflap.commands.config import BenchRecipe, EvaluateRecipe
from halflap.commands.corpora import tokenizer_place
from halflap.commands.device import check_memory, choose_device, choose_dtype, must_stream
from halflap.commands.resolve import shape_of
from halflap.data.tokenizer import Tokenizer
from halflap.errors import RecipeError
from halflap.evaluate import bench as benchmark
from halflap.evaluate.documents import Document, documents_of
from halflap.evaluate.held_out import evaluate_text
from halflap.evaluate.probes import is_probe, probe_names
from halflap.evaluate.recall import probe_lengths, run_probes, wilson
from halflap.models.config import ModelConfig
from halflap.models.count import cache_bytes, count_parameters
from halflap.models.model import HybridModel
from halflap.ops import select
from halflap.run import Run

SCRATCH = "scoring"
"""Folder of a run with what a streamed pass has so far."""
SHARES = ("acc", "acc_norm", "exact_match", "choice_acc", "token_acc")
"""Metrics of tasks that are means over items of what is right."""
NOT_MEASURED = {"loss": None, "perplexity": None, "bits_per_byte": None, "tokens": 0}


def evaluate(recipe: EvaluateRecipe, run: Run) -> dict[str, Any]:
    """Score held-out text, then tasks; `scores.json` holds the same as the result."""
    if not recipe.data and not recipe.eval_data and not recipe.tasks:
        raise RecipeError("nothing to judge on was given; name text (--data), tasks (--tasks), or both")
    directory = find_directory(recipe.model)
    probes = probe_names([name for name in recipe.tasks if is_probe(name)])
    others = [name for name in recipe.tasks if not is_probe(name)]
    tokenizer = _tokenizer(recipe, directory, needed=bool(others) or not probes)
    # first what fails fast: text, task names and their data
    documents: list[Document] = []
    if tokenizer is not None:
        paths = (*recipe.data, *recipe.eval_data)
        documents = documents_of(paths, tokenizer, field=recipe.field, limit=recipe.tokens, join=recipe.join)
    tasks = _load_tasks(others)
    device = choose_device(recipe.common.device)
    scratch = None if run.directory is None else run.path / SCRATCH
    model = _open(directory, choose_dtype(recipe.common.dtype, device), device, recipe.stream, scratch)
    if tokenizer is not None:
        tokenizer.check_matches(model.config.vocab_size)
    if probes:
        if isinstance(model, StreamedModel):
            raise RecipeError(
                "probes have the model write its answers, which takes all of it in memory, and it is read a block at a "
                "time; leave out the probes, or take a machine with more memory"
            )
        probe_lengths(model.config, recipe.probe_lengths, recipe.context)
    settings: dict[str, Any] = {
        "context": recipe.context,
        "batch_size": recipe.batch_size,
        "seed": recipe.common.seed,
    }
    result: dict[str, Any] = dict(NOT_MEASURED)
    if documents:
        text = evaluate_text(model, documents, stride=recipe.stride, tokens=recipe.tokens, **settings)
        result = text.to_json()
        run.log({"phase": "text", **result})
    result["tasks"] = {}
    if tasks is not None and tokenizer is not None:
        from halflap.evaluate.lm_eval import run_tasks

        done = run_tasks(model, tokenizer, tasks, limit=recipe.limit, **settings)
        result |= {"tasks": done["tasks"], "truncated_prompts": done["truncated"]}
    if probes and isinstance(model, HybridModel):
        asked = {"lengths": recipe.probe_lengths, "limit": recipe.limit, **settings}
        log = lambda row: run.log({"phase": "probe", **row})
        result["tasks"] = {**result["tasks"], **run_probes(model, tokenizer, probes, log=log, **asked)}
    result["tasks"] = {name: _with_intervals(metrics) for name, metrics in result["tasks"].items()}
    result |= {"parameters": count_parameters(model.config), "dtype": _dtype(model)}
    result["streamed"] = isinstance(model, StreamedModel)
    if run.directory is not None:
        run.save_json("scores.json", result)
        shutil.rmtree(run.path / SCRATCH, ignore_errors=True)
    return result


def _open(directory: Path, dtype: str, device: torch.device, stream: bool, scratch: Path | None) -> AnyModel:
    """The model in memory, or read a block at a time if that is asked for or its weights do not fit."""
    config = read_config(directory)
    if not must_stream(config, dtype, device, stream, read_quantization(directory, config)):
        return load_model(directory, dtype, device)
    checkpoint = Checkpoint.open(directory, packed=True)
    wide = float_dtype(checkpoint.dtype if dtype == "auto" else dtype)
    return StreamedModel.of(checkpoint, wide, device, scratch)


def _tokenizer(recipe: EvaluateRecipe, directory: Path, *, needed: bool) -> Tokenizer | None:
    """The model's tokenizer; None when it has none and is only asked probes, which are then asked in ids."""
    paths = (*recipe.data, *recipe.eval_data)
    place = tokenizer_place(directory, paths)
    if not needed and not paths and not (place / "tokenizer.json").is_file():
        return None
    return Tokenizer.load(place)


def _with_intervals(metrics: dict[str, Any]) -> dict[str, Any]:
    """A task's metrics with the 95 % interval of each share of items that were right."""
    items = metrics.get("items", 0)
    shares = {name: metrics[name] for name in SHARES if items and 0 <= metrics.get(name, -1) <= 1}
    return metrics | {f"{name}_interval": wilson(share, items) for name, share in shares.items()}


def _load_tasks(names: Sequence[str]) -> Any:
    if not names:
        return None
    from halflap.evaluate.lm_eval import load_tasks  # takes seconds to import, and may not be installed

    return load_tasks(names)


def bench(recipe: BenchRecipe, run: Run) -> dict[str, Any]:
    """Measure each cell of the grid; a preset or the YAML of a model gets random weights. Or every kind of block."""
    if recipe.blocks:
        return timing.bench_blocks(recipe, run)
    device = choose_device(recipe.common.device)
    config = shape_of(recipe.model)
    dtype = choose_dtype(recipe.common.dtype, device)
    is_checkpoint = Path(recipe.model).is_dir()
    quantization = read_quantization(find_directory(recipe.model), config) if is_checkpoint else None
    cache = cache_bytes(config, max(recipe.prompt) + max(recipe.output), max(recipe.batch))  # or more, in float32
    check_memory(config, dtype, device, {"the cache": cache}, quantization=quantization)
    if is_checkpoint:
        model = load_model(find_directory(recipe.model), dtype, device)
    else:
        dtype = "float32" if dtype == "auto" else dtype
        model = timing.random_model(config, float_dtype(dtype), device, recipe.common.seed)
    rows = benchmark.bench(
        model,
        recipe.prompt,
        recipe.output,
        recipe.batch,
        repeats=recipe.repeats,
        seed=recipe.common.seed,
        log=lambda row: run.log({"phase": "bench", **row}),
    )
    result = speed_of(model.config, model.device, rows)
    result |= {"weights": "checkpoint" if is_checkpoint else "random", "repeats": recipe.repeats}
    result["quantization"] = quantization.said() if quantization else None
    if run.directory is not None:
        run.save_json("bench.json", result)
    return result


def speed_of(config: ModelConfig, device: torch.device, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Rows of evaluate.bench and the machine they were measured on."""
    return {
        "rows": list(rows),
        "hardware": _hardware(device),
        "kernels": select.describe(),
        "parameters": count_parameters(config),
    }


def _hardware(device: torch.device) -> dict[str, Any]:
    found = {**environment.machine(), "threads": torch.get_num_threads(), "device": device.type}
    if device.type == "cuda":
        found |= {"gpu": torch.cuda.get_device_name(device)}
    return found


def _dtype(model: AnyModel) -> str:
    return str(model.dtype).removeprefix("torch.")
