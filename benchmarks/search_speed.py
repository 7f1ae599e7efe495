"""How long a search takes to choose for the 56B shape under three budgets at once, its costs real and scores made up.

`homogeneous` looks at a grid of 1,024,000 students, one size of each axis for all blocks. `programme` chooses among 20
variants of each of the 118 blocks (Puzzle), to a proven gap of 0.1 %, and `programme_made` is what comes before: the
costs of all variants, and that each budget can be met. No weights are read.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from common import Report, arguments, interleave, spread
from halflap.compress.axes import Sizes
from halflap.compress.costs import Budget, costs
from halflap.compress.grid import SearchSpace
from halflap.compress.kinds import Change
from halflap.compress.library import DROPPED, WHOLE, Library, Option, Variant
from halflap.compress.programme import GAP, Choice, Programme
from halflap.compress.space import Fitting, fitting
from halflap.models.config import AttentionConfig, Mamba2Config, ModelConfig
from halflap.models.count import count_block_parameters
from halflap.models.presets import preset

CONTEXT = {"context": 262_144, "batch": 4, "weight_bits": 8, "cache_bits": 8}


def budget_of(teacher: ModelConfig, share: float) -> Budget:
    """A share of parameters, of memory and of FLOPs; in a context so long that none of the three implies another."""
    whole = costs(teacher, Budget(**CONTEXT))
    limits = {name: share * whole[name] for name in ("params", "memory", "flops")}
    return Budget(**CONTEXT, **limits)  # type: ignore[arg-type]


def space_of(teacher: ModelConfig, steps: int) -> SearchSpace:
    """`steps` sizes of hidden size, MLPs and depth, and four fifths and two fifths as many of Mamba heads and channels:
    1,024,000 students at 20."""
    mamba = next(block for block in teacher.blocks if isinstance(block, Mamba2Config))
    mlp = max(getattr(block, "intermediate_size", 0) for block in teacher.blocks)
    count = len(teacher.blocks)

    def down(whole: int, step: int, values: int = steps) -> tuple[int, ...]:
        return tuple(range(whole, 0, -step)[:values])

    return SearchSpace(
        hidden_size=down(teacher.hidden_size, teacher.hidden_size // 32),
        intermediate_size=down(mlp, mlp // 32),
        mamba_num_heads=down(mamba.num_heads, mamba.num_groups, steps * 4 // 5),
        mamba_head_dim=down(mamba.head_dim, mamba.head_dim // 16, steps * 2 // 5),
        num_blocks=down(count, max(1, count // 59)),
    )


def library_of(teacher: ModelConfig) -> Library:
    """20 variants of every block: whole, 18 smaller ones, gone."""
    known: dict[Any, list[Variant]] = {}
    for block in teacher.blocks:
        if block in known:
            continue
        if isinstance(block, Mamba2Config):
            step = block.num_groups
            smaller = [Variant(Sizes(mamba_num_heads=block.num_heads - step * cut)) for cut in range(1, 19)]
        elif isinstance(block, AttentionConfig):
            queries, keys = block.queries_per_key_value_head, block.num_key_value_heads
            pairs = [(keys // by, queries - 2 * cut) for by in (1, 2, 4, 8) for cut in range(4)][1:]
            smaller = [Variant(Sizes(num_attention_heads=k * q, num_key_value_heads=k)) for k, q in pairs]
            smaller += [
                Variant(change=Change(pool=2)),
                Variant(change=Change(pool=4)),
                Variant(change=Change(linear=True)),
            ]
        else:
            width = block.intermediate_size  # type: ignore[union-attr]
            smaller = [Variant(Sizes(intermediate_size=width * left // 32)) for left in range(30, -4, -2)[:15]]
            smaller += [Variant(Sizes(intermediate_size=width // by)) for by in (32, 64)]
            smaller.append(Variant(change=Change(linear=True)))
        known[block] = [WHOLE, *smaller, DROPPED]
    options = [Option((index,), variant) for index, block in enumerate(teacher.blocks) for variant in known[block]]
    return Library(teacher, tuple(options), len(teacher.blocks) // 2)


def scores_of(library: Library) -> np.ndarray:
    """(C,): of blocks that matter unequally, more for what is cut deeper, with noise; 0 for whole blocks."""
    random = np.random.default_rng(0)
    matter = np.exp(random.standard_normal(len(library.teacher.blocks)))
    whole = count_block_parameters(library.teacher)
    scores = np.zeros(len(library.options))
    added, _ = library.costs("params", Budget())
    for column, option in enumerate(library.options):
        index = option.blocks[0]
        if option.variant != WHOLE:
            scores[column] = matter[index] * (1.02 - added[column] / whole[index]) ** 1.5 * (1 + 0.2 * random.random())
    return scores


def main() -> None:
    chosen = arguments(__doc__, quick={"steps": 5}, teacher="nemotron-h-56b", steps=20, share=0.78)
    report = Report("search_speed", chosen.out, chosen.threads)
    teacher = preset(chosen.teacher)
    budget, space = budget_of(teacher, chosen.share), space_of(teacher, chosen.steps)
    order = tuple(range(len(teacher.blocks)))
    library = library_of(teacher)
    scores = scores_of(library)
    found: dict[str, Any] = {}

    def homogeneous() -> None:
        found["fitting"] = fitting(teacher, budget, space, order)

    def programme_made() -> None:
        found["programme"] = Programme(library, budget)

    def programme() -> None:
        found["choice"] = found["programme"].choices(scores)[0]

    times = interleave({side.__name__: side for side in (homogeneous, programme_made, programme)}, chosen.repeats)
    fits: Fitting = found["fitting"]
    choice: Choice = found["choice"]
    seconds = {name: spread([1 / taken for taken in of_side]) for name, of_side in times.items()}
    limits = budget.ceilings
    report.add(
        case="homogeneous", teacher=chosen.teacher, students=fits.tried, fit=len(fits.candidates),
        seconds=seconds["homogeneous"], used=shares(fits.candidates[0].costs, limits),
    )  # fmt: skip
    report.add(
        case="programme", teacher=chosen.teacher, blocks=len(teacher.blocks),
        variants=len(library.options) / len(teacher.blocks), seconds=seconds["programme"],
        seconds_making=seconds["programme_made"], gap=choice.gap, gap_asked=GAP, used=shares(choice.costs, limits),
    )  # fmt: skip
    report.write()


def shares(spent: Any, limits: dict[str, float]) -> dict[str, float]:
    """Of each budget that is used."""
    return {name: round(spent[name] / limit, 4) for name, limit in limits.items()}


if __name__ == "__main__":
    main()
