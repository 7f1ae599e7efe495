"""Linear maps and embeddings whose weights are packed, behind the interface of their float forms."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from halflap.models.config import ModelConfig
from halflap.models.quantization import KEPT_ROWS, PACKED, SCALE, SHAPE, VOCABULARY, Matrix, Quantization, matrices
from halflap.ops import select
from halflap.ops.quantized import dequantize, quantize, to_e4m3

if TYPE_CHECKING:
    from halflap.models.model import HybridModel

TYPES = {
    "I32": torch.int32,
    "I64": torch.int64,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    None: torch.float32,
}


class Packed(nn.Module):
    """The parts of a matrix (out, in) as buffers, and the linear map by them."""

    weight_packed: Tensor
    weight_scale: Tensor
    weight_kept: Tensor | None

    def __init__(self, matrix: Matrix) -> None:
        super().__init__()
        self.matrix = matrix
        self.weight_kept = None
        for suffix, (code, shape) in matrix.parts().items():
            if suffix == KEPT_ROWS:
                self.weight_kept = nn.Parameter(torch.empty(shape), requires_grad=False)
            else:
                self.register_buffer(f"weight{suffix}", torch.empty(shape, dtype=TYPES[code]))

    def product(self, x: Tensor) -> Tensor:
        """x (..., in) to (..., out)."""
        m = self.matrix
        y = select.quantized_linear(x, self.weight_packed, self.weight_scale, m.bits, m.group_size)
        if self.weight_kept is None:
            return y
        return _in_order(self.matrix, y, select.linear(x, self.weight_kept), -1)

    def dequantized(self) -> Tensor:
        """The whole weight (out, in) in float32."""
        return unpack_matrix({suffix: getattr(self, f"weight{suffix}") for suffix in self.matrix.parts()}, self.matrix)


class QuantizedLinear(Packed):
    """x (..., in) to (..., out)."""

    def __init__(self, matrix: Matrix, bias: bool) -> None:
        super().__init__(matrix)
        self.bias = (
            nn.Parameter(torch.empty(sum(rows for rows, _ in matrix.runs)), requires_grad=False) if bias else None
        )

    def forward(self, input: Tensor) -> Tensor:
        y = self.product(input)
        return y if self.bias is None else y + self.bias


class QuantizedEmbedding(Packed):
    """Tokens (...) int64 to rows (..., D) in float32; `product` is the language head of a tied model."""

    def forward(self, input: Tensor) -> Tensor:
        m, rows = self.matrix, input.flatten()
        found = dequantize(self.weight_packed[rows], self.weight_scale[rows], m.bits, m.group_size, m.inputs)
        return found.unflatten(0, input.shape)


def prepare(model: HybridModel, quantization: Quantization) -> HybridModel:
    """Put packed modules, yet to be filled, where the quantization has packed rows; changes and returns the model."""
    for name, matrix in matrices(model.config, quantization).items():
        path = name.removesuffix(".weight")
        if VOCABULARY.get(name) == "embedding":
            module: Packed = QuantizedEmbedding(matrix)
        else:
            module = QuantizedLinear(matrix, getattr(model.get_submodule(path), "bias", None) is not None)
        model.set_submodule(path, module)
    model.quantization = quantization
    return model


def pack_matrix(weight: Tensor, matrix: Matrix, importance: Tensor | None = None) -> dict[str, Tensor]:
    """The parts of a matrix (out, in) by their suffixes; importance (in,) as in `ops.quantized.quantize`."""
    runs = weight.split([rows for rows, _ in matrix.runs])
    chosen = torch.cat([run for run, (_, packed) in zip(runs, matrix.runs, strict=True) if packed])
    if matrix.number == "float":
        packed, scale = to_e4m3(chosen)
        parts: dict[str, Tensor] = {PACKED: packed, SCALE: scale}
    else:
        packed, scale = quantize(chosen, matrix.bits, matrix.group_size, importance)
        parts = {PACKED: packed, SCALE: scale, SHAPE: torch.tensor(chosen.shape)}
    if matrix.kept_rows:
        parts[KEPT_ROWS] = torch.cat([run for run, (_, packed) in zip(runs, matrix.runs, strict=True) if not packed])
    return parts


def unpack_matrix(parts: Mapping[str, Tensor], matrix: Matrix) -> Tensor:
    """The matrix (out, in) in float32."""
    m = matrix
    rows = dequantize(parts[PACKED], parts[SCALE], m.bits, m.group_size, m.inputs)
    return _in_order(m, rows, parts[KEPT_ROWS].float(), 0) if m.kept_rows else rows


def _in_order(matrix: Matrix, packed: Tensor, kept: Tensor, dim: int) -> Tensor:
    """Packed and kept rows where they belong."""
    of = {
        True: iter(packed.split([rows for rows, is_packed in matrix.runs if is_packed], dim)),
        False: iter(kept.split([rows for rows, is_packed in matrix.runs if not is_packed], dim)),
    }
    return torch.cat([next(of[is_packed]) for _, is_packed in matrix.runs], dim)


def pack_tensors(
    tensors: Iterable[tuple[str, Tensor]], config: ModelConfig, quantization: Quantization
) -> Iterator[tuple[str, Tensor]]:
    """A stream of (our name, plain tensor) with the parts of packed matrices in their place."""
    table = matrices(config, quantization)
    for name, tensor in tensors:
        if name in table:
            for suffix, part in pack_matrix(tensor, table[name]).items():
                yield name + suffix, part
        else:
            yield name, tensor
