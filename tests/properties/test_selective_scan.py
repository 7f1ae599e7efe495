"""The selective scan equals the recurrence in float64: outputs, states and all gradients, for any chunk size.

The recurrence keeps to the published equation, one token at a time; its gradients are autograd's.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from halflap.ops.selective_scan import selective_recurrence, selective_scan, selective_step
from halflap.ops.ssd import segment_runs

# float64 throughout: the two differ only by the order of sums, a few units in the last place of values of order 10
TOLERANCE = 1e-11


def scan_inputs(seed: int, batch: int, time: int, channels: int, states: int) -> dict[str, Any]:
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    return {
        "u": normal(batch, time, channels),
        "dt": torch.nn.functional.softplus(normal(batch, time, channels) - 1),
        "A": -torch.exp(normal(channels, states)),
        "B": normal(batch, time, states),
        "C": normal(batch, time, states),
        "D": normal(channels),
    }


def optional_inputs(seed: int, batch: int, time: int, channels: int, states: int, names: list[str]) -> dict:
    g = torch.Generator().manual_seed(seed + 1)
    made = {
        "state": torch.randn(batch, channels, states, generator=g, dtype=torch.float64),
        "dt_bias": torch.randn(channels, generator=g, dtype=torch.float64),
        "gate": torch.randn(batch, time, channels, generator=g, dtype=torch.float64),
        "runs": segment_runs((torch.rand(batch, time, generator=g) < 0.2).long().cumsum(1) + 1),
        "lengths": torch.randint(0, time + 1, (batch,), generator=g),
    }
    return {name: made[name] for name in names}


def outcome(function, inputs: dict[str, Any], **extra) -> dict[str, Tensor]:
    """y, the final state and the gradients of everything that has one; y of tokens past `lengths` means nothing."""
    leaves = {k: v.clone().requires_grad_() for k, v in inputs.items() if v.is_floating_point()}
    y, final = function(**{**inputs, **leaves}, **extra)
    g = torch.Generator().manual_seed(0)
    probes = [torch.randn(t.shape, generator=g, dtype=torch.float64) for t in (y, final)]
    if "lengths" in inputs:
        y = y * (torch.arange(y.shape[1]) < inputs["lengths"][:, None])[..., None]
    loss = (y * probes[0]).sum() + (final * probes[1]).sum()
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    return {"y": y.detach(), "final": final.detach(), **{f"d {name}": g for name, g in zip(leaves, gradients)}}


OPTIONAL = ("state", "dt_bias", "gate", "runs", "lengths")


@settings(max_examples=30)
@given(
    seed=st.integers(0, 10**6),
    batch=st.integers(1, 3),
    time=st.integers(1, 40),
    channels=st.integers(1, 5),
    states=st.integers(1, 5),
    chunk=st.sampled_from([1, 3, 8, 16, 128]),
    names=st.lists(st.sampled_from(OPTIONAL), unique=True),
)
def test_chunked_equals_recurrence(seed, batch, time, channels, states, chunk, names) -> None:
    sizes = (seed, batch, time, channels, states)
    inputs = {**scan_inputs(*sizes), **optional_inputs(*sizes, names)}
    slow = outcome(selective_recurrence, inputs)
    fast = outcome(selective_scan, inputs, chunk_size=chunk)
    for name, value in slow.items():
        assert (value - fast[name]).abs().max() < TOLERANCE * (1 + value.abs().max()), name


def test_gradients_against_finite_differences() -> None:
    sizes = (3, 2, 7, 3, 2)
    inputs = {**scan_inputs(*sizes), **optional_inputs(*sizes, ["state", "runs"])}
    names = [name for name, value in inputs.items() if value.is_floating_point()]
    leaves = [inputs[name].requires_grad_() for name in names]

    def function(*values: Tensor) -> tuple[Tensor, Tensor]:
        return selective_scan(**dict(zip(names, values)), runs=inputs["runs"], chunk_size=3)

    assert torch.autograd.gradcheck(function, leaves)


def test_without_a_skip_and_without_tokens() -> None:
    inputs = scan_inputs(1, 2, 9, 3, 2)
    no_skip = {**inputs, "D": None}
    zero_skip = {**inputs, "D": torch.zeros(3, dtype=torch.float64)}
    assert torch.equal(selective_scan(**no_skip)[0], selective_scan(**zero_skip)[0])
    state = torch.randn(2, 3, 2, dtype=torch.float64)
    empty = {k: v[:, :0] if k in ("u", "dt", "B", "C") else v for k, v in inputs.items()}
    y, final = selective_scan(**empty, state=state)
    assert y.shape == (2, 0, 3) and torch.equal(final, state)


@pytest.mark.parametrize("cut", [1, 7, 33])
def test_a_scan_in_two_pieces_equals_one(cut: int) -> None:
    inputs = scan_inputs(3, 2, 50, 4, 6)
    whole, final = selective_scan(**inputs, chunk_size=16)
    per_token = ("u", "dt", "B", "C")
    first = {k: v[:, :cut] if k in per_token else v for k, v in inputs.items()}
    rest = {k: v[:, cut:] if k in per_token else v for k, v in inputs.items()}
    y1, state = selective_scan(**first, chunk_size=16)
    y2, end = selective_scan(**rest, chunk_size=16, state=state)
    assert (torch.cat([y1, y2], 1) - whole).abs().max() < TOLERANCE
    assert (end - final).abs().max() < TOLERANCE


def test_steps_equal_the_scan() -> None:
    inputs = scan_inputs(5, 2, 20, 4, 6)
    extra = optional_inputs(5, 2, 20, 4, 6, ["dt_bias", "gate"])
    whole, final = selective_scan(**inputs, **extra, chunk_size=8)
    state = torch.zeros_like(final)
    for t in range(20):
        u, dt, B, C = (inputs[k][:, t] for k in ("u", "dt", "B", "C"))
        y, state = selective_step(
            u, dt, inputs["A"], B, C, inputs["D"], state, dt_bias=extra["dt_bias"], gate=extra["gate"][:, t]
        )
        assert (y - whole[:, t]).abs().max() < TOLERANCE
    assert (state - final).abs().max() < TOLERANCE


def test_packed_documents_equal_separate_ones() -> None:
    inputs = scan_inputs(7, 1, 40, 4, 6)
    packed, final = selective_scan(
        **inputs, chunk_size=16, runs=segment_runs(torch.tensor([[1] * 11 + [2] + [3] * 28]))
    )
    start = 0
    for length in (11, 1, 28):
        piece = {k: v[:, start : start + length] if k in ("u", "dt", "B", "C") else v for k, v in inputs.items()}
        alone, state = selective_scan(**piece, chunk_size=16)
        assert (packed[:, start : start + length] - alone).abs().max() < TOLERANCE
        start += length
    assert (state - final).abs().max() < TOLERANCE


def test_right_padding_leaves_each_rows_own_state() -> None:
    inputs = scan_inputs(9, 3, 12, 4, 6)
    lengths = torch.tensor([12, 5, 0])
    y, final = selective_scan(**inputs, lengths=lengths, chunk_size=4)
    for row, length in enumerate(lengths.tolist()):
        alone = {k: v[row : row + 1, :length] if k in ("u", "dt", "B", "C") else v for k, v in inputs.items()}
        expected, state = selective_scan(**alone)
        assert (y[row : row + 1, :length] - expected).abs().sum() < TOLERANCE
        assert (final[row : row + 1] - state).abs().max() < TOLERANCE


@pytest.mark.parametrize("factor", [0.0, 1e-30, 1e3, 1e30])
def test_extreme_time_steps_stay_finite_in_float32(factor: float) -> None:
    """No decay at all, decay to nothing within a token: values and gradients stay finite and equal to float64's."""
    inputs = scan_inputs(11, 1, 64, 4, 6)
    inputs["u"] = inputs["u"] / max(factor, 1)  # dt u is what enters the state
    inputs["dt"] = inputs["dt"] * factor
    exact = outcome(selective_recurrence, inputs)
    single = outcome(selective_scan, {k: v.float() for k, v in inputs.items()}, chunk_size=16)
    for name in ("y", "final"):
        assert (exact[name] - single[name]).abs().max() < 1e-5 * (1 + exact[name].abs().max())
    assert all(value.isfinite().all() for value in single.values())


def test_extreme_decay_rates_stay_finite_in_float32() -> None:
    inputs = {k: v.float() for k, v in scan_inputs(12, 1, 64, 4, 6).items()}
    inputs["A"] = -torch.logspace(-30, 30, 24).view(4, 6)
    found = outcome(selective_scan, inputs, chunk_size=16)
    assert all(value.isfinite().all() for value in found.values())
    exact, _ = selective_recurrence(**{k: v.double() for k, v in inputs.items()})
    assert (exact - found["y"]).abs().max() < 1e-5 * exact.abs().max()


def test_narrow_inputs_keep_wide_states() -> None:
    inputs = {k: v.bfloat16() if k in ("u", "B", "C") else v.float() for k, v in scan_inputs(13, 2, 30, 4, 6).items()}
    y, final = selective_scan(**inputs, chunk_size=8)
    assert y.dtype == torch.bfloat16 and final.dtype == torch.float32
    exact, state = selective_recurrence(**{k: v.double() for k, v in inputs.items()})
    assert (exact - y).abs().max() < 1e-2 * exact.abs().max()
    assert (state - final).abs().max() < 1e-5 * state.abs().max()
