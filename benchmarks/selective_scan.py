"""The selective scan at the shapes of a 50 M Hymba: forward, and forward with backward; milliseconds and peak memory.

Sides: `native`, the kernels; `plain`, the chunked form in PyTorch; `loop`, the recurrence one token at a time;
`transformers`, what its Mamba runs without CUDA kernels (its slow path). All get time steps after softplus, D and no
gate, in the layout they like, and gradients of everything. Memory is what a call adds to the peak of a process of its
own that has run it once on few tokens.
"""

from __future__ import annotations

import json
import resource
import sys
from collections.abc import Callable

import torch
from torch import Tensor

from common import Report, arguments, interleave, run_apart, spread
from halflap.ops import selective_scan as plain
from halflap.ops.native import selective_scan as native

SIDES = ("native", "plain", "loop", "transformers")
GOALS = {"forward": ("10 x the loop", "2 x transformers"), "both": ("5 x the loop", "2 x transformers")}


def scan_inputs(channels: int, states: int, time: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """u, dt, A, B, C, D as at the start of training: A_log = log(1..N), dt between 1e-3 and 1e-1."""
    g = torch.Generator().manual_seed(0)
    step = torch.exp(torch.empty(1, time, channels).uniform_(-6.9, -2.3, generator=g))
    rows = [torch.randn(1, time, width, generator=g).to(dtype) for width in (channels, states, states)]
    A = -torch.arange(1.0, states + 1).repeat(channels, 1)
    return {"u": rows[0], "dt": step.to(dtype), "A": A, "B": rows[1], "C": rows[2], "D": torch.ones(channels)}


def call(side: str, inputs: dict[str, Tensor], gradients: bool) -> Callable[[], None]:
    """A call of one side; with `gradients`, of all inputs for a gradient of ones."""
    if side == "transformers":
        from transformers.models.mamba.modeling_mamba import mamba_selective_scan

        theirs = {k: v.transpose(1, 2).contiguous() if v.dim() == 3 else v for k, v in inputs.items()}
        theirs["hidden_states"] = theirs.pop("u")
        inputs = theirs

        def scan(**leaves: Tensor) -> Tensor:
            return mamba_selective_scan(**leaves, return_last_state=True)[0]
    else:
        function = {
            "native": native.selective_scan,
            "plain": plain.selective_scan,
            "loop": plain.selective_recurrence,
        }[side]

        def scan(**leaves: Tensor) -> Tensor:
            return function(**leaves)[0]

    def run() -> None:
        if not gradients:
            with torch.no_grad():
                scan(**inputs)
            return
        leaves = {k: v.detach().requires_grad_() for k, v in inputs.items()}
        y = scan(**leaves)
        torch.autograd.grad(y, list(leaves.values()), torch.ones_like(y))

    return run


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def measure(side: str, channels: int, states: int, time: int, dtype: torch.dtype, gradients: bool) -> dict[str, float]:
    """Bytes that one call adds to the peak; runs in a process of its own."""
    torch.set_num_threads(1)
    call(side, scan_inputs(channels, states, 64, dtype), gradients)()
    run = call(side, scan_inputs(channels, states, time, dtype), gradients)
    before = peak()
    run()
    return {"bytes": max(peak() - before, 4096)}  # not less than a page


def main() -> None:
    if sys.argv[1:2] == ["--measure"]:
        side, channels, states, time, dtype, what = sys.argv[2:]
        found = measure(side, int(channels), int(states), int(time), getattr(torch, dtype), what == "both")
        print(json.dumps(found))
        return
    chosen = arguments(__doc__, tokens=2048, channels=1024, states=16, dtypes=["float32", "bfloat16"])
    report = Report("selective_scan", chosen.out, chosen.threads)
    for dtype in chosen.dtypes:
        inputs = scan_inputs(chosen.channels, chosen.states, chosen.tokens, getattr(torch, dtype))
        for what in GOALS:
            times = interleave({side: call(side, inputs, what == "both") for side in SIDES}, chosen.repeats)
            milliseconds = {side: spread([1 / (1000 * t) for t in times[side]]) for side in SIDES}
            shape = [str(n) for n in (chosen.channels, chosen.states, chosen.tokens)]
            mib = {
                f"{side}_mib": run_apart("selective_scan.py", "--measure", side, *shape, dtype, what)["bytes"] / 2**20
                for side in SIDES
            }
            report.add(
                dtype=dtype, what=what, **{f"{side}_ms": taken for side, taken in milliseconds.items()}, **mib,
                over_loop=milliseconds["loop"]["median"] / milliseconds["native"]["median"],
                over_transformers=milliseconds["transformers"]["median"] / milliseconds["native"]["median"],
                memory_ratio=mib["native_mib"] / mib["transformers_mib"], goals=GOALS[what],
            )  # fmt: skip
    report.write()


if __name__ == "__main__":
    main()
