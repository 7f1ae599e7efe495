"""What the comparisons on SmolLM2-135M share: text and settings, a step that is kept, cuts, distillation, judgement.

A verb's run directory is named by the caller, and a finished one is passed over, so that a script goes on where it
stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import halflap
from common import RESULTS, THREADS
from halflap.compress.axes import block_sizes
from halflap.compress.plan import PruningPlan
from halflap.files import write_json

CORPORA = ("books", "textbooks", "techdocs", "code_python")
CONTEXT = 2048
CALIBRATION, CHOOSING = "32k", "16k"
"""Tokens on which importance is measured, and candidates are compared as cut."""
FIT = {"sequence_length": 512, "batch_size": 8, "learning_rate": 3e-4, "warmup": 0.05, "schedule": "cosine"}
SETTINGS = {f"fit.{name}": value for name, value in FIT.items()}


def parser_of(description: str | None, work: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="GGUF file or Hugging Face directory")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--tokens", default="2M", help="tokens of distillation")
    parser.add_argument("--limit", type=int, default=None, help="tokens of WikiText-2 at most, 100 an item of LAMBADA")
    parser.add_argument("--dtype", default="float32", help="arithmetic of training and judging")
    parser.add_argument("--work", type=Path, default=Path(work))
    parser.add_argument("--threads", type=int, default=THREADS)
    parser.add_argument("--out", type=Path, default=RESULTS)
    return parser


def begin(chosen: argparse.Namespace) -> None:
    torch.set_num_threads(chosen.threads)
    os.environ["HALFLAP_DATA"] = str(chosen.data)


def kept(file: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `file` holds, or what `make` returns, written there."""
    if not file.exists():
        write_json(file, make())
    return json.loads(file.read_text())


def imported(model: Path, work: Path) -> Path:
    if model.is_dir():
        return model
    halflap.import_(str(model), out=str(work / "teacher"))
    return work / "teacher"


def wikitext(chosen: argparse.Namespace) -> Path:
    return chosen.data / "wikitext2" / "test.txt.xz"


def files(chosen: argparse.Namespace, part: str) -> list[str]:
    """Of the training or the validation text."""
    return [str(chosen.data / name / f"{part}.jsonl.xz") for name in CORPORA]


def text_of(train: list[str], chosen: argparse.Namespace) -> dict[str, Any]:
    """The training text, each corpus read as often, as settings of a verb."""
    return {"data": train, "data.weights": [1.0] * len(train), "dtype": chosen.dtype}


# --- cuts ------------------------------------------------------------------------------------------------------------


def scored(teacher: Path, text: dict[str, Any], place: Path, tokens: str = CALIBRATION, **how: Any) -> str:
    """The importance file."""
    return halflap.score(str(teacher), **text, **how, tokens=tokens, out=str(place / "score"))["path"]


def planned(teacher: Path, text: dict[str, Any], place: Path, size: str) -> PruningPlan:
    """The plan of the best sizes with so much of the teacher's parameters beside its embeddings."""
    found = halflap.search(
        str(teacher), **text, importance=scored(teacher, text, place), non_embedding_params=size, shortlist=6,
        score_tokens=CHOOSING, **SETTINGS, out=str(place / "search"),
    )  # fmt: skip
    return PruningPlan.load(found["path"])


def cut(teacher: Path, place: Path, **how: Any) -> Path:
    halflap.prune(str(teacher), **how, out=str(place / "pruned"))
    return place / "pruned" / "checkpoint"


def cut_alike(teacher: Path, text: dict[str, Any], place: Path, metric: str, plan: PruningPlan) -> Path:
    """A plan's sizes and dropped blocks, with what stays of each axis chosen by another metric."""
    importance = scored(teacher, text, place, "8k", metric=metric)
    return cut(teacher, place, importance=importance, **sizes_of(plan))


def sizes_of(plan: PruningPlan) -> dict[str, Any]:
    """The student's sizes and dropped blocks as flags of `prune`."""
    dropped = [index for index in range(len(plan.teacher_config.blocks)) if index not in plan.keep_blocks]
    sizes: dict[str, Any] = {"hidden_size": plan.student.hidden_size} | ({"drop_blocks": dropped} if dropped else {})
    for block in plan.student.blocks:
        sizes |= block_sizes(block)
    return {f"sizes.{name}": value for name, value in sizes.items()}


# --- training and judging --------------------------------------------------------------------------------------------


def distilled(
    student: Path, teacher: Path, text: dict[str, Any], validation: list[str], tokens: str, out: Path, **loss: Any
) -> Path:
    """`loss` holds settings of the loss, by default those of the verb."""
    halflap.distill(
        str(student),
        teacher=str(teacher),
        **text,
        **loss,
        eval_data=validation,
        tokens=tokens,
        **SETTINGS,
        out=str(out),
    )
    return out / "checkpoint"


def judged(model: Path, chosen: argparse.Namespace) -> dict[str, Any]:
    started = time.perf_counter()
    limits = {} if chosen.limit is None else {"tokens": chosen.limit, "limit": max(1, chosen.limit // 100)}
    scores = halflap.evaluate(
        str(model),
        data=[str(wikitext(chosen))],
        **{"data.join": True},
        tasks=["lambada_local"],
        context=CONTEXT,
        dtype=chosen.dtype,
        **limits,
    )
    config = halflap.inspect(str(model))
    lambada = scores["tasks"]["lambada_local"]
    return {
        "parameters": config["parameters"],
        "non_embedding_parameters": config["non_embedding_parameters"],
        "wikitext2_perplexity": scores["perplexity"],
        "wikitext2_interval": scores["perplexity_interval"],
        "wikitext2_tokens": scores["tokens"],
        "lambada": lambada,
        "seconds": time.perf_counter() - started,
    }
