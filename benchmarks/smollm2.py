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
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

import halflap
from common import Report, stock_model
from halflap.compress.plan import PruningPlan
from halflap.data.text import read_documents
from halflap.evaluate.documents import Document, tokenise
from halflap.evaluate.held_out import windows
from halflap.inference.log_probs import score_tokens
from smollm2_parts import (
    CONTEXT,
    begin,
    cut,
    cut_alike,
    distilled,
    files,
    imported,
    judged,
    kept,
    parser_of,
    planned,
    text_of,
    wikitext,
)

PARITY_TOKENS = 65536
ARMS = ("teacher", "random", "weight_norm", "activation", "distilled")


def main() -> None:
    parser = parser_of(__doc__, work="runs/smollm2")
    parser.add_argument("--plan", type=Path, default=None, help="the student's plan, in place of a search for it")
    parser.add_argument("--arms", nargs="*", choices=ARMS, default=ARMS)
    chosen = parser.parse_args()
    begin(chosen)
    report = Report("smollm2", chosen.out, chosen.threads)
    teacher = imported(chosen.model, chosen.work)
    limit = min(chosen.limit or PARITY_TOKENS, PARITY_TOKENS)
    report.add(**kept(chosen.work / "parity.json", lambda: parity(teacher, wikitext(chosen), limit)))
    models = students(teacher, chosen)
    for arm in chosen.arms:
        row = kept(chosen.work / f"judged-{arm}.json", lambda arm=arm: judged(models[arm], chosen))
        report.add(arm=arm, **row)
    report.write()


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
    text, work = text_of(files(chosen, "train"), chosen), chosen.work
    plan_file = chosen.plan or work / "pruning_plan.json"
    if not plan_file.exists():
        planned(teacher, text, work / "activation", "75%").save(plan_file)
    found = {"teacher": teacher, "activation": cut(teacher, work / "activation", plan=str(plan_file))}
    for metric in {"random", "weight_norm"} & set(chosen.arms):
        found[metric] = cut_alike(teacher, text, work / metric, metric, PruningPlan.load(plan_file))
    if "distilled" in chosen.arms:
        validation = files(chosen, "validation")
        found["distilled"] = distilled(
            found["activation"], teacher, text, validation, chosen.tokens, work / "distilled"
        )
    return found


if __name__ == "__main__":
    main()
