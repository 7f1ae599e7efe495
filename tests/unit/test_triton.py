"""The Triton kernels against the plain forms in float64, in triton's interpreter where there is no GPU.

Tolerances are relative errors in the 2-norm. float32: sums of a few hundred terms, each rounded at 6e-8. Narrow types:
operands are rounded at 2^-9 = 2e-3 (float16 at 2^-11) before every product, and errors of several roundings add. Where
the terms of a sum cancel, a few times the error of the plain form in the same dtype is allowed on top.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from halflap.models.config import Mamba2Config
from halflap.ops import conv, mamba2, quantized, selective_scan
from halflap.ops.ssd import segment_runs

pytest.importorskip("triton")

from halflap.ops import triton_conv, triton_mamba2, triton_quantized, triton_selective_scan, triton_ssd

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NARROW = torch.bfloat16 if DEVICE == "cuda" else torch.float16  # triton's interpreter has no products of bfloat16
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 1e-2, torch.float16: 3e-3}
DTYPES = st.sampled_from([torch.float32, NARROW])
STATES = ("conv_state", "ssm_state")
quick = settings(max_examples=6)


def error(expected: Tensor, found: Tensor) -> float:
    difference = (expected - found.cpu().double()).detach().norm()
    return float(difference / expected.detach().norm().clamp_min(1e-30))


def normal(generator: torch.Generator, *shape: int) -> Tensor:
    """Numbers that bfloat16 has, so that what is compared is given the same."""
    return torch.randn(*shape, generator=generator, dtype=torch.float64).bfloat16().double()


def mixer(seed: int, c: Mamba2Config, batch: int, *time: int) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {
        "projected": normal(g, batch, *time, c.inner_size + c.conv_size + c.num_heads),
        "conv_weight": 0.5 * normal(g, c.conv_size, 1, c.conv_kernel),
        "conv_bias": 0.5 * normal(g, c.conv_size),
        "dt_bias": 3 * normal(g, c.num_heads) - 1,
        "A_log": 0.5 * normal(g, c.num_heads),
        "D": normal(g, c.num_heads),
        "norm_weight": 1 + 0.125 * normal(g, c.inner_size),
        "conv_state": normal(g, batch, c.conv_kernel - 1, c.conv_size),
        "ssm_state": normal(g, batch, c.num_heads, c.head_dim, c.state_size),
    }


def typed(inputs: dict[str, Tensor], dtype: torch.dtype, device: str = "cpu") -> dict[str, Tensor]:
    """Activations in `dtype`, parameters and states in float32 or wider."""
    wide = torch.promote_types(dtype, torch.float32)
    narrow = ("projected", "conv_state")
    return {name: t.to(device, dtype if name in narrow else wide, copy=True) for name, t in inputs.items()}


@quick
@given(
    seed=st.integers(0, 10**6), batch=st.integers(1, 3), groups=st.integers(1, 3), per_group=st.integers(1, 3),
    channels=st.sampled_from([1, 5, 8]), size=st.sampled_from([1, 7, 16]), width=st.integers(2, 4),
    limits=st.sampled_from([(0.0, float("inf")), (0.01, 0.5)]), bias=st.booleans(), dtype=DTYPES,
)  # fmt: skip
def test_one_token_of_mamba2(
    seed: int, batch: int, groups: int, per_group: int, channels: int, size: int, width: int,
    limits: tuple[float, float], bias: bool, dtype: torch.dtype,
) -> None:  # fmt: skip
    c = Mamba2Config(groups * per_group, channels, groups, size, width, time_step_limit=limits)
    inputs = mixer(seed, c, batch)

    def run(step: Any, dtype: torch.dtype, device: str = "cpu") -> tuple[Tensor, ...]:
        given = typed(inputs, dtype, device)
        states = [given.pop(name) for name in STATES]
        given["conv_bias"] = given["conv_bias"] if bias else None  # type: ignore[assignment]
        with torch.no_grad():
            out = step(*given.values(), c, *states)
        if step is triton_mamba2.mamba2_step:
            assert out[1] is states[0] and out[2] is states[1], "states advance in place"
        return out

    expected = run(mamba2.mamba2_step, torch.float64)
    found, plain = run(triton_mamba2.mamba2_step, dtype, DEVICE), run(mamba2.mamba2_step, dtype)
    assert torch.equal(found[1].cpu(), plain[1]) and found[0].dtype == dtype
    for wanted, got, same in zip(expected, found, plain):
        assert error(wanted, got) < TOLERANCE[torch.float32 if got.dtype == torch.float32 else dtype] + 4 * error(
            wanted, same
        )


def mixed(mix: Any, inputs: dict[str, Tensor], c: Mamba2Config, dtype: torch.dtype, **extra: Any) -> dict[str, Tensor]:
    """Outputs and gradients."""
    device = DEVICE if mix is triton_mamba2.mamba2_mix else "cpu"
    given = typed(inputs, dtype, device)
    leaves = {name: t.requires_grad_() for name, t in given.items() if name != "conv_state"}
    states = {name: given.pop(name) for name in STATES if name in given}
    extra = {name: None if value is None else value.to(device) for name, value in extra.items()}
    out, final = mix(*given.values(), c, **states, **extra)
    g = torch.Generator().manual_seed(0)
    probes = [normal(g, *t.shape).to(device, t.dtype) for t in (out, final)]
    gradients = torch.autograd.grad((out, final), list(leaves.values()), probes)
    return {"out": out, "final": final, **{f"d {name}": g for name, g in zip(leaves, gradients)}}


@quick
@given(
    seed=st.integers(0, 10**6), batch=st.integers(1, 2), time=st.sampled_from([1, 16, 33, 50]),
    groups=st.integers(1, 2), per_group=st.integers(1, 2), channels=st.sampled_from([3, 16, 20]),
    size=st.sampled_from([1, 7, 17]), width=st.integers(2, 4), packed=st.booleans(), started=st.booleans(),
    padded=st.booleans(), dtype=DTYPES,
)  # fmt: skip
@example(
    seed=1, batch=2, time=150, groups=1, per_group=2, channels=3, size=7, width=4, packed=True, started=True,
    padded=True, dtype=torch.float32,
)  # fmt: skip
def test_a_sequence_of_mamba2(
    seed: int, batch: int, time: int, groups: int, per_group: int, channels: int, size: int, width: int,
    packed: bool, started: bool, padded: bool, dtype: torch.dtype,
) -> None:  # fmt: skip
    c = Mamba2Config(groups * per_group, channels, groups, size, width, chunk_size=16)
    inputs, g = mixer(seed, c, batch, time), torch.Generator().manual_seed(seed)
    if not started:
        inputs = {name: t for name, t in inputs.items() if name not in STATES}
    runs = segment_runs((torch.rand(batch, time, generator=g) < 0.1).long().cumsum(1)) if packed else None
    lengths = torch.randint(0, time + 1, (batch,), generator=g) if padded else None
    how = {"runs": runs, "lengths": lengths}
    expected = mixed(mamba2.mamba2_mix, inputs, c, torch.float64, **how)
    found = mixed(triton_mamba2.mamba2_mix, inputs, c, dtype, **how)
    plain = mixed(mamba2.mamba2_mix, inputs, c, dtype, **how)
    for name, value in expected.items():
        limit = TOLERANCE[dtype] + 8 * error(value, plain[name])
        assert error(value, found[name]) < limit, f"{name}: {error(value, found[name]):.1e}"


@pytest.mark.parametrize(("chunk", "tile"), [(16, 16), (32, 16), (64, 32)])
@pytest.mark.parametrize("packed", [False, True])
def test_any_chunk_and_tile_give_the_same(chunk: int, tile: int, packed: bool) -> None:
    c, time = Mamba2Config(4, 5, 2, 6), 75
    inputs, g = mixer(3, c, 2, time), torch.Generator().manual_seed(3)
    runs = segment_runs((torch.rand(2, time, generator=g) < 0.05).long().cumsum(1)) if packed else None
    given = typed(inputs, torch.float32, DEVICE)
    xBC = given["projected"][..., c.inner_size : c.inner_size + c.conv_size]
    moved = None if runs is None else runs.to(DEVICE)
    convolved = triton_conv.convolved(xBC, given["conv_weight"][:, 0], None, None, moved)
    y, final = triton_ssd.scan(
        given["projected"], convolved, given["dt_bias"], given["A_log"], given["D"], c,
        initial_state=given["ssm_state"], runs=moved, chunk=chunk, tile=tile,
    )  # fmt: skip
    step = mamba2.time_step(inputs["projected"][..., -c.num_heads :], inputs["dt_bias"], c)
    xs, B, C = mamba2._split(convolved.cpu().double(), c)
    wanted, state = mamba2.ssd_chunked(
        xs, step, -inputs["A_log"].exp(), B, C, inputs["D"], initial_state=inputs["ssm_state"], runs=runs
    )
    assert error(wanted.flatten(2), y) < TOLERANCE[torch.float32] and error(state, final) < TOLERANCE[torch.float32]


@quick
@given(
    seed=st.integers(0, 10**6), batch=st.integers(1, 2), time=st.sampled_from([1, 2, 17, 40]),
    channels=st.sampled_from([1, 40, 130]), width=st.integers(2, 4), start=st.sampled_from([0, 3]),
    packed=st.booleans(), started=st.booleans(), dtype=DTYPES,
)  # fmt: skip
def test_convolution(
    seed: int, batch: int, time: int, channels: int, width: int, start: int, packed: bool, started: bool,
    dtype: torch.dtype,
) -> None:  # fmt: skip
    g = torch.Generator().manual_seed(seed)
    x, weight, bias = normal(g, batch, time, start + channels), normal(g, channels, width), normal(g, channels)
    state = normal(g, batch, width - 1, channels) if started else None
    runs = segment_runs((torch.rand(batch, time, generator=g) < 0.2).long().cumsum(1)) if packed else None

    def run(function: Any, dtype: torch.dtype, device: str = "cpu") -> list[Tensor]:
        wide = torch.promote_types(dtype, torch.float32)
        leaves = [t.to(device, kind).requires_grad_() for t, kind in ((x, dtype), (weight, wide), (bias, wide))]
        held = None if state is None else state.to(device, dtype)
        number = None if runs is None else runs.to(device)
        y = function(leaves[0][..., start:], *leaves[1:], initial_state=held, runs=number)
        probe = normal(torch.Generator().manual_seed(0), *y.shape).to(device, y.dtype)
        return [y, *torch.autograd.grad(y, leaves, probe)]

    plain = run(conv.conv_silu, dtype)
    for wanted, found, same in zip(
        run(conv.conv_silu, torch.float64), run(triton_conv.conv_silu, dtype, DEVICE), plain
    ):
        assert error(wanted, found) < TOLERANCE[dtype] + 8 * error(wanted, same)


@quick
@given(
    seed=st.integers(0, 10**6), batch=st.integers(1, 3), channels=st.sampled_from([1, 5, 70]),
    size=st.sampled_from([1, 5, 16]), gated=st.booleans(), biased=st.booleans(), skips=st.booleans(), dtype=DTYPES,
)  # fmt: skip
def test_one_token_of_mamba1(
    seed: int, batch: int, channels: int, size: int, gated: bool, biased: bool, skips: bool, dtype: torch.dtype
) -> None:
    g = torch.Generator().manual_seed(seed)
    u, dt, gate = (normal(g, batch, channels) for _ in range(3))
    dt = dt if biased else dt.abs()
    A, B, C = -normal(g, channels, size).abs(), normal(g, batch, size + 2)[:, 2:], normal(g, batch, size)
    D, bias, state = normal(g, channels), normal(g, channels), normal(g, batch, channels, size)

    def run(step: Any, dtype: torch.dtype, device: str = "cpu") -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(dtype, torch.float32)
        rows = [t.to(device, dtype) for t in (u, dt, B, C, gate)]
        rate, skip, offset, held = (t.to(device, wide, copy=True) for t in (A, D, bias, state))
        with torch.no_grad():
            y, new = step(
                rows[0], rows[1], rate, rows[2], rows[3], skip if skips else None, held,
                dt_bias=offset if biased else None, gate=rows[4] if gated else None,
            )  # fmt: skip
        assert new is held or step is selective_scan.selective_step
        return y, new

    found = run(triton_selective_scan.selective_step, dtype, DEVICE)
    plain = run(selective_scan.selective_step, dtype)
    for wanted, got, same in zip(run(selective_scan.selective_step, torch.float64), found, plain):
        assert error(wanted, got) < TOLERANCE[dtype] + 4 * error(wanted, same)


@quick
@given(
    rows=st.sampled_from([1, 2, 3, 4, 5, 17, 70]), outputs=st.sampled_from([1, 33, 50]),
    inputs=st.sampled_from([1, 31, 130, 300]), bits=st.sampled_from([4, 8]),
    group=st.sampled_from([32, 64, None]), dtype=DTYPES, seed=st.integers(0, 1000),
)  # fmt: skip
@example(rows=3, outputs=50, inputs=300, bits=4, group=32, dtype=torch.float32, seed=0)
@example(rows=17, outputs=50, inputs=300, bits=8, group=64, dtype=torch.float32, seed=1)
@example(rows=70, outputs=33, inputs=130, bits=4, group=32, dtype=torch.float32, seed=2)
def test_packed_linear(
    rows: int, outputs: int, inputs: int, bits: int, group: int | None, dtype: torch.dtype, seed: int
) -> None:
    group = group or inputs
    g = torch.Generator().manual_seed(seed)
    packed, scale = quantized.quantize(normal(g, outputs, inputs).float(), bits, group)
    x = normal(g, rows, inputs)
    y = triton_quantized.linear(x.to(DEVICE, dtype), packed.to(DEVICE), scale.to(DEVICE), bits, group)
    assert y.dtype == dtype
    weight = quantized.dequantize(packed, scale, bits, group, inputs).double()
    # of the sum of the products' sizes; weights and results are rounded too
    limit = TOLERANCE[dtype] * (x.abs() @ weight.abs().T)
    assert bool(((y.cpu().double() - x @ weight.T).abs() <= limit + 1e-12).all())


@quick
@given(
    rows=st.sampled_from([1, 3, 17, 70]), outputs=st.sampled_from([1, 33]), inputs=st.sampled_from([4, 32, 300]),
    dtype=DTYPES, seed=st.integers(0, 1000),
)  # fmt: skip
@example(rows=3, outputs=33, inputs=300, dtype=torch.float32, seed=0)
@example(rows=17, outputs=33, inputs=300, dtype=torch.float32, seed=1)
@example(rows=70, outputs=33, inputs=32, dtype=torch.float32, seed=2)
def test_linear_by_floats_of_8_bits(rows: int, outputs: int, inputs: int, dtype: torch.dtype, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    packed, scale = quantized.to_e4m3(normal(g, outputs, inputs) * 10 ** normal(g, inputs))  # some are subnormal
    x = normal(g, rows, inputs)
    y = triton_quantized.linear(x.to(DEVICE, dtype), packed.to(DEVICE), scale.to(DEVICE), 8, inputs)
    assert y.dtype == dtype
    weight = quantized.dequantize(packed, scale, 8, inputs, inputs).double()
    limit = TOLERANCE[dtype] * (x.abs() @ weight.abs().T)
    assert bool(((y.cpu().double() - x @ weight.T).abs() <= limit + 1e-12).all())


def test_time_steps_are_exact_when_small() -> None:
    """softplus of very negative numbers, where 1 + exp(x) has lost them."""
    c = Mamba2Config(6, 1, 1, 1)
    inputs = mixer(0, c, 1)
    inputs["projected"][..., -6:] = 0
    inputs["dt_bias"] = torch.tensor([-30.0, -17.5, -12.0, 0.0, 19.5, 25.0], dtype=torch.float64)
    inputs["ssm_state"].zero_()
    for name, t in typed(inputs, torch.float32, DEVICE).items():
        inputs[name] = t
    states = [inputs.pop(name) for name in STATES]
    wide = [t.cpu().double() for t in inputs.values()]
    with torch.no_grad():
        wanted = mamba2.mamba2_step(*wide, c, *(t.cpu().double() for t in states))[2]
        found = triton_mamba2.mamba2_step(*inputs.values(), c, *states)[2]
    torch.testing.assert_close(found.cpu().double(), wanted, rtol=2e-6, atol=0)


def test_what_the_kernels_decline() -> None:
    c = Mamba2Config(2, 4, 1, 3)
    given = typed(mixer(0, c, 1), torch.float32, DEVICE)
    states = [given.pop(name) for name in STATES]
    assert triton_mamba2.mamba2_step(*given.values(), c, *states) is NotImplemented  # gradients
    with torch.no_grad():
        assert triton_mamba2.mamba2_step(*given.values(), c, states[0], states[1].double()) is NotImplemented
        assert triton_mamba2.mamba2_step(*given.values(), c, states[0][:, :-1], states[1]) is NotImplemented
    wide = typed(mixer(0, c, 1, 5), torch.float64, DEVICE)
    for name in STATES:
        wide.pop(name)
    assert triton_mamba2.mamba2_mix(*wide.values(), c) is NotImplemented
    x = torch.zeros(1, 64, device=DEVICE)
    packed, scale = (t.to(DEVICE) for t in quantized.quantize(torch.randn(3, 64), 4, 32))
    assert triton_quantized.linear(x.double(), packed, scale, 4, 32) is NotImplemented
    uneven, one = (t.to(DEVICE) for t in quantized.to_e4m3(torch.ones(3, 30)))
    assert triton_quantized.linear(x[:, :30].contiguous(), uneven, one, 8, 30) is NotImplemented
    assert triton_quantized.linear(x.requires_grad_(), packed, scale, 4, 32) is NotImplemented
