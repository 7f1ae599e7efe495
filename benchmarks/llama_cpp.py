"""halflap against llama.cpp at equal precision: decode of 1, 8 and 16 sequences, prefill of 512 and 4096 tokens.

    python benchmarks/llama_cpp.py --llama-cpp FOLDER [--smollm2 FILE.gguf|DIR] [--sizes 55m 205m] [--work DIR]

FOLDER holds `llama-batched-bench` and `llama-quantize` of a build for this very processor, as `make llama-cpp` makes
one; ready-made wheels leave out what not every processor has. Both sides have the same weights (`export --format
gguf`, then `llama-quantize` with its own choices), threads and numbers of tokens, and no sampling: ours adds an argmax.
Where llama.cpp has two 16-bit types, BF16 and F16, both run and the faster one counts. Its settings are its defaults,
which are its documented best on processors: weights repacked when loaded, flash attention where it pays, batches of
2048 in passes of 512, 16-bit keys and values. As llama.cpp packs the embedding too, so do we here (`keep` dt alone);
what we do not pack is float32, as `halflap serve` has it. Both sides time themselves, loading apart, and take turns.

`bandwidth_share`, at batch 1: the weights that a step reads (no table of embeddings, unless the head is the same) at
the canary's read bandwidth, over the step's time. Goals: at least llama.cpp's rate in every cell, 1.3 times in half
of them, twice at batch 16; 70 % of the bandwidth in bfloat16 and int8, 55 % in int4.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import statistics
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import halflap
from common import Report, arguments, cell, interleave, our_model, packed_model, random_tokens, spread
from decode import our_decode
from halflap.checkpoints.checkpoint import load_model, save_model
from halflap.models.model import HybridModel
from halflap.models.quantization import Quantization
from prefill import our_prefill

TYPES = {"bfloat16": ("BF16", "F16"), "int8": ("Q8_0",), "int4": ("Q4_0",)}  # our precision to llama.cpp's types
FLOATS = {"BF16": "bfloat16", "F16": "float16"}
KEPT = ("dt",)
TRIES = 5  # its log is written by a thread, which may be ended before it has written
SLOT = 256  # llama.cpp rounds a sequence's cells up to it


def main() -> None:
    quick = {"sizes": ["nemotron-h-tiny"], "prompt": 16, "steps": 4, "batches": [1, 2], "prefills": [32]}
    chosen = arguments(
        __doc__, quick, llama_cpp="", smollm2="", precisions=list(TYPES), prompt=64, steps=64, batches=[1, 8, 16],
        prefills=[512, 4096], work=Path("runs/llama_cpp"),
    )  # fmt: skip
    programs = {name: program(name, chosen.llama_cpp) for name in ("llama-batched-bench", "llama-quantize")}
    report = Report("llama_cpp", chosen.out, chosen.threads)
    cells = [("decode", batch, chosen.prompt, chosen.steps) for batch in chosen.batches]
    cells += [("prefill", 1, prompt, 1) for prompt in chosen.prefills]
    for size in [*chosen.sizes, *(["smollm2"] if chosen.smollm2 else [])]:
        for precision in chosen.precisions:
            pair = Pair(size, precision, programs, chosen, report.before["read_gb_per_second"])
            for phase, batch, prompt, steps in cells:
                asked = {"size": size, "weights": precision, "phase": phase, "batch": batch, "prompt": prompt}
                asked |= {"steps": steps, "threads": chosen.threads, "repeats": chosen.repeats}
                report.add(**cell(chosen.work, asked, partial(pair.measure, phase, batch, prompt, steps)))
    report.add(**summary(report.rows))
    report.write()


def program(name: str, folder: str) -> str:
    found = shutil.which(name, path=folder or None)
    if found is None:
        place = f"in {folder}" if folder else "on PATH"
        raise SystemExit(
            f"{name} is not {place}: build llama.cpp with `make llama-cpp` and give its --llama-cpp FOLDER"
        )
    return found


class Pair:
    """Both sides of one model at one precision, made when the first cell needs them."""

    def __init__(self, size: str, precision: str, programs: dict[str, str], chosen: Any, bandwidth: float) -> None:
        self.precision, self.programs, self.chosen, self.bandwidth = precision, programs, chosen, bandwidth
        self.size, self.folder = size, chosen.work / size
        self._model: HybridModel | None = None
        self._files: dict[str, Path] = {}

    def measure(self, phase: str, batch: int, prompt: int, steps: int) -> dict[str, Any]:
        model = self.model()
        tokens = random_tokens(model, batch, prompt)
        ours = our_decode(model, tokens, steps) if phase == "decode" else our_prefill(model, tokens)
        sides: dict[str, Callable[[], Any]] = {"halflap": ours}
        self._files = self._files or {kind: self.file(kind) for kind in TYPES[self.precision]}
        for kind, file in self._files.items():
            sides[kind] = partial(self.llama_cpp, file, phase, batch, prompt, steps)
        times = interleave(sides, self.chosen.repeats)
        amount = batch * steps if phase == "decode" else prompt
        rates = {name: spread(taken, amount) for name, taken in times.items()}
        theirs = max(rates[kind]["median"] for kind in TYPES[self.precision])
        row: dict[str, Any] = {**rates, "ratio": rates["halflap"]["median"] / theirs}
        if phase == "decode" and batch == 1:
            least = bytes_of_a_step(model) / 1e9 / self.bandwidth
            row["bandwidth_share"] = least * steps / statistics.median(times["halflap"])
        return row

    def llama_cpp(self, file: Path, phase: str, batch: int, prompt: int, steps: int) -> float:
        """Seconds of all steps, or of the prompt, as llama-batched-bench takes them."""
        cells, threads = batch * -(-(prompt + steps) // SLOT) * SLOT, str(self.chosen.threads)
        words = ["-m", file, "-c", cells, "-npp", prompt, "-ntg", steps, "-npl", batch, "-t", threads, "-tb", threads]
        for _ in range(TRIES):
            said = run(self.programs["llama-batched-bench"], *words, "--output-format", "jsonl")
            for line in said.splitlines():
                if line.startswith("{"):
                    return float(json.loads(line)["t_tg" if phase == "decode" else "t_pp"])
        raise SystemExit(f"llama-batched-bench {' '.join(map(str, words))} measured nothing: {said[-2000:]}")

    def model(self) -> HybridModel:
        if self._model is None:
            form = self.precision
            quantization = None if form in FLOATS.values() else Quantization.asked(form, None, KEPT)
            source = self.checkpoint()
            self._model = packed_model(source, quantization) if quantization else load_model(source, form)
        return self._model

    def checkpoint(self) -> Path:
        """Ours, which both sides are made of."""
        directory = self.folder / "checkpoint"
        if self.size == "smollm2" and Path(self.chosen.smollm2).is_dir():
            return Path(self.chosen.smollm2)
        if self.size == "smollm2":
            halflap.import_(self.chosen.smollm2, out=str(directory))
        elif not directory.exists():
            save_model(our_model(self.size), directory)
        return directory

    def file(self, kind: str) -> Path:
        """The model as llama.cpp reads it, with weights of that type."""
        if kind in FLOATS:
            dtype = FLOATS[kind]
            source, out = str(self.checkpoint()), str(self.folder / kind)
            return Path(halflap.export(source, format="gguf", dtype=dtype, out=out)["path"])
        made = self.folder / f"{kind}.gguf"
        if not made.exists():
            part = made.with_suffix(".part")
            run(self.programs["llama-quantize"], self.file("BF16"), part, kind, self.chosen.threads)
            part.rename(made)
        return made


def run(*command: Any) -> str:
    done = subprocess.run([*map(str, command)], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))} failed: {(done.stderr or done.stdout)[-2000:]}")
    return done.stdout


def bytes_of_a_step(model: HybridModel) -> int:
    tied = model.head is None
    return sum(t.nbytes for name, t in model.state_dict().items() if tied or not name.startswith("embedding."))


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What the goals are about."""
    ratios = [row["ratio"] for row in rows]
    found: dict[str, Any] = {"cells": len(rows), "least_ratio": min(ratios)}
    found["share_at_least_1.3"] = sum(ratio >= 1.3 for ratio in ratios) / len(ratios)
    with contextlib.suppress(ValueError):  # of a trial without such cells
        found["least_ratio_of_batch_16"] = min(row["ratio"] for row in rows if row["batch"] == 16)
    for precision in TYPES:
        shares = [row["bandwidth_share"] for row in rows if "bandwidth_share" in row and row["weights"] == precision]
        found |= {f"least_bandwidth_share_{precision}": min(shares)} if shares else {}
    return found


if __name__ == "__main__":
    main()
