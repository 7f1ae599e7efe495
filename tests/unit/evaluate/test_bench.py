"""Rows are complete, their numbers agree with each other and with the counted cache, and memory peaks are seen."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import pytest
import torch

from halflap.errors import HalflapError
from halflap.evaluate import memory
from halflap.evaluate.bench import bench, bench_in_turns
from halflap.evaluate.memory import PeakMemory
from halflap.models.count import cache_bytes
from halflap.models.model import HybridModel, initialize

MEASURED = (
    "prefill_tokens_per_second",
    "decode_tokens_per_second",
    "time_to_first_token_ms",
    "decode_step_ms",
    "peak_memory_bytes",
    "cache_bytes",
)
SPREADS = tuple(f"{name}_spread" for name in MEASURED)


def test_rows(tiny_config: Any) -> None:
    model = HybridModel(tiny_config).eval()
    initialize(model, 0)
    logged: list[dict[str, Any]] = []
    rows = bench(model, (8, 20), (3,), (1, 2), repeats=2, log=logged.append)
    assert rows == logged
    assert [(r["prompt"], r["output"], r["batch"]) for r in rows] == [(8, 3, 1), (8, 3, 2), (20, 3, 1), (20, 3, 2)]
    for row in rows:
        assert set(row) == {"prompt", "output", "batch", "dtype", *MEASURED, *SPREADS}
        assert row["dtype"] == "float32"
        assert all(row[name] > 0 and row[f"{name}_spread"] >= 0 for name in MEASURED)
        context = row["prompt"] + row["output"]
        assert row["cache_bytes"] == cache_bytes(tiny_config, context, row["batch"], kv_bits=32, conv_bits=32)
        assert row["peak_memory_bytes"] > sum(p.nbytes for p in model.parameters())


def test_models_take_turns(tiny_config: Any) -> None:
    opened = []

    def model(name: str) -> HybridModel:
        opened.append(name)
        made = HybridModel(tiny_config).eval()
        initialize(made, 0)
        return made

    models = {name: functools.partial(model, name) for name in ("a", "b")}
    rows = bench_in_turns(models, (8,), (3,), (1, 2), rounds=3, repeats=2)
    assert opened == ["a", "b"] * 3 and list(rows) == ["a", "b"]
    for of_model in rows.values():
        assert [(row["prompt"], row["output"], row["batch"]) for row in of_model] == [(8, 3, 1), (8, 3, 2)]
        assert all(set(row) == {"prompt", "output", "batch", "dtype", *MEASURED, *SPREADS} for row in of_model)
        assert of_model[0]["cache_bytes"] == cache_bytes(tiny_config, 11, 1, kv_bits=32, conv_bits=32)
    with pytest.raises(HalflapError, match="rounds is 0"):
        bench_in_turns(models, (8,), (3,), (1,), rounds=0)


@pytest.mark.parametrize(("field", "sizes"), list(itertools.product(range(3), ((), (0,), (4, -1)))))
def test_wrong_sizes(tiny_config: Any, field: int, sizes: tuple[int, ...]) -> None:
    grid: list[tuple[int, ...]] = [(4,), (4,), (4,)]
    grid[field] = sizes
    with pytest.raises(HalflapError, match="must be at least 1"):
        bench(HybridModel(tiny_config), *grid)


@pytest.mark.parametrize("by_kernel", [True, False])
def test_peaks_are_seen_and_forgotten(by_kernel: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not by_kernel:
        monkeypatch.setattr(memory, "_reset_mark", lambda: False)
    with PeakMemory() as before:
        torch.zeros(1000).sum()
    with PeakMemory() as high:
        block = torch.ones(60_000_000)
        block.add_(1)
        del block
    with PeakMemory() as after:
        torch.zeros(1000).sum()
    assert 200e6 < high.bytes - before.bytes < 400e6
    assert abs(after.bytes - before.bytes) < 100e6
