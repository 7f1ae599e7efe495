"""Students under every kind of budget, alone and combined: does each hold when it is counted again and timed?

    python benchmarks/budgets.py --model demo/teacher --data demo/text/train.jsonl.xz [--budgets NAME ...]
        [--work runs/budgets]

Importance and times of blocks are measured once a model. Each budget is then one `halflap compress` with a short
distillation, and its exported checkpoint is asked again, with no help from what the run says of itself:

params, non_embedding_params   numbers in the safetensors files
memory                         2 bytes for each, and those of a cache that is made for the budget's context and batch
flops                          as models/count.py counts them from the checkpoint's config
latency, throughput            passes of teacher and student in turns, medians

Of each budget there is the share of the teacher's that was asked and the share that was reached. `logits` is the
largest difference between transformers' model of the checkpoint and ours, as a share of the largest logit, and
`opened_by` the class that transformers opens it with: its own for students of equal blocks, ours for others. A finished
row is kept under --work and passed over the next time.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

import halflap
from common import RESULTS, THREADS, Report, cell
from halflap.checkpoints.config import read_config
from halflap.commands.timing import in_turns
from halflap.compress.cost_model import Condition
from halflap.models.cache import Cache
from halflap.models.count import flops_per_token

LONG = {"context": 4096, "batch": 8}
READING = {"context": 512, "batch": 1}
BUDGETS: dict[str, dict[str, Any]] = {
    "params": {"params": "60%"},
    "non_embedding_params": {"non_embedding_params": "60%"},
    "memory": {"memory": "60%", **LONG},
    "flops": {"flops": "60%", **READING},
    "latency, decode": {"latency": "65%", **READING},
    "latency, prefill": {"latency": "65%", "phase": "prefill", **READING},
    "throughput, decode": {"throughput": "150%", **READING},
    "params and memory": {"params": "70%", "memory": "60%", **LONG},
    "params and latency": {"params": "60%", "latency": "70%", **READING},
    "params, memory, flops and latency": {
        "params": "75%",
        "memory": "75%",
        "flops": "75%",
        "latency": "70%",
        **READING,
    },
    "puzzle: params": {"method": "puzzle", "params": "60%"},
    "puzzle: params and latency": {"method": "puzzle", "params": "65%", "latency": "70%", **READING},
    "minipuzzle: params and memory": {"method": "minipuzzle", "params": "65%", "memory": "65%", **READING},
}
TIMES = ("latency", "throughput")


def main() -> None:
    chosen = options()
    torch.set_num_threads(chosen.threads)
    report = Report("budgets", chosen.out, chosen.threads)
    for model in chosen.model:
        ready = Ready(model, chosen)
        for name in chosen.budgets:
            settings = {key: getattr(chosen, key) for key in ("tokens", "calibration", "choosing", "length")}
            asked = {"model": model.name, "name": name, **settings}
            report.add(**cell(chosen.work, asked, lambda ready=ready, name=name: ready.row(name)))
    report.write()


class Ready:
    """A teacher with its importance and its table of times."""

    def __init__(self, model: Path, chosen: argparse.Namespace) -> None:
        self.model, self.chosen, self.place = model, chosen, chosen.work / model.name
        self.text: dict[str, Any] = {"data": chosen.data, "dtype": "float32"}
        self.settings = {"fit.sequence_length": chosen.length, "fit.batch_size": 8, "fit.learning_rate": 1e-3}
        self.importance = halflap.score(
            str(model), **self.text, tokens=chosen.calibration, sequence_length=chosen.length,
            out=str(self.place / "score"),
        )["path"]  # fmt: skip
        costs = self.place / "costs"
        halflap.bench(
            str(model), blocks=True, prompt=[READING["context"]], batch=[READING["batch"]], dtype="float32",
            out=str(costs),
        )  # fmt: skip
        self.costs = str(costs / "costs.json")

    def row(self, name: str) -> dict[str, Any]:
        asked = BUDGETS[name]
        times = {"costs": self.costs} if any(key in asked for key in TIMES) else {}
        out = self.place / name.replace(" ", "-").replace(",", "").replace(":", "")
        result = halflap.compress(
            str(self.model), **self.text, **asked, **times, **self.settings, importance=self.importance,
            tokens=self.chosen.tokens, score_tokens=self.chosen.choosing, shortlist=3, eval_tokens=8192, out=str(out),
        )  # fmt: skip
        found = reached(self.model, out / "checkpoint", asked)
        return {
            "reached": found,
            "holds": all(map(holds, found, found.values())),
            "verified": result["verified"],
            **opened(out / "checkpoint"),
        }


# --- counted and timed again -----------------------------------------------------------------------------------------


def reached(teacher: Path, student: Path, asked: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Of each budget that was asked, its share and the student's, of what the teacher has."""
    condition = Condition(asked.get("phase", "decode"), asked.get("context", 8192), asked.get("batch", 1))
    found = {}
    for name in (key for key in asked if key in AMOUNTS or key in TIMES):
        share = float(asked[name].rstrip("%")) / 100
        if name in TIMES:
            shapes = {"teacher": read_config(teacher), "student": read_config(student)}
            times = in_turns(shapes, condition, torch.device("cpu"), "float32")
            slow, fast = (statistics.median(times[name]) for name in shapes)
            has = slow / fast if name == "throughput" else fast / slow
        else:
            has = AMOUNTS[name](student, condition) / AMOUNTS[name](teacher, condition)
        found[name] = {"budget": share, "reached": has}
    return found


def holds(name: str, found: dict[str, float]) -> bool:
    """A throughput is a floor, all others are ceilings."""
    low, high = ("budget", "reached") if name == "throughput" else ("reached", "budget")
    return found[low] <= found[high]


def sizes(directory: Path) -> dict[str, int]:
    """Tensor name to how many numbers it has, from the files."""
    found = {}
    for file in sorted(directory.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  not a mapping
                found[name] = torch.Size(tensors.get_slice(name).get_shape()).numel()
    return found


def parameters(directory: Path, _: Condition) -> int:
    return sum(sizes(directory).values())


def beside_embeddings(directory: Path, _: Condition) -> int:
    return sum(count for name, count in sizes(directory).items() if not name.endswith(EMBEDDINGS))


EMBEDDINGS = ("embeddings.weight", "embed_tokens.weight", "lm_head.weight")


def memory(directory: Path, condition: Condition) -> int:
    cache = Cache.create(read_config(directory), condition.batch, condition.context, torch.bfloat16)
    return 2 * parameters(directory, condition) + cache.nbytes()


def flops(directory: Path, condition: Condition) -> float:
    return flops_per_token(read_config(directory), condition.context, condition.phase)


AMOUNTS: dict[str, Callable[[Path, Condition], float]] = {
    "params": parameters,
    "non_embedding_params": beside_embeddings,
    "memory": memory,
    "flops": flops,
}


def opened(directory: Path) -> dict[str, Any]:
    """By transformers: the class, and how far its logits are from ours."""
    from transformers import AutoModelForCausalLM

    import halflap.hf  # so that unequal students open

    tokens = torch.randint(0, read_config(directory).vocab_size, (2, 48), generator=torch.Generator().manual_seed(0))
    theirs: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    ours: Any = halflap.load(str(directory), dtype="float32")
    with torch.inference_mode():
        wanted, found = ours(tokens), theirs(tokens).logits
    return {"opened_by": f"{type(theirs).__module__}.{type(theirs).__name__}",
            "logits": float((found - wanted).abs().max() / wanted.abs().max())}  # fmt: skip


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, nargs="+", required=True, help="Hugging Face directories")
    parser.add_argument("--data", nargs="+", required=True, help="text to learn from")
    parser.add_argument("--budgets", nargs="+", choices=BUDGETS, default=list(BUDGETS))
    parser.add_argument("--tokens", default="20k", help="tokens of distillation")
    parser.add_argument("--calibration", default="16k", help="tokens that importance is measured on")
    parser.add_argument("--choosing", default="4k", help="tokens that candidates are compared on")
    parser.add_argument("--length", type=int, default=256, help="tokens of a row")
    parser.add_argument("--work", type=Path, default=Path("runs/budgets"))
    parser.add_argument("--threads", type=int, default=THREADS)
    parser.add_argument("--out", type=Path, default=RESULTS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
