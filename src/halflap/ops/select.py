"""Which implementation of an op runs: one table, one setting.

HALFLAP_KERNELS=auto (default) takes the C++ kernels where a compiler is found and says so, once, where none is;
`plain` is PyTorch alone; `native` refuses to run without the kernels. A kernel may decline an input (a dtype, a
device, a size it does not know); the plain form then runs and the refusal is counted. `linear`, `mamba2_step`,
`selective_step` and `attention` decline by nature (gradients, many rows, few queries) and are not counted.

Tensors on a GPU have kernels of their own, in Triton, under every setting but `plain`; they are imported when the first
such tensor comes. An op without one runs plain there, which is PyTorch's own kernel.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch.nn import functional

from halflap.errors import HalflapError
from halflap.ops import activation, conv, mamba2, norm, quantized, sampling
from halflap.ops import attention as plain_attention
from halflap.ops import selective_scan as plain_scan
from halflap.ops.native import attention as native_attention
from halflap.ops.native import build, convolution, decode, elementwise
from halflap.ops.native import mamba2 as native_mamba2
from halflap.ops.native import quantized as native_quantized
from halflap.ops.native import sampling as native_sampling
from halflap.ops.native import selective_scan as native_scan

SETTINGS = ("auto", "plain", "native")
LEAST_CAPABILITY = (8, 0)  # of an NVIDIA GPU: products of bfloat16


@dataclass
class Op:
    """A function with a plain form and fast ones that return NotImplemented for what they do not take."""

    plain: Callable[..., Any]
    native: Callable[..., Any]
    triton: str | None = None  # "module:function" in this folder
    counted: bool = True
    refused: int = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        device = next(iter((*args, *kwargs.values()))).device
        if device.type == "cuda":
            result = self._on_gpu(device, *args, **kwargs)
        else:
            result = self.native(*args, **kwargs) if native_is_on() else None
        if result is NotImplemented:
            self.refused += self.counted
            result = None
        return self.plain(*args, **kwargs) if result is None else result

    def _on_gpu(self, device: torch.device, *args: Any, **kwargs: Any) -> Any:
        """What the Triton form gives; None where there is none."""
        if self.triton is None or not triton_is_on():
            return None
        with torch.cuda.device(device):  # triton launches on the current one
            return _loaded(self.triton)(*args, **kwargs)


@cache
def _loaded(name: str) -> Callable[..., Any]:
    module, _, function = name.partition(":")
    return getattr(import_module(f"halflap.ops.{module}"), function)


mamba2_mix = Op(mamba2.mamba2_mix, native_mamba2.mamba2_mix, "triton_mamba2:mamba2_mix")
mamba2_step = Op(mamba2.mamba2_step, decode.mamba2_step, "triton_mamba2:mamba2_step", counted=False)
attention = Op(plain_attention.attention, native_attention.attention, counted=False)
conv_silu = Op(conv.conv_silu, convolution.conv_silu, "triton_conv:conv_silu")
selective_scan = Op(plain_scan.selective_scan, native_scan.selective_scan)
selective_step = Op(
    plain_scan.selective_step, native_scan.selective_step, "triton_selective_scan:selective_step", counted=False
)
linear = Op(functional.linear, decode.linear, counted=False)
quantized_linear = Op(quantized.linear, native_quantized.linear, "triton_quantized:linear")
rms_norm = Op(norm.rms_norm, elementwise.rms_norm)
squared_relu = Op(activation.squared_relu, elementwise.squared_relu)
swiglu = Op(activation.swiglu, elementwise.swiglu)
draw = Op(sampling.draw, native_sampling.draw)

OPS: dict[str, Op] = {
    "mamba2_mix": mamba2_mix,
    "mamba2_step": mamba2_step,
    "conv_silu": conv_silu,
    "selective_scan": selective_scan,
    "selective_step": selective_step,
    "attention": attention,
    "linear": linear,
    "quantized_linear": quantized_linear,
    "rms_norm": rms_norm,
    "squared_relu": squared_relu,
    "swiglu": swiglu,
    "draw": draw,
}

_setting: str | None = None  # None until first use: the environment is read then
_native: bool | None = None


def use(setting: str) -> None:
    """Choose for the whole process: auto, plain or native. Raises HalflapError for native without the kernels."""
    global _setting, _native
    if setting not in SETTINGS:
        raise HalflapError(
            f"HALFLAP_KERNELS is {setting!r}; allowed are {', '.join(SETTINGS)}: choose one of them or unset it"
        )
    _setting, _native = setting, setting != "plain" and build.load().library is not None
    if setting == "plain" or _native:
        return
    reason = build.load().reason
    if setting == "native":
        raise HalflapError(
            f"HALFLAP_KERNELS is native, but {reason}; install a C++ compiler (g++ or clang++) or choose auto"
        )
    warnings.warn(
        f"running on plain PyTorch, several times slower on a CPU: {reason}; install g++ or clang++, or set "
        "HALFLAP_KERNELS=plain to silence this",
        stacklevel=2,
    )


@contextmanager
def using(setting: str) -> Iterator[None]:
    """`use` for the length of a `with` block (tests and benchmarks)."""
    before = _setting
    use(setting)
    try:
        yield
    finally:
        use(before or os.environ.get("HALFLAP_KERNELS", "auto"))


def describe() -> dict[str, Any]:
    """For environment.json and `doctor`: the setting, the choice of each op, and the reason where it is plain.

    `gpu` holds the same of tensors on a GPU, where there is one.
    """
    native = native_is_on()
    built = build.load() if _setting != "plain" else None
    described = {
        "setting": _setting,
        "ops": dict.fromkeys(OPS, "native" if native else "plain"),
        "refused": {name: op.refused for name, op in OPS.items() if op.refused},
        "compiler": built.compiler if built else None,
        "library": str(built.path) if built and built.path else None,
        "reason": "" if native else ("chosen" if built is None else built.reason),
    }
    if torch.cuda.is_available():
        described["gpu"] = {"ops": names("cuda"), "reason": _missing_on_gpu() if _setting != "plain" else "chosen"}
    return described


def names(device: str) -> dict[str, str]:
    """By op, the form that tensors on a device of this type are given first: native, triton or plain."""
    if device == "cuda":
        triton = _setting_now() != "plain" and not _missing_on_gpu()
        return {name: "triton" if triton and op.triton else "plain" for name, op in OPS.items()}
    return dict.fromkeys(OPS, "native" if native_is_on() else "plain")


def native_is_on() -> bool:
    """Whether the C++ kernels are in use."""
    _setting_now()
    return bool(_native)


def triton_is_on() -> bool:
    """Whether tensors on a GPU get Triton's kernels; where they might and cannot, that is said once."""
    if _setting_now() == "plain":
        return False
    reason = _missing_on_gpu()
    if reason:
        _warn_of_gpu(reason)
    return not reason


def _setting_now() -> str:
    if _setting is None:
        use(os.environ.get("HALFLAP_KERNELS", "auto"))
    return str(_setting)


@cache
def _missing_on_gpu() -> str:
    """Why Triton's kernels cannot run; "" where they can."""
    if find_spec("triton") is None:
        return "triton is not installed"
    if build.find_compiler() is None:
        return "triton builds its launchers with a C compiler, and none is found"
    capability = torch.cuda.get_device_capability()
    if torch.version.hip is None and capability < LEAST_CAPABILITY:
        return f"compute capability {capability[0]}.{capability[1]} of the GPU is below 8.0"
    return ""


@cache
def _warn_of_gpu(reason: str) -> None:
    warnings.warn(
        f"running on plain PyTorch, slower on a GPU: {reason}; mend that (halflap[gpu] has triton), or set "
        "HALFLAP_KERNELS=plain to silence this",
        stacklevel=2,
    )
