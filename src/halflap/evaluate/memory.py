"""The most memory that a piece of work held: of the CUDA device, else resident memory of this process.

On Linux the kernel's own high-water mark is reset before the work and read after it, which costs nothing and misses
nothing; elsewhere a thread looks every few milliseconds. Resident memory counts the whole process: libraries, weights,
and memory that the allocator keeps from earlier work, of which as much as possible is handed back first.
"""

from __future__ import annotations

import ctypes
import gc
import threading
from contextlib import suppress
from pathlib import Path

import psutil
import torch

RESET, STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")
SECONDS_BETWEEN_LOOKS = 0.005


class PeakMemory:
    """`with PeakMemory(device) as peak: ...`, then `peak.bytes`."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self.bytes = 0
        self._marked = False
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> PeakMemory:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            return self
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)
        self._marked = _reset_mark()
        if not self._marked:
            self._thread = threading.Thread(target=self._look, daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            self.bytes = torch.cuda.max_memory_allocated(self.device)
        elif self._marked:
            self.bytes = _read_mark()
        elif self._thread is not None:
            self._stop.set()
            self._thread.join()

    def _look(self) -> None:
        process = psutil.Process()
        while True:
            self.bytes = max(self.bytes, process.memory_info().rss)
            if self._stop.wait(SECONDS_BETWEEN_LOOKS):
                return


def _reset_mark() -> bool:
    """Set the high-water mark to what is resident now; False where the system does not offer that."""
    try:
        RESET.write_text("5")
        return _read_mark() > 0
    except OSError:
        return False


def _read_mark() -> int:
    for line in STATUS.read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0
