"""halflap against vLLM on the CPU: decode of 1 and 16 requests, a prompt of 2048 tokens, 64 requests to both servers.

    python benchmarks/vllm_cpu.py --vllm-python .venv-vllm/bin/python [--sizes 55m 205m] [--dtypes bfloat16 float32]

PYTHON is that of the environment that `make test-vllm` makes. Engine stands against engine, each with its scheduler and
greedy sampling and without text: the seconds of `steps` tokens are those of steps + 1 less those of one, on the same
random weights, prompts, threads and number of sequences. The servers get the same 64 requests of mixed lengths from
64 clients at once (benchmarks/load.py). vLLM runs as it recommends for processors: compiled, its threads bound to
cores, 4 GiB for its cache; engine and caller in one process where there is no server. Prefix caching is off on both
sides, because vLLM's is at fault with Nemotron-H. Goals: at least vLLM's rate everywhere.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import load
from common import Report, arguments, cell, interleave, random_tokens, spread
from halflap.checkpoints.checkpoint import load_model
from halflap.inference.engine import Engine
from halflap.inference.requests import EngineSettings, Request
from served import Served, serving, started, write_model

MOST = 16  # sequences at once, on both sides
READY = "Application startup complete"
Ask = Callable[[list[list[int]], int], float]


def main() -> None:
    quick = {"sizes": ["nemotron-h-8m"], "dtypes": ["float32"], "prompt": 8, "steps": 4, "batches": [1, 2]}
    quick |= {"prefill": 40, "requests": 3, "prompts": [4, 20], "tokens": [2, 6]}
    chosen = arguments(
        __doc__, quick, vllm_python="", dtypes=["bfloat16", "float32"], prompt=64, steps=64, batches=[1, MOST],
        prefill=2048, requests=64, prompts=[16, 512], tokens=[16, 128], work=Path("runs/vllm_cpu"),
    )  # fmt: skip
    require_vllm(chosen.vllm_python)
    report = Report("vllm_cpu", chosen.out, chosen.threads)
    for size in chosen.sizes:
        with tempfile.TemporaryDirectory() as folder:
            directory = Path(folder) / size
            write_model(size, directory)
            for dtype in chosen.dtypes:
                for row in rows(size, directory, dtype, chosen):
                    report.add(**row)
    ratios = [row["ratio"] for row in report.rows]
    report.add(cells=len(ratios), least_ratio=min(ratios))
    report.write()


def require_vllm(python: str) -> None:
    done = subprocess.run([python or "", "-c", "import vllm"], capture_output=True, text=True) if python else None
    if done is None or done.returncode:
        why = "is not given" if done is None else f"is {python}, which cannot import vllm"
        raise SystemExit(f"--vllm-python {why}: `make test-vllm` makes .venv-vllm, whose bin/python is meant")


def rows(size: str, directory: Path, dtype: str, chosen: Any) -> list[dict[str, Any]]:
    asked = {"size": size, "dtype": dtype, "threads": chosen.threads, "repeats": chosen.repeats}
    found = []
    with Engines(directory, dtype, chosen) as engines:
        for batch in chosen.batches:
            told = {**asked, "phase": "decode", "batch": batch, "prompt": chosen.prompt, "steps": chosen.steps}
            found.append(cell(chosen.work, told, partial(engines.decode, batch)))
        told = {**asked, "phase": "prefill", "batch": 1, "prompt": chosen.prefill}
        found.append(cell(chosen.work, told, engines.prefill))
    lengths = {"prompts": chosen.prompts, "tokens": chosen.tokens}
    told = {**asked, "phase": "server", "requests": chosen.requests, **lengths}
    return [*found, cell(chosen.work, told, lambda: servers(directory, dtype, chosen))]


# --- the engines -----------------------------------------------------------------------------------------------------


class Engines(contextlib.ExitStack):
    """Ours and vLLM's of one model, started when the first cell needs them."""

    def __init__(self, directory: Path, dtype: str, chosen: Any) -> None:
        super().__init__()
        self.directory, self.dtype, self.chosen = directory, dtype, chosen
        self.context = max(chosen.prefill, chosen.prompt + chosen.steps) + 1

    def decode(self, batch: int) -> dict[str, Any]:
        c = self.chosen
        prompts = random_tokens(self.model, batch, c.prompt).tolist()

        def seconds(ask: Ask) -> float:
            return ask(prompts, c.steps + 1) - ask(prompts, 1)

        return self.compared(seconds, batch * c.steps)

    def prefill(self) -> dict[str, Any]:
        prompts = random_tokens(self.model, 1, self.chosen.prefill).tolist()
        return self.compared(lambda ask: ask(prompts, 1), self.chosen.prefill)

    def compared(self, seconds: Callable[[Ask], float], amount: int) -> dict[str, Any]:
        sides = {"halflap": partial(seconds, self.ours), "vllm": partial(seconds, self.theirs)}
        rates = {name: spread(times, amount) for name, times in interleave(sides, self.chosen.repeats).items()}
        return {**rates, "ratio": rates["halflap"]["median"] / rates["vllm"]["median"]}

    @functools.cached_property
    def model(self) -> Any:
        return load_model(self.directory, self.dtype)

    @functools.cached_property
    def ours(self) -> Ask:
        engine = self.enter_context(Engine(self.model, None, EngineSettings(max_batch=MOST)))

        def ask(prompts: list[list[int]], tokens: int) -> float:
            start = time.perf_counter()
            for stream in [engine.submit(Request((*prompt,), tokens, ignore_eos=True)) for prompt in prompts]:
                stream.result()
            return time.perf_counter() - start

        return ask

    @functools.cached_property
    def theirs(self) -> Ask:
        settings = {"model": str(self.directory), "dtype": self.dtype, "enable_prefix_caching": False}
        settings |= {"max_num_seqs": MOST, "max_model_len": self.context, "skip_tokenizer_init": True}
        script = str(Path(__file__).with_name("vllm_worker.py"))
        log = self.enter_context(tempfile.NamedTemporaryFile("w+", suffix=".log"))  # noqa: SIM115
        worker = subprocess.Popen(
            [self.chosen.vllm_python, script, json.dumps(settings)], text=True, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=log,
            env={**os.environ, **environment(self.chosen.threads), "VLLM_ENABLE_V1_MULTIPROCESSING": "0"},
        )  # fmt: skip
        assert worker.stdin is not None and worker.stdout is not None
        stdin, stdout = worker.stdin, worker.stdout
        self.callback(worker.communicate)

        def answer() -> dict[str, Any]:
            if not (line := stdout.readline()):
                raise RuntimeError(f"vLLM ended: {Path(log.name).read_text()[-4000:]}")
            return json.loads(line)

        def ask(prompts: list[list[int]], tokens: int) -> float:
            print(json.dumps({"prompts": prompts, "tokens": tokens}), file=stdin, flush=True)
            return answer()["seconds"]

        print(f"vLLM {answer()['ready']}", flush=True)
        return ask


def environment(threads: int) -> dict[str, str]:
    return {
        "VLLM_CPU_KVCACHE_SPACE": "4",  # GiB
        "VLLM_CPU_OMP_THREADS_BIND": f"0-{threads - 1}",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }


# --- the servers -----------------------------------------------------------------------------------------------------


def servers(directory: Path, dtype: str, chosen: Any) -> dict[str, Any]:
    """Both in turns; the other one rests."""
    context = str(chosen.prompts[1] + chosen.tokens[1])
    limits = ["--max-batch", str(MOST), "--max-context", context, "--queue", str(chosen.requests)]
    words = ["--served-model-name", directory.name, "--max-model-len", context, "--max-num-seqs", str(MOST)]
    words += ["--dtype", dtype, "--no-enable-prefix-caching", "--port", str(port := free_port())]
    vllm = [chosen.vllm_python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(directory), *words]
    ours = serving(directory, "--prefix-cache", "off", "--dtype", dtype, *limits, threads=chosen.threads)
    with ours as halflap, started(vllm, READY, environment(chosen.threads), port) as theirs:
        sides = {"halflap": Side(halflap, directory, chosen), "vllm": Side(theirs, directory, chosen)}
        times = interleave(sides, chosen.repeats)
    found: dict[str, Any] = {name: spread(times[name], side.tokens) for name, side in sides.items()}
    found["ratio"] = found["halflap"]["median"] / found["vllm"]["median"]
    return found | {f"{name}_last_run": side.seen for name, side in sides.items()}


class Side:
    """All requests at once, from a process of their own."""

    def __init__(self, server: Served, directory: Path, chosen: Any) -> None:
        plan = {"port": server.port, "model": directory.name, "vocab": load_vocabulary(directory)}
        plan |= {"clients": {"reader": chosen.requests}, "requests": chosen.requests}
        self.plan = plan | {"prompts": chosen.prompts, "tokens": chosen.tokens}
        self.tokens, self.seen = 0, {}

    def __call__(self) -> float:
        script = str(Path(load.__file__))
        done = subprocess.run([sys.executable, script, json.dumps(self.plan)], stdout=subprocess.PIPE, check=True)
        self.seen = json.loads(done.stdout)
        if self.seen["errors"]:
            raise RuntimeError(f"requests failed: {self.seen['errors']}")
        self.tokens = self.seen["completion_tokens"]
        return self.seen["seconds"]


def load_vocabulary(directory: Path) -> int:
    return json.loads((directory / "config.json").read_text())["vocab_size"]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


if __name__ == "__main__":
    main()
