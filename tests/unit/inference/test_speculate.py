"""Guesses change how fast tokens come, never which."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from halflap.errors import HalflapError
from halflap.inference.chooser import Chooser, choose_rows
from halflap.inference.draft import Draft
from halflap.inference.memory import Budget
from halflap.inference.requests import EngineSettings, Piece, Request, SamplingParams
from halflap.inference.scheduler import Scheduler
from halflap.inference.speculate import Pace
from halflap.inference.stream import Stream
from halflap.models.model import HybridModel
from halflap.models.quantization import Quantization
from halflap.models.quantized import pack_tensors, prepare
from halflap.ops import select

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


@pytest.fixture(params=["auto", "plain"])
def kernels(request: pytest.FixtureRequest) -> Iterator[str]:
    with select.using(request.param):
        yield request.param


@pytest.mark.usefixtures("kernels")
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


def packed(model: HybridModel, bits: int) -> HybridModel:
    quantization = Quantization(bits, 32)
    parts = dict(pack_tensors(model.state_dict().items(), model.config, quantization))
    model = prepare(copy.deepcopy(model), quantization)
    model.load_state_dict(parts)
    return model


@pytest.mark.parametrize("form", ["bfloat16", "int8", "int8 in bfloat16", "int4"])
@pytest.mark.parametrize("guesser", ["lookup", "itself"])
def test_whatever_the_numbers_are_in(model: HybridModel, guesser: str, form: str) -> None:
    """Greedy replies of one at a time and of three, with guesses and without, are the same token for token."""
    model = packed(model, int(form[3])) if "int" in form else copy.deepcopy(model)
    if "bfloat16" in form:
        model = model.bfloat16()
    requests = [Request(prompt, 24, ignore_eos=True) for prompt in PROMPTS]
    expected = [replies(model, [request], None)[0][0] for request in requests]
    assert replies(model, requests, None)[0] == expected
    for reach in (1, 3, 7):
        got, counts = replies(model, requests, "lookup" if guesser == "lookup" else model, reach)
        assert got == expected and (counts["guessed"] or guesser == "lookup")


def test_where_guesses_would_change_texts_there_are_none_and_that_is_said(model: HybridModel) -> None:
    narrow = copy.deepcopy(model).bfloat16()
    with select.using("plain"):
        for prompt in PROMPTS:
            request = [Request(prompt, 24, ignore_eos=True)]
            expected, _ = replies(narrow, request, None)
            with pytest.warns(UserWarning, match=r"without guesses .* take --dtype float32"):
                got, counts = replies(narrow, request, model)
            assert got == expected and not counts["guessed"]


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


@pytest.mark.parametrize("family", ["nemotron_h", "hymba", "llama"])
def test_a_draft_reads_a_pass_between_steps_and_remembers(
    make: Callable[..., HybridModel], family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A long prompt holds up nobody for longer than its passes do, and the next turn is not read anew."""
    model, draft, read = make("nemotron_h"), make(family, seed=3), []
    hidden_states = draft.hidden_states

    def counted(tokens: Tensor, **more: object) -> Tensor:
        read.append(tokens.shape[1])
        return hidden_states(tokens, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(draft, "hidden_states", counted)
    scheduler = Scheduler(
        model, None, EngineSettings(max_batch=3, speculate=draft, prefill_chunk=32, prefix_cache=1 << 26)
    )
    scheduler.pace.reach = lambda seconds, acceptance, most, cost: min(3, most)  # type: ignore[method-assign]
    scheduler.pace.pays = lambda *_: True  # type: ignore[method-assign]
    prompt = tuple(5 + 7 * i % 250 for i in range(200))

    def turn(prompt: tuple[int, ...]) -> tuple[int, ...]:
        stream, longest, before = Stream(Request(prompt, 24, ignore_eos=True)), 0, len(read)
        scheduler.add(stream)
        while scheduler.busy:
            start = len(read)
            scheduler.step()
            longest = max(longest, sum(read[start:]))
        assert longest <= 32 + 8  # a pass, and what replies grew by where native code does not read it
        turns.append(sum(read[before:]))
        return tuple(token.id for token in stream.result()[0].tokens)

    turns: list[int] = []
    first = turn(prompt)
    second = turn((*prompt, *first, 3, 4, 5))
    assert turns[0] >= 200 > 2 * turns[1] and scheduler.counts["guessed"]
    plain = Scheduler(model, None, EngineSettings())
    stream = Stream(Request((*prompt, *first, 3, 4, 5), 24, ignore_eos=True))
    plain.add(stream)
    while plain.busy:
        plain.step()
    assert second == tuple(token.id for token in stream.result()[0].tokens)


def test_reading_is_part_of_the_price() -> None:
    seconds = [1.0, 1.1, 1.2, 1.3]
    assert Pace.pays(seconds, 0.9, 3, 0.05, 0.0, 1)
    assert Pace.pays(seconds, 0.9, 3, 0.05, 20.0, 100)
    assert not Pace.pays(seconds, 0.9, 3, 0.05, 20.0, 10)
    assert not Pace.pays(seconds, 0.1, 3, 0.05, 20.0, 100)
