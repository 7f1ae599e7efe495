"""A pass of fixed shapes and addresses is the model's own; with a GPU, so is its graph."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from torch import Tensor

from halflap.models import graphs
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
from halflap.models.decoder import Decoder
from halflap.models.model import HybridModel, initialize

ROPE = RopeConfig()
MAMBA = Mamba2Config(num_heads=4, head_dim=5, num_groups=2, state_size=6, chunk_size=8)
SCAN = Mamba1Config(inner_size=40, state_size=5, dt_rank=3)
WIDE = AttentionConfig(4, 2, 6, ROPE, value_head_dim=10)
WINDOWED = dataclasses.replace(WIDE, window=4)
CONFIGS = {
    "nemotron_h": ModelConfig("nemotron_h", 37, 24, (MAMBA, MLPConfig(29), AttentionConfig(4, 2, 6, ROPE), MAMBA)),
    "hymba": ModelConfig(
        "hymba", 37, 24, (HybridConfig(WIDE, SCAN), MLPConfig(31), HybridConfig(WINDOWED, SCAN)), num_meta_tokens=3
    ),
}  # fmt: skip


def made(config: ModelConfig) -> HybridModel:
    model = HybridModel(config).eval()
    initialize(model, 3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("proj.weight"):
                parameter.mul_(6)
    return model


def played(step: graphs.Step, warm_up: graphs.Step) -> tuple[object, Tensor]:
    """As a graph is: recording computes nothing, a replay runs what was recorded and leaves it in the same place."""
    logits = warm_up().clone()
    return lambda: logits.copy_(step()), logits


@torch.no_grad()
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("lengths", [[5], [1, 6, 3]])
def test_a_fixed_pass_is_the_models(name: str, lengths: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "LEAST_SLOTS", 8)
    model, g = made(CONFIGS[name]).double(), torch.Generator().manual_seed(0)
    cache = Cache.create(model.config, len(lengths), 4, torch.float64)
    model(torch.randint(0, 37, (len(lengths), 6), generator=g), cache=cache, lengths=torch.tensor(lengths))
    other, decode = cache.clone(), graphs.Graphs(model, played)  # type: ignore[arg-type]
    for _ in range(14):
        tokens = torch.randint(0, 37, (len(lengths), 1), generator=g)
        assert decode.takes(tokens, other)
        torch.testing.assert_close(decode(tokens, other), model(tokens, cache=cache), rtol=1e-12, atol=1e-12)
    assert torch.equal(cache.lengths, other.lengths) and cache.used == other.used
    assert 2 <= len(decode._recorded) <= 4, "one for each size of the keys and values"
    more = torch.randint(0, 37, (len(lengths), 5), generator=g)
    torch.testing.assert_close(model(more, cache=other), model(more, cache=cache), rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_what_has_no_fixed_form() -> None:
    model = made(CONFIGS["nemotron_h"])
    cache, decode = Cache.create(model.config, 2), graphs.Graphs(model, played)  # type: ignore[arg-type]
    token = torch.zeros(2, 1, dtype=torch.int64)
    assert not decode.takes(token, cache), "nothing is read yet"
    model(token, cache=cache)
    assert decode.takes(token, cache) and not decode.takes(token.expand(2, 3), cache)
    with torch.enable_grad():
        assert not decode.takes(token, cache)
    cache.hold()
    assert not decode.takes(token, cache)
    assert Decoder(model)._graphs is None, "on a CPU there are none"


@pytest.mark.gpu
@torch.no_grad()
@pytest.mark.parametrize("name", CONFIGS)
def test_a_graph_is_the_model(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HALFLAP_CUDA_GRAPHS", "1")
    model, g = made(CONFIGS[name]).cuda(), torch.Generator().manual_seed(0)
    exact, decode = copy.deepcopy(model).double(), Decoder(model)
    assert decode._graphs is not None
    caches = [Cache.create(model.config, 3, 4, dtype, "cuda") for dtype in (torch.float32, torch.float64)]
    first, counts = torch.randint(0, 37, (3, 6), generator=g).cuda(), torch.tensor([1, 6, 3]).cuda()
    for each, cache in zip((model, exact), caches):
        each(first, cache=cache, lengths=counts)
    for _ in range(300):  # past the first number of slots
        tokens = torch.randint(0, 37, (3, 1), generator=g).cuda()
        found, wanted = decode(tokens, cache=caches[0]), exact(tokens, cache=caches[1])
        # float32 sums in six blocks
        torch.testing.assert_close(found.double(), wanted, rtol=1e-3, atol=1e-3 * float(wanted.abs().max()))
    assert 1 < len(decode._graphs._recorded) < 6
