"""Weight-only quantization as data: which rows of which matrices are packed, how, and what stays as it is.

A packed row holds whole numbers q of 4 or 8 bits and a scale for each group of inputs that follow each other: the
weight is (q - 2^(bits-1)) * scale. The parts of a matrix X.weight are named and laid out as compressed-tensors does
its "pack-quantized" form: X.weight_packed int32 with the first input in the lowest bits, X.weight_scale bfloat16,
X.weight_shape; ours alone is X.weight_kept, rows of the matrix that stay as they are. Or it holds floats of 8 bits
(E4M3: 4 of exponent, 3 of mantissa) and one scale, and X.weight_packed is of that type; in files it is X.weight, and
the scale of the type that plain weights have, as in the "float-quantized" form.

Convolutions, A_log, D, dt_bias, norms, meta tokens and biases are no linear maps and are never packed. A `slice` is a
run of rows with one purpose (z, x, B, C, dt of a Mamba-2's `in_proj`); slices named in `keep` stay as they are, by
default the time steps, which set how long a state remembers, and the embedding; beside floats of 8 bits the head too,
as is usual. Matrices of the vocabulary are packed to 8 bits with one scale a row, whatever the others are. Pure data:
no torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

from halflap.errors import HalflapError
from halflap.models.config import BlockConfig, HybridConfig, Mamba1Config, Mamba2Config, ModelConfig
from halflap.models.layout import dim_size, layout, shape

BITS = {"int8": 8, "int4": 4, "fp8": 8}
GROUP_SIZES = (32, 64, 128)
DEFAULT_GROUP = 32  # of 4 bits: 4.5 bits a weight; larger groups save up to 0.4 of them and round a fifth coarser
VOCABULARY = {"embedding.weight": "embedding", "head.weight": "head"}
KEPT = ("dt", "embedding")
KEPT_BESIDE_FP8 = (*KEPT, "head")
PACKED, SCALE, SHAPE, KEPT_ROWS = "_packed", "_scale", "_shape", "_kept"  # behind "X.weight"
FLOAT = ("", KEPT_ROWS)  # what has the float type that one asks for
SLICE_NAMES = {"z", "x", "B", "C", "dt", "q", "k", "v", "o", "out", "gate", "up", "down", *VOCABULARY.values()}


@dataclass(frozen=True)
class Quantization:
    """bits: 4 or 8; group_size: inputs that share a scale, None for one scale a row; keep: slices left as they are.

    number: whole numbers, or floats (E4M3; 8 bits, one scale a row).
    """

    bits: int
    group_size: int | None = None
    keep: tuple[str, ...] = KEPT
    number: Literal["int", "float"] = "int"

    def __post_init__(self) -> None:
        if self.number not in ("int", "float") or (
            self.number == "float" and (self.bits, self.group_size) != (8, None)
        ):
            raise HalflapError(
                f"weights of {self.number} numbers of {self.bits} bits in groups of {self.group_size} are not known; "
                "floats have 8 bits and one scale a row: choose that, or whole numbers"
            )
        if self.bits not in BITS.values() or self.group_size not in (None, *GROUP_SIZES):
            raise HalflapError(
                f"weights of {self.bits} bits in groups of {self.group_size} are not known; allowed are 4 and 8 bits, "
                f"and groups of {', '.join(map(str, GROUP_SIZES))} or none: choose among them"
            )

    @staticmethod
    def asked(name: str, group_size: int | None = None, keep: Iterable[str] | None = None) -> Quantization:
        """What a user's words mean: "int4", "int8" or "fp8"; where they are not given, what group and parts suit it."""
        if keep is None:
            keep = KEPT_BESIDE_FP8 if name == "fp8" else KEPT
        group_size = group_size or (DEFAULT_GROUP if name == "int4" else None)
        return Quantization(BITS[name], group_size, tuple(sorted({*keep})), "float" if name == "fp8" else "int")

    @property
    def name(self) -> str:
        """As users ask for it: int4, int8 or fp8."""
        return f"{'fp' if self.number == 'float' else 'int'}{self.bits}"

    def said(self) -> str:
        """In words, for people."""
        scales = f"a scale for {self.group_size} inputs" if self.group_size else "a scale for each row"
        return f"{self.name}, {scales}; as they were: {', '.join(self.keep) or 'none'}"

    def to_json(self) -> dict[str, Any]:
        said = asdict(self) | {"keep": list(self.keep)}
        return said if self.number == "float" else {key: said[key] for key in said if key != "number"}

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Quantization:
        try:
            return Quantization(data["bits"], data["group_size"], tuple(data["keep"]), data.get("number", "int"))
        except (KeyError, TypeError) as error:
            raise HalflapError(
                f"the quantization {data!r} is not understood ({error}): copy halflap.json again"
            ) from None


class Slice(NamedTuple):
    """Rows start .. stop of a matrix, and what they are."""

    parameter: str
    name: str
    start: int
    stop: int


class Matrix(NamedTuple):
    """How a matrix is stored: runs of rows, (how many, whether packed), in order, and the form of the packed ones."""

    bits: int
    group_size: int
    inputs: int
    runs: tuple[tuple[int, bool], ...]
    number: Literal["int", "float"] = "int"

    @property
    def packed_rows(self) -> int:
        return sum(rows for rows, packed in self.runs if packed)

    @property
    def kept_rows(self) -> int:
        return sum(rows for rows, packed in self.runs if not packed)

    def parts(self) -> dict[str, tuple[str | None, tuple[int, ...]]]:
        """Suffix of each tensor to its stored type (None: a float type as one likes) and shape."""
        rows, groups = self.packed_rows, -(-self.inputs // self.group_size)
        parts: dict[str, tuple[str | None, tuple[int, ...]]] = {
            PACKED: ("I32", (rows, -(-self.inputs * self.bits // 32))),
            SCALE: ("BF16", (rows, groups)),
            SHAPE: ("I64", (2,)),
        }
        if self.number == "float":
            parts = {PACKED: ("F8_E4M3", (rows, self.inputs)), SCALE: (None, (rows, 1))}
        return parts | ({KEPT_ROWS: (None, (self.kept_rows, self.inputs))} if self.kept_rows else {})


def slices(config: ModelConfig) -> list[Slice]:
    """Every slice of every linear map, in the order of the network."""
    found = []
    for name, dims in layout(config).items():
        if name in VOCABULARY:
            names: tuple[str, ...] = (VOCABULARY[name],)
        elif name.endswith("_proj.weight"):
            _, index, *_, leaf, _ = name.split(".")
            names = _slice_names(config.blocks[int(index)], leaf)
        else:
            continue
        rows = [dim_size((span,)) for span in dims[0]] if len(names) > 1 else [dim_size(dims[0])]
        start = 0
        for label, count in zip(names, rows, strict=True):
            found.append(Slice(name, label, start, start := start + count))
    return found


def _slice_names(block: BlockConfig, leaf: str) -> tuple[str, ...]:
    """What the spans of rows of a matrix of a block are, in order; one name for all of them where they are one."""
    if leaf == "x_proj":
        return ("dt", "B", "C")
    if leaf != "in_proj":
        return (leaf.removesuffix("_proj"),)
    if isinstance(block, HybridConfig):
        own = () if block.attention.key_value_source is not None else ("k", "v")
        return ("q", *own, *_slice_names(block.ssm, leaf))
    if isinstance(block, Mamba1Config):
        return ("x", "z")
    assert isinstance(block, Mamba2Config)
    return ("z", "x", "B", "C", "dt")


def matrices(config: ModelConfig, quantization: Quantization) -> dict[str, Matrix]:
    """Every matrix that has packed rows, by its name in the layout.

    Raises HalflapError for a name in `keep` that no slice of any model has.
    """
    if unknown := set(quantization.keep) - SLICE_NAMES:
        raise HalflapError(
            f"keep has {min(unknown)!r}, which is no part of a model; parts are {', '.join(sorted(SLICE_NAMES))}: "
            "correct it"
        )
    table = layout(config)
    runs: dict[str, list[tuple[int, bool]]] = {}
    for part in slices(config):
        packed, of = part.name not in quantization.keep, runs.setdefault(part.parameter, [])
        before = of.pop()[0] if of and of[-1][1] == packed else 0
        of.append((before + part.stop - part.start, packed))
    found = {}
    for name, of in runs.items():
        if any(packed for _, packed in of):
            found[name] = form_of(name, shape(table[name])[1], quantization, tuple(of))
    return found


def form_of(name: str, inputs: int, quantization: Quantization, runs: tuple[tuple[int, bool], ...]) -> Matrix:
    """How runs of rows of the parameter of that name are stored."""
    bits, group = (8, None) if name in VOCABULARY else (quantization.bits, quantization.group_size)
    return Matrix(bits, group or inputs, inputs, runs, quantization.number)


def stored(
    config: ModelConfig, quantization: Quantization | None = None
) -> dict[str, tuple[str | None, tuple[int, ...]]]:
    """Every tensor of a checkpoint: our name to type code (None: a float type as one likes) and shape."""
    packed = matrices(config, quantization) if quantization else {}
    found: dict[str, tuple[str | None, tuple[int, ...]]] = {}
    for name, dims in layout(config).items():
        if name in packed:
            found |= {name + suffix: part for suffix, part in packed[name].parts().items()}
        else:
            found[name] = (None, shape(dims))
    return found


def split_part(name: str) -> tuple[str, str]:
    """A stored tensor's parameter and suffix; the latter is empty for what is stored whole."""
    for suffix in (PACKED, SCALE, SHAPE, KEPT_ROWS):
        if name.endswith(f".weight{suffix}"):
            return name.removesuffix(suffix), suffix
    return name, ""


def weight_bytes(config: ModelConfig, quantization: Quantization | None, float_bytes: int) -> int:
    """Bytes of all weights in memory, floats being of so many bytes."""
    sizes = {None: float_bytes, "I32": 4, "BF16": 2, "I64": 8, "F8_E4M3": 1}
    return sum(sizes[code] * math.prod(shape) for code, shape in stored(config, quantization).values())
