"""Python processes that this one starts, the memory that the system leaves to it, and what C code in it prints."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from collections.abc import Iterator
from pathlib import Path

STDOUT = 1
OF_PROCESS, GROUPS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")
REREAD = ("inactive_file", "active_file", "total_inactive_file", "total_active_file")  # given up when others need it


def python_command() -> tuple[str, ...]:
    """This Python, which imports from the current folder, maybe a stranger's checkpoint, only if this process does."""
    return (sys.executable,) if {"", os.getcwd()} & set(sys.path) else (sys.executable, "-P")


@contextlib.contextmanager
def silenced() -> Iterator[None]:
    """Drop what C code prints on standard output, where a result in JSON may be awaited, whatever it was told."""
    try:
        kept = os.dup(STDOUT)
    except OSError:  # it is closed
        yield
        return
    flush = ctypes.CDLL(None).fflush if os.name == "posix" else lambda _: None  # C keeps lines back
    flush(None)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, STDOUT)
    try:
        yield
    finally:
        flush(None)
        os.dup2(kept, STDOUT)
        os.close(nowhere)
        os.close(kept)


def available_memory() -> int:
    """Bytes that this process can still take without swapping or passing the limit of a container that it is in."""
    import psutil

    return min([psutil.virtual_memory().available, *left_in_groups()])


def left_in_groups(of_process: Path = OF_PROCESS, mount: Path = GROUPS) -> Iterator[int]:
    """Bytes that the limits of Linux's control groups leave, version 2 and 1: every group around a process has one."""
    for line in _read(of_process).splitlines():
        _, _, rest = line.partition(":")
        kinds, _, path = rest.partition(":")
        if not kinds:
            top, limit, usage, ours = mount, "memory.max", "memory.current", REREAD[:2]
        elif "memory" in kinds.split(","):
            top, limit, usage, ours = mount / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", REREAD[2:]
        else:
            continue
        group = top / path.lstrip("/")  # inside a container the path may be the host's, and the top is its own group
        for place in (group, *group.parents):
            most, used = _read(place / limit).strip(), _read(place / usage).strip()
            if most.isdecimal() and used.isdecimal():
                stat = dict(entry.split(" ", 1) for entry in _read(place / "memory.stat").splitlines())
                yield max(0, int(most) - int(used) + sum(int(stat.get(name, 0)) for name in ours))
            if place == top:
                break


def _read(file: Path) -> str:
    try:
        return file.read_text("ascii")
    except OSError:
        return ""
