"""Cache bytes of a Hymba: every published or derived figure by `count`, and tensors of the same shapes weighed.

Figures: 16 bits for everything, MB of 10^6 bytes, tails of 4 columns, windows without the newest token; each is counted
again and must agree in the digits it is given with. Held: what the tensors of a cache for S tokens hold must be what
`count` says, when made and, for shorter S, after prefills that are shorter and longer than the window, in one piece and
in two; of both full shapes (with random weights) and of a small model. We hold SSM states in float32, tails of 3
columns and one token more than the window. The script fails where anything differs.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from typing import Any

import torch

from common import Report, arguments, hymba_and_transformer, shaped_model
from halflap.models.cache import Cache
from halflap.models.config import AttentionConfig, HybridConfig, ModelConfig
from halflap.models.count import cache_bytes, cache_parts
from halflap.models.model import HybridModel
from halflap.models.presets import preset

UNIT = "MB of 10^6 bytes"
PUBLISHED = {"ssm_bits": 16, "conv_columns": 4, "window_slots": 0}


def parts(config: ModelConfig, context: int, **changes: Any) -> dict[str, float]:
    return {name: size / 1e6 for name, size in cache_parts(config, context, **PUBLISHED | changes).items()}


def sums(found: dict[str, float]) -> dict[str, float]:
    """What a reader may mean by the cache."""
    tokens = found["whole"] + found["windowed"]
    with_meta = tokens + found["meta"]
    return {
        "keys_and_values": tokens,
        "with_meta_tokens": with_meta,
        "without_states": with_meta + found["convolution"],
        "everything": sum(found.values()),
    }


def unshared(config: ModelConfig, *, windows: bool) -> ModelConfig:
    """Every layer with keys and values of its own, with or without windows."""

    def alone(attention: AttentionConfig) -> AttentionConfig:
        window = attention.window if windows else None
        return dataclasses.replace(attention, key_value_source=None, window=window)

    blocks = tuple(
        dataclasses.replace(block, attention=alone(block.attention)) if isinstance(block, HybridConfig) else block
        for block in config.blocks
    )
    return dataclasses.replace(config, blocks=blocks)


def transformer(layers: int, heads: int, width: int) -> ModelConfig:
    return ModelConfig("llama", 32000, 64, (AttentionConfig(heads, heads, width),) * layers)


HYMBA = preset("hymba-1.5b")
WINDOWED, GLOBAL = unshared(HYMBA, windows=True), unshared(HYMBA, windows=False)
LLAMA_3B, LLAMA_1B = transformer(28, 8, 128), transformer(16, 8, 64)

Count = Callable[[int], float]
ITEMS: dict[str, tuple[Count, dict[int, str]]] = {  # how it is counted; S to the published or derived figure
    "3 global layers, no meta": (lambda s: parts(HYMBA, s)["whole"], {8000: "46.080", 8192: "47.186"}),
    "14 windowed producers, no meta": (lambda s: parts(HYMBA, s)["windowed"], {8000: "27.525", 8192: "27.525"}),
    "meta, 17 layers x 128": (lambda s: parts(HYMBA, s)["meta"], {8000: "4.178", 8192: "4.178"}),
    "SSM state": (lambda s: parts(HYMBA, s)["ssm"], {8000: "3.277", 8192: "3.277"}),
    "conv tail, width 4": (lambda s: parts(HYMBA, s)["convolution"], {8000: "0.819", 8192: "0.819"}),
    "conv tail, width 3": (
        lambda s: parts(HYMBA, s, conv_columns=3)["convolution"],
        {8000: "0.614", 8192: "0.614"},
    ),
    "everything": (
        lambda s: sums(parts(HYMBA, s))["everything"],
        {8000: "81.879", 8192: "82.985", 1000: "40.9", 2000: "47.3", 16000: "128.0"},
    ),
    "Llama-3.2-3B": (lambda s: cache_bytes(LLAMA_3B, s) / 1e6, {8000: "917.504", 8192: "939.524"}),
    "Llama-3.2-1B": (lambda s: cache_bytes(LLAMA_1B, s) / 1e6, {8000: "262.144", 8192: "268.435"}),
    "without sharing": (
        lambda s: sums(parts(WINDOWED, s))["keys_and_values"],
        {8000: "103.10", 8192: "104.20"},
    ),
    "all layers global and unshared": (
        lambda s: sums(parts(GLOBAL, s))["keys_and_values"],
        {8000: "491.52", 8192: "503.32"},
    ),
}


def agrees(counted: float, figure: str) -> bool:
    return f"{counted:.{len(figure.partition('.')[2])}f}" == figure


def figures(report: Report) -> bool:
    good = True
    for item, (count, stated) in ITEMS.items():
        for context, figure in stated.items():
            counted = count(context)
            good &= agrees(counted, figure)
            report.add(
                item=item, context=context, dtype="float16", unit=UNIT,
                figure=figure, counted=f"{counted:.3f}", agrees=agrees(counted, figure),
            )  # fmt: skip
    for context in (8000, 8192):
        totals = {name: f"{size:.3f}" for name, size in sums(parts(HYMBA, context)).items()}
        report.add(totals="hymba-1.5b", context=context, dtype="float16", unit=UNIT, **totals)
    return good


@torch.no_grad()
def after_prefill(model: HybridModel, context: int, pieces: int) -> int:
    """Bytes of the cache's tensors once it has read `context` tokens, in so many pieces."""
    cache = Cache.create(model.config, 1, context, model.dtype)
    for piece in torch.zeros(1, context, dtype=torch.int64).chunk(pieces, 1):
        model.hidden_states(piece, cache=cache)
    return cache.nbytes()


def weighed(
    report: Report, name: str, config: ModelConfig, contexts: list[int], prefills: list[int], dtype: torch.dtype
) -> bool:
    model, good, bits = shaped_model(config, dtype), True, 8 * dtype.itemsize
    for context in sorted({*contexts, *prefills}):
        found = {"when_made": Cache.create(config, 1, context, dtype).nbytes()}
        if context in prefills:
            found |= {f"after_{pieces}_pieces": after_prefill(model, context, pieces) for pieces in (1, 2)}
        counted = cache_bytes(config, context, kv_bits=bits, conv_bits=bits)
        good &= (agreed := set(found.values()) == {counted})
        report.add(
            held_by=name, context=context, dtype=f"{str(dtype)[6:]}, states float32", unit="bytes",
            **found, counted=counted, agrees=agreed,
        )  # fmt: skip
    return good


def main() -> None:
    quick = {"contexts": [8000], "prefills": [20]}
    chosen = arguments(__doc__, quick, contexts=[8000, 8192], prefills=[1000, 1100], dtype="float32")
    dtype = getattr(torch, chosen.dtype)
    report = Report("cache_bytes", chosen.out, chosen.threads)
    small = hymba_and_transformer("tiny", window=64, meta=8, vocab=512)["hymba"]
    good = figures(report)
    good &= weighed(report, "hymba-1.5b", HYMBA, chosen.contexts, chosen.prefills, dtype)
    good &= weighed(report, "Llama-3.2-3B", LLAMA_3B, chosen.contexts, chosen.prefills, dtype)
    good &= weighed(report, "4 layers, window 64", small, [2000], [20, 64, 65, 66, 300], dtype)
    report.write()
    if not good:
        sys.exit("a figure or a cache differs from what is counted")


if __name__ == "__main__":
    main()
