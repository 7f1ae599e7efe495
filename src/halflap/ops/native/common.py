"""What the kernels' wrappers share: the dtypes they take, checks before a pointer is handed over, pointers."""

from __future__ import annotations

import ctypes
import sys

import torch
from torch import Tensor

from halflap.ops.native.build import load
from halflap.ops.operands import Operands

DTYPES = (torch.float32, torch.bfloat16)
TAKEN = Operands(DTYPES, "cpu")
fits, counts = TAKEN.fits, TAKEN.counts
LARGE_PAGE = 2 << 20
COLLAPSE = 25  # of Linux 6.1; earlier ones refuse it
GAIN_PARTS = 16  # partial sums of a gain's gradient; a fixed number, so that the sum does not depend on the threads


def reach(runs: Tensor, width: int) -> Tensor:
    """How many earlier tokens of its document each token's convolution sees: (B, T) int32, at most W-1."""
    time = runs.shape[1]
    seen = torch.full(runs.shape, width - 1, dtype=torch.int32)
    for back in range(width - 1, 0, -1):
        if back < time:
            seen[:, back:].masked_fill_(runs[:, back:] != runs[:, :-back], back - 1)
    return seen


def row_stride(size: int, dtype: torch.dtype) -> int:
    """Elements of a row of work memory: an odd number of cache lines (see parallel.h)."""
    return (-(-size * dtype.itemsize // 64) | 1) * 64 // dtype.itemsize


def into_large_pages(tensor: Tensor) -> None:
    """Ask the system to put what it can of a tensor's memory into pages of 2 MiB, where it lies; refusals are ignored.

    Weights read once a token come up to a tenth sooner: fewer addresses to look up.
    """
    first = -(-tensor.data_ptr() // LARGE_PAGE) * LARGE_PAGE
    last = (tensor.data_ptr() + tensor.nbytes) // LARGE_PAGE * LARGE_PAGE
    if last > first and sys.platform == "linux":
        ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), ctypes.c_int(COLLAPSE))


def is_narrow(tensor: Tensor) -> int:
    return int(tensor.dtype == torch.bfloat16)


def pointer(tensor: Tensor | None) -> ctypes.c_void_p | None:
    return None if tensor is None else ctypes.c_void_p(tensor.data_ptr())


def long(*numbers: int) -> tuple[ctypes.c_int64, ...]:
    return tuple(map(ctypes.c_int64, numbers))


def library() -> ctypes.CDLL:
    loaded = load().library
    assert loaded is not None, "the kernels were called without being there"
    for name in ("halflap_kept_states", "halflap_selective_kept", "halflap_selective_partial"):
        getattr(loaded, name).restype = ctypes.c_int64
    return loaded
