"""Every Triton kernel compiles for GPUs that are not there: triton brings its own assembler.

The interpreter takes what the compiler refuses, and knows no limits of shared memory. Run as a script, this file calls
the forms with a driver that says which GPU it is and a launch that compiles only; it prints what each kernel takes.
"""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest

SHARED_BYTES = {80: 163 << 10, 86: 99 << 10, 90: 227 << 10}  # of a block, by compute capability


@pytest.mark.slow
@pytest.mark.parametrize("capability", SHARED_BYTES)
def test_kernels_compile(capability: int, tmp_path: Path) -> None:
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    words = [sys.executable, __file__, str(capability)]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]


def main(capability: int) -> None:
    import torch
    from triton.backends.compiler import GPUTarget  # pyright: ignore[reportMissingImports]
    from triton.runtime import driver  # pyright: ignore[reportMissingImports]
    from triton.runtime.jit import JITFunction  # pyright: ignore[reportMissingImports]

    class Absent:
        """A driver without a GPU."""

        def get_current_target(self) -> Any:
            return GPUTarget("cuda", capability, 32)

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int) -> int:
            return 0

    def launch(function: Any, grid: Any) -> Any:
        return partial(compile_only, function, grid)

    def compile_only(function: Any, grid: Any, *args: Any, **kwargs: Any) -> None:
        kernel = function.run(*args, grid=grid, warmup=True, **kwargs)
        shared = kernel.metadata.shared
        print(f"{function.__name__:12} shared {shared:7,} bytes, {kernel.metadata.num_warps} warps", flush=True)
        assert shared <= SHARED_BYTES[capability], f"{function.__name__} wants {shared:,} bytes of shared memory"

    driver.set_active(Absent())
    JITFunction.__getitem__ = launch
    for dtype in (torch.float32, torch.bfloat16):
        print(f"compute capability {capability}, {dtype}", flush=True)
        call_all(dtype)


def call_all(dtype: Any) -> None:
    """Every kernel with published sizes; what comes out is not computed."""
    import torch

    from halflap.models.config import Mamba2Config
    from halflap.ops import triton_conv, triton_quantized, triton_selective_scan

    def make(*shape: int, kind: Any = dtype) -> Any:
        return torch.zeros(shape, dtype=kind)

    for size in (64, 128, 256):
        call_mamba2(make, Mamba2Config(num_heads=16, head_dim=64, num_groups=2, state_size=size))
    with torch.no_grad():
        triton_conv.conv_silu(make(2, 300, 64), make(64, 3), None)
        rows, B = make(2, 96), make(2, 16)
        rate, held = make(96, 16, kind=torch.float32), make(2, 96, 16, kind=torch.float32)
        triton_selective_scan.selective_step(rows, rows, rate, B, B, make(96), held, dt_bias=make(96), gate=rows)
        triton_selective_scan.selective_step(rows, rows, rate, B, B, None, held)
        for count in (1, 3, 16, 64, 100):
            for bits in (4, 8):
                packed, scale = make(96, 1024 * bits // 32, kind=torch.int32), make(96, 16, kind=torch.bfloat16)
                triton_quantized.linear(make(count, 1024), packed, scale, bits, 64)
            packed, scale = make(96, 1024, kind=torch.float8_e4m3fn), make(96, 1, kind=torch.bfloat16)
            triton_quantized.linear(make(count, 1024), packed, scale, 8, 1024)


def call_mamba2(make: Any, c: Any) -> None:
    import torch

    from halflap.ops import triton_mamba2

    heads = [make(c.num_heads) for _ in range(3)]
    conv = (make(c.conv_size, 1, 4), make(c.conv_size))
    states = (make(2, 3, c.conv_size), make(2, c.num_heads, c.head_dim, c.state_size, kind=torch.float32))
    width = c.inner_size + c.conv_size + c.num_heads
    runs, lengths = make(2, 300, kind=torch.int64), make(2, kind=torch.int64)
    with torch.no_grad():
        triton_mamba2.mamba2_step(make(2, width), *conv, *heads, make(c.inner_size), c, *states)
        whole = make(2, 300, width)
        triton_mamba2.mamba2_mix(whole, *conv, *heads, make(c.inner_size), c)
        triton_mamba2.mamba2_mix(
            whole, *conv, *heads, make(c.inner_size), c,
            conv_state=states[0], ssm_state=states[1], runs=runs, lengths=lengths,
        )  # fmt: skip


if __name__ == "__main__":
    main(int(sys.argv[1]))
