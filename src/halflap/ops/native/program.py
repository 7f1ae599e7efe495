"""The next tokens of many sequences through a whole model in one call (program.cpp): instructions, and running them.

A pass may hold: recurrent states stay as they are until `Held.settle` says how many of its tokens count.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from halflap.ops.native.common import into_large_pages, is_narrow, library

MOST_ROWS = 32  # tokens of one run, ALIKE in few_rows.h; more are run one after the other
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
        *((name, Place) for name in ("source", "to", "held")),
        *_integers("state", "heads", "channels", "groups", "states", "width"),
        *((name, ctypes.c_float) for name in ("low", "high", "eps")),
        *_pointers("conv_weight", "conv_bias", "dt_bias", "A_log", "D", "norm_weight"),
    ]


ATTENTION_STEP = [
    *_integers("heads", "key_heads", "size", "value_size", "rotary", "window", "meta"),
    ("scale", ctypes.c_float),
    *_pointers("speed"),
]


class Attention(Instruction):
    """Against the keys and values of a state, where a single token's are written first if they are its `own`."""

    KIND = 2
    _fields_ = [
        *((name, Place) for name in ("query", "key", "value", "to", "held")),
        *_integers("state", "own"),
        *ATTENTION_STEP,
    ]


class Convolution(Instruction):
    KIND = 3
    _fields_ = [
        *((name, Place) for name in ("source", "to", "held")),
        *_integers("state", "channels", "width"),
        *_pointers("weight", "bias"),
    ]


class Selective(Instruction):
    KIND = 4
    _fields_ = [
        *((name, Place) for name in ("u", "dt", "B", "C", "gate", "to", "held")),
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


class Keep(Instruction):
    """The keys and values of several tokens a sequence, or of a pass that holds, into a state."""

    KIND = 6
    _fields_ = [
        *((name, Place) for name in ("key", "value", "held")),
        *_integers("state"),
        *ATTENTION_STEP,
    ]


class State(ctypes.Structure):
    """What one cache keeps of a block: convolution tail and SSM state, or keys and values; strides in elements."""

    _fields_ = [
        *_pointers("first", "second"),
        *_integers("first_batch", "first_head", "second_batch", "second_head", "first_narrow", "second_narrow"),
    ]

    @staticmethod
    def of(first: Tensor, second: Tensor) -> State:
        """Of tensors (B, ..), contiguous but for their first two dimensions."""
        a, b = first.stride(), second.stride()
        return State(first.data_ptr(), second.data_ptr(), a[0], a[1], b[0], b[1], is_narrow(first), is_narrow(second))


class _Run(ctypes.Structure):
    _fields_ = [
        *_integers("batch", "sequences", "threads", "states_each", "holds"),
        *_pointers("workspace", "output", "held", "rows", "states"),
    ]


ROW = ("position", "cache", "index", "first", "count")
"""Columns of a table of sequences: where the first new token goes, the row of a cache that is continued, and which
tokens of a run continue it."""


@dataclass
class Program:
    """Instructions over buffers; `kept` holds on to the tensors that they point to."""

    instructions: list[Instruction] = field(default_factory=list)
    kept: list[Tensor] = field(default_factory=list)
    width: int = 0  # floats of the workspace for each token
    held_width: int = 0  # floats that a token of a pass that holds, or of several tokens a sequence, puts aside
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

    def aside(self, columns: int) -> Place:
        """Room for so many floats a token beside what others put aside."""
        place = Place(self.held_width, columns, 0)
        self.held_width += columns
        return place

    def run(
        self, workspace: Tensor, output: Tensor, rows: Tensor, states: Sequence[Sequence[State]], *, holds: bool
    ) -> Held:
        """workspace (width * M) float32 with the inputs of M tokens in place, to output (M, ..); states by cache.

        rows (S, 5) int64 are sequences as in ROW. All states are advanced, unless the pass holds.
        """
        count = len(output)
        several = holds or count > len(rows)
        held = Held(
            self, rows, count, torch.empty(self.held_width * count if several else 0), _flat(states), len(states[0])
        )
        run = held.asked(rows, holds=holds)
        run.workspace, run.output = workspace.data_ptr(), output.data_ptr()
        library().halflap_run_program(self.table, ctypes.c_int64(len(self.instructions)), ctypes.byref(run))
        return held

    @property
    def table(self) -> ctypes.Array[ctypes.c_void_p]:
        if self._table is None:
            addresses = [ctypes.addressof(instruction) for instruction in self.instructions]
            self._table = (ctypes.c_void_p * len(addresses))(*addresses)
        return self._table


@dataclass
class Held:
    """A run that has been made, and what it put aside."""

    program: Program
    rows: Tensor
    tokens: int
    memory: Tensor
    states: ctypes.Array[State]
    states_each: int

    def settle(self, chosen: Tensor, counts: Tensor) -> None:
        """Advance the chosen rows (S',) of its table by the first counts (S',) of their tokens."""
        rows, counts = self.rows[chosen].contiguous(), counts.contiguous()
        library().halflap_settle_program(
            self.program.table, ctypes.c_int64(len(self.program.instructions)),
            ctypes.byref(self.asked(rows, holds=True)), ctypes.c_void_p(counts.data_ptr()),
        )  # fmt: skip

    def asked(self, rows: Tensor, *, holds: bool) -> _Run:
        return _Run(
            self.tokens, len(rows), torch.get_num_threads(), self.states_each, int(holds),
            held=self.memory.data_ptr(), rows=rows.data_ptr(), states=ctypes.addressof(self.states),
        )  # fmt: skip


def _flat(states: Sequence[Sequence[State]]) -> ctypes.Array[State]:
    return (State * sum(map(len, states)))(*(state for of_cache in states for state in of_cache))
