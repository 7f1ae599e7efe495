"""`study`: several architectures under identical settings; one directory an arm and seed, one table, one page.

Every arm and seed reads the same tokens in the same order with the same tokenizer, schedule and parameter count. A
pair of arm and seed that is done is passed over, an interrupted one goes on; one that was begun on other text or with
other settings is refused. Speed is measured here after all training, one arm after the other, alone on the machine.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from halflap.checkpoints.checkpoint import load_model, save_model
from halflap.checkpoints.config import lineage_step, read_json
from halflap.commands.config import StudyRecipe
from halflap.commands.corpora import Corpora, choose_tokenizer, open_corpora, training_loader
from halflap.commands.device import choose_device
from halflap.commands.evaluate import measure_speed
from halflap.commands.study_file import Recall, Study, read_study
from halflap.data.batch import Batch
from halflap.data.corpus import open_corpus
from halflap.data.loader import Loader
from halflap.data.tokenizer import Tokenizer
from halflap.errors import HalflapError
from halflap.evaluate.documents import documents_of
from halflap.evaluate.held_out import evaluate_text
from halflap.evaluate.paired import paired
from halflap.evaluate.probes import probe_batch
from halflap.evaluate.recall import ask_ids, summary
from halflap.files import write_json
from halflap.models.config import ModelConfig
from halflap.models.count import cache_bytes, count_non_embedding_parameters, count_parameters
from halflap.models.model import HybridModel, initialize
from halflap.parallel import fanout
from halflap.report.arms import Arm, Arms
from halflap.report.page import build as build_report
from halflap.run import Run, jsonable
from halflap.train.config import Fit
from halflap.train.fit import fit
from halflap.train.objectives.language import NextToken

FRESH = 2**31  # the seed of rows that no arm is trained on
STATE_BITS = {"kv_bits": 32, "ssm_bits": 32, "conv_bits": 32}  # speed is measured in float32


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


def study(recipe: StudyRecipe, run: Run) -> dict[str, Any]:
    """Train and judge every arm with every seed, measure speed, and write the table and the page."""
    cluster = _cluster(recipe)
    plan = _plan(recipe)
    tokenizer = choose_tokenizer(recipe.tokenizer, recipe.text, run.path, plan.vocab_size)
    tokenizer.save(run.path / "tokenizer")
    models = plan.models(tokenizer.vocab_size)
    corpora = open_corpora(recipe.text, tokenizer, run.path / "corpus", recipe.eval_data)
    if not corpora.held_out:
        raise HalflapError(f"there is no text to judge on ({corpora.held_out_is}); name some with --eval-data")
    training_loader(corpora, recipe.text, plan.fit.sequence_length, plan.fit.batch_size, 0)  # what is wrong, now
    tasks = _tasks(recipe, run, plan, models, corpora)
    what = f"{len(models)} arms, {len(plan.seeds)} seeds"
    fanout.map(train_and_judge, tasks, processes=recipe.workers, cluster=cluster, what=what)
    speed = {arm: _speed(run, arm, plan) for arm in models}
    run.save_json("bench.json", speed)
    rows = [_row(run, plan, arm, config, speed[arm]) for arm, config in models.items()]
    _write_table(run, plan, rows, corpora.held_out_is)
    return {
        "study": plan.name,
        "size": plan.size,
        "asks": plan.asks,
        "baseline": plan.baseline,
        "tokens": plan.tokens,
        "seeds": list(plan.seeds),
        "held_out": corpora.held_out_is,
        "arms": rows,
        "report": str(build_report([run.path], run.path / "report.html")),
    }


def _plan(recipe: StudyRecipe) -> Study:
    plan = read_study(recipe.study, recipe.size)
    given = {"tokens": recipe.tokens, "seeds": recipe.seeds}
    return dataclasses.replace(plan, **{name: value for name, value in given.items() if value})


def _cluster(recipe: StudyRecipe) -> fanout.Cluster | None:
    if recipe.ray is None:
        choose_device(recipe.common.device)  # a device that is not here is refused before any work
        return None
    fanout.require_ray()
    return fanout.Cluster(recipe.ray, recipe.ray_cpus, int(recipe.common.device == "cuda"))


def _tasks(
    recipe: StudyRecipe, run: Run, plan: Study, models: Mapping[str, ModelConfig], corpora: Corpora
) -> list[Task]:
    """One a seed and arm, seed by seed, with whole paths: they may be read from another directory."""
    train, held_out = (tuple(c.path.resolve() for c in group) for group in (corpora.train, corpora.held_out))
    text = tuple(corpus.manifest.digest for corpus in (*corpora.train, *corpora.held_out))
    return [
        Task(
            arm, seed, config, _place(run, arm, seed).resolve(), (run.path / "tokenizer").resolve(), train, held_out,
            text, recipe.text.weights, recipe.text.packing, plan.tokens, recipe.eval_tokens, plan.fit, plan.recall,
            recipe.common.device, recipe.common.dtype,
        )
        for seed in plan.seeds
        for arm, config in models.items()
    ]  # fmt: skip


def _place(run: Run, arm: str, seed: int) -> Path:
    return run.path / "arms" / arm.replace(" ", "-").replace("/", "-") / f"seed-{seed}"


# ---- one arm and seed


def train_and_judge(task: Task) -> dict[str, Any]:
    """Train from random weights, judge on the held-out text and on the probe; result.json is written last."""
    _refuse_another(task)
    done = task.place / "result.json"
    if done.exists():
        return read_json(done)
    tokenizer = Tokenizer.load(task.tokenizer)
    _refuse_changed_text(task, tokenizer)
    trained = _train(task, tokenizer)
    model = load_model(task.place / "checkpoint", "float32", choose_device(task.device))
    documents = documents_of(task.held_out, tokenizer, limit=task.eval_tokens)
    context = task.fit.sequence_length
    judged = evaluate_text(model, documents, context=context, tokens=task.eval_tokens, seed=task.seed).to_json()
    recalled = {} if task.recall is None else {"recall": _recall(task, task.recall)}
    result = {"arm": task.arm, "seed": task.seed, **judged, **trained, **recalled}
    write_json(done, result)
    return result


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
            device=choose_device(task.device), dtype=task.dtype, seed=task.seed,
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


# ---- speed and the table


def _speed(run: Run, arm: str, plan: Study) -> dict[str, Any]:
    """Prefill, decode and cache of an arm, in the form of `bench`; kept once measured."""
    place = _place(run, arm, plan.seeds[0])
    file = place.parent / "bench.json"
    if not file.exists():
        model = load_model(place / "checkpoint", "float32")
        grid = plan.speed
        write_json(file, measure_speed(model, grid.prompt, grid.output, grid.batch))
    return read_json(file)


def _row(run: Run, plan: Study, arm: str, config: ModelConfig, speed: Mapping[str, Any]) -> dict[str, Any]:
    """An arm's line: what it is, how good it is over the seeds, how it differs from the baseline, how fast it is."""
    runs = [read_json(_place(run, arm, seed) / "result.json") for seed in plan.seeds]
    compared = {
        key: [read_json(_place(run, other, seed) / "result.json") for seed in plan.seeds]
        for key, other in (("baseline", plan.baseline), ("previous", plan.against.get(arm)))
        if other is not None and other != arm
    }
    row: dict[str, Any] = {
        "name": arm,
        "previous": plan.against.get(arm),
        "runs": [str(_place(run, arm, seed).relative_to(run.path)) for seed in plan.seeds],
        "pattern": config.pattern(),
        "parameters": count_parameters(config),
        "non_embedding_parameters": count_non_embedding_parameters(config),
        "tokens_trained": runs[0]["tokens_trained"],
        "training_tokens_per_second": statistics.median(r["training_tokens_per_second"] for r in runs),
        "seconds": statistics.median(r["seconds"] for r in runs),
    }
    for name in ("loss", "bits_per_byte", "perplexity", "recall"):
        if values := [r[name] for r in runs if r.get(name) is not None]:
            row |= _over_seeds(name, values)
            for key, others in compared.items():
                row[f"{name}_against_{key}"] = dataclasses.asdict(paired(values, [r[name] for r in others]))
    longest = max(speed["rows"], key=lambda cell: (cell["prompt"] + cell["output"], cell["batch"]))
    for name in ("prompt", "output", "batch", "prefill_tokens_per_second", "decode_tokens_per_second", "cache_bytes"):
        row[name] = longest[name]
    held = longest["prompt"] + longest["output"]
    row["cache_bytes_counted"] = cache_bytes(config, held, longest["batch"], **STATE_BITS)
    return row


def _over_seeds(name: str, values: Sequence[float]) -> dict[str, Any]:
    spread = statistics.stdev(values) if len(values) > 1 else None
    return {name: statistics.fmean(values), f"{name}_spread": spread, f"{name}_by_seed": list(values)}


def _write_table(run: Run, plan: Study, rows: Sequence[Mapping[str, Any]], judged_on: str) -> None:
    """arms.json for the page, and study.json with everything."""
    arms = tuple(
        Arm(
            name=row["name"],
            parameters=row["parameters"],
            loss=row["loss"],
            loss_ci=(min(row["loss_by_seed"]), max(row["loss_by_seed"])),
            bits_per_byte=row["bits_per_byte"],
            perplexity=row["perplexity"],
            tokens_trained=row["tokens_trained"],
            seconds=row["seconds"],
            description=row["pattern"] if len(row["pattern"]) <= 16 else f"{row['pattern'][:16]}…",
            run=str(_place(run, row["name"], plan.seeds[0]).relative_to(run.path)),
            losses=tuple(row["loss_by_seed"]),
        )
        for row in rows
    )
    Arms(arms, plan.seeds, judged_on, f"range over {len(plan.seeds)} seeds").save(run.path / "arms.json")
    run.save_json(
        "study.json",
        {"study": plan.name, "size": plan.size, "asks": plan.asks, "baseline": plan.baseline, "arms": rows},
    )
