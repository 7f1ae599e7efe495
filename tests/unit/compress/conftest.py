"""A tiny float64 model of every family, and text for it: packed documents, padding, several rows."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from halflap.data.batch import Batch
from halflap.models.config import (
    AttentionConfig,
    HybridConfig,
    Mamba1Config,
    Mamba2Config,
    MLPConfig,
    ModelConfig,
    RopeConfig,
)
from halflap.models.model import HybridModel, initialize
from halflap.models.presets import nemotron_4
from halflap.models.streams import Stream

VOCAB = 31
GATED = MLPConfig(10, activation="silu", gated=True)


def _hymba(ssm: Mamba1Config | Mamba2Config) -> ModelConfig:
    own = AttentionConfig(4, 2, 4, rope=RopeConfig(), value_head_dim=6, window=3)
    reads = AttentionConfig(4, 2, 4, rope=RopeConfig(), value_head_dim=6, window=3, key_value_source=0)
    blocks = (HybridConfig(own, ssm), GATED, HybridConfig(reads, ssm), GATED)
    return ModelConfig("hymba", VOCAB, 12, blocks, num_meta_tokens=2, tie_word_embeddings=True)


FAMILIES: dict[str, ModelConfig] = {
    "nemotron_h": ModelConfig(
        "nemotron_h", VOCAB, 12, (Mamba2Config(8, 6, 4, 8), MLPConfig(10), AttentionConfig(8, 2, 4), MLPConfig(10))
    ),
    "llama": ModelConfig(
        "llama", VOCAB, 12, (AttentionConfig(6, 2, 4, rope=RopeConfig()), GATED) * 2, tie_word_embeddings=True
    ),
    "nemotron": nemotron_4(2, hidden=12, mlp=10, attention=(4, 2, 4), vocab=VOCAB),
    "hymba": _hymba(Mamba1Config(24, 4, 3)),
    "hymba_mamba2": _hymba(Mamba2Config(4, 6, 2, 4, chunk_size=4)),
    "mamba1": ModelConfig(
        "none", VOCAB, 12, (Mamba1Config(14, 4, 3), GATED, Mamba1Config(14, 4, 3, inner_norms=False))
    ),
}


def random_model(config: ModelConfig) -> HybridModel:
    """Weights of order one everywhere, gains and biases included."""
    model = HybridModel(config).double().eval()
    initialize(model, 0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            if name.endswith("proj.weight"):
                parameter.copy_(noise / parameter.shape[1] ** 0.5)
            elif name in ("embedding.weight", "head.weight", "meta_tokens"):
                parameter.copy_(noise)
            elif "norm" in name or name.endswith("bias"):
                parameter.add_(0.3 * noise)
    return model


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def make() -> Callable[[str], HybridModel]:
    """The model of a family, anew at every call."""
    return lambda name: random_model(FAMILIES[name])


@pytest.fixture
def live_bytes() -> Callable[[], int]:
    """Bytes of all tensors with storage that Python holds now."""
    gc.collect()  # what earlier tests have left would go at any time, and be missed

    def weigh() -> int:
        kinds = (torch.Tensor, torch.nn.Parameter)
        tensors = [thing for thing in gc.get_objects() if type(thing) in kinds and not thing.is_meta]
        return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())

    return weigh


@pytest.fixture
def weigh_passes(monkeypatch: pytest.MonkeyPatch, live_bytes: Callable[[], int]) -> Callable[[int], list[int]]:
    """From its call on, the bytes that live at every so many-th pass of a stream through a block."""

    def begin(every: int) -> list[int]:
        weighed: list[int] = []
        passes, through = itertools.count(1), Stream.through

        def step(stream: Stream, index: int, block: Any) -> Stream:
            if next(passes) % every == 0:
                weighed.append(live_bytes())
            return through(stream, index, block)

        monkeypatch.setattr(Stream, "through", step)
        return weighed

    return begin


@pytest.fixture
def text() -> Batch:
    """Five rows of eleven tokens: two documents in one row, padding in another, and a row with no text at all."""
    tokens = torch.randint(VOCAB, (5, 12), generator=torch.Generator().manual_seed(3))
    segments = torch.ones(5, 11, dtype=torch.int64)
    segments[1, 6:], segments[2, 8:], segments[3] = 2, 0, 0
    weights = (segments > 0).float()
    weights[1, 5] = weights[2, 7] = 0  # ends of documents
    return Batch(tokens[:, :-1], tokens[:, 1:], weights, segments)
