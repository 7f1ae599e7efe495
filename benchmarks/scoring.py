"""What scoring costs, in forward passes over the same tokens.

Of every axis, by activations: `scoring` is what `halflap score` does by default, `every_source` all sources and
aggregations at once. Of variants of blocks (Puzzle): six of each of the 28 blocks, each in the teacher's place, where
half the blocks come after it; a pass for every second variant is what cannot be had for less. `calibration_ratio` is
the same against a pass over the calibration text, of which replacements read an eighth by default.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import torch

from common import Report, arguments, interleave, our_model, random_tokens, spread
from halflap.commands.config_compress import ScoreRecipe
from halflap.commands.sections import SearchSettings
from halflap.compress.grid import SearchSpace
from halflap.compress.importance import DEFAULT_SCORING, Importance, Scoring, score_shapes
from halflap.compress.library import WHOLE, Library, Option, library_of
from halflap.compress.ranking import plan_of_variants
from halflap.compress.replace import Replacement, replacement, replacement_scores
from halflap.compress.watch import activation
from halflap.data.batch import Batch
from halflap.models.config import Mamba2Config, ModelConfig
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


def six_of_each(teacher: ModelConfig) -> Library:
    """Of every block whole, the five largest cuts of a search's library, and gone."""
    mamba = next(block for block in teacher.blocks if isinstance(block, Mamba2Config))
    heads, step = mamba.num_heads, mamba.num_groups
    space = SearchSpace(
        mamba_num_heads=tuple(range(heads, 0, -step)), mamba_head_dim=(mamba.head_dim, mamba.head_dim // 2)
    )
    library = library_of(teacher, space)
    kept: list[Option] = []
    for index in range(len(teacher.blocks)):
        own = [option for option in library.options if option.blocks == (index,)]
        kept += [*own[:6], own[-1]]
    return dataclasses.replace(library, options=tuple(kept))


def replacing(model: HybridModel, batches: list[Batch]) -> Callable[[], None]:
    """Score every option of the library, cut anew each time as a search does."""
    config = model.config
    generator = torch.Generator().manual_seed(0)
    widths = {name: torch.rand(size, generator=generator) for name, size in score_shapes(config).items()}
    importance, library = Importance("random", widths), six_of_each(config)

    def make(option: Option) -> Replacement:
        variants = [option.variant if index in option.blocks else WHOLE for index in range(len(config.blocks))]
        return replacement(model, plan_of_variants(importance, "random", config, variants, "masked"), option.blocks[0])

    def run() -> None:
        assert len(replacement_scores(model, batches, library, make)) == 6 * len(config.blocks)

    return run


def replacement_passes(model: HybridModel) -> float:
    """Forward passes over the tokens that the blocks after the variants make up, the variants themselves whole."""
    count = len(model.config.blocks)
    return 1 + sum(6 * (count - index) for index in range(count)) / count


def main() -> None:
    chosen = arguments(
        __doc__, quick={"sizes": ["55m"], "rows": 1, "length": 32, "batches": 1, "replaced": 32},
        rows=4, length=512, batches=2, replaced=512,
    )  # fmt: skip
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
        report.add(size=size, dtype="float32", **replacement_row(model, chosen.replaced, chosen.repeats))
    report.write()


def replacement_row(model: HybridModel, tokens: int, repeats: int) -> dict[str, Any]:
    """One row of `tokens` tokens; a turn takes a hundred passes, so three will do."""
    batches = batches_of(model, 1, tokens, 1)
    sides = {"plain_pass": plain_pass(model, batches), "replacement": replacing(model, batches)}
    sides["plain_pass"]()
    rates = {name: spread(t, tokens) for name, t in interleave(sides, min(repeats, 3), warm_up=0).items()}
    ratio = rates["plain_pass"]["median"] / rates["replacement"]["median"]
    share = SearchSettings().replacement_tokens / ScoreRecipe.tokens
    return {
        "variants": 6 * len(model.config.blocks), "tokens": tokens, **rates, "time_ratio": ratio,
        "passes": replacement_passes(model), "calibration_ratio": ratio * share,
    }  # fmt: skip


if __name__ == "__main__":
    main()
