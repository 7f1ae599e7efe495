"""Builds the C++ kernels once per machine and loads them: no install step, no PyTorch headers.

Compiling takes over a minute of one core, which all cores share, and is announced. The library's name is the digest of
its sources, the compiler, the flags and the processor's features, so a changed source or another machine on the same
home directory builds its own. Two processes may build at once: each compiles to a name of its own and moves it into
place whole. HALFLAP_CACHE (default ~/.cache/halflap) says where; CXX names a compiler.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from halflap.progress import say

COMPILERS = ("c++", "g++", "clang++")
FLAGS = (
    "-std=c++17", "-O3", "-march=native", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math",
    "-fvisibility=hidden", "-fPIC", "-w",
)  # fmt: skip
TIMEOUT_SECONDS = 1800  # a machine may have much else to do


@dataclass(frozen=True)
class Build:
    """What came of the attempt: a loaded library, or the reason there is none."""

    library: ctypes.CDLL | None
    path: Path | None
    compiler: str | None
    reason: str = ""


@cache
def load() -> Build:
    """The library, built if this machine has none yet. Never raises: `reason` says what is missing."""
    compiler = find_compiler()
    if compiler is None:
        return Build(None, None, None, f"no C++ compiler found (tried CXX and {', '.join(COMPILERS)})")
    try:
        path = cache_directory() / f"kernels-{_digest(compiler)}.so"
        if not path.exists():
            say("halflap: building the C++ kernels for this processor, once; about a minute ...")
            compile_library(compiler, _sources("*.cpp"), path)
        _load_openmp()
        return Build(ctypes.CDLL(str(path)), path, compiler)
    except (OSError, subprocess.SubprocessError) as error:
        detail = getattr(error, "stderr", None) or str(error)
        return Build(None, None, compiler, f"{compiler} could not build the kernels: {detail.strip().splitlines()[-1]}")


def find_compiler() -> str | None:
    names = (os.environ["CXX"],) if os.environ.get("CXX") else COMPILERS
    return next((found for name in names if (found := shutil.which(name))), None)


def cache_directory() -> Path:
    base = os.environ.get("HALFLAP_CACHE")
    root = Path(base) if base else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "halflap"
    return root / "kernels"


def compile_library(compiler: str, sources: list[Path], path: Path) -> None:
    """Compile the sources, at once, into one shared library; `path` appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".build-") as folder:
        scratch = Path(folder)
        largest_first = sorted(sources, key=lambda source: -source.stat().st_size)  # else one may be left at the end
        objects = {source: scratch / f"{source.stem}.o" for source in largest_first}
        _run([compiler, *_flags(), "-c", str(source), "-o", str(made)] for source, made in objects.items())
        unfinished = scratch / path.name
        _run([[compiler, *_flags(), "-shared", *map(str, objects.values()), "-o", str(unfinished)]])
        os.replace(unfinished, path)


def _run(commands: Iterable[Sequence[str]]) -> None:
    """Run all, as many at once as there are CPUs. Raises SubprocessError when one fails or takes too long."""

    def run(command: Sequence[str]) -> None:
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=TIMEOUT_SECONDS)

    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with ThreadPoolExecutor(cpus) as pool:
        list(pool.map(run, commands))


def _sources(pattern: str) -> list[Path]:
    return sorted(Path(__file__).parent.glob(pattern))


def _flags() -> tuple[str, ...]:
    if platform.machine().lower() in ("x86_64", "amd64"):
        return FLAGS
    return tuple("-mcpu=native" if flag == "-march=native" else flag for flag in FLAGS)


def _digest(compiler: str) -> str:
    digest = hashlib.sha256()
    for source in _sources("*.cpp") + _sources("*.h"):
        digest.update(source.name.encode() + source.read_bytes())
    version = subprocess.run([compiler, "--version"], check=True, capture_output=True, text=True, timeout=60).stdout
    digest.update("\n".join([compiler, version, *_flags(), _processor()]).encode())
    return digest.hexdigest()[:20]


def _processor() -> str:
    """The features that -march=native looks at."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line for line in lines if line.lower().startswith(("flags", "features")))
    except (OSError, StopIteration):
        return f"{platform.machine()} {platform.processor()}"


def _load_openmp() -> None:
    """Make PyTorch's own OpenMP runtime visible by its C symbols, so that the kernels share its threads."""
    if hasattr(ctypes.CDLL(None), "GOMP_parallel"):
        return
    for library in sorted((Path(torch.__file__).parent / "lib").glob("lib*omp*")):
        try:
            ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
            return
        except OSError:
            continue
