"""Decoding of a 55 M Hymba against our Transformer of the same size, heads and parameters, over context.

Batches of 1 to 32 rows, contexts of 1k to 32k tokens; the window is 1024 and there are 128 meta tokens, as published.
Both run the same bare greedy loop. Weights are random and the cache is filled with noise as if so many tokens had been
read, since prefill of a million tokens would take hours: a step's work does not depend on what the cache holds. Each
turn starts at the same length. What would take more than three quarters of the free memory is not run, and said. Goal:
the paper's curve, a throughput ratio that grows with context, and memory flat but for the global layers.

Then the same in a fixed memory: at each context up to 64k both run the largest batch (at most --most) with which
weights and caches take no more than --memory, one after the other. `--size 1.5b` is Hymba 1.5B and the shape of Llama
3.2 3B, the paper's pair (8k tokens there); their weights take 3.1 and 6.4 GB, so give --memory 10GiB, and shorter
--memory-contexts where time is short. Give --dtype bfloat16 where the processor computes in it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch

from common import Report, arguments, hymba_and_transformer, interleave, shape_of, shaped_model, spread
from halflap.amounts import parse_amount
from halflap.models.cache import Cache, fields, parts
from halflap.models.config import ModelConfig
from halflap.models.count import cache_bytes
from halflap.models.decoder import Decoder
from halflap.models.model import HybridModel
from halflap.report.plots import Frame
from halflap.report.svg import Scale, element, picture

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
STYLE = """
text { font: 13px system-ui, sans-serif; fill: #333 }
.grid { stroke: #ddd } .axis { stroke: #333 } .curve { fill: none; stroke-width: 2 }
"""


@torch.inference_mode()
def filled_cache(model: HybridModel, batch: int, context: int, steps: int) -> Cache:
    """As after reading `context` tokens a row, with room for `steps` more; noise but for the meta tokens."""
    dtype = model.dtype
    cache = Cache.create(model.config, batch, context + steps, dtype)
    generator = torch.Generator().manual_seed(0)
    for state in parts(cache):
        for tensor in fields(state).values():
            tensor[:] = 0.1 * torch.randn(tensor[:1].shape, generator=generator)  # the same in all rows
    if model.meta_tokens is not None:
        cache.start_from(model.meta_state(dtype, "cpu"))
    rewind(cache, context)
    return cache


def rewind(cache: Cache, context: int) -> None:
    """Back to `context` tokens a row: what was decoded is overwritten, in states it stays."""
    cache.lengths, cache.used = torch.full_like(cache.lengths, context), context


def decode(model: HybridModel, cache: Cache, steps: int) -> Callable[[], None]:
    batch, context, step = len(cache.lengths), cache.used, Decoder(model)

    def run() -> None:
        with torch.inference_mode():
            token = torch.zeros(batch, 1, dtype=torch.int64)
            for _ in range(steps):
                token = step(token, cache=cache)[:, -1].argmax(-1, keepdim=True)

    run.prepare = lambda: rewind(cache, context)  # type: ignore[attr-defined]
    return run


def held_bytes(config: ModelConfig, context: int, batch: int, dtype: torch.dtype) -> int:
    bits = 8 * dtype.itemsize
    return cache_bytes(config, context, batch, kv_bits=bits, conv_bits=bits)


def sizes(configs: dict[str, ModelConfig], batch: int, context: int, dtype: torch.dtype) -> dict[str, int]:
    return {name: held_bytes(config, context, batch, dtype) for name, config in configs.items()}


def row(models: dict[str, HybridModel], batch: int, context: int, steps: int, repeats: int) -> dict[str, Any]:
    caches = {name: filled_cache(model, batch, context, steps) for name, model in models.items()}
    held = {f"{name}_held_mb": cache.nbytes(tokens_only=True) / 1e6 for name, cache in caches.items()}
    times = interleave({name: decode(model, caches[name], steps) for name, model in models.items()}, repeats)
    rates = {name: spread(t, batch * steps) for name, t in times.items()}
    return {**rates, "ratio": rates["hymba"]["median"] / rates["transformer"]["median"], **held}


def largest_batch(model: HybridModel, context: int, memory: float, most: int) -> int:
    weights = sum(parameter.nbytes for parameter in model.parameters())
    return max(0, min(most, int((memory - weights) // held_bytes(model.config, context, 1, model.dtype))))


def memory_row(models: dict[str, HybridModel], context: int, chosen: Any) -> dict[str, Any]:
    """Rates of each model at the largest batch that fits; one cache is there at a time."""
    memory = parse_amount(chosen.memory, "bytes", share=False).value
    batches = {
        name: largest_batch(model, context + chosen.steps, memory, chosen.most) for name, model in models.items()
    }
    found: dict[str, Any] = {f"{name}_batch": batch for name, batch in batches.items()}
    sides = {name: from_fresh(model, batches[name], context, chosen.steps) for name, model in models.items()}
    times = interleave({name: side for name, side in sides.items() if batches[name]}, chosen.repeats)
    rates = {name: spread(taken, batches[name] * chosen.steps) for name, taken in times.items()}
    if len(rates) == len(models):
        found["ratio"] = rates["hymba"]["median"] / rates["transformer"]["median"]
    return {**rates, **found}


def from_fresh(model: HybridModel, batch: int, context: int, steps: int) -> Callable[[], None]:
    """Decode with a cache that is made before each turn and given up after it."""
    waiting: list[Callable[[], None]] = []

    def run() -> None:
        waiting.pop()()

    run.prepare = lambda: waiting.append(decode(model, filled_cache(model, batch, context, steps), steps))  # type: ignore[attr-defined]
    return run


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Throughput ratio over context, a line a batch and one for the fixed memory, as SVG."""
    measured = [row for row in rows if "ratio" in row]
    steps = [math.log2(row["context"] / 1024) for row in measured]
    x = Scale(min(steps) - 0.2, max(steps) + 0.2, 48, 580)
    y = Scale(0, 1.1 * max(1, *(row["ratio"] for row in measured)), 298, 24)
    titles = "context, thousands of tokens", "tokens a second, Hymba over Transformer"
    lines = [Frame(x, y, 700, 340).axes(*titles, lambda step: f"{2**step:g}", "{:g}".format)]
    lines.append(element("line", x1=x.start, x2=x.end, y1=y(1), y2=y(1), class_="axis", stroke_dasharray="4 3"))
    curves = {
        name: [(x(step), y(row["ratio"])) for row, step in zip(measured, steps) if line_of(row) == name]
        for name in map(line_of, measured)
    }
    below = -math.inf
    for color, (title, points) in zip(COLORS, sorted(curves.items(), key=lambda pair: pair[1][-1][1])):
        below = max(points[-1][1] + 4, below + 16)  # names do not touch
        line = " ".join(f"{a:.1f},{b:.1f}" for a, b in points)
        name = element("text", title, x=x.end + 8, y=below, style=f"fill:{color}")
        lines += [element("polyline", points=line, class_="curve", stroke=color), name]
    label = "Decoding throughput of a Hymba over that of a Transformer of its size, by context and batch"
    drawing = str(picture(700, 340, label, [element("style", STYLE), *lines]))
    path.write_text(drawing.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1) + "\n")
    print(f"written to {path}")


def line_of(row: dict[str, Any]) -> str:
    return f"batch {row['batch']}" if "batch" in row else f"in {row['memory']}"


def main() -> None:
    quick = {"contexts": [64, 256, 1024], "batches": [1, 2], "steps": 2, "size": "tiny", "memory": "8MiB"}
    quick |= {"memory_contexts": [64, 256], "most": 8}
    doubling = [1024 * 2**n for n in range(7)]
    chosen = arguments(
        __doc__, quick, steps=16, size="55m", batches=[1, 4, 16, 32], contexts=doubling[:6], memory="4GiB", most=256,
        memory_contexts=doubling, dtype="float32",
    )  # fmt: skip
    name = "hybrid_decode" if chosen.size == "55m" else f"hybrid_decode_{chosen.size}"
    report = Report(name, chosen.out, chosen.threads)
    changes = {"window": 64, "meta": 8} if chosen.size == "tiny" else {}
    pair = hymba_and_transformer(chosen.size, **changes)
    dtype = getattr(torch, chosen.dtype)
    models = {name: shaped_model(config, dtype) for name, config in pair.items()}
    configs = {name: model.config for name, model in models.items()}
    for model, config in configs.items():
        report.add(model=model, **shape_of(config))
    for batch in chosen.batches:
        for context in chosen.contexts:
            counted = sizes(configs, batch, context, dtype)
            found: dict[str, Any] = {f"{name}_counted_mb": size / 1e6 for name, size in counted.items()}
            if sum(counted.values()) > 0.75 * psutil.virtual_memory().available:
                found["skipped"] = "both caches together take more than three quarters of the free memory"
            else:
                found |= row(models, batch, context, chosen.steps, chosen.repeats)
            report.add(batch=batch, context=context, dtype=chosen.dtype, steps=chosen.steps, **found)
    for context in chosen.memory_contexts:
        found = memory_row(models, context, chosen)
        report.add(memory=chosen.memory, context=context, dtype=chosen.dtype, steps=chosen.steps, **found)
    report.write()
    draw(report.rows, chosen.out / f"{report.name}.svg")


if __name__ == "__main__":
    main()
