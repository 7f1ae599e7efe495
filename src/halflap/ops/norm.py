"""Normalisations, computed in float32 (float64 stays).

The gain multiplies in the wide dtype before the cast, the order of Nemotron-H and Megatron.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def rms_norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype | None = None) -> Tensor:
    """w * x / sqrt(mean(x^2) + eps) over the last dimension: x (..., D), weight (D,); returned in `dtype`, or x's."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return F.rms_norm(x.to(wide), weight.shape, weight.to(wide), eps).to(dtype or x.dtype)


def layer_norm_1p(x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype | None = None) -> Tensor:
    """LayerNorm whose gain is stored as its distance from one (Megatron's zero-centred gamma; Nemotron-4).

    (1 + w) (x - mean) / sqrt(var + eps) + b over the last dimension: x (..., D), weight and bias (D,); in `dtype`, or
    x's. PyTorch has it fused, so there is no other form.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    return F.layer_norm(x.to(wide), weight.shape, weight.to(wide) + 1, bias.to(wide), eps).to(dtype or x.dtype)


def gated_rms_norm(x: Tensor, gate: Tensor, weight: Tensor, groups: int, eps: float) -> Tensor:
    """Mamba-2's output norm: x * silu(gate) first, then RMS over each of `groups` slices; all (..., inner)."""
    wide = torch.promote_types(x.dtype, torch.float32)
    v = x.to(wide) * F.silu(gate.to(wide))
    v = F.rms_norm(v.unflatten(-1, (groups, -1)), (v.shape[-1] // groups,), None, eps).flatten(-2)
    return (v * weight.to(wide)).to(gate.dtype)
