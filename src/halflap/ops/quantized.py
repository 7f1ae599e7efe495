"""Packed weights in plain PyTorch, the specification of the kernels: rounding, packing, and the linear map.

R rows, K inputs, g of them to a scale. Whole numbers lie in little-endian int32 words, the first input in the lowest
bits. Scales take either sign: with the levels -8 .. 7 of 4 bits the value of largest size gets the larger end, which
at equal size of the file rounds as well as a zero point for each group does, and needs none. Floats of 8 bits (E4M3)
are a tensor of that type, with a scale a row; functions of packed weights tell them by it.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

START_FACTORS = (1.0, 0.9, 0.8)  # of the scale at which a group's largest value gets the outermost level
REFINEMENTS = 2
E4M3_MOST = 448.0
CHUNK = 1 << 18  # weights rounded at a time, so that the search stays in the cache


def levels(bits: int) -> tuple[int, int]:
    """The least and the greatest whole number."""
    return -(1 << bits - 1), (1 << bits - 1) - 1


def quantize(weight: Tensor, bits: int, group_size: int, importance: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """weight (R, K) to (packed (R, ceil(K bits / 32)) int32, scale (R, ceil(K / g)) bfloat16).

    The scales are those of least squared error found by alternating between rounding and the best scale for the
    rounded numbers, from six starts. importance (K,) weighs the inputs' errors, e.g. by the mean square of the input.
    """
    chunk = max(1, CHUNK // max(1, weight.shape[1]))
    parts = [_quantize(rows, bits, group_size, importance) for rows in weight.float().split(chunk)]
    packed, scale = (torch.cat(part) for part in zip(*parts, strict=True))
    return packed, scale


def _quantize(weight: Tensor, bits: int, group_size: int, importance: Tensor | None) -> tuple[Tensor, Tensor]:
    inputs = weight.shape[1]
    weight = _grouped(weight, group_size)
    weigh = None if importance is None else _grouped(importance.float()[None], group_size)
    low, high = levels(bits)
    edge = weight.abs().amax(-1, keepdim=True) / low
    best: tuple[Tensor, Tensor, Tensor] | None = None
    for start in (sign * factor for factor in START_FACTORS for sign in (1, -1)):
        scale = edge * start
        for _ in range(REFINEMENTS):
            whole = (weight / _divisor(scale)).round_().clamp_(low, high)
            weighed = whole if weigh is None else whole * weigh
            scale = (weighed * weight).sum(-1, keepdim=True) / _divisor((weighed * whole).sum(-1, keepdim=True))
        scale = scale.bfloat16().float()
        whole = (weight / _divisor(scale)).round_().clamp_(low, high)
        error = (whole * scale - weight).square_()
        error = (error if weigh is None else error * weigh).sum(-1, keepdim=True)
        if best is None:
            best = error, scale, whole
        else:
            better = error < best[0]
            best = tuple(torch.where(better, new, old) for new, old in zip((error, scale, whole), best))  # type: ignore[assignment]
    assert best is not None
    _, scale, whole = best
    return pack((whole - low).to(torch.uint8).flatten(1)[:, :inputs], bits), scale.squeeze(-1).bfloat16()


def to_e4m3(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight (R, K) to (float8_e4m3fn (R, K), scale (R, 1) bfloat16): a row's largest value gets E4M3's, 448."""
    scale = (weight.float().abs().amax(1, keepdim=True) / E4M3_MOST).bfloat16()
    rounded = (weight.float() / _divisor(scale.float())).clamp_(-E4M3_MOST, E4M3_MOST)
    return rounded.to(torch.float8_e4m3fn), scale


def _divisor(scale: Tensor) -> Tensor:
    """Without zeros: a group of zeros may have any scale."""
    return torch.where(scale == 0, 1.0, scale)


def _grouped(rows: Tensor, group_size: int) -> Tensor:
    """(R, K) to (R, groups, g), zeros behind."""
    return F.pad(rows, (0, -rows.shape[1] % group_size)).unflatten(1, (-1, group_size))


def pack(values: Tensor, bits: int) -> Tensor:
    """values (R, K) uint8 below 2^bits to words (R, ceil(K bits / 32)) int32."""
    values = F.pad(values, (0, -values.shape[1] % (32 // bits)))
    if bits == 4:
        values = values[:, ::2] | values[:, 1::2] << 4
    return values.contiguous().view(torch.int32)


def unpack(packed: Tensor, bits: int, inputs: int) -> Tensor:
    """The inverse of `pack`: (R, inputs) uint8."""
    values = packed.contiguous().view(torch.uint8)
    if bits == 4:
        values = torch.stack([values & 15, values >> 4], -1).flatten(1)
    return values[:, :inputs]


def dequantize(packed: Tensor, scale: Tensor, bits: int, group_size: int, inputs: int) -> Tensor:
    """The weights (R, inputs) in float32."""
    if packed.dtype == torch.float8_e4m3fn:
        return packed.float() * scale.float()
    whole = unpack(packed, bits, inputs).float() + levels(bits)[0]
    return whole * scale.float().repeat_interleave(group_size, 1)[:, :inputs]


def linear(x: Tensor, packed: Tensor, scale: Tensor, bits: int, group_size: int) -> Tensor:
    """x (..., K) times the weights (R, K) transposed."""
    return F.linear(x, dequantize(packed, scale, bits, group_size, x.shape[-1]).to(x.dtype))
