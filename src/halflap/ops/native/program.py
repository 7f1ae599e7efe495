"""One token of many sequences through a whole model in one call (program.cpp): its instructions, and running them."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from halflap.ops.native.common import into_large_pages, is_narrow, library

MOST_ROWS = 32  # of one run; more are run one after the other
NORMS = {None: 0, "rms": 1, "layer1p": 2}
ACTIVATIONS = {None: 0, "relu2": 1, "silu": 2}


def _integers(*names: str) -> list[tuple[str, type]]:
    return [(name, ctypes.c_int64) for name in names]


def _pointers(*names: str) -> list[tuple[str, type]]:
    return [(name, ctypes.c_void_p) for name in names]


class Place(ctypes.Structure):
    """Columns `column` .. of a buffer of rows `stride` wide, which lies behind `offset` floats a row."""

    _fields_ = _integers("offset", "stride", "column")

    def behind(self, columns: int) -> Place:
        return Place(self.offset, self.stride, self.column + columns)


class Norm(ctypes.Structure):
    _fields_ = [*_integers("kind"), *_pointers("gain", "shift"), ("eps", ctypes.c_double)]


class Instruction(ctypes.Structure):
    """`waits`: for all instructions before it."""

    KIND: int
    _fields_ = _integers("kind", "waits")


class Product(Instruction):
    """to (+)= activation(weight norm(from) + bias); with `gated` weight norm(from) * activation(beside)."""

    KIND = 0
    _fields_ = [
        *((name, Place) for name in ("source", "to", "beside")),
        ("norm", Norm),
        *_integers("inputs", "outputs", "format", "group", "narrow_scales", "activation", "gated", "adds"),
        *_pointers("weight", "scales", "bias"),
    ]


class Mamba2(Instruction):
    KIND = 1
    _fields_ = [
        *((name, Place) for name in ("source", "to")),
        *_integers("state", "heads", "channels", "groups", "states", "width"),
        *((name, ctypes.c_float) for name in ("low", "high", "eps")),
        *_pointers("conv_weight", "conv_bias", "dt_bias", "A_log", "D", "norm_weight"),
    ]


class Attention(Instruction):
    """Against the keys and values of a state, where this token's are written first if they are its `own`."""

    KIND = 2
    _fields_ = [
        *((name, Place) for name in ("query", "key", "value", "to")),
        *_integers("state", "own", "heads", "key_heads", "size", "value_size", "rotary", "window", "meta"),
        ("scale", ctypes.c_float),
        *_pointers("speed"),
    ]


class Convolution(Instruction):
    KIND = 3
    _fields_ = [
        *((name, Place) for name in ("source", "to")),
        *_integers("state", "channels", "width"),
        *_pointers("weight", "bias"),
    ]


class Selective(Instruction):
    KIND = 4
    _fields_ = [
        *((name, Place) for name in ("u", "dt", "B", "C", "gate", "to")),
        *_integers("state", "channels", "states"),
        *_pointers("A", "D", "dt_bias"),
    ]


class Normalise(Instruction):
    """to = norm(from), or with `averages` the mean of it and other(beside)."""

    KIND = 5
    _fields_ = [
        *((name, Place) for name in ("source", "beside", "to")),
        *_integers("size", "averages"),
        ("norm", Norm),
        ("other", Norm),
    ]


class State(ctypes.Structure):
    """What one cache keeps of a block: convolution tail and SSM state, or keys and values; strides in elements."""

    _fields_ = [
        *_pointers("first", "second"),
        *_integers("first_batch", "first_head", "second_batch", "second_head", "narrow"),
    ]

    @staticmethod
    def of(first: Tensor, second: Tensor) -> State:
        """Of tensors (B, ..), contiguous but for their first two dimensions."""
        a, b = first.stride(), second.stride()
        return State(first.data_ptr(), second.data_ptr(), a[0], a[1], b[0], b[1], is_narrow(first))


class _Run(ctypes.Structure):
    _fields_ = [*_integers("batch", "threads", "states_each"), *_pointers("workspace", "output", "rows", "states")]


@dataclass
class Program:
    """Instructions over buffers; `kept` holds on to the tensors that they point to."""

    instructions: list[Instruction] = field(default_factory=list)
    kept: list[Tensor] = field(default_factory=list)
    width: int = 0  # floats of the workspace for each row
    _table: ctypes.Array[ctypes.c_void_p] | None = None

    def add(self, instruction: type[Instruction], *, waits: bool = True, **values: object) -> None:
        self.instructions.append(instruction(kind=instruction.KIND, waits=int(waits), **values))

    def keep(self, tensor: Tensor | None, dtype: torch.dtype | None = None) -> int | None:
        """The address of a tensor, contiguous and in `dtype`, for as long as the program lives."""
        if tensor is None:
            return None
        own = tensor.detach().to(dtype or tensor.dtype).contiguous()
        into_large_pages(own)
        self.kept.append(own)
        return own.data_ptr()

    def run(self, workspace: Tensor, output: Tensor, rows: Tensor, states: Sequence[Sequence[State]]) -> None:
        """workspace (width * B) float32 with the inputs in place, to output (B, ..); states by cache, all advanced.

        rows (B, 3) int64: a token's position, and which row of which cache it continues as (position, cache, row).
        """
        if self._table is None:
            addresses = [ctypes.addressof(instruction) for instruction in self.instructions]
            self._table = (ctypes.c_void_p * len(addresses))(*addresses)
        held = (State * sum(map(len, states)))(*(state for of_cache in states for state in of_cache))
        run = _Run(
            len(rows), torch.get_num_threads(), len(states[0]),
            *(t.data_ptr() for t in (workspace, output, rows)), ctypes.addressof(held),
        )  # fmt: skip
        library().halflap_run_program(self._table, ctypes.c_int64(len(self.instructions)), ctypes.byref(run))
