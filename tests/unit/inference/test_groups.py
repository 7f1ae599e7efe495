"""A long reply among short ones does not make them long, and moves on without anybody noticing."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from halflap.inference import groups
from halflap.inference.generate import generate
from halflap.inference.requests import EngineSettings, Request
from halflap.inference.scheduler import Scheduler
from halflap.inference.stream import Stream
from halflap.models.model import HybridModel


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(groups, "SHORTEST", 16)
    monkeypatch.setattr("halflap.models.slots.GROW", 4)


def test_rows_are_as_long_as_their_group(model: HybridModel) -> None:
    prompts = [tuple(range(60)), (5,), (7, 8), (9, 10, 11), tuple(range(100, 113))]
    scheduler = Scheduler(model, None, EngineSettings())
    streams = [Stream(Request(prompt, 40)) for prompt in prompts]
    for stream in streams:
        scheduler.add(stream)
    scheduler.step()
    lengths = {group.bound: [reply.length for reply in group.rows] for group in scheduler.slots.groups}
    assert lengths[64] == [61] and len(lengths[16]) == 4
    assert scheduler.slots.nbytes() <= scheduler.budget.row(96) + 4 * scheduler.budget.row(48)
    bounds = set()
    while scheduler.busy:
        scheduler.step()
        bounds |= {group.bound for group in scheduler.slots.groups}
        for group in scheduler.slots.groups:
            assert group.cache.lengths[: len(group.rows)].tolist() == [reply.length for reply in group.rows]
    assert bounds == {16, 64, 256}
    for stream, prompt in zip(streams, prompts, strict=True):
        (piece,) = stream.result()
        assert [token.id for token in piece.tokens] == generate(model, [prompt], 40)[0].tokens


def test_memory_goes_to_rows_that_need_it(make: Callable[..., HybridModel]) -> None:
    """Fifteen short replies run beside a long one in memory that equally long rows would not have."""
    model = make("llama")
    scheduler = Scheduler(model, None, EngineSettings(max_batch=16))
    scheduler.budget.bytes = 3 * scheduler.budget.row(300) + 15 * scheduler.budget.row(24)
    streams = [Stream(Request(tuple(range(250)), 8))] + [Stream(Request((i, i + 1), 8)) for i in range(15)]
    for stream in streams:
        scheduler.add(stream)
    most = 0
    while scheduler.busy:
        scheduler.step()
        most = max(most, len(scheduler.rows))
        assert scheduler.slots.nbytes() <= scheduler.budget.bytes
    assert most == 16 and scheduler.counts["preempted"] == 0


def test_models_without_growing_rows_have_one_group(make: Callable[..., HybridModel]) -> None:
    blocks = make("nemotron_h").config.blocks
    model = make("nemotron_h", blocks=tuple(block for block in blocks if block.attention is None))
    scheduler = Scheduler(model, None, EngineSettings())
    for prompt in ((5,), tuple(range(200))):
        scheduler.add(Stream(Request(prompt, 8)))
    with torch.inference_mode():
        scheduler.step()
    assert len(scheduler.slots.groups) == 1
