"""Depthwise causal convolution along time, over a sequence or continuing from a state.

y_t = bias + sum_j w[:, j] x_{t-W+1+j}: the last tap multiplies the newest token (Nemotron-H, section 4.4 of the
released code's convention). The state is the last W-1 inputs, so a continued sequence equals an unbroken one.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def causal_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    initial_state: Tensor | None = None,
    runs: Tensor | None = None,
) -> Tensor:
    """Convolve x (B, T, C) with weight (C, W) and bias (C,); returns (B, T, C).

    initial_state (B, W-1, C) are the inputs before the first token (zeros if absent); runs (B, T) number the
    documents of a row (`ssd.segment_runs`), and no tap reaches across their borders.
    """
    time = x.shape[1]
    width = weight.shape[1]
    if initial_state is None:
        padded = F.pad(x, (0, 0, width - 1, 0))
    else:
        padded = torch.cat([initial_state.to(x.dtype), x], 1)
    y = x * weight[:, width - 1]
    for back in range(1, width):
        earlier = padded[:, width - 1 - back : width - 1 - back + time]
        if runs is not None:
            same = runs == F.pad(runs[:, None].float(), (back, 0), mode="replicate")[:, 0, :time]
            earlier = earlier * same[..., None]
        y = torch.addcmul(y, earlier, weight[:, width - 1 - back])
    return y if bias is None else y + bias


def conv_silu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    initial_state: Tensor | None = None,
    runs: Tensor | None = None,
) -> Tensor:
    """silu(causal_conv(...)) computed in float32 or wider and returned in the dtype of x; arguments as there."""
    wide = torch.promote_types(x.dtype, torch.float32)
    bias = None if bias is None else bias.to(wide)
    y = causal_conv(x.to(wide), weight.to(wide), bias, initial_state=initial_state, runs=runs)
    return F.silu(y).to(x.dtype)


def final_conv_state(x: Tensor, width: int, initial_state: Tensor | None, lengths: Tensor | None) -> Tensor:
    """The last W-1 valid inputs (B, W-1, C) after x (B, T, C), of which the first `lengths` (B,) of a row count."""
    if initial_state is None:
        padded = F.pad(x, (0, 0, width - 1, 0))
    else:
        padded = torch.cat([initial_state.to(x.dtype), x], 1)
    if lengths is None:
        return padded[:, padded.shape[1] - (width - 1) :].clone()  # of a view, one row would keep the whole pass
    index = lengths[:, None] + torch.arange(width - 1, device=x.device)
    return padded.gather(1, index[..., None].expand(-1, -1, x.shape[2]))


def conv_step(x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor) -> tuple[Tensor, Tensor]:
    """Convolve one token x (B, C) after state (B, W-1, C); returns y (B, C) and the next state."""
    window = torch.cat([state.to(x.dtype), x[:, None]], 1)
    y = (window * weight.t()).sum(1)
    return (y if bias is None else y + bias), window[:, 1:]
