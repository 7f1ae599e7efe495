"""Chunked vocabulary losses against the plain formulas in float64, and what KL must satisfy."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from halflap.ops.vocabulary_loss import (
    DIVERGENCES,
    Divergence,
    Tail,
    cross_entropy_sum,
    kl_divergence_sum,
    kl_from_top_k_sum,
    top_k_error_sum,
    top_k_log_probs,
)

M, V, D, TEACHER_D = 23, 40, 6, 5


class Case:
    """Random hidden states and heads of a student and a wider or narrower teacher."""

    def __init__(self, seed: int = 0, dtype: torch.dtype = torch.float64, scale: float = 1.0) -> None:
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64).mul(scale).to(dtype)

        self.hidden, self.head = normal(M, D).requires_grad_(), normal(V, D).requires_grad_()
        self.teacher_hidden, self.teacher_head = normal(M, TEACHER_D), normal(V, TEACHER_D)
        self.targets = torch.randint(V, (M,), generator=generator)
        self.weights = torch.rand(M, generator=generator, dtype=torch.float64).to(dtype)
        self.weights[::7] = 0

    def gradients(self, loss: Callable[[Case], Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        value = loss(self)
        return value.detach(), *torch.autograd.grad(value * 1.5, (self.hidden, self.head))

    def log_probs(self, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        student = F.log_softmax(self.hidden @ self.head.t() / temperature, -1)
        return student, F.log_softmax(self.teacher_hidden @ self.teacher_head.t() / temperature, -1)


def assert_same(case: Case, ours: Callable[[Case], Tensor], plain: Callable[[Case], Tensor]) -> None:
    for mine, reference in zip(case.gradients(ours), case.gradients(plain)):
        torch.testing.assert_close(mine, reference, rtol=1e-12, atol=1e-13)


def plain_cross_entropy(case: Case) -> Tensor:
    return (F.cross_entropy(case.hidden @ case.head.t(), case.targets, reduction="none") * case.weights).sum()


def plain_kl(divergence: str, temperature: float, alpha: float = 0.1) -> Callable[[Case], Tensor]:
    def loss(case: Case) -> Tensor:
        student, teacher = case.log_probs(temperature)

        def to_mixture(one: Tensor, other: Tensor, alpha: float) -> Tensor:
            return (one.exp() * (one - (alpha * one.exp() + (1 - alpha) * other.exp()).log())).sum(-1)

        forward = (teacher.exp() * (teacher - student)).sum(-1)
        reverse = (student.exp() * (student - teacher)).sum(-1)
        chosen = {
            "forward": forward,
            "reverse": reverse,
            "symmetric": (forward + reverse) / 2,
            "jensen_shannon": (to_mixture(teacher, student, 0.5) + to_mixture(student, teacher, 0.5)) / 2,
            "skew": to_mixture(teacher, student, alpha),
            "skew_reverse": to_mixture(student, teacher, alpha),
        }[divergence]
        return (chosen * case.weights).sum() * temperature**2

    return loss


def kl(case: Case, temperature: float = 1.0, divergence: Divergence = "forward", *more: float, **named: Any) -> Tensor:
    arguments = (case.hidden, case.head, case.teacher_hidden, case.teacher_head, case.weights)
    return kl_divergence_sum(*arguments, temperature, divergence, *more, **named)


@settings(max_examples=15)
@given(chunk=st.integers(1, M + 3), seed=st.integers(0, 3), scale=st.sampled_from([0.1, 1.0, 6.0]))
def test_cross_entropy_equals_plain(chunk: int, seed: int, scale: float) -> None:
    ours = lambda c: cross_entropy_sum(c.hidden, c.head, c.targets, c.weights, chunk=chunk)
    assert_same(Case(seed, scale=scale), ours, plain_cross_entropy)


@settings(max_examples=40)
@given(
    chunk=st.integers(1, M + 3),
    seed=st.integers(0, 3),
    temperature=st.sampled_from([0.5, 1.0, 3.0]),
    divergence=st.sampled_from(sorted(DIVERGENCES)),
    alpha=st.sampled_from([0.1, 0.7]),
)
def test_kl_equals_plain(chunk: int, seed: int, temperature: float, divergence: Divergence, alpha: float) -> None:
    ours = lambda c: kl(c, temperature, divergence, alpha, chunk=chunk)
    assert_same(Case(seed), ours, plain_kl(divergence, temperature, alpha))


@pytest.mark.parametrize("divergence", sorted(DIVERGENCES))
def test_divergences_pass_gradcheck(divergence: Divergence) -> None:
    case = Case(3)

    def loss(hidden: Tensor, head: Tensor) -> Tensor:
        return kl_divergence_sum(
            hidden, head, case.teacher_hidden[:5], case.teacher_head, case.weights[1:6], 2.0, divergence, 0.3, chunk=2
        )

    assert torch.autograd.gradcheck(loss, (case.hidden.detach()[:5].requires_grad_(), case.head))


@pytest.mark.parametrize("divergence", sorted(DIVERGENCES))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kl_of_the_teacher_itself_is_zero_with_zero_gradient(divergence: Divergence, dtype: torch.dtype) -> None:
    case = Case(dtype=dtype)
    case.teacher_hidden, case.teacher_head = case.hidden.detach(), case.head.detach()
    value, hidden, head = case.gradients(lambda c: kl(c, 1.0, divergence))
    assert abs(float(value)) < 1e-6
    assert float(hidden.abs().max()) < 1e-6 and float(head.abs().max()) < 1e-6


def test_kl_gradient_is_the_difference_of_probabilities() -> None:
    case = Case()
    # With the identity as head the hidden states are the logits.
    logits = torch.randn(M, V, dtype=torch.float64, requires_grad=True)
    eye = torch.eye(V, dtype=torch.float64)
    loss = kl_divergence_sum(logits, eye, case.teacher_hidden, case.teacher_head, torch.full((M,), 1 / M).double())
    (gradient,) = torch.autograd.grad(loss, logits)
    expected = (logits.softmax(-1) - case.log_probs()[1].exp()).detach() / M
    torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-9)


def test_bounded_divergences_are_bounded() -> None:
    case = Case(1, torch.float32, scale=20.0)
    each = lambda divergence: float(kl(case, 1.0, divergence, 0.1).detach())
    counted = float(case.weights.sum())
    assert each("jensen_shannon") <= counted * math.log(2)
    assert max(each("skew"), each("skew_reverse")) <= counted * math.log(1 / 0.1)
    assert each("forward") > 10 * counted


@pytest.mark.parametrize("k", [1, 5, V])
@pytest.mark.parametrize("chunk", [4, M])
def test_renormalised_top_k_is_a_teacher_of_k_tokens(k: int, chunk: int) -> None:
    def plain(case: Case) -> Tensor:
        student, teacher = case.log_probs()
        best, indices = teacher.topk(k)
        best = best - best.logsumexp(1, keepdim=True)
        return ((best.exp() * (best - student.gather(1, indices))).sum(1) * case.weights).sum()

    case = Case(4)
    best, indices = case.log_probs()[1].topk(k)
    tail: Tail = "renormalise"
    ours = lambda c: kl_from_top_k_sum(c.hidden, c.head, indices, best, c.weights, tail, chunk=chunk)
    for mine, reference in zip(case.gradients(ours), case.gradients(plain)):
        torch.testing.assert_close(mine, reference, rtol=1e-8, atol=1e-9)
    if k == V:
        torch.testing.assert_close(ours(case).detach(), kl(case).detach(), rtol=1e-9, atol=0)


def test_top_k_error_is_what_spreading_the_rest_evenly_costs() -> None:
    case = Case(5)
    _, teacher = case.log_probs()
    errors = []
    for k in (2, 10, V):
        best, indices = teacher.topk(k)
        even = (1 - best.exp().sum(1)).clamp_min(1e-300) / max(V - k, 1)
        known = even.log()[:, None].expand(M, V).scatter(1, indices, best)
        errors.append(float(top_k_error_sum(case.teacher_hidden, case.teacher_head, indices, best, chunk=7)))
        assert errors[-1] == pytest.approx(float((teacher.exp() * (teacher - known)).sum()), abs=1e-12)
    assert errors[0] > errors[1] > abs(errors[2]) and abs(errors[2]) < 1e-12


@pytest.mark.parametrize("k", [1, 5, V])
@pytest.mark.parametrize("chunk", [4, M])
def test_top_k_kl_equals_plain_lumped(k: int, chunk: int) -> None:
    def plain(case: Case) -> Tensor:
        student, teacher = case.log_probs()
        best, indices = teacher.topk(k)
        known = (best.exp() * (best - student.gather(1, indices))).sum(1)
        rest = 1 - best.exp().sum(1)
        if k < V:
            known = known + rest * (rest / (1 - student.gather(1, indices).exp().sum(1))).log()
        return (known * case.weights).sum()

    case = Case(2)
    best, indices = case.log_probs()[1].topk(k)
    ours = lambda c: kl_from_top_k_sum(c.hidden, c.head, indices, best, c.weights, chunk=chunk)
    value, *gradients = case.gradients(ours)
    for mine, reference in zip((value, *gradients), case.gradients(plain)):
        torch.testing.assert_close(mine, reference, rtol=1e-8, atol=1e-9)
    full = kl(case).detach()
    assert value <= full + 1e-9
    if k == V:
        torch.testing.assert_close(value, full, rtol=1e-9, atol=0)


def test_top_k_log_probs() -> None:
    case = Case()
    indices, best = top_k_log_probs(case.teacher_hidden, case.teacher_head, 4, chunk=5)
    expected = case.log_probs()[1].topk(4)
    torch.testing.assert_close(best, expected.values)
    assert torch.equal(indices, expected.indices)


def test_bfloat16_products_stay_near_float32() -> None:
    case = Case(1, torch.float32)
    reference = case.gradients(plain_cross_entropy)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mine = case.gradients(lambda c: cross_entropy_sum(c.hidden, c.head, c.targets, c.weights))
    assert all(value.dtype == torch.float32 for value in mine)
    for value, wanted in zip(mine, reference):  # bfloat16 keeps 8 bits: 2^-8 a rounding, a few in a row
        assert float((value - wanted).norm() / wanted.norm()) < 0.02


def test_ignored_targets_and_empty_batches() -> None:
    case = Case()
    case.targets[case.weights == 0] = -100
    clean = case.targets.clamp_min(0)
    ours = cross_entropy_sum(case.hidden, case.head, case.targets, case.weights)
    torch.testing.assert_close(ours, cross_entropy_sum(case.hidden, case.head, clean, case.weights))
    value, hidden, head = case.gradients(
        lambda c: cross_entropy_sum(c.hidden, c.head, c.targets, torch.zeros_like(c.weights))
    )
    assert float(value) == 0 and float(hidden.abs().sum()) == 0 and float(head.abs().sum()) == 0


def test_huge_logits_stay_finite() -> None:
    case = Case(dtype=torch.float32, scale=60.0)
    losses: list[Callable[[Case], Tensor]] = [lambda c: cross_entropy_sum(c.hidden, c.head, c.targets, c.weights)]
    losses += [partial(kl, divergence=divergence) for divergence in DIVERGENCES]
    for loss in losses:
        assert all(bool(torch.isfinite(value).all()) for value in case.gradients(loss))


def test_no_gradient_is_computed_when_none_is_wanted() -> None:
    case = Case()
    with torch.no_grad():
        assert not cross_entropy_sum(case.hidden, case.head, case.targets, case.weights).requires_grad
    frozen = cross_entropy_sum(case.hidden, case.head.detach(), case.targets, case.weights)
    (gradient,) = torch.autograd.grad(frozen, case.hidden)
    torch.testing.assert_close(gradient, torch.autograd.grad(plain_cross_entropy(case), case.hidden)[0])


def test_tied_head_gets_both_gradients() -> None:
    weight = torch.randn(V, D, dtype=torch.float64, requires_grad=True)
    tokens, targets = torch.arange(M) % V, torch.arange(1, M + 1) % V
    ours = cross_entropy_sum(F.embedding(tokens, weight), weight, targets, torch.ones(M))
    plain = F.cross_entropy(F.embedding(tokens, weight) @ weight.t(), targets, reduction="sum")
    mine, wanted = (torch.autograd.grad(loss, weight)[0] for loss in (ours, plain))
    torch.testing.assert_close(mine, wanted)
