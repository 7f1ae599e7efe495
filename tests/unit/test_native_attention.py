"""The attention kernels against scaled_dot_product_attention in float64: values, gradients, packing, cached keys.

Tolerances are relative errors in the 2-norm: float32 sums of some hundred terms; bfloat16 rounds every operand at
2^-9 = 2e-3, and errors of several roundings add.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from halflap.ops.attention import attention as plain_attention
from halflap.ops.attention import cached_mask, packed_mask
from halflap.ops.native import attention as native_attention
from halflap.ops.native import build
from halflap.ops.ssd import segment_runs

pytestmark = pytest.mark.skipif(build.load().library is None, reason=f"no kernels: {build.load().reason}")
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-2}


def error(expected: Tensor, found: Tensor) -> float:
    return float((expected - found.double()).detach().norm() / expected.detach().norm().clamp_min(1e-30))


def run(function, inputs: list[Tensor], dtype: torch.dtype, **extra) -> list[Tensor]:
    """The output and the gradients."""
    leaves = [x.to(dtype).requires_grad_() for x in inputs]
    y = function(*leaves, **extra)
    probe = torch.randn(y.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return [y, *torch.autograd.grad(y, leaves, probe.to(y.dtype))]


def attention_inputs(
    seed: int, batch: int, time: int, keys: int, heads: int, key_heads: int, size: int
) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    shapes = ((batch, heads, time, size), (batch, key_heads, keys, size), (batch, key_heads, keys, size))
    return [torch.randn(s, generator=g, dtype=torch.float64).bfloat16().double() for s in shapes]


@settings(deadline=None, max_examples=25)
@given(
    seed=st.integers(0, 10**6),
    batch=st.integers(1, 2),
    time=st.sampled_from([16, 17, 63, 64, 65, 150]),
    key_heads=st.integers(1, 2),
    per_key=st.integers(1, 3),
    size=st.sampled_from([4, 16, 24, 64]),
    packed=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_attention(seed, batch, time, key_heads, per_key, size, packed, dtype) -> None:
    inputs = attention_inputs(seed, batch, time, time, key_heads * per_key, key_heads, size)
    g = torch.Generator().manual_seed(seed)
    runs = segment_runs((torch.rand(batch, time, generator=g) < 0.05).long().cumsum(1)) if packed else None
    extra: dict = {}
    if runs is not None:
        starts = torch.searchsorted(runs, runs)
        extra = {"mask": lambda: packed_mask(runs), "starts": starts}
    expected = run(plain_attention, inputs, torch.float64, **extra)
    for wanted, found in zip(expected, run(native_attention.attention, inputs, dtype, **extra)):
        assert error(wanted, found) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_attention_over_cached_keys(dtype: torch.dtype) -> None:
    """A slice of a longer cache, heads in the second place in memory and not: strides are followed."""
    query, key, value = (x.to(dtype) for x in attention_inputs(1, 2, 40, 130, 4, 2, 24))
    query = query.transpose(1, 2).contiguous().transpose(1, 2)
    positions = 60 + torch.arange(40).expand(2, 40)
    with torch.no_grad():
        found = native_attention.attention(query, key[:, :, :100], value[:, :, :100], offset=60)
        wide = [x.double() for x in (query, key[:, :, :100], value[:, :, :100])]
        expected = plain_attention(*wide, lambda: cached_mask(positions, 100))
    assert error(expected, found) < TOLERANCE[dtype]
    assert native_attention.attention(query, key, value, offset=None) is NotImplemented
    assert native_attention.attention(query, key[:, :, :99], value[:, :, :99], offset=60) is NotImplemented


def test_shapes_that_do_not_fit_are_refused() -> None:
    query, key, value = (t.float() for t in attention_inputs(0, 1, 20, 20, 2, 2, 8))
    assert native_attention.attention(query, key, value[..., 1:]) is NotImplemented
    assert native_attention.attention(query[..., 1:], key, value) is NotImplemented
    assert native_attention.attention(query, key, value, starts=torch.zeros(1, 19).long()) is NotImplemented
