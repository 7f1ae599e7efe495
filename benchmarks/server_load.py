"""The server under 64 streaming clients: errors, fairness, times, throughput beside the engine's own, memory over time.

    python benchmarks/server_load.py [--model DIR] [--size 55m] [--minutes 5] [--soak MINUTES]

Clients (benchmarks/load.py) are a second process on the same cores. `share_of_engine` is the server's tokens a second
over those of an engine of the same settings that is asked the same in a process of its own, for half the time before
the server runs and for half of it after; both are counted by the engine from the end of the warm-up to the start of the
last request. Goal: no error, and at least 0.9.

--soak replaces this by a long run in which a quarter of the clients hang up, read slowly or send nonsense. After a
warm-up of the same kind, and again at the end, the server is left alone and what it then holds is compared: replies
running and waiting, bytes of slots, requests under way, threads and file descriptors must be no more than before, and
memory may have grown by 5 % or 64 MB (what allocators keep), whichever is more. The script fails where that does not
hold.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

import load
from common import Report, arguments, run_apart
from halflap.checkpoints.checkpoint import load_model, read_config
from halflap.inference.engine import Engine
from halflap.inference.requests import EngineSettings, Request
from served import Served, serving, write_model

SAMPLE = 5.0  # seconds between looks at the server
REST = 3.0  # seconds without requests, before what is held is compared
PREFIX_CACHE = 64 << 20  # small enough to be full when a soak's warm-up ends
SOAK = {"reader": 0.75, "hangs_up": 0.125, "slow_reader": 0.0625, "nonsense": 0.0625}  # shares of the clients
HELD = ("running", "waiting", "slot_bytes", "active", "threads", "files")


def main() -> None:
    if sys.argv[1:2] == ["--engine"]:
        print(json.dumps(asyncio.run(engine_alone(json.loads(sys.argv[2])))))
        return
    quick = {"size": "nemotron-h-tiny", "clients": 8, "minutes": 0.1, "warm_up": 0.02, "prompts": [4, 30]}
    quick |= {"tokens": [2, 12], "sample": 0.5}
    chosen = arguments(
        __doc__, quick, size="55m", model="", clients=64, minutes=5.0, warm_up=0.5, soak=0.0, prompts=[16, 256],
        tokens=[16, 128], max_batch=64, sample=SAMPLE,
    )  # fmt: skip
    report = Report("server_soak" if chosen.soak else "server_load", chosen.out, chosen.threads)
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(chosen.model or f"{folder}/model")
        if not chosen.model:
            write_model(chosen.size, directory)
        row, good = (soak if chosen.soak else under_load)(directory, chosen)
    report.add(**row)
    report.write()
    if not good:
        sys.exit("there were errors, or the server does not hold what it held before")


def plan_of(directory: Path, chosen: Any, **more: Any) -> dict[str, Any]:
    """What the clients, and the engine alone, are told."""
    lengths = {"prompts": chosen.prompts, "tokens": chosen.tokens}
    vocabulary = {"model": directory.name, "vocab": read_config(directory).vocab_size}
    return load.DEFAULTS | {**vocabulary, **lengths, "clients": {"reader": chosen.clients}} | more


def words(chosen: Any) -> list[str]:
    found = ["--max-batch", chosen.max_batch, "--max-context", chosen.prompts[1] + chosen.tokens[1]]
    return [*map(str, found), "--prefix-cache", f"{PREFIX_CACHE}B", "--queue", str(2 * chosen.clients)]


# --- under load ------------------------------------------------------------------------------------------------------


def under_load(directory: Path, chosen: Any) -> tuple[dict[str, Any], bool]:
    seconds, warm_up = 60 * chosen.minutes, 60 * chosen.warm_up
    alone = [engine_rate(directory, chosen)]
    with serving(directory, *words(chosen), threads=chosen.threads) as server:
        plan = plan_of(directory, chosen, port=server.port, seconds=warm_up + seconds)
        looks: list[dict[str, float]] = []
        found = clients(plan, server, looks, chosen.sample)
    measured = [look for look in looks if warm_up <= look["seconds"] <= warm_up + seconds]
    rate = rate_of(measured)
    alone.append(engine_rate(directory, chosen))
    row: dict[str, Any] = {"clients": chosen.clients, "max_batch": chosen.max_batch, "tokens_per_second": rate}
    row |= {"engine_tokens_per_second": alone, "share_of_engine": rate / statistics.mean(alone), **found}
    row["server"] = {name: [look[name] for look in looks] for name in ("seconds", "rss_mb", "threads", "files")}
    return row, not found["errors"]


def clients(plan: dict[str, Any], server: Served, looks: list[dict[str, float]], every: float) -> dict[str, Any]:
    """What the clients saw; meanwhile the server is looked at."""
    script, began = Path(__file__).with_name("load.py"), time.perf_counter()
    process = subprocess.Popen([sys.executable, str(script), json.dumps(plan)], stdout=subprocess.PIPE, text=True)
    while process.poll() is None:
        looks.append({"seconds": time.perf_counter() - began, **look_at(server)})
        time.sleep(every)
    said, _ = process.communicate()
    if process.returncode:
        raise RuntimeError(f"load.py ended with status {process.returncode}")
    return json.loads(said)


def look_at(server: Served) -> dict[str, float]:
    process, series = psutil.Process(server.pid), server.metrics()
    with process.oneshot():
        found = {
            "rss_mb": process.memory_info().rss / 1e6,
            "threads": process.num_threads(),
            "files": process.num_fds(),
        }
    return found | {
        "running": series["halflap_engine_running"],
        "waiting": series["halflap_engine_waiting"],
        "new_tokens": series["halflap_engine_new_tokens"],
        "slot_bytes": series['halflap_engine_cache_bytes{kind="slots"}'],
        "prefix_bytes": series.get('halflap_engine_prefix_cache{kind="bytes"}', 0.0),
        "active": series["halflap_requests_active"],
    }


def rate_of(looks: list[dict[str, float]]) -> float:
    first, last = looks[0], looks[-1]
    return (last["new_tokens"] - first["new_tokens"]) / (last["seconds"] - first["seconds"])


# --- the engine alone ------------------------------------------------------------------------------------------------


def engine_rate(directory: Path, chosen: Any) -> float:
    """Tokens a second, of a process of its own."""
    warm_up = 60 * chosen.warm_up
    plan = plan_of(directory, chosen, seconds=warm_up + 30 * chosen.minutes, warm_up=warm_up, threads=chosen.threads)
    plan |= {"settings": {"max_batch": chosen.max_batch, "prefix_cache": PREFIX_CACHE}, "directory": str(directory)}
    return run_apart("server_load.py", "--engine", json.dumps(plan), threads=chosen.threads)["tokens_per_second"]


async def engine_alone(plan: dict[str, Any]) -> dict[str, float]:
    """The same requests, as many at once, without a server: new tokens a second after the warm-up."""
    import torch

    torch.set_num_threads(plan["threads"])
    settings = EngineSettings(**plan["settings"], max_context=plan["prompts"][1] + plan["tokens"][1])
    looks: list[dict[str, float]] = []
    with Engine(load_model(plan["directory"]), None, settings) as engine:
        began, readers = time.perf_counter(), range(plan["clients"]["reader"])
        end = began + plan["seconds"]

        async def client(bodies: Iterator[dict[str, Any]]) -> None:
            for body in bodies:
                if time.perf_counter() >= end:
                    return
                request = Request(tuple(body["prompt"]), body["max_tokens"], ignore_eos=True)
                async for _ in engine.submit(request):
                    pass

        async def look() -> None:
            await asyncio.sleep(plan["warm_up"])
            for rest in (end - began - plan["warm_up"], 0.0):
                seconds = time.perf_counter() - began
                looks.append({"seconds": seconds, "new_tokens": engine.stats()["new_tokens"]})
                await asyncio.sleep(rest)

        await asyncio.gather(look(), *(client(load.bodies(plan, number)) for number in readers))
    return {"tokens_per_second": rate_of(looks)}


# --- soak ------------------------------------------------------------------------------------------------------------


def soak(directory: Path, chosen: Any) -> tuple[dict[str, Any], bool]:
    kinds = {kind: max(1, round(share * chosen.clients)) for kind, share in SOAK.items()}
    with serving(directory, *words(chosen), threads=chosen.threads) as server:
        plan = plan_of(directory, chosen, port=server.port, clients=kinds)
        clients(plan | {"seconds": max(6 * chosen.warm_up, 0.1 * chosen.soak) * 60}, server, [], chosen.sample)
        before = at_rest(server)
        looks: list[dict[str, float]] = []
        found = clients(plan | {"seconds": 60 * chosen.soak, "seed": 1}, server, looks, chosen.sample)
        after = at_rest(server)
    differs = {name: [before[name], after[name]] for name in HELD if after[name] > before[name]}
    grown = after["rss_mb"] - before["rss_mb"]
    if grown > max(64, 0.05 * before["rss_mb"]):
        differs["rss_mb"] = [before["rss_mb"], after["rss_mb"]]
    series = {name: [look[name] for look in looks] for name in ("seconds", "rss_mb", "threads", "files")}
    row = {"soak_minutes": chosen.soak, "clients": kinds, "before": before, "after": after, "grown_mb": grown}
    return {**row, "differs": differs, **found, "server": series}, not differs and not found["errors"]


def at_rest(server: Served) -> dict[str, float]:
    """What the server holds once its last requests have ended."""
    deadline = time.perf_counter() + 60
    while (look := look_at(server))["active"] + look["running"] + look["waiting"] and time.perf_counter() < deadline:
        time.sleep(0.5)
    time.sleep(REST)
    return look_at(server)


if __name__ == "__main__":
    main()
