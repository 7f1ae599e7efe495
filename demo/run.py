"""The demo: compress the carried teacher to half, beside honest controls; then let stock transformers write with it.

Usage: python demo/run.py [--out runs/demo] [--seeds 0]. Several seeds repeat the table (order of the text, random cut,
random weights of the arm from scratch) and print its means and ranges. Finished steps are found again, so it can be
interrupted.
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
from halflap.report.arms import Arms, across_seeds, arms_markdown

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
    grid = {"prompt": [512], "output": [32], "batch": [1, 8]}
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


def show_one(out: Path, seed: int, console: Console) -> None:
    """One seed, the page, and a sentence by the student."""
    result = compress(out, seed)
    measure_speed(out)
    halflap.report([str(out)], out=str(out / "report.html"))
    print_table(console, Arms.load(out / "arms.json"))
    verdict = "equals its masked teacher to rounding" if result["verified"] else "is NOT its masked teacher"
    console.print(f"The pruned student has {result['parameters_ratio']:.1%} of the parameters and {verdict}.")
    console.print("\nStock transformers, from the distilled student's directory:\n", style="bold")
    console.print(write_with_transformers(out / "checkpoint"), markup=False)
    console.print(f"\nPage: {(out / 'report.html').resolve()}", style="bold")


def repeat(out: Path, seeds: list[int], console: Console) -> None:
    """Every seed in a directory of its own; their common table as arms.json and table.md."""
    for seed in seeds:
        compress(out / f"seed-{seed}", seed)
    table = across_seeds([Arms.load(out / f"seed-{seed}" / "arms.json") for seed in seeds])
    table.save(out / "arms.json")
    (out / "table.md").write_text(arms_markdown(table), encoding="utf-8")
    print_table(console, table)
    console.print(f"Table: {(out / 'table.md').resolve()}", style="bold")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    options = parser.parse_args()
    started, console, runs = time.monotonic(), Console(width=max(100, Console().width)), HERE.parent / "runs"
    if len(options.seeds) == 1:
        show_one(options.out or runs / "demo", options.seeds[0], console)
    else:
        repeat(options.out or runs / "demo-seeds", options.seeds, console)
    console.print(f"{(time.monotonic() - started) / 60:.1f} minutes on {torch.get_num_threads()} threads")


if __name__ == "__main__":
    sys.exit(main())
