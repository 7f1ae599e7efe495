"""Norm modules of blocks and of the final hidden states, by the name in `ModelConfig.norm`.

Before a mixer the output is already in the dtype that autocast wants.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from halflap.ops import select
from halflap.ops.norm import layer_norm_1p


class RMSNorm(nn.Module):
    """Gain (D,) and eps of `ops.norm.rms_norm`."""

    def __init__(self, size: int, eps: float, before_mixer: bool = False) -> None:
        super().__init__()
        self.eps = eps
        self.before_mixer = before_mixer
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        return select.rms_norm(x, self.weight, self.eps, output_dtype(x, self.weight, self.before_mixer))


class LayerNorm1P(nn.Module):
    """Gain less one (D,), bias (D,) and eps of `ops.norm.layer_norm_1p`; both start at 0."""

    def __init__(self, size: int, eps: float, before_mixer: bool = False) -> None:
        super().__init__()
        self.eps = eps
        self.before_mixer = before_mixer
        self.weight = nn.Parameter(torch.zeros(size))
        self.bias = nn.Parameter(torch.zeros(size))

    def forward(self, x: Tensor) -> Tensor:
        dtype = output_dtype(x, self.weight, self.before_mixer)
        return layer_norm_1p(x, self.weight, self.bias, self.eps, dtype)


NORMS: dict[str, Callable[..., RMSNorm | LayerNorm1P]] = {"rms": RMSNorm, "layer1p": LayerNorm1P}


def output_dtype(x: Tensor, weight: Tensor, before_mixer: bool) -> torch.dtype:
    device = x.device.type
    narrow = before_mixer and x.dtype != torch.float64 and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if narrow else weight.dtype
