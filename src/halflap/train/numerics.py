"""The precision of the arithmetic, what went wrong with it, and the memory it took."""

from __future__ import annotations

import contextlib
import ctypes
import sys
import warnings
from collections.abc import Mapping

import psutil
import torch
from torch import nn

from halflap.errors import HalflapError
from halflap.processes import available_memory


def resolve_dtype(dtype: str, device: str | torch.device) -> torch.dtype:
    """ "auto" is bfloat16 where the device has instructions for it; bfloat16 without them is taken with a warning."""
    if dtype not in ("auto", "float32", "bfloat16"):
        raise HalflapError(f"dtype {dtype!r} is not known; allowed are auto, float32 and bfloat16: correct --dtype")
    on_cpu = torch.device(device).type == "cpu"
    fast = torch.ops.mkldnn._is_mkldnn_bf16_supported() if on_cpu else torch.cuda.is_bf16_supported()
    if dtype == "bfloat16" and not fast:
        warnings.warn(
            "this processor has no bfloat16 instructions, so bfloat16 is many times slower here than float32; take "
            "--dtype auto",
            stacklevel=2,
        )
    return torch.float32 if dtype == "float32" or (dtype == "auto" and not fast) else torch.bfloat16


def precision(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Autocast to `dtype`, or nothing for float32."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16)


def not_finite(step: int, loss: float, parameters: Mapping[str, nn.Parameter]) -> str:
    """The sentence for a step whose loss or gradient is not finite, naming the first culprit."""
    return (
        f"training stopped at step {step} with loss {loss:g}: {_first_not_finite(parameters)}; the last saved state is "
        "untouched: lower --fit.learning-rate or lengthen --fit.warmup"
    )


def _first_not_finite(parameters: Mapping[str, nn.Parameter]) -> str:
    for name, parameter in parameters.items():
        if not bool(torch.isfinite(parameter).all()):
            return f"the first that is not finite is the parameter {name}"
    for name, parameter in parameters.items():
        if parameter.grad is not None and not bool(torch.isfinite(parameter.grad).all()):
            return f"the first that is not finite is the gradient of {name}"
    return "every parameter and gradient is finite, but the loss or the gradient's norm is not"


def peak_memory(device: torch.device) -> int:
    """Bytes: the process's peak resident size, or the GPU's peak allocation."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset
    import resource  # absent on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def free_memory(device: torch.device) -> int:
    """Bytes that can still be taken without swapping or passing a container's limit, or of the GPU."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_memory()


def keep_freed_memory() -> None:
    """Have glibc keep freed blocks of up to 32 MiB instead of returning them to the kernel (no effect elsewhere).

    A step frees and takes the same activations again; fresh pages each time cost 4 % of a small model's step.
    """
    map_threshold, trim_threshold = -3, -1  # M_MMAP_THRESHOLD and M_TRIM_THRESHOLD of malloc.h
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            mallopt = ctypes.CDLL("libc.so.6").mallopt
            mallopt(map_threshold, 32 << 20)
            mallopt(trim_threshold, 2**31 - 1)
