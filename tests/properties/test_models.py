"""The model's equivalences: layout and parameters, prefill and decode, packing, padding, rows of unequal length."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from halflap.models.cache import Cache
from halflap.models.config import (
    AttentionConfig,
    BlockConfig,
    HybridConfig,
    Mamba1Config,
    Mamba2Config,
    MLPConfig,
    ModelConfig,
    NTKScaling,
    RopeConfig,
)
from halflap.models.layout import layout, shape
from halflap.models.model import HybridModel, initialize

# float64: only the order of sums differs
TOLERANCE = 1e-10


@st.composite
def attentions(draw: st.DrawFn, bias: bool = True) -> AttentionConfig:
    shared = draw(st.integers(1, 2))
    rope = draw(st.sampled_from([None, RopeConfig(), RopeConfig(500.0, 0.5), RopeConfig(scaling=NTKScaling(4, 16))]))
    return AttentionConfig(
        shared * draw(st.integers(1, 3)),
        shared,
        4,
        rope=rope,
        bias=bias and draw(st.booleans()),
        value_head_dim=draw(st.sampled_from([None, 8, 3])),
        window=draw(st.sampled_from([None, 1, 3, 6])),
    )


@st.composite
def blocks(draw: st.DrawFn) -> BlockConfig:
    kind = draw(st.sampled_from("MM**-SHH"))
    conv = {"conv_kernel": draw(st.integers(2, 4)), "conv_bias": draw(st.booleans())}
    state = draw(st.sampled_from([3, 8]))
    if kind == "M":
        groups = draw(st.sampled_from([1, 2]))
        return Mamba2Config(
            num_heads=groups * draw(st.integers(1, 3)),
            head_dim=draw(st.sampled_from([2, 5])),
            num_groups=groups,
            state_size=state,
            chunk_size=draw(st.sampled_from([4, 16])),
            time_step_limit=draw(st.sampled_from([(0.0, float("inf")), (0.01, 0.1)])),
            **conv,
        )
    if kind == "S":
        return Mamba1Config(
            draw(st.integers(1, 9)), state, draw(st.integers(1, 3)), inner_norms=draw(st.booleans()), **conv
        )
    if kind == "H":
        attention = draw(attentions(bias=False))
        heads, groups, width = attention.num_attention_heads, attention.num_key_value_heads, attention.value_dim
        if draw(st.booleans()):
            return HybridConfig(attention, Mamba2Config(heads, width, groups, state, chunk_size=4, **conv))
        return HybridConfig(attention, Mamba1Config(heads * width, state, 2, **conv))
    if kind == "*":
        return draw(attentions())
    gated = draw(st.booleans())
    return MLPConfig(
        draw(st.integers(1, 9)), activation="silu" if gated else "relu2", gated=gated, bias=draw(st.booleans())
    )


def share(listed: list[BlockConfig], draws: list[bool]) -> tuple[BlockConfig, ...]:
    """Behind windowed blocks, where drawn, copies of them that read their keys and values."""
    found: list[BlockConfig] = []
    for block, wanted in zip(listed, draws):
        found.append(block)
        attention = block.attention
        if wanted and attention is not None and attention.window is not None:
            reader = dataclasses.replace(attention, key_value_source=len(found) - 1)
            found.append(reader if block is attention else dataclasses.replace(block, attention=reader))
    return tuple(found)


@st.composite
def models(draw: st.DrawFn) -> HybridModel:
    """Any mix of blocks, each with its own widths; hidden size unrelated to head counts."""
    config = ModelConfig(
        family="nemotron_h",
        vocab_size=23,
        hidden_size=draw(st.sampled_from([6, 10])),
        blocks=share(
            draw(st.lists(blocks(), min_size=1, max_size=4)), draw(st.lists(st.booleans(), min_size=4, max_size=4))
        ),
        tie_word_embeddings=draw(st.booleans()),
        residual_in_fp32=draw(st.booleans()),
        num_meta_tokens=draw(st.sampled_from([0, 0, 1, 4])),
    )
    return random_model(config, draw(st.integers(0, 10**6)))


def random_model(config: ModelConfig, seed: int) -> HybridModel:
    model = HybridModel(config).double().eval()
    initialize(model, seed)
    with torch.no_grad():  # small initial weights would hide errors behind the residual stream
        for name, parameter in model.named_parameters():
            if name.endswith("proj.weight") or name == "meta_tokens":
                parameter.mul_(20)
    return model


def tokens(batch: int, time: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 23, (batch, time), generator=torch.Generator().manual_seed(seed))


@settings(max_examples=40)
@given(model=models())
def test_layout_states_every_parameter(model: HybridModel) -> None:
    real = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert real == {name: shape(dims) for name, dims in layout(model.config).items()}


@settings(max_examples=40)
@given(model=models())
def test_config_survives_json(model: HybridModel) -> None:
    assert ModelConfig.from_json(model.config.to_json()) == model.config


@settings(max_examples=40)
@given(model=models(), cut=st.integers(1, 14), second=st.integers(0, 5))
@torch.no_grad()
def test_prefill_then_decode_equals_one_pass(model: HybridModel, cut: int, second: int) -> None:
    text = tokens(2, 15)
    whole = model(text)
    cache = Cache.create(model.config, 2, capacity=4, dtype=torch.float64)
    pieces = [model(text[:, :cut], cache=cache)]
    if second and cut + second < 15:
        pieces.append(model(text[:, cut : cut + second], cache=cache))
    for t in range(sum(p.shape[1] for p in pieces), 15):
        pieces.append(model(text[:, t : t + 1], cache=cache))
    assert (torch.cat(pieces, 1) - whole).abs().max() < TOLERANCE
    assert cache.lengths.tolist() == [15, 15]


@settings(max_examples=30)
@given(model=models(), lengths=st.lists(st.integers(1, 9), min_size=2, max_size=4))
@torch.no_grad()
def test_rows_of_unequal_length_equal_rows_alone(model: HybridModel, lengths: list[int]) -> None:
    batch = len(lengths)
    text = tokens(batch, 14)
    cache = Cache.create(model.config, batch, capacity=4, dtype=torch.float64)
    model(text[:, : max(lengths)], cache=cache, lengths=torch.tensor(lengths))
    for step in range(3):
        following = torch.stack([text[b, n + step] for b, n in enumerate(lengths)])[:, None]
        together = model(following, cache=cache)
        for b, n in enumerate(lengths):
            alone = model(text[b : b + 1, : n + step + 1])[0, -1]
            assert (together[b, 0] - alone).abs().max() < TOLERANCE


@settings(max_examples=30)
@given(model=models(), lengths=st.lists(st.integers(1, 8), min_size=1, max_size=4), left=st.integers(0, 3))
@torch.no_grad()
def test_packed_documents_equal_separate_ones(model: HybridModel, lengths: list[int], left: int) -> None:
    documents = [tokens(1, n, seed=n) for n in lengths]
    row = torch.cat([torch.zeros(1, left, dtype=torch.int64), *documents], 1)
    numbers = [0] * left + [i + 1 for i, n in enumerate(lengths) for _ in range(n)]
    packed = model(row, segments=torch.tensor([numbers]))
    alone = torch.cat([model(document) for document in documents], 1)
    assert (packed[:, left:] - alone).abs().max() < TOLERANCE


@torch.no_grad()
def test_selected_and_cloned_caches_are_independent() -> None:
    config = ModelConfig(
        "nemotron_h", 23, 8, (Mamba2Config(4, 3, 2, 5), AttentionConfig(4, 2, 4, rope=RopeConfig()), MLPConfig(6))
    )
    model = random_model(config, 0)
    cache = Cache.create(config, 2, dtype=torch.float64)
    model(tokens(2, 6), cache=cache)
    snapshot = cache.clone()
    swapped = cache.select([1, 0, 0])
    following = tokens(2, 1, seed=9)
    expected = model(following, cache=cache)
    assert torch.equal(model(following, cache=snapshot), expected)
    reordered = model(following[[1, 0, 0]], cache=swapped)
    assert (reordered - expected[[1, 0, 0]]).abs().max() < TOLERANCE
    assert swapped.nbytes() == 3 * cache.row(0).nbytes()


def test_a_cached_pass_refuses_segments() -> None:
    config = ModelConfig("nemotron_h", 23, 8, (MLPConfig(6),))
    with pytest.raises(ValueError, match="lengths, not segments"):
        HybridModel(config)(tokens(1, 2), segments=torch.ones(1, 2), cache=Cache.create(config, 1))


def test_initialisation_is_seeded_and_in_range() -> None:
    config = ModelConfig("nemotron_h", 23, 8, (Mamba2Config(64, 3, 2, 5), MLPConfig(6)))
    first, again, other = (HybridModel(config) for _ in range(3))
    initialize(first, 1), initialize(again, 1), initialize(other, 2)
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), again.state_dict().values(), strict=True))
    assert not torch.equal(first.embedding.weight, other.embedding.weight)
    mixer = first.blocks[0].mixer
    assert 0 <= mixer.A_log.min() and mixer.A_log.max() <= torch.log(torch.tensor(16.0))
    step = torch.nn.functional.softplus(mixer.dt_bias)
    assert 0.99e-3 <= step.min() and step.max() <= 0.101
