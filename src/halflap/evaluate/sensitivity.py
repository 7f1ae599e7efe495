"""What packing each part of a model to few bits costs, alone: the map that says what to keep as it is.

Each block, and each run of rows of its matrices with one purpose (z, x, B, C, dt; q, k, v; ...; `models/quantization`),
is rounded in place in the plain model and put back. The cost is the loss added and the KL divergence from the plain
model's predictions, in nats a token, which is steadier: an error may lower the loss by chance and never the divergence.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from halflap.models.model import HybridModel
from halflap.models.quantization import VOCABULARY, Quantization, Slice, form_of, slices
from halflap.models.quantized import pack_matrix, unpack_matrix
from halflap.progress import Progress

CHUNK = 256  # tokens whose logits are held at once


class Cost(NamedTuple):
    """Nats a token."""

    loss_added: float
    kl: float


@torch.inference_mode()
def sensitivity(model: HybridModel, rows: Sequence[Tensor], quantization: Quantization) -> dict[str, Any]:
    """Cost of every slice and every block alone, and of all but the kept together, on rows of tokens (1, T).

    Each slice is rounded whether or not `quantization` keeps it: what keeping saves is the question.
    """
    parts = slices(model.config)
    judge = _Judge(model, rows)
    blocks = {index: [part for part in parts if _block(part) == index] for index in range(len(model.blocks))}
    trials: list[tuple[dict[str, Any], list[Slice]]] = [
        *(({"block": _block(part), "parameter": part.parameter, "slice": part.name}, [part]) for part in parts),
        *(({"block": index, "parameter": None, "slice": "all"}, of) for index, of in blocks.items()),
        ({"block": None, "parameter": None, "slice": "all"}, [p for p in parts if p.name not in quantization.keep]),
    ]
    found = []
    with Progress("parts rounded", len(trials), unit="parts") as progress:
        for row, chosen in trials:
            with rounded(model, chosen, quantization):
                found.append(row | judge()._asdict())
            progress.advance()
    return {"weights": quantization.said(), "parts": found[:-1], "whole": found[-1]}


def _block(part: Slice) -> int | None:
    return None if part.parameter in VOCABULARY else int(part.parameter.split(".")[1])


@contextmanager
def rounded(model: HybridModel, parts: Sequence[Slice], quantization: Quantization) -> Iterator[None]:
    """Rows of the plain weights are meanwhile what packing makes of them."""
    before = []
    for part in parts:
        rows = model.get_parameter(part.parameter).data[part.start : part.stop]
        before.append((rows, rows.clone()))
        matrix = form_of(part.parameter, rows.shape[1], quantization, ((len(rows), True),))
        rows.copy_(unpack_matrix(pack_matrix(rows, matrix), matrix))
    model.forget_meta_state()
    try:
        yield
    finally:
        for rows, plain in before:
            rows.copy_(plain)
        model.forget_meta_state()


class _Judge:
    """Compares the model as it now is with what it was when this was made."""

    def __init__(self, model: HybridModel, rows: Sequence[Tensor]) -> None:
        self.model, self.rows = model, [row.to(model.device) for row in rows]
        self.head = model.head_weight.clone()
        self.hidden = [model.hidden_states(row[:, :-1])[0] for row in self.rows]

    def __call__(self) -> Cost:
        total, count = torch.zeros(2, dtype=torch.float64), 0
        for row, before in zip(self.rows, self.hidden, strict=True):
            now = self.model.hidden_states(row[:, :-1])[0]
            for start in range(0, len(now), CHUNK):
                part = slice(start, start + CHUNK)
                wanted = nn.functional.log_softmax((before[part] @ self.head.T).float(), -1)
                found = nn.functional.log_softmax(self.model.logits(now[part]), -1)
                targets = row[0, 1:][part, None]
                total[0] += float((wanted.gather(1, targets) - found.gather(1, targets)).sum())
                total[1] += float((wanted.exp() * (wanted - found)).sum())
            count += len(now)
        loss, kl = (total / count).tolist()
        return Cost(loss, kl)
