"""Draws follow the distribution, filters keep what sorting says, and the native form draws the very same tokens."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from halflap.ops import sampling
from halflap.ops.native import build
from halflap.ops.native import sampling as native
from halflap.ops.sampling import Draw, gumbel

FORMS = {"plain": sampling.draw, "native": native.draw}
here = [
    pytest.param(name, marks=pytest.mark.skipif(name == "native" and build.load().library is None, reason="no kernels"))
    for name in FORMS
]
needs_kernels = pytest.mark.skipif(build.load().library is None, reason=f"no kernels: {build.load().reason}")


def logits_of(seed: int, rows: int, size: int, spread: float = 3.0) -> Tensor:
    return torch.randn(rows, size, generator=torch.Generator().manual_seed(seed)) * spread


def kept_by_sorting(z: Tensor, row: Draw) -> Tensor:
    """(V,) bool, from the definition: every token in descending order, one after the other."""
    z = z.double()
    kept = torch.ones(len(z), dtype=torch.bool)
    if row.top_k:
        kept &= z >= z.sort(descending=True).values[min(row.top_k, len(z)) - 1]
    if row.top_p < 1:
        weights = (z - z.max()).exp() * kept
        larger = torch.stack([weights[z > each].sum() for each in z])
        kept &= (larger < row.top_p * weights.sum()) | (z == z.max())
    return kept & (z >= z.max() + math.log(row.min_p)) if row.min_p else kept


def chi_square(counts: Tensor, expected: Tensor) -> float:
    return float(((counts - expected) ** 2 / expected).sum())


@pytest.mark.parametrize("form", here)
@pytest.mark.parametrize(
    "row",
    [Draw(1.0, 0, 1.0, 0.0, 0), Draw(0.7, 12, 0.9, 0.02, 0), Draw(1.6, 0, 0.8, 0.0, 0)],
    ids=["all", "cut", "hot"],
)
def test_draws_follow_the_distribution(form: str, row: Draw) -> None:
    """The statistic exceeds its mean by 5 standard deviations once in a million keys; these keys are fixed."""
    logits, draws = logits_of(3, 1, 40, 1.5), 20_000
    rows = [row._replace(key=key * 0x9E3779B97F4A7C15 % 2**64) for key in range(draws)]
    counts = FORMS[form](logits.expand(draws, -1), rows).bincount(minlength=40).double()
    z = logits[0] / row.temperature
    kept = kept_by_sorting(z, row)
    assert counts[~kept].sum() == 0
    expected = draws * z.double().masked_fill(~kept, -torch.inf).softmax(-1)[kept]
    freedom = int(kept.sum()) - 1
    assert chi_square(counts[kept], expected) < freedom + 5 * math.sqrt(2 * freedom)


def test_noise_is_gumbels_and_of_key_and_number_alone() -> None:
    noise = gumbel([5, 2**64 - 1, 6], 30_000)
    assert torch.equal(noise[1], gumbel([2**64 - 1], 40_000)[0, :30_000])
    uniform = (-(-noise).exp()).exp()
    counts = torch.stack([(row * 100).long().bincount(minlength=100) for row in uniform]).double()
    for row in counts:
        assert chi_square(row, torch.full((100,), 300.0)) < 99 + 5 * math.sqrt(198)
    pairs = ((uniform[0] * 10).long() * 10 + (uniform[2] * 10).long()).bincount(minlength=100).double()
    assert chi_square(pairs, torch.full((100,), 300.0)) < 99 + 5 * math.sqrt(198)
    beside = ((uniform[0, 1:] * 10).long() * 10 + (uniform[0, :-1] * 10).long()).bincount(minlength=100).double()
    assert chi_square(beside, torch.full((100,), 299.99)) < 99 + 5 * math.sqrt(198)


@pytest.mark.parametrize("form", here)
def test_a_row_is_drawn_as_it_is_alone(form: str) -> None:
    logits = logits_of(1, 5, 777)
    rows = [
        Draw(t, k, p, m, 99 + k)
        for t, k, p, m in ((1, 0, 1, 0), (0, 0, 1, 0), (2, 9, 1, 0), (1, 0, 0.9, 0), (1, 0, 1, 0.1))
    ]
    together = FORMS[form](logits, rows).tolist()
    assert together == [int(FORMS[form](logits[i : i + 1], [row])) for i, row in enumerate(rows)]
    assert together[1] == int(logits[1].argmax())
    assert FORMS[form](logits.flip(0), rows[::-1]).tolist() == together[::-1]


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    size=st.integers(1, 300),
    top_k=st.integers(0, 40),
    top_p=st.sampled_from([0.0, 1e-9, 0.3, 0.9, 0.999, 1.0]),
    min_p=st.sampled_from([0.0, 0.05, 0.9]),
    spread=st.sampled_from([0.01, 1.0, 8.0]),
    ties=st.booleans(),
)
def test_filters_keep_what_sorting_keeps(
    seed: int, size: int, top_k: int, top_p: float, min_p: float, spread: float, ties: bool
) -> None:
    z = logits_of(seed, 1, size, spread)
    z = z.round() if ties else z
    row = Draw(1.0, top_k, top_p, min_p, 0)
    expected = kept_by_sorting(z[0], row)
    assert torch.equal(z[0].double() >= sampling.least_kept(z, [row])[0], expected)
    if build.load().library is not None:
        rows = [row._replace(key=key) for key in range(200)]
        drawn = native.draw(z.expand(200, -1), rows)
        assert expected[drawn].all() and torch.equal(drawn, sampling.draw(z.expand(200, -1), rows))


@needs_kernels
@pytest.mark.parametrize("spread", [0.0, 0.02, 3.0, 30.0])
def test_native_draws_are_the_plain_ones_of_large_vocabularies(spread: float) -> None:
    size = 50_257
    logits = logits_of(7, 24, size, spread)
    logits[3, ::2] = -torch.inf
    logits[4, 1:] = -torch.inf
    logits[5] = -torch.inf
    kinds = [
        (1.0, 0, 1.0, 0.0),
        (0.5, 0, 0.9, 0.0),
        (1.0, 40, 0.95, 0.0),
        (1.3, 5000, 1.0, 0.0),
        (1.0, 0, 0.999999, 0.01),
    ]
    rows = [Draw(*kinds[i % len(kinds)], 2**61 * i + i) for i in range(24)]
    assert native.draw(logits, rows).tolist() == sampling.draw(logits, rows).tolist()
    for row, each in enumerate(rows[:5]):
        z = logits[row : row + 1] / each.temperature
        order = z[0].double().sort(descending=True).values
        kept = int((z.double() >= sampling.least_kept(z, [each])).sum())
        weights = (order - order[0]).exp()
        if each.top_p < 1 and not each.top_k and not each.min_p and spread:
            larger = weights.cumsum(0) - weights
            assert larger[kept - 1] < each.top_p * weights.sum() <= larger[kept]


@needs_kernels
def test_rows_that_lie_apart_and_other_types() -> None:
    logits, rows = logits_of(2, 4, 600), [Draw(1.0, 0, 1.0, 0.0, key) for key in range(4)]
    assert torch.equal(native.draw(logits[:, :301], rows), native.draw(logits[:, :301].contiguous(), rows))
    assert native.draw(logits.double(), rows) is NotImplemented and native.draw(logits.T, rows[:1]) is NotImplemented
    assert sampling.draw(logits.double(), rows).tolist() == sampling.draw(logits, rows).tolist()
