"""Mamba-2 between its two projections in four passes over the tokens (mamba2.cpp): the fast `ops.mamba2.mamba2_mix`.

For autograd it keeps its input, y, the scan's states before each chunk and the parameters, and computes the rest
again in the backward pass. It takes float32 and bfloat16 on the CPU; anything else it refuses with
NotImplemented, and the plain form runs.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from halflap.models.config import Mamba2Config
from halflap.ops.native.common import GAIN_PARTS, TAKEN, is_narrow, library, reach, row_stride
from halflap.ops.operands import WIDTHS

SIZES = ("batch", "time", "heads", "channels", "groups", "states", "width", "bf16", "threads")
LIMITS = ("low", "high", "eps")


class Sizes(ctypes.Structure):
    _fields_ = (*((name, ctypes.c_int64) for name in SIZES), *((name, ctypes.c_float) for name in LIMITS))


class Pointers(ctypes.Structure):
    """A C struct of pointers, filled by keyword with tensors or None."""

    def __init__(self, **tensors: Tensor | None) -> None:
        super().__init__(**{name: None if t is None else t.data_ptr() for name, t in tensors.items()})


def _struct(name: str, fields: str, *counts: str) -> type[Pointers]:
    pointers = [(field, ctypes.c_void_p) for field in fields.split()]
    return type(name, (Pointers,), {"_fields_": (*pointers, *((count, ctypes.c_int64) for count in counts))})


Inputs = _struct(
    "Inputs",
    "projected conv_weight conv_bias dt_bias A D norm_weight conv_state ssm_state runs lengths reach",
)
Work = _struct("Work", "dt mixed y states")
Gradients = _struct(
    "Gradients",
    "dout dfinal dprojected dmixed dy ddt dconv_weight dconv_bias ddt_bias dA dD dnorm_weight dinitial "
    "bc_partial gain_partial",
    "gain_parts",
)


def mamba2_mix(
    projected: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    dt_bias: Tensor,
    A_log: Tensor,
    D: Tensor,
    norm_weight: Tensor,
    config: Mamba2Config,
    *,
    conv_state: Tensor | None = None,
    ssm_state: Tensor | None = None,
    runs: Tensor | None = None,
    lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor] | Any:
    """As `ops.mamba2.mamba2_mix`, or NotImplemented."""
    c = config
    if c.conv_kernel not in WIDTHS or projected.dim() != 3 or (conv_state is not None and conv_state.requires_grad):
        return NotImplemented
    parameters = (conv_weight, conv_bias, dt_bias, A_log, D, norm_weight)
    if 0 in projected.shape or not TAKEN.of_mamba2(c, projected, parameters, conv_state, ssm_state, runs, lengths):
        return NotImplemented
    graded = torch.is_grad_enabled()  # inside an autograd function it always says no
    return _Mix.apply(projected, *parameters, config, conv_state, ssm_state, runs, lengths, graded)


def _sizes(projected: Tensor, c: Mamba2Config) -> Sizes:
    batch, time = projected.shape[:2]
    return Sizes(
        batch, time, c.num_heads, c.head_dim, c.num_groups, c.state_size, c.conv_kernel,
        is_narrow(projected), torch.get_num_threads(), *c.time_step_limit, c.norm_eps,
    )  # fmt: skip


class _Mix(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, projected: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
        parameters, (config, conv_state, ssm_state, runs, lengths, graded) = args[:6], args[6:]
        keep = _prepare(projected, parameters, config, conv_state, ssm_state, runs, lengths)
        batch, time = projected.shape[:2]
        sizes = _sizes(projected, config)
        y, out = _rows(projected, config.inner_size), projected.new_empty(batch, time, config.inner_size)
        dt, mixed = _work(projected, config)
        graded = graded and any(ctx.needs_input_grad)
        states = torch.empty(library().halflap_kept_states(ctypes.byref(sizes))) if graded else None
        final = torch.empty(batch, config.num_heads, config.head_dim, config.state_size)
        inputs, work = Inputs(**keep), Work(dt=dt, mixed=mixed, y=y, states=states)
        _call("halflap_mamba2", sizes, inputs, work, out, final)
        ctx.config = config
        ctx.save_for_backward(projected, y, states, *parameters, conv_state, ssm_state, runs, lengths)
        ctx.set_materialize_grads(False)
        return out, final

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor | None, dfinal: Tensor | None) -> tuple[Any, ...]:
        projected, y, states, *rest = ctx.saved_tensors
        parameters, (conv_state, ssm_state, runs, lengths), config = rest[:6], rest[6:], ctx.config
        keep = _prepare(projected, parameters, config, conv_state, ssm_state, runs, lengths)
        sizes = _sizes(projected, config)
        dt, mixed = _work(projected, config)
        shape = (*projected.shape[:2], config.inner_size)
        outer = projected.new_zeros(shape) if dout is None else dout.to(projected.dtype)
        made = _gradients(projected, parameters, config, sizes, keep["ssm_state"] if ctx.needs_input_grad[9] else None)
        given = {"dout": outer.contiguous(), "dfinal": None if dfinal is None else dfinal.float().contiguous()}
        gradients = Gradients(**given, **made)
        gradients.gain_parts = GAIN_PARTS
        inputs, work = Inputs(**keep), Work(dt=dt, mixed=mixed, y=y, states=states)
        _call("halflap_mamba2_backward", sizes, inputs, work, ctypes.byref(gradients))
        A = keep["A"]
        conv_weight = made["dconv_weight"].t().reshape(parameters[0].shape)
        of = (
            conv_weight,
            made["dconv_bias"],
            made["ddt_bias"],
            made["dA"].sum(0) * A,
            made["dD"].sum(0),
            made["dnorm_weight"],
        )
        grads = (None if p is None else g.to(p.dtype) for g, p in zip(of, parameters))
        initial = made["dinitial"]
        if initial is not None and ssm_state is not None:
            initial = initial.to(ssm_state.dtype)
        return made["dprojected"], *grads, None, None, initial, None, None, None


def _prepare(
    projected: Tensor,
    parameters: tuple[Tensor, ...] | list[Tensor],
    config: Mamba2Config,
    conv_state: Tensor | None,
    ssm_state: Tensor | None,
    runs: Tensor | None,
    lengths: Tensor | None,
) -> dict[str, Tensor | None]:
    """The tensors behind `Inputs`: contiguous, parameters in float32, the convolution's weight turned to (W, C)."""
    conv_weight, conv_bias, dt_bias, A_log, D, norm_weight = parameters
    return {
        "projected": projected.contiguous(),
        "conv_weight": conv_weight.reshape(config.conv_size, config.conv_kernel).t().float().contiguous(),
        "conv_bias": None if conv_bias is None else conv_bias.float().contiguous(),
        "dt_bias": dt_bias.float().contiguous(),
        "A": -torch.exp(A_log.float()),
        "D": D.float().contiguous(),
        "norm_weight": norm_weight.float().contiguous(),
        "conv_state": None if conv_state is None else conv_state.to(projected.dtype).contiguous(),
        "ssm_state": None if ssm_state is None else ssm_state.float().contiguous(),
        "runs": None if runs is None else runs.to(torch.int64).contiguous(),
        "lengths": None if lengths is None else lengths.to(torch.int64).contiguous(),
        "reach": None if runs is None else reach(runs, config.conv_kernel),
    }


def _work(projected: Tensor, c: Mamba2Config) -> tuple[Tensor, Tensor]:
    batch, time = projected.shape[:2]
    return torch.empty(batch, time, c.num_heads), _rows(projected, c.conv_size)


def _rows(projected: Tensor, size: int) -> Tensor:
    """Work memory for a row of each token."""
    return projected.new_empty(*projected.shape[:2], row_stride(size, projected.dtype))


def _gradients(
    projected: Tensor,
    parameters: tuple[Tensor, ...] | list[Tensor],
    c: Mamba2Config,
    sizes: Sizes,
    ssm_state: Tensor | None,
) -> dict[str, Any]:
    batch, time = projected.shape[:2]
    slices = library().halflap_head_slices(ctypes.byref(sizes))
    shared = 2 * c.num_groups * c.state_size
    return {
        "dprojected": torch.empty_like(projected, memory_format=torch.contiguous_format),
        "dmixed": _rows(projected, c.conv_size),
        "dy": _rows(projected, c.inner_size),
        "ddt": torch.empty(batch, time, c.num_heads),
        "dconv_weight": torch.empty(c.conv_kernel, c.conv_size),
        "dconv_bias": torch.empty(c.conv_size),
        "ddt_bias": torch.empty(c.num_heads),
        "dA": torch.empty(batch, c.num_heads),
        "dD": torch.empty(batch, c.num_heads),
        "dnorm_weight": torch.empty(c.inner_size),
        "dinitial": None if ssm_state is None else torch.empty_like(ssm_state),
        "bc_partial": torch.empty(slices - 1, batch, time, shared) if slices > 1 else None,
        "gain_partial": torch.empty(GAIN_PARTS, max(c.inner_size, c.num_heads)),
    }


def _call(name: str, sizes: Sizes, inputs: Pointers, work: Pointers, *rest: Any) -> None:
    arguments = (ctypes.c_void_p(r.data_ptr()) if isinstance(r, Tensor) else r for r in rest)
    getattr(library(), name)(ctypes.byref(sizes), ctypes.byref(inputs), ctypes.byref(work), *arguments)
