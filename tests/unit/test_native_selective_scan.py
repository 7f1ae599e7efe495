"""The selective scan's kernels against the recurrence in float64: values and every gradient, odd sizes, packing,
padding, states, strides, threads.

Tolerances are relative errors in the 2-norm. float32: sums of some hundred terms, each rounded at 6e-8. With bfloat16
operands the arithmetic is the same and what is returned in bfloat16 is rounded once, at 2^-8 = 4e-3. Where
the terms of a sum cancel, a few times the error of the plain form in the same dtype is allowed on top.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from halflap.ops import select
from halflap.ops import selective_scan as plain
from halflap.ops.native import build
from halflap.ops.native import selective_scan as native
from halflap.ops.ssd import segment_runs

pytestmark = pytest.mark.skipif(build.load().library is None, reason=f"no kernels: {build.load().reason}")
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 5e-3}
OPTIONAL = ("D", "state", "dt_bias", "gate", "runs", "lengths")
ROWS = ("u", "dt", "B", "C", "gate")  # may be bfloat16


def error(expected: Tensor, found: Tensor) -> float:
    return float((expected - found.double()).detach().norm() / expected.detach().norm().clamp_min(1e-30))


def scan_inputs(seed: int, batch: int, time: int, channels: int, states: int, names: tuple[str, ...]) -> dict[str, Any]:
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64).bfloat16().double()

    raw = (normal(batch, time, channels) - 2).bfloat16().double()
    made = {
        "u": normal(batch, time, channels),
        "dt": raw if "dt_bias" in names else torch.nn.functional.softplus(raw).bfloat16().double(),
        "A": -torch.exp(normal(channels, states)),
        "B": normal(batch, time, states),
        "C": normal(batch, time, states),
        "D": normal(channels),
        "state": normal(batch, channels, states),
        "dt_bias": normal(channels),
        "gate": normal(batch, time, channels),
        "runs": segment_runs((torch.rand(batch, time, generator=g) < 0.1).long().cumsum(1)),
        "lengths": torch.randint(0, time + 1, (batch,), generator=g),
    }
    return {k: v for k, v in made.items() if k not in OPTIONAL or k in names}


def outcome(function, inputs: dict[str, Any], dtype: torch.dtype) -> dict[str, Tensor]:
    """y, the final state and all gradients; y of tokens past `lengths` means nothing."""
    wide = torch.promote_types(dtype, torch.float32)
    leaves = {
        k: v.to(dtype if k in ROWS else wide).requires_grad_() for k, v in inputs.items() if v.is_floating_point()
    }
    y, final = function(**{**inputs, **leaves})
    g = torch.Generator().manual_seed(0)
    probes = [torch.randn(t.shape, generator=g, dtype=torch.float64).bfloat16().to(wide) for t in (y, final)]
    if "lengths" in inputs:
        y = y * (torch.arange(y.shape[1]) < inputs["lengths"][:, None])[..., None]
    loss = (y * probes[0]).sum() + (final * probes[1]).sum()
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    return {"y": y, "final": final, **{f"d {name}": g for name, g in zip(leaves, gradients)}}


def check(inputs: dict[str, Any], dtype: torch.dtype) -> None:
    expected = outcome(plain.selective_recurrence, inputs, torch.float64)
    found = outcome(native.selective_scan, inputs, dtype)
    same = outcome(plain.selective_scan, inputs, dtype)
    for name, value in expected.items():
        limit = TOLERANCE[torch.float32 if name == "final" else dtype] + 8 * error(value, same[name])
        assert error(value, found[name]) < limit, f"{name}: {error(value, found[name]):.1e}"


@settings(max_examples=30)
@given(
    seed=st.integers(0, 10**6),
    batch=st.integers(1, 2),
    time=st.sampled_from([1, 2, 31, 32, 33, 70]),
    channels=st.sampled_from([1, 5, 16, 40, 70]),
    states=st.sampled_from([1, 4, 8, 16, 20]),
    names=st.lists(st.sampled_from(OPTIONAL), unique=True),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
@example(seed=1, batch=2, time=70, channels=130, states=16, names=[*OPTIONAL], dtype=torch.bfloat16)
def test_scan(seed, batch, time, channels, states, names, dtype) -> None:
    check(scan_inputs(seed, batch, time, channels, states, names), dtype)


def test_operands_may_be_slices_of_wider_rows() -> None:
    """As they come out of a fused projection; and the gradient of the sum of a broadcast output."""
    inputs = scan_inputs(2, 2, 40, 20, 8, ("D", "gate"))
    wide = {k: torch.cat([torch.zeros(2, 40, 3).double(), v], -1).float() for k, v in inputs.items() if k in ROWS}
    rest = {k: v.float() for k, v in inputs.items() if k not in ROWS}
    expected, _ = plain.selective_recurrence(**inputs)
    leaves = [v.requires_grad_() for v in wide.values()]
    y, _ = native.selective_scan(**rest, **{k: v[..., 3:] for k, v in wide.items()})
    assert error(expected, y) < TOLERANCE[torch.float32]
    gradients = torch.autograd.grad(y.sum(), leaves)
    assert all(g.shape == leaf.shape and g.isfinite().all() for g, leaf in zip(gradients, leaves))


def test_scan_repeats_bit_for_bit_and_whatever_the_threads() -> None:
    inputs = scan_inputs(5, 2, 100, 150, 16, ("D", "state", "dt_bias", "gate"))
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 3):
            torch.set_num_threads(threads)
            results.append(outcome(native.selective_scan, inputs, torch.float32))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0].values(), other.values()))


def test_documents_are_kept_apart_exactly() -> None:
    inputs = scan_inputs(6, 1, 90, 20, 8, ("D", "runs"))
    inputs = {k: v.float() if v.is_floating_point() else v for k, v in inputs.items()}
    inputs["runs"] = segment_runs(torch.tensor([[1] * 33 + [2] * 20 + [3] * 37]))
    y, final = native.selective_scan(**inputs)
    del inputs["runs"]
    for start, stop in ((0, 33), (33, 53), (53, 90)):
        alone, state = native.selective_scan(**{k: v[:, start:stop] if k in ROWS else v for k, v in inputs.items()})
        assert torch.equal(y[:, start:stop], alone)
    assert torch.equal(final, state)


@pytest.mark.parametrize("factor", [0.0, 1e-30, 1e3, 1e30])
def test_extreme_time_steps_and_rates_stay_finite(factor: float) -> None:
    inputs = scan_inputs(7, 1, 70, 20, 24, ("D",))
    inputs["u"] = inputs["u"] / max(factor, 1)  # dt u is what enters the state
    inputs["dt"] = inputs["dt"] * factor
    inputs["A"] = -torch.logspace(-30, 30, 480, dtype=torch.float64).view(20, 24) / max(factor, 1)
    exact, _ = plain.selective_recurrence(**{k: v.float().double() for k, v in inputs.items()})
    found = outcome(native.selective_scan, inputs, torch.float32)
    assert all(value.isfinite().all() for value in found.values())
    assert error(exact, found["y"]) < 1e-5


def test_nan_is_not_lost() -> None:
    inputs = {k: v.float() for k, v in scan_inputs(8, 1, 40, 20, 8, ("D",)).items()}
    inputs["dt"][0, 10, 3] = torch.nan
    y, _ = native.selective_scan(**inputs)
    assert y[0, 10:, 3].isnan().all() and y[..., :3].isfinite().all() and y[0, :10].isfinite().all()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("channels", "states"), [(40, 16), (16, 4), (33, 20), (3, 1)])
@pytest.mark.parametrize("names", [("D",), ("D", "dt_bias", "gate"), ()])
def test_steps_advance_the_state_in_place(channels: int, states: int, dtype: torch.dtype, names: tuple) -> None:
    inputs = scan_inputs(9, 3, 4, channels, states, (*names, "state"))
    state = inputs.pop("state")
    fast = state.float()
    kinds = {k: dtype if k in ROWS else torch.float32 for k in inputs}
    with torch.inference_mode():
        for t in range(4):
            now: dict[str, Any] = {"D": None, **{k: v[:, t] if k in ROWS else v for k, v in inputs.items()}}
            typed: dict[str, Any] = {k: None if v is None else v.to(kinds[k]) for k, v in now.items()}
            expected, state = plain.selective_step(**now, state=state)
            found, same = native.selective_step(**typed, state=fast)
            assert same is fast and found.dtype == dtype
            assert error(expected, found) < TOLERANCE[dtype]
            assert error(state, fast) < 1e-6
    assert native.selective_step(**typed, state=fast) is NotImplemented  # gradients may be wanted


def test_what_does_not_fit_is_refused_and_counted() -> None:
    inputs = {k: v.float() for k, v in scan_inputs(0, 1, 4, 8, 4, ("D", "state", "dt_bias", "gate")).items()}
    assert native.selective_scan(**inputs) is not NotImplemented
    assert native.selective_scan(**{**inputs, "u": inputs["u"].double()}) is NotImplemented
    for name in inputs:
        assert native.selective_scan(**{**inputs, name: inputs[name][..., 1:]}) is NotImplemented
        step = {k: v[:, 0] if k in ROWS else v for k, v in inputs.items()}
        with torch.no_grad():
            assert native.selective_step(**{**step, name: step[name][..., 1:]}) is NotImplemented
    assert native.selective_scan(**inputs, lengths=torch.zeros(2).long()) is NotImplemented
    with select.using("auto"):
        before = select.selective_scan.refused
        y, _ = select.selective_scan(**{k: v.double() for k, v in inputs.items()})
        assert y.dtype == torch.float64 and select.selective_scan.refused == before + 1
