"""The machine and the software a result was made on, without importing any of it. No torch."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import halflap
from halflap.recipe import SECRETS

PACKAGES = ("torch", "numpy", "safetensors", "tokenizers", "transformers", "lm-eval", "gguf", "pyarrow")


def versions() -> dict[str, str]:
    """Versions of halflap, Python and the packages that shape results; a missing package is left out."""
    from importlib import metadata

    found = {"halflap": halflap.__version__, "python": platform.python_version()}
    for package in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def machine() -> dict[str, Any]:
    """System, processor, usable cores and memory in bytes."""
    import psutil

    return {
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "processor": processor(),
        "cores": usable_cores(),
        "memory_bytes": psutil.virtual_memory().total,
    }


def usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def processor() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def last_level_cache() -> int:
    """Bytes of the processor's last-level cache; 32 MiB where the system does not tell."""
    sizes = {}
    for place in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"):
        with suppress(OSError, ValueError):
            level, text = ((place / name).read_text(encoding="ascii").strip() for name in ("level", "size"))
            sizes[int(level)] = int(text.removesuffix("K")) << 10
    return sizes[max(sizes)] if sizes else 32 << 20


def describe() -> dict[str, Any]:
    """What environment.json holds; kernels and device are there once a verb has loaded torch."""
    described: dict[str, Any] = {"versions": versions(), "machine": machine(), "command": _shown(sys.argv)}
    if torch := sys.modules.get("torch"):
        described["torch"] = {"threads": torch.get_num_threads(), "cuda": torch.cuda.is_available()}
    if select := sys.modules.get("halflap.ops.select"):
        described["kernels"] = select.describe()
    return described


def _shown(words: Sequence[str]) -> list[str]:
    """A command line without the values of secrets."""
    shown, secret = [], False
    for word in words:
        if word.startswith("--"):
            name, equals, _ = word.partition("=")
            secret = name[2:].replace("-", "_") in SECRETS
            shown.append(f"{name}=***" if secret and equals else word)
        else:
            shown.append("***" if secret else word)
    return shown
