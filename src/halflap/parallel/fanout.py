"""Map a function over independent items: in this process, in several, or on a Ray cluster.

The items' order is kept. A worker starts fresh, so the function must be importable (a module's own, or a
`functools.partial` of one) and its items and results picklable; what they name by path must be there for every worker.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar

import torch

from halflap.errors import HalflapError
from halflap.progress import set_quiet, track

Item = TypeVar("Item")
Result = TypeVar("Result")

_interrupted = False  # whether this worker was
ANSWERS_WITHIN = 10.0  # seconds for a cluster to take a connection


@dataclass(frozen=True)
class Cluster:
    """A Ray cluster and what each item takes of it.

    address  `host:port` or `ray://host:port`; `auto` is the one this machine is part of, `local` one of its own cores
    """

    address: str
    cpus: int = 1
    gpus: int = 0


def map(
    function: Callable[[Item], Result],
    items: Iterable[Item],
    *,
    processes: int = 1,
    cluster: Cluster | None = None,
    what: str | None = None,
    finished: Callable[[Item], bool] | None = None,
) -> list[Result]:
    """function of each item, in order; `what` shows progress. The first exception ends it and is raised.

    `finished` says of which items an earlier run has done the work, so that they do not enter the time that is left.

    Each of several processes gets an equal share of the cores; on a cluster, Ray decides how many run at once. A
    KeyboardInterrupt is raised in all of them, so that they save what they have; a second one kills them. Raises
    HalflapError when Ray is not installed, cannot be reached, or can never hold an item.
    """
    listed = list(items)
    passed = sum(finished(item) for item in listed) if finished else 0

    def followed(work: list[Any]) -> Iterable[Any]:
        return track(work, what, passed=passed) if what else work

    if cluster is not None:
        return _on_cluster(function, listed, cluster, followed)
    count = min(processes, len(listed))
    if count <= 1:
        return [function(item) for item in followed(listed)]
    threads = max(1, (os.cpu_count() or 1) // count)
    context = multiprocessing.get_context("spawn")
    others = multiprocessing.active_children()

    def workers() -> list[BaseProcess]:
        return [child for child in multiprocessing.active_children() if child not in others]

    pool = ProcessPoolExecutor(count, mp_context=context, initializer=_start_process, initargs=(threads,))
    try:
        futures = [pool.submit(_work, function, item) for item in listed]
        return [future.result() for future in followed(futures)]
    except KeyboardInterrupt:  # in a terminal the workers get it too, but not when a signal is for this process alone
        for worker in workers():
            worker.terminate()
        raise
    finally:
        try:
            pool.shutdown(cancel_futures=True)
        except KeyboardInterrupt:  # while they save, or end what they do after an error
            for worker in workers():
                worker.kill()
            raise


def _start_process(threads: int) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _stop)
    _start_worker(threads)


def _stop(_signal: int, _frame: object) -> None:
    """Once: Ctrl-C comes from the terminal and from the parent, and what it interrupts is then being saved."""
    global _interrupted
    if not _interrupted:
        _interrupted = True
        raise KeyboardInterrupt


def _work(function: Callable[[Item], Result], item: Item) -> Result:
    if _interrupted:  # an item or two wait in a worker's queue, where nothing cancels them
        raise KeyboardInterrupt
    return function(item)


def _start_worker(threads: int) -> None:
    torch.set_num_threads(threads)
    set_quiet(True)  # the parent shows the progress of all


# ---- Ray


def require_ray() -> Any:
    """The module. Raises HalflapError when it is not installed."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nobody is told that it ran
    try:
        import ray  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise HalflapError(
            "a Ray cluster was asked for and ray is not installed; pip install 'halflap[cluster]', or use --workers"
        ) from None
    return ray


def _on_cluster(
    function: Callable[[Item], Result],
    items: Sequence[Item],
    cluster: Cluster,
    followed: Callable[[list[Any]], Iterable[Any]],
) -> list[Result]:
    """A worker that is lost is started again by Ray; the function goes on from what it left."""
    ray = require_ray()
    _connect(ray, cluster)
    try:
        _require_room(ray, cluster)
        alone = ray.remote(num_cpus=cluster.cpus, num_gpus=cluster.gpus)(_alone)
        waiting = [alone.remote(function, item, cluster.cpus) for item in items]
        return [ray.get(one) for one in followed(waiting)]
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None  # what the function raised, without Ray's account of the way
    finally:
        ray.shutdown()  # and with it what still waits


def _alone(function: Callable[[Item], Result], item: Item, threads: int) -> Result:
    _start_worker(threads)
    return function(item)


def _connect(ray: Any, cluster: Cluster) -> None:
    own = {"include_dashboard": False} if cluster.address == "local" else {}
    try:
        host, _, port = cluster.address.removeprefix("ray://").rpartition(":")
        if host:  # Ray itself tries for minutes
            socket.create_connection((host.strip("[]"), int(port)), timeout=ANSWERS_WITHIN).close()
        ray.init(cluster.address, log_to_driver=False, logging_level="error", **own)
    except (OSError, RuntimeError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0].partition(". ")[0]
        raise HalflapError(
            f"no Ray cluster answers at {cluster.address!r} ({reason}); give host:port, ray://host:port, auto for the "
            "one this machine is part of, or local"
        ) from None


def _require_room(ray: Any, cluster: Cluster) -> None:
    """Raise HalflapError when no node could ever hold an item, which Ray would wait for without end."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if any(node.get("CPU", 0) >= cluster.cpus and node.get("GPU", 0) >= cluster.gpus for node in nodes):
        return
    largest = max(nodes, key=lambda node: (node.get("GPU", 0), node.get("CPU", 0)), default={})
    raise HalflapError(
        f"each arm takes {cluster.cpus} cores and {cluster.gpus} GPUs, and the largest of {len(nodes)} nodes at "
        f"{cluster.address!r} has {largest.get('CPU', 0):g} and {largest.get('GPU', 0):g}; ask for less, or add a node"
    )
