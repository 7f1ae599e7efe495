"""Which device a verb computes on."""

from __future__ import annotations

import torch

from halflap.errors import HalflapError


def choose_device(name: str) -> torch.device:
    """`auto` is a CUDA device when there is one. Raises HalflapError when `cuda` is asked for in vain."""
    if (kind := name.partition(":")[0]) not in ("auto", "cpu", "cuda"):
        raise HalflapError(f"device is {name!r}; allowed are auto, cpu, cuda: choose one of them")
    if kind == "cuda" and not torch.cuda.is_available():
        raise HalflapError(f"device is {name!r}, and PyTorch sees no CUDA device here; take cpu or auto")
    return torch.device("cuda" if name == "auto" and torch.cuda.is_available() else "cpu" if name == "auto" else name)


def choose_dtype(name: str, device: torch.device) -> str:
    """`auto` is float32 on a CPU, which is exact and has the faster kernels, and the stored type on a GPU."""
    return "float32" if name == "auto" and device.type == "cpu" else name
