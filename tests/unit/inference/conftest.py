"""Tiny random models of every family, with windows, meta tokens, shared keys and values and unequal blocks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from halflap.data.tokenizer import Tokenizer, train_tokenizer
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

VOCABULARY = 300
ROPE = RopeConfig()


def _mamba(heads: int, states: int) -> Mamba2Config:
    return Mamba2Config(num_heads=heads, head_dim=8, num_groups=2, state_size=states, chunk_size=8)


def _attention(heads: int, **changes: Any) -> AttentionConfig:
    return AttentionConfig(num_attention_heads=heads, num_key_value_heads=2, head_dim=8, **changes)


def _hymba(heads: int, states: int, **attention: Any) -> HybridConfig:
    attended = _attention(heads, rope=ROPE, value_head_dim=16, **attention)
    return HybridConfig(attended, Mamba1Config(inner_size=16 * heads, state_size=states, dt_rank=4))


def _hymba_2(heads: int, **attention: Any) -> HybridConfig:
    return HybridConfig(_attention(heads, rope=ROPE, **attention), _mamba(heads, 8))


GATED = MLPConfig(48, "silu", gated=True)
FAMILIES: dict[str, ModelConfig] = {
    "nemotron_h": ModelConfig(
        "nemotron_h", VOCABULARY, 32, (_mamba(4, 8), MLPConfig(48), _attention(4), MLPConfig(24), _mamba(2, 16))
    ),
    "llama": ModelConfig("llama", VOCABULARY, 32, (_attention(4, rope=ROPE), GATED, _attention(2, rope=ROPE), GATED)),
    "nemotron": ModelConfig(
        "nemotron", VOCABULARY, 32, (_attention(4, rope=RopeConfig(fraction=0.5)), MLPConfig(48)), norm="layer1p"
    ),
    "hymba": ModelConfig(
        "hymba",
        VOCABULARY,
        32,
        (
            _hymba(4, 4),
            GATED,
            _hymba(2, 8, window=5),
            GATED,
            _hymba(2, 4, window=5, key_value_source=2),
            _hymba(4, 4, window=5),
        ),
        num_meta_tokens=3,
    ),
    "hymba_mamba2": ModelConfig(
        "hymba", VOCABULARY, 32, (_hymba_2(4, window=5), GATED, _hymba_2(4), Mamba1Config(24, 4, 4)), num_meta_tokens=2
    ),
}
EVERY = tuple(FAMILIES)


def tiny(family: str, seed: int = 1, **changes: Any) -> HybridModel:
    import dataclasses

    model = HybridModel(dataclasses.replace(FAMILIES[family], **changes)).eval()
    initialize(model, seed)
    with torch.no_grad():  # initial weights are small: every model would repeat its last token
        for name, parameter in model.named_parameters():
            if name.endswith("proj.weight"):
                parameter.mul_(8)
            elif name == "meta_tokens":
                parameter.normal_(generator=torch.Generator().manual_seed(seed))
    return model


@pytest.fixture
def make() -> Callable[..., HybridModel]:
    """tiny(family, seed, **changes of the config)."""
    return tiny


@pytest.fixture(scope="module", params=EVERY)
def model(request: pytest.FixtureRequest) -> HybridModel:
    return tiny(request.param)


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return train_tokenizer(["the cat sat on the mat, ünïcödé 日本語 🙂 " * 4], VOCABULARY, progress=False)
