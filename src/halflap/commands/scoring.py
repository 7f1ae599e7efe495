"""How importance is measured: calibration text, one pass for widths, removals for depth, and the files they leave.

A pass keeps its sums in the run's `scoring/` folder until the scores are written, so a killed one goes on.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from halflap.checkpoints.streamed import StreamedModel
from halflap.commands.config_compress import CompressRecipe
from halflap.commands.sections import ScoreSettings
from halflap.commands.students import Teacher
from halflap.compress.depth import (
    DepthScores,
    Removal,
    check_count,
    depth_scores,
    depth_scores_by,
    named,
    remove_one_by_one,
)
from halflap.compress.importance import Importance, Scoring
from halflap.compress.metrics import collect_all
from halflap.compress.partial import Scratch
from halflap.compress.plan import Row
from halflap.compress.streamed import check_metrics, collect_streamed, depth_scores_streamed
from halflap.data.batch import Batch
from halflap.data.loader import Loader
from halflap.errors import HalflapError
from halflap.models.config import HybridConfig, Mamba1Config, Mamba2Config, MLPConfig, ModelConfig
from halflap.models.model import HybridModel

IMPORTANCE, SCRATCH = "importance.safetensors", "scoring"
DEPTH_SHARE = 8
"""Blocks are removed one by one on this fraction of the calibration text: each costs a pass, and a quarter of the
text that widths need suffices in the papers."""
DEPTH_ROWS = 4
"""Rows of a short text that they are removed on at least."""


def importance(
    directory: Path, teacher: Teacher, loader: Loader, tokens: int, settings: ScoreSettings, **how: Any
) -> Importance:
    """What ranks, measured once and kept in the directory, with a file for every other scoring that was asked for.

    how: `dtype` and `streamed` of `measure`.
    """
    file = directory / IMPORTANCE
    if not file.exists():
        found = measure(teacher, calibration(loader, tokens), settings, directory / SCRATCH, **how)
        for other in found[1:]:
            other.save(directory / file_of(other, found[0]))
        found[0].save(file)
    shutil.rmtree(directory / SCRATCH, ignore_errors=True)
    return read_importance(file, teacher)


def given_or_measured(
    recipe: CompressRecipe, directory: Path, teacher: Teacher, loader: Loader
) -> tuple[Importance, str | None]:
    """What the recipe names or, if it names none, what is measured; and a remark where there was too little text."""
    if recipe.importance is not None:
        return read_importance(recipe.importance, teacher), None
    tokens = recipe.calibration_tokens
    found = importance(directory, teacher, loader, tokens, recipe.score_settings)
    return found, shortage(found, loader, tokens)


def read_importance(file: str | Path, teacher: Teacher) -> Importance:
    """Raises HalflapError unless it is this teacher's."""
    found = Importance.load(Path(file) / IMPORTANCE if Path(file).is_dir() else file)
    found.check_teacher(teacher.digest)
    return found


def file_of(other: Importance, first: Importance) -> str:
    """Its name says where its scoring differs from the first's: `importance-mamba-z-sequence-l2.safetensors`."""
    differs = [f"-{name}-{value}" for name, value in other.scoring.items() if first.scoring[name] != value]
    return f"importance{''.join(differs)}.safetensors".replace("_", "-")


def calibration(loader: Loader, tokens: int) -> list[Batch]:
    """The first rows of the training text that hold about so many tokens, each at most once, in batches."""
    rows = min(sum(loader.rows), max(1, round(tokens / loader.sequence_length)))
    size = loader.micro_batch_size * loader.world
    whole, rest = divmod(rows, size)
    last = [loader.rows_from(whole * size, rest // loader.world)] if rest >= loader.world else []
    return [*(loader.batch(index) for index in range(whole)), *last]


def shortage(found: Importance, loader: Loader, tokens: int) -> str | None:
    """Says how much calibration text there was, if that is less than was asked for."""
    whole = round(tokens / loader.sequence_length) >= sum(loader.rows)  # no row was left
    if not found.tokens or found.tokens >= tokens or not whole:
        return None
    return f"{tokens:,} tokens of calibration text were asked for, and there were {found.tokens:,}: all were read"


def scorings(settings: ScoreSettings) -> list[Scoring]:
    """Every combination; the first is of the first values."""
    return [
        Scoring(*combination)
        for combination in itertools.product(
            settings.neuron_source,
            settings.mamba_source,
            settings.hybrid_source,
            settings.sequence_aggregation,
            settings.batch_aggregation,
        )
    ]


BLOCKS = {
    "neuron_source": ("MLP", (MLPConfig,)),
    "mamba_source": ("Mamba", (Mamba1Config, Mamba2Config)),
    "hybrid_source": ("hybrid", (HybridConfig,)),
}


def check_settings(config: ModelConfig, settings: ScoreSettings) -> None:
    """Raise HalflapError on what this model cannot give."""
    for name, (kind, types) in BLOCKS.items():
        given = getattr(settings, name) != getattr(ScoreSettings, name)
        if given and not any(isinstance(block, types) for block in config.blocks):
            raise HalflapError(
                f"{name} was given, and this {config.family} model ({config.pattern()}) has no {kind} blocks: leave "
                f"out --{name.replace('_', '-')}"
            )
    if settings.depth_iterative is not None:
        check_count(config, settings.depth_iterative)


def measure(
    teacher: Teacher,
    batches: list[Batch],
    settings: ScoreSettings,
    directory: Path | None = None,
    *,
    dtype: str = "float32",
    streamed: bool = False,
) -> list[Importance]:
    """Scores of every axis in one pass, for each scoring; of whole blocks by removal on a part of the text.

    streamed: the weights are read a block at a time, with the residual streams in the directory.
    """
    check_settings(teacher.config, settings)
    digest = text_digest(batches)
    made_from = json.dumps({"teacher": teacher.digest, "text": digest, "dtype": dtype, **dataclasses.asdict(settings)})
    scratch = Scratch(directory, made_from)
    on_device = [batch.to(teacher.device) for batch in batches]
    if streamed:
        return _measure_streamed(teacher.stream(dtype=dtype), on_device, settings, scratch, digest, teacher)
    model = teacher.load(dtype)
    found = collect_all(model, on_device, settings.metric, scorings(settings), scratch=scratch, seed=teacher.seed)
    common = {"teacher": teacher.digest, "calibration": digest}
    if settings.metric == "random":  # of blocks too
        return [dataclasses.replace(one, **common) for one in found]
    depth, removed = dict(found[0].depth), Row()
    if settings.depth_metric is None or settings.depth_metric not in depth:
        scores, removed = _depth(model, _removed_on(on_device), settings, scratch)
        depth |= scores
    return [
        dataclasses.replace(one, depth=depth, depth_metric=_ranks(settings), removed=removed, **common) for one in found
    ]


def _removed_on(batches: list[Batch]) -> list[Batch]:
    """The first rows, as many however they are batched."""
    left = sum(len(batch.tokens) for batch in batches)
    left = max(min(left, DEPTH_ROWS), left // DEPTH_SHARE)
    found = []
    for batch in batches:
        if left > 0:
            found.append(batch.rows(0, left))
        left -= len(batch.tokens)
    return found


def _metrics(settings: ScoreSettings) -> tuple[str, ...]:
    """What blocks are scored by: what was asked for, else all that methods of search rank them by."""
    return (settings.depth_metric,) if settings.depth_metric else ("kl", "hidden_mse")


def _ranks(settings: ScoreSettings) -> str:
    """What ranks blocks; empty leaves it to the method of search (ranking.ranks_blocks)."""
    if settings.depth_metric is None and settings.depth_average == "mean" and settings.depth_iterative is None:
        return ""
    return f"{_metrics(settings)[0]}_rank" if settings.depth_average == "rank" else _metrics(settings)[0]


def _measure_streamed(
    model: StreamedModel,
    batches: list[Batch],
    settings: ScoreSettings,
    scratch: Scratch,
    calibration: str,
    teacher: Teacher,
) -> list[Importance]:
    """The same with one block in memory. Raises HalflapError for what needs gradients."""
    metrics = _metrics(settings)
    check_metrics(settings.metric, metrics)
    part, removed = _removed_on(batches), Row()
    depth: dict[str, torch.Tensor] = {}
    if settings.depth_iterative is not None:
        score = lambda gone: depth_scores_streamed(model, part, metrics[0], gone, scratch)
        scores, removed = _one_by_one(model.config, score, settings)
        depth = named({metrics[0]: scores})
    found = collect_streamed(
        model,
        batches,
        settings.metric,
        metrics,
        scorings(settings),
        scratch,
        removed_on=0 if removed else len(part),
        seed=teacher.seed,
    )
    common: dict[str, Any] = {"teacher": teacher.digest, "calibration": calibration, "removed": removed}
    if settings.metric != "random":
        common["depth_metric"] = _ranks(settings)
    return [dataclasses.replace(one, depth={**one.depth, **depth}, **common) for one in found]


def _depth(
    model: HybridModel, batches: list[Batch], settings: ScoreSettings, scratch: Scratch
) -> tuple[dict[str, torch.Tensor], Row]:
    """Scores of blocks by metric, and which ones went if that was asked for."""
    metrics = _metrics(settings)
    one_pass = {"taylor": "taylor", "block_influence": "activation"}
    if metrics[0] in one_pass:
        return dict(collect_all(model, batches, one_pass[metrics[0]], [Scoring()], scratch=scratch)[0].depth), ()
    if settings.depth_iterative is None:
        return named(depth_scores_by(metrics, model, batches, scratch=scratch)), ()
    score = lambda gone: depth_scores(model, batches, metrics[0], gone=gone, scratch=scratch)
    scores, removed = _one_by_one(model.config, score, settings)
    return named({metrics[0]: scores}), removed


def _one_by_one(config: ModelConfig, score: Callable[[Row], DepthScores], settings: ScoreSettings) -> Removal:
    assert settings.depth_iterative is not None
    return remove_one_by_one(config, score, settings.depth_average, settings.depth_iterative)


def text_digest(batches: list[Batch]) -> str:
    total = hashlib.sha256()
    for batch in batches:
        total.update(batch.tokens.cpu().numpy().tobytes())
    return total.hexdigest()
