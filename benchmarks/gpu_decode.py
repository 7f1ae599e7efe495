"""Triton's kernels and CUDA graphs on the GPU at hand: are they the plain forms, and how long do both take?

python benchmarks/gpu_decode.py            two or three minutes; the status is 1 when a kernel is wrong
python benchmarks/gpu_decode.py --check    the comparisons alone

Each kernel is compared, at the sizes of an 8 B Nemotron-H, with its plain form in float64; then both are timed in
bfloat16. Then a model of random weights reads a prompt and decodes: plain, with the kernels, with them in a graph.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from halflap.models.cache import Cache
from halflap.models.config import Mamba2Config
from halflap.models.decoder import Decoder
from halflap.models.model import HybridModel, initialize
from halflap.models.presets import preset
from halflap.ops import quantized, select

# Relative errors in the 2-norm. float32: products of three TensorFloat-32 products, sums of up to 4096 terms. bfloat16:
# operands and results are rounded at 2^-9, several times over.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2}
MAMBA = Mamba2Config(num_heads=128, head_dim=64, num_groups=8, state_size=128)
REPEATS = 20
Case = tuple[str, str, Callable[[torch.dtype], tuple[tuple[Any, ...], dict[str, Any]]]]  # op, which, its arguments


def normal(*shape: int) -> Tensor:
    """Numbers that bfloat16 has."""
    return torch.randn(*shape, device="cuda").bfloat16().float()


def cases() -> Iterator[Case]:
    c = MAMBA
    width, wide = c.inner_size + c.conv_size + c.num_heads, torch.float32
    parameters = [
        0.5 * normal(c.conv_size, 1, c.conv_kernel), 0.5 * normal(c.conv_size), normal(c.num_heads) - 3,
        0.5 * normal(c.num_heads), normal(c.num_heads), 1 + 0.125 * normal(c.inner_size),
    ]  # fmt: skip

    def step(batch: int) -> Case:
        projected, conv = normal(batch, width), normal(batch, c.conv_kernel - 1, c.conv_size)
        ssm = normal(batch, c.num_heads, c.head_dim, c.state_size)

        def arguments(dtype: torch.dtype) -> tuple[tuple[Any, ...], dict[str, Any]]:
            kept = torch.promote_types(dtype, wide)
            states = conv.to(dtype, copy=True), ssm.to(kept, copy=True)
            return (projected.to(dtype), *(p.to(kept) for p in parameters), c, *states), {}

        return "mamba2_step", f"batch {batch}", arguments

    def mix(batch: int, time: int, packed: bool) -> Case:
        projected, ssm = normal(batch, time, width), normal(batch, c.num_heads, c.head_dim, c.state_size)
        runs = (torch.rand(batch, time, device="cuda") < 0.01).long().cumsum(1) if packed else None
        lengths = torch.randint(1, time + 1, (batch,), device="cuda") if packed else None

        def arguments(dtype: torch.dtype) -> tuple[tuple[Any, ...], dict[str, Any]]:
            kept = torch.promote_types(dtype, wide)
            how = {"ssm_state": ssm.to(kept), "runs": runs, "lengths": lengths}
            return (projected.to(dtype), *(p.to(kept) for p in parameters), c), how

        return "mamba2_mix", f"{batch} x {time}{' packed' if packed else ''}", arguments

    def packed_linear(rows: int, form: str) -> Case:
        weight, bits, group = normal(4096, 4096), 4 if form == "int4" else 8, 4096 if form == "fp8" else 64
        packed, scale = quantized.to_e4m3(weight) if form == "fp8" else quantized.quantize(weight, bits, group)
        x = normal(rows, 4096)
        return (
            "quantized_linear",
            f"{rows} rows, {form}",
            lambda dtype: ((x.to(dtype), packed, scale, bits, group), {}),
        )

    def selective(batch: int) -> Case:
        inner, size = 3200, 16
        rows = [normal(batch, inner), normal(batch, inner), normal(batch, size), normal(batch, size)]
        rate, skip, bias = -normal(inner, size).abs(), normal(inner), normal(inner) - 3
        state, gate = normal(batch, inner, size), normal(batch, inner)

        def arguments(dtype: torch.dtype) -> tuple[tuple[Any, ...], dict[str, Any]]:
            kept = torch.promote_types(dtype, wide)
            u, dt, B, C = (row.to(dtype) for row in rows)
            held, how = state.to(kept, copy=True), {"dt_bias": bias.to(kept), "gate": gate.to(dtype)}
            return (u, dt, rate.to(kept), B, C, skip.to(kept), held), how

        return "selective_step", f"batch {batch}", arguments

    def convolution(batch: int, time: int) -> Case:
        x, weight, bias = normal(batch, time, 3200), normal(3200, 4), normal(3200)
        state = normal(batch, 3, 3200)

        def arguments(dtype: torch.dtype) -> tuple[tuple[Any, ...], dict[str, Any]]:
            kept = torch.promote_types(dtype, wide)
            return (x.to(dtype), weight.to(kept), bias.to(kept)), {"initial_state": state.to(dtype)}

        return "conv_silu", f"{batch} x {time}", arguments

    yield from (step(1), step(16), mix(1, 2000, False), mix(2, 700, True), selective(1), selective(16))
    yield from (packed_linear(rows, form) for rows in (1, 4, 16, 64, 500) for form in ("int4", "int8", "fp8"))
    yield convolution(2, 1000)


def tensors(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


def error(wanted: Tensor, found: Tensor) -> float:
    return float((wanted.double() - found.double()).norm() / wanted.double().norm().clamp_min(1e-30))


@torch.no_grad()
def check() -> bool:
    """Each kernel against its plain form in float64; whether all agree."""
    right = True
    for name, which, arguments in cases():
        op = select.OPS[name]
        given, how = arguments(torch.float64)
        wanted = tensors(op.plain(*given, **how))
        for dtype, limit in TOLERANCE.items():
            given, how = arguments(dtype)
            plain = tensors(op.plain(*given, **how))
            given, how = arguments(dtype)
            refused = op.refused
            found = tensors(op(*given, **how))
            limits = [limit + 4 * error(w, p) for w, p in zip(wanted, plain)]
            errors = [error(w, f) for w, f in zip(wanted, found)]
            agrees = all(e < most for e, most in zip(errors, limits)) and op.refused == refused
            right &= agrees
            said = " ".join(f"{e:.1e}" for e in errors)
            print(f"{'agrees' if agrees else 'WRONG '}  {name:17} {which:18} {str(dtype)[6:]:9} {said}", flush=True)
    return right


def microseconds(run: Callable[[], Any]) -> float:
    """Median of a call's time on the GPU, launches included."""
    for _ in range(3):
        run()
    times = []
    for _ in range(REPEATS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(1000 * start.elapsed_time(end))
    return statistics.median(times)


@torch.no_grad()
def time_kernels() -> list[dict[str, Any]]:
    found = []
    for name, which, arguments in cases():
        op, (given, how) = select.OPS[name], arguments(torch.bfloat16)
        row: dict[str, Any] = {"op": name, "case": which}
        for setting in ("plain", "auto"):
            with select.using(setting):
                row["plain" if setting == "plain" else "triton"] = microseconds(partial(op, *given, **how))
        found.append(row)
        ratio = row["plain"] / row["triton"]
        print(
            f"{name:17} {which:18} plain {row['plain']:8.0f} us  triton {row['triton']:8.0f} us  {ratio:5.1f}x",
            flush=True,
        )
    return found


@torch.inference_mode()
def time_model(name: str, batch: int, prompt: int, steps: int) -> list[dict[str, Any]]:
    """Milliseconds of reading a prompt and of a token, in three ways."""
    model = HybridModel(preset(name))
    initialize(model, 0)
    model = model.to("cuda", torch.bfloat16).eval()
    text = torch.randint(0, model.config.vocab_size, (batch, prompt), device="cuda")
    found = []
    for way, setting, graphs in (("plain", "plain", "0"), ("triton", "auto", "0"), ("triton, graph", "auto", "1")):
        os.environ["HALFLAP_CUDA_GRAPHS"] = graphs
        with select.using(setting):
            started = Cache.create(model.config, batch, prompt + steps + 8, torch.bfloat16, "cuda")
            model(text, cache=started)
            read = microseconds(lambda: model(text, cache=fresh(model, text, steps))) / 1000
            decode, token = Decoder(model), text[:, -1:]
            for _ in range(4):
                decode(token, cache=started)
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(steps):
                token = decode(token, cache=started)[:, -1].argmax(-1, keepdim=True)
            end.record()
            end.synchronize()
        row = {"model": name, "batch": batch, "prompt": prompt, "way": way, "prefill_ms": read}
        row["step_ms"] = start.elapsed_time(end) / steps
        found.append(row)
        print(
            f"{name} batch {batch:3}  {way:14} prompt of {prompt}: {read:8.2f} ms   token {row['step_ms']:7.3f} ms",
            flush=True,
        )
    return found


def fresh(model: HybridModel, text: Tensor, steps: int) -> Cache:
    return Cache.create(model.config, len(text), text.shape[1] + steps, torch.bfloat16, "cuda")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare only")
    parser.add_argument("--model", default="nemotron-h-205m", help="preset of the model that is timed")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--prompt", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results", help="directory for the JSON file"
    )
    chosen = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit(
            "this needs a GPU that PyTorch can use, and there is none: the kernels are tested without one in tests/unit"
        )
    torch.manual_seed(0)
    print(
        torch.cuda.get_device_name(), torch.__version__, select.describe()["gpu"]["reason"] or "with triton", flush=True
    )
    right = check()
    if not chosen.check:
        kernels = time_kernels()
        models = [
            row for batch in chosen.batches for row in time_model(chosen.model, batch, chosen.prompt, chosen.steps)
        ]
        result = {
            "name": "gpu_decode", "gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "agrees": right,
            "kernels_us": kernels, "models": models,
        }  # fmt: skip
        chosen.out.mkdir(parents=True, exist_ok=True)
        (chosen.out / "gpu_decode.json").write_text(json.dumps(result, indent=1) + "\n")
    sys.exit(not right)


if __name__ == "__main__":
    main()
