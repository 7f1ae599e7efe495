"""Asked, given up, put aside, guessed and remembered in any order, a reply is what its prompt alone gives."""

from __future__ import annotations

import functools
import random
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from halflap.inference import groups
from halflap.inference.generate import generate
from halflap.inference.requests import EngineSettings, Request, SamplingParams
from halflap.inference.scheduler import Scheduler
from halflap.inference.stream import Stream
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

MAMBA = Mamba2Config(num_heads=2, head_dim=8, num_groups=1, state_size=8, chunk_size=8)
ATTENTION = AttentionConfig(num_attention_heads=2, num_key_value_heads=1, head_dim=8, rope=RopeConfig())
WINDOWED = AttentionConfig(2, 1, 8, RopeConfig(), window=4)
SCAN = Mamba1Config(inner_size=16, state_size=4, dt_rank=4)
MODELS = {
    "nemotron_h": ((MAMBA, MLPConfig(24), ATTENTION), 0),
    "hymba": ((HybridConfig(ATTENTION, SCAN), MLPConfig(24), HybridConfig(WINDOWED, SCAN)), 3),
}


@functools.cache
def model(family: str) -> HybridModel:
    blocks, meta = MODELS[family]
    made = HybridModel(ModelConfig(family, 40, 16, blocks, num_meta_tokens=meta)).eval()  # type: ignore[arg-type]
    initialize(made, 1)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if name.endswith("proj.weight"):
                parameter.mul_(8)
    return made


@functools.cache
def alone(family: str, prompt: tuple[int, ...], count: int, temperature: float, seed: int) -> list[int]:
    return generate(model(family), [prompt], count, temperature=temperature, seed=seed)[0].tokens


def asked(seed: int) -> Request:
    """One of few prompts, which share beginnings."""
    draw = random.Random(seed)
    shared = tuple(draw.randrange(2) for _ in range(draw.choice((1, 5, 19, 33))))
    sampling = SamplingParams(draw.choice((0.0, 0.8)), seed=draw.randrange(3))
    return Request(shared, draw.choice((1, 6, 14)), sampling, n=draw.choice((1, 1, 2)))


@pytest.fixture(scope="module", autouse=True)
def many_groups() -> Iterator[None]:
    """Groups so short that replies outgrow them, and caches that grow often."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(groups, "SHORTEST", 8)
        patch.setattr(groups, "STEEP", 2)
        patch.setattr("halflap.models.slots.GROW", 3)
        yield


STEP = st.tuples(st.sampled_from(["step", "step", "step", "submit", "submit", "cancel", "aside"]), st.integers(0, 30))


@pytest.mark.parametrize("family", MODELS)
@settings(max_examples=25)
@given(
    steps=st.lists(STEP, min_size=5, max_size=30),
    slots=st.integers(1, 4),
    chunk=st.sampled_from([4, 16]),
    tight=st.booleans(),
    guess=st.sampled_from([None, "lookup", "draft"]),
    prefix=st.sampled_from([0, 20_000, 1_000_000]),
)
def test_replies_stay_what_they_are_alone(
    family: str, steps: list[tuple[str, int]], slots: int, chunk: int, tight: bool, guess: str | None, prefix: int
) -> None:
    speculate = model("nemotron_h") if guess == "draft" else guess
    chosen = EngineSettings(max_batch=slots, prefill_chunk=chunk, speculate=speculate, prefix_cache=prefix, max_draft=3)
    scheduler = Scheduler(model(family), None, chosen)
    scheduler.budget.bytes = scheduler.budget.row(60) * 2 if tight else None
    streams: list[Stream] = []
    for what, number in steps:
        if what == "submit":
            streams.append(Stream(asked(number)))
            scheduler.add(streams[-1])
        elif what == "cancel" and streams:
            streams[number % len(streams)].cancel()
        elif what == "aside" and scheduler.rows:
            with torch.inference_mode():
                scheduler._put_aside()
        else:
            scheduler.step()
    while scheduler.busy:
        scheduler.step()
    assert not (scheduler.rows or scheduler.parked or scheduler.waiting or scheduler.slots.nbytes())
    for stream in streams:
        request = stream.request
        pieces = stream.result()
        assert [piece.choice for piece in pieces] == list(range(request.n))
        for piece in pieces:
            s = request.sampling
            whole = alone(family, request.prompt, request.max_new_tokens, s.temperature, s.seed + piece.choice)
            got = [token.id for token in piece.tokens]
            assert got == whole[: len(got)]
            assert piece.finish_reason == ("length" if len(got) == len(whole) else "cancelled")
            assert stream.cancelled or piece.finish_reason == "length"
