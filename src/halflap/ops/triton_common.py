# pyright: reportMissingImports=false, reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
# pyright: reportIndexIssue=false, reportOperatorIssue=false
"""What the Triton kernels share: the dtypes they take, checks, small functions in kernels, gradients by the plain form.

The forms of ops/triton_*.py are called with CUDA tensors (select.py); with TRITON_INTERPRET=1, set before the first
import of triton, they run on any tensors in numpy, which is how the tests check them without a GPU. Sums, states and
norms are float32. Products of float32 numbers are as exact as float32 unless torch.set_float32_matmul_precision
allows less; operands of bfloat16 products are rounded to it, as everywhere on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from halflap.ops.operands import Operands

TAKEN = Operands((torch.float32, torch.bfloat16, torch.float16))


def rows(tensor: Tensor) -> Tensor:
    """Dense in the last dimension."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def block(size: int, least: int = 1, most: int = 1 << 20) -> int:
    """The power of two that holds `size`, within bounds that are powers of two."""
    return min(most, max(least, triton.next_power_of_2(size)))


def tiles(size: int, width: int) -> int:
    return -(-size // width)


def precision() -> str:
    """How products of float32 numbers are made: three products of TensorFloat-32, or one where that is allowed."""
    return "tf32x3" if torch.get_float32_matmul_precision() == "highest" else "tf32"


class Recomputed(torch.autograd.Function):
    """apply(fast, plain, *tensors) = fast(*tensors), whose gradient is plain's, computed anew in the backward pass."""

    @staticmethod
    def forward(ctx: Any, fast: Callable[..., Any], plain: Callable[..., Any], *tensors: Tensor | None) -> Any:
        ctx.plain = plain
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)
        return fast(*tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        wanted = ctx.needs_input_grad[2:]
        tensors = [
            None if t is None else t.detach().requires_grad_(wants) for t, wants in zip(ctx.saved_tensors, wanted)
        ]
        with torch.enable_grad():
            outputs = ctx.plain(*tensors)
        outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
        pairs = [(o, g.to(o.dtype)) for o, g in zip(outputs, gradients) if g is not None and o.requires_grad]
        leaves = [t for t, wants in zip(tensors, wanted) if wants]
        found = [None] * len(leaves)
        if pairs:
            ends, given = zip(*pairs)
            found = torch.autograd.grad(ends, leaves, given, allow_unused=True)
        each = iter(found)
        return None, None, *(next(each) if wants else None for wants in wanted)


@triton.jit
def silu(x):
    return x / (1.0 + tl.exp(-x))


@triton.jit
def softplus(x):
    """log(1 + exp(x)), x itself from 20 on, as PyTorch has it; exact to a few ulp for the smallest results too."""
    e = tl.exp(tl.minimum(x, 20.0))
    above = 1.0 + e
    # Kahan's log1p: the rounding of 1 + e is undone by dividing by what was really added
    added = tl.where(above == 1.0, 1.0, above - 1.0)
    log1p = tl.where(above == 1.0, e, tl.log(above) * (e / added))
    return tl.where(x > 20.0, x, log1p)


@triton.jit
def time_step(x, low, high):
    return tl.minimum(tl.maximum(softplus(x), low), high)
