"""Peak resident memory of two training steps on one row of 2048 tokens, each side in a process of its own.

`peak` is the process's peak, libraries, weights, gradients and AdamW's state included; `activations` is the peak less
the process's size once weights are loaded, less gradients and AdamW's state (three times the weights).
"""

from __future__ import annotations

import json
import resource
import sys
import tempfile

import psutil
import torch

from common import SIZES, Report, arguments, our_model, run_apart, stock_model
from halflap.checkpoints.checkpoint import load_model, save_model
from training_step import our_step, their_step

KINDS = (
    "halflap-float32",
    "transformers-float32",
    "halflap-bfloat16",
    "transformers-autocast",
    "transformers-bfloat16",
)


def measure(kind: str, directory: str, time: int) -> dict[str, float]:
    """Bytes; runs in a process of its own."""
    side, precision = kind.split("-")
    tokens = torch.randint(0, 1000, (1, time + 1), generator=torch.Generator().manual_seed(0))
    if side == "halflap":
        model = load_model(directory)
        step = our_step(model, tokens, getattr(torch, precision))
    else:
        model = stock_model(directory, torch.bfloat16 if precision == "bfloat16" else torch.float32)
        step = their_step(model, tokens, precision == "autocast")
    loaded = psutil.Process().memory_info().rss
    for _ in range(2):
        step()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    return {"peak": peak, "activations": peak - loaded - 3 * weights}


def main() -> None:
    if sys.argv[1:2] == ["--measure"]:
        print(json.dumps(measure(*sys.argv[2:4], int(sys.argv[4]))))
        return
    chosen = arguments(__doc__, tokens=2048)
    report = Report("memory", chosen.out, chosen.threads)
    for size in chosen.sizes:
        with tempfile.TemporaryDirectory() as directory:
            save_model(our_model(size), directory)
            found = {
                kind: run_apart("memory.py", "--measure", kind, directory, str(chosen.tokens), threads=chosen.threads)
                for kind in KINDS
            }
        for precision, others in (("float32", ["float32"]), ("bfloat16", ["autocast", "bfloat16"])):
            ours = found[f"halflap-{precision}"]
            theirs = {other: found[f"transformers-{other}"] for other in others}
            row = {f"transformers_{other}_gib": numbers["peak"] / 2**30 for other, numbers in theirs.items()}
            report.add(
                size=size, model=SIZES[size], dtype=precision, halflap_gib=ours["peak"] / 2**30, **row,
                ratio=ours["peak"] / min(numbers["peak"] for numbers in theirs.values()),
                activations_ratio=ours["activations"] / min(numbers["activations"] for numbers in theirs.values()),
            )  # fmt: skip
    report.write()


if __name__ == "__main__":
    main()
