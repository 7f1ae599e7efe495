# pyright: reportMissingImports=false, reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
# pyright: reportIndexIssue=false, reportOperatorIssue=false
"""Linear maps by packed weights in Triton: `ops.quantized.linear` on a GPU, for inference only.

Floats of 8 bits (E4M3) are shifted into the place of a float16's bits, where they are 256 times too small; so any GPU
reads them.

One to four rows of activations are multiplied with the numbers in the words, and scaled a word at a time; up to
SOME_ROWS the words become weights in the dtype of the activations, tile by tile, for matrix products; for more, blocks
of rows of the weight are written out for the general product.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from halflap.ops.triton_common import TAKEN, block, precision, tiles

FEW_ROWS, SOME_ROWS = 4, 64
GROUP_SIZES = (32, 64, 128)  # whole words of either width
WRITTEN_BYTES = 128 << 20  # of a block of weights that is written out at once


@triton.jit
def _number(word, j: tl.constexpr, BITS: tl.constexpr):
    """The j-th number of each word, in float32; BITS 0 means floats of 8 bits."""
    if BITS == 0:
        byte = word >> (j * 8)
        half = ((byte & 0x80) << 8 | (byte & 0x7F) << 7).to(tl.int16).to(tl.float16, bitcast=True)
        return half.to(tl.float32) * 256.0
    return (((word >> (j * BITS)) & ((1 << BITS) - 1)) - (1 << (BITS - 1))).to(tl.float32)


@triton.jit
def _few_rows(
    x, packed, scale, y, rows, outputs, inputs, words, groups, group_size,
    BITS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    r = (tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)
    m = tl.arange(0, BLOCK_M)
    in_outputs, in_rows = r < outputs, m < rows
    per_word: tl.constexpr = 32 // BITS if BITS else 4
    product = tl.zeros((BLOCK_M, BLOCK_R, BLOCK_W), tl.float32)
    for start in range(0, words, BLOCK_W):
        w = start + tl.arange(0, BLOCK_W)
        inside = in_outputs[:, None] & (w < words)[None, :]
        word = tl.load(packed + r[:, None] * words + w[None, :], mask=inside, other=0)
        group = w * per_word // group_size
        factor = tl.load(scale + r[:, None] * groups + group[None, :], mask=inside, other=0.0).to(tl.float32)
        part = tl.zeros((BLOCK_M, BLOCK_R, BLOCK_W), tl.float32)
        for j in tl.static_range(per_word):
            k = w * per_word + j
            column = x + m[:, None] * inputs + k[None, :]
            value = tl.load(column, mask=in_rows[:, None] & (k < inputs)[None, :], other=0.0).to(tl.float32)
            part += value[:, None, :] * _number(word, j, BITS)[None, :, :]
        product += part * factor[None, :, :]
    place = y + m[:, None] * outputs + r[None, :]
    inside = in_rows[:, None] & in_outputs[None, :]
    tl.store(place, tl.sum(product, axis=2).to(y.dtype.element_ty), mask=inside)


@triton.jit
def _some_rows(
    x, packed, scale, y, rows, outputs, inputs, words, groups, group_size,
    BITS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_W: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    r = (tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    in_outputs, in_rows = r < outputs, m < rows
    per_word: tl.constexpr = 32 // BITS if BITS else 4
    product = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for start in range(0, words, BLOCK_W):
        w = start + tl.arange(0, BLOCK_W)
        inside = (w < words)[:, None] & in_outputs[None, :]
        word = tl.load(packed + r[None, :] * words + w[:, None], mask=inside, other=0)
        group = w * per_word // group_size
        factor = tl.load(scale + r[None, :] * groups + group[:, None], mask=inside, other=0.0).to(tl.float32)
        for j in tl.static_range(per_word):
            k = w * per_word + j
            column = x + m[:, None] * inputs + k[None, :]
            value = tl.load(column, mask=in_rows[:, None] & (k < inputs)[None, :], other=0.0)
            weight = (_number(word, j, BITS) * factor).to(value.dtype)
            product = tl.dot(value, weight, product, input_precision=PRECISION)
    place = y + m[:, None] * outputs + r[None, :]
    tl.store(place, product.to(y.dtype.element_ty), mask=in_rows[:, None] & in_outputs[None, :])


@triton.jit
def _write_out(
    packed, scale, weight, outputs, inputs, words, groups, group_size,
    BITS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    r = (tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)
    w = tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W)
    per_word: tl.constexpr = 32 // BITS if BITS else 4
    in_outputs = (r < outputs)[:, None]
    inside = in_outputs & (w < words)[None, :]
    word = tl.load(packed + r[:, None] * words + w[None, :], mask=inside, other=0)
    group = w * per_word // group_size
    factor = tl.load(scale + r[:, None] * groups + group[None, :], mask=inside, other=0.0).to(tl.float32)
    for j in tl.static_range(per_word):
        k = w * per_word + j
        value = (_number(word, j, BITS) * factor).to(weight.dtype.element_ty)
        tl.store(weight + r[:, None] * inputs + k[None, :], value, mask=in_outputs & (k < inputs)[None, :])


def linear(x: Tensor, packed: Tensor, scale: Tensor, bits: int, group_size: int) -> Tensor | Any:
    """As `ops.quantized.linear`, or NotImplemented: for gradients and other types."""
    inputs, outputs = x.shape[-1], len(packed)
    groups, words = tiles(inputs, group_size), tiles(inputs * bits, 32)
    if (x.requires_grad and torch.is_grad_enabled()) or bits not in (4, 8) or torch.is_autocast_enabled(x.device.type):
        return NotImplemented
    if packed.dtype == torch.float8_e4m3fn and inputs % 4 == 0 and packed.is_contiguous():
        packed, bits = packed.view(torch.int32), 0
    if not (TAKEN.fits(x, *x.shape) and TAKEN.fits(scale, outputs, groups)) or packed.dtype != torch.int32:
        return NotImplemented
    if packed.shape != (outputs, words) or not (packed.is_contiguous() and scale.is_contiguous()):
        return NotImplemented
    if group_size not in GROUP_SIZES and group_size < inputs:
        return NotImplemented
    rows = x.detach().reshape(-1, inputs).contiguous()
    if not rows.numel() or not outputs:
        return x.new_zeros(*x.shape[:-1], outputs)
    product = _of_few if len(rows) <= FEW_ROWS else _of_some if len(rows) <= SOME_ROWS else _of_many
    return product(rows, packed, scale, bits, group_size).view(*x.shape[:-1], outputs)


def _sizes(x: Tensor, packed: Tensor, scale: Tensor, group_size: int) -> tuple[int, ...]:
    return len(packed), x.shape[1], packed.shape[1], scale.shape[1], group_size


def _of_few(x: Tensor, packed: Tensor, scale: Tensor, bits: int, group_size: int) -> Tensor:
    count, outputs = len(x), len(packed)
    y = x.new_empty(count, outputs)
    block_m = block(count)
    _few_rows[(tiles(outputs, 16 // block_m),)](
        x, packed, scale, y, count, *_sizes(x, packed, scale, group_size),
        BITS=bits, BLOCK_M=block_m, BLOCK_R=16 // block_m, BLOCK_W=block(packed.shape[1], most=128),
    )  # fmt: skip
    return y


def _of_some(x: Tensor, packed: Tensor, scale: Tensor, bits: int, group_size: int) -> Tensor:
    count, outputs = len(x), len(packed)
    y = x.new_empty(count, outputs)
    block_m = block(count, 16)
    block_w = block(packed.shape[1], 16, 32 if x.itemsize == 2 else 16)
    _some_rows[(tiles(outputs, 32), tiles(count, block_m))](
        x, packed, scale, y, count, *_sizes(x, packed, scale, group_size),
        BITS=bits, BLOCK_M=block_m, BLOCK_R=32, BLOCK_W=block_w, PRECISION=precision(), num_stages=2,
    )  # fmt: skip
    return y


def _of_many(x: Tensor, packed: Tensor, scale: Tensor, bits: int, group_size: int) -> Tensor:
    inputs, outputs = x.shape[1], len(packed)
    y = x.new_empty(len(x), outputs)
    at_once = max(16, WRITTEN_BYTES // (inputs * x.itemsize))
    written = x.new_empty(min(at_once, outputs), inputs)
    for begin in range(0, outputs, at_once):
        words, factors = packed[begin : begin + at_once], scale[begin : begin + at_once]
        _write_out[(tiles(len(words), 16), tiles(words.shape[1], 64))](
            words, factors, written, *_sizes(x, words, factors, group_size), BITS=bits, BLOCK_R=16, BLOCK_W=64
        )
        torch.mm(x, written[: len(words)].T, out=y[:, begin : begin + len(words)])
    return y
