"""Mamba-1's selective scan and step (selective_scan.cpp): the fast forms of `ops.selective_scan`.

Time step, skip and gate run in the scan's own pass. For autograd the scan keeps its inputs and the states before each
chunk. The step is for inference only and advances its state in place. Float32 and bfloat16 on the CPU, operand by
operand; anything else gets NotImplemented and runs plain.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from halflap.ops.native.common import TAKEN, is_narrow, library

ROWS = ("u", "dt", "B", "C", "gate", "y")


class Rows(ctypes.Structure):
    """A (B, T, size) operand in its own dtype and strides, or (B, size) for the step; its last dimension is dense."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("batch", ctypes.c_int64),
        ("time", ctypes.c_int64),
        ("narrow", ctypes.c_int64),
    )

    @staticmethod
    def of(tensor: Tensor | None) -> Rows:
        if tensor is None:
            return Rows()
        return Rows(tensor.data_ptr(), tensor.stride(0), tensor.stride(1), is_narrow(tensor))


class Scan(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("batch", "time", "channels", "states", "threads")),
        *((name, Rows) for name in ROWS),
        *((name, ctypes.c_void_p) for name in ("A", "D", "dt_bias", "initial", "final", "runs", "lengths", "kept")),
    )


class Gradients(ctypes.Structure):
    _fields_ = (
        *((name, Rows) for name in ("dy", "du", "ddt", "dgate")),
        *((name, ctypes.c_void_p) for name in ("dfinal", "dA", "dB", "dC", "dD", "ddt_bias", "dinitial", "partial")),
    )


class Step(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("batch", "channels", "states", "threads")),
        *((name, Rows) for name in ROWS),
        *((name, ctypes.c_void_p) for name in ("A", "D", "dt_bias", "state")),
    )


def selective_scan(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    *,
    state: Tensor | None = None,
    runs: Tensor | None = None,
    lengths: Tensor | None = None,
    dt_bias: Tensor | None = None,
    gate: Tensor | None = None,
) -> tuple[Tensor, Tensor] | Any:
    """As `ops.selective_scan.selective_scan`, or NotImplemented."""
    if u.dim() != 3 or not TAKEN.of_selective((u, dt, gate), A, (B, C), (D, dt_bias), state, runs, lengths):
        return NotImplemented
    graded = torch.is_grad_enabled()  # inside an autograd function it always says no
    return _Scan.apply(u, dt, A, B, C, D, state, dt_bias, gate, runs, lengths, graded)


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, u: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
        *tensors, graded = args
        inputs = _prepare(u, *tensors)
        y, final = torch.empty(u.shape, dtype=u.dtype), torch.empty(len(u), *args[1].shape)
        scan = _scan(inputs, y=y, final=final)
        kept = None
        if graded and any(ctx.needs_input_grad):
            kept = torch.empty(library().halflap_selective_kept(ctypes.byref(scan)))
            scan.kept = kept.data_ptr()
        library().halflap_selective_scan(ctypes.byref(scan))
        ctx.save_for_backward(u, *tensors, kept)
        ctx.set_materialize_grads(False)
        return y, final

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, dfinal: Tensor | None) -> tuple[Tensor | None, ...]:
        *tensors, kept = ctx.saved_tensors
        u, dt, A, B, C, D, state, dt_bias, gate, _, _ = tensors
        inputs = _prepare(*tensors)
        scan = _scan(inputs, kept=kept)
        (batch, time, channels), states = u.shape, A.shape[1]
        dy = torch.zeros(u.shape, dtype=u.dtype) if dy is None else _dense(dy)
        dfinal = None if dfinal is None else dfinal.float().contiguous()
        du, ddt, dgate = (None if x is None else torch.empty(x.shape, dtype=x.dtype) for x in (u, dt, gate))
        dA, dinitial = torch.empty(batch, channels, states), None if state is None else torch.empty(state.shape)
        dB, dC = torch.empty(batch, time, states), torch.empty(batch, time, states)
        dD, ddt_bias = torch.empty(batch, channels), torch.empty(batch, channels)
        partial = torch.empty(library().halflap_selective_partial(ctypes.byref(scan)))
        gradients = Gradients(
            *map(Rows.of, (dy, du, ddt, dgate)), *map(_address, (dfinal, dA, dB, dC, dD, ddt_bias, dinitial, partial))
        )
        library().halflap_selective_scan_backward(ctypes.byref(scan), ctypes.byref(gradients))
        wide = (dA.sum(0), dB, dC, dD.sum(0), dinitial, ddt_bias.sum(0))
        of = [None if x is None or g is None else g.to(x.dtype) for x, g in zip((A, B, C, D, state, dt_bias), wide)]
        return du, ddt, *of, dgate, None, None, None


def selective_step(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    state: Tensor,
    *,
    dt_bias: Tensor | None = None,
    gate: Tensor | None = None,
) -> tuple[Tensor, Tensor] | Any:
    """As `ops.selective_scan.selective_step` but advancing the state in place, or NotImplemented."""
    if torch.is_grad_enabled() or u.dim() != 2 or state.dtype != torch.float32 or not state.is_contiguous():
        return NotImplemented
    if not TAKEN.of_selective((u, dt, gate), A, (B, C), (D, dt_bias), state):
        return NotImplemented
    (batch, channels), states = u.shape, A.shape[1]
    rows = [_dense(x) for x in (u, dt, B, C, gate)]
    y = torch.empty(u.shape, dtype=u.dtype)
    small = [None if x is None else x.float().contiguous() for x in (A, D, dt_bias)]
    step = Step(
        batch, channels, states, torch.get_num_threads(), *map(Rows.of, (*rows, y)), *map(_address, (*small, state))
    )
    library().halflap_selective_step(ctypes.byref(step))
    return y, state


NAMES: tuple[str, ...] = ("u", "dt", "A", "B", "C", "D", "initial", "dt_bias", "gate", "runs", "lengths")


def _prepare(*tensors: Tensor | None) -> dict[str, Tensor | None]:
    """The operands of `Scan` by name: rows dense in their last dimension, parameters in float32, whole numbers int64.

    They must outlive the call, so the caller holds on to them.
    """
    named = dict(zip(NAMES, tensors, strict=True))
    for name, x in named.items():
        if x is None:
            continue
        if name in ("runs", "lengths"):
            named[name] = x.to(torch.int64).contiguous()
        elif name in ROWS:
            named[name] = _dense(x)
        else:
            named[name] = x.float().contiguous()
    return named


def _scan(inputs: dict[str, Tensor | None], **more: Tensor) -> Scan:
    given = {**inputs, **more}
    u, A = given["u"], given["A"]
    assert u is not None and A is not None
    operands = {name: Rows.of(x) if name in ROWS else _address(x) for name, x in given.items()}
    return Scan(*u.shape, A.shape[1], torch.get_num_threads(), **operands)


def _dense(x: Tensor | None) -> Tensor | None:
    return x if x is None or x.stride(-1) == 1 else x.contiguous()


def _address(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()
