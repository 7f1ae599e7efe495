"""An 8B shape (random weights, 16 GB in bfloat16) made smaller with one block in memory: time and peak memory of each
verb, from score to export, as a user runs it.

`score` is compared with two floors: its matrix products, counted from the config, at the canary's float32 rate, and its
weights at the rate at which the disk gives them (read in order once, with nothing in the page cache, as `score` finds
them). --teacher names another preset, --folder a disk with room for two copies, --text and --tokenizer what is read.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import Report, arguments, run_measured
from halflap.checkpoints.checkpoint import write_checkpoint
from halflap.checkpoints.streamed import largest_part
from halflap.models.config import ModelConfig
from halflap.models.count import count_block_parameters, count_parameters
from halflap.models.presets import preset
from prune_stream import PIECE, drop_pages, random_tensors, weight_bytes

DEMO = Path(__file__).parent.parent / "demo"


def run_verb(verb: str, *words: object, threads: int) -> dict[str, Any]:
    """Result, seconds and peak resident bytes of one verb in a process of its own."""
    command = (sys.executable, "-m", "halflap", verb, *map(str, words), "--json", "--quiet")
    return run_measured(*command, threads=threads)


def score_flops(config: ModelConfig, tokens: int) -> int:
    """Of the matrices: the text passes every block, and so do the passes that lack one of the blocks before it; then
    the head reads the full and the lacking hidden states of every block."""
    blocks = count_block_parameters(config)
    passes = sum((1 + removed) * parameters for removed, parameters in enumerate(blocks))
    return 2 * tokens * (passes + 2 * len(blocks) * config.hidden_size * config.vocab_size)


def read_seconds(directory: str) -> float:
    drop_pages(directory)
    start = time.perf_counter()
    for file in sorted(Path(directory).glob("*.safetensors")):
        with open(file, "rb", buffering=0) as opened:
            while opened.read(PIECE):
                pass
    return time.perf_counter() - start


def main() -> None:
    chosen = arguments(
        __doc__,
        quick={"teacher": "nemotron-h-8m", "tokens": 64},
        teacher="nemotron-h-8b", tokens=512, folder="", text=str(DEMO / "text" / "validation.jsonl.xz"),
        tokenizer=str(DEMO / "teacher"),
    )  # fmt: skip
    report = Report("streamed_score", chosen.out, chosen.threads)
    config = preset(chosen.teacher)
    with tempfile.TemporaryDirectory(dir=chosen.folder or None) as scratch:
        teacher, *runs = (f"{scratch}/{name}" for name in ("teacher", "score", "search", "pruned", "exported"))
        write_checkpoint(teacher, config, random_tensors(config), dtype="bfloat16", tokenizer_from=chosen.tokenizer)
        reading = read_seconds(teacher)
        drop_pages(teacher)
        length = ("--sequence-length", chosen.tokens)
        text = ("--data", chosen.text, "--seed", 0)
        importance = f"{runs[0]}/importance.safetensors"
        steps = {
            "score": (teacher, *text, "--tokens", chosen.tokens, *length, "--batch-size", 1, "--stream"),
            "search": (
                *(teacher, *text, "--importance", importance, "--params", "50%", "--stream", "--shortlist", 1),
                *("--score-tokens", chosen.tokens, "--fit.sequence-length", chosen.tokens, "--fit.batch-size", 1),
            ),
            "prune": (teacher, "--plan", f"{runs[1]}/search.json"),
            "verify": (runs[2],),
            "export": (runs[2],),
        }
        outs = dict(zip(("score", "search", "prune", "export"), runs, strict=True))
        for verb, words in steps.items():
            out = ("--out", outs[verb]) if verb in outs else ()
            done = run_verb(verb, *words, *out, threads=chosen.threads)
            row: dict[str, Any] = {"verb": verb, "seconds": done["seconds"], "peak_gib": done["peak_bytes"] / 2**30}
            if verb == "score":
                floor = score_flops(config, chosen.tokens) / report.before["float32_gflops"] / 1e9
                row |= {
                    "teacher": chosen.teacher, "tokens": chosen.tokens,
                    "weights_gib": weight_bytes(teacher) / 2**30, "largest_part": largest_part(config)[0],
                    "largest_part_gib": 4 * largest_part(config)[1] / 2**30,
                    "arithmetic_floor_seconds": floor, "disk_floor_seconds": reading,
                    "read_gb_per_second": weight_bytes(teacher) / 1e9 / reading,
                    "time_ratio": done["seconds"] / max(floor, reading),
                }  # fmt: skip
            elif verb == "prune":
                row["share"] = done["result"]["parameters"] / count_parameters(config)
            elif verb == "verify":
                row |= {name: done["result"][name] for name in ("passed", "arithmetic", "exact_max_abs_error")}
            report.add(**row)
        shutil.rmtree(teacher)
    report.write()


if __name__ == "__main__":
    main()
