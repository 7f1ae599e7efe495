"""Train a student on its teacher's distribution over the next token: KL divergence on logits, nothing else.

The default, forward KL at temperature 1 without a cross-entropy term, is Minitron's and Nemotron-H's. The teacher
runs beside the student (`Distillation`), or its k best log-probabilities were stored before (`TopKDistillation`
over the batches of `train.teacher_logits.TopKTeacher`). The loss is a mean over the tokens with weight, in nats.
"""

from __future__ import annotations

from typing import Any

import torch

from halflap.data.batch import Batch
from halflap.errors import HalflapError
from halflap.models.model import HybridModel
from halflap.ops.vocabulary_loss import Divergence, kl_divergence_sum, kl_from_top_k_sum
from halflap.train.losses import LossTerms
from halflap.train.objectives.language import flat_hidden
from halflap.train.teacher_logits import TeacherBatch

LOSSES: dict[str, Divergence] = {"forward_kl": "forward", "reverse_kl": "reverse", "symmetric_kl": "symmetric"}


class Distillation:
    """KL between the next-token distributions of a frozen teacher and the student.

    loss is forward_kl = KL(teacher || student), reverse_kl or symmetric_kl (their mean). A temperature other than
    1 softens both and multiplies by its square. Raises HalflapError for an unknown loss, a temperature that is not
    positive, and, at the first batch, a teacher of another vocabulary.
    """

    def __init__(self, teacher: HybridModel, temperature: float = 1.0, loss: str = "forward_kl") -> None:
        if loss not in LOSSES:
            raise HalflapError(
                f"distillation loss {loss!r} is not known; allowed are {', '.join(LOSSES)}: correct --loss"
            )
        if not temperature > 0:
            raise HalflapError(f"the temperature is {temperature!r}; it must be greater than 0: correct --temperature")
        self.teacher = teacher.eval().requires_grad_(False)
        self.temperature = temperature
        self.direction: Divergence = LOSSES[loss]

    def count(self, batch: Batch) -> float:
        return float(batch.weights.sum())

    def loss(self, model: Any, batch: Batch) -> LossTerms:
        check_vocabulary(self.teacher.config.vocab_size, model)
        self.teacher.to(batch.tokens.device)
        with torch.no_grad():
            known, _, _ = flat_hidden(self.teacher, batch)
        hidden, _, weights = flat_hidden(model, batch)
        heads = (model.head_weight, self.teacher.head_weight)
        divergence = kl_divergence_sum(hidden, heads[0], known, heads[1], weights, self.temperature, self.direction)
        return LossTerms(divergence)


class TopKDistillation:
    """Forward KL against a stored teacher's k best entries, the rest lumped into one category."""

    def count(self, batch: TeacherBatch) -> float:
        return float(batch.weights.sum())

    def loss(self, model: Any, batch: TeacherBatch) -> LossTerms:
        hidden, _, weights = flat_hidden(model, batch)
        assert batch.teacher_indices is not None and batch.teacher_log_probs is not None
        indices, log_probs = batch.teacher_indices.flatten(0, 1), batch.teacher_log_probs.flatten(0, 1)
        return LossTerms(kl_from_top_k_sum(hidden, model.head_weight, indices, log_probs, weights))


def check_vocabulary(teacher_size: int, student: Any) -> None:
    """Raise HalflapError unless the student predicts as many tokens as its teacher."""
    size = student.head_weight.shape[0]
    if size != teacher_size:
        raise HalflapError(
            f"the student's vocabulary has {size} tokens and the teacher's {teacher_size}; distillation compares their "
            "logits token by token: give a student that was made from this teacher"
        )
