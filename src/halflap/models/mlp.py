"""MLP mixer: squared ReLU (So et al. 2021) or SiLU, plain or gated."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from halflap.models.cache import BlockState
from halflap.models.config import MLPConfig
from halflap.models.context import SequenceContext
from halflap.models.linear import Linear
from halflap.ops import select


class MLPMixer(nn.Module):
    """down(act(up(x))), or down(act(gate(x)) * up(x)) when gated."""

    def __init__(self, config: MLPConfig, hidden_size: int) -> None:
        super().__init__()
        self.config = config
        if config.gated:
            self.gate_proj = Linear(hidden_size, config.intermediate_size, bias=config.bias)
        self.up_proj = Linear(hidden_size, config.intermediate_size, bias=config.bias)
        self.down_proj = Linear(config.intermediate_size, hidden_size, bias=config.bias)

    def forward(self, x: Tensor, context: SequenceContext, state: BlockState | None = None) -> Tensor:
        """x (B, T, D) to (B, T, D)."""
        up = self.up_proj(x)
        if self.config.gated and self.config.activation == "silu":
            return self.down_proj(select.swiglu(self.gate_proj(x), up))
        if self.config.gated:
            return self.down_proj(self.activate(self.gate_proj(x)) * up)
        return self.down_proj(self.activate(up))

    def activate(self, x: Tensor) -> Tensor:
        return select.squared_relu(x) if self.config.activation == "relu2" else F.silu(x)
