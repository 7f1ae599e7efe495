"""How much of a machine's arithmetic training uses (MFU), in the two conventions that people print.

    megatron   three forward passes, every token's attention counted over the whole row (no causal half): Nemotron-4's
    6n         six operations a parameter, embeddings included, attention left out: 3 % less for Nemotron-4 340B

Neither counts activations computed again. Pure data: no torch.
"""

from __future__ import annotations

from typing import Literal

from halflap.errors import HalflapError
from halflap.models.config import ModelConfig
from halflap.models.count import count_parameters, flops_per_token

Convention = Literal["megatron", "6n"]
CONVENTIONS: tuple[Convention, ...] = ("megatron", "6n")

# Dense bfloat16 operations a second, as the makers print them, by what the device's name contains.
PEAKS: dict[str, float] = {"A100": 312e12, "L40S": 362e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12}


def training_flops_per_token(config: ModelConfig, context: int, convention: Convention = "megatron") -> int:
    """Operations of one token's forward and backward pass in rows of `context` tokens."""
    if convention == "megatron":
        return 3 * flops_per_token(config, context, "decode")  # the last token of a row sees all of it
    if convention == "6n":
        return 6 * count_parameters(config)
    raise HalflapError(
        f"FLOP convention {convention!r} is not known; allowed are {', '.join(CONVENTIONS)}: choose one of them"
    )


def model_flops_utilization(
    config: ModelConfig,
    context: int,
    tokens_per_second: float,
    peak_flops_per_second: float,
    convention: Convention = "megatron",
) -> float:
    """Share of the peak (of all devices together) that training at this speed uses, between 0 and 1."""
    return training_flops_per_token(config, context, convention) * tokens_per_second / peak_flops_per_second


def peak_flops_per_second(device_name: str) -> float | None:
    """Dense bfloat16 peak of a device, None for one whose figure is not known here."""
    return next((peak for name, peak in PEAKS.items() if name in device_name), None)
