"""Scores, sizes, depth and budgets of models with hybrid heads, and what is written of their students."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor

from halflap.checkpoints.checkpoint import Checkpoint, save_model, write_checkpoint
from halflap.checkpoints.hymba import cannot_write, read_config, write_config
from halflap.compress.axes import Sizes, check_sizes, depth_units, kept_after, resize
from halflap.compress.costs import Budget, Costs, costs
from halflap.compress.depth import DEPTH_METRICS, depth_scores
from halflap.compress.grid import SearchSpace
from halflap.compress.importance import Importance, Scoring, score_shapes
from halflap.compress.metrics import METRICS, collect
from halflap.compress.plan import PruningPlan
from halflap.compress.prune import apply_plan
from halflap.compress.ranking import drop_order, plan_for
from halflap.compress.space import fitting
from halflap.compress.verify import verify
from halflap.data.batch import Batch
from halflap.errors import HalflapError
from halflap.models.config import HybridConfig, Mamba1Config, Mamba2Config, MLPConfig, ModelConfig
from halflap.models.model import HybridModel, initialize
from halflap.models.presets import hymba, preset

TEACHER = "t" * 64
TINY = hymba(6, hidden=32, mlp=24, heads=(4, 2), state=4, window=4, meta=3, vocab=40, context=64, original_context=16)
TOKENS = torch.randint(0, 40, (3, 12), generator=torch.Generator().manual_seed(0))
SEGMENTS = torch.tensor([[1] * 12, [1] * 5 + [2] * 4 + [0] * 3, [1] * 9 + [2] * 3])


def with_mamba2(config: ModelConfig) -> ModelConfig:
    blocks = []
    for block in config.blocks:
        if isinstance(block, HybridConfig):
            a = block.attention
            ssm = Mamba2Config(a.num_attention_heads, a.value_dim, a.num_key_value_heads, 4, chunk_size=4)
            block = dataclasses.replace(block, ssm=ssm)
        blocks.append(block)
    return dataclasses.replace(config, blocks=tuple(blocks))


ALONE = ModelConfig("none", 40, 32, (Mamba1Config(24, 4, 2), MLPConfig(16), Mamba1Config(24, 4, 2, inner_norms=False)))
CONFIGS = {"mamba1": TINY, "mamba2": with_mamba2(TINY), "alone": ALONE}


def make_model(config: ModelConfig = TINY) -> HybridModel:
    model = HybridModel(config).double().eval()
    initialize(model, 0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("proj.weight"):
                parameter.mul_(1 / (0.02 * parameter.shape[1] ** 0.5))
            elif name in ("embedding.weight", "meta_tokens"):
                parameter.mul_(30)
    return model


def batch_of(tokens: Tensor, segments: Tensor | None = None) -> Batch:
    weights = torch.ones(tokens.shape) if segments is None else (segments > 0).float()
    return Batch(tokens, tokens, weights, segments)


def scored(depth: tuple[float, ...] | None = None) -> Importance:
    generator = torch.Generator().manual_seed(0)
    widths = {name: torch.rand(shape, generator=generator) for name, shape in score_shapes(TINY).items()}
    found = torch.rand(len(TINY.blocks), generator=generator) if depth is None else torch.tensor(depth)
    return Importance("random", widths, {"kl": found}, teacher=TEACHER)


# ---- scores


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("name", CONFIGS)
def test_every_metric_scores_every_axis(name: str, metric: str) -> None:
    found = collect(make_model(CONFIGS[name]), [batch_of(TOKENS, SEGMENTS)], metric)
    assert {n: tuple(t.shape) for n, t in found.widths.items()} == score_shapes(CONFIGS[name])
    assert all(bool((t > 0).all()) for t in found.widths.values())


@pytest.mark.parametrize("name", CONFIGS)
def test_padding_and_batch_size_count_nowhere(name: str) -> None:
    """And neither do documents beside others, if each gets its meta tokens."""
    model = make_model(CONFIGS[name])
    whole = collect(model, [batch_of(TOKENS, SEGMENTS)])
    rows = [batch_of(TOKENS[i : i + 1], SEGMENTS[i : i + 1]) for i in range(3)]
    rows[1] = batch_of(TOKENS[1:2, :9], SEGMENTS[1:2, :9])
    parts = collect(model, rows)
    for one, other in ((whole.widths, parts.widths), (whole.energy, parts.energy), (whole.depth, parts.depth)):
        assert set(one) == set(other)
        for key in one:
            torch.testing.assert_close(one[key], other[key], rtol=1e-5, atol=1e-6)
    assert whole.tokens == parts.tokens == 33


def test_meta_tokens_are_no_calibration_text() -> None:
    """However loud, they change no score of what they cannot reach: the first norm's of the tokens themselves."""
    model = make_model()
    quiet = collect(model, [batch_of(TOKENS)]).widths["hidden"][0]
    with torch.no_grad():
        assert model.meta_tokens is not None
        model.meta_tokens.mul_(100)
    torch.testing.assert_close(collect(model, [batch_of(TOKENS)]).widths["hidden"][0], quiet)


@pytest.mark.parametrize("name", ["mamba1", "mamba2"])
@pytest.mark.parametrize("source", ["o", "x", "z"])
def test_hybrid_heads_are_scored_at_their_source(name: str, source: str) -> None:
    model, seen = make_model(CONFIGS[name]), []
    mixer = model.blocks[0].mixer
    if source == "o":
        mixer.out_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    else:
        first = (source == "x") == (name == "mamba1")
        start = sum(mixer.widths[:-1]) + (0 if first else 64)
        mixer.in_proj.register_forward_hook(lambda _, args, output: seen.append(output[..., start : start + 64]))
    found = collect(model, [batch_of(TOKENS)], scoring=Scoring(hybrid=source)).widths["blocks.0.inner"]
    expected = seen[0][:, 3:].abs().mean(1).square().sum(0).sqrt()  # the first 3 positions are meta tokens'
    torch.testing.assert_close(found.flatten(), expected.float())


@pytest.mark.parametrize("metric", DEPTH_METRICS)
def test_every_depth_metric_is_finite(metric: str) -> None:
    assert bool(depth_scores(make_model(), [batch_of(TOKENS, SEGMENTS)], metric).mean.isfinite().all())


def test_depth_scores_are_those_of_a_silenced_block() -> None:
    """Producers' keys and values are still read; meta tokens, which have no targets, count nowhere."""
    model = make_model()
    found = depth_scores(model, [batch_of(TOKENS, SEGMENTS)], "hidden_mse").mean
    for index, block in enumerate(TINY.blocks):
        silenced = copy.deepcopy(model)
        mixer = silenced.blocks[index].mixer
        with torch.no_grad():
            (mixer.down_proj if isinstance(block, MLPConfig) else mixer.out_proj).weight.zero_()
            passes = [each.hidden_states(TOKENS, segments=SEGMENTS) for each in (model, silenced)]
        expected = (passes[0] - passes[1])[SEGMENTS > 0].square().mean()
        torch.testing.assert_close(found[index], expected.float())


# ---- sizes and depth


def test_a_group_decides_together() -> None:
    scores = scored()
    (source, *readers) = next(group for group in groups(TINY) if len(group) == 2)
    for index, kept in ((source, 0), (readers[0], 1)):
        scores.widths[f"blocks.{index}.inner"][:] = 0.1
        scores.widths[f"blocks.{index}.inner"][kept] = 5 if index == source else 9
    plan = plan_for(scores, TEACHER, TINY, Sizes(num_key_value_heads=1, num_attention_heads=1))
    assert plan.keep[f"blocks.{source}.kv"] == (1,) and f"blocks.{readers[0]}.kv" not in plan.keep
    assert len(plan.keep[f"blocks.{readers[0]}.query"]) == 1


def groups(config: ModelConfig) -> list[list[int]]:
    found: dict[int, list[int]] = {}
    for index, block in enumerate(config.blocks):
        if block.attention is not None:
            source = block.attention.key_value_source
            found.setdefault(index if source is None else source, []).append(index)
    return list(found.values())


def test_readers_go_before_their_producer() -> None:
    (source, reader) = next(group for group in groups(TINY) if len(group) == 2)
    depth = [1.0] * 12
    depth[source : source + 2] = [0.0, 0.0]
    order = drop_order(scored(tuple(depth)), TINY)
    assert order.index(reader) < order.index(source) and sorted(order) == list(range(12))
    for count in range(2, 12, 2):
        plan = plan_for(scored(tuple(depth)), TEACHER, TINY, Sizes(num_blocks=count))
        assert len(plan.student.blocks) == count
    assert drop_order(scored(tuple(range(12))), TINY)[:2] == (0, 1)  # global layers may go


def test_a_list_that_breaks_sharing_is_refused_with_what_to_add() -> None:
    (source, reader) = next(group for group in groups(TINY) if len(group) == 2)
    dropped = next(unit for unit in depth_units(TINY) if source in unit)
    says = f"whose keys and values are read by {reader}; add {reader}, {reader + 1} to the list, or keep block {source}"
    with pytest.raises(HalflapError, match=says):
        check_sizes(TINY, Sizes(drop_blocks=dropped))
    check_sizes(TINY, Sizes(drop_blocks=(*dropped, reader, reader + 1)))


@pytest.mark.parametrize(
    ("sizes", "says"),
    [
        (Sizes(num_attention_heads=3), "sizes.num_attention_heads is 3; with 2 key/value heads"),
        (Sizes(mamba_head_dim=17), "sizes.mamba_head_dim is 17; the teacher has 16"),
        (Sizes(mamba_num_heads=2), "has no such axis; it has hidden_size, num_key_value_heads, num_attention_heads"),
        (Sizes(mamba_intermediate_size=8), "has no such axis"),
    ],
)
def test_sizes_that_cannot_be_are_refused(sizes: Sizes, says: str) -> None:
    with pytest.raises(HalflapError, match=says):
        check_sizes(TINY, sizes)


def test_plain_mamba_1_is_cut_by_its_channels() -> None:
    model = make_model(ALONE)
    scores = collect(model, [batch_of(TOKENS)])
    plan = plan_for(scores, TEACHER, ALONE, Sizes(mamba_intermediate_size=10, ssm_state_size=3))
    first = scores.widths["blocks.0.inner"].topk(10).indices.sort().values
    assert plan.keep["blocks.0.inner"] == tuple(first.tolist())
    assert {(b.inner_size, b.state_size) for b in plan.student.blocks if isinstance(b, Mamba1Config)} == {(10, 3)}


# ---- budgets


@pytest.mark.parametrize("name", ["hymba-tiny", "hymba-55m", "hymba-1.5b"])
@pytest.mark.parametrize("share", [0.5, 0.8])
def test_budgets_are_reached(name: str, share: float) -> None:
    teacher = preset(name)
    limit = share * costs(teacher, Budget())["params"]
    space = SearchSpace(hidden_size=(teacher.hidden_size, teacher.hidden_size // 4 * 3))
    found = fitting(teacher, Budget(params=limit), space, tuple(range(len(teacher.blocks) - 1, -1, -1)))
    assert found.remark is None and any("num_attention_heads" in str(c.sizes) for c in found.candidates)
    for candidate in found.candidates[:5]:
        assert 0.95 * limit <= candidate.costs["params"] <= limit


@pytest.mark.parametrize("budget", [Budget(memory=1e9, context=100), Budget(flops=1e9), Budget(params=1e9)])
def test_summed_costs_are_the_exact_ones(budget: Budget) -> None:
    order = tuple(range(11, -1, -1))
    summed = Costs(TINY, budget, order)
    widths = {"hidden_size": 24, "intermediate_size": 20, "mamba_head_dim": 9, "ssm_state_size": 3}
    for blocks in (12, 6):
        sizes = widths | {"num_key_value_heads": 1, "num_attention_heads": 2, "num_blocks": blocks}
        student = resize(TINY, kept_after(TINY, Sizes(num_blocks=blocks), order), Sizes(**sizes))
        told = summed.all(sizes)
        for name, exact in costs(student, budget).items():
            assert told[name] == pytest.approx(exact, abs=8)  # each block's is rounded


# ---- what is written


@pytest.mark.parametrize(
    "sizes",
    [Sizes(24, 16, num_attention_heads=2, mamba_head_dim=12), Sizes(num_blocks=8), Sizes(24, mamba_head_dim=11)],
)
def test_an_equal_student_has_the_released_layout(sizes: Sizes, tmp_path: Path) -> None:
    """One eps for all its norms; the inner size need not be a multiple of the hidden one."""
    save_model(make_model(), tmp_path / "teacher", dtype="float32")
    teacher = Checkpoint.open(tmp_path / "teacher")
    plan = plan_for(scored(), teacher.digest, teacher.config, sizes)
    assert cannot_write(plan.student) is None
    assert read_config(write_config(plan.student)) == plan.student
    student = write_checkpoint(tmp_path / "student", plan.student, apply_plan(plan, teacher.tensors()))
    assert verify(student, teacher, plan, TOKENS)["passed"]


def test_another_students_reason_is_said() -> None:
    plan = PruningPlan(TEACHER, TINY, keep={"blocks.1.neuron": (0, 2, 3)})
    assert "its blocks differ in intermediate_size" in (cannot_write(plan.student) or "")


def test_weight_norms_count_what_an_index_touches() -> None:
    model = make_model()
    found = collect(model, [], "weight_norm").widths["blocks.0.inner"]
    with torch.no_grad():
        mixer, head = model.blocks[0].mixer, slice(16, 32)  # of 4 heads of 8 query and 16 value channels
        q, _, _, xz = mixer.in_proj.weight.split(mixer.widths)
        ssm = mixer.ssm
        parts = [q[8:16], xz[:64][head], xz[64:][head], mixer.out_proj.weight[:, head], ssm.x_proj.weight[:, head]]
        parts += [t[head] for t in (ssm.conv1d.weight, ssm.conv1d.bias, ssm.dt_proj.weight, ssm.dt_bias, ssm.A_log)]
        parts += [t[head] for t in (ssm.D, mixer.attention_norm.weight, mixer.ssm_norm.weight)]
        expected = sum(part.square().sum() for part in parts)
    torch.testing.assert_close(found[0, 1].double().square().sum(), expected, rtol=1e-5, atol=0)
