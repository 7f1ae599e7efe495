"""Elastic checkpoints: sorting leaves a model as it is, students are prefixes, and their slices learn as they do."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from halflap.compress.axes import Sizes, axes_of, block_of, largest_sizes
from halflap.compress.elastic import Elastic, NestedSize, elastic_of, sort_plan
from halflap.compress.grid import SearchSpace, between, choices
from halflap.compress.importance import Importance
from halflap.compress.kinds import KINDS, block_counts
from halflap.compress.metrics import collect
from halflap.compress.plan import PruningPlan, kept_count
from halflap.compress.prune import apply_plan
from halflap.compress.ranking import drop_order, plan_for
from halflap.compress.slices import Slice
from halflap.data.batch import Batch
from halflap.errors import HalflapError
from halflap.models.config import ModelConfig
from halflap.models.model import HybridModel
from halflap.train.config import Fit
from halflap.train.fit import fit
from halflap.train.objectives.distillation import Distillation
from halflap.train.objectives.language import NextToken
from halflap.train.objectives.nested import Nested, deal

from .conftest import FAMILIES, random_model

TEACHER = "t" * 64
EQUAL = 1e-10  # of logits of order one in float64, where sums are taken in another order


def importance_of(model: HybridModel, seed: int = 0) -> Importance:
    return collect(model, [], "random", teacher=TEACHER, seed=seed)


def cut(model: HybridModel, plan: PruningPlan) -> HybridModel:
    student = HybridModel(plan.student).double().eval()
    student.load_state_dict(dict(apply_plan(plan, model.state_dict().items())), strict=True)
    return student


def smaller(config: ModelConfig, share: float) -> Sizes:
    """Every size of a model cut to about this share, as what heads are shared out among allows."""
    found: dict[str, int] = {}
    for block in config.blocks:
        counts = block_counts(block)
        for row in KINDS[type(block)].sizes:
            count = max(1, round(share * counts[row.axis]))
            counts[row.axis] = count
            found[row.size] = count * (1 if row.parent is None else counts[row.parent])
    return Sizes(hidden_size=max(1, round(share * config.hidden_size)), **found)


def test_the_sorted_model_is_the_teacher(family: str, make: Callable[[str], HybridModel], text: Batch) -> None:
    model = make(family)
    plan = sort_plan(importance_of(model), TEACHER, model.config)
    assert plan.student == model.config and {"hidden"} < plan.keep.keys() <= _sorted_axes(model.config)
    again = cut(model, plan)
    with torch.no_grad():
        expected, found = (one(text.tokens, segments=text.segments) for one in (model, again))
    assert (expected - found).abs().max() < EQUAL * expected.abs().max()
    assert not torch.equal(again.embedding.weight, model.embedding.weight)


def _sorted_axes(config: ModelConfig) -> set[str]:
    """All that can be cut but groups, which hold what is theirs together."""
    return {name for name in axes_of(config) if not name.endswith(".group")}


def test_students_of_the_sorted_model_are_those_of_the_teacher(
    family: str, make: Callable[[str], HybridModel], text: Batch
) -> None:
    """Of one axis at a time, where no ranking depends on another cut, pruning before and after sorting is the same."""
    model = make(family)
    importance = importance_of(model)
    sort = sort_plan(importance, TEACHER, model.config)
    sorted_model, elastic = cut(model, sort), elastic_of(importance, model.config, "masked")
    few, whole = smaller(model.config, 0.6).to_json(), largest_sizes(model.config)
    if "num_attention_heads" in few:  # of all key/value heads
        few["num_attention_heads"] *= whole["num_key_value_heads"] // few["num_key_value_heads"]
    for name, value in few.items():
        sizes = Sizes(**{name: value})
        ours = cut(sorted_model, elastic.plan_for(model.config, sort.digest, sizes))
        theirs = cut(model, plan_for(importance, TEACHER, model.config, sizes))
        with torch.no_grad():
            one, other = (student(text.tokens, segments=text.segments) for student in (ours, theirs))
        assert (one - other).abs().max() < EQUAL * other.abs().max(), name


@given(
    name=st.sampled_from(sorted(FAMILIES)),
    shares=st.lists(st.floats(0.01, 1), min_size=2, max_size=2),
    blocks=st.lists(st.integers(1, 4), min_size=2, max_size=2),
    seed=st.integers(0, 99),
)
@settings(max_examples=40)
def test_students_are_nested(name: str, shares: list[float], blocks: list[int], seed: int) -> None:
    """The smaller of two students keeps the first indices of every axis, and blocks that the larger keeps too."""
    config = FAMILIES[name]
    order = tuple(torch.randperm(len(config.blocks), generator=torch.Generator().manual_seed(seed)).tolist())
    if config.family in ("llama", "nemotron", "hymba"):
        order = (2, 3, 0, 1)  # layers of two blocks; a source after its readers
        blocks = [2 * round(count / 2) or 2 for count in blocks]
    counts = [min(count, len(config.blocks)) for count in blocks]
    elastic = Elastic(order)
    small, large = (
        elastic.plan_for(config, TEACHER, dataclasses.replace(smaller(config, share), num_blocks=count))
        for share, count in zip(sorted(shares), sorted(counts), strict=True)
    )
    assert {*small.keep_blocks} <= {*large.keep_blocks} and {*small.keep_blocks}.isdisjoint(
        order[: len(order) - len(small.keep_blocks)]
    )
    for axis in axes_of(config).values():
        if block_of(axis.name) not in (None, *small.keep_blocks):
            continue
        few, many = (kept_count(axis, plan.keep) for plan in (small, large))
        rows: Any = small.keep.get(axis.name, tuple(range(axis.size)))
        prefix = tuple(range(few))
        assert few <= many and (rows == prefix or set(rows) == {prefix})


def test_places_rank_as_the_depth_scores_did(family: str) -> None:
    config = FAMILIES[family]
    importance = importance_of(random_model(config))
    elastic = elastic_of(importance, config, "masked")
    assert elastic.drop_order == drop_order(importance, config, keep_kinds=True)
    assert drop_order(elastic.ranking(config, TEACHER), config) == elastic.drop_order
    assert drop_order(elastic.ranking(config, TEACHER), config, by_type=True) == elastic.drop_order


def test_a_grid_between_two_students_has_both_and_nothing_beyond() -> None:
    config, most = FAMILIES["nemotron_h"], Sizes(hidden_size=10, intermediate_size=9)
    least = dataclasses.replace(most, hidden_size=7, num_blocks=3)
    found = between(choices, least, most, SearchSpace())(config, SearchSpace(), True, 1)
    assert found["hidden_size"] == (10, 9, 8, 7) and found["num_blocks"] == (4, 3)
    assert found["intermediate_size"] == (9,) and found["mamba_num_heads"] == (8,)
    below = between(choices, None, most, SearchSpace())(config, SearchSpace(), True, 1)
    assert below["hidden_size"] == (10, 9, 8) and below["intermediate_size"][0] == 9


@pytest.mark.parametrize("correction", ["masked", "none"])
def test_a_slice_is_the_student_and_hands_its_gradients_on(
    family: str, make: Callable[[str], HybridModel], text: Batch, correction: str
) -> None:
    model = make(family)
    plan = Elastic((), correction).plan_for(model.config, TEACHER, smaller(model.config, 0.5))
    student, sliced = cut(model, plan), Slice(plan)(model)
    hidden = sliced.hidden_states(text.tokens, segments=text.segments)
    assert torch.equal(hidden, student.hidden_states(text.tokens, segments=text.segments))
    NextToken().loss(student, text).sum.backward()
    NextToken().loss(sliced, text).sum.backward()
    with (
        torch.no_grad()
    ):  # a step of the teacher's parameters along their gradient moves the slice as the chain rule says
        step = 1e-6
        moved = {name: p + step * p.grad for name, p in model.named_parameters() if p.grad is not None}
        before, after = (dict(apply_plan(plan, t.items())) for t in (dict(model.named_parameters()), moved))
        along = sum(float(((after[n] - before[n]) * p.grad).sum()) for n, p in student.named_parameters()) / step
        squared = sum(float(p.grad.square().sum()) for p in model.parameters() if p.grad is not None)
    assert along == pytest.approx(squared, rel=1e-6)
    assert not any(p.grad is not None and p.grad.isnan().any() for p in model.parameters())


def test_indices_outside_every_slice_learn_nothing(make: Callable[[str], HybridModel], text: Batch) -> None:
    model = make("nemotron_h")
    plan = Elastic(()).plan_for(model.config, TEACHER, Sizes(hidden_size=8, mamba_num_heads=4))
    NextToken().loss(Slice(plan)(model), text).sum.backward()
    assert not model.embedding.weight.grad[:, 8:].any() and model.embedding.weight.grad[:, :8].any()
    heads = model.blocks[0].mixer.A_log.grad.view(4, 2)  # type: ignore[union-attr]
    assert not heads[:, 1].any() and heads[:, 0].all()


# ---- joint training


def test_rows_are_dealt_in_turn_whatever_the_step(text: Batch) -> None:
    first, second = deal(text, 0, 3), deal(text, 5, 3)
    assert first.student.tolist() == [0, 1, 2, 0, 1] and second.student.tolist() == [2, 0, 1, 2, 0]
    assert torch.equal(first.of(1).tokens, text.tokens[[1, 4]]) and first.rows(0, 1).of(1) is None


def test_the_gradient_does_not_depend_on_micro_batches(make: Callable[[str], HybridModel], text: Batch) -> None:
    gradients = []
    for pieces in ([(0, 5)], [(0, 2), (2, 3), (3, 5)]):
        model, batch = make("nemotron_h"), deal(text, 0, 2)
        objective = Nested(NextToken(), {"whole": lambda whole: whole, "half": _slice(model, 0.5)})
        for start, stop in pieces:
            objective.loss(model, batch.rows(start, stop)).sum.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert (gradients[0] - gradients[1]).abs().max() < EQUAL * gradients[0].abs().max()


def _slice(model: HybridModel, share: float) -> Slice:
    return Slice(Elastic(()).plan_for(model.config, TEACHER, smaller(model.config, share)))


def test_joint_distillation_lowers_every_divergence_and_goes_on_after_an_interruption(
    make: Callable[[str], HybridModel], text: Batch, tmp_path: Path
) -> None:
    def train(place: Path, until: int | None = None) -> tuple[HybridModel, list[dict[str, Any]]]:
        model, rows = make("llama"), list[dict[str, Any]]()
        students = {"whole": lambda whole: whole, "75%": _slice(model, 0.75), "50%": _slice(model, 0.5)}
        objective = Nested(Distillation(make("llama")), students)
        settings = Fit(batch_size=5, micro_batch_size=2, learning_rate=1e-2, sequence_length=11, save_every=10)
        fit(
            model, objective, lambda step: deal(text, step * 5, 3), settings, tokens=1500, directory=place,
            log=rows.append, progress=False, until=until,
        )  # fmt: skip
        return model, rows

    whole, rows = train(tmp_path / "whole")
    for name in ("75%", "50%"):
        losses = [row[name] for row in rows if name in row]
        assert sum(losses[-5:]) < 0.7 * sum(losses[:5])
    train(tmp_path / "parts", until=700)
    again, _ = train(tmp_path / "parts")
    assert all(torch.equal(one, other) for one, other in zip(whole.parameters(), again.parameters(), strict=True))


# ---- the file


def test_the_file_says_what_it_was_given(tmp_path: Path) -> None:
    elastic = Elastic((1, 0), "none", (NestedSize("params 50%", Sizes(hidden_size=8, num_blocks=1)),), "d" * 64)
    elastic.save(tmp_path)
    assert Elastic.load(tmp_path, 2) == elastic
    with pytest.raises(HalflapError, match="another model than the 3 blocks"):
        Elastic.load(tmp_path, 3)
    (tmp_path / "elastic.json").write_text("{")
    with pytest.raises(HalflapError, match="damaged"):
        Elastic.load(tmp_path, 2)
    with pytest.raises(HalflapError, match="is not an elastic checkpoint"):
        Elastic.load(tmp_path / "elsewhere", 2)


def test_sizes_of_the_teacher_cut_nothing(family: str) -> None:
    config = FAMILIES[family]
    sizes = Sizes(**{name: value for name, value in largest_sizes(config).items() if name != "num_blocks"})
    assert Elastic(()).plan_for(config, TEACHER, sizes).student == config
