"""The chunked scan equals the recurrence: outputs, states and gradients, for any chunk size, start and packing."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from halflap.ops.conv import causal_conv, conv_step, final_conv_state
from halflap.ops.ssd import segment_runs, ssd_chunked, ssd_recurrence, ssd_step

# float64 throughout: the two differ only by the order of sums, a few units in the last place of values of order 10
TOLERANCE = 1e-11


def random_inputs(seed: int, batch: int, time: int, groups: int, per_group: int, channels: int, state: int) -> dict:
    g = torch.Generator().manual_seed(seed)
    heads = groups * per_group

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    return {
        "x": normal(batch, time, heads, channels),
        "dt": torch.nn.functional.softplus(normal(batch, time, heads) - 1),
        "A": -torch.exp(normal(heads)),
        "B": normal(batch, time, groups, state),
        "C": normal(batch, time, groups, state),
        "D": normal(heads),
    }


def random_segments(seed: int, batch: int, time: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return (torch.rand(batch, time, generator=g) < 0.2).long().cumsum(1) + 1


@settings(max_examples=25)
@given(
    seed=st.integers(0, 10**6),
    time=st.integers(1, 70),
    chunk=st.sampled_from([1, 4, 16, 64, 128]),
    groups=st.sampled_from([1, 2]),
    packed=st.booleans(),
    started=st.booleans(),
)
def test_chunked_equals_recurrence(seed: int, time: int, chunk: int, groups: int, packed: bool, started: bool) -> None:
    inputs = random_inputs(seed, 2, time, groups, 3, 4, 5)
    runs = segment_runs(random_segments(seed, 2, time)) if packed else None
    state = torch.randn(2, 3 * groups, 4, 5, dtype=torch.float64) if started else None
    leaves = [value.requires_grad_() for value in inputs.values()] + ([state.requires_grad_()] if started else [])
    slow, slow_state = ssd_recurrence(**inputs, initial_state=state, runs=runs)
    fast, fast_state = ssd_chunked(**inputs, initial_state=state, runs=runs, chunk_size=chunk)
    assert (slow - fast).abs().max() < TOLERANCE
    assert (slow_state - fast_state).abs().max() < TOLERANCE
    probe = torch.randn_like(slow)
    loss = [(y * probe).sum() + s.square().sum() for y, s in ((slow, slow_state), (fast, fast_state))]
    for a, b in zip(torch.autograd.grad(loss[0], leaves), torch.autograd.grad(loss[1], leaves), strict=True):
        assert (a - b).abs().max() <= 1e-9 * (1 + a.abs().max())


@pytest.mark.parametrize("cut", [1, 7, 33])
def test_a_scan_in_two_pieces_equals_one(cut: int) -> None:
    inputs = random_inputs(3, 2, 50, 2, 2, 4, 6)
    whole, final = ssd_chunked(**inputs, chunk_size=16)
    per_token = ("x", "dt", "B", "C")
    first = {k: v[:, :cut] if k in per_token else v for k, v in inputs.items()}
    rest = {k: v[:, cut:] if k in per_token else v for k, v in inputs.items()}
    y1, state = ssd_chunked(**first, chunk_size=16)
    y2, end = ssd_chunked(**rest, chunk_size=16, initial_state=state)
    assert (torch.cat([y1, y2], 1) - whole).abs().max() < TOLERANCE
    assert (end - final).abs().max() < TOLERANCE


def test_steps_equal_the_scan() -> None:
    inputs = random_inputs(5, 2, 20, 2, 2, 4, 6)
    whole, final = ssd_chunked(**inputs, chunk_size=8)
    state = torch.zeros_like(final)
    for t in range(20):
        y, state = ssd_step(
            inputs["x"][:, t], inputs["dt"][:, t], inputs["A"], inputs["B"][:, t], inputs["C"][:, t], inputs["D"], state
        )
        assert (y - whole[:, t]).abs().max() < TOLERANCE
    assert (state - final).abs().max() < TOLERANCE


def test_packed_documents_equal_separate_ones() -> None:
    inputs = random_inputs(7, 1, 40, 2, 2, 4, 6)
    segments = torch.tensor([[1] * 11 + [2] * 1 + [3] * 28])
    packed, final = ssd_chunked(**inputs, chunk_size=16, runs=segment_runs(segments))
    start = 0
    for length in (11, 1, 28):
        piece = {k: v[:, start : start + length] if k in ("x", "dt", "B", "C") else v for k, v in inputs.items()}
        alone, state = ssd_chunked(**piece, chunk_size=16)
        assert (packed[:, start : start + length] - alone).abs().max() < TOLERANCE
        start += length
    assert (state - final).abs().max() < TOLERANCE


def test_strong_decay_stays_exact_in_float32() -> None:
    """Differences of cumulative sums would lose the small decays behind large ones."""
    inputs = random_inputs(11, 1, 128, 1, 2, 4, 6)
    inputs["dt"] = inputs["dt"] * 20
    exact, _ = ssd_recurrence(**inputs)
    single, _ = ssd_chunked(**{k: v.float() for k, v in inputs.items()})
    assert (exact - single).abs().max() < 1e-5 * exact.abs().max()


def reference_conv(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    y = torch.zeros_like(x)
    width = weight.shape[1]
    for t in range(x.shape[1]):
        for j in range(width):
            if t - width + 1 + j >= 0:
                y[:, t] += weight[:, j] * x[:, t - width + 1 + j]
    return y + bias


@settings(max_examples=20)
@given(seed=st.integers(0, 10**6), time=st.integers(1, 12), width=st.integers(2, 5))
def test_convolution_and_its_states(seed: int, time: int, width: int) -> None:
    g = torch.Generator().manual_seed(seed)
    x, weight, bias = (torch.randn(*s, generator=g, dtype=torch.float64) for s in ((2, time, 3), (3, width), (3,)))
    expected = reference_conv(x, weight, bias)
    assert (causal_conv(x, weight, bias) - expected).abs().max() < 1e-12
    cut = time // 2
    state = final_conv_state(x[:, :cut], width, None, None)
    rest = causal_conv(x[:, cut:], weight, bias, initial_state=state)
    assert (rest - expected[:, cut:]).abs().max() < 1e-12
    for t in range(cut, time):
        y, state = conv_step(x[:, t], weight, bias, state)
        assert (y - expected[:, t]).abs().max() < 1e-12
    assert torch.equal(state, final_conv_state(x, width, None, None))


def test_convolution_never_reaches_into_another_document() -> None:
    g = torch.Generator().manual_seed(1)
    x, weight, bias = (torch.randn(*s, generator=g, dtype=torch.float64) for s in ((1, 9, 3), (3, 4), (3,)))
    segments = torch.tensor([[1, 1, 2, 3, 3, 3, 3, 3, 3]])
    packed = causal_conv(x, weight, bias, runs=segment_runs(segments))
    pieces = [causal_conv(x[:, a:b], weight, bias) for a, b in ((0, 2), (2, 3), (3, 9))]
    assert (packed - torch.cat(pieces, 1)).abs().max() < 1e-12
