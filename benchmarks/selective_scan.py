"""The selective scan at the shapes of a 50 M Hymba: forward, and forward with backward; milliseconds and peak memory.

Sides: `native`, the kernels; `plain`, the chunked form in PyTorch; `loop`, the recurrence one token at a time;
`transformers`, what its Mamba runs without CUDA kernels (its slow path). Of two parts: `scan` alone, which all get with
time steps after softplus, D and no gate, in the layout they like; `inner`, from the projected input to the gated
output (convolution, time steps, B and C with Jamba's norms, scan, gate), bfloat16 under autocast, against
transformers' JambaMambaMixer between its projections. Gradients are of everything. Memory is what a call adds to the
peak of a process of its own that has run it once on few tokens.
"""

from __future__ import annotations

import json
import resource
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from common import Report, arguments, interleave, run_apart, spread
from halflap.models.config import Mamba1Config
from halflap.models.context import SequenceContext
from halflap.models.mamba1 import Mamba1Inner
from halflap.ops import select
from halflap.ops import selective_scan as plain
from halflap.ops.native import selective_scan as native

SIDES = {"scan": ("native", "plain", "loop", "transformers"), "inner": ("native", "plain", "transformers")}
GOALS = {"forward": {"over_loop": 10, "over_transformers": 2}, "both": {"over_loop": 5, "over_transformers": 2}}
MEMORY_GOAL = 1.0  # native over transformers, at most

Output = Callable[[], tuple[Tensor, list[Tensor]]]  # of one call, and what to differentiate by


def scan_inputs(channels: int, states: int, time: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """u, dt, A, B, C, D as at the start of training: A_log = log(1..N), dt between 1e-3 and 1e-1."""
    g = torch.Generator().manual_seed(0)
    step = torch.exp(torch.empty(1, time, channels).uniform_(-6.9, -2.3, generator=g))
    rows = [torch.randn(1, time, width, generator=g).to(dtype) for width in (channels, states, states)]
    A = -torch.arange(1.0, states + 1).repeat(channels, 1)
    return {"u": rows[0], "dt": step.to(dtype), "A": A, "B": rows[1], "C": rows[2], "D": torch.ones(channels)}


def scan(side: str, channels: int, states: int, time: int, dtype: torch.dtype) -> Output:
    """The recurrence alone."""
    inputs = scan_inputs(channels, states, time, dtype)
    if side == "transformers":
        from transformers.models.mamba.modeling_mamba import mamba_selective_scan

        inputs = {k: v.transpose(1, 2).contiguous() if v.dim() == 3 else v for k, v in inputs.items()}
        inputs["hidden_states"] = inputs.pop("u")

        def function(**leaves: Tensor) -> Any:
            return mamba_selective_scan(**leaves, return_last_state=True)
    else:
        function = {
            "native": native.selective_scan,
            "plain": plain.selective_scan,
            "loop": plain.selective_recurrence,
        }[side]

    def run() -> tuple[Tensor, list[Tensor]]:
        leaves = {k: v.detach().requires_grad_() for k, v in inputs.items()}
        return function(**leaves)[0], list(leaves.values())

    return run


def inner(side: str, channels: int, states: int, time: int, dtype: torch.dtype) -> Output:
    """Convolution, time steps, B and C, scan and gate: a mixer between its two projections."""
    rank = channels // 32
    projected = torch.randn(1, time, 2 * channels, generator=torch.Generator().manual_seed(0)).to(dtype)
    context = SequenceContext(positions=torch.arange(time)[None])
    if side == "transformers":
        mixer = function = jamba_mixer(channels, states, rank)
    else:
        mixer = ours = Mamba1Inner(Mamba1Config(channels, states, rank))
        nn.init.uniform_(ours.dt_bias, -6.9, -2.3)
        ours.A_log.data.copy_(torch.arange(1.0, states + 1).log())

        def function(leaf: Tensor) -> Tensor:
            with select.using(side):
                return ours.mix(leaf, context)

    def run() -> tuple[Tensor, list[Tensor]]:
        leaf = projected.detach().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            return function(leaf), [leaf, *mixer.parameters()]

    return run


def jamba_mixer(channels: int, states: int, rank: int) -> nn.Module:
    """transformers' Mamba-1 mixer with norms, its projections taken out."""
    from transformers import JambaConfig
    from transformers.models.jamba.modeling_jamba import JambaMambaMixer

    config = JambaConfig(hidden_size=channels // 2, mamba_expand=2, mamba_d_state=states, mamba_dt_rank=rank)
    mixer: nn.Module = JambaMambaMixer(config, 0).eval()
    for name in ("in_proj", "out_proj"):
        setattr(mixer, name, nn.Identity())
    return mixer


def call(part: str, side: str, shape: tuple[int, int, int], dtype: torch.dtype, gradients: bool) -> Callable[[], None]:
    """A call of one side; with `gradients`, of all inputs and parameters for a gradient of ones."""
    output = {"scan": scan, "inner": inner}[part](side, *shape, dtype)

    def run() -> None:
        with torch.set_grad_enabled(gradients):
            y, leaves = output()
            if gradients:
                torch.autograd.grad(y, leaves, torch.ones_like(y))

    return run


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def measure(part: str, side: str, channels: str, states: str, time: str, dtype: str, what: str) -> dict[str, float]:
    """Bytes that one call adds to the peak; runs in a process of its own."""
    torch.set_num_threads(1)
    call(part, side, (int(channels), int(states), 64), getattr(torch, dtype), what == "both")()
    run = call(part, side, (int(channels), int(states), int(time)), getattr(torch, dtype), what == "both")
    before = peak()
    run()
    return {"bytes": max(peak() - before, 4096)}  # not less than a page


def compare(part: str, shape: tuple[int, int, int], dtype: str, what: str, repeats: int) -> dict[str, Any]:
    """A row: times and memory of all sides, and how ours compare with the others."""
    sides = {side: call(part, side, shape, getattr(torch, dtype), what == "both") for side in SIDES[part]}
    times = interleave(sides, repeats)
    taken = {side: spread([1 / (1000 * t) for t in times[side]]) for side in sides}
    sizes = [str(n) for n in shape]
    mib = {
        side: run_apart("selective_scan.py", "--measure", part, side, *sizes, dtype, what)["bytes"] / 2**20
        for side in sides
    }
    ours = taken["native"]["median"]
    return {
        **{f"{side}_ms": milliseconds for side, milliseconds in taken.items()},
        **{f"{side}_mib": size for side, size in mib.items()},
        **{f"over_{side}": taken[side]["median"] / ours for side in sides if side in ("loop", "transformers")},
        "memory_ratio": mib["native"] / mib["transformers"],
    }


def main() -> None:
    if sys.argv[1:2] == ["--measure"]:
        print(json.dumps(measure(*sys.argv[2:])))
        return
    quick = {"tokens": 128, "channels": 64, "states": 8}
    chosen = arguments(__doc__, quick, tokens=2048, channels=1024, states=16, dtypes=["float32", "bfloat16"])
    report = Report("selective_scan", chosen.out, chosen.threads)
    shape = chosen.channels, chosen.states, chosen.tokens
    report.add(channels=shape[0], states=shape[1], tokens=shape[2], goals=GOALS, memory_ratio_goal=MEMORY_GOAL)
    for part in SIDES:
        for dtype in chosen.dtypes:
            for what in GOALS:
                report.add(part=part, dtype=dtype, what=what, **compare(part, shape, dtype, what, chosen.repeats))
    report.write()


if __name__ == "__main__":
    main()
