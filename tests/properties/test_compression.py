"""The equivalences that pruning must hold, against a slow reference that masks activations (float64).

The reference is written from the equations of the architecture and shares no code with plans or layouts. "Equal"
means to rounding, "different" means by more than a tenth: each equality has a control that the classic mistake breaks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from halflap.compress.axes import axes_of, block_of, short_name
from halflap.compress.compose import compose
from halflap.compress.controls import blind_tensors
from halflap.compress.masked import masked_teacher
from halflap.compress.plan import PruningPlan
from halflap.compress.prune import apply_plan
from halflap.models.cache import Cache
from halflap.models.config import AttentionConfig, Mamba2Config, MLPConfig, ModelConfig, RopeConfig
from halflap.models.count import cache_bytes, count_parameters
from halflap.models.model import HybridModel, initialize

EQUAL, DIFFERENT = 1e-10, 1e-1
TEACHER = "t" * 64

MAMBA = Mamba2Config(num_heads=8, head_dim=6, num_groups=4, state_size=8, chunk_size=4, norm_eps=1e-5)
ATTENTION = AttentionConfig(num_attention_heads=8, num_key_value_heads=2, head_dim=4)
HYBRID = ModelConfig("nemotron_h", 29, 12, (MAMBA, MLPConfig(10), ATTENTION, MLPConfig(10), MAMBA, MLPConfig(10)))
LLAMA = ModelConfig(
    "llama",
    29,
    12,
    (AttentionConfig(6, 2, 4, rope=RopeConfig()), MLPConfig(14, activation="silu", gated=True)) * 3,
    tie_word_embeddings=True,
)


def make_model(config: ModelConfig, seed: int = 0) -> HybridModel:
    """Weights of order one everywhere, gains and biases included, so that nothing hides behind the residual stream."""
    model = HybridModel(config).double().eval()
    initialize(model, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            if name.endswith("proj.weight"):
                parameter.copy_(noise / parameter.shape[1] ** 0.5)
            elif name.endswith(("norm.weight", ".D")):
                parameter.copy_(1 + 0.3 * noise)
            elif name in ("embedding.weight", "head.weight"):
                parameter.copy_(noise)
            elif name.endswith("bias"):
                parameter.add_(0.3 * noise)
    return model


def tokens(time: int = 11) -> Tensor:
    return torch.randint(0, 29, (2, time), generator=torch.Generator().manual_seed(1))


def cut(model: HybridModel, plan: PruningPlan) -> HybridModel:
    student = HybridModel(plan.student).double().eval()
    student.load_state_dict(dict(apply_plan(plan, model.state_dict().items())), strict=True)
    return student


def plan_of(config: ModelConfig, correction: str = "masked", blocks: Any = None, **keep: Any) -> PruningPlan:
    """keep: axis names with `__` for `.`, e.g. blocks__0__head."""
    tables = {name.replace("__", "."): table for name, table in keep.items()}
    return PruningPlan(TEACHER, config, blocks, tables, correction)


@torch.no_grad()
def distance(one: HybridModel | Tensor, other: HybridModel | Tensor) -> float:
    a, b = (model if isinstance(model, Tensor) else model(tokens()) for model in (one, other))
    return float((a - b).abs().max())


# ---- the reference


@dataclass
class Masks:
    """What stays, True or 1: hidden (D,), and by block heads (H, P), states (G, N), neurons (F,), queries (H,)."""

    hidden: Tensor | None = None
    heads: Mapping[int, Tensor] = field(default_factory=dict)
    states: Mapping[int, Tensor] = field(default_factory=dict)
    neurons: Mapping[int, Tensor] = field(default_factory=dict)
    queries: Mapping[int, Tensor] = field(default_factory=dict)
    skipped: tuple[int, ...] = ()
    kept_mean: bool = False


def rms(x: Tensor, gain: Tensor, eps: float, mask: Tensor | None, kept_mean: bool) -> Tensor:
    """Over the last dimension of masked x; the mean counts all channels, or the kept ones only."""
    count = x.shape[-1] if mask is None or not kept_mean else mask.sum(-1, keepdim=True).clamp_min(1)
    return x * gain / torch.sqrt(x.square().sum(-1, keepdim=True) / count + eps)


@torch.no_grad()
def reference(model: HybridModel, masks: Masks) -> Tensor:
    keep = 1 if masks.hidden is None else masks.hidden.double()
    h = model.embedding.weight[tokens()] * keep
    for index, block in enumerate(model.blocks):
        if index in masks.skipped:
            continue
        u = rms(h, block.norm.weight, block.norm.eps, masks.hidden, masks.kept_mean)
        kind = {Mamba2Config: mamba2, AttentionConfig: attention, MLPConfig: mlp}[type(model.config.blocks[index])]
        h = h + kind(block.mixer, u, index, masks) * keep
    h = rms(h, model.norm.weight, model.norm.eps, masks.hidden, masks.kept_mean)
    return h @ model.head_weight.T


def mamba2(mixer: Any, u: Tensor, index: int, masks: Masks) -> Tensor:
    c: Mamba2Config = mixer.config
    z, xBC, dt = (u @ mixer.in_proj.weight.T).split([c.inner_size, c.conv_size, c.num_heads], -1)
    padded = F.pad(xBC, (0, 0, c.conv_kernel - 1, 0))
    mixed = mixer.conv1d.bias + sum(
        padded[:, j : j + u.shape[1]] * mixer.conv1d.weight[:, 0, j] for j in range(c.conv_kernel)
    )
    x, B, C = F.silu(mixed).split([c.inner_size, c.num_groups * c.state_size, c.num_groups * c.state_size], -1)
    x = x.unflatten(-1, (c.num_heads, c.head_dim))
    group = [head // c.heads_per_group for head in range(c.num_heads)]
    B, C = (t.unflatten(-1, (c.num_groups, c.state_size)) * masks.states.get(index, 1) for t in (B, C))
    step = F.softplus(dt + mixer.dt_bias)
    state, ys = torch.zeros(u.shape[0], c.num_heads, c.head_dim, c.state_size, dtype=u.dtype), []
    for t in range(u.shape[1]):
        decay = torch.exp(-step[:, t] * mixer.A_log.exp())[..., None, None]
        state = decay * state + (step[:, t, :, None] * x[:, t])[..., None] * B[:, t, group][:, :, None]
        ys.append((state * C[:, t, group][:, :, None]).sum(-1) + mixer.D[:, None] * x[:, t])
    kept = masks.heads.get(index, torch.ones(c.num_heads, c.head_dim))
    v = torch.stack(ys, 1) * F.silu(z).unflatten(-1, (c.num_heads, c.head_dim)) * kept
    grouped = kept.reshape(c.num_groups, -1)
    gain = mixer.norm.weight.unflatten(0, (c.num_groups, -1))
    normed = rms(v.flatten(-2).unflatten(-1, (c.num_groups, -1)), gain, c.norm_eps, grouped, masks.kept_mean)
    return normed.flatten(-2) @ mixer.out_proj.weight.T


def attention(mixer: Any, u: Tensor, index: int, masks: Masks) -> Tensor:
    c: AttentionConfig = mixer.config
    assert c.rope is None
    q, k, v = (
        (u @ proj.weight.T).unflatten(-1, (-1, c.head_dim)).transpose(1, 2)
        for proj in (mixer.q_proj, mixer.k_proj, mixer.v_proj)
    )
    k, v = (t.repeat_interleave(c.queries_per_key_value_head, 1) for t in (k, v))
    scores = q @ k.transpose(-1, -2) / c.head_dim**0.5
    scores = scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1).bool(), float("-inf"))
    y = (scores.softmax(-1) @ v) * masks.queries.get(index, torch.ones(c.num_attention_heads))[:, None, None]
    return y.transpose(1, 2).flatten(2) @ mixer.o_proj.weight.T


def mlp(mixer: Any, u: Tensor, index: int, masks: Masks) -> Tensor:
    return (F.relu(u @ mixer.up_proj.weight.T).square() * masks.neurons.get(index, 1)) @ mixer.down_proj.weight.T


HEADS = ((1,), (0,), (0,), (1,))  # one of two heads in each of four groups
CHANNELS = (0, 2, 3, 5)
HIDDEN = (0, 1, 3, 4, 6, 7, 8, 10, 11)


def head_mask(table: Any = ((0, 1),) * 4, channels: Any = tuple(range(6))) -> Tensor:
    mask = torch.zeros(4, 2, 6, dtype=torch.float64)
    for group, row in enumerate(table):
        for head in row:
            mask[group, head, list(channels)] = 1
    return mask.reshape(8, 6)


def row_mask(size: int, kept: Any) -> Tensor:
    mask = torch.zeros(size, dtype=torch.bool)
    mask[list(kept)] = True
    return mask


@pytest.fixture(scope="module")
def hybrid() -> HybridModel:
    return make_model(HYBRID)


def test_reference_is_the_model(hybrid: HybridModel) -> None:
    assert distance(hybrid, reference(hybrid, Masks())) < EQUAL
    assert hybrid(tokens()).abs().max() > 1


# ---- reordering changes nothing (1, 2, 3, 5, 8, 9, 11, 12), across groups it does (4, 5, 12)


@pytest.mark.parametrize("config", [HYBRID, LLAMA], ids=["hybrid", "llama"])
@pytest.mark.parametrize("correction", ["none", "masked", "calibrated"])
def test_identity_is_bit_exact(config: ModelConfig, correction: str) -> None:
    model = make_model(config)
    plan = plan_of(config, correction)
    assert plan.student == config
    for (name, before), (student_name, after) in zip(
        model.state_dict().items(), apply_plan(plan, model.state_dict().items()), strict=True
    ):
        assert name == student_name and torch.equal(before, after)


@pytest.mark.parametrize(
    "keep",
    [
        {"blocks__0__head": ((1, 0), (0, 1), (1, 0), (1, 0))},
        {"blocks__4__channel": (5, 3, 1, 0, 2, 4)},
        {"blocks__0__group": (2, 0, 3, 1)},
        {"blocks__0__state": ((7, 6, 5, 4, 3, 2, 1, 0), tuple(range(8)), (1, 0, 3, 2, 5, 4, 7, 6), tuple(range(8)))},
        {"hidden": tuple(reversed(range(12)))},
        {"blocks__1__neuron": (9, 0, 8, 1, 7, 2, 6, 3, 5, 4)},
        {"blocks__2__query": ((3, 2, 1, 0), (1, 0, 2, 3))},
        {"blocks__2__kv": (1, 0)},
    ],
    ids=lambda keep: next(iter(keep)),
)
def test_reordering_leaves_logits_equal(hybrid: HybridModel, keep: dict[str, Any]) -> None:
    assert distance(hybrid, cut(hybrid, plan_of(HYBRID, **keep))) < EQUAL


def swapped_heads(model: HybridModel, heads: tuple[int, ...]) -> HybridModel:
    """Heads of block 0 in this order, B and C left where they are."""
    student = HybridModel(HYBRID).double().eval()
    student.load_state_dict(dict(blind_tensors(plan_of(HYBRID), {0: heads}, model.state_dict().items())))
    return student


def test_heads_of_one_group_may_swap_and_of_two_may_not(hybrid: HybridModel) -> None:
    assert distance(hybrid, swapped_heads(hybrid, (1, 0, 2, 3, 4, 5, 6, 7))) < EQUAL
    assert distance(hybrid, swapped_heads(hybrid, (2, 1, 0, 3, 4, 5, 6, 7))) > DIFFERENT


def test_whole_groups_without_their_B_and_C_differ(hybrid: HybridModel) -> None:
    assert distance(hybrid, swapped_heads(hybrid, (2, 3, 0, 1, 4, 5, 6, 7))) > DIFFERENT


def test_query_heads_across_key_value_heads_differ(hybrid: HybridModel) -> None:
    student = make_model(HYBRID)
    order = [4, 1, 2, 3, 0, 5, 6, 7]
    mixer: Any = student.blocks[2].mixer
    with torch.no_grad():
        q, o = mixer.q_proj.weight.unflatten(0, (8, 4)), mixer.o_proj.weight.unflatten(1, (8, 4))
        mixer.q_proj.weight.copy_(q[order].flatten(0, 1))
        mixer.o_proj.weight.copy_(o[:, order].flatten(1, 2))
    assert distance(hybrid, student) > DIFFERENT


# ---- cutting equals masking (6, 7, 8, 10, 10c, 11, 12, 13), with the right mean (6b, 10b)

CUTS: dict[str, tuple[dict[str, Any], Masks]] = {
    "heads": ({"blocks__0__head": HEADS}, Masks(heads={0: head_mask(HEADS)})),
    "channels": ({"blocks__4__channel": CHANNELS}, Masks(heads={4: head_mask(channels=CHANNELS)})),
    "heads and channels": (
        {"blocks__0__head": HEADS, "blocks__0__channel": CHANNELS},
        Masks(heads={0: head_mask(HEADS, CHANNELS)}),
    ),
    "groups": (
        {"blocks__0__group": (0, 2), "blocks__0__head": ((1,), (0,))},
        Masks(heads={0: head_mask(((1,), (), (0,), ()))}),
    ),
    "states": (
        {"blocks__0__state": ((0, 1, 2), (3, 4, 5), (5, 6, 7), (0, 2, 4))},
        Masks(states={0: torch.stack([row_mask(8, r) for r in ((0, 1, 2), (3, 4, 5), (5, 6, 7), (0, 2, 4))])}),
    ),
    "hidden": ({"hidden": HIDDEN}, Masks(hidden=row_mask(12, HIDDEN))),
    "neurons": ({"blocks__3__neuron": (1, 2, 7)}, Masks(neurons={3: row_mask(10, (1, 2, 7))})),
    "queries": ({"blocks__2__query": ((0, 3), (1, 2))}, Masks(queries={2: row_mask(8, (0, 3, 5, 6))})),
    "key/value heads": ({"blocks__2__kv": (1,)}, Masks(queries={2: row_mask(8, (4, 5, 6, 7))})),
    "blocks": ({"blocks": (0, 1, 2, 5)}, Masks(skipped=(3, 4))),
    "everything": (
        {
            "hidden": HIDDEN,
            "blocks__0__head": HEADS,
            "blocks__0__channel": CHANNELS,
            "blocks__2__query": ((0, 3), (1, 2)),
            "blocks__3__neuron": (1, 2, 7),
            "blocks": (0, 2, 3, 4),
        },
        Masks(
            hidden=row_mask(12, HIDDEN),
            heads={0: head_mask(HEADS, CHANNELS)},
            queries={2: row_mask(8, (0, 3, 5, 6))},
            neurons={3: row_mask(10, (1, 2, 7))},
            skipped=(1, 5),
        ),
    ),
}


@pytest.mark.parametrize("name", CUTS)
@pytest.mark.parametrize("correction", ["masked", "none"])
def test_cutting_equals_masking(hybrid: HybridModel, name: str, correction: str) -> None:
    keep, masks = CUTS[name]
    masks.kept_mean = correction == "none"
    plan = plan_of(HYBRID, correction, **keep)
    student, expected = cut(hybrid, plan), reference(hybrid, masks)
    assert distance(student, expected) < EQUAL
    assert distance(masked_teacher(hybrid, plan), expected) < EQUAL


@pytest.mark.parametrize("name", ["heads", "channels", "heads and channels", "hidden"])
@pytest.mark.parametrize("correction", ["masked", "none"])
def test_a_mean_over_the_wrong_channels_differs(hybrid: HybridModel, name: str, correction: str) -> None:
    keep, masks = CUTS[name]
    masks.kept_mean = correction == "masked"
    assert distance(cut(hybrid, plan_of(HYBRID, correction, **keep)), reference(hybrid, masks)) > DIFFERENT


def test_cutting_one_channel_that_carries_zero_is_free_only_with_the_correction(hybrid: HybridModel) -> None:
    model = make_model(HYBRID)
    mixer: Any = model.blocks[0].mixer
    with torch.no_grad():
        mixer.in_proj.weight[:48].unflatten(0, (8, 6))[1::2] = 0  # z of the second head of every group
    first = {"blocks__0__head": ((0,),) * 4}
    assert distance(model, cut(model, plan_of(HYBRID, "masked", **first))) < EQUAL
    assert distance(model, cut(model, plan_of(HYBRID, "none", **first))) > DIFFERENT


@pytest.mark.parametrize("keep", [{"blocks__1__neuron": tuple(range(9))}, {"blocks__2__query": ((0, 1, 2), (0, 1, 2))}])
def test_dead_neurons_and_heads_are_free(keep: dict[str, Any]) -> None:
    model = make_model(HYBRID)
    with torch.no_grad():
        model.blocks[1].mixer.up_proj.weight[9] = 0
        for head in (3, 7):
            model.blocks[2].mixer.o_proj.weight[:, 4 * head : 4 * head + 4] = 0
    assert distance(model, cut(model, plan_of(HYBRID, **keep))) < EQUAL


def test_dropping_a_block_equals_silencing_its_output(hybrid: HybridModel) -> None:
    model = make_model(HYBRID)
    with torch.no_grad():
        model.blocks[4].mixer.out_proj.weight.zero_()
    assert distance(model, cut(hybrid, plan_of(HYBRID, blocks=(0, 1, 2, 3, 5)))) == 0


LLAMA_CUTS: dict[str, dict[str, Any]] = {
    "hidden": {"hidden": HIDDEN},
    "neurons": {"blocks__1__neuron": (0, 1, 5), "blocks__5__neuron": tuple(range(13))},
    "queries": {"blocks__2__query": ((0, 2), (1, 2))},
    "key/value heads": {"blocks__0__kv": (1,), "blocks__0__query": ((2, 0),)},
    "layers": {"blocks": (0, 1, 4, 5)},
}


@pytest.mark.parametrize("name", LLAMA_CUTS)
@pytest.mark.parametrize("correction", ["masked", "none"])
def test_llama_cut_equals_masked_teacher(name: str, correction: str) -> None:
    """Tied embedding, rotary attention, gated MLP; the masked teacher was checked against the reference above."""
    model = make_model(LLAMA)
    plan = plan_of(LLAMA, correction, **LLAMA_CUTS[name])
    student = cut(model, plan)
    assert distance(masked_teacher(model, plan), student) < EQUAL
    assert distance(model, student) > DIFFERENT


# ---- plans in sequence (14, 15)


@st.composite
def plans(draw: st.DrawFn, config: ModelConfig, correction: str = "none") -> PruningPlan:
    """Any legal plan: blocks dropped, axes cut and reordered, groups gone with their heads and states."""
    unit = 2 if config.family == "llama" else 1
    units = draw(st.sets(st.integers(0, len(config.blocks) // unit - 1), min_size=1))
    blocks = tuple(sorted(unit * u + k for u in units for k in range(unit)))
    axes, keep, counts = axes_of(config), {}, {}
    for name, axis in axes.items():
        if block_of(name) not in (None, *blocks) or draw(st.booleans()):
            counts[name] = axis.size
            if axis.parent is None or counts.get(axis.parent, axis.size) == axes[axis.parent].size:
                continue
        row = st.permutations(range(axis.size))
        counts[name] = draw(st.integers(1, axis.size))
        rows = 1 if axis.parent is None else counts[axis.parent]
        table = tuple(tuple(draw(row)[: counts[name]]) for _ in range(rows))
        keep[name] = table[0] if axis.parent is None else table
    return PruningPlan(TEACHER, config, blocks, keep, correction)


@settings(max_examples=60)
@given(data=st.data(), config=st.sampled_from([HYBRID, LLAMA]), correction=st.sampled_from(["none", "masked"]))
def test_two_plans_equal_their_composition(data: st.DataObject, config: ModelConfig, correction: str) -> None:
    first = data.draw(plans(config, correction))
    second = data.draw(plans(first.student, correction))
    both = compose(second, first)
    state = make_model(config).state_dict()
    twice = dict(apply_plan(second, apply_plan(first, state.items())))
    once = dict(apply_plan(both, state.items()))
    assert list(once) == list(twice)
    if correction == "none":
        assert both.student == second.student
        assert all(torch.equal(once[name], twice[name]) for name in once)
    else:
        students = [HybridModel(plan.student).double().eval() for plan in (both, second)]
        for student, tensors in zip(students, (once, twice), strict=True):
            student.load_state_dict(tensors)
        assert distance(*students) < EQUAL


@settings(max_examples=40)
@given(data=st.data(), config=st.sampled_from([HYBRID, LLAMA]), correction=st.sampled_from(["none", "masked"]))
def test_any_plan_equals_its_masked_teacher(data: st.DataObject, config: ModelConfig, correction: str) -> None:
    plan = data.draw(plans(config, correction))
    model = make_model(config)
    student = cut(model, plan)
    assert distance(student, masked_teacher(model, plan)) < 1e-9
    assert sum(p.numel() for p in student.parameters()) == count_parameters(plan.student)
    assert PruningPlan.from_json(plan.to_json()) == plan


def test_the_order_of_axes_does_not_matter(hybrid: HybridModel) -> None:
    state = hybrid.state_dict()
    keep = {"hidden": HIDDEN}, {"blocks__0__head": HEADS, "blocks__0__channel": CHANNELS}
    results = []
    for one, other in (keep, keep[::-1]):
        first = plan_of(HYBRID, "none", **one)
        second = plan_of(first.student, "none", **other)
        results.append(dict(apply_plan(second, apply_plan(first, state.items()))))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


# ---- students run (16), and stay within the stock class's one eps


def test_a_student_decodes_as_it_prefills(hybrid: HybridModel) -> None:
    student = cut(hybrid, plan_of(HYBRID, **CUTS["everything"][0]))
    whole = student(tokens())
    cache = Cache.create(student.config, batch=2, capacity=16, dtype=torch.float64)
    parts = [student(tokens()[:, :6], cache=cache)]
    parts += [student(tokens()[:, t : t + 1], cache=cache) for t in range(6, 11)]
    assert distance(torch.cat(parts, 1), whole) < EQUAL
    state: Any = cache.blocks[0]
    block: Any = student.config.blocks[0]
    assert state.ssm.shape == (2, block.num_heads, block.head_dim, block.state_size) == (2, 4, 4, 8)
    small = Cache.create(student.config, batch=1, capacity=16, dtype=torch.bfloat16)
    assert small.nbytes() == cache_bytes(student.config, 16)


def equal_cut(**more: Any) -> dict[str, Any]:
    return {f"blocks__{index}__head": HEADS for index in (0, 4)} | more


def test_equal_blocks_share_one_eps_by_a_scaled_residual_stream(hybrid: HybridModel) -> None:
    plan = plan_of(HYBRID, "masked", hidden=HIDDEN, **equal_cut())
    assert plan.student.norm_eps == plan.student.blocks[0].norm_eps == pytest.approx(2e-5)  # type: ignore[union-attr]
    assert plan.scales["embedding.weight"] == plan.scales["blocks.3.mixer.down_proj.weight"]
    assert plan.scales["embedding.weight"][0] == pytest.approx((2 / (12 / 9)) ** 0.5)
    masks = Masks(hidden=row_mask(12, HIDDEN), heads={index: head_mask(HEADS) for index in (0, 4)})
    assert distance(cut(hybrid, plan), reference(hybrid, masks)) < EQUAL


def test_eps_matters_for_the_exactness_of_the_masked_correction() -> None:
    """With a large eps, scaling gains alone is wrong."""
    config = ModelConfig("nemotron_h", 29, 12, HYBRID.blocks, norm_eps=0.5)
    model = make_model(config)
    plan = plan_of(config, hidden=HIDDEN)
    expected = reference(model, Masks(hidden=row_mask(12, HIDDEN)))
    student = cut(model, plan)
    assert distance(student, expected) < EQUAL
    for module in (student.norm, *(block.norm for block in student.blocks)):
        module.eps = 0.5  # type: ignore[union-attr]
    assert distance(student, expected) > DIFFERENT


def test_unequal_blocks_keep_their_own_eps() -> None:
    plan = plan_of(HYBRID, hidden=HIDDEN, blocks__0__head=HEADS)
    assert {short_name(name) for name in plan.scales} == {"weight"}
    assert "embedding.weight" not in plan.scales
    assert plan.student.norm_eps == pytest.approx(1e-5 * 12 / 9)
