"""Predict the next token: mean negative log-likelihood in nats over the tokens whose weight is above 0."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from halflap.data.batch import Batch
from halflap.models.model import HybridModel
from halflap.ops.vocabulary_loss import cross_entropy_sum
from halflap.train.losses import LossTerms


def flat_hidden(model: HybridModel, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states (M, D), targets (M,) and weights (M,) of all positions of the batch."""
    hidden = model.hidden_states(batch.tokens, segments=batch.segments)
    return hidden.flatten(0, 1), batch.targets.flatten(), batch.weights.flatten()


class NextToken:
    """Cross-entropy of the batch's targets, weighted by its weights."""

    def count(self, batch: Batch) -> float:
        return float(batch.weights.sum())

    def loss(self, model: Any, batch: Batch) -> LossTerms:
        hidden, targets, weights = flat_hidden(model, batch)
        return LossTerms(cross_entropy_sum(hidden, model.head_weight, targets, weights))
