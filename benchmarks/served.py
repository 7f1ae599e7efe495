"""What the benchmarks of the server share: a model with a tokenizer, a running server, and the numbers it gives."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from common import SIZES, random_model
from halflap.checkpoints.checkpoint import save_model
from halflap.data.text import read_documents
from halflap.data.tokenizer import train_tokenizer
from halflap.models.config import ModelConfig
from halflap.models.presets import preset

TEXT = Path(__file__).resolve().parents[1] / "demo" / "text"
METRIC = re.compile(r"^(\w+)(\{[^}]*\})? (\S+)$", re.MULTILINE)


class Served(NamedTuple):
    """A server that answers on this machine."""

    port: int
    pid: int

    def metrics(self) -> dict[str, float]:
        """Every series of /metrics by its name with its labels, as Prometheus writes them."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics", timeout=60) as reply:
            return {name + labels: float(value) for name, labels, value in METRIC.findall(reply.read().decode())}


def write_model(size: str, directory: Path, context: int = 4096) -> ModelConfig:
    """Random weights of a preset's shape, with positions for `context` tokens and a tokenizer of real text."""
    config = preset(SIZES.get(size, size))
    tokenizer = train_tokenizer(read_documents([TEXT / "validation.jsonl.xz"]), config.vocab_size, progress=False)
    config = dataclasses.replace(config, max_position_embeddings=context, eos_token_id=tokenizer.eos_id)
    save_model(random_model(config), directory)
    tokenizer.save(directory)
    return config


def serving(directory: Path, *words: str, threads: int) -> contextlib.AbstractContextManager[Served]:
    """`halflap serve` with so many threads."""
    command = [sys.executable, "-m", "halflap", "serve", str(directory), "--port", "0", *words]
    numbers = {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    return started(command, r"http://127\.0\.0\.1:(\d+)", numbers)


@contextlib.contextmanager
def started(
    command: Sequence[str], ready: str, environment: Mapping[str, str], port: int | None = None
) -> Iterator[Served]:
    """A server, from when its log matches `ready` until it has ended; without `port`, the port is the match's group."""
    with tempfile.NamedTemporaryFile("w+", suffix=".log") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, text=True, env={**os.environ, **environment}
        )
        try:
            while not (found := re.search(ready, Path(log.name).read_text())):
                if process.poll() is not None:
                    raise RuntimeError(f"{' '.join(command)} did not start: {Path(log.name).read_text()[-4000:]}")
                time.sleep(0.2)
            yield Served(port or int(found[1]), process.pid)
        finally:
            process.terminate()
            process.wait()
