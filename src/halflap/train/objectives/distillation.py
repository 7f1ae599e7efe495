"""Train a student on its teacher's distribution over the next token, and on inner states if asked.

The default, forward KL at temperature 1 without a cross-entropy term, is Minitron's and Nemotron-H's. The teacher
runs beside the student (`Distillation`), or its k best log-probabilities were stored before (`TopKDistillation`
over the batches of `train.teacher_logits.TopKTeacher`). Losses are means over the tokens with weight, in nats:

    L = (1 - share) divergence + share next-token loss + weight * inner states

where weight, unless fixed, is the two losses' ratio, held constant for the gradient (Muralidharan et al. 2024), of each
micro-batch: the only place where a step's gradient depends on how it is cut up.
"""

from __future__ import annotations

import contextlib
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from halflap.data.batch import Batch
from halflap.errors import HalflapError
from halflap.models.model import HybridModel
from halflap.ops.vocabulary_loss import (
    Divergence,
    Tail,
    cross_entropy_sum,
    kl_divergence_sum,
    kl_from_top_k_sum,
    top_k_log_probs,
)
from halflap.train.losses import LossTerms
from halflap.train.objectives.intermediate import InnerStates
from halflap.train.objectives.language import flat_hidden
from halflap.train.teacher_logits import TeacherBatch

LOSSES: dict[str, Divergence] = {
    "forward_kl": "forward",
    "reverse_kl": "reverse",
    "symmetric_kl": "symmetric",
    "jensen_shannon": "jensen_shannon",
    "skew_kl": "skew",
    "skew_reverse_kl": "skew_reverse",
}


class Distillation:
    """Divergence between the next-token distributions of a frozen teacher and the student.

    loss              a row of LOSSES, `ops.vocabulary_loss.kl_divergence_sum` says which; skew_alpha is for the skewed
    temperature       other than 1 softens both distributions and multiplies the loss by its square
    top_k, tail       teach the k best entries alone, as a stored teacher would (forward KL at temperature 1)
    next_token_share  of the text's own next-token loss in the mix
    inner             losses on inner states, times inner_weight or, when None, balanced with the rest
    remember          keep what the teacher says of a micro-batch as long as that object lives, for several students

    Raises HalflapError on a value that is not allowed and, at the first batch, on a teacher of another vocabulary.
    """

    def __init__(
        self,
        teacher: HybridModel,
        temperature: float = 1.0,
        loss: str = "forward_kl",
        *,
        skew_alpha: float = 0.1,
        top_k: int = 0,
        tail: Tail = "bucket",
        next_token_share: float = 0.0,
        inner: InnerStates | None = None,
        inner_weight: float | None = None,
        remember: bool = False,
    ) -> None:
        if loss not in LOSSES:
            raise HalflapError(
                f"distillation loss {loss!r} is not known; allowed are {', '.join(LOSSES)}: correct --loss"
            )
        if not temperature > 0:
            raise HalflapError(f"the temperature is {temperature!r}; it must be greater than 0: correct --temperature")
        if not 0 < skew_alpha < 1:
            raise HalflapError(f"skew_alpha is {skew_alpha!r}; it must lie between 0 and 1: correct --skew-alpha")
        if not 0 <= top_k <= teacher.config.vocab_size:
            raise HalflapError(
                f"top_k is {top_k}; the teacher's vocabulary allows 1 to {teacher.config.vocab_size}, and 0 for all: "
                "correct --top-k"
            )
        self.teacher = teacher.eval().requires_grad_(False)
        self.temperature, self.name, self.skew_alpha = temperature, loss, skew_alpha
        self.top_k = top_k
        self.tail: Tail = tail
        self.share, self.inner, self.inner_weight = next_token_share, inner, inner_weight
        self._remembered: WeakKeyDictionary[Batch, Tensor] | None = WeakKeyDictionary() if remember else None

    def count(self, batch: Batch) -> float:
        return float(batch.weights.sum())

    def loss(self, model: Any, batch: Batch) -> LossTerms:
        check_vocabulary(self.teacher.config.vocab_size, model)
        self.teacher.to(batch.tokens.device)
        inner, student = self.inner, getattr(model, "student", model)  # beside its projections
        states: Any = {}
        sums: list[Tensor] = []
        with contextlib.ExitStack() as watching, torch.no_grad():
            if inner is not None:
                states = watching.enter_context(inner.of_teacher(self.teacher, batch))
            known = self._known(batch)
        with contextlib.ExitStack() as watching:
            if inner is not None:
                sums = watching.enter_context(inner.of_student(student, batch, states))
            hidden, targets, weights = flat_hidden(model, batch)
        divergence = self._divergence(hidden, model.head_weight, known, weights)
        terms = _mixed(self.name, divergence, self.share, hidden, model.head_weight, targets, weights)
        return terms if inner is None else _with_inner(terms, torch.stack(sums).sum(), self.inner_weight, weights)

    def _known(self, batch: Batch) -> Tensor:
        """The teacher's hidden states (M, D), from which its logits follow."""
        if self._remembered is None or self.inner is not None:  # inner states come of a pass alone
            return flat_hidden(self.teacher, batch)[0]
        if batch not in self._remembered:
            self._remembered[batch] = flat_hidden(self.teacher, batch)[0]
        return self._remembered[batch]

    def _divergence(self, hidden: Tensor, head: Tensor, known: Tensor, weights: Tensor) -> Tensor:
        teacher_head = self.teacher.head_weight
        if self.top_k:
            indices, log_probs = top_k_log_probs(known, teacher_head, self.top_k)
            return kl_from_top_k_sum(hidden, head, indices, log_probs, weights, self.tail)
        kind = LOSSES[self.name]
        return kl_divergence_sum(hidden, head, known, teacher_head, weights, self.temperature, kind, self.skew_alpha)


class TopKDistillation:
    """Forward KL against a stored teacher's k best entries; tail and next_token_share as in `Distillation`."""

    def __init__(self, tail: Tail = "bucket", next_token_share: float = 0.0) -> None:
        self.tail: Tail = tail
        self.share = next_token_share

    def count(self, batch: TeacherBatch) -> float:
        return float(batch.weights.sum())

    def loss(self, model: Any, batch: TeacherBatch) -> LossTerms:
        hidden, targets, weights = flat_hidden(model, batch)
        assert batch.teacher_indices is not None and batch.teacher_log_probs is not None
        indices, log_probs = batch.teacher_indices.flatten(0, 1), batch.teacher_log_probs.flatten(0, 1)
        divergence = kl_from_top_k_sum(hidden, model.head_weight, indices, log_probs, weights, self.tail)
        return _mixed("forward_kl", divergence, self.share, hidden, model.head_weight, targets, weights)


def _mixed(
    name: str, divergence: Tensor, share: float, hidden: Tensor, head: Tensor, targets: Tensor, weights: Tensor
) -> LossTerms:
    """The divergence with a share of next-token loss, and each of both as a metric when there is one."""
    if not share:
        return LossTerms(divergence)
    text = cross_entropy_sum(hidden, head, targets, weights)
    count = weights.sum()
    metrics = {name: (divergence.detach(), count), "next_token": (text.detach(), count)}
    return LossTerms((1 - share) * divergence + share * text, metrics)


def _with_inner(terms: LossTerms, inner: Tensor, weight: float | None, weights: Tensor) -> LossTerms:
    """The logits' loss and the inner states', balanced when no weight is fixed."""
    outer, states = terms.sum.detach(), inner.detach()
    tiny = torch.finfo(states.dtype).tiny
    factor = outer / states.clamp_min(tiny) if weight is None else torch.full_like(states, weight)
    factor = torch.where(states > 0, factor, 0.0)
    count = weights.sum()
    metrics = {"logits": (outer, count), "inner_states": (states, count), "inner_weight": (factor, 1.0)}
    return LossTerms(terms.sum + factor * inner, {**terms.metrics, **metrics})


def check_vocabulary(teacher_size: int, student: Any) -> None:
    """Raise HalflapError unless the student predicts as many tokens as its teacher."""
    size = student.head_weight.shape[0]
    if size != teacher_size:
        raise HalflapError(
            f"the student's vocabulary has {size} tokens and the teacher's {teacher_size}; distillation compares their "
            "logits token by token: give a student that was made from this teacher"
        )
