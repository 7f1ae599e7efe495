"""MiniPuzzle's candidates: types ranked among themselves, budgets, the published 56B to 47B, and families of layers."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from halflap.compress.axes import Sizes, block_types, check_sizes, kept_after, resize
from halflap.compress.costs import Budget, costs
from halflap.compress.grid import SearchSpace, choices_by_type
from halflap.compress.importance import Importance, score_shapes
from halflap.compress.ranking import drop_order, kept_blocks, plan_for
from halflap.compress.space import Fitting, fitting
from halflap.errors import HalflapError
from halflap.models.config import ModelConfig
from halflap.models.presets import hymba, preset

TINY, LARGE = preset("nemotron-h-tiny"), preset("nemotron-h-56b")
HYMBA = hymba(
    7, hidden=32, mlp=48, heads=(4, 2), state=8, window=16, meta=4, vocab=64, context=128, original_context=64
)
TYPES = ("num_mamba_blocks", "num_attention_blocks", "num_mlp_blocks")


def importance(config: ModelConfig, seed: int = 0, **depth: Any) -> Importance:
    generator = torch.Generator().manual_seed(seed)
    widths = {name: torch.rand(shape, generator=generator) for name, shape in score_shapes(config).items()}
    blocks = torch.rand(len(config.blocks), generator=generator)
    return Importance("teacher", widths, depth={"hidden_mse": blocks} | depth)


def found(config: ModelConfig, budget: Budget, space: SearchSpace, seed: int = 0) -> Fitting:
    return fitting(config, budget, space, drop_order(importance(config, seed), config, True), choices_by_type)


# ---- which blocks stay


@settings(max_examples=25)
@given(st.integers(0, 99), st.tuples(st.integers(1, 3), st.integers(1, 1), st.integers(1, 3)))
def test_of_each_type_the_best_stay(seed: int, counts: tuple[int, int, int]) -> None:
    scores = importance(TINY, seed)
    sizes = Sizes(**dict(zip(TYPES, counts, strict=True)), intermediate_size=100)
    plan = plan_for(scores, "teacher", TINY, sizes)
    depth = scores.depth["hidden_mse"]
    for name, count in zip(TYPES, counts, strict=True):
        blocks = block_types(TINY)[name]
        best = sorted(blocks, key=lambda index: -float(depth[index]))[:count]
        assert sorted(best) == [index for index in plan.keep_blocks if index in blocks]
    for index in plan.keep_blocks:
        if f"blocks.{index}.neuron" in plan.keep:
            kept: Any = plan.keep[f"blocks.{index}.neuron"]
            row = scores.widths[f"blocks.{index}.neuron"]
            assert min(row[list(kept)]) >= max(row[i] for i in range(len(row)) if i not in kept)
    assert plan.student.pattern() == resize(TINY, plan.keep_blocks, sizes).pattern()


def test_the_metric_of_minipuzzle_counts_first_and_any_other_will_do() -> None:
    order = torch.tensor([5.0, 1, 4, 2, 3, 6, 7])
    both = importance(TINY, hidden_mse=order, kl=order.flip(0))
    sizes = Sizes(num_mamba_blocks=3, num_attention_blocks=1, num_mlp_blocks=2)
    assert kept_blocks(both, TINY, sizes) == (0, 2, 3, 4, 5, 6)  # of the MLPs 1, 4 and 6 the worst by hidden_mse is 1
    only = dataclasses.replace(both, depth={"kl": order.flip(0)})
    assert kept_blocks(only, TINY, sizes) == (0, 1, 2, 3, 5, 6)
    with pytest.raises(HalflapError, match="no score of whole blocks"):
        kept_blocks(dataclasses.replace(both, depth={}), TINY, sizes)


@pytest.mark.parametrize(
    ("config", "sizes", "says"),
    [
        (TINY, {"num_mamba_blocks": 4}, "the teacher has 3"),
        (TINY, {"num_mlp_blocks": 0}, "choose 1 to 3"),
        (TINY, {"num_mlp_blocks": 2, "num_blocks": 5}, "both say which blocks stay"),
        (TINY, {"num_mlp_blocks": 2, "drop_blocks": (0,)}, "both say which blocks stay"),
        (preset("llama-tiny"), {"num_mlp_blocks": 2}, "a llama layer is 2 blocks of several.*use sizes.num_blocks"),
        (HYMBA, {"num_mamba_blocks": 2}, "use sizes.num_blocks"),
    ],
)
def test_counts_that_cannot_be_are_refused(config: ModelConfig, sizes: dict[str, Any], says: str) -> None:
    with pytest.raises(HalflapError, match=says):
        check_sizes(config, Sizes(**sizes))


# ---- candidates


@settings(max_examples=8)
@given(st.sampled_from(["params", "memory", "flops"]), st.floats(0.75, 0.95), st.integers(0, 99))
def test_candidates_fit_and_none_could_grow(cost: str, share: float, seed: int) -> None:
    """By brute force over the grid, with costs of the students themselves."""
    at: dict[str, Any] = {"context": 2000, "weight_bits": 4, "cache_bits": 8}
    limit = share * costs(TINY, Budget(**at))[cost]
    limits: dict[str, Any] = at | {cost: limit}
    budget, space = Budget(**limits), SearchSpace(max_depth_cut=0.5)
    order = drop_order(importance(TINY, seed), TINY, True)
    result = fitting(TINY, budget, space, order, choices_by_type)
    grid = choices_by_type(TINY, space, True)
    names = [*TYPES, "intermediate_size"]
    below: dict[tuple[int, ...], float] = {}
    for values in itertools.product(*(grid[name] for name in names)):
        given_sizes: Any = dict(zip(names, values, strict=True))
        sizes = Sizes(**given_sizes)
        if sum(values[:3]) >= 3.5:
            spent = costs(resize(TINY, kept_after(TINY, sizes, order), sizes), budget)[cost]
            if spent <= limit:
                below[values] = spent
    largest = {v for v in below if not any(w != v and all(a >= b for a, b in zip(w, v, strict=True)) for w in below)}
    near = {v for v in largest if below[v] >= 0.95 * limit}
    have = {tuple(getattr(c.sizes, name) or grid[name][0] for name in names) for c in result.candidates}
    assert have == near if near else result.candidates
    for candidate in result.candidates:
        assert set(TYPES) <= {name for name, value in vars(candidate.sizes).items() if value}
        student = plan_for(importance(TINY, seed), "teacher", TINY, candidate.sizes, "none").student
        assert costs(student, budget)[cost] == pytest.approx(candidate.costs[cost], abs=16) and (
            costs(student, budget)[cost] <= limit
        )


def test_lists_of_counts_and_of_their_sums_are_kept() -> None:
    budget = Budget(params=0.9 * costs(TINY, Budget())["params"])
    space = SearchSpace(num_blocks=(6,))
    assert {sum(getattr(c.sizes, n) for n in TYPES) for c in found(TINY, budget, space).candidates} == {6}
    budget = Budget(params=0.8 * costs(TINY, Budget())["params"])
    space = SearchSpace(
        num_mamba_blocks=(2,), num_mlp_blocks=(3, 2), num_attention_blocks=(1,), mamba_num_heads=(12, 8)
    )
    candidates = found(TINY, budget, space).candidates
    assert {c.sizes.num_mamba_blocks for c in candidates} == {2} and {c.sizes.mamba_num_heads for c in candidates} == {
        None,
        8,
    }
    with pytest.raises(HalflapError, match="no sizes of the search space go together"):
        found(TINY, budget, dataclasses.replace(space, num_blocks=(7,)))
    with pytest.raises(HalflapError, match="search with --method minipuzzle"):
        fitting(TINY, budget, space, tuple(range(7)))
    with pytest.raises(HalflapError, match="the smallest student of this search space"):
        found(TINY, Budget(params=1000), SearchSpace())


# ---- the published run: 56B to 47B under 31.7 GiB, 4-bit weights, a million tokens of context

PAPER = Budget(memory=31.7 * 2**30, context=10**6, weight_bits=4, cache_bits=8)
WIDTHS = tuple(range(24576, 32769, 1024))
RELEASED = Sizes(num_mamba_blocks=45, num_attention_blocks=5, num_mlp_blocks=48, intermediate_size=30720)


@pytest.mark.parametrize(("max_depth_cut", "count"), [(0.2, 208), (0.25, 349), (0.27, 406)])
def test_about_as_many_candidates_as_the_paper_has(max_depth_cut: float, count: int) -> None:
    """About 400 there; how much of the depth its grid reached is not said, and about a quarter gives that many."""
    space = SearchSpace(intermediate_size=WIDTHS, max_depth_cut=max_depth_cut)
    result = fitting(LARGE, PAPER, space, tuple(range(118)), choices_by_type)
    assert len(result.candidates) == count and result.remark is None
    assert RELEASED in {candidate.sizes for candidate in result.candidates}
    assert all(0.95 * 31.7 <= candidate.costs["memory"] / 2**30 < 31.7 for candidate in result.candidates)


def test_the_released_student_is_one_of_them() -> None:
    """Its own pattern comes of depth scores that rank the blocks it dropped last of their type."""
    space = SearchSpace(intermediate_size=WIDTHS, num_blocks=(98,))
    released = preset("nemotron-h-47b")
    dropped = embedding(LARGE.pattern(), released.pattern())
    assert [sum(LARGE.pattern()[index] == kind for index in dropped) for kind in "M*-"] == [9, 5, 6]
    assert [index for index in dropped if LARGE.pattern()[index] == "*"] == [7, 29, 73, 84, 95]
    order = (*dropped, *(index for index in range(118) if index not in dropped))
    result = fitting(LARGE, PAPER, space, order, choices_by_type)
    one = next(candidate for candidate in result.candidates if candidate.sizes == RELEASED)
    assert one.costs["params"] == 46_791_554_816 and one.costs["memory"] / 2**30 == pytest.approx(31.69, rel=1e-3)
    assert resize(LARGE, kept_after(LARGE, one.sizes, order), one.sizes).blocks == released.blocks


def embedding(whole: str, part: str) -> list[int]:
    """Indices to leave out of `whole` so that `part` is left, with its attention blocks where the paper has them."""
    kept = {"*": iter((18, 40, 51, 62, 106))}
    dropped, place = [], 0
    wanted = [next(kept["*"]) if kind == "*" else None for kind in part]
    for index, kind in enumerate(whole):
        if place < len(part) and part[place] == kind and wanted[place] in (None, index):
            place += 1
        else:
            dropped.append(index)
    assert place == len(part)
    return dropped


# ---- families whose layers are several blocks


@pytest.mark.parametrize("name", ["llama-tiny", "nemotron-4-tiny", "hymba"])
def test_layers_of_several_blocks_are_one_type(name: str) -> None:
    config = HYMBA if name == "hymba" else preset(name)
    budget = Budget(params=0.75 * costs(config, Budget())["params"])
    for seed in range(6):
        candidates = found(config, budget, SearchSpace(max_depth_cut=0.5), seed).candidates
        assert {c.sizes.num_blocks for c in candidates} - {None}, "depth is varied"
        for candidate in candidates:
            plan = plan_for(importance(config, seed), "teacher", config, candidate.sizes)
            assert costs(plan.student, budget)["params"] <= budget.params  # type: ignore[operator]
            assert all(a + 1 == b and a % 2 == 0 for a, b in zip(plan.keep_blocks[::2], plan.keep_blocks[1::2]))
            # PruningPlan refuses a block whose keys and values are gone; those left are read from earlier blocks
            sources = [b.attention.key_value_source for b in plan.student.blocks if b.attention is not None]
            assert all(source is None or source < len(plan.student.blocks) for source in sources)
