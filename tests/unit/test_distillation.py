"""Distillation from a live and from a stored teacher."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from halflap.checkpoints.checkpoint import place
from halflap.data.batch import Batch
from halflap.errors import HalflapError
from halflap.models.config import AttentionConfig, Mamba2Config, MLPConfig, ModelConfig
from halflap.models.model import HybridModel, initialize
from halflap.models.patterns import parse_pattern
from halflap.train.config import Fit
from halflap.train.fit import fit
from halflap.train.objectives.distillation import LOSSES, Distillation, TopKDistillation
from halflap.train.objectives.language import NextToken
from halflap.train.teacher_logits import TopKTeacher, find_stored, store_teacher_logits, was_stored

ROWS, LENGTH, VOCAB = 4, 16, 40
BLOCKS = {"M": Mamba2Config(4, 4, 2, 4, chunk_size=8), "*": AttentionConfig(2, 1, 4), "-": MLPConfig(16)}
CONFIG = ModelConfig("nemotron_h", VOCAB, 12, parse_pattern("M-*", BLOCKS), initializer_range=0.4)
STUDENT = dataclasses.replace(CONFIG, hidden_size=8, blocks=CONFIG.blocks[:2])
SETTINGS = Fit(batch_size=ROWS, sequence_length=LENGTH, micro_batch_size=2, learning_rate=1e-2)


def make(config: ModelConfig, seed: int) -> HybridModel:
    model = HybridModel(config)
    initialize(model, seed)
    return model


def batches(step: int) -> Batch:
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(VOCAB, (ROWS, LENGTH), generator=generator)
    weights = torch.ones(ROWS, LENGTH)
    weights[:, -1] = 0
    return Batch(tokens, (tokens + 1) % VOCAB, weights, torch.ones(ROWS, LENGTH, dtype=torch.long))


def plain_kl(student: HybridModel, teacher: HybridModel, batch: Batch) -> torch.Tensor:
    with torch.no_grad():
        known = F.log_softmax(teacher(batch.tokens, segments=batch.segments), -1)
    mine = F.log_softmax(student(batch.tokens, segments=batch.segments), -1)
    return ((known.exp() * (known - mine)).sum(-1) * batch.weights).sum()


def test_loss_is_the_sum_over_weighted_tokens() -> None:
    student, teacher, batch = make(STUDENT, 1), make(CONFIG, 0), batches(0)
    objective = Distillation(teacher)
    assert objective.count(batch) == ROWS * (LENGTH - 1)
    torch.testing.assert_close(objective.loss(student, batch).sum, plain_kl(student, teacher, batch))


@pytest.mark.parametrize("loss", sorted(LOSSES))
def test_a_copy_of_the_teacher_has_nothing_to_learn(loss: str) -> None:
    terms = Distillation(make(CONFIG, 0), loss=loss).loss(student := make(CONFIG, 0), batches(0))
    terms.sum.backward()
    assert abs(float(terms.sum.detach())) < 1e-4
    assert max(float(p.grad.abs().max()) for p in student.parameters() if p.grad is not None) < 1e-4


def test_the_student_comes_nearer_and_the_teacher_stays() -> None:
    student, teacher = make(STUDENT, 1), make(CONFIG, 0)
    before = {name: p.clone() for name, p in teacher.named_parameters()}
    first = float(plain_kl(student, teacher, batches(99)).detach())
    fit(student, Distillation(teacher), batches, SETTINGS, tokens=60 * ROWS * LENGTH, dtype="bfloat16", progress=False)
    assert float(plain_kl(student, teacher, batches(99)).detach()) < 0.8 * first
    assert all(torch.equal(before[name], p) and p.grad is None for name, p in teacher.named_parameters())
    assert not teacher.training


def test_mistakes_are_named() -> None:
    teacher = make(CONFIG, 0)
    with pytest.raises(HalflapError, match=r"loss 'kl'.*forward_kl"):
        Distillation(teacher, loss="kl")
    with pytest.raises(HalflapError, match="temperature is 0"):
        Distillation(teacher, temperature=0)
    with pytest.raises(HalflapError, match=r"41 tokens and the teacher's 40"):
        Distillation(teacher).loss(make(dataclasses.replace(STUDENT, vocab_size=VOCAB + 1), 0), batches(0))


@pytest.mark.parametrize("k", [8, VOCAB])
def test_stored_teacher_teaches_nearly_the_same(k: int, tmp_path: Path) -> None:
    student, teacher = make(STUDENT, 1), make(CONFIG, 0)
    store_teacher_logits(teacher, batches, 2, tmp_path, k=k, dtype="float32")
    live = Distillation(teacher).loss(student, batches(1)).sum
    stored = TopKTeacher(tmp_path).batches(batches)(1)
    lumped = TopKDistillation().loss(student, stored).sum
    parameters = list(student.parameters())
    gradients = [torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)]) for loss in (live, lumped)]
    live, lumped = live.detach(), lumped.detach()
    error = float((gradients[1] - gradients[0]).norm() / gradients[0].norm())
    if k == VOCAB:  # nothing is cut: what is left is float16, 2^-11 of each log-probability
        assert float(lumped) == pytest.approx(float(live), rel=2e-3)
        assert error < 2e-3
    else:
        assert float(lumped) <= float(live)
        assert error < 0.4  # 8 of 40 entries of a flat teacher: a hard case for a cut


def test_stored_error_shrinks_with_k(tmp_path: Path) -> None:
    student, teacher = make(STUDENT, 1), make(CONFIG, 0)
    live = float(Distillation(teacher).loss(student, batches(0)).sum.detach())
    gaps, errors = [], []
    for k in (2, 8, 24, VOCAB):
        errors.append(store_teacher_logits(teacher, batches, 1, tmp_path / str(k), k=k, dtype="float32").error)
        stored = TopKTeacher(tmp_path / str(k)).read(0, batches(0))
        gaps.append(live - float(TopKDistillation().loss(student, stored).sum.detach()))
    assert gaps[0] > gaps[1] > gaps[2] > -2e-3 * live
    assert errors[0] > errors[1] > errors[2] > errors[3] and abs(errors[3]) < 1e-5  # float16 alone is left


def test_fit_from_a_stored_teacher(tmp_path: Path) -> None:
    student, teacher = make(STUDENT, 1), make(CONFIG, 0)
    stored = store_teacher_logits(teacher, batches, 20, tmp_path, k=8)
    assert stored.bytes == sum(path.stat().st_size for path in tmp_path.glob("batch-*.npz"))
    assert stored.bytes_per_token == stored.bytes / (20 * ROWS * LENGTH)
    assert json.loads((tmp_path / "manifest.json").read_text())["error"] == stored.error > 0
    first = float(plain_kl(student, teacher, batches(99)).detach())
    with_teacher = TopKTeacher(tmp_path).batches(batches)
    fit(student, TopKDistillation(), with_teacher, SETTINGS, tokens=20 * ROWS * (LENGTH - 1), progress=False)
    assert float(plain_kl(student, teacher, batches(99)).detach()) < first


def test_bytes_a_token_are_of_all_batches_whatever_their_sizes(tmp_path: Path) -> None:
    growing = lambda step: batches(step).rows(0, 1 if step < 3 else ROWS)
    stored = store_teacher_logits(make(CONFIG, 0), growing, 5, tmp_path, k=8)
    assert stored.bytes_per_token == stored.bytes / ((3 + 2 * ROWS) * LENGTH)


def test_storing_goes_on_where_it_stopped(tmp_path: Path) -> None:
    teacher, asked = make(CONFIG, 0), []

    def counted(step: int) -> Batch:
        asked.append(step)
        if len(asked) == 3:
            raise KeyboardInterrupt
        return batches(step)

    with pytest.raises(KeyboardInterrupt):
        store_teacher_logits(teacher, counted, 4, tmp_path, k=4)
    store_teacher_logits(teacher, counted, 4, tmp_path, k=4)
    assert asked == [0, 1, 2, 2, 3, 0]  # and the first again, to measure what is lost
    assert json.loads((tmp_path / "manifest.json").read_text())["k"] == 4


def test_what_is_stored_needs_no_teacher(tmp_path: Path) -> None:
    asked: Any = {"k": 4, "digest": "a", "vocab_size": VOCAB}
    assert find_stored(tmp_path, batches, 2, **asked) is None and not was_stored(tmp_path)
    stored = store_teacher_logits(make(CONFIG, 0), batches, 2, tmp_path, k=4, digest="a")
    assert find_stored(tmp_path, batches, 2, **asked) == stored and was_stored(tmp_path)
    fewer = find_stored(tmp_path, batches, 1, **asked)
    assert fewer is not None and fewer.bytes < stored.bytes and fewer.error == stored.error
    assert find_stored(tmp_path, batches, 3, **asked) is None
    with pytest.raises(HalflapError, match=r"with k 4, not 5"):
        find_stored(tmp_path, batches, 2, **{**asked, "k": 5})
    with pytest.raises(HalflapError, match="other tokens"):
        find_stored(tmp_path, lambda step: batches(step + 1), 2, **asked)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps({n: v for n, v in manifest.items() if n != "error"}))
    assert find_stored(tmp_path, batches, 2, **asked) is None, "it was not measured what is lost"


@pytest.mark.parametrize("loss", ["forward_kl", "reverse_kl"])
def test_a_teacher_loaded_in_bfloat16_teaches_about_the_same(loss: str) -> None:
    """As on a GPU: the arithmetic is bfloat16, and so are the teacher's weights. It has 8 bits of a mantissa."""
    student, teacher = make(STUDENT, 1), make(CONFIG, 0)
    narrow = make(CONFIG, 0)
    narrow.load_state_dict(
        {n: place(n, t, torch.bfloat16, "cpu") for n, t in teacher.state_dict().items()}, assign=True
    )
    found = []
    for each in (teacher, narrow):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            total = Distillation(each, loss=loss).loss(student, batches(0)).sum
        found.append(
            (
                float(total.detach()),
                torch.cat([g.flatten() for g in torch.autograd.grad(total, [*student.parameters()])]),
            )
        )
    (wide, wide_gradient), (other, gradient) = found
    assert other == pytest.approx(wide, rel=0.05)
    assert float((gradient - wide_gradient).norm() / wide_gradient.norm()) < 0.1


def test_what_was_stored_for_other_things_is_refused(tmp_path: Path) -> None:
    teacher = make(CONFIG, 0)
    store_teacher_logits(teacher, batches, 2, tmp_path, k=4, digest="a")
    with pytest.raises(HalflapError, match=r"with k 4, not 5"):
        store_teacher_logits(teacher, batches, 2, tmp_path, k=5, digest="a")
    with pytest.raises(HalflapError, match=r"teacher 'a', not 'b'"):
        store_teacher_logits(teacher, batches, 2, tmp_path, k=4, digest="b")
    stored = TopKTeacher(tmp_path)
    with pytest.raises(HalflapError, match="other tokens"):
        stored.read(1, batches(0))
    with pytest.raises(HalflapError, match="batch 2 cannot be read"):
        stored.read(2, batches(2))
    file = tmp_path / "batch-00000001.npz"
    file.write_bytes(file.read_bytes()[:-30])
    with pytest.raises(HalflapError, match="batch 1 cannot be read"):
        stored.read(1, batches(1))
    with pytest.raises(HalflapError, match="holds no stored teacher"):
        TopKTeacher(tmp_path / "nowhere")
    with pytest.raises(HalflapError, match="k is 41"):
        store_teacher_logits(teacher, batches, 1, tmp_path / "other", k=41)


def test_next_token_counts_its_weights() -> None:
    model, batch = make(CONFIG, 0), batches(0)
    logits: Any = model(batch.tokens, segments=batch.segments)
    plain = F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), reduction="none") * batch.weights.flatten()
    assert NextToken().count(batch) == ROWS * (LENGTH - 1)
    torch.testing.assert_close(NextToken().loss(model, batch).sum, plain.sum())
