"""Nobody waits for all of what another asked for at once, and texts do not change by it."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from halflap.inference.requests import EngineSettings, Request
from halflap.inference.scheduler import Scheduler
from halflap.inference.stream import Stream
from halflap.inference.turns import MOST_GROUPS, Turns
from halflap.models.model import HybridModel

LONG = 12  # new tokens of each reply of the one who asks for much


def add(scheduler: Scheduler, *requests: Request) -> list[Stream]:
    streams = [Stream(request) for request in requests]
    for stream in streams:
        scheduler.add(stream)
    return streams


def steps_until(scheduler: Scheduler, stream: Stream) -> int:
    count = 0
    while stream.usage is None:
        scheduler.step()
        count += 1
    return count


@pytest.mark.parametrize("memory", [None, 6.0], ids=["any memory", "little memory"])
@pytest.mark.parametrize("choices", [False, True], ids=["prompts", "choices"])
def test_a_short_request_waits_for_one_reply_of_a_long_one(
    make: Callable[..., HybridModel], choices: bool, memory: float | None
) -> None:
    model = make("nemotron_h")
    one = Scheduler(model, None, EngineSettings()).budget.row(LONG + 4)
    settings = EngineSettings(max_batch=2, memory=None if memory is None else int(memory * one))
    scheduler = Scheduler(model, None, settings)
    prompts = [(7,)] if choices else [(7, number) for number in range(20)]
    many = add(scheduler, *(Request(p, LONG, n=20 if choices else 1, ignore_eos=True, group="a") for p in prompts))
    for _ in range(3):
        scheduler.step()
    (short,) = add(scheduler, Request((9, 9), 2, ignore_eos=True))
    assert steps_until(scheduler, short) < 2 * LONG  # and not ten times as many
    (later,) = add(scheduler, Request((9, 9), 2, ignore_eos=True))
    while scheduler.busy:
        scheduler.step()
    assert [t.id for p in short.result() for t in p.tokens] == [t.id for p in later.result() for t in p.tokens]
    assert sum(len(piece.tokens) for stream in many for piece in stream.result()) == 20 * LONG


def test_one_who_asks_for_much_is_served_in_every_round() -> None:
    turns = Turns()
    big = [turns.assign(Request((1,), group="a")) for _ in range(50)]
    turns.begun(big[0])
    for now in big[1:]:
        assert turns.assign(Request((2,))) == now  # the one that was there before goes first
        turns.begun(now)
    many = turns.assign(Request((1,), n=5, group="b"))
    assert turns.assign(Request((1,), group="b")) == many + 5


def test_groups_whose_rounds_are_over_are_forgotten() -> None:
    turns = Turns()
    for number in range(3 * MOST_GROUPS):
        turns.begun(turns.assign(Request((1,), group=str(number))))
    assert len(turns._last) <= MOST_GROUPS
