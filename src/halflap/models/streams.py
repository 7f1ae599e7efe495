"""Passes on their way through the blocks: many residual streams are carried through one block before the next is read.

So a model is run by a machine that holds one block of it. A stream may leave another at any block, to go on without
that block or with another in its place; all are carried forward together, and one reading of the weights serves them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from halflap.models.context import Context, SequenceContext

BlockFunction = Callable[[Tensor, Context], Tensor]
"""A `Block`, or what stands for one: (stream (B, L, D), context) to the stream after it."""


@dataclass(frozen=True)
class Stream:
    """A pass between two blocks: hidden (B, L, D), and a context with the keys and values that later blocks read."""

    hidden: Tensor
    context: SequenceContext

    def through(self, index: int, block: BlockFunction) -> Stream:
        """The stream after block `index`; its context goes on, so `self` is not to be used again but to `leave` from.

        Keys and values that no later block reads are let go.
        """
        hidden = block(self.hidden, self.context)
        self.context.forget(index)
        return Stream(hidden, self.context)

    def beside(self, hidden: Tensor) -> Stream:
        """Another pass over the same tokens, which has come as far: with its own stream, and from here on its own keys
        and values."""
        return Stream(hidden, self.context.fork())

    def state(self) -> dict[str, Any]:
        """What tokens and weights do not give: the residual stream, keys and values."""
        shared = self.context.shared_tensors()
        kept = {source: (_own(key), _own(value), window) for source, (key, value, window) in shared.items()}
        return {"hidden": self.hidden, "shared": kept}

    @staticmethod
    def from_state(state: dict[str, Any], context: SequenceContext) -> Stream:
        """The stream of `state`; context: of its tokens, `HybridModel.context_of`."""
        context = context.fork()
        for source, (key, value, window) in state["shared"].items():
            context.share(source, key, value, window)
        return Stream(state["hidden"], context)


def _own(tensor: Tensor) -> Tensor:
    """Keys or values (B, K, L, h) in memory of their own, not as a slice of a projection, their dimensions in the same
    order of strides, upon which rounding may depend."""
    by_time = tensor.transpose(1, 2)
    return tensor.contiguous() if tensor.stride(1) > tensor.stride(2) else by_time.contiguous().transpose(1, 2)
