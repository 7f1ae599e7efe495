"""Which implementation of an op runs: one table, one setting.

HALFLAP_KERNELS=auto (default) takes the C++ kernels where a compiler is found and says so, once, where none is;
`plain` is PyTorch alone; `native` refuses to run without the kernels. A kernel may decline an input (a dtype, a
device, a size it does not know); the plain form then runs and the refusal is counted. `linear`, `mamba2_step`,
`selective_step` and `attention` decline by nature (gradients, many rows, few queries) and are not counted.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch.nn import functional

from halflap.errors import HalflapError
from halflap.ops import activation, conv, mamba2, norm, quantized
from halflap.ops import attention as plain_attention
from halflap.ops import selective_scan as plain_scan
from halflap.ops.native import attention as native_attention
from halflap.ops.native import build, convolution, decode, elementwise
from halflap.ops.native import mamba2 as native_mamba2
from halflap.ops.native import quantized as native_quantized
from halflap.ops.native import selective_scan as native_scan

SETTINGS = ("auto", "plain", "native")


@dataclass
class Op:
    """A function with a plain form and a fast one that returns NotImplemented for what it does not take."""

    plain: Callable[..., Any]
    native: Callable[..., Any]
    counted: bool = True
    refused: int = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if native_is_on():
            result = self.native(*args, **kwargs)
            if result is not NotImplemented:
                return result
            self.refused += self.counted
        return self.plain(*args, **kwargs)


mamba2_mix = Op(mamba2.mamba2_mix, native_mamba2.mamba2_mix)
mamba2_step = Op(mamba2.mamba2_step, decode.mamba2_step, counted=False)
attention = Op(plain_attention.attention, native_attention.attention, counted=False)
conv_silu = Op(conv.conv_silu, convolution.conv_silu)
selective_scan = Op(plain_scan.selective_scan, native_scan.selective_scan)
selective_step = Op(plain_scan.selective_step, native_scan.selective_step, counted=False)
linear = Op(functional.linear, decode.linear, counted=False)
quantized_linear = Op(quantized.linear, native_quantized.linear)
rms_norm = Op(norm.rms_norm, elementwise.rms_norm)
squared_relu = Op(activation.squared_relu, elementwise.squared_relu)
swiglu = Op(activation.swiglu, elementwise.swiglu)

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
    """For environment.json and `doctor`: the setting, the choice of each op, and the reason where it is plain."""
    native = native_is_on()
    built = build.load() if _setting != "plain" else None
    return {
        "setting": _setting,
        "ops": dict.fromkeys(OPS, "native" if native else "plain"),
        "refused": {name: op.refused for name, op in OPS.items() if op.refused},
        "compiler": built.compiler if built else None,
        "library": str(built.path) if built and built.path else None,
        "reason": "" if native else ("chosen" if built is None else built.reason),
    }


def native_is_on() -> bool:
    """Whether the C++ kernels are in use."""
    if _native is None:
        use(os.environ.get("HALFLAP_KERNELS", "auto"))
    return bool(_native)
