"""Guesses change how fast tokens come, never which."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from halflap.errors import HalflapError
from halflap.inference.chooser import Chooser, choose_rows
from halflap.inference.draft import Draft
from halflap.inference.memory import Budget
from halflap.inference.requests import EngineSettings, Piece, Request, SamplingParams
from halflap.inference.scheduler import Scheduler
from halflap.inference.speculate import Pace
from halflap.inference.stream import Stream
from halflap.models.model import HybridModel

PROMPTS = [(5, 6, 7, 5, 6, 7, 5, 6), tuple(range(7, 25)), (200, 3, 17, 250), (299, 0), (50, 51, 52, 50, 51)]


def replies(
    model: HybridModel, requests: list[Request], speculate: object, reach: int | None = 3
) -> tuple[list[list[int]], dict]:
    """Token ids of each reply; `reach` guesses are always tried, unless None leaves that to what pays."""
    scheduler = Scheduler(model, None, EngineSettings(max_batch=3, speculate=speculate))
    if reach is not None:
        scheduler.pace.reach = lambda seconds, acceptance, most, cost: min(reach, most)  # type: ignore[method-assign]
    streams = [Stream(request) for request in requests]
    for stream in streams:
        scheduler.add(stream)
    while scheduler.busy:
        scheduler.step()
    pieces: list[Piece] = [piece for stream in streams for piece in stream.result()]
    return [[token.id for token in piece.tokens] for piece in pieces], scheduler.counts


REQUESTS = [
    *(Request(prompt, 10 + 3 * i) for i, prompt in enumerate(PROMPTS[:3])),
    *(Request(prompt, 8, SamplingParams(0.7, top_k=8, seed=i), n=2) for i, prompt in enumerate(PROMPTS[3:])),
    Request(PROMPTS[0], 12, SamplingParams(0.7, top_p=0.9, repetition_penalty=1.2, presence_penalty=0.5, seed=4)),
]


@pytest.mark.parametrize("guesser", ["lookup", "itself", "another"])
def test_speculative_equals_plain(model: HybridModel, guesser: str, make: Callable[..., HybridModel]) -> None:
    speculate: object = "lookup"
    if guesser != "lookup":
        speculate = model if guesser == "itself" else make("nemotron_h", seed=3)
    expected, _ = replies(model, REQUESTS, None)
    for reach in (3, None):
        got, counts = replies(model, REQUESTS, speculate, reach)
        assert got == expected
        if guesser == "itself" and reach:
            assert counts["right"] > 0.9 * counts["guessed"] > 0
        elif reach:
            assert counts["guessed"] >= counts["right"]


def test_what_followed_earlier_is_guessed(make: Callable[..., HybridModel]) -> None:
    scheduler = Scheduler(make("llama"), None, EngineSettings(speculate="lookup"))
    scheduler.add(Stream(Request((5, 6, 7, 8, 9, 5, 6), 8, SamplingParams(logit_bias={7: 1e6}))))
    scheduler._read()  # the first token is 7
    (reply,) = scheduler.rows

    def guess(count: int) -> list[int]:
        assert scheduler.speculator is not None
        return scheduler.speculator.guess({reply: count})[reply]

    assert guess(3) == [8, 9, 5]
    reply.tokens += [8, 1, 2]
    assert guess(3) == []
    reply.tokens += [7, 8]
    assert guess(2) == [1, 2]  # the latest


def test_a_draft_that_is_put_aside_and_comes_back(make: Callable[..., HybridModel]) -> None:
    model = make("hymba")
    expected, _ = replies(model, REQUESTS, None)
    scheduler = Scheduler(model, None, EngineSettings(max_batch=3, speculate=make("nemotron_h", seed=3)))
    streams = [Stream(request) for request in REQUESTS]
    for stream in streams:
        scheduler.add(stream)
    while scheduler.busy:
        if len(scheduler.rows) > 1:
            with torch.inference_mode():
                scheduler._put_aside()
        scheduler.step()
    assert [[token.id for token in piece.tokens] for stream in streams for piece in stream.result()] == expected


def test_a_draft_keeps_within_the_memory(make: Callable[..., HybridModel]) -> None:
    """Its rows are as long as the longest, so one long prompt among short ones would take many times the budget."""
    model = make("llama")
    requests = [Request(tuple(5 + i % 7 for i in range(400)), 8), *(Request((5, 6 + i), 30) for i in range(6))]
    expected, _ = replies(model, requests, None)
    memory = 2 * Budget([model.config, model.config], model.dtype, None).row(800)
    scheduler = Scheduler(model, None, EngineSettings(max_batch=8, speculate=model, memory=memory))
    scheduler.pace.reach = lambda seconds, acceptance, most, cost: min(3, most)  # type: ignore[method-assign]
    streams, most = [Stream(request) for request in requests], 0
    for stream in streams:
        scheduler.add(stream)
    while scheduler.busy:
        scheduler.step()
        assert isinstance(scheduler.speculator, Draft)
        most = max(most, scheduler.speculator._cache.nbytes() + scheduler.slots.nbytes())
    assert [[token.id for token in piece.tokens] for stream in streams for piece in stream.result()] == expected
    assert most <= memory and scheduler.counts["guessed"] > 0


def test_guesses_follow_the_distribution() -> None:
    """The guess is drawn with the noise that the token is drawn with: tokens are the model's, and often the guess."""
    generator = torch.Generator().manual_seed(0)
    p, q = torch.randn(2, 6, generator=generator).log_softmax(-1)
    params = SamplingParams(1.0)
    choosers = [Chooser(params, seed, (1,), 6) for seed in range(4000)]
    guessed = torch.tensor(choose_rows(q.expand(4000, -1), choosers))
    chosen = torch.tensor(choose_rows(p.expand(4000, -1), choosers))
    expected = 4000 * p.exp()
    chi_square = ((chosen.bincount(minlength=6) - expected) ** 2 / expected).sum()
    assert chi_square < 20.5  # 5 degrees of freedom, one in a thousand
    distance = (p.exp() - q.exp()).abs().sum() / 2
    assert (1 - distance) / (1 + distance) - 0.03 < (guessed == chosen).float().mean() < 1 - distance + 0.03


def test_guessing_stops_where_it_does_not_pay(make: Callable[..., HybridModel]) -> None:
    pace = Pace()
    assert pace.reach(pace.seconds(1, 8), 0.95, 8, 0.0) == 0  # a plain pass is measured first
    for width in range(1, 10):
        pace.measured(1, width, 1.0 + 0.1 * (width - 1))
    seconds = pace.seconds(2, 8)
    assert pace.reach(seconds, 0.95, 8, 0.0) == 8
    assert pace.reach(seconds, 0.5, 8, 0.0) in (2, 3)
    assert pace.reach(seconds, 0.05, 8, 0.0) == 0
    assert pace.reach(seconds, 0.5, 8, 0.9) == 0
    assert pace.reach(seconds, 0.9, 0, 0.0) == 0
    model = make("llama")
    scheduler = Scheduler(model, None, EngineSettings(speculate="lookup"))
    stream = Stream(Request((5, 6), 2))
    scheduler.add(stream)
    scheduler._read()
    (reply,) = scheduler.rows
    for _ in range(30):
        pace.observe(reply, 4, 0)
    low = reply.acceptance
    assert low < 0.05 and pace.acceptance < 0.3
    for _ in range(200):
        pace.observe(reply, 0, 0)
    assert low < reply.acceptance < 0.5  # another try will come
    for _ in range(8):
        pace.observe(reply, 3, 3)
    assert reply.acceptance > 0.95


def test_a_draft_of_another_tokenizer_is_refused(make: Callable[..., HybridModel]) -> None:
    with pytest.raises(HalflapError, match="share one tokenizer"):
        Scheduler(make("llama"), None, EngineSettings(speculate=make("llama", vocab_size=299)))
