"""Candidates under budgets: exact counts, maximal sizes, impossible budgets, speed; and the search over them."""

from __future__ import annotations

import dataclasses
import itertools
import time

import pytest

from halflap.compress.axes import Sizes, resize
from halflap.compress.costs import Budget, costs
from halflap.compress.grid import STEPS, SearchSpace, choices, widening
from halflap.compress.space import fitting
from halflap.errors import HalflapError
from halflap.models.config import AttentionConfig, MLPConfig, RopeConfig
from halflap.models.count import count_parameters
from halflap.models.presets import preset

TINY = preset("nemotron-h-tiny")

# Parameters of published candidates of the 8B (spec/compression.md, section 6): hidden, FFN, heads, channels
COUNTED = {
    (3072, 12288, 112, 64): 4_489_223_040,
    (3072, 10752, 128, 64): 4_490_551_296,
    (3328, 9984, 112, 64): 4_495_167_616,
    (3072, 12288, 112, 60): 4_390_068_096,
    (3072, 12288, 120, 56): 4_390_658_496,
    (3072, 13056, 112, 56): 4_404_159_360,
    (3072, 11520, 112, 64): 4_375_976_832,
    (3072, 13056, 96, 64): 4_374_648_576,
    (3072, 13824, 128, 48): 4_490_256_384,
    (3072, 12288, 104, 62): 4_329_276_480,
    (3072, 16128, 64, 64): 4_371_992_064,
}


@pytest.mark.parametrize("sizes", COUNTED)
def test_counts_of_the_published_candidates(sizes: tuple[int, ...]) -> None:
    teacher = preset("nemotron-h-8b")
    assert count_parameters(resize(teacher, tuple(range(52)), Sizes(*sizes))) == COUNTED[sizes]


def test_the_published_student_is_found_in_its_space() -> None:
    teacher = preset("nemotron-h-8b")
    space = SearchSpace(
        hidden_size=(3072, 3328),
        intermediate_size=(9984, 10752, 12288),
        mamba_num_heads=(112, 128),
        mamba_head_dim=(64,),
    )
    found = fitting(teacher, Budget(params=4.5e9), space)
    chosen = {
        (c.sizes.hidden_size, c.sizes.intermediate_size, c.sizes.mamba_num_heads or 128) for c in found.candidates
    }
    assert chosen == {(3072, 12288, 112), (3072, 10752, 128), (3328, 9984, 112)}
    assert found.candidates[0].costs["params"] == 4_489_223_040 and found.remark is None


@pytest.mark.parametrize("cost", ["params", "non_embedding_params", "memory", "flops"])
def test_candidates_fit_and_none_could_grow(cost: str) -> None:
    order = tuple(range(7))
    limit = 0.6 * costs(TINY, Budget(context=64))[cost]
    budget = Budget(**{cost: limit}, context=64)
    space = SearchSpace(max_width_cut=0.6)
    found = fitting(TINY, budget, space, order)
    grid = choices(TINY, space, with_depth=True)
    fits = set()
    for values in itertools.product(*grid.values()):
        sizes = Sizes(**dict(zip(grid, values)))  # type: ignore[arg-type]
        kept = order[7 - (sizes.num_blocks or 7) :]
        if costs(resize(TINY, kept, sizes), budget)[cost] <= limit:
            fits.add(values)
    largest = {v for v in fits if not any(w != v and all(a >= b for a, b in zip(w, v)) for w in fits)}
    whole = {name: values[0] for name, values in grid.items()}
    names = {tuple(getattr(c.sizes, n) or whole[n] for n in grid) for c in found.candidates}
    assert names and names <= largest
    assert all(0.95 * limit <= c.costs[cost] <= limit for c in found.candidates) or (names == largest and found.remark)
    assert found.candidates[0].hurt == min(c.hurt for c in found.candidates)
    depths = [c.sizes.num_blocks for c in found.candidates]
    assert len(set(depths)) == len(set(depths[: len(set(depths))])), "every depth has its turn first"


def test_several_budgets_are_all_kept() -> None:
    whole = costs(TINY, Budget(context=64))
    budget = Budget(params=0.8 * whole["params"], flops=0.6 * whole["flops"], context=64)
    for candidate in fitting(TINY, budget, SearchSpace(max_width_cut=0.6)).candidates:
        assert candidate.costs["params"] <= budget.params and candidate.costs["flops"] <= budget.flops  # type: ignore[operator]


def test_an_impossible_budget_says_what_is_reachable() -> None:
    with pytest.raises(HalflapError) as error:
        fitting(TINY, Budget(params=1000))
    *_, widest = widening(TINY, SearchSpace())
    smallest = {name: values[-1] for name, values in choices(TINY, widest, False, STEPS[-1]).items()}
    least = count_parameters(resize(TINY, tuple(range(7)), Sizes(**smallest)))  # type: ignore[arg-type]
    assert f"{least:,}" in str(error.value) and "--params" in str(error.value) and "hidden_size" in str(error.value)


def test_a_coarse_space_says_that_it_stays_below() -> None:
    space = SearchSpace(
        hidden_size=(96, 48), intermediate_size=(320,), mamba_num_heads=(12,), mamba_head_dim=(16,), num_blocks=(7,)
    )
    found = fitting(TINY, Budget(params=0.9 * count_parameters(TINY)), space)
    assert len(found.candidates) == 1 and found.remark and "within 5 %" in found.remark


def test_budgets_that_need_measuring_are_refused() -> None:
    for name in ("latency", "throughput"):
        with pytest.raises(HalflapError, match=rf"a {name} budget needs measured times .* --costs"):
            fitting(TINY, Budget(**{name: 1.0}))
    with pytest.raises(HalflapError, match="no budget"):
        fitting(TINY, Budget())


def test_impossible_lists_are_refused() -> None:
    for space in (SearchSpace(hidden_size=(97,)), SearchSpace(mamba_num_heads=(6,)), SearchSpace(num_blocks=(8,))):
        with pytest.raises(HalflapError, match="sizes"):
            fitting(TINY, Budget(params=1e5), space)
    with pytest.raises(HalflapError, match="below 1"):
        SearchSpace(max_width_cut=1.0)


@pytest.mark.parametrize("share", [0.6, 0.7, 0.8, 0.9])
def test_small_widths_are_cut_in_fine_steps_where_coarse_ones_miss_the_budget(share: float) -> None:
    small = (AttentionConfig(4, 2, 8), MLPConfig(48)) * 4
    teacher = dataclasses.replace(TINY, vocab_size=300, hidden_size=32, blocks=small)
    limit = share * count_parameters(teacher)
    found = fitting(teacher, Budget(params=limit))
    assert found.remark is None and 0.95 * limit <= found.candidates[0].costs["params"] <= limit


def test_a_teacher_within_the_budget_is_left_whole_and_it_says_so() -> None:
    found = fitting(TINY, Budget(memory=2.0**40))
    assert [candidate.sizes for candidate in found.candidates] == [Sizes()]
    assert found.remark is not None and "the teacher itself" in found.remark and "bytes of memory" in found.remark


def test_axes_that_no_automatic_choice_cuts_are_named() -> None:
    with pytest.raises(HalflapError, match=r"--space\.ssm-state-size"):
        fitting(TINY, Budget(memory=1.0, context=10**6))


SHALLOW = dataclasses.replace(
    TINY, family="llama", hidden_size=48, blocks=(AttentionConfig(6, 2, 20, RopeConfig()), MLPConfig(88)) * 2
)


@pytest.mark.parametrize("least", STEPS)
@pytest.mark.parametrize("cut", [0.4, 0.75])
def test_hidden_sizes_of_a_llama_are_multiples_of_its_heads(least: int, cut: float) -> None:
    for name in ("llama-tiny", "smollm2-135m"):
        sizes = choices(preset(name), SearchSpace(max_width_cut=cut), False, least)["hidden_size"]
        heads = preset(name).blocks[0].num_attention_heads  # type: ignore[union-attr]
        assert len(sizes) > 2 and all(size % heads == 0 for size in sizes)
    assert 40 in choices(dataclasses.replace(SHALLOW, hidden_size=40), SearchSpace(), False)["hidden_size"]


@pytest.mark.parametrize(("cost", "share"), [("params", 0.5), ("params", 0.35), ("memory", 0.5), ("flops", 0.5)])
def test_budgets_out_of_reach_of_the_usual_cuts_widen_them_and_it_is_said(cost: str, share: float) -> None:
    limit = share * costs(SHALLOW, Budget(context=2048))[cost]
    budget = Budget(**{cost: limit}, context=2048)
    found = fitting(SHALLOW, budget)
    assert all(c.costs[cost] <= limit for c in found.candidates) and "larger cuts" in (found.remark or "")
    assert found.candidates[0].costs[cost] >= 0.95 * limit or "within 5 %" in (found.remark or "")
    with pytest.raises(HalflapError, match="cannot be met"):
        fitting(SHALLOW, budget, SearchSpace(max_width_cut=0.1))
    heads = {c.sizes.num_key_value_heads for c in found.candidates} | {
        c.sizes.num_attention_heads for c in found.candidates
    }
    assert (cost == "params") == (heads == {None}), "attention heads go only where nothing else helps"


def test_the_memory_of_the_47b_is_that_of_its_paper() -> None:
    """31.7 GiB at 4-bit weights and 8-bit keys and values for a million tokens, states at 16 bits."""
    budget = Budget(memory=31.7 * 2**30, context=10**6, weight_bits=4, cache_bits=8)
    assert costs(preset("nemotron-h-47b"), budget)["memory"] == pytest.approx(31.69 * 2**30, rel=1e-3)


def test_thousands_of_candidates_take_seconds() -> None:
    start = time.process_time()
    found = fitting(preset("nemotron-h-8b"), Budget(params=4.5e9), drop_order=tuple(range(52)))
    assert found.tried > 10_000 and time.process_time() - start < 10
