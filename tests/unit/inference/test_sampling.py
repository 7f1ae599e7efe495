"""Filters keep what they say, and draws follow the distribution."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from halflap.inference.chooser import Chooser, choose_rows
from halflap.inference.requests import SamplingParams
from halflap.inference.sampling import filtered, noise_key, penalise


def logits_of(probabilities: list[float]) -> torch.Tensor:
    return torch.tensor([probabilities]).log()


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({}, [0, 1, 2, 3]),
        ({"top_k": 2}, [0, 2]),
        ({"top_k": 9}, [0, 1, 2, 3]),
        ({"top_p": 0.0}, [0]),
        ({"top_p": 0.45}, [0]),
        ({"top_p": 0.55}, [0, 2]),
        ({"top_p": 1e-9}, [0]),
        ({"min_p": 0.3}, [0, 2]),
        ({"top_k": 3, "top_p": 0.99, "min_p": 0.1}, [0, 1, 2]),
    ],
)
def test_filters(options: dict, kept: list[int]) -> None:
    left = filtered(logits_of([0.5, 0.12, 0.3, 0.08]), SamplingParams(temperature=1, **options))
    assert left[0].isfinite().nonzero().flatten().tolist() == kept


@settings(max_examples=50)
@given(
    seed=st.integers(0, 1000),
    top_k=st.integers(0, 12),
    top_p=st.floats(0.01, 1),
    min_p=st.floats(0, 0.99),
    size=st.integers(1, 10),
)
def test_a_token_always_stays_and_only_kept_ones_are_drawn(
    seed: int, top_k: int, top_p: float, min_p: float, size: int
) -> None:
    logits = torch.randn(3, size, generator=torch.Generator().manual_seed(seed)) * 4
    params = SamplingParams(1.0, top_k, top_p, min_p, seed=seed)
    left = filtered(logits, params)
    assert left.isfinite().any(-1).all()
    drawn = choose_rows(logits, [Chooser(params, row, [], size) for row in range(3)])
    assert left.gather(1, torch.tensor(drawn)[:, None]).isfinite().all()


def test_keys_of_seeds_and_places_differ() -> None:
    keys = {noise_key(seed, place) for seed in (*range(-20, 20), 1 << 63, 1 << 64) for place in range(50)}
    assert len(keys) == 41 * 50 and all(0 <= key < 1 << 64 for key in keys)  # seeds are taken modulo 2^64: 2^64 is 0
    assert noise_key(7, 3) == 0x9AAF21D8296E1E3D  # texts with a seed stay as they are


def test_penalty_divides_positive_and_multiplies_negative() -> None:
    seen = torch.tensor([[True, False, True]])
    assert penalise(torch.tensor([[2.0, 2.0, -2.0]]), seen, 2.0).tolist() == [[1.0, 2.0, -4.0]]
    greedy = SamplingParams(repetition_penalty=3.0)
    assert choose_rows(torch.tensor([[2.0, 1.0, -2.0]]), [Chooser(greedy, 0, [0, 2], 3)]) == [1]


@given(
    prompt=st.lists(st.integers(0, 9), max_size=6),
    said=st.lists(st.integers(0, 9), min_size=1, max_size=8),
    rests=st.sets(st.integers(0, 7)),
    penalties=st.tuples(*3 * [st.sampled_from([0.0, 0.5])]),
)
def test_a_reply_that_rested_chooses_as_one_that_did_not(
    prompt: list[int], said: list[int], rests: set[int], penalties: tuple[float, float, float]
) -> None:
    """Penalties are those of the definition, whenever what they need was let go of and made again."""
    repeated, frequency, presence = penalties
    bias = {2: 1.5, 7: -2.0}
    params = SamplingParams(
        repetition_penalty=1 + repeated, frequency_penalty=frequency, presence_penalty=presence, logit_bias=bias
    )
    chooser = Chooser(params, 0, prompt, 10)
    logits = torch.linspace(-2, 2, 10)
    for place, token in enumerate(said):
        if place in rests:
            chooser.rest()
        expected = logits.clone()
        for one in {*prompt, *said[:place]}:
            expected[one] *= 1 + repeated if logits[one] < 0 else 1 / (1 + repeated)
        for one in said[:place]:
            expected[one] -= frequency
        for one in set(said[:place]):
            expected[one] -= presence
        for one, more in bias.items():
            expected[one] += more
        torch.testing.assert_close(chooser.adjusted(logits), expected)
        chooser.take(token)
