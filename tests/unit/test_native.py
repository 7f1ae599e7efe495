"""The C++ kernels against the plain forms in float64: values and every gradient, odd sizes, packing, states, threads.

Tolerances are relative errors in the 2-norm. float32: sums of a few hundred terms, each rounded at 6e-8; gradients of
dt_bias and A add differences that cancel, hence one digit more. bfloat16: operands are rounded at 2^-9 = 2e-3 before
every product (as GPU kernels do), and errors of several roundings add. Where a case is badly conditioned, as a lone
head's D is when the norm cancels what it changes, a few times as much is allowed on top as the plain form in the same
dtype errs, or as the exact result moves when every input does by a float32 rounding: either alone may be small by luck.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from halflap.errors import HalflapError
from halflap.models.config import Mamba2Config
from halflap.ops import activation, mamba2, norm, select
from halflap.ops.native import build, decode, elementwise
from halflap.ops.native import mamba2 as native
from halflap.ops.ssd import segment_runs

pytestmark = pytest.mark.skipif(build.load().library is None, reason=f"no kernels: {build.load().reason}")
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-2}
CANCELLING = {torch.float32: 2e-5, torch.bfloat16: 2e-2}  # of dt_bias and A_log


def error(expected: Tensor, found: Tensor) -> float:
    return float((expected - found.double()).detach().norm() / expected.detach().norm().clamp_min(1e-30))


def mixer_inputs(seed: int, config: Mamba2Config, batch: int, time: int) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    c = config
    return {
        "projected": normal(batch, time, c.inner_size + c.conv_size + c.num_heads).bfloat16().double(),
        "conv_weight": 0.5 * normal(c.conv_size, 1, c.conv_kernel),
        "conv_bias": 0.5 * normal(c.conv_size),
        "dt_bias": normal(c.num_heads) - 1,
        "A_log": 0.5 * normal(c.num_heads),
        "D": normal(c.num_heads),
        "norm_weight": 1 + 0.1 * normal(c.inner_size),
        "ssm_state": normal(batch, c.num_heads, c.head_dim, c.state_size),
        "conv_state": normal(batch, c.conv_kernel - 1, c.conv_size).bfloat16().double(),
    }


def run_mixer(mix, inputs: dict[str, Tensor], config: Mamba2Config, dtype: torch.dtype, **extra) -> dict[str, Tensor]:
    """Outputs and gradients; activations in `dtype`, parameters and states in float32 or wider."""
    wide = torch.promote_types(dtype, torch.float32)
    typed = {k: v.to(dtype if k in ("projected", "conv_state") else wide) for k, v in inputs.items()}
    leaves = {k: v.requires_grad_() for k, v in typed.items() if k != "conv_state"}
    states = {k: typed.pop(k) for k in ("ssm_state", "conv_state") if k in typed}
    out, final = mix(*typed.values(), config, **states, **extra)
    g = torch.Generator().manual_seed(0)
    probes = [torch.randn(t.shape, generator=g, dtype=torch.float64) for t in (out, final)]
    loss = sum((t * p.to(wide)).sum() for t, p in zip((out, final), probes))
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    return {"out": out, "final": final, **{f"d {name}": g for name, g in zip(leaves, gradients)}}


def moved(inputs: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {k: v * (1 + 6e-8 * torch.randn(v.shape, generator=g, dtype=v.dtype)) for k, v in inputs.items()}


def check_mixer(config: Mamba2Config, inputs: dict[str, Tensor], dtype: torch.dtype, **extra) -> None:
    expected = run_mixer(mamba2.mamba2_mix, inputs, config, torch.float64, **extra)
    found = run_mixer(native.mamba2_mix, inputs, config, dtype, **extra)
    near = [run_mixer(mamba2.mamba2_mix, moved(inputs, seed), config, torch.float64, **extra) for seed in range(2)]
    near.append(run_mixer(mamba2.mamba2_mix, inputs, config, dtype, **extra))
    for name, value in expected.items():
        condition = max(error(value, other[name]) for other in near)
        limit = (CANCELLING if name in ("d dt_bias", "d A_log") else TOLERANCE)[dtype] + 8 * condition
        assert error(value, found[name]) < limit, f"{name}: {error(value, found[name]):.1e}"


@settings(max_examples=20)
@given(
    seed=st.integers(0, 10**6),
    batch=st.integers(1, 2),
    time=st.sampled_from([1, 2, 15, 63, 64, 65, 150]),
    groups=st.integers(1, 3),
    per_group=st.integers(1, 3),
    channels=st.sampled_from([3, 8, 20, 64]),
    states=st.sampled_from([1, 7, 16, 40]),
    width=st.integers(2, 4),
    packed=st.booleans(),
    started=st.booleans(),
    dtype=st.just(torch.float32),
)
@example(
    seed=1,
    batch=1,
    time=150,
    groups=2,
    per_group=2,
    channels=20,
    states=40,
    width=4,
    packed=True,
    started=True,
    dtype=torch.bfloat16,
)
@example(
    seed=2,
    batch=2,
    time=65,
    groups=1,
    per_group=3,
    channels=64,
    states=16,
    width=3,
    packed=False,
    started=False,
    dtype=torch.bfloat16,
)
@example(
    seed=3,
    batch=2,
    time=64,
    groups=1,
    per_group=2,
    channels=80,
    states=7,
    width=2,
    packed=True,
    started=False,
    dtype=torch.bfloat16,
)
@example(
    seed=4,
    batch=1,
    time=2,
    groups=1,
    per_group=2,
    channels=36,
    states=128,
    width=4,
    packed=False,
    started=True,
    dtype=torch.bfloat16,
)
def test_mixer(seed, batch, time, groups, per_group, channels, states, width, packed, started, dtype) -> None:
    """bfloat16 only where the norm averages over enough channels for its roundings to be small."""
    # a lone head's first tokens are x times a number, which the norm divides out: the gradients are 0, errors are not
    assume(started or (time > 2 and states > 1) or per_group > 1)
    config = Mamba2Config(groups * per_group, channels, groups, states, width)
    inputs = mixer_inputs(seed, config, batch, time)
    if not started:
        del inputs["ssm_state"], inputs["conv_state"]
    g = torch.Generator().manual_seed(seed)
    runs = segment_runs((torch.rand(batch, time, generator=g) < 0.1).long().cumsum(1)) if packed else None
    check_mixer(config, inputs, dtype, runs=runs)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_mixer_threads_padding_and_limits(threads: int, dtype: torch.dtype) -> None:
    """One group of five heads on up to three threads: the heads are shared out and their dB, dC added up."""
    config = Mamba2Config(5, 16, 1, 24, time_step_limit=(0.05, 0.8))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        check_mixer(config, mixer_inputs(3, config, 2, 140), dtype, lengths=torch.tensor([140, 77]))
    finally:
        torch.set_num_threads(before)


def test_mixer_repeats_bit_for_bit_and_whatever_the_threads() -> None:
    config = Mamba2Config(4, 16, 2, 16)
    inputs = mixer_inputs(5, config, 2, 100)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 2):
            torch.set_num_threads(threads)
            results.append(run_mixer(native.mamba2_mix, inputs, config, torch.float32))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0].values(), other.values()))


def test_mixer_survives_strong_decay() -> None:
    config = Mamba2Config(2, 8, 1, 8)
    inputs = mixer_inputs(7, config, 1, 130)
    inputs["dt_bias"] += 30
    check_mixer(config, inputs, torch.float32)


def test_mixer_refuses_what_it_does_not_know() -> None:
    config = Mamba2Config(2, 8, 1, 8, conv_kernel=5)
    inputs = mixer_inputs(0, config, 1, 4)
    args = [v.float() for k, v in inputs.items() if not k.endswith("state")]
    assert native.mamba2_mix(*args, config) is NotImplemented
    assert native.mamba2_mix(args[0].double(), *args[1:], config) is NotImplemented
    known = Mamba2Config(2, 8, 1, 8)
    fitting = [v.float() for k, v in mixer_inputs(0, known, 1, 4).items() if not k.endswith("state")]
    assert native.mamba2_mix(*fitting, known) is not NotImplemented
    for wrong in range(len(fitting)):  # a shape that does not fit is left to the plain form, which says so
        cut = [a[..., 1:] if i == wrong else a for i, a in enumerate(fitting)]
        assert native.mamba2_mix(*cut, known) is NotImplemented
    with select.using("auto"):
        expected, _ = mamba2.mamba2_mix(*args, config)
        assert torch.equal(select.mamba2_mix(*args, config)[0], expected)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    "config",
    [
        Mamba2Config(4, 16, 2, 16),
        Mamba2Config(6, 24, 3, 20, 3, conv_bias=False, time_step_limit=(0.05, 0.8)),
        Mamba2Config(3, 5, 1, 9, 2),
        Mamba2Config(2, 64, 1, 128, 5),
    ],
)
def test_steps_advance_the_states_in_place(config: Mamba2Config, dtype: torch.dtype) -> None:
    inputs = mixer_inputs(9, config, 3, 4)
    parameters = [v for k, v in inputs.items() if k not in ("projected", "ssm_state", "conv_state")]
    if not config.conv_bias:
        parameters[1] = None
    conv, ssm = inputs["conv_state"], inputs["ssm_state"]
    fast_conv, fast_ssm = conv.to(dtype), ssm.float()
    # as in a model of that dtype: dt_bias, A_log and D stay in float32
    types = [dtype, dtype, torch.float32, torch.float32, torch.float32, dtype]
    typed = [None if p is None else p.to(t) for p, t in zip(parameters, types)]
    parameters = [None if p is None else p.double() for p in typed]
    with torch.inference_mode():
        for t in range(4):
            projected = inputs["projected"][:, t]
            expected, conv, ssm = mamba2.mamba2_step(projected, *parameters, config, conv, ssm)
            found, *states = decode.mamba2_step(projected.to(dtype), *typed, config, fast_conv, fast_ssm)
            assert error(expected, found) < (1e-2 if dtype == torch.bfloat16 else 2e-6)
            assert states[0] is fast_conv and states[1] is fast_ssm
            assert torch.equal(conv.to(dtype), fast_conv)
            assert error(ssm, fast_ssm) < 1e-6  # the state itself never leaves float32
    assert (
        decode.mamba2_step(inputs["projected"][:, 0].to(dtype), *typed, config, fast_conv, fast_ssm) is NotImplemented
    )


@settings(max_examples=60)
@given(
    seed=st.integers(0, 10**6),
    rows=st.one_of(st.integers(1, decode.FEW_ROWS), st.sampled_from([127, 128, 129, 256, 257])),
    inputs=st.sampled_from([1, 7, 16, 33, 96, 130, 1024]),
    outputs=st.sampled_from([1, 3, 8, 37, 50]),
    bias=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_linear_of_few_rows(seed: int, rows: int, inputs: int, outputs: int, bias: bool, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(seed)
    shapes = ((rows, inputs), (outputs, inputs), (outputs,))
    x, weight, offset = (torch.randn(shape, generator=g, dtype=torch.float64).to(dtype) for shape in shapes)
    with torch.no_grad():
        found = decode.linear(x, weight, offset if bias else None)
    if rows > decode.most_rows(dtype):
        assert found is NotImplemented
        return
    expected = x.double() @ weight.double().t() + (offset.double() if bias else 0)
    # bfloat16 rounds the result once, 2^-9; the sums are in float32 in both
    assert (expected - found.double()).abs().max() <= (5e-3 if dtype == torch.bfloat16 else 2e-6) * expected.abs().max()


def check_function(plain, fast, inputs: list[Tensor], dtype: torch.dtype, **extra) -> None:
    def run(function, dtype):
        leaves = [x.to(dtype).requires_grad_() for x in inputs]
        y = function(*leaves, **extra)
        probe = torch.randn(y.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        return [y, *torch.autograd.grad(y, leaves, probe.to(y.dtype))]

    for expected, found in zip(run(plain, torch.float64), run(fast, dtype)):
        assert error(expected, found) < TOLERANCE[dtype]


@settings(max_examples=20)
@given(
    seed=st.integers(0, 10**6),
    shape=st.sampled_from([(9,), (3, 5), (2, 3, 16), (1, 33), (40, 64), (7, 100), (300, 17)]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_norm_and_activations(seed: int, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(shape, generator=g, dtype=torch.float64).bfloat16().double() for _ in range(2))
    gain = torch.randn(shape[-1], generator=g, dtype=torch.float64).bfloat16().double()
    check_function(norm.rms_norm, elementwise.rms_norm, [x, gain], dtype, eps=1e-5)
    check_function(activation.squared_relu, elementwise.squared_relu, [x], dtype)
    check_function(activation.swiglu, elementwise.swiglu, [x, y], dtype)


def test_norm_narrows_its_output() -> None:
    x, gain = torch.randn(4, 24), torch.randn(24)
    narrow = elementwise.rms_norm(x, gain, 1e-5, torch.bfloat16)
    assert torch.equal(narrow, elementwise.rms_norm(x, gain, 1e-5).bfloat16())
    leaf = x.clone().requires_grad_()
    elementwise.rms_norm(leaf, gain, 1e-5, torch.bfloat16).backward(torch.ones(4, 24, dtype=torch.bfloat16))
    other = x.clone().requires_grad_()
    norm.rms_norm(other, gain, 1e-5).backward(torch.ones(4, 24))
    assert leaf.grad is not None and other.grad is not None
    assert error(other.grad.double(), leaf.grad) < TOLERANCE[torch.float32]


def test_shapes_that_do_not_fit_are_refused() -> None:
    x = torch.ones(2, 8)
    with torch.no_grad():
        assert decode.linear(x, torch.ones(3, 7)) is NotImplemented
        assert decode.linear(x, torch.ones(3, 8), torch.ones(2)) is NotImplemented
    assert elementwise.rms_norm(x, torch.ones(7), 1e-5) is NotImplemented
    assert elementwise.swiglu(x, torch.ones(1, 8)) is NotImplemented


def test_activations_keep_nan_and_infinity() -> None:
    x = torch.tensor([float("nan"), float("inf"), -float("inf"), 3.0, -2.0])
    assert torch.allclose(elementwise.squared_relu(x), activation.squared_relu(x), equal_nan=True)


def test_setting_is_checked() -> None:
    with pytest.raises(HalflapError, match="allowed are auto, plain, native"):
        select.use("fast")
    with select.using("plain"):
        assert set(select.describe()["ops"].values()) == {"plain"}
    with select.using("native"):
        assert set(select.describe()["ops"].values()) == {"native"}


def test_without_a_compiler_plain_runs_and_says_so(tmp_path: Path) -> None:
    code = (
        "import torch, warnings\n"
        "from halflap.ops import select\n"
        "with warnings.catch_warnings(record=True) as said:\n"
        "    warnings.simplefilter('always')\n"
        "    for _ in range(2): select.squared_relu(torch.ones(3))\n"
        "assert len(said) == 1 and 'no C++ compiler' in str(said[0].message), said\n"
        "assert select.describe()['ops']['squared_relu'] == 'plain'\n"
    )
    environment = {**os.environ, "PATH": str(tmp_path), "CXX": "no-such-compiler", "HALFLAP_CACHE": str(tmp_path)}
    environment.pop("HALFLAP_KERNELS", None)
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)


def test_two_processes_may_build_at_once(tmp_path: Path) -> None:
    source, target = tmp_path / "answer.cpp", tmp_path / "made" / "answer.so"
    source.write_text('extern "C" __attribute__((visibility("default"))) int answer() { return 42; }')
    code = (
        "import ctypes, sys\nfrom pathlib import Path\nfrom halflap.ops.native import build\n"
        "source, target = map(Path, sys.argv[1:])\n"
        "build.compile_library(build.find_compiler(), [source], target)\n"
        "assert ctypes.CDLL(str(target)).answer() == 42"
    )
    both = [subprocess.Popen([sys.executable, "-c", code, str(source), str(target)]) for _ in range(2)]
    assert [process.wait() for process in both] == [0, 0]
    assert [file.name for file in target.parent.iterdir()] == ["answer.so"]


FAKE = """#!/bin/sh
case "$1" in --version) echo fake; exit;; esac
for word; do
  case "$before" in -c) source="$word";; -o) target="$word";; esac
  before="$word"
done
if [ -n "$source" ]; then
  {work}
  echo "$source" > "$target"
else
  {real} -shared -fPIC -x c++ /dev/null -o "$target"
fi
"""


def fake_compiler(folder: Path, work: str = ":") -> str:
    """A compiler that does `work` with $source and makes nothing of it."""
    real = build.find_compiler()
    assert real is not None
    place = folder / "c++"
    place.write_text(FAKE.format(work=work, real=real))
    place.chmod(0o755)
    return str(place)


def test_a_build_is_announced_and_its_result_found_again(tmp_path: Path) -> None:
    code = "from halflap.ops.native import build\nassert build.load().library, build.load()"
    environment = {**os.environ, "CXX": fake_compiler(tmp_path), "HALFLAP_CACHE": str(tmp_path)}
    for announced in (True, False):
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        assert done.stdout == "" and done.stderr.count("building the C++ kernels") == announced


def test_sources_are_compiled_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each waits for the other; a third comes when one is done."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1}, raising=False)
    work = f'touch "$source.begun"; n=0; while [ $(ls {tmp_path} | grep -c begun) -lt 2 ]; do sleep 0.05; '
    work += "n=$((n + 1)); [ $n -gt 200 ] && exit 1; done"
    sources = [tmp_path / f"{name}.cpp" for name in "abc"]
    for source in sources:
        source.write_text("")
    build.compile_library(fake_compiler(tmp_path, work), sources, tmp_path / "made" / "answer.so")
    assert [file.name for file in (tmp_path / "made").iterdir()] == ["answer.so"]


def test_nothing_is_left_of_a_build_that_fails_or_takes_too_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = [tmp_path / f"{name}.cpp" for name in "abc"]
    for source in sources:
        source.write_text("")
    target, work = tmp_path / "made" / "answer.so", 'case "$source" in */b.cpp) echo "no good" >&2; exit 3;; esac'
    with pytest.raises(subprocess.CalledProcessError) as failed:
        build.compile_library(fake_compiler(tmp_path, work), sources, target)
    assert failed.value.stderr == "no good\n" and not list(target.parent.iterdir())
    monkeypatch.setattr(build, "TIMEOUT_SECONDS", 0.1)
    with pytest.raises(subprocess.TimeoutExpired):
        build.compile_library(fake_compiler(tmp_path, "exec sleep 60"), sources, target)
    assert not list(target.parent.iterdir())


def test_a_broken_compiler_is_a_reason_not_a_crash(tmp_path: Path) -> None:
    fake = tmp_path / "c++"
    fake.write_text("#!/bin/sh\necho 'cannot compile' >&2\nexit 1\n")
    fake.chmod(0o755)
    code = (
        "from halflap.ops.native import build\n"
        "built = build.load()\n"
        "assert built.library is None and 'cannot compile' in built.reason, built\n"
    )
    environment = {**os.environ, "CXX": str(fake), "HALFLAP_CACHE": str(tmp_path)}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
