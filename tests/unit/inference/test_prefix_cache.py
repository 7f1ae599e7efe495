"""A prefix that was read is not read again, and nobody can tell from the logits."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch

from halflap.errors import HalflapError
from halflap.inference.engine import Engine
from halflap.inference.prefix_cache import PrefixCache
from halflap.inference.requests import EngineSettings, Piece, Request
from halflap.inference.scheduler import Scheduler
from halflap.inference.stream import Stream
from halflap.models.model import HybridModel

CHUNK = 8
SYSTEM = tuple(range(100, 137))


def ask(scheduler: Scheduler, prompt: tuple[int, ...], count: int = 6) -> tuple[Piece, int]:
    """The reply with its log-probabilities, and how many tokens of the prompt were cached."""
    stream = Stream(Request(prompt, count, logprobs=1))
    scheduler.add(stream)
    while scheduler.busy:
        scheduler.step()
    (piece,) = stream.result()
    assert stream.usage is not None
    return piece, stream.usage.cached_tokens


def same(model: HybridModel, prompt: tuple[int, ...], piece: Piece, tolerance: float = 1e-4) -> None:
    fresh, _ = ask(Scheduler(model, None, EngineSettings(prefill_chunk=CHUNK)), prompt, len(piece.tokens))
    assert [token.id for token in piece.tokens] == [token.id for token in fresh.tokens]
    for got, expected in zip(piece.tokens, fresh.tokens, strict=True):
        assert got.log_prob == pytest.approx(expected.log_prob, abs=tolerance)


def settings(budget: int = 1 << 24) -> EngineSettings:
    return EngineSettings(prefill_chunk=CHUNK, prefix_cache=budget)


def test_a_conversation_is_read_once(model: HybridModel) -> None:
    scheduler = Scheduler(model, None, settings())
    text, known = SYSTEM, 0
    for turn in range(4):
        piece, cached = ask(scheduler, text)
        same(model, text, piece)
        assert cached == known
        known = len(text) + len(piece.tokens) - 1  # the last token was never read
        text = (*text, *(token.id for token in piece.tokens), 7 + turn, 11, 13)
    assert scheduler.prefix is not None and scheduler.prefix.stats()["hits"] == 3


def test_prompts_that_part_within_what_they_share(model: HybridModel) -> None:
    scheduler = Scheduler(model, None, settings())
    expected = []
    for question in ((1, 2, 3), (4, 5, 6, 7), (8,)):
        piece, cached = ask(scheduler, (*SYSTEM, *question))
        same(model, (*SYSTEM, *question), piece)
        expected.append(cached)
    assert expected[0] == 0 and expected[1] >= len(SYSTEM) // CHUNK * CHUNK and expected[2] >= len(SYSTEM) - CHUNK
    piece, cached = ask(scheduler, (*SYSTEM, 1, 2, 3))  # the whole prompt again
    same(model, (*SYSTEM, 1, 2, 3), piece)
    assert cached == len(SYSTEM) + 3


def test_a_hit_on_the_grid_is_the_same_bit_for_bit(model: HybridModel) -> None:
    scheduler = Scheduler(model, None, settings())
    ask(scheduler, SYSTEM[: 4 * CHUNK], 1)
    piece, cached = ask(scheduler, (*SYSTEM[: 4 * CHUNK], 3, 4, 5))
    assert cached == 4 * CHUNK
    same(model, (*SYSTEM[: 4 * CHUNK], 3, 4, 5), piece, tolerance=0.0)


@pytest.mark.parametrize("family", ["nemotron_h", "llama", "hymba"])
def test_any_prompts_under_any_budget(family: str, make: Callable[..., HybridModel]) -> None:
    model, draw, evicted, hits = make(family), random.Random(family), 0, 0
    texts = [tuple(draw.randrange(3) for _ in range(draw.randrange(1, 40))) for _ in range(12)]
    for factor in (2, 5):
        scheduler = Scheduler(model, None, settings(factor * one_entry(model)))
        assert scheduler.prefix is not None
        for _ in range(25):
            text = (*draw.choice(texts)[: draw.randrange(1, 40)], *draw.choice(texts))
            piece, _ = ask(scheduler, text, 3)
            same(model, text, piece)
            check(scheduler.prefix)
        evicted, hits = evicted + scheduler.prefix.evicted, hits + scheduler.prefix.hits
    assert evicted > 0 and hits > 0


def one_entry(model: HybridModel) -> int:
    prefix = Scheduler(model, None, settings()).prefix
    assert prefix is not None
    return prefix.smallest(4 * CHUNK)


def check(prefix: PrefixCache) -> None:
    """The tree is whole, its parts are counted, and every entry that may go is queued with its priority."""
    nodes = list(prefix._all_nodes())
    assert prefix.bytes == sum(node.nbytes for node in nodes) <= prefix.budget
    assert prefix.stats()["nodes"] == len(nodes)
    assert prefix.stats()["snapshots"] == sum(node.snapshot is not None for node in nodes)
    queued = {id(node) for priority, *_, node in prefix._queue if priority == node.priority}
    assert queued >= {id(node) for node in nodes if prefix._holds_entry(node)}
    assert len(prefix._queue) <= 4 * len(nodes) + 64
    for node in nodes:
        assert node.parent is not None and node.parent.children[node.tokens[0]] is node
        assert node.depth == node.parent.depth + len(node.tokens)
        assert all(keys.shape[1] == values.shape[1] == len(node.tokens) for keys, values in node.spans)
        assert node.children or node.snapshot is not None or prefix._pure


def test_what_saves_more_for_its_bytes_stays(make: Callable[..., HybridModel]) -> None:
    model = make("nemotron_h")
    scheduler = Scheduler(model, None, settings(8 * one_entry(model)))
    for _ in range(3):
        ask(scheduler, SYSTEM, 1)
    for seed in range(12):  # each read once
        ask(scheduler, tuple(torch.randint(300, (20,), generator=torch.Generator().manual_seed(seed)).tolist()), 1)
    assert ask(scheduler, SYSTEM, 1)[1] >= 32


def test_a_budget_that_can_hold_nothing_is_refused(make: Callable[..., HybridModel]) -> None:
    with pytest.raises(HalflapError, match="prefix_cache is 1,000 bytes"):
        Engine(make("nemotron_h"), settings=EngineSettings(prefix_cache=1000))
