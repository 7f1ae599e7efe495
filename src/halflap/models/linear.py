"""The linear map of every mixer: PyTorch's module, which for a few rows without gradients reads its weight once.

And the mixer that is nothing else, which keeps nothing in a cache.
"""

from __future__ import annotations

from torch import Tensor, nn

from halflap.models.cache import BlockState
from halflap.models.config import LinearConfig
from halflap.models.context import Context
from halflap.ops import select


class Linear(nn.Linear):
    """x (..., in) to (..., out)."""

    def forward(self, input: Tensor) -> Tensor:
        return select.linear(input, self.weight, self.bias)


class LinearMixer(nn.Module):
    """out_proj(x), each token by itself."""

    def __init__(self, config: LinearConfig, hidden_size: int) -> None:
        super().__init__()
        self.config = config
        self.out_proj = Linear(hidden_size, hidden_size, bias=config.bias)

    def forward(self, x: Tensor, context: Context, state: BlockState | list[BlockState | None] | None = None) -> Tensor:
        """x (B, T, D) to (B, T, D)."""
        return self.out_proj(x)
