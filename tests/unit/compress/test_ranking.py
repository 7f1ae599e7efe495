"""From scores to plans: group-aware and nested, ties, depth, the blind control, calibrated energies."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from halflap.compress.axes import Sizes
from halflap.compress.compose import compose
from halflap.compress.controls import blind_heads, blind_tensors
from halflap.compress.importance import Importance, score_shapes
from halflap.compress.plan import PruningPlan
from halflap.compress.prune import apply_plan
from halflap.compress.ranking import drop_order, kept_blocks, nested_ranking, plan_for, top
from halflap.errors import HalflapError
from halflap.models.config import AttentionConfig, Mamba2Config, MLPConfig, ModelConfig
from halflap.models.layout import layout, shape
from halflap.models.presets import preset

CONFIG = ModelConfig(
    "nemotron_h",
    13,
    8,
    (Mamba2Config(8, 4, 2, 6), MLPConfig(12), AttentionConfig(8, 2, 4), MLPConfig(12)),
)


def importance(config: ModelConfig = CONFIG, seed: int = 0, **more: object) -> Importance:
    generator = torch.Generator().manual_seed(seed)
    widths = {name: torch.rand(dims, generator=generator) for name, dims in score_shapes(config).items()}
    depth = {"block_influence": torch.rand(len(config.blocks), generator=generator)}
    return Importance("activation", widths, depth, **more)  # type: ignore[arg-type]


def made(sizes: Sizes, scores: Importance | None = None, correction: str = "masked") -> PruningPlan:
    return plan_for(scores or importance(), "teacher", CONFIG, sizes, correction)


def test_ties_go_to_the_lower_index() -> None:
    assert top(torch.tensor([1.0, 2.0, 1.0, 2.0, 1.0]), 3).tolist() == [0, 1, 3]


def test_heads_are_ranked_by_kept_channels_only() -> None:
    """Channel 0 is weak overall but dominates head 1: with it, head 1 wins; once it is cut, head 0 does."""
    scores = torch.tensor([[[0.0, 3.0, 3.0], [5.0, 1.0, 1.0]], [[0.0, 4.0, 4.0], [0.0, 1.0, 1.0]]])
    heads, channels = nested_ranking(scores, 1, 3)
    assert heads.tolist() == [[1], [0]] and channels.tolist() == [0, 1, 2]
    heads, channels = nested_ranking(scores, 1, 2)
    assert heads.tolist() == [[0], [0]] and channels.tolist() == [1, 2]


def test_each_group_keeps_its_best_heads() -> None:
    scores = importance()
    plan = made(Sizes(mamba_num_heads=4), scores)
    by_head = torch.linalg.vector_norm(scores.widths["blocks.0.inner"], dim=-1)
    table = plan.keep["blocks.0.head"]
    assert [len(row) for row in table] == [2, 2]  # type: ignore[arg-type]
    for group, row in enumerate(table):
        assert set(row) == set(by_head[group].topk(2).indices.tolist())  # type: ignore[arg-type]
    assert set(plan.keep) == {"blocks.0.head"} and plan.importance == scores.digest


def test_every_size_reaches_its_axis() -> None:
    sizes = Sizes(5, 7, 6, 3, 2, 2, 1, drop_blocks=(3,))
    plan = made(sizes)
    expected = Mamba2Config(6, 3, 2, 2), MLPConfig(7), AttentionConfig(2, 1, 4)
    assert (
        tuple(dataclasses.replace(b, norm_eps=1e-5) if isinstance(b, Mamba2Config) else b for b in plan.student.blocks)
        == expected
    )
    assert plan.student.hidden_size == 5 and plan.keep_blocks == (0, 1, 2)


def test_key_value_heads_alone_keep_their_queries() -> None:
    scores = importance()
    scores.widths["blocks.2.query"][1] = 9
    plan = made(Sizes(num_key_value_heads=1), scores)
    assert plan.keep == {"blocks.2.kv": (1,)} and plan.student.blocks[2] == AttentionConfig(4, 1, 4)


def test_hidden_channels_are_ranked_by_the_sum_over_norms() -> None:
    scores = importance()
    expected = scores.widths["hidden"].sum(0).topk(3).indices.sort().values.tolist()
    assert made(Sizes(hidden_size=3), scores).keep["hidden"] == tuple(expected)


def test_the_least_important_blocks_go() -> None:
    scores = importance()
    scores.depth["block_influence"][:] = torch.tensor([0.4, 0.1, 0.3, 0.2])
    assert drop_order(scores, CONFIG) == (1, 3, 2, 0)
    assert made(Sizes(num_blocks=2), scores).keep_blocks == (0, 2)
    removal = dataclasses.replace(scores, depth={**scores.depth, "kl": torch.tensor([1.0, 2, 3, 4])})
    assert made(Sizes(num_blocks=2), removal).keep_blocks == (2, 3)  # removal counts before influence
    with pytest.raises(HalflapError, match="no score of whole blocks"):
        made(Sizes(num_blocks=2), dataclasses.replace(scores, depth={}))


def test_the_best_block_of_every_kind_goes_last_if_kinds_are_kept() -> None:
    """A hybrid stays one: its only attention goes after everything that has its like, however low it scores."""
    scores = importance()
    scores.depth["block_influence"][:] = torch.tensor([0.4, 0.2, 0.0, 0.3])
    assert drop_order(scores, CONFIG, keep_kinds=True) == (1, 2, 3, 0) and drop_order(scores, CONFIG) == (2, 1, 3, 0)
    plan = plan_for(scores, "teacher", CONFIG, Sizes(num_blocks=3), keep_kinds=True)
    assert plan.student.pattern() == "M*-" and made(Sizes(num_blocks=3), scores).student.pattern() == "M--"


def test_a_number_of_blocks_beside_their_list_drops_the_list_alone() -> None:
    scores = importance()
    scores.depth["block_influence"][:] = torch.tensor([0.4, 0.1, 0.3, 0.2])
    assert kept_blocks(scores, CONFIG, Sizes(num_blocks=3, drop_blocks=(2,))) == (0, 1, 3)


def test_llama_drops_layers() -> None:
    config = preset("llama-tiny")
    scores = importance(config)
    scores.depth["block_influence"][:] = torch.tensor([0.1, 0.9, 0.2, 0.2, 0.8, 0.1, 0.0, 1.1])
    assert kept_blocks(scores, config, Sizes(num_blocks=4)) == (0, 1, 6, 7)


def test_nested_cuts_with_one_ranking_are_one_cut() -> None:
    """slice(A), then slice(B within A) with the same scores equals slice(B); Mamba by heads, whose order stays."""
    scores, small = importance(), Sizes(hidden_size=4, intermediate_size=5, mamba_num_heads=2)
    large = made(Sizes(hidden_size=6, intermediate_size=9, mamba_num_heads=4), scores, "none")
    widths = {
        "hidden": scores.widths["hidden"][:, list(large.keep["hidden"])],
        "blocks.0.inner": torch.stack(
            [own[list(row)] for own, row in zip(scores.widths["blocks.0.inner"], large.keep["blocks.0.head"])]  # type: ignore[arg-type]
        ),
        **{
            f"blocks.{i}.neuron": scores.widths[f"blocks.{i}.neuron"][list(large.keep[f"blocks.{i}.neuron"])]
            for i in (1, 3)
        },
        "blocks.0.state": scores.widths["blocks.0.state"],
        "blocks.2.query": scores.widths["blocks.2.query"],
    }
    then = plan_for(dataclasses.replace(scores, widths=widths), "student", large.student, small, "none")
    direct, both = made(small, scores, "none"), compose(then, large)
    assert (both.keep, both.keep_blocks, both.student) == (direct.keep, direct.keep_blocks, direct.student)


# ---- the group-blind control


def test_blind_heads_are_the_best_of_all_groups_in_the_same_shape() -> None:
    scores = importance()
    scores.widths["blocks.0.inner"][0] += 9  # all of group 0 outranks group 1
    plan = made(Sizes(mamba_num_heads=4, hidden_size=6), scores)
    heads = blind_heads(plan, scores)
    assert heads == {0: (0, 1, 2, 3)}
    given = {name: torch.randn(shape(dims)) for name, dims in layout(CONFIG).items()}
    blind, aware = dict(blind_tensors(plan, heads, given.items())), dict(apply_plan(plan, given.items()))
    assert {name: t.shape for name, t in blind.items()} == {name: t.shape for name, t in aware.items()}
    differ = {name.rsplit("mixer.", 1)[-1] for name in blind if not torch.equal(blind[name], aware[name])}
    assert (
        differ
        == {"in_proj.weight", "conv1d.weight", "conv1d.bias", "A_log", "D", "dt_bias", "norm.weight", "out_proj.weight"}
        & differ
    )
    assert torch.equal(blind["blocks.0.mixer.A_log"], given["blocks.0.mixer.A_log"][:4])
    rows = slice(4 * 4 * 2, 4 * 4 * 2 + 24)  # B and C stay where they are
    assert torch.equal(blind["blocks.0.mixer.in_proj.weight"][rows], aware["blocks.0.mixer.in_proj.weight"][rows])


def test_blind_and_aware_agree_when_the_best_heads_are_spread_evenly() -> None:
    scores = importance()
    scores.widths["blocks.0.inner"][:, :2] += 9
    plan = made(Sizes(mamba_num_heads=4), scores)
    given = {name: torch.randn(shape(dims)) for name, dims in layout(CONFIG).items()}
    blind = dict(blind_tensors(plan, blind_heads(plan, scores), given.items()))
    assert all(torch.equal(blind[name], tensor) for name, tensor in apply_plan(plan, given.items()))


# ---- energies


def energies() -> dict[str, torch.Tensor]:
    hidden = torch.tensor([4.0, 1, 1, 1, 1, 0, 0, 0])
    return {
        **{f"blocks.{i}.norm.weight": hidden.clone() for i in range(4)},
        "norm.weight": torch.ones(8),
        "blocks.0.mixer.norm.weight": torch.ones(2, 4, 4),
    }


def test_calibrated_gains_restore_the_measured_energy() -> None:
    scores = importance(energy=energies())
    scores.widths["hidden"][:] = torch.tensor([9.0, 8, 7, 6, 0, 0, 0, 0])
    plan = made(Sizes(hidden_size=4, mamba_num_heads=4), scores, "calibrated")
    assert plan.dropped["blocks.1.norm.weight"] == pytest.approx((1 / 8,))
    assert plan.dropped["norm.weight"] == pytest.approx((0.5,))
    assert plan.scales["norm.weight"] == pytest.approx((1.0,))  # even energy: the mean is the same as before
    assert plan.scales["blocks.0.mixer.norm.weight"] == pytest.approx((1.0, 1.0))
    assert plan.student.norm_eps == CONFIG.norm_eps


def test_calibrated_without_energies_says_what_to_do() -> None:
    with pytest.raises(HalflapError, match="masked"):
        made(Sizes(hidden_size=4), importance(), "calibrated")
