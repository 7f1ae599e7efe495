"""`doctor`: versions, kernels chosen, device limits, and what is missing and how to get it."""

from __future__ import annotations

import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from halflap import environment
from halflap.commands.config import DoctorRecipe
from halflap.ops import select
from halflap.run import Run

SERVE = "pip install 'halflap[serve]'"
# An optional package, what it is for, and how to get it.
OPTIONAL: dict[str, tuple[str, str]] = {
    "transformers": ("comparing with the stock classes", "pip install 'halflap[hf]'"),
    "lm_eval": ("evaluate --tasks", "pip install 'halflap[eval]'"),
    "gguf": ("import of GGUF files", "pip install 'halflap[gguf]'"),
    "pyarrow": ("--data of .parquet files", "pip install 'halflap[data]'"),
    "zstandard": ("--data of .zst files", "pip install 'halflap[data]'"),
    **dict.fromkeys(("starlette", "uvicorn", "pydantic", "pydantic_core", "prometheus_client"), ("serve", SERVE)),
    "httpx2": ("serve --replicas and --engine vllm", SERVE),
    "llguidance": ("replies that match a schema, a regular expression or a grammar", SERVE),
    "ray": ("study --ray", "pip install 'halflap[cluster]'"),
}


def doctor(recipe: DoctorRecipe, run: Run) -> dict[str, Any]:
    """What this machine and this installation offer; `missing` says what would add to it."""
    kernels = select.describe()
    missing = [
        f"{package}, for {purpose}: {how}" for package, (purpose, how) in OPTIONAL.items() if find_spec(package) is None
    ]
    if kernels["reason"]:
        missing.append(f"C++ kernels, several times faster on a CPU: {kernels['reason']}")
    if reason := kernels.get("gpu", {}).get("reason"):
        missing.append(f"Triton kernels, faster on a GPU: {reason}")
    return {"versions": environment.versions(), "kernels": kernels, "device": _device(), "missing": missing}


def _device() -> dict[str, Any]:
    machine = environment.machine()
    device = machine | {
        "threads": torch.get_num_threads(),
        "disk_free_bytes": shutil.disk_usage(Path.cwd()).free,
        "cuda": torch.cuda.is_available(),
    }
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        device[f"cuda_{index}"] = f"{properties.name}, {properties.total_memory / 2**30:.1f} GiB"
    return device
