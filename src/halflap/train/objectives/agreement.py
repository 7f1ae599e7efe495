"""How often a model's likeliest next token is the text's, and how often its teacher's (Nemotron-H, section 5).

The two numbers rank candidates that are only cut: the first says what is left of the language, the second what is left
of the teacher. They come with the next-token loss of the same pass.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from halflap.data.batch import Batch
from halflap.models.model import HybridModel
from halflap.ops.vocabulary_loss import cross_entropy_sum, top_k_log_probs
from halflap.train.losses import LossTerms
from halflap.train.numerics import precision
from halflap.train.objectives.language import flat_hidden


@dataclass(frozen=True, eq=False)
class GreedyBatch(Batch):
    """A batch with its teacher's likeliest token at each position, (B, T) int64."""

    teacher_tokens: Tensor | None = None


@torch.no_grad()
def with_teacher_tokens(
    teacher: HybridModel, batches: Sequence[Batch], device: torch.device, dtype: torch.dtype
) -> list[GreedyBatch]:
    """The batches, on the CPU, with what the teacher says."""
    found = []
    for batch in batches:
        with precision(device, dtype):
            hidden, _, _ = flat_hidden(teacher, batch.to(device))
            tokens = _likeliest(hidden, teacher.head_weight).view(batch.tokens.shape).cpu()
        fields = {field.name: getattr(batch, field.name) for field in dataclasses.fields(Batch)}
        found.append(GreedyBatch(**fields, teacher_tokens=tokens))
    return found


class Agreement:
    """Next-token loss, and `accuracy` and `agreement` as shares of the tokens with weight."""

    def count(self, batch: Batch) -> float:
        return float(batch.weights.sum())

    def loss(self, model: Any, batch: GreedyBatch) -> LossTerms:
        hidden, targets, weights = flat_hidden(model, batch)
        assert batch.teacher_tokens is not None
        said, total = _likeliest(hidden, model.head_weight), weights.sum()
        hits = {"accuracy": said == targets, "agreement": said == batch.teacher_tokens.flatten()}
        loss = cross_entropy_sum(hidden, model.head_weight, targets, weights)
        return LossTerms(loss, {name: (weights @ hit.to(weights.dtype), total) for name, hit in hits.items()})


def _likeliest(hidden: Tensor, head: Tensor) -> Tensor:
    return top_k_log_probs(hidden, head, 1)[0][:, 0]
