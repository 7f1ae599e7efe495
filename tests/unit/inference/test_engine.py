"""Whatever else runs, a reply is what its prompt alone gives."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from halflap.data.tokenizer import Tokenizer
from halflap.errors import HalflapError
from halflap.inference.detokenize import TextStream
from halflap.inference.engine import Engine, QueueFull
from halflap.inference.generate import generate
from halflap.inference.requests import EngineSettings, Piece, Request, SamplingParams
from halflap.inference.scheduler import Scheduler
from halflap.inference.stream import Stream, joined
from halflap.models.cache import fields, parts
from halflap.models.model import HybridModel, initialize

from .conftest import FAMILIES

PROMPTS = [(5,), tuple(range(7, 25)), (200, 3, 17, 250, 9, 1, 1, 42), (299, 0), tuple(range(50, 61))]


def run(scheduler: Scheduler, requests: list[Request], together: bool = True) -> list[list[Piece]]:
    """Replies of each request, run to the end without a thread."""
    streams = []
    for request in requests:
        streams.append(Stream(request))
        scheduler.add(streams[-1])
        while not together and scheduler.busy:
            scheduler.step()
    while scheduler.busy:
        scheduler.step()
    return [stream.result() for stream in streams]


def ids(piece: Piece) -> list[int]:
    return [token.id for token in piece.tokens]


def alone(model: HybridModel, request: Request, choice: int = 0) -> list[int]:
    s = request.sampling
    options: dict[str, Any] = {"temperature": s.temperature, "top_k": s.top_k, "top_p": s.top_p, "min_p": s.min_p}
    options |= {"repetition_penalty": s.repetition_penalty, "seed": s.seed + choice}
    return generate(model, [request.prompt], request.max_new_tokens, **options)[0].tokens


@pytest.mark.parametrize("settings", [{"max_batch": 8}, {"max_batch": 2, "prefill_chunk": 4}], ids=["wide", "narrow"])
def test_slots_equal_one_at_a_time(model: HybridModel, settings: dict[str, Any]) -> None:
    sampled = SamplingParams(0.8, top_k=50, seed=3)
    requests = [
        Request(prompt, 5 + 3 * i, SamplingParams() if i % 2 else sampled, n=1 + i % 3 // 2)
        for i, prompt in enumerate(PROMPTS)
    ]
    scheduler = Scheduler(model, None, EngineSettings(**settings))
    for request, pieces in zip(requests, run(scheduler, requests), strict=True):
        for choice, piece in enumerate(pieces):
            assert ids(piece) == alone(model, request, choice)
            assert piece.finish_reason == "length"
    assert not scheduler.rows and scheduler.slots.nbytes() == 0


def test_stop_ids_end_a_reply_and_not_before_its_least_length(model: HybridModel) -> None:
    free = alone(model, Request((5,), 12))
    stop = next(token for place, token in enumerate(free) if place > 1 and token not in free[:place])
    ended = Request((5,), 12, stop_ids=(stop,), ignore_eos=True)
    late = dataclasses.replace(ended, min_new_tokens=9)
    (first,), (second,) = run(Scheduler(model, None, EngineSettings(speculate="lookup")), [ended, late])
    assert ids(first) == free[: free.index(stop) + 1] and first.finish_reason == "stop"
    assert stop not in ids(second)[:9] and ids(second)[: free.index(stop)] == free[: free.index(stop)]


def test_log_probs_are_the_models(model: HybridModel) -> None:
    request = Request(PROMPTS[2], 4, SamplingParams(0.9, seed=1), logprobs=2, prompt_logprobs=3)
    scheduler = Scheduler(model, None, EngineSettings(prefill_chunk=3))
    other = Request(PROMPTS[1], 9, prompt_logprobs=0)
    (piece,), (second,) = run(scheduler, [request, other])
    for got, prompt, count in ((piece, PROMPTS[2], 3), (second, PROMPTS[1], 0)):
        assert got.prompt is not None and [token.id for token in got.prompt] == list(prompt)
        text = [*prompt, *ids(got)]
        with torch.inference_mode():
            expected = F.log_softmax(model(torch.tensor([text]))[0], -1)
        for place, token in enumerate([*got.prompt[1:], *got.tokens]):
            if token.log_prob is not None:
                assert token.log_prob == pytest.approx(expected[place, token.id].item(), abs=1e-4)
                best = expected[place].topk(count if place + 1 < len(prompt) else 2)
                assert [top.id for top in token.top] == best.indices.tolist()[: len(token.top)]
        assert got.prompt[0].log_prob is None and all(len(token.top) == count for token in got.prompt[1:])
    assert all(token.log_prob is None for token in second.tokens) and len(piece.tokens[0].top) == 2


def test_scoring_a_prompt_needs_no_new_token(model: HybridModel) -> None:
    (pieces,) = run(Scheduler(model, None, EngineSettings()), [Request(PROMPTS[1], 0, prompt_logprobs=0, n=2)])
    assert [piece.finish_reason for piece in pieces] == ["length"] * 2 and not pieces[0].tokens
    assert pieces[0].prompt is not None and len(pieces[0].prompt) == len(PROMPTS[1])


def test_continuations_are_scored_as_the_model_does(model: HybridModel) -> None:
    """In any passes and memory, beside replies."""
    asked = ((7,), (8, 9, 200, 3, 4, 5, 6, 7, 8), (8, 9), (250, 1, 1), tuple(range(30, 55)))
    request = Request(PROMPTS[1], 0, prompt_logprobs=2, n=len(asked), continuations=asked)
    text = Request(PROMPTS[2], 20)
    for settings in (EngineSettings(), EngineSettings(prefill_chunk=4, prefix_cache=1 << 20)):
        scheduler = Scheduler(model, None, settings)
        if settings.prefix_cache:
            scheduler.budget.bytes = 4 * scheduler.budget.row(60)
        pieces, (reply,), again = run(scheduler, [request, text, request])
        assert ids(reply) == alone(model, text)
        for choice, (piece, other) in enumerate(zip(pieces, again, strict=True)):
            whole = [*PROMPTS[1], *asked[choice]]
            with torch.inference_mode():
                expected = F.log_softmax(model(torch.tensor([whole]))[0, len(PROMPTS[1]) - 1 : -1], -1)
            assert piece.prompt is not None and other.prompt is not None and piece.finish_reason == "length"
            assert [token.id for token in piece.prompt] == list(asked[choice])
            for token, row, second in zip(piece.prompt, expected, other.prompt, strict=True):
                assert token.log_prob == pytest.approx(row[token.id].item(), abs=1e-4)
                assert [top.id for top in token.top] == row.topk(2).indices.tolist()
                assert second.log_prob == pytest.approx(token.log_prob, abs=1e-4)
        assert not scheduler.jobs and not scheduler.busy and scheduler._beside() == 0


@pytest.mark.parametrize("prefix", [0, 1 << 22])
def test_short_prompts_are_read_in_one_pass(model: HybridModel, prefix: int) -> None:
    """As many as a pass has room for, each as it is alone; one that begins like another waits for it to be cached."""
    prompts = [(5,), *(tuple(range(i, i + 3 + i % 7)) for i in range(20, 90, 9)), tuple(range(100, 132))]
    requests = [Request(prompt, 6, prompt_logprobs=0 if i == 2 else None) for i, prompt in enumerate(prompts)]
    scheduler = Scheduler(model, None, EngineSettings(prefill_chunk=32, prefix_cache=prefix))
    sizes, forward = [], model.hidden_states

    def watched(tokens: torch.Tensor, **options: Any) -> torch.Tensor:
        sizes.append(tokens.shape[1])
        return forward(tokens, **options)

    model.hidden_states = watched  # type: ignore[method-assign]
    try:
        found = run(scheduler, requests)
    finally:
        del model.hidden_states  # type: ignore[attr-defined]
    for request, (piece,) in zip(requests, found, strict=True):
        assert ids(piece) == alone(model, request)
    reading = [size for size in sizes if size > 1]
    assert sum(reading) == sum(map(len, prompts)) and max(reading) <= 32 and len(reading) <= 5
    if prefix:
        shared = tuple(range(150, 175))
        run(scheduler, [Request((*shared, last), 2) for last in (1, 2, 3)])
        assert scheduler.prefix is not None and scheduler.prefix.hit_tokens >= 25


def test_preempted_replies_are_undisturbed(model: HybridModel) -> None:
    requests = [Request(prompt, 24, SamplingParams(0.9, seed=i)) for i, prompt in enumerate(PROMPTS)]
    scheduler = Scheduler(model, None, EngineSettings())
    scheduler.budget.bytes = int(2.6 * scheduler.budget.row(45))
    expected = [alone(model, request) for request in requests]
    assert [ids(piece) for (piece,) in run(scheduler, requests)] == expected
    scheduler.budget.bytes = None
    put_aside, step = scheduler._put_aside, scheduler.step

    def disturbed() -> None:
        if len(scheduler.rows) > 1:
            put_aside()
        step()

    scheduler.step = disturbed  # type: ignore[method-assign]
    assert [ids(piece) for (piece,) in run(scheduler, requests)] == expected
    assert scheduler.counts["preempted"] > 5


def test_memory_is_kept(make: Callable[..., HybridModel]) -> None:
    model = make("llama")
    scheduler = Scheduler(model, None, EngineSettings())
    limit = scheduler.budget.bytes = scheduler.budget.row(400)
    streams = [Stream(Request(prompt, 150)) for prompt in PROMPTS]
    for stream in streams:
        scheduler.add(stream)
    reasons = set()
    while scheduler.busy:
        scheduler.step()
        stats = scheduler.stats()
        assert sum(stats["cache_bytes"][kind] for kind in ("slots", "beside")) <= limit
        assert scheduler.slots.nbytes() == stats["cache_bytes"]["slots"]
        reasons.add(stats["waiting_for"])
    assert any(reason and reason.startswith("memory") for reason in reasons)
    assert [len(stream.result()[0].tokens) for stream in streams] == [150] * len(PROMPTS)


def bytes_held(scheduler: Scheduler) -> int:
    """Of all states' storage, whatever part of it a tensor shows."""
    jobs = [job.cache for job in scheduler.reading if job.cache is not None]
    caches = [*jobs, *(group.cache for group in scheduler.slots.groups), *(parked.cache for parked in scheduler.parked)]
    tensors = [t for cache in caches for state in parts(cache) for t in fields(state).values()]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


@pytest.mark.parametrize("chunk", [64, 1000])
def test_states_hold_no_more_than_is_counted(model: HybridModel, chunk: int) -> None:
    """A single request that just fits, however its prompt is read."""
    scheduler = Scheduler(model, None, EngineSettings(prefill_chunk=chunk))
    limit = scheduler.budget.bytes = scheduler.budget.row(330)
    scheduler.add(Stream(Request(tuple(range(280)), 50, ignore_eos=True)))
    most = 0
    while scheduler.busy:
        scheduler.step()
        most = max(most, bytes_held(scheduler))
    assert 0.5 * limit < most <= limit


def test_a_prompt_waits_until_what_reads_it_fits(make: Callable[..., HybridModel]) -> None:
    """The slots that a long reply leaves are room for a next one, and not for what reads its prompt."""
    model = make("llama")
    scheduler = Scheduler(model, None, EngineSettings(prefill_chunk=128))
    limit = scheduler.budget.bytes = 2 * scheduler.budget.row(920)
    requests = [Request((1, 2, 3), 895), Request((4, 5, 6), 600), Request(tuple(range(250)) * 3, 3)]
    streams = [Stream(request) for request in requests]
    scheduler.add(streams[0])
    steps = 0
    while scheduler.busy:
        scheduler.step()
        steps += 1
        if steps in (500, 950):
            scheduler.add(streams[1 + (steps > 500)])
        assert bytes_held(scheduler) <= limit, steps
    assert [len(ids(stream.result()[0])) for stream in streams] == [895, 600, 3]


def test_rows_of_constant_state_run_together_beside_a_draft_that_grows(make: Callable[..., HybridModel]) -> None:
    blocks = (FAMILIES["nemotron_h"].blocks[0],) * 2
    model = HybridModel(dataclasses.replace(FAMILIES["nemotron_h"], blocks=blocks)).eval()
    initialize(model, 0)
    settings = EngineSettings(memory=50_000_000, speculate=make("llama"), prefill_chunk=1024)
    scheduler = Scheduler(model, None, settings)
    for prompt in ((5, 6, 7), tuple(range(290)), tuple(range(1, 290))):
        scheduler.add(Stream(Request(prompt, 40, ignore_eos=True)))
    most = 0
    while scheduler.busy:
        scheduler.step()
        most = max(most, len(scheduler.rows))
    assert most == 3


def test_every_stream_ends_when_a_reply_cannot_say_its_last_words(
    model: HybridModel, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> str:
        raise ValueError("no text")

    with Engine(model, tokenizer) as engine:
        monkeypatch.setattr(TextStream, "push", fail)
        monkeypatch.setattr(TextStream, "finish", fail)
        streams = [engine.submit(Request(prompt, 5, ignore_eos=True)) for prompt in PROMPTS[:2]]
        for stream in streams:
            with pytest.raises(HalflapError, match=r"the engine failed .*no text"):
                stream.result()
        monkeypatch.undo()
        assert len(ids(engine.submit(Request(PROMPTS[0], 5, ignore_eos=True)).result()[0])) == 5


def test_cancel_frees_the_slot(model: HybridModel) -> None:
    scheduler = Scheduler(model, None, EngineSettings(max_batch=3, prefill_chunk=4))
    streams = [Stream(Request(prompt, 30, n=2)) for prompt in PROMPTS]
    for stream in streams:
        scheduler.add(stream)
    for _ in range(4):
        scheduler.step()
    for stream in (streams[0], streams[2], streams[4]):
        stream.cancel()
    scheduler.step()
    while scheduler.busy:
        scheduler.step()
    reasons = [{piece.finish_reason for piece in stream.result()} for stream in streams]
    assert reasons == [{"cancelled"}, {"length"}, {"cancelled"}, {"length"}, {"cancelled"}]
    assert not scheduler.rows and not scheduler.parked
    assert ids(Scheduled(model, PROMPTS[1], 30).piece) == alone(model, Request(PROMPTS[1], 30))


class Scheduled:
    """One reply, through an engine with its thread."""

    def __init__(self, model: HybridModel, prompt: tuple[int, ...], count: int) -> None:
        with Engine(model) as engine:
            (self.piece,) = engine.submit(Request(prompt, count)).result()


def test_end_tokens_and_stop_strings(make: Callable[..., HybridModel], tokenizer: Tokenizer) -> None:
    model = make("nemotron_h")
    prompt = tuple(tokenizer.encode("the cat sat"))
    free = generate(model, [prompt], 30, tokenizer=tokenizer)[0]
    stop = free.text[7:10]
    expected = generate(model, [prompt], 30, tokenizer=tokenizer, stop=[stop])[0]
    with Engine(model, tokenizer) as engine:
        pieces = list(engine.submit(Request(prompt, 30, stop=(stop,))))
        assert len(pieces) > 1 and not any(stop in piece.text for piece in pieces)
        whole = joined(pieces)
        assert (whole.text, ids(whole), whole.finish_reason) == (expected.text, expected.tokens, "stop")
        end = free.tokens[4]
        ending = make("nemotron_h", eos_token_id=end)
    with Engine(ending, tokenizer) as engine:
        (piece,) = engine.submit(Request(prompt, 30)).result()
        assert ids(piece) == free.tokens[: free.tokens.index(end) + 1] and piece.finish_reason == "stop"
        (piece,) = engine.submit(Request(prompt, 30, ignore_eos=True)).result()
        assert ids(piece) == free.tokens


def test_streams_from_threads_and_event_loops(make: Callable[..., HybridModel], tokenizer: Tokenizer) -> None:
    model = make("hymba")
    requests = [Request(prompt, 12) for prompt in PROMPTS]
    with Engine(model, tokenizer, EngineSettings(max_batch=2)) as engine:

        async def read(request: Request) -> list[int]:
            return [token.id async for piece in engine.submit(request) for token in piece.tokens]

        async def all_of_them() -> list[list[int]]:
            return await asyncio.gather(*map(read, requests))

        assert asyncio.run(all_of_them()) == [alone(model, request) for request in requests]

        async def hang_up() -> None:
            stream = engine.submit(Request((5,), 4000))
            pieces = aiter(stream)
            await anext(pieces)
            await pieces.aclose()  # what an event loop does to a task that is cancelled
            assert stream.cancelled and stream.result()[0].finish_reason == "cancelled"

        asyncio.run(hang_up())
        stream = engine.submit(Request((5,), 4000))
        next(iter(stream))
        stream.cancel()
        assert stream.result()[0].finish_reason == "cancelled"
        assert stream.usage is not None and stream.usage.prompt_tokens == 1 <= stream.usage.completion_tokens
        deadline = time.monotonic() + 5
        while engine.stats()["running"] or engine.stats()["requests"] != len(PROMPTS) + 2:  # numbers of a moment ago
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_penalties_and_bias(make: Callable[..., HybridModel]) -> None:
    scheduler = Scheduler(make("llama"), None, EngineSettings())
    presence = SamplingParams(presence_penalty=1e6)
    banned = SamplingParams(logit_bias={token: -float("inf") for token in range(299)})
    wanted = SamplingParams(logit_bias={17: 1e6}, frequency_penalty=3e5)
    (one,), (two,), (three,) = run(scheduler, [Request((5, 6), 40, s) for s in (presence, banned, wanted)])
    assert len(set(ids(one))) == 40
    assert set(ids(two)) == {299}
    assert ids(three)[:3] == [17] * 3 and set(ids(three)[5:]) != {17}


def test_a_failed_step_is_said_and_the_engine_goes_on(make: Callable[..., HybridModel]) -> None:
    model = make("llama")
    with Engine(model) as engine:
        step = engine._scheduler._decode
        engine._scheduler._decode = lambda: 1 / 0  # type: ignore[method-assign]
        stream = engine.submit(Request((5, 6), 4))
        with pytest.raises(HalflapError, match="ZeroDivisionError"):
            stream.result()
        engine._scheduler._decode = step  # type: ignore[method-assign]
        assert len(engine.submit(Request((5, 6), 4)).result()[0].tokens) == 4


def test_what_can_never_run_is_refused(make: Callable[..., HybridModel]) -> None:
    model = make("llama", max_position_embeddings=64)
    with Engine(model, settings=EngineSettings(memory=12000, max_context=60, max_batch=1, queue=1)) as engine:
        for request, said in (
            (Request((5, 300), 4), "token id 300"),
            (Request((5,), 60), "may be 60"),
            (Request((5,) * 40, 10), "bytes of cache"),
            (Request((5,), 4, stop=("a",)), "tokenizer"),
            (Request((5,), 4, SamplingParams(logit_bias={300: 1.0})), "logit_bias"),
            (Request((5,), 4, stop_ids=(300,)), "stop_ids"),
        ):
            with pytest.raises(HalflapError, match=said):
                engine.submit(request)
        engine._scheduler._decode = lambda: time.sleep(0.01)  # type: ignore[method-assign]
        with pytest.raises(QueueFull):
            for _ in range(4):
                engine.submit(Request((5,), 4))
    with pytest.raises(HalflapError, match="closed"):
        engine.submit(Request((5,), 4))
    for values in (
        {"n": 0},
        {"max_new_tokens": 0},
        {"max_new_tokens": 3, "min_new_tokens": 4},
        {"continuations": ((1,),)},
        {"logprobs": -1},
        {"stop": ("",)},
        {"prompt": ()},
    ):
        with pytest.raises(HalflapError):
            Request(**{"prompt": (1,), **values})  # type: ignore[arg-type]
