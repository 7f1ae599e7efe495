"""The attention kernels against the plain form in float64: values, gradients, packing, windows, cached keys.

Tolerances are relative errors in the 2-norm: float32 sums of some hundred terms; bfloat16 rounds every operand at
2^-9 = 2e-3, and errors of several roundings add.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from halflap.ops.attention import attention as plain_attention
from halflap.ops.attention import cached_mask, packed_mask, within_window
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
    seed: int, batch: int, time: int, keys: int, heads: int, key_heads: int, size: int, value_size: int | None = None
) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    shapes = ((batch, heads, time, size), (batch, key_heads, keys, size), (batch, key_heads, keys, value_size or size))
    return [torch.randn(s, generator=g, dtype=torch.float64).bfloat16().double() for s in shapes]


@settings(max_examples=25)
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
        wide = query.double(), key[:, :, :100].double(), value[:, :, :100].double()
        expected = plain_attention(*wide, lambda: cached_mask(positions, 100))
    assert error(expected, found) < TOLERANCE[dtype]
    assert native_attention.attention(query, key, value, offset=None) is NotImplemented
    assert native_attention.attention(query, key[:, :, :99], value[:, :, :99], offset=60) is NotImplemented


def test_shapes_that_do_not_fit_are_refused() -> None:
    query, key, value = (t.float() for t in attention_inputs(0, 1, 20, 20, 2, 2, 8))
    assert native_attention.attention(query, key, value[:, :, 1:]) is NotImplemented
    assert native_attention.attention(query, key, value[..., :0]) is NotImplemented
    assert native_attention.attention(query, key, value, window=-1) is NotImplemented
    assert native_attention.attention(query[..., 1:], key, value) is NotImplemented
    assert native_attention.attention(query, key, value, starts=torch.zeros(1, 19).long()) is NotImplemented


def brute_force(query: Tensor, key: Tensor, value: Tensor, seen: Tensor) -> Tensor:
    """softmax(q k' / sqrt(h)) v where `seen` (B, T, S), from the definition."""
    key, value = (x.repeat_interleave(query.shape[1] // key.shape[1], 1) for x in (key, value))
    scores = (query @ key.transpose(2, 3) * query.shape[3] ** -0.5).masked_fill(~seen[:, None], -torch.inf)
    return torch.softmax(scores, -1) @ value


def visible(starts: Tensor, time: int, keys: int, window: int, meta: int) -> Tensor:
    """A query sees its document's first `meta` tokens, itself and `window` before it."""
    seen = torch.zeros(*starts.shape, keys, dtype=torch.bool)
    for b in range(len(starts)):
        for t in range(time):
            q, begin = keys - time + t, int(starts[b, t])
            seen[b, t, max(begin, q - window) : q + 1] = True
            seen[b, t, begin : min(begin + meta, q + 1)] = True
    return seen


@settings(max_examples=25)
@given(
    seed=st.integers(0, 10**6),
    time=st.sampled_from([16, 64, 65, 150, 200]),
    per_key=st.integers(1, 2),
    sizes=st.sampled_from([(8, 16), (24, 48), (16, 4), (64, 128), (16, 16)]),
    window=st.sampled_from([0, 1, 20, 63, 64, 100, 1000]),
    meta=st.sampled_from([0, 1, 5, 70]),
    packed=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_windows_meta_tokens_and_wide_values(seed, time, per_key, sizes, window, meta, packed, dtype) -> None:
    assume(window or meta)  # who sees itself alone has no gradient of queries and keys to compare
    inputs = attention_inputs(seed, 2, time, time, 2 * per_key, 2, *sizes)
    g = torch.Generator().manual_seed(seed)
    runs = segment_runs((torch.rand(2, time, generator=g) < (0.03 if packed else 0)).long().cumsum(1))
    starts = torch.searchsorted(runs, runs)
    seen = visible(starts, time, time, window, meta)
    places = torch.arange(time)
    assert torch.equal(seen, (within_window(places, places, window, meta, starts) & packed_mask(runs))[:, 0])
    expected = run(brute_force, inputs, torch.float64, seen=seen)
    extra = {"starts": starts if packed else None, "window": window, "meta": meta}
    for wanted, found in zip(expected, run(native_attention.attention, inputs, dtype, **extra)):
        assert error(wanted, found) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("window", "meta"), [(30, 0), (30, 7), (0, 64), (500, 3)])
def test_windows_over_cached_keys(window: int, meta: int, dtype: torch.dtype) -> None:
    """Blocks of keys that nothing sees are not even read: here they hold NaN."""
    query, key, value = (x.to(dtype) for x in attention_inputs(1, 2, 40, 400, 4, 2, 24, 48))
    seen = visible(torch.zeros(2, 40).long(), 40, 400, window, meta)
    unseen = ~seen.any(1).all(0)
    expected = brute_force(query.double(), key.double(), value.double(), seen)
    if window < 360 - 64 - 64:
        key[:, :, 128:256], value[:, :, 128:256] = torch.nan, torch.nan
        assert unseen[128:256].all()
    with torch.no_grad():
        found = native_attention.attention(query, key, value, offset=360, window=window, meta=meta)
    assert error(expected, found) < TOLERANCE[dtype]


def test_a_window_as_long_as_the_row_changes_no_bit() -> None:
    inputs = attention_inputs(3, 2, 150, 150, 4, 2, 24)
    plain_causal = run(native_attention.attention, inputs, torch.float32)
    windowed = run(native_attention.attention, inputs, torch.float32, window=149, meta=2)
    assert all(torch.equal(a, b) for a, b in zip(plain_causal, windowed))
