"""Rotary position embedding (Su et al. 2021): full, partial and scaled; halves rotated as in Hugging Face models."""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor

from halflap.models.config import NTKScaling, RopeConfig


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> Tensor:
    """Angular speed of each rotated pair, (rotary/2,) float64 radians a token; scaling as Llama 3.1 defines it."""
    rotary = round(head_dim * rope.fraction)
    theta, scaling = rope.theta, rope.scaling
    if isinstance(scaling, NTKScaling) and rotary > 2:  # the first pair's speed is 1 whatever theta is
        theta *= scaling.stretch ** (rotary / (rotary - 2))
    speed = theta ** -(torch.arange(0, rotary, 2, dtype=torch.float64) / rotary)
    if scaling is None or isinstance(scaling, NTKScaling):
        return speed
    turns = scaling.original_max_position_embeddings * speed / (2 * math.pi)  # full turns within the original context
    blend = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    blend = blend.clamp(0, 1)
    return speed * (blend + (1 - blend) / scaling.factor)


@cache
def speeds(rope: RopeConfig, head_dim: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """`inverse_frequencies` on a device, made once: a pass recorded as a CUDA graph may copy nothing from the host."""
    with torch.inference_mode(False):
        return inverse_frequencies(rope, head_dim).to(device, dtype)


def rotary_tables(positions: Tensor, speed: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin (B, 1, T, rotary) for `positions` (B, T); angles in float32 or wider."""
    wide = torch.promote_types(dtype, torch.float32)
    angles = positions[..., None].to(wide) * speed.to(positions.device, wide)
    angles = torch.cat([angles, angles], -1)[:, None]
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first `rotary` channels of x (B, heads, T, head_dim)."""
    rotary = cos.shape[-1]
    turned, kept = x[..., :rotary], x[..., rotary:]
    first, second = turned.chunk(2, -1)
    turned = turned * cos + torch.cat([-second, first], -1) * sin
    return torch.cat([turned, kept], -1) if kept.shape[-1] else turned
