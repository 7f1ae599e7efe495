"""An 8B shape (random weights, 16 GB in bfloat16) through every verb that makes a model smaller, each as a user runs
it: seconds, peak resident memory and bytes read from the disk, beside what arithmetic and disk allow.

The floor of a verb is the larger of two times: its matrix products, counted from the configs, at the canary's float32
rate; and each byte it needs read once and each byte it makes written once, at the rates measured here with nothing in
the page cache, as the verb finds its files. A folder inside --folder keeps the checkpoint, the runs and steps.json, so
that a killed benchmark goes on, in the verb that was under way too, whose times add up; it is deleted at the end.
--preset names another shape, --text and --tokenizer what is read. Of 8 B the folder takes 40 GB.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from common import Report, arguments
from halflap.checkpoints.checkpoint import write_checkpoint
from halflap.checkpoints.config import read_config
from halflap.checkpoints.streamed import largest_part
from halflap.compress.plan import PruningPlan
from halflap.compress.search import SearchResult
from halflap.compress.verify import plans_by_axis
from halflap.files import write_json
from halflap.models.config import ModelConfig
from halflap.models.count import count_block_parameters, count_parameters
from halflap.models.presets import preset
from prune_stream import PIECE, drop_pages, random_tensors, weight_bytes

DEMO = Path(__file__).parent.parent / "demo"
WRITTEN = 1 << 30  # bytes written to measure a rate
CHECKED = 128  # tokens that `export` compares


# ---- one verb under a watch


class Steps:
    """What is done, in a file: of each step its attempts and, once it has ended well, its result."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.all: dict[str, dict[str, Any]] = json.loads(file.read_text()) if file.exists() else {}

    def of(self, name: str) -> dict[str, Any]:
        return self.all.setdefault(name, {"attempts": []})

    def save(self) -> None:
        write_json(self.file, self.all)


def run_verb(steps: Steps, name: str, words: tuple[object, ...], threads: int) -> None:
    """A verb in a process of its own; the attempt's numbers are kept while it runs, and are exact when it has ended."""
    step = steps.of(name)
    step["attempts"].append(attempt := {"seconds": 0.0, "peak_gib": 0.0, "read_gb": 0.0})
    command = [sys.executable, "-m", "halflap", *map(str, words), "--json", "--quiet"]
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=out, stderr=err, env=os.environ | {"OMP_NUM_THREADS": str(threads)})
        try:
            status, usage = _wait(process.pid, lambda resident: _note(steps, attempt, start, resident))
        except BaseException:
            process.terminate()
            process.wait()
            raise
        attempt["seconds"] = time.perf_counter() - start
        attempt["peak_gib"] = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 2**30
        attempt["read_gb"] = usage.ru_inblock * 512 / 1e9
        process.returncode = os.waitstatus_to_exitcode(status)
        for file in (out, err):
            file.seek(0)
        if process.returncode:
            raise RuntimeError(f"{name} failed: {err.read().decode()[-2000:]}")
        step["result"] = json.loads(out.read())
    steps.save()


def _wait(process: int, note: Callable[[int], None]) -> tuple[int, Any]:
    """Exit status and use of resources of a child; `note` is given its resident bytes now and then."""
    watched, last = psutil.Process(process), 0.0
    while True:
        ended, status, usage = os.wait4(process, os.WNOHANG)
        if ended:
            return status, usage
        if time.monotonic() - last > 10:
            note(watched.memory_info().rss)
            last = time.monotonic()
        time.sleep(0.05)


def _note(steps: Steps, attempt: dict[str, float], start: float, resident: int) -> None:
    attempt["seconds"] = time.perf_counter() - start
    attempt["peak_gib"] = max(attempt["peak_gib"], resident / 2**30)
    steps.save()


# ---- floors


class Floor(NamedTuple):
    """What a verb cannot do without: floating-point operations of matrices, bytes read, bytes written."""

    flops: float = 0.0
    read: int = 0
    written: int = 0


def pass_flops(config: ModelConfig, tokens: int) -> int:
    """Of a forward pass with its logits."""
    return 2 * tokens * (sum(count_block_parameters(config)) + config.hidden_size * config.vocab_size)


def score_flops(config: ModelConfig, tokens: int) -> int:
    """The text passes every block, and so do the passes that lack one of the blocks before it; then the head reads the
    full and the lacking hidden states of every block."""
    blocks = count_block_parameters(config)
    passes = sum((1 + removed) * parameters for removed, parameters in enumerate(blocks))
    return 2 * tokens * (passes + 2 * len(blocks) * config.hidden_size * config.vocab_size)


def search_flops(config: ModelConfig, file: Path, tokens: int) -> float:
    """Every candidate that has a loss read the text."""
    measured = [trial for trial in SearchResult.load(file).trials if trial.loss is not None]
    embeddings = [(trial.sizes.hidden_size or config.hidden_size) * config.vocab_size for trial in measured]
    return sum(2 * tokens * (t.costs["params"] - size) for t, size in zip(measured, embeddings, strict=True))


def verify_flops(plan: PruningPlan, tokens: int) -> int:
    """For each axis and for all together a masked teacher and a cut one; and the stored student."""
    plans = [*plans_by_axis(plan).values(), plan]
    cut = sum(pass_flops(one.student, tokens) for one in plans)
    return len(plans) * pass_flops(plan.teacher_config, tokens) + cut + pass_flops(plan.student, tokens)


def measure_rates(folder: Path, teacher: Path) -> dict[str, float]:
    """GB/s at which the teacher's files are read in order from the disk, and bytes are written and flushed to it."""
    drop_pages(str(teacher))
    start = time.perf_counter()
    for file in sorted(teacher.glob("*.safetensors")):
        with open(file, "rb", buffering=0) as opened:
            while opened.read(PIECE):
                pass
    read = time.perf_counter() - start
    size, piece, start = min(WRITTEN, weight_bytes(str(teacher))), os.urandom(PIECE), time.perf_counter()
    with open(folder / "written", "wb", buffering=0) as opened:
        for _ in range(-(-size // PIECE)):
            opened.write(piece)
        os.fsync(opened.fileno())
    written = time.perf_counter() - start
    (folder / "written").unlink()
    return {"read": weight_bytes(str(teacher)) / 1e9 / read, "written": -(-size // PIECE) * PIECE / 1e9 / written}


# ---- the walk


def write_teacher(steps: Steps, folder: Path, chosen: argparse.Namespace) -> Path:
    teacher, step = folder / "teacher", steps.of("write")
    if "result" not in step:
        config, start = preset(chosen.preset), time.perf_counter()
        write_checkpoint(teacher, config, random_tensors(config), dtype="bfloat16", tokenizer_from=chosen.tokenizer)
        step["attempts"].append({"seconds": time.perf_counter() - start})
        step["result"] = measure_rates(folder, teacher)
        steps.save()
    return teacher


def words_of(folder: Path, chosen: argparse.Namespace) -> dict[str, tuple[object, ...]]:
    """Every verb's words, in order, by a name of the step."""
    teacher, pruned, tokens = folder / "teacher", folder / "prune", chosen.tokens
    text = ("--data", chosen.text, "--seed", 0)
    judged = (*text, "--tokens", tokens, "--context", tokens, "--batch-size", 1, "--stream")
    return {
        "score": (
            *("score", teacher, *text, "--tokens", tokens, "--sequence-length", tokens, "--batch-size", 1, "--stream"),
            *("--out", folder / "score"),
        ),
        "search": (
            *("search", teacher, *text, "--importance", folder / "score" / "importance.safetensors", "--params", "50%"),
            *("--stream", "--shortlist", chosen.shortlist, "--score-tokens", tokens, "--fit.sequence-length", tokens),
            *("--fit.batch-size", 1, "--out", folder / "search"),
        ),
        "prune": ("prune", teacher, "--plan", folder / "search" / "search.json", "--out", pruned),
        "verify": ("verify", pruned),
        "evaluate teacher": ("evaluate", teacher, *judged, "--out", folder / "evaluate-teacher"),
        "evaluate student": ("evaluate", pruned, *judged, "--out", folder / "evaluate-student"),
        "export hf": ("export", pruned, "--out", folder / "export-hf"),
        "export gguf": ("export", pruned, "--format", "gguf", "--out", folder / "export-gguf"),
    }


def floor_of(name: str, folder: Path, chosen: argparse.Namespace, result: dict[str, Any]) -> Floor:
    """Of a step that has ended."""
    config, pruned, tokens = preset(chosen.preset), folder / "prune" / "checkpoint", chosen.tokens
    teacher, student = weight_bytes(str(folder / "teacher")), weight_bytes(str(pruned))
    if name == "score":
        return Floor(score_flops(config, tokens), teacher)
    if name == "search":
        return Floor(search_flops(config, folder / "search" / "search.json", tokens), teacher)
    if name == "prune":
        return Floor(0, teacher, student)
    if name == "verify":
        plan = PruningPlan.load(folder / "search" / "search.json")
        return Floor(verify_flops(plan, result["tokens"]), teacher + student)
    if name == "evaluate teacher":
        return Floor(pass_flops(config, result["tokens"]), teacher)
    if name == "evaluate student":
        return Floor(pass_flops(read_config(pruned), result["tokens"]), student)
    return Floor(2 * pass_flops(read_config(pruned), CHECKED), student, student)


SAID = {
    "prune": ("parameters", "ratio"),
    "verify": ("passed", "arithmetic", "exact_max_abs_error"),
    "evaluate teacher": ("loss", "streamed"),
    "evaluate student": ("loss", "streamed"),
    "export hf": ("max_abs_error",),
    "export gguf": ("max_abs_error",),
}
"""What a row says of a verb's result."""


def row_of(name: str, step: dict[str, Any], floor: Floor, gflops: float, rates: dict[str, float]) -> dict[str, Any]:
    attempts, result = step["attempts"], step["result"]
    arithmetic = floor.flops / gflops / 1e9
    disk = floor.read / rates["read"] / 1e9 + floor.written / rates["written"] / 1e9
    seconds = sum(attempt["seconds"] for attempt in attempts)
    return {
        "verb": name,
        "seconds": seconds,
        "attempts": len(attempts),
        "peak_gib": max(attempt["peak_gib"] for attempt in attempts),
        "read_gb": sum(attempt["read_gb"] for attempt in attempts),
        "arithmetic_floor_seconds": arithmetic,
        "disk_floor_seconds": disk,
        "time_ratio": seconds / max(arithmetic, disk),
        **{key: result[key] for key in SAID.get(name, ())},
    }


def main() -> None:
    chosen = arguments(
        __doc__,
        quick={"preset": "nemotron-h-8m", "tokens": 64},
        preset="nemotron-h-8b", tokens=512, shortlist=2, folder=tempfile.gettempdir(),
        text=str(DEMO / "text" / "validation.jsonl.xz"), tokenizer=str(DEMO / "teacher"),
    )  # fmt: skip
    folder = Path(chosen.folder) / f"halflap-eight-billion-{chosen.preset}"
    folder.mkdir(parents=True, exist_ok=True)
    config, steps = preset(chosen.preset), Steps(folder / "steps.json")
    report = Report("eight_billion", chosen.out, chosen.threads)
    teacher = write_teacher(steps, folder, chosen)
    rates = steps.of("write")["result"]
    report.add(
        preset=chosen.preset, parameters=count_parameters(config), weights_gib=weight_bytes(str(teacher)) / 2**30,
        largest_part=largest_part(config)[0], largest_part_gib=4 * largest_part(config)[1] / 2**30,
        tokens=chosen.tokens, read_gb_per_second=rates["read"], written_gb_per_second=rates["written"],
    )  # fmt: skip
    for name, words in words_of(folder, chosen).items():
        if "result" not in steps.of(name):
            for weights in (teacher, folder / "prune" / "checkpoint"):
                drop_pages(str(weights))
            run_verb(steps, name, words, chosen.threads)
        step = steps.of(name)
        floor = floor_of(name, folder, chosen, step["result"])
        report.add(**row_of(name, step, floor, report.before["float32_gflops"], rates))
        if name.startswith("export"):
            shutil.rmtree(folder / name.replace(" ", "-"), ignore_errors=True)
    report.write()
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
