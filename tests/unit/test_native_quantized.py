"""The kernels of packed weights agree with the plain form on any shape."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from halflap.ops import quantized
from halflap.ops.native import build
from halflap.ops.native import quantized as native

pytestmark = pytest.mark.skipif(build.load().library is None, reason=f"no kernels: {build.load().reason}")
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-2}
"""Of the sum of the products' sizes: float32 sums in another order; in bfloat16 the plain form rounds weights too."""
ROUNDING = 2.0**-16
"""Of activations that meet whole numbers, of the largest in a block (here of the whole row, which is no smaller)."""


def operands(outputs: int, inputs: int, bits: int, group: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(outputs, inputs, generator=generator) * 10 ** torch.randn(outputs, 1, generator=generator)
    return quantized.quantize(weight, bits, group)


@given(
    rows=st.one_of(st.integers(1, 40), st.sampled_from([128, 129, 300])),
    outputs=st.integers(1, 90),
    words=st.integers(1, 100),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=40)
def test_products_by_floats_of_8_bits_agree(rows: int, outputs: int, words: int, dtype: torch.dtype, seed: int) -> None:
    """Subnormal weights, and small activations, among them."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(outputs, 4 * words, generator=generator) * 10 ** torch.randn(outputs, 1, generator=generator)
    packed, scale = quantized.to_e4m3(weight * 10 ** (2 * torch.randn(4 * words, generator=generator)))
    x = (torch.randn(rows, 4 * words, generator=generator) * 10 ** torch.randn(rows, 1, generator=generator)).to(dtype)
    y = native.linear(x, packed, scale, 8, 4 * words)
    assert y is not NotImplemented and y.dtype == dtype
    weight = quantized.dequantize(packed, scale, 8, 4 * words, 4 * words).double()
    limit = TOLERANCE[dtype] * (x.double().abs() @ weight.abs().T)
    assert bool(((y.double() - x.double() @ weight.T).abs() <= limit + 1e-12).all())


def test_every_float_of_8_bits_is_the_number_that_pytorch_reads() -> None:
    every = torch.arange(256, dtype=torch.uint8)
    every = every[every & 127 < 127].repeat_interleave(2).view(torch.float8_e4m3fn)[None].contiguous()  # no NaN
    one = torch.ones(1, 1, dtype=torch.bfloat16)
    for place in range(every.shape[1]):
        x = torch.zeros(1, every.shape[1])
        x[0, place] = 1
        for count in (1, 5):  # where the numbers are used as they lie, and where they become floats first
            assert float(native.linear(x.repeat(count, 1), every, one, 8, 508)[-1, 0]) == float(every[0, place])


def test_rows_that_are_no_whole_words_are_declined() -> None:
    packed, scale = quantized.to_e4m3(torch.ones(3, 30))
    assert native.linear(torch.ones(2, 30), packed, scale, 8, 30) is NotImplemented


@given(
    rows=st.one_of(st.integers(1, 40), st.sampled_from([128, 129, 300])),
    outputs=st.integers(1, 90),
    inputs=st.integers(1, 400),
    bits=st.sampled_from([4, 8]),
    group=st.sampled_from([32, 64, 128, None]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    wide=st.booleans(),
    seed=st.integers(0, 1000),
)
@settings(max_examples=60)
def test_products_agree(
    rows: int, outputs: int, inputs: int, bits: int, group: int | None, dtype: torch.dtype, wide: bool, seed: int
) -> None:
    group = group or inputs
    packed, scale = operands(outputs, inputs, bits, group, seed)
    scale = scale.float() if wide else scale
    x = torch.randn(rows, inputs, generator=torch.Generator().manual_seed(seed + 1)).to(dtype)
    y = native.linear(x, packed, scale, bits, group)
    assert y is not NotImplemented and y.dtype == dtype
    weight = quantized.dequantize(packed, scale, bits, group, inputs)
    expected = x.double() @ weight.double().T
    size = x.double().abs() @ weight.double().abs().T
    rounding = ROUNDING * x.double().abs().amax(1, keepdim=True) * weight.double().abs().sum(1)
    assert bool(((y.double() - expected).abs() <= TOLERANCE[dtype] * size + 1.001 * rounding + 1e-12).all())


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group", [32, 128, 1024])
def test_a_large_activation_costs_others_nothing(bits: int, group: int) -> None:
    """Activations are rounded by the largest of their block alone, of 128 inputs at most; here it meets no weight."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(40, 1024, generator=generator)
    weight[:, :128] = 0
    packed, scale = quantized.quantize(weight, bits, group)
    x = torch.randn(3, 1024, generator=generator)
    x[:, 5] = 1e6
    expected = x.double() @ quantized.dequantize(packed, scale, bits, group, 1024).double().T
    difference = native.linear(x, packed, scale, bits, group).double() - expected
    assert float(difference.abs().max()) <= 1e-4 * float(expected.abs().max())


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("rows", [1, 3, 40])
def test_activations_that_are_no_numbers_stay_visible(bits: int, rows: int) -> None:
    packed, scale = operands(40, 200, bits, 32, 0)
    for wrong in (float("nan"), float("inf"), -float("inf")):
        x = torch.randn(rows, 200, generator=torch.Generator().manual_seed(1))
        x[0, 150] = wrong
        y = native.linear(x, packed, scale, bits, 32)
        assert not bool(y[0].isfinite().any()) and bool(y[1:].isfinite().all())


@pytest.mark.parametrize("bits", [4, 8])
def test_tokens_are_multiplied_alike_whatever_their_number(bits: int) -> None:
    packed, scale = operands(50, 300, bits, 32, 1)
    x = torch.randn(native.FEW_ROWS, 300, generator=torch.Generator().manual_seed(4))
    every = native.linear(x, packed, scale, bits, 32)
    for count in (1, 2, 5, 8, 9, 15):
        assert torch.equal(native.linear(x[:count], packed, scale, bits, 32), every[:count])


@pytest.mark.parametrize("bits", [4, 8])
def test_leading_dimensions_and_threads(bits: int) -> None:
    packed, scale = operands(300, 96, bits, 32, 0)
    x = torch.randn(2, 3, 5, 96, generator=torch.Generator().manual_seed(3))
    expected = quantized.linear(x, packed, scale, bits, 32)
    torch.set_num_threads(3)
    try:
        y = native.linear(x, packed, scale, bits, 32)
        one = native.linear(x[0, 0, :1], packed, scale, bits, 32)
    finally:
        torch.set_num_threads(1)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    torch.testing.assert_close(one, expected[0, 0, :1], rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    assert native.linear(x[:0], packed, scale, bits, 32).shape == (0, 3, 5, 300)


@pytest.mark.parametrize("rows", [2, 4, 7, 16, native.FEW_ROWS])
def test_rows_do_not_depend_on_their_neighbours(rows: int) -> None:
    """Bit for bit among equally many; the order of a sum changes with how many there are."""
    packed, scale = operands(50, 130, 4, 32, 1)
    x, other = torch.randn(2, rows, 130, generator=torch.Generator().manual_seed(4))
    expected = native.linear(x, packed, scale, 4, 32)
    for row in range(rows):
        among = other.clone()
        among[row] = x[row]
        assert torch.equal(native.linear(among, packed, scale, 4, 32)[row], expected[row])


def test_what_kernels_decline_runs_plain() -> None:
    packed, scale = operands(20, 64, 4, 32, 1)
    x = torch.randn(3, 64)
    assert native.linear(x.double(), packed, scale, 4, 32) is NotImplemented
    assert native.linear(x.requires_grad_(), packed, scale, 4, 32) is NotImplemented
    assert native.linear(x.detach(), packed, scale.half(), 4, 32) is NotImplemented
