"""Passes that are timed are those of a model: every family, phase and batch, at exactly the context that is said."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from halflap.compress.cost_model import Condition
from halflap.evaluate import block_times
from halflap.evaluate.block_times import stacks, timer_of
from halflap.models.cache import Cache
from halflap.models.decoder import Decoder
from halflap.models.model import HybridModel, initialize
from halflap.models.presets import hymba

HYMBA = hymba(
    5, hidden=64, mlp=96, heads=(4, 2), state=8, window=16, meta=4, vocab=512, context=128, original_context=64
)


def model_of(config: Any) -> HybridModel:
    model = HybridModel(config)
    initialize(model, 0)
    return model.eval()


@pytest.mark.parametrize("phase", ["decode", "prefill"])
def test_every_stack_runs(tiny_config: Any, phase: Any) -> None:
    condition = Condition(phase, 24, 2)
    for config in (tiny_config, HYMBA):
        for stack in stacks(config, condition, 4, 10_000)[:: 1 if config is HYMBA else 3]:
            start = getattr(block_times, "_decode_step" if phase == "decode" else "_reading")
            model = model_of(dataclasses.replace(stack, copies=min(2, stack.copies)).config(config))
            with torch.inference_mode():
                tokens = start(model, condition)()
            assert tokens.shape == (2,) and 0 <= int(tokens.min())


def test_the_median_of_passes_on_the_clock(tiny_config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that moves by what each pass takes: the third pass is disturbed, and the median does not see it."""
    readings = iter([0, 1, 1, 2, 2, 12, 12, 13])
    monkeypatch.setattr(block_times, "now", lambda device: next(readings))
    monkeypatch.setattr(block_times, "LONG", 100.0)
    assert timer_of(model_of(tiny_config), Condition("decode", 8, 1))(block_times.SECONDS) == 1


@pytest.mark.parametrize("batch", [1, 3])
def test_a_step_is_the_last_token_of_the_context(batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = model_of(HYMBA), []
    decode = Decoder.__call__

    def watched(self: Decoder, tokens: torch.Tensor, cache: Cache) -> torch.Tensor:
        logits = decode(self, tokens, cache)
        seen.append((cache.used, cache.lengths.tolist()))
        return logits

    monkeypatch.setattr(Decoder, "__call__", watched)
    monkeypatch.setattr(block_times, "SECONDS", 0.0)
    monkeypatch.setattr(block_times, "LONG", 1e9)
    assert timer_of(model, Condition("decode", 24, batch))(block_times.SECONDS) > 0
    assert seen == [(24, [24] * batch)] * (1 + block_times.LEAST_PASSES)
