"""Which form of an op a tensor's device is given, without a GPU: a stand-in says that it is on one."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import warnings
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from halflap.ops import select

ON_GPU: Any = SimpleNamespace(device=torch.device("cuda", 0))


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Triton as if it were there, its forms naming themselves."""
    monkeypatch.setattr(select, "_loaded", lambda name: lambda *_: name)
    monkeypatch.setattr(select, "_missing_on_gpu", lambda: "")
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    with select.using("auto"):
        yield monkeypatch


def op(triton: str | None = "module:form", **how: Any) -> select.Op:
    return select.Op(lambda *_: "plain", lambda *_: "native", triton, **how)


def test_the_device_decides(gpu: pytest.MonkeyPatch) -> None:
    assert op()(ON_GPU) == "module:form"
    assert op(None)(ON_GPU) == "plain", "never the kernels of the other device"
    assert op()(torch.zeros(1)) == ("native" if select.native_is_on() else "plain")
    with select.using("plain"):
        assert op()(ON_GPU) == op()(torch.zeros(1)) == "plain"


def test_what_a_gpu_kernel_declines_is_counted(gpu: pytest.MonkeyPatch) -> None:
    gpu.setattr(select, "_loaded", lambda _: lambda *_: NotImplemented)
    counted, natural, without = op(), op(counted=False), op(None)
    assert [each(ON_GPU) for each in (counted, natural, without)] == ["plain"] * 3
    assert [each.refused for each in (counted, natural, without)] == [1, 0, 0]


def test_a_gpu_without_kernels_is_said_once(gpu: pytest.MonkeyPatch) -> None:
    gpu.setattr(select, "_missing_on_gpu", lambda: "nothing is there")
    select._warn_of_gpu.cache_clear()
    with pytest.warns(UserWarning, match="plain PyTorch, slower on a GPU: nothing is there"):
        assert op()(ON_GPU) == "plain"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert op()(ON_GPU) == "plain"
    assert set(select.names("cuda").values()) == {"plain"}


def test_what_is_chosen_is_described(gpu: pytest.MonkeyPatch) -> None:
    assert select.names("cuda")["mamba2_step"] == "triton" and select.names("cuda")["attention"] == "plain"
    assert ("gpu" in select.describe()) == torch.cuda.is_available()
    gpu.setattr(torch.cuda, "is_available", lambda: True)
    assert select.describe()["gpu"] == {"ops": select.names("cuda"), "reason": ""}
    with select.using("plain"):
        assert select.describe()["gpu"]["reason"] == "chosen" and set(select.names("cuda").values()) == {"plain"}


def test_triton_is_not_loaded_without_a_gpu() -> None:
    code = (
        "import sys, torch\n"
        "from halflap.ops import select\n"
        "select.squared_relu(torch.ones(3)); select.describe(); select.names('cpu')\n"
        "assert not [name for name in sys.modules if name.startswith('halflap.ops.triton')]\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_named_form_is_there() -> None:
    pytest.importorskip("triton")
    for each in select.OPS.values():
        assert each.triton is None or callable(select._loaded(each.triton))
