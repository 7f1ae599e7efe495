"""The convolution kernel against the plain form in float64: values and gradients, packing, states, strided inputs.

Tolerances are relative errors in the 2-norm; bfloat16 is rounded once on the way out, at 2^-8 = 4e-3. Where the
terms of a sum cancel, a few times the error of the plain form in the same dtype is allowed on top.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from halflap.ops import conv
from halflap.ops.native import build, convolution
from halflap.ops.ssd import segment_runs

pytestmark = pytest.mark.skipif(build.load().library is None, reason=f"no kernels: {build.load().reason}")
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 5e-3}


def error(expected: Tensor, found: Tensor) -> float:
    return float((expected - found.double()).detach().norm() / expected.detach().norm().clamp_min(1e-30))


def run(function, inputs: list[Tensor], dtype: torch.dtype, start: int, **extra) -> list[Tensor]:
    """The output and the gradients for channels from `start` on: a slice of wider rows."""
    x, weight, bias = inputs
    wide = torch.promote_types(dtype, torch.float32)
    leaves = [x.to(dtype).requires_grad_(), weight.to(wide).requires_grad_(), bias.to(wide).requires_grad_()]
    y = function(leaves[0][..., start:], *leaves[1:], **extra)
    g = torch.Generator().manual_seed(0)
    probe = torch.randn(y.shape, generator=g, dtype=torch.float64).bfloat16().to(y.dtype)
    return [y, *torch.autograd.grad(y, leaves, probe)]


@settings(max_examples=20)
@given(
    seed=st.integers(0, 10**6),
    batch=st.integers(1, 2),
    time=st.sampled_from([1, 2, 15, 16, 17, 70, 140]),
    channels=st.sampled_from([1, 16, 40, 300]),
    width=st.integers(2, 4),
    start=st.sampled_from([0, 3]),
    packed=st.booleans(),
    started=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_convolution(seed, batch, time, channels, width, start, packed, started, dtype) -> None:
    g = torch.Generator().manual_seed(seed)
    shapes = ((batch, time, start + channels), (channels, width), (channels,), (batch, width - 1, channels))
    *inputs, state = (torch.randn(s, generator=g, dtype=torch.float64).bfloat16().double() for s in shapes)
    runs = segment_runs((torch.rand(batch, time, generator=g) < 0.1).long().cumsum(1)) if packed else None
    extra = {"initial_state": state if started else None, "runs": runs}
    expected = run(conv.conv_silu, inputs, torch.float64, start, **extra)
    extra["initial_state"] = state.to(dtype) if started else None
    plain = run(conv.conv_silu, inputs, dtype, start, **extra)
    for wanted, found, same in zip(expected, run(convolution.conv_silu, inputs, dtype, start, **extra), plain):
        assert error(wanted, found) < TOLERANCE[dtype] + 8 * error(wanted, same)


def test_what_does_not_fit_is_refused() -> None:
    x, weight, bias = torch.ones(1, 5, 8), torch.ones(8, 3), torch.ones(8)
    assert torch.equal(convolution.conv_silu(x, weight, None), convolution.conv_silu(x, weight, 0 * bias))
    for wrong in ((x.double(), weight, bias), (x, weight[1:], bias), (x, weight, bias[1:]), (x, weight[:, :1], bias)):
        assert convolution.conv_silu(*wrong) is NotImplemented
    state = torch.zeros(1, 2, 8, requires_grad=True)
    assert convolution.conv_silu(x, weight, bias, initial_state=state) is NotImplemented
    assert convolution.conv_silu(x, weight, bias, initial_state=torch.zeros(1, 3, 8)) is NotImplemented
    assert convolution.conv_silu(x, weight, bias, runs=torch.zeros(1, 4).long()) is NotImplemented
