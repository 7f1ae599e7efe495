"""Cross-entropy and divergences to a teacher over a large vocabulary that never hold a batch's logits.

Tokens are taken in chunks. A chunk's logits are made once, turned into the loss and at once into its gradient, and
overwritten by the next chunk, so peak memory is a chunk (its rows fewer, the larger the vocabulary) and each matrix
product is done once (forward; both gradients). Products run in the autocast dtype (or the hidden states'), softmax and
sums in float32 (float64 for float64 input), and the head's gradient is accumulated in that wide dtype.

A divergence needs a factor: with z / temperature the gradient shrinks by 1 / temperature^2, so the sum is multiplied
by temperature^2 (Hinton et al. 2015), which leaves temperature 1 as it is.

Legend: M tokens, D hidden, V vocabulary, k stored teacher entries; p is the teacher's and q the student's distribution.
`weights` (M,) multiply each token's loss.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Divergence = Literal["forward", "reverse", "symmetric", "jensen_shannon", "skew", "skew_reverse"]
Tail = Literal["bucket", "renormalise"]

# Logits of a chunk should stay in the last-level cache on a CPU and fill the machine on a GPU; below `rows`
# a matrix product would read the head more often than its arithmetic pays for.
CHUNK_BYTES = {"cpu": 16 << 20, "cuda": 256 << 20}
CHUNK_ROWS = {"cpu": 128, "cuda": 1024}


def cross_entropy_sum(
    hidden: Tensor, head_weight: Tensor, targets: Tensor, weights: Tensor, *, chunk: int | None = None
) -> Tensor:
    """sum_m weights[m] * -log softmax(head_weight @ hidden[m])[targets[m]], a wide scalar.

    hidden (M, D), head_weight (V, D), targets (M,) int64, weights (M,). Differentiable in hidden and head_weight.
    A target of a token with weight 0 may be any number (for example -100).
    """
    return _apply(_cross_entropy, (hidden, head_weight), (targets,), weights, chunk)


def kl_divergence_sum(
    student_hidden: Tensor,
    student_head: Tensor,
    teacher_hidden: Tensor,
    teacher_head: Tensor,
    weights: Tensor,
    temperature: float = 1.0,
    divergence: Divergence = "forward",
    skew_alpha: float = 0.1,
    *,
    chunk: int | None = None,
) -> Tensor:
    """temperature^2 * sum_m weights[m] * divergence of softmax(logits / temperature), a wide scalar.

    forward         KL(p || q), whose gradient for the student's logits is q - p at temperature 1
    reverse         KL(q || p)
    symmetric       mean of both: half of Jeffreys' divergence
    jensen_shannon  mean of KL(p || m) and KL(q || m), m = (p + q) / 2
    skew            KL(p || alpha p + (1 - alpha) q), alpha = skew_alpha in (0, 1): its gradient stays bounded where q
                    vanishes (Ko et al. 2024, DistiLLM)
    skew_reverse    KL(q || (1 - alpha) p + alpha q)

    The teacher's width may differ; it gets no gradient.
    """
    narrow, _ = _dtypes(student_hidden)
    loss = _divergence(partial(DIVERGENCES[divergence], skew_alpha), teacher_head.detach().to(narrow), temperature)
    return _apply(loss, (student_hidden, student_head), (teacher_hidden.detach(),), weights, chunk)


def kl_from_top_k_sum(
    hidden: Tensor,
    head_weight: Tensor,
    indices: Tensor,
    log_probs: Tensor,
    weights: Tensor,
    tail: Tail = "bucket",
    *,
    chunk: int | None = None,
) -> Tensor:
    """Forward KL against a teacher known by its k best entries.

    indices (M, k) int64, log_probs (M, k) of the teacher at temperature 1. tail "bucket" makes the rest of both
    distributions one category, which is a divergence and a lower bound of the full KL; "renormalise" takes the k
    entries for the whole teacher, which draws the student's other probabilities to 0. With k = V both are the full KL.
    """
    return _apply(partial(_top_k, tail == "bucket"), (hidden, head_weight), (indices, log_probs), weights, chunk)


@torch.no_grad()
def top_k_error_sum(
    hidden: Tensor, head_weight: Tensor, indices: Tensor, log_probs: Tensor, *, chunk: int | None = None
) -> Tensor:
    """sum_m KL(full || known), a wide scalar, of the distribution of hidden (M, D) and what k entries (M, k) say.

    `known` has these log-probabilities, as they came back from where they were stored, and spreads the rest evenly.
    """

    def loss(logits: Tensor, rows: tuple[Tensor, ...], buffers: _Buffers) -> Tensor:
        at, known = rows[0], rows[1].to(logits.dtype)
        log_p = torch.log_softmax(logits, 1)
        others = logits.shape[1] - at.shape[1]
        even = (1 - known.exp().sum(1)).clamp_min(torch.finfo(known.dtype).tiny) / max(others, 1)
        log_known = even.log()[:, None].expand_as(log_p).scatter(1, at, known)
        return (log_p.exp() * (log_p - log_known)).sum(1)

    weights = torch.ones(len(hidden), device=hidden.device)
    return _apply(loss, (hidden, head_weight), (indices, log_probs), weights, chunk)


@torch.no_grad()
def top_k_log_probs(hidden: Tensor, head_weight: Tensor, k: int, *, chunk: int | None = None) -> tuple[Tensor, Tensor]:
    """The k most likely tokens (M, k) int64 and their wide log-probabilities (M, k), best first."""
    narrow, wide = _dtypes(hidden)
    with torch.autocast(hidden.device.type, enabled=False):
        chunk, head = chunk or _chunk_rows(head_weight, wide), head_weight.to(narrow)
        buffers = _Buffers(narrow, wide, min(chunk, len(hidden)))
        parts = []
        for rows in hidden.split(chunk):
            logits = buffers.project(rows, head, "student")
            top, indices = logits.topk(k, dim=1)
            parts.append((indices, top - torch.logsumexp(logits, 1, keepdim=True)))
    return torch.cat([indices for indices, _ in parts]), torch.cat([log_probs for _, log_probs in parts])


# A chunk loss takes (logits (C, V), the chunk's rows of what belongs to its tokens, scratch) and returns each token's
# loss (C,), with the gradient for the logits written over `logits`.
ChunkLoss = Callable[[Tensor, tuple[Tensor, ...], "_Buffers"], Tensor]


def _cross_entropy(logits: Tensor, rows: tuple[Tensor, ...], buffers: _Buffers) -> Tensor:
    targets = rows[0][:, None]
    picked = logits.gather(1, targets)[:, 0]
    log_total = _softmax_(logits)
    logits.scatter_add_(1, targets, torch.full_like(logits[:, :1], -1.0))
    return log_total - picked


def _divergence(divergence: Callable[..., Tensor], teacher_head: Tensor, temperature: float) -> ChunkLoss:
    def loss(logits: Tensor, rows: tuple[Tensor, ...], buffers: _Buffers) -> Tensor:
        teacher = buffers.project(rows[0], teacher_head, "teacher")
        if temperature != 1.0:
            logits.div_(temperature)
            teacher.div_(temperature)
        difference = torch.sub(teacher, logits, out=buffers.wide("difference", logits))
        offset = _softmax_(logits) - _softmax_(teacher)
        per_token = divergence(logits, teacher, difference, offset)
        if temperature != 1.0:
            logits.mul_(temperature)  # temperature^2 of the loss, 1 / temperature of the inner derivative
            per_token = per_token * temperature**2
        return per_token

    return loss


# A divergence takes (alpha, q, p, z_t - z_s, log Z_s - log Z_t), of which the last two make log p - log q, and returns
# each token's loss (C,), with the gradient for the student's scaled logits written over q. Each is a sum of f(p, q)
# over the vocabulary, so that gradient is q (f' - sum q f') with f' = df/dq.
PointwiseDivergence = Callable[[float, Tensor, Tensor, Tensor, Tensor], Tensor]


def _forward_kl(alpha: float, student: Tensor, teacher: Tensor, difference: Tensor, offset: Tensor) -> Tensor:
    """f' = -p / q."""
    student.sub_(teacher)
    return difference.mul_(teacher).sum(1) + offset


def _reverse_kl(alpha: float, student: Tensor, teacher: Tensor, difference: Tensor, offset: Tensor) -> Tensor:
    """f' = log q - log p + 1."""
    per_token = -(difference * student).sum(1) - offset
    student.mul_(difference.add_((offset + per_token)[:, None]).neg_())
    return per_token


def _skew_kl(alpha: float, student: Tensor, teacher: Tensor, difference: Tensor, offset: Tensor) -> Tensor:
    """f' = -(1 - alpha) p / m, m = alpha p + (1 - alpha) q; p / m is at most 1 / alpha."""
    log_ratio = _log_over_mixture(alpha, difference.add_(offset[:, None]))
    per_token = (teacher * log_ratio).sum(1)
    _gradient_(student, log_ratio.exp_().mul_(alpha - 1))
    return per_token


def _skew_reverse_kl(alpha: float, student: Tensor, teacher: Tensor, difference: Tensor, offset: Tensor) -> Tensor:
    """f' = log(q / m) + 1 - alpha q / m, m = (1 - alpha) p + alpha q; the 1 falls out of the gradient."""
    log_ratio = _log_over_mixture(alpha, difference.add_(offset[:, None]).neg_())
    per_token = (student * log_ratio).sum(1)
    _gradient_(student, log_ratio.sub_(log_ratio.exp().mul_(alpha)))
    return per_token


def _log_over_mixture(alpha: float, log_ratio: Tensor) -> Tensor:
    """log(a / (alpha a + (1 - alpha) b)) of log(a / b)."""
    other = math.log1p(-alpha) - log_ratio
    return torch.logaddexp(torch.full_like(log_ratio, math.log(alpha)), other).neg_()


def _gradient_(student: Tensor, derivative: Tensor) -> None:
    """Write q (f' - sum q f') over q."""
    mean = (student * derivative).sum(1, keepdim=True)
    student.mul_(derivative.sub_(mean))


def _mean_of(
    first: PointwiseDivergence, second: PointwiseDivergence, fixed: float | None = None
) -> PointwiseDivergence:
    def mean(alpha: float, student: Tensor, teacher: Tensor, difference: Tensor, offset: Tensor) -> Tensor:
        alpha, other = alpha if fixed is None else fixed, student.clone()
        per_token = second(alpha, other, teacher, difference.clone(), offset)
        per_token = per_token + first(alpha, student, teacher, difference, offset)
        student.add_(other).mul_(0.5)
        return 0.5 * per_token

    return mean


DIVERGENCES: dict[Divergence, PointwiseDivergence] = {
    "forward": _forward_kl,
    "reverse": _reverse_kl,
    "symmetric": _mean_of(_forward_kl, _reverse_kl),
    "jensen_shannon": _mean_of(_skew_kl, _skew_reverse_kl, fixed=0.5),
    "skew": _skew_kl,
    "skew_reverse": _skew_reverse_kl,
}


def _top_k(lumps: bool, logits: Tensor, rows: tuple[Tensor, ...], buffers: _Buffers) -> Tensor:
    """d/dz is q - p on the stored entries and q (1 - r / q_tail) elsewhere; r and q_tail are the lumped masses."""
    indices, log_p = rows[0], rows[1].to(logits.dtype)
    if not lumps:
        log_p = log_p - torch.logsumexp(log_p, 1, keepdim=True)
    p = log_p.exp()
    known_whole = not lumps or indices.shape[1] == logits.shape[1]
    rest = (
        torch.zeros_like(p[:, 0]) if known_whole else (1 - p.sum(1)).clamp_min(0)
    )  # else rounding alone would be left
    picked = logits.gather(1, indices)
    log_total = _softmax_(logits)
    q = logits.gather(1, indices)
    logits.scatter_(1, indices, 0.0)
    tail = logits.sum(1)  # summed, not 1 - sum(q): exact when the tail is small
    tiny = torch.finfo(logits.dtype).tiny
    known = (p * (log_p - picked + log_total[:, None])).sum(1)
    lumped = torch.where(rest > 0, rest * (rest.clamp_min(tiny) / tail.clamp_min(tiny)).log(), 0.0)
    logits.mul_((1 - rest / tail.clamp_min(tiny))[:, None]).scatter_(1, indices, q - p)
    return known + lumped


def _softmax_(logits: Tensor) -> Tensor:
    """Turn logits (C, V) into probabilities in place; return log of the normaliser (C,).

    log Z = max z - log max p: one cheap pass, exact because max p is at least 1 / V.
    """
    top = logits.amax(1)
    torch.softmax(logits, 1, out=logits)
    return top - logits.amax(1).log()


class _Buffers:
    """Chunk-sized scratch tensors, allocated once a call: fresh pages for every chunk would cost more than the sums."""

    def __init__(self, narrow: torch.dtype, wide: torch.dtype, rows: int) -> None:
        self.narrow, self.dtype, self.rows = narrow, wide, rows
        self.held: dict[str, Tensor] = {}

    def take(self, name: str, shape: tuple[int, int], like: Tensor, dtype: torch.dtype) -> Tensor:
        if name not in self.held:
            self.held[name] = torch.empty(self.rows, shape[1], dtype=dtype, device=like.device)
        return self.held[name][: shape[0]]

    def wide(self, name: str, like: Tensor) -> Tensor:
        return self.take(name, (like.shape[0], like.shape[1]), like, self.dtype)

    def project(self, hidden: Tensor, head: Tensor, name: str) -> Tensor:
        """Wide logits (C, V) of hidden (C, D) and a head (V, D) already in the narrow dtype."""
        shape = (hidden.shape[0], head.shape[0])
        logits = self.take(name, shape, hidden, self.dtype)
        if self.narrow == self.dtype:
            return torch.mm(hidden.to(self.narrow), head.t(), out=logits)
        narrow = self.take("narrow", shape, hidden, self.narrow)
        return logits.copy_(torch.mm(hidden.to(self.narrow), head.t(), out=narrow))

    def narrowed(self, gradient: Tensor) -> Tensor:
        if self.narrow == self.dtype:
            return gradient
        return self.take("narrow", (gradient.shape[0], gradient.shape[1]), gradient, self.narrow).copy_(gradient)


def _dtypes(hidden: Tensor) -> tuple[torch.dtype, torch.dtype]:
    """Of the matrix products, and of softmax, sums and the head's gradient."""
    kind = hidden.device.type
    narrow = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
    return narrow, torch.promote_types(hidden.dtype, torch.float32)


def _chunk_rows(head: Tensor, wide: torch.dtype) -> int:
    place = "cpu" if head.device.type == "cpu" else "cuda"
    return max(CHUNK_ROWS[place], CHUNK_BYTES[place] // (head.shape[0] * wide.itemsize))


def _apply(
    loss: ChunkLoss, trained: tuple[Tensor, Tensor], rows: tuple[Tensor, ...], weights: Tensor, chunk: int | None
) -> Tensor:
    hidden, head = trained
    narrow, wide = _dtypes(hidden)
    chunk = chunk or _chunk_rows(head, wide)
    if not bool(weights.all()):  # tokens that do not count are not computed, which also drops their targets
        kept = weights.nonzero()[:, 0]
        hidden, weights = hidden.index_select(0, kept), weights.index_select(0, kept)
        rows = tuple(row.index_select(0, kept) for row in rows)
    return _ChunkedLoss.apply(hidden, head, weights, rows, loss, (narrow, wide, chunk), torch.is_grad_enabled())  # type: ignore[no-any-return]


class _ChunkedLoss(torch.autograd.Function):
    """Loss and gradients in one sweep over chunks of tokens; backward only scales them."""

    @staticmethod
    def forward(ctx, hidden, head, weights, rows, loss, plan, grad_enabled):  # type: ignore[override, no-untyped-def]
        narrow, wide, chunk = plan
        wants_hidden, wants_head = (grad_enabled and needed for needed in ctx.needs_input_grad[:2])
        grad_hidden = torch.empty_like(hidden) if wants_hidden else None
        grad_head = torch.zeros_like(head, dtype=wide) if wants_head else None
        total = torch.zeros((), dtype=wide, device=hidden.device)
        with torch.autocast(hidden.device.type, enabled=False):
            weights, head_n = weights.to(wide), head.to(narrow)
            buffers = _Buffers(narrow, wide, min(chunk, len(hidden)))
            for start in range(0, len(hidden), chunk):
                part = slice(start, start + chunk)
                hidden_n, weight = hidden[part].to(narrow), weights[part]
                logits = buffers.project(hidden_n, head_n, "student")
                total += loss(logits, tuple(row[part] for row in rows), buffers) @ weight
                if not (wants_hidden or wants_head):
                    continue
                gradient = buffers.narrowed(logits)
                # The weights scale D columns here, not V of the gradient: the same product at D / V of the cost.
                if grad_hidden is not None:
                    grad_hidden[part] = (gradient @ head_n) * weight[:, None]
                if grad_head is not None:
                    grad_head += gradient.t() @ (hidden_n * weight[:, None]).to(narrow)
        ctx.save_for_backward(*(g for g in (grad_hidden, grad_head) if g is not None))
        ctx.wants = (wants_hidden, wants_head)
        ctx.head_dtype = head.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):  # type: ignore[override, no-untyped-def]
        saved = list(ctx.saved_tensors)
        grad_hidden = saved.pop(0) * grad_output if ctx.wants[0] else None
        grad_head = (saved.pop(0) * grad_output).to(ctx.head_dtype) if ctx.wants[1] else None
        return grad_hidden, grad_head, None, None, None, None, None
