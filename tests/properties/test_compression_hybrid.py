"""Pruning of hybrid heads (Hymba) and of Mamba-1, in float64: a student is its teacher with masked activations.

The reference masks what modules read and give, by hooks, and knows nothing of layouts, plans' spans or scaled weights.
Every eps is large, so that a norm whose eps is not corrected shows.
"""

from __future__ import annotations

import copy
import dataclasses
import json
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from halflap.compress.axes import AXES, Sizes, largest_sizes
from halflap.compress.compose import compose
from halflap.compress.masked import masked_teacher
from halflap.compress.metrics import collect
from halflap.compress.plan import PruningPlan
from halflap.compress.prune import apply_plan
from halflap.compress.ranking import plan_for
from halflap.compress.verify import plans_by_axis
from halflap.data.batch import Batch
from halflap.errors import HalflapError
from halflap.models.cache import Cache
from halflap.models.config import (
    AttentionConfig,
    HybridConfig,
    Mamba1Config,
    Mamba2Config,
    MLPConfig,
    ModelConfig,
    RopeConfig,
)
from halflap.models.count import cache_bytes
from halflap.models.layout import layout
from halflap.models.model import HybridModel, initialize

EQUAL, DIFFERENT, EPS = 1e-9, 1e-1, 0.05
TEACHER = "t" * 64
TOKENS = torch.randint(0, 29, (2, 11), generator=torch.Generator().manual_seed(1))
MLP = MLPConfig(10, activation="silu", gated=True)


def cut_model(model: HybridModel, plan: PruningPlan) -> HybridModel:
    student = HybridModel(plan.student).to(next(model.parameters()).dtype).eval()
    student.load_state_dict(dict(apply_plan(plan, model.state_dict().items())), strict=True)
    return student


def pair(
    window: int | None, source: int | None = None, heads: int = 6, values: int = 5, mamba2: bool = False, **ssm: Any
) -> tuple[HybridConfig, MLPConfig]:
    attention = AttentionConfig(
        heads, 2, 4, RopeConfig(), value_head_dim=values, window=window, key_value_source=source
    )
    inner = {"state_size": 4, "norm_eps": EPS}
    mixer: Any = Mamba2Config(heads, values, 2, chunk_size=4, **inner)
    if not mamba2:
        mixer = Mamba1Config(heads * values, dt_rank=3, **inner, **ssm)
    return HybridConfig(attention, mixer, EPS), MLP


def model_config(*pairs: tuple[Any, ...], family: str = "hymba", **more: Any) -> ModelConfig:
    blocks = tuple(block for pair in pairs for block in pair)
    return ModelConfig(family, 29, 12, blocks, **({"norm_eps": EPS} | more))


TRIPLE = model_config(
    *(pair(None), pair(3), pair(3, 2), pair(3, 2), pair(None)), tie_word_embeddings=True, num_meta_tokens=3
)
UNEQUAL = model_config(pair(None, heads=4), pair(2), pair(2, 2, heads=2), num_meta_tokens=2)
MAMBA2 = model_config(pair(None, mamba2=True), pair(3, mamba2=True), pair(3, 2, mamba2=True), tie_word_embeddings=True)
PLAIN = model_config(pair(3, inner_norms=False, conv_bias=False), pair(3, 0, inner_norms=False))
ALONE = model_config(
    (Mamba1Config(14, 4, 3, norm_eps=EPS), MLP, Mamba1Config(10, 6, 2, inner_norms=False)),
    (AttentionConfig(4, 2, 4, value_head_dim=6), Mamba1Config(14, 4, 3, norm_eps=EPS)),
    family="none",
)
CONFIGS = {"triple": TRIPLE, "unequal": UNEQUAL, "mamba2": MAMBA2, "plain": PLAIN, "alone": ALONE}


def make_model(config: ModelConfig) -> HybridModel:
    """Weights of order one everywhere, gains, biases and meta tokens included."""
    model = HybridModel(config).double().eval()
    initialize(model, 0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            if name.endswith("proj.weight"):
                parameter.copy_(noise / parameter.shape[1] ** 0.5)
            elif name.endswith(("norm.weight", ".D")):
                parameter.copy_(1 + 0.3 * noise)
            elif name in ("embedding.weight", "head.weight", "meta_tokens"):
                parameter.copy_(noise)
            elif name.endswith("bias"):
                parameter.add_(0.3 * noise)
    return model


MODELS = {name: make_model(config) for name, config in CONFIGS.items()}


def importance(model: HybridModel, metric: str = "random", seed: int = 0) -> Any:
    segments = torch.ones_like(TOKENS)
    segments[0, 6:], segments[1, 9:] = 2, 0
    return collect(model, [Batch(TOKENS, TOKENS, (segments > 0).float(), segments)], metric, seed=seed)


@torch.no_grad()
def distance(one: HybridModel | Tensor, other: HybridModel | Tensor) -> float:
    a, b = (model if isinstance(model, Tensor) else model(TOKENS) for model in (one, other))
    return float((a - b).abs().max() / b.abs().max())


@torch.no_grad()
def decoded(model: HybridModel) -> Tensor:
    """Logits of a prefill of 4 tokens and a step for each of the others."""
    cache = Cache.create(model.config, batch=2, capacity=16, dtype=torch.float64)
    parts = [model(TOKENS[:, :4], cache=cache)]
    return torch.cat(parts + [model(TOKENS[:, t : t + 1], cache=cache) for t in range(4, TOKENS.shape[1])], 1)


@st.composite
def sizes_of(draw: Any, config: ModelConfig, *, depth: bool = True) -> Sizes:
    largest, found = largest_sizes(config), {}
    for name, most in largest.items():
        if name in AXES and name != "num_attention_heads":
            found[name] = draw(st.integers(max(1, most // 3), most))
    if "num_attention_heads" in largest:
        readers = min(b.attention.queries_per_key_value_head for b in config.blocks if b.attention is not None)
        found["num_attention_heads"] = found["num_key_value_heads"] * draw(st.integers(1, readers))
    if depth and config.family == "hymba":
        found["num_blocks"] = draw(st.integers(1, len(config.blocks) // 2)) * 2
    return Sizes(**found)


def plan_of(config: ModelConfig, correction: str = "masked", blocks: Any = None, **keep: Any) -> PruningPlan:
    """keep: axis names with `__` for `.`."""
    return PruningPlan(TEACHER, config, blocks, {n.replace("__", "."): k for n, k in keep.items()}, correction)


# ---- the reference


def kept_mask(size: int, kept: Any) -> Tensor:
    mask = torch.zeros(size, dtype=torch.float64)
    mask[list(range(size) if kept is None else kept)] = 1
    return mask


def head_mask(attention: AttentionConfig, plan: PruningPlan, index: int) -> Tensor:
    """(H * value_dim,) of the kept channels of kept heads."""
    owner = index if attention.key_value_source is None else attention.key_value_source
    groups: Any = plan.keep.get(f"blocks.{owner}.kv", range(attention.num_key_value_heads))
    table: Any = plan.keep.get(f"blocks.{index}.query")
    mask = torch.zeros(attention.num_key_value_heads, attention.queries_per_key_value_head, dtype=torch.float64)
    for place, group in enumerate(groups):
        mask[group] = kept_mask(mask.shape[1], None if table is None else table[place])
    channels = kept_mask(attention.value_dim, plan.keep.get(f"blocks.{owner}.value_channel"))
    return (mask[..., None] * channels).flatten()


def before(module: Any, mask: Tensor) -> None:
    module.register_forward_pre_hook(lambda _, args: (args[0] * mask, *args[1:]))


def after(module: Any, mask: Tensor) -> None:
    module.register_forward_hook(lambda _, args, output: output * mask)


def hooked_teacher(model: HybridModel, plan: PruningPlan) -> HybridModel:
    """For Mamba-1: what is cut is zero wherever it would be read or written; norms divide by all channels."""
    model = copy.deepcopy(model)
    hidden = kept_mask(12, plan.keep.get("hidden"))
    after(model.embedding, hidden)
    if model.meta_tokens is not None:
        model.meta_tokens.data *= hidden
    for index, block in enumerate(model.blocks):
        config, mixer = model.config.blocks[index], block.mixer
        after(mixer, hidden * (index in plan.keep_blocks))
        if isinstance(config, MLPConfig):
            before(mixer.down_proj, kept_mask(config.intermediate_size, plan.keep.get(f"blocks.{index}.neuron")))
        elif isinstance(config, AttentionConfig):
            before(mixer.o_proj, head_mask(config, plan, index))
        else:
            mask_ssm(mixer, config, plan, index)
    return model


def mask_ssm(mixer: Any, config: Any, plan: PruningPlan, index: int) -> None:
    inner, ssm = mixer, config.ssm
    if isinstance(config, HybridConfig):
        inner, channels = mixer.ssm, head_mask(config.attention, plan, index)
        before(mixer.attention_norm, channels)
        before(mixer.ssm_norm, channels)
    else:
        channels = kept_mask(ssm.inner_size, plan.keep.get(f"blocks.{index}.inner"))
        before(mixer.out_proj, channels)
    before(inner.x_proj, channels)
    states = kept_mask(ssm.state_size, plan.keep.get(f"blocks.{index}.state"))
    after(inner.x_proj, torch.cat([torch.ones(ssm.dt_rank, dtype=torch.float64), states, states]))


# ---- cutting is masking


@pytest.mark.parametrize("name", CONFIGS)
@settings(max_examples=2)
@given(data=st.data())
def test_cutting_equals_masking(name: str, data: Any) -> None:
    """Of every axis alone and of all together, in prefill and in decode, for every norm correction."""
    model, seed = MODELS[name], data.draw(st.integers(0, 99))
    scores = dataclasses.replace(importance(model, "activation"), depth=importance(model, "random", seed).depth)
    scores = dataclasses.replace(scores, widths=importance(model, "random", seed).widths)
    sizes = data.draw(sizes_of(model.config))
    for correction in ("masked", "none", "calibrated"):
        plan = plan_for(scores, TEACHER, model.config, sizes, correction)
        assert PruningPlan.from_json(json.loads(json.dumps(plan.to_json()))) == plan
        for one in (*(plans_by_axis(plan).values() if correction == "masked" else ()), plan):
            student = cut_model(model, one)
            assert distance(student, masked_teacher(model, one)) < EQUAL
            if correction == "masked" and name != "mamba2":
                assert distance(student, hooked_teacher(model, one)) < EQUAL
    steps = decoded(student)
    assert distance(steps, student) < EQUAL and distance(steps, decoded(masked_teacher(model, plan))) < EQUAL


def test_plain_attention_has_value_channels_too() -> None:
    """No size asks for them; a plan may."""
    model, plan = MODELS["alone"], plan_of(ALONE, blocks__3__value_channel=(5, 0, 2), blocks__3__kv=(1,))
    assert plan.student.blocks[3] == AttentionConfig(2, 1, 4, value_head_dim=3)
    for expected in (masked_teacher(model, plan), hooked_teacher(model, plan)):
        assert distance(cut_model(model, plan), expected) < EQUAL


@pytest.mark.parametrize("name", CONFIGS)
@settings(max_examples=3)
@given(data=st.data())
def test_two_cuts_are_one(name: str, data: Any) -> None:
    model, correction = MODELS[name], data.draw(st.sampled_from(["none", "masked", "calibrated"]))
    scores = importance(model, "activation")
    first = plan_for(scores, TEACHER, model.config, data.draw(sizes_of(model.config, depth=False)), correction)
    middle = cut_model(model, first)
    sizes = data.draw(sizes_of(first.student))
    second = plan_for(importance(middle, "activation"), TEACHER, middle.config, sizes, correction)
    assert distance(cut_model(model, compose(second, first)), cut_model(middle, second)) < EQUAL


@pytest.mark.parametrize("left", ["x_proj", "out_proj", "meta_tokens"])
def test_a_shared_eps_needs_every_scaled_input(left: str) -> None:
    model = MODELS["triple"]
    plan = plan_for(importance(model), TEACHER, TRIPLE, Sizes(num_attention_heads=2, ssm_state_size=2))
    eps = {block.norm_eps for block in plan.student.blocks if isinstance(block, HybridConfig)}
    assert eps == {plan.student.norm_eps} and plan.student.norm_eps == pytest.approx(3 * EPS)
    assert plan.scales["blocks.0.mixer.ssm.x_proj.weight"] == pytest.approx((3**0.5, 1.5**0.5, 1.5**0.5))
    object.__setattr__(plan, "scales", {name: f for name, f in plan.scales.items() if left not in name})
    assert distance(cut_model(model, plan), hooked_teacher(model, plan)) > 1e-3


# ---- reordering


ORDERS = {
    "queries": {"blocks__2__query": ((2, 0, 1), (1, 0, 2)), "blocks__4__query": ((0, 2, 1), (2, 1, 0))},
    "value channels": {"blocks__2__value_channel": (4, 1, 0, 2, 3)},
    "states": {"blocks__0__state": (3, 1, 0, 2)},
    "key/value heads": {"blocks__2__kv": (1, 0)},
    "hidden": {"hidden": (*range(11, -1, -1),)},
}


@pytest.mark.parametrize("keep", ORDERS.values(), ids=ORDERS)
@pytest.mark.parametrize("correction", ["none", "masked"])
def test_reordering_leaves_logits_equal(keep: dict[str, Any], correction: str) -> None:
    plan = plan_of(TRIPLE, correction, **keep)
    assert plan.student == TRIPLE and distance(cut_model(MODELS["triple"], plan), MODELS["triple"]) < EQUAL


def swapped(model: HybridModel, index: int, order: tuple[int, ...]) -> HybridModel:
    """Query heads of a block in another order, across key/value heads too."""
    student, table = copy.deepcopy(model), layout(model.config)
    state = student.state_dict()
    for name, tensor in state.items():
        for dim, spans in enumerate(table[name] if name.startswith(f"blocks.{index}.") else ()):
            start = 0
            for span in spans:
                size = torch.Size(axis.size for axis in span).numel()
                if len(span) == 3:
                    part = tensor.narrow(dim, start, size)
                    part.copy_(
                        part.unflatten(dim, (6, -1)).index_select(dim, torch.tensor(order)).flatten(dim, dim + 1)
                    )
                start += size
    student.load_state_dict(state)
    return student


def test_query_heads_may_not_change_their_key_value_head() -> None:
    model = MODELS["triple"]
    assert distance(swapped(model, 2, (1, 0, 2, 3, 5, 4)), model) < EQUAL
    assert distance(swapped(model, 2, (3, 1, 2, 0, 4, 5)), model) > DIFFERENT


# ---- depth, and what students do


def test_a_producer_goes_with_its_readers() -> None:
    model = MODELS["triple"]
    for blocks in ((0, 1, 2, 3, 6, 7, 8, 9), (0, 1, 8, 9), (2, 3, 4, 5, 6, 7), (2, 3)):
        plan = plan_of(TRIPLE, blocks=blocks)
        assert distance(cut_model(model, plan), hooked_teacher(model, plan)) < EQUAL
    with pytest.raises(HalflapError, match="block 4 reads the keys and values of block 2, which is dropped"):
        plan_of(TRIPLE, blocks=(0, 1, 4, 5, 6, 7, 8, 9))


def test_a_student_has_a_small_cache_and_learns() -> None:
    model = MODELS["triple"]
    plan = plan_for(
        importance(model), TEACHER, TRIPLE, Sizes(num_key_value_heads=1, mamba_head_dim=2, drop_blocks=(4, 5))
    )
    cache = Cache.create(plan.student, batch=1, capacity=16, dtype=torch.bfloat16)
    assert cache.nbytes() == cache_bytes(plan.student, 16)
    student = cut_model(model, plan).train()
    student(TOKENS).square().mean().backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in student.parameters())
    assert set(dict(apply_plan(plan, model.state_dict().items()))) == set(student.state_dict())
