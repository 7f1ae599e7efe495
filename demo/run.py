"""The demo: compress the carried teacher to half, beside honest controls; then let stock transformers write with it.

Usage: python demo/run.py [--out runs/demo] [--seed 0]. Finished steps are found again, so it can be interrupted.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

import halflap
from halflap.files import write_json
from halflap.report.arms import Arms

HERE = Path(__file__).parent
PROMPT = "The man walked into the"


def compress(out: Path, seed: int) -> dict[str, Any]:
    recipe = yaml.safe_load((HERE / "demo.yaml").read_text("utf-8"))
    recipe.pop("verb")
    for name in ("model", "data", "eval_data"):
        recipe[name] = str(HERE.parent / recipe[name])
    sections = {
        f"{section}.{name}": value for section in ("fit", "space") for name, value in recipe.pop(section).items()
    }
    return halflap.compress(recipe.pop("model"), **recipe, **sections, seed=seed, out=str(out))


def measure_speed(out: Path) -> None:
    """Teacher and student in one file, which the page shows side by side."""
    models = {"teacher": HERE / "teacher", "student": out / "checkpoint"}
    grid = {"prompt": [512], "output": [32], "batch": [1, 8], "dtype": "bfloat16"}
    write_json(out / "bench.json", {name: halflap.bench(str(path), **grid) for name, path in models.items()})


def print_table(console: Console, table: Arms) -> None:
    shown = Table(title=f"Held-out loss; interval: {table.interval}", title_justify="left", box=SIMPLE)
    for column in ("model", "parameters", "tokens", "loss", "interval", "bits a byte"):
        shown.add_column(column, justify="left" if column == "model" else "right", no_wrap=True)
    for arm in table.arms:
        low, high = arm.loss_ci or (float("nan"), float("nan"))
        trained = f"{arm.tokens_trained / 1e3:.0f}k" if arm.tokens_trained else "-"
        interval, bits = f"{low:.3f}-{high:.3f}", f"{arm.bits_per_byte:.3f}"
        shown.add_row(arm.name, f"{arm.parameters / 1e6:.2f}M", trained, f"{arm.loss:.3f}", interval, bits)
    console.print(shown)


def write_with_transformers(student: Path) -> str:
    """A sentence from the stock class, after checking that its logits are ours."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    stock = AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(student)
    tokens = tokenizer(PROMPT, return_tensors="pt").input_ids
    ours = halflap.load(str(student), dtype="float32", device="cpu")
    with torch.no_grad():
        difference = float((stock(tokens).logits - ours(tokens)).abs().max())
    if difference > 1e-4:
        raise SystemExit(f"stock transformers and halflap disagree by {difference:.2g} on the student's logits")
    torch.manual_seed(0)
    sampling = {"do_sample": True, "temperature": 0.7, "top_k": 40, "repetition_penalty": 1.1}
    written = stock.generate(tokens, max_new_tokens=48, **sampling)
    return f"{tokenizer.decode(written[0])}\n\n(logits of transformers and halflap differ by at most {difference:.1e})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=HERE.parent / "runs" / "demo")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    started, console = time.monotonic(), Console()
    result = compress(options.out, options.seed)
    measure_speed(options.out)
    halflap.report([str(options.out)], out=str(options.out / "report.html"))
    print_table(console, Arms.load(options.out / "arms.json"))
    verdict = "equals its masked teacher to rounding" if result["verified"] else "is NOT its masked teacher"
    console.print(f"The pruned student has {result['parameters_ratio']:.1%} of the parameters and {verdict}.")
    console.print("\nStock transformers, from the distilled student's directory:\n", style="bold")
    console.print(write_with_transformers(options.out / "checkpoint"), markup=False)
    console.print(f"\nPage: {(options.out / 'report.html').resolve()}", style="bold")
    console.print(f"{(time.monotonic() - started) / 60:.1f} minutes on {torch.get_num_threads()} threads")


if __name__ == "__main__":
    sys.exit(main())
