"""Linear maps by packed weights (quantized.cpp), for inference only.

Few rows of activations, on AVX2 any number, are multiplied with the words as they lie; whole numbers meet them rounded
to 16 bits of the largest of some. For many elsewhere, blocks of rows of the weight are written out, small enough to
stay in the cache until the general matrix product has read them.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from halflap.ops.native.common import fits, is_narrow, library, long, pointer

FEW_ROWS = 16
E4M3 = 43  # the kernels' name of weights that are floats of 8 bits
GROUP_SIZES = (32, 64, 128)  # powers of two, which the kernels count by shifts
WRITTEN_BYTES = 4 << 20  # of a block of weights that is written out at once


class Weights(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("rows", "inputs", "group", "narrow_scales")),
        *((name, ctypes.c_void_p) for name in ("words", "scales")),
    )


def words_of(packed: Tensor, bits: int) -> tuple[Tensor | None, int]:
    """Packed weights as int32 words and their format; None where their rows are no whole words."""
    if packed.dtype != torch.float8_e4m3fn:
        return (packed if packed.dtype == torch.int32 else None), bits
    whole = packed.shape[-1] % 4 == 0 and packed.data_ptr() % 4 == 0 and packed.is_contiguous()
    return (packed.view(torch.int32) if whole else None), E4M3


def linear(x: Tensor, packed: Tensor, scale: Tensor, bits: int, group_size: int) -> Tensor | Any:
    """As `ops.quantized.linear`, or NotImplemented: for gradients, other types and devices."""
    inputs, outputs = x.shape[-1], len(packed)
    if x.requires_grad and torch.is_grad_enabled():
        return NotImplemented
    if torch.is_autocast_enabled("cpu") or not (fits(x, *x.shape) and fits(scale, outputs, -(-inputs // group_size))):
        return NotImplemented
    words, format = words_of(packed, bits)
    if words is None or words.shape != (outputs, -(-inputs * bits // 32)) or words.device != x.device:
        return NotImplemented
    grouped = group_size >= inputs or (group_size in GROUP_SIZES and format != E4M3)
    if not (grouped and words.is_contiguous() and scale.is_contiguous()):
        return NotImplemented
    weights = Weights(outputs, inputs, group_size, is_narrow(scale), words.data_ptr(), scale.data_ptr())
    rows = x.detach().reshape(-1, inputs).contiguous()
    product = _few_rows if len(rows) <= FEW_ROWS or library().halflap_many_rows() else _many_rows
    return product(weights, format, rows).view(*x.shape[:-1], outputs)


def _few_rows(weights: Weights, format: int, x: Tensor) -> Tensor:
    y = x.new_empty(len(x), weights.rows)
    if y.numel():
        library().halflap_packed_few_rows(
            ctypes.byref(weights), *long(format, len(x)), pointer(x), pointer(y), is_narrow(x), torch.get_num_threads()
        )
    return y


def _many_rows(weights: Weights, format: int, x: Tensor) -> Tensor:
    y = x.new_empty(len(x), weights.rows)
    at_once = max(16, WRITTEN_BYTES // (weights.inputs * x.itemsize))
    block = x.new_empty(min(at_once, weights.rows), weights.inputs)
    for begin in range(0, weights.rows, at_once):
        end = min(begin + at_once, weights.rows)
        library().halflap_packed_write_out(
            ctypes.byref(weights), *long(format, begin, end), pointer(block), is_narrow(x), torch.get_num_threads()
        )
        torch.mm(x, block[: end - begin].T, out=y[:, begin:end])
    return y
