"""Which device a verb computes on, and whether a model fits it."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from halflap.checkpoints.streamed import largest_part
from halflap.errors import HalflapError
from halflap.models.config import ModelConfig
from halflap.models.quantization import Quantization, weight_bytes
from halflap.train.numerics import free_memory

DTYPES = {4: "float32", 2: "bfloat16"}
"""What weights are loaded as, by the bytes of a number."""


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


def check_memory(
    config: ModelConfig,
    dtype: str,
    device: torch.device,
    beside: Mapping[str, float] | None = None,
    quantization: Quantization | None = None,
    *,
    replicas: int = 1,
) -> int:
    """Bytes that are left to each replica. Raises HalflapError when the weights do not fit, before the system kills it.

    `beside` is what else will be held, by name, in bytes. `auto` is counted as float32 on a CPU. Replicas on GPUs are
    counted as spread evenly over those there are.
    """
    wide, free = _width(dtype, device), free_memory(device)
    beside = dict(beside or {})
    weights = weight_bytes(config, quantization, wide)
    kind = quantization.name if quantization else DTYPES[wide]
    cuda = device.type == "cuda"
    copies = -(-replicas // torch.cuda.device_count()) if cuda else replicas
    held = weights + sum(beside.values())
    if copies * held > free:
        more = "".join(f", {what} {size / 2**30:.1f} GiB" for what, size in beside.items()) + "," * bool(beside)
        times = f" {copies} times over, for {replicas} replicas," if copies > 1 else ""
        raise HalflapError(
            f"the weights take {weights / 2**30:.1f} GiB as {kind}{more}{times} and "
            f"{free / 2**30:.1f} GiB are free; take {'fewer --replicas, ' if copies > 1 else ''}a smaller model"
            f"{', or --dtype bfloat16' if wide == 4 else ''}"
        )
    return int(free // copies - held)


def must_stream(
    config: ModelConfig, dtype: str, device: torch.device, asked: bool, quantization: Quantization | None = None
) -> bool:
    """Whether weights are to be read a block at a time: because it is asked for, or because they do not fit.

    Raises HalflapError when not even the largest part fits.
    """
    wide, free = _width(dtype, device), free_memory(device)
    if not asked and weight_bytes(config, quantization, wide) <= free:
        return False
    part, parameters = largest_part(config)
    if parameters * wide > free:
        raise HalflapError(
            f"the weights are read a block at a time, and {part} alone takes {parameters * wide / 2**30:.1f} GiB as "
            f"{DTYPES[wide]} where {free / 2**30:.1f} GiB are free; free some memory or take a larger machine"
            f"{', or --dtype bfloat16 with score and evaluate' if wide == 4 else ''}"
        )
    return True


def _width(dtype: str, device: torch.device) -> int:
    """Bytes of a number; `auto` is counted as float32 on a CPU."""
    return 4 if dtype == "float32" or (dtype == "auto" and device.type == "cpu") else 2
