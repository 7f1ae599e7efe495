"""Shapes trained from scratch and judged: what one arm and seed of a study is, and all that is done with it.

Every arm and seed reads the same tokens in the same order. One that is done is passed over, an interrupted one goes on;
one that was begun on other text or with other settings is refused.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from halflap.checkpoints.checkpoint import load_model, save_model
from halflap.checkpoints.config import lineage_step, read_json
from halflap.commands.corpora import held_out_batches
from halflap.commands.device import choose_device
from halflap.commands.study_file import Recall
from halflap.data.batch import Batch
from halflap.data.corpus import open_corpus
from halflap.data.loader import Loader
from halflap.data.tokenizer import Tokenizer
from halflap.errors import HalflapError
from halflap.evaluate.documents import documents_of
from halflap.evaluate.held_out import evaluate_text
from halflap.evaluate.probes import probe_batch
from halflap.evaluate.recall import ask_ids, summary
from halflap.files import write_json
from halflap.models.config import ModelConfig
from halflap.models.model import HybridModel, initialize
from halflap.run import Run, jsonable
from halflap.train.config import Fit
from halflap.train.fit import fit
from halflap.train.objectives.language import NextToken

FRESH = 2**31  # the seed of rows that no arm is trained on


@dataclass(frozen=True)
class Task:
    """All that one arm and seed needs, in plain values: it may go to another process."""

    arm: str
    seed: int
    config: ModelConfig
    place: Path
    tokenizer: Path
    train: tuple[Path, ...]
    held_out: tuple[Path, ...]
    text: tuple[str, ...]
    """Digests of the corpora, of those trained on first."""
    weights: tuple[float, ...]
    packing: str
    tokens: int
    eval_tokens: int
    fit: Fit
    recall: Recall | None
    device: str
    dtype: str
    context: int
    """Tokens of a window that is judged."""
    followed: bool = False
    """Whether the held-out loss is followed while it learns."""


def train_and_judge(task: Task) -> dict[str, Any]:
    """Train from random weights, judge on the held-out text and on the probe; result.json is written last.

    Returns what it holds, and where the run and its checkpoint are.
    """
    _refuse_another(task)
    where = {"run": str(task.place), "checkpoint": str(task.place / "checkpoint")}
    done = _result_file(task)
    if done.exists():
        return read_json(done) | where
    tokenizer = Tokenizer.load(task.tokenizer)
    _refuse_changed_text(task, tokenizer)
    trained = _train(task, tokenizer)
    model = load_model(task.place / "checkpoint", "float32", choose_device(task.device))
    documents = documents_of(task.held_out, tokenizer, limit=task.eval_tokens)
    judged = evaluate_text(model, documents, context=task.context, tokens=task.eval_tokens, seed=task.seed).to_json()
    recalled = {} if task.recall is None else {"recall": _recall(task, task.recall)}
    result = {"arm": task.arm, "seed": task.seed, **judged, **trained, **recalled}
    write_json(done, result)
    return result | where


def is_finished(task: Task) -> bool:
    return _result_file(task).exists()


def _result_file(task: Task) -> Path:
    return task.place / "result.json"


def _refuse_another(task: Task) -> None:
    """Raise HalflapError when the place holds the work of another task; kept paths and devices may differ."""
    elsewhere = ("place", "tokenizer", "train", "held_out", "device")
    asked = {name: value for name, value in dataclasses.asdict(task).items() if name not in elsewhere}
    now = json.loads(json.dumps(jsonable(asked)))
    file = task.place / "task.json"
    if not file.exists():
        write_json(file, now)
    begun = read_json(file)
    if changed := [name for name in now if begun.get(name) != now[name]]:
        raise HalflapError(
            f"arm {task.arm!r} with seed {task.seed} was begun in {str(task.place)!r} with another "
            f"{' and another '.join(changed)}; arms under different settings cannot be compared: take another --out, "
            "or --overwrite to start again"
        )


def _refuse_changed_text(task: Task, tokenizer: Tokenizer) -> None:
    """Raise HalflapError when token shards are no longer what the study began with."""
    for path, digest in zip((*task.train, *task.held_out), task.text, strict=True):
        if open_corpus(path, tokenizer).manifest.digest != digest:
            raise HalflapError(
                f"the text in {str(path)!r} has changed since the study began, and arm {task.arm!r} with seed "
                f"{task.seed} would read other text than the arms before it; put the old text back, or --overwrite"
            )


def _train(task: Task, tokenizer: Tokenizer) -> dict[str, Any]:
    summary = task.place / "training.json"
    if summary.exists():
        return read_json(summary)
    model = HybridModel(task.config)
    initialize(model, task.seed)
    loader = Loader(
        [open_corpus(path, tokenizer) for path in task.train],
        sequence_length=task.fit.sequence_length,
        micro_batch_size=task.fit.batch_size,
        seed=task.seed,
        weights=task.weights or None,
        packing=task.packing,  # type: ignore[arg-type]
    )
    place = task.place / "training"
    place.mkdir(parents=True, exist_ok=True)
    with Run("study", task.place) as log:
        log.resumed = any(place.iterdir())
        found = fit(
            model, NextToken(), loader.batch, task.fit, tokens=task.tokens, directory=place, log=log.log,
            held_out=_followed(task, tokenizer) or None, device=choose_device(task.device), dtype=task.dtype,
            seed=task.seed,
        )  # fmt: skip
    step = lineage_step("pretrain", {}, tokens=found["tokens"], loss=found["loss"])
    save_model(model.cpu(), task.place / "checkpoint", lineage=[step], tokenizer_from=task.tokenizer)
    trained = {
        "tokens_trained": found["tokens"],
        "seconds": found["tokens"] / max(found["tokens_per_second"], 1e-9),
        "training_tokens_per_second": found["tokens_per_second"],
    }
    write_json(summary, trained)
    shutil.rmtree(place)
    return trained


def _followed(task: Task, tokenizer: Tokenizer) -> list[Batch]:
    held_out = [open_corpus(path, tokenizer) for path in task.held_out]
    return held_out_batches(held_out, task.fit, task.tokens) if task.followed else []


def _recall(task: Task, recall: Recall) -> float:
    """Share of answers right, on fresh rows, after training the arm's shape on the probe alone."""
    model = HybridModel(dataclasses.replace(task.config, vocab_size=recall.vocab_size))
    initialize(model, task.seed)
    settings = dataclasses.replace(
        task.fit, sequence_length=recall.length, learning_rate=recall.learning_rate or task.fit.learning_rate
    )

    def batch(step: int) -> Batch:
        return probe_batch(recall.probe, task.seed, step, recall.length, recall.vocab_size, settings.batch_size)

    answers = int((batch(0).weights > 0).sum())  # what the loop counts as tokens
    fit(
        model, NextToken(), batch, settings, tokens=recall.steps * answers, directory=task.place / "recall",
        device=choose_device(task.device), dtype=task.dtype, seed=task.seed,
    )  # fmt: skip
    shutil.rmtree(task.place / "recall")
    return summary(ask_ids(model, recall.probe, recall.length, recall.rows, FRESH))["token_acc"]
