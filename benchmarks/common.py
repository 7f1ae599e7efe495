"""What every benchmark shares: a canary for the machine's health, interleaved timing, both models, one JSON file.

The canary (matrix products in float32 and bfloat16, one read of memory) runs before and after, in a process of its own
so that the benchmark's memory does not bear on it; when the two differ by more than a tenth, the result says so. Sides
take turns, so that a slow minute of the machine hits all of them. transformers runs at its best: scaled-dot-product
attention, fused AdamW, no cache while training, last logits only in prefill, a bare loop in decode.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from halflap import environment
from halflap.checkpoints.checkpoint import Checkpoint, fill_model, save_model
from halflap.files import write_json
from halflap.models.config import Mamba2Config, MLPConfig, ModelConfig
from halflap.models.count import count_parameters
from halflap.models.model import HybridModel, initialize
from halflap.models.presets import hymba, llama, preset
from halflap.models.quantization import Quantization
from halflap.models.quantized import pack_tensors
from halflap.models.stack import with_parameters
from halflap.ops import select

RESULTS = Path(__file__).parent / "results"
THREADS = 2
TOO_LONG = 60.0  # seconds of a call that is not repeated
LONGEST = 1 << 17  # positions of models whose contexts are long
SIZES = {"55m": "nemotron-h-55m", "205m": "nemotron-h-205m"}


def arguments(description: str | None, quick: Mapping[str, Any] | None = None, **defaults: Any) -> argparse.Namespace:
    """--sizes, --repeats, --threads, --out and the script's own numbers, by their defaults.

    quick: what --quick sets instead, for a trial of the script whose figures mean nothing and are kept elsewhere.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--repeats", type=int, default=5, help="timed turns of each side")
    parser.add_argument("--threads", type=int, default=THREADS)
    parser.add_argument("--out", type=Path, default=RESULTS, help="directory for the JSON file")
    for name, default in defaults.items():
        listed = isinstance(default, (list, tuple))
        kind = type(default[0]) if listed else type(default)
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, nargs="+" if listed else None, default=default)
    if quick is not None:
        parser.add_argument("--quick", action="store_true", help="a trial at toy size; its figures mean nothing")
    chosen = parser.parse_args()
    if quick is not None and chosen.quick:
        parser.set_defaults(repeats=1, out=Path(tempfile.gettempdir()) / "halflap-benchmarks", **quick)
        chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    return chosen


# --- the machine ---------------------------------------------------------------------------------------------------


def measure_canary() -> dict[str, float]:
    """GFLOP/s of a 2048^3 product in both dtypes and GB/s of summing 512 MB."""
    found = {}
    for name, dtype in (("float32_gflops", torch.float32), ("bfloat16_gflops", torch.bfloat16)):
        a, b = torch.randn(2048, 2048, dtype=dtype), torch.randn(2048, 2048, dtype=dtype)
        found[name] = 2 * 2048**3 / 1e9 / least_seconds(lambda a=a, b=b: a @ b)
    memory = torch.ones(2**27)
    found["read_gb_per_second"] = memory.nbytes / 1e9 / least_seconds(memory.sum)
    return found


def least_seconds(function: Callable[[], Any]) -> float:
    """The best of five; a processor without bfloat16 takes minutes for one product, and then that one stands."""
    first = seconds(function)
    return first if first > 5 else min(seconds(function) for _ in range(5))


def seconds(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def commit() -> str:
    """The checkout's commit, with `+` when files of the package differ from it."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run([*git, "status", "--porcelain", "--", "../src"], capture_output=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + ("+" if changed.strip() else "")


# --- timing --------------------------------------------------------------------------------------------------------


def interleave(sides: Mapping[str, Callable[[], Any]], repeats: int, warm_up: int = 1) -> dict[str, list[float]]:
    """Seconds of each call; the sides take turns. A side's `prepare`, if it has one, runs untimed before each turn.

    A side that measures itself, as a peer in a process of its own does, returns its seconds as a float. Of a side whose
    first call takes longer than a minute that call stands alone.
    """
    times: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(-warm_up, repeats):
        for name, run in sides.items():
            if max(times[name], default=0) > TOO_LONG:
                continue
            getattr(run, "prepare", lambda: None)()
            start = time.perf_counter()
            own = run()
            taken = own if isinstance(own, float) else time.perf_counter() - start
            if turn >= 0 or taken > TOO_LONG:
                times[name].append(taken)
    return times


def spread(times: Sequence[float], amount: float = 1.0) -> dict[str, float]:
    """Median, least and most of `amount / time`: tokens a second when `amount` is tokens."""
    rates = sorted(amount / t for t in times)
    return {"median": statistics.median(rates), "least": rates[0], "most": rates[-1], "runs": len(rates)}


# --- both models ---------------------------------------------------------------------------------------------------


def our_model(size: str, seed: int = 0) -> HybridModel:
    return random_model(preset(SIZES.get(size, size)), seed)


def both_models(size: str, dtype: torch.dtype = torch.float32) -> tuple[HybridModel, Any]:
    """Ours and transformers' with the same random weights."""
    ours = our_model(size)
    with tempfile.TemporaryDirectory() as directory:
        save_model(ours, directory)
        theirs = stock_model(directory, dtype)
    return ours.to(dtype).eval(), theirs


def packed_model(directory: str | Path, quantization: Quantization, dtype: torch.dtype = torch.float32) -> HybridModel:
    """A checkpoint with its weights packed; what stays whole, and the arithmetic around it, has `dtype`."""
    opened = Checkpoint.open(directory)
    packed = pack_tensors(opened.tensors(), opened.config, quantization)
    return fill_model(opened.config, packed, dtype, quantization=quantization)


def stock_model(directory: str, dtype: torch.dtype) -> Any:
    import transformers

    transformers.logging.set_verbosity_error()
    return transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, attn_implementation="sdpa").eval()


def hymba_and_transformer(size: str = "", **changes: Any) -> dict[str, ModelConfig]:
    """A Hymba of 55 M parameters, and a Transformer with the same heads and (by its MLPs' width, to 1 %) parameters.

    size "tiny" gives both at toy size; changes go to `presets.hymba`. size "1.5b" gives the published pair: Hymba 1.5B
    and the shape of Llama 3.2 3B.
    """
    if size == "1.5b":
        stock = llama(28, hidden=3072, mlp=8192, attention=(24, 8, 128), vocab=128256, theta=500000.0, tied=True)
        pair = {"hymba": preset("hymba-1.5b"), "transformer": stock}
        return {name: dataclasses.replace(config, max_position_embeddings=LONGEST) for name, config in pair.items()}
    layers, hidden, mlp, heads, key_heads = (4, 64, 64, 2, 1) if size == "tiny" else (12, 512, 1344, 8, 4)
    ours = hymba(
        layers, hidden=hidden, mlp=mlp, heads=(heads, key_heads),
        **{"vocab": 8192, "original_context": None, "context": LONGEST} | changes,
    )  # fmt: skip
    attention = (heads, key_heads, hidden // heads)
    stock = llama(layers * 4 // 3, hidden=hidden, mlp=mlp, attention=attention, vocab=ours.vocab_size, tied=True)
    equal = with_parameters(stock, count_parameters(ours))
    return {"hymba": ours, "transformer": dataclasses.replace(equal, max_position_embeddings=LONGEST)}


def shape_of(config: ModelConfig) -> dict[str, Any]:
    """What a result says about a model."""
    attention = next(block.attention for block in config.blocks if block.attention is not None)
    mlp = next(block for block in config.blocks if isinstance(block, MLPConfig))
    found = {
        "parameters": count_parameters(config),
        "layers": len(config.blocks) // 2,
        "hidden_size": config.hidden_size,
        "intermediate_size": mlp.intermediate_size,
        "heads": attention.num_attention_heads,
        "key_value_heads": attention.num_key_value_heads,
        "vocab_size": config.vocab_size,
    }
    windows = [block.attention.window for block in config.blocks if block.attention is not None]
    window = next((window for window in windows if window is not None), None)
    return found | ({} if window is None else {"window": window, "meta_tokens": config.num_meta_tokens})


def random_model(config: ModelConfig, seed: int = 0) -> HybridModel:
    model = HybridModel(config)
    initialize(model, seed)
    return model


def shaped_model(config: ModelConfig, dtype: torch.dtype = torch.bfloat16) -> HybridModel:
    """In one dtype and never wider, for models that would not fit else: small random weights, gains of 1."""
    with torch.device("meta"):
        model = HybridModel(config).to(dtype).eval()
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.uniform_(-0.02, 0.02) if parameter.ndim > 1 else parameter.data.fill_(1)
    return model


def random_tokens(model: HybridModel, batch: int, time: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, model.config.vocab_size, (batch, time), generator=generator)


def mamba_flops(model: HybridModel) -> int:
    """Multiply-adds x 2 of a token in the projections of the Mamba-2 blocks."""
    hidden = model.config.hidden_size
    blocks = [block for block in model.config.blocks if isinstance(block, Mamba2Config)]
    return sum(2 * hidden * (2 * b.inner_size + b.conv_size + b.num_heads) for b in blocks)


# --- results -------------------------------------------------------------------------------------------------------


# A process starts with the peak of the one that started it, so a small one stands between and measures.
MEASURE = """
import json, resource, subprocess, sys, time
start = time.perf_counter()
code = subprocess.call(sys.argv[2:])
seconds, peak = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
with open(sys.argv[1], "w") as file:
    json.dump({"seconds": seconds, "peak_bytes": peak * (1 if sys.platform == "darwin" else 1024)}, file)
sys.exit(code % 256)
"""


def run_measured(*command: str, threads: int = THREADS, shown: bool = False) -> dict[str, Any]:
    """`result`, the JSON object that is the command's last line; its `seconds` and peak resident `peak_bytes`.

    shown: what it says on standard error, such as its progress, is not kept back.
    """
    with tempfile.TemporaryDirectory() as scratch:
        measured = Path(scratch) / "measured.json"
        done = subprocess.run(
            [sys.executable, "-c", MEASURE, str(measured), *command],
            stdout=subprocess.PIPE, stderr=None if shown else subprocess.PIPE, text=True,
            env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        )  # fmt: skip
        if done.returncode:
            raise RuntimeError(f"{' '.join(command[1:])} failed: {(done.stderr or '')[-2000:]}")
        return {"result": json.loads(done.stdout.strip().splitlines()[-1]), **json.loads(measured.read_text())}


def run_apart(script: str, *arguments: str, threads: int = THREADS) -> dict[str, Any]:
    """Run a script of this folder in a process of its own; its last line of output is a JSON object."""
    path = str(Path(__file__).parent / script)
    return run_measured(sys.executable, path, *arguments, threads=threads)["result"]


def cell(work: Path, asked: Mapping[str, Any], make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """A row: what was asked for, and what `make` returns or what it returned before at the same commit.

    Rows are kept in files of `work`, so that an interrupted benchmark goes on; delete a file to measure its row again.
    """
    name = hashlib.sha256(json.dumps([asked, commit()], default=str).encode()).hexdigest()[:16]
    file = work / f"{name}.json"
    if not file.exists():
        write_json(file, {**asked, **make()})
    return json.loads(file.read_text())


class Report:
    """Collects rows, prints them as a table and writes `results/<name>.json`."""

    def __init__(self, name: str, out: Path, threads: int) -> None:
        self.name, self.out, self.threads = name, out, threads
        self.rows: list[dict[str, Any]] = []
        self.before = run_apart("common.py", threads=threads)

    def add(self, **row: Any) -> None:
        self.rows.append(row)
        print("  ".join(f"{key} {_show(value)}" for key, value in row.items()), flush=True)

    def write(self) -> None:
        after = run_apart("common.py", threads=self.threads)
        drift = max(abs(after[k] / v - 1) for k, v in self.before.items())
        healthy = drift < 0.1
        if not healthy:
            print(f"the machine changed by {drift:.0%} while this ran: measure again", file=sys.stderr)
        found = {
            "name": self.name,
            "rows": self.rows,
            "canary": {"before": self.before, "after": after, "drift": drift, "healthy": healthy},
            "threads": self.threads,
            "machine": environment.machine(),
            "versions": environment.versions(),
            "kernels": select.describe(),
            "commit": commit(),
            "date": time.strftime("%Y-%m-%d"),
            "platform": platform.platform(),
        }
        found["kernels"].pop("library", None)
        self.out.mkdir(parents=True, exist_ok=True)
        path = self.out / f"{self.name}.json"
        path.write_text(json.dumps(found, indent=1) + "\n")
        print(f"written to {path}")


def _show(value: Any) -> str:
    if isinstance(value, dict) and "median" in value:
        return f"{value['median']:.4g} ({value['least']:.4g} to {value['most']:.4g})"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    print(json.dumps(measure_canary()))
