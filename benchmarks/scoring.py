"""Scoring every axis by activations against one plain forward pass over the same tokens: the ratio of their times.

`scoring` is what `halflap score` does by default, `every_source` all sources and aggregations at once.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch

from common import Report, arguments, interleave, our_model, random_tokens, spread
from halflap.compress.importance import DEFAULT_SCORING, Scoring
from halflap.compress.watch import activation
from halflap.data.batch import Batch
from halflap.models.model import HybridModel

EVERYTHING = [
    Scoring(neuron, mamba, mamba, sequence, batch)
    for neuron, mamba, sequence, batch in itertools.product(
        ("post", "pre"), ("x", "z", "o", "flap"), ("mean", "l2", "signed_mean"), ("l2", "mean")
    )
]


def batches_of(model: HybridModel, rows: int, length: int, count: int) -> list[Batch]:
    made = [random_tokens(model, rows, length + 1, seed) for seed in range(count)]
    return [Batch(t[:, :-1], t[:, 1:], torch.ones(rows, length)) for t in made]


def plain_pass(model: HybridModel, batches: list[Batch]) -> Callable[[], None]:
    def run() -> None:
        with torch.inference_mode():
            for batch in batches:
                model.hidden_states(batch.tokens)

    return run


def main() -> None:
    chosen = arguments(__doc__, rows=4, length=512, batches=2)
    report = Report("scoring", chosen.out, chosen.threads)
    for size in chosen.sizes:
        model = our_model(size).eval()
        batches = batches_of(model, chosen.rows, chosen.length, chosen.batches)
        sides = {
            "plain_pass": plain_pass(model, batches),
            "scoring": lambda model=model, batches=batches: activation(model, batches, [DEFAULT_SCORING]),
            "every_source": lambda model=model, batches=batches: activation(model, batches, EVERYTHING),
        }
        tokens = chosen.rows * chosen.length * chosen.batches
        times = interleave(sides, chosen.repeats)
        rates = {name: spread(t, tokens) for name, t in times.items()}
        plain = rates["plain_pass"]["median"]
        ratios = {"time_ratio": "scoring", "time_ratio_every_source": "every_source"}
        ratios = {name: plain / rates[side]["median"] for name, side in ratios.items()}
        report.add(size=size, dtype="float32", tokens=tokens, **rates, **ratios)
    report.write()


if __name__ == "__main__":
    main()
