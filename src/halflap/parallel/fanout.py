"""Map a function over independent items: in this process, or in several.

The items' order is kept. A worker starts fresh (spawn), so the function must be importable (a module's own, or a
`functools.partial` of one) and its results picklable; each worker gets an equal share of the cores.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from typing import TypeVar

import torch

from halflap.progress import set_quiet, track

Item = TypeVar("Item")
Result = TypeVar("Result")


def map(
    function: Callable[[Item], Result], items: Iterable[Item], *, processes: int = 1, what: str | None = None
) -> list[Result]:
    """function of each item, in order; `what` shows progress. The first exception ends it and is raised."""
    listed = list(items)
    workers = min(processes, len(listed))
    if workers <= 1:
        return [function(item) for item in (track(listed, what) if what else listed)]
    threads = max(1, (os.cpu_count() or 1) // workers)
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=(threads,))
    try:
        futures = [pool.submit(function, item) for item in listed]
        return [future.result() for future in (track(futures, what) if what else futures)]
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker(threads: int) -> None:
    torch.set_num_threads(threads)
    set_quiet(True)  # the parent shows the progress of all
