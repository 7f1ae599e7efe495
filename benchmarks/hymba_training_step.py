"""A training step of a 55 M Hymba on one row of 2048 tokens against our own Transformer of the same size.

Both do forward, backward and AdamW, in float32 and in bfloat16 mixed precision (`--dtypes`). Goal: the Hymba trains
at least 0.6 times as many tokens a second. The second rows say where a step's time goes, as shares of it (spans.py):
products of the projections into and out of mixers, of time steps and of MLPs, scan, convolution, attention, norms,
gate of the MLP, language head with loss, optimiser, and the rest.
"""

from __future__ import annotations

from typing import Any

import torch

from common import Report, arguments, hymba_and_transformer, interleave, random_model, random_tokens, shape_of, spread
from halflap.models.model import HybridModel
from spans import measured
from training_step import our_step

GOAL = 0.6


def shares(model: HybridModel, tokens: torch.Tensor, dtype: torch.dtype, repeats: int) -> dict[str, Any]:
    """Of a step's time, by part; forward and backward together, and `milliseconds` of the whole step."""
    with measured(model) as seconds:
        step = our_step(model, tokens, dtype)
        step()
        seconds.clear()
        whole = sum(interleave({"step": step}, repeats, warm_up=0)["step"])
    by_part = {part: sum(directions.values()) / whole for part, directions in seconds.items()}
    ordered = dict(sorted(by_part.items(), key=lambda pair: -pair[1]))
    forward = sum(directions["forward"] for part, directions in seconds.items() if part != "optimizer") / whole
    return {
        "milliseconds": 1000 * whole / repeats,
        **ordered,
        "rest": 1 - sum(by_part.values()),
        "forward_of_parts": forward,
    }


def main() -> None:
    chosen = arguments(__doc__, {"tokens": 64, "size": "tiny"}, tokens=2048, size="55m", dtypes=["float32", "bfloat16"])
    report = Report("hymba_training_step", chosen.out, chosen.threads)
    windows = {"window": 256, "meta": 32} if chosen.size != "tiny" else {"window": 16, "meta": 4, "vocab": 512}
    configs = hymba_and_transformer(chosen.size, **windows)
    for name, config in configs.items():
        report.add(model=name, **shape_of(config))
    for dtype_name in chosen.dtypes:
        dtype = getattr(torch, dtype_name)
        models = {name: random_model(config) for name, config in configs.items()}
        tokens = random_tokens(models["hymba"], 1, chosen.tokens + 1)
        sides = {name: our_step(model, tokens, dtype) for name, model in models.items()}
        rates = {name: spread(t, chosen.tokens) for name, t in interleave(sides, chosen.repeats).items()}
        report.add(
            dtype=dtype_name, tokens=chosen.tokens, **rates,
            ratio=rates["hymba"]["median"] / rates["transformer"]["median"], goal=GOAL,
        )  # fmt: skip
        for name, model in models.items():
            report.add(dtype=dtype_name, shares_of=name, **shares(model, tokens, dtype, chosen.repeats))
    report.write()


if __name__ == "__main__":
    main()
