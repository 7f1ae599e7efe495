"""AdamW, what it decays, and the learning rate as a pure function of tokens seen.

Matrices decay; vectors do not: A_log, D and dt_bias set time scales whose pull to 0 has no meaning (state-spaces
flags them `_no_weight_decay`), norm gains are scales around 1, biases are offsets. The embedding decays like
Megatron's: it is a matrix read by a norm, so its scale is free, and without decay rare rows never shrink back.
The convolution's kernel decays too. In the layout this is one rule: two or more dimensions, but neither meta tokens,
which are states to start from, nor Mamba-1's A_log, which has a row for each channel.

Schedules: Megatron's warmup-stable-decay with its four decay shapes; r is the progress through the decay.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from halflap.train.config import Fit

NEVER_DECAYED = ("A_log", "meta_tokens")
DECAY_SHAPES: dict[str, Callable[[float], float]] = {
    "linear": lambda r: 1 - r,
    "cosine": lambda r: (1 + math.cos(math.pi * r)) / 2,
    "exponential": lambda r: 2 * 0.5**r - 1,
    "minus_sqrt": lambda r: 1 - math.sqrt(r),
}


def learning_rate(settings: Fit, seen: float, total: float) -> float:
    """Rate of the step that brings the tokens seen to `seen` of `total`, which is the floor at the end."""
    peak, floor = settings.learning_rate, settings.learning_rate * settings.min_learning_rate
    warmup = min(settings.warmup_tokens(int(total)), total)
    if seen < warmup:
        return peak * seen / warmup
    if settings.schedule == "constant":
        return peak
    if settings.schedule == "cosine":
        start, shape = warmup, DECAY_SHAPES["cosine"]
    else:
        start, shape = max(warmup, total * (1 - settings.decay_fraction)), DECAY_SHAPES[settings.decay_shape]
    if seen <= start:
        return peak
    return floor + (peak - floor) * shape(min(1.0, (seen - start) / max(total - start, 1e-9)))


def decays(name: str, parameter: Tensor) -> bool:
    """Whether weight decay applies to a parameter of this name."""
    return parameter.ndim >= 2 and name.rsplit(".", 1)[-1] not in NEVER_DECAYED


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters that require a gradient, by name, tied ones once."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def parameter_groups(parameters: Mapping[str, nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """Two groups: decayed and not."""
    groups = (
        {"params": [p for name, p in parameters.items() if decays(name, p)], "weight_decay": weight_decay},
        {"params": [p for name, p in parameters.items() if not decays(name, p)], "weight_decay": 0.0},
    )
    return [group for group in groups if group["params"]]


def make_optimizer(parameters: Mapping[str, nn.Parameter], settings: Fit) -> torch.optim.AdamW:
    """AdamW in one fused sweep over all parameters (on a CPU and a GPU alike)."""
    groups = parameter_groups(parameters, settings.weight_decay)
    return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=settings.betas, eps=settings.eps, fused=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate
