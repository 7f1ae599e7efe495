"""Real weights, compressed: SmolLM2-135M-Instruct loses a quarter of its non-embedding parameters.

    python benchmarks/smollm2.py --model FILE.gguf|DIR --data DIR [--tokens 2M] [--work runs/smollm2]

DIR of --data holds `wikitext2`, `lambada_openai` and the training text (`books`, `textbooks`, `techdocs`,
`code_python`, each with train and validation files). Calibration, search and distillation read the training text only;
the test files are read once, by the finished models. Steps: import; perplexity of WikiText-2 test by halflap and by
transformers on the same windows of tokens; score, search and prune; the same sizes and blocks cut by two other
rankings (random, weight norm); distillation; all five judged. A finished step is passed over, so that an interrupted
run goes on.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

import halflap
from common import RESULTS, THREADS, Report, stock_model
from halflap.compress.axes import block_sizes
from halflap.compress.plan import PruningPlan
from halflap.data.text import read_documents
from halflap.evaluate.documents import Document, tokenise
from halflap.evaluate.held_out import windows
from halflap.files import write_json
from halflap.inference.log_probs import score_tokens

CORPORA = ("books", "textbooks", "techdocs", "code_python")
CONTEXT = 2048
PARITY_TOKENS = 65536
FIT = {"sequence_length": 512, "batch_size": 8, "learning_rate": 3e-4, "warmup": 0.05, "schedule": "cosine"}
ARMS = ("teacher", "random", "weight_norm", "activation", "distilled")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="GGUF file or Hugging Face directory")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--tokens", default="2M", help="tokens of distillation")
    parser.add_argument("--limit", type=int, default=None, help="tokens of WikiText-2 at most, 100 an item of LAMBADA")
    parser.add_argument("--plan", type=Path, default=None, help="the student's plan, in place of a search for it")
    parser.add_argument("--arms", nargs="*", choices=ARMS, default=ARMS)
    parser.add_argument("--dtype", default="float32", help="arithmetic of training and judging")
    parser.add_argument("--work", type=Path, default=Path("runs/smollm2"))
    parser.add_argument("--threads", type=int, default=THREADS)
    parser.add_argument("--out", type=Path, default=RESULTS)
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    os.environ["HALFLAP_DATA"] = str(chosen.data)
    report = Report("smollm2", chosen.out, chosen.threads)
    teacher = imported(chosen.model, chosen.work)
    wikitext = chosen.data / "wikitext2" / "test.txt.xz"
    report.add(
        **kept(
            chosen.work / "parity.json",
            lambda: parity(teacher, wikitext, min(chosen.limit or PARITY_TOKENS, PARITY_TOKENS)),
        )
    )
    models = students(teacher, chosen)
    for arm in chosen.arms:
        row = kept(chosen.work / f"judged-{arm}.json", lambda arm=arm: judged(models[arm], wikitext, chosen))
        report.add(arm=arm, **row)
    report.write()


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


# --- the same tokens through both ------------------------------------------------------------------------------------


def parity(teacher: Path, text: Path, limit: int) -> dict[str, Any]:
    """PARITY_TOKENS of WikiText-2 test in windows of CONTEXT, float32, by halflap and by transformers."""
    tokenizer = halflap.tokenizer(str(teacher))
    documents = tokenise(["\n\n".join(read_documents([str(text)]))], tokenizer, limit=limit)
    ours = halflap.load(str(teacher), dtype="float32")
    theirs = stock_model(str(teacher), torch.float32)

    @torch.inference_mode()
    def by_halflap(tokens: torch.Tensor, targets: torch.Tensor) -> float:
        return -float(score_tokens(ours, tokens, targets, torch.ones_like(targets, dtype=torch.bool)).log_probs.sum())

    @torch.inference_mode()
    def by_transformers(tokens: torch.Tensor, targets: torch.Tensor) -> float:
        return float(F.cross_entropy(theirs(tokens, use_cache=False).logits[0].float(), targets[0], reduction="sum"))

    found: dict[str, Any] = {"test": "wikitext2 test", "context": CONTEXT, "dtype": "float32"}
    for name, loss_of in (("halflap", by_halflap), ("transformers", by_transformers)):
        total, count = total_loss(documents, loss_of, limit)
        found[f"{name}_perplexity"], found["tokens"] = math.exp(total / count), count
    difference = found["halflap_perplexity"] / found["transformers_perplexity"] - 1
    return found | {"relative_difference": difference}


def total_loss(
    documents: list[Document], loss_of: Callable[[torch.Tensor, torch.Tensor], float], limit: int
) -> tuple[float, int]:
    total, count = 0.0, 0
    for window in windows(documents, CONTEXT, CONTEXT, limit):
        tokens = torch.from_numpy(documents[window.document].tokens[window.start : window.end + 1])[None]
        total += loss_of(tokens[:, :-1], tokens[:, 1:])
        count += tokens.shape[1] - 1
    return total, count


# --- students --------------------------------------------------------------------------------------------------------


def students(teacher: Path, chosen: argparse.Namespace) -> dict[str, Path]:
    """The compressed model, as cut and distilled, and the same sizes by the two other rankings."""
    train = [str(chosen.data / name / "train.jsonl.xz") for name in CORPORA]
    text = {"data": train, "data.weights": [1.0] * len(train), "dtype": chosen.dtype}
    settings = {f"fit.{name}": value for name, value in FIT.items()}
    place = chosen.work / "activation"
    plan_file = chosen.plan or chosen.work / "pruning_plan.json"
    if not plan_file.exists():
        scored = halflap.score(str(teacher), **text, tokens="32k", out=str(place / "score"))
        found = halflap.search(
            str(teacher), **text, importance=scored["path"], non_embedding_params="75%", shortlist=6,
            score_tokens="16k", **settings, out=str(place / "search"),
        )  # fmt: skip
        PruningPlan.load(found["path"]).save(plan_file)
    halflap.prune(str(teacher), plan=str(plan_file), out=str(place / "pruned"))
    found = {"teacher": teacher, "activation": place / "pruned" / "checkpoint"}
    for metric in {"random", "weight_norm"} & set(chosen.arms):
        place = chosen.work / metric
        scored = halflap.score(str(teacher), **text, metric=metric, tokens="8k", out=str(place / "score"))
        sizes = sizes_of(PruningPlan.load(plan_file))
        halflap.prune(str(teacher), importance=scored["path"], out=str(place / "pruned"), **sizes)
        found[metric] = place / "pruned" / "checkpoint"
    if "distilled" in chosen.arms:
        validation = [str(chosen.data / name / "validation.jsonl.xz") for name in CORPORA]
        halflap.distill(
            str(found["activation"]), teacher=str(teacher), **text, eval_data=validation, tokens=chosen.tokens,
            **settings, out=str(chosen.work / "distilled"),
        )  # fmt: skip
        found["distilled"] = chosen.work / "distilled" / "checkpoint"
    return found


def sizes_of(plan: PruningPlan) -> dict[str, Any]:
    """The student's sizes and dropped blocks as flags of `prune`."""
    dropped = [index for index in range(len(plan.teacher_config.blocks)) if index not in plan.keep_blocks]
    sizes: dict[str, Any] = {"hidden_size": plan.student.hidden_size} | ({"drop_blocks": dropped} if dropped else {})
    for block in plan.student.blocks:
        sizes |= block_sizes(block)
    return {f"sizes.{name}": value for name, value in sizes.items()}


def judged(model: Path, wikitext: Path, chosen: argparse.Namespace) -> dict[str, Any]:
    started = time.perf_counter()
    limits = {} if chosen.limit is None else {"tokens": chosen.limit, "limit": max(1, chosen.limit // 100)}
    scores = halflap.evaluate(
        str(model),
        data=[str(wikitext)],
        join=True,
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


if __name__ == "__main__":
    main()
