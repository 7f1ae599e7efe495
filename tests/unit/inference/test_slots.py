"""Rows that come, go and move, and passes that are taken back, leave what each row alone would have."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from halflap.models import slots
from halflap.models.cache import Cache
from halflap.models.model import HybridModel

LENGTHS = (3, 11, 6, 1)


def tokens(count: int, seed: int = 0) -> Tensor:
    return torch.randint(300, (1, count), generator=torch.Generator().manual_seed(seed))


def read(model: HybridModel, ids: Tensor) -> Cache:
    cache = Cache.create(model.config, 1, 4)
    model.hidden_states(ids, cache=cache)
    return cache


@torch.inference_mode()
def test_rows_in_slots_go_on_as_alone(model: HybridModel) -> None:
    prompts = [tokens(count, seed) for seed, count in enumerate(LENGTHS)]
    cache = slots.empty(model.config, torch.float32, "cpu")
    for place, ids in enumerate(prompts):
        slots.resize(cache, place + 1, 12)
        slots.insert(cache, read(model, ids), place)
    saved = slots.take(cache, 1)
    slots.move(cache, 3, 1)  # row 1 leaves
    slots.resize(cache, 5, 16)
    slots.insert(cache, saved, 3)
    order = (0, 3, 2, 1)
    follow = torch.cat([tokens(2, 9), tokens(2, 8), tokens(2, 7), tokens(2, 6)])
    for step in range(2):
        part = slots.view(cache, 4)
        got = model(follow[:, step : step + 1], cache=part)
        slots.absorb(cache, part)
        for place, row in enumerate(order):
            whole = torch.cat([prompts[row], follow[place : place + 1, : step + 1]], 1)
            torch.testing.assert_close(got[place, 0], model(whole)[0, -1], atol=1e-5, rtol=1e-4)
    assert cache.lengths.tolist() == [5, 3, 8, 13, 0]
    for place in range(4):
        one = slots.take(cache, place)
        assert one.nbytes() < cache.nbytes() / 4


@torch.inference_mode()
@pytest.mark.parametrize("accepted", [(1, 4, 2), (4, 4, 4), (0, 3, 1)])
def test_a_held_pass_advances_by_what_counts(model: HybridModel, accepted: tuple[int, ...]) -> None:
    prompts = [tokens(count, seed) for seed, count in enumerate((2, 9, 5))]
    cache = slots.empty(model.config, torch.float32, "cpu")
    slots.resize(cache, 3, 20)
    for place, ids in enumerate(prompts):
        slots.insert(cache, read(model, ids), place)
    guessed, follow = (
        torch.cat([tokens(4, 5), tokens(4, 6), tokens(4, 7)]),
        torch.cat([tokens(1, s) for s in (1, 2, 3)]),
    )
    part = slots.view(cache, 3)
    part.hold()
    logits = model(guessed, cache=part)
    part.commit(torch.tensor(accepted))
    slots.absorb(cache, part)
    assert cache.lengths.tolist() == [2 + accepted[0], 9 + accepted[1], 5 + accepted[2]]
    part = slots.view(cache, 3)
    got = model(follow, cache=part)
    for place, (ids, count) in enumerate(zip(prompts, accepted, strict=True)):
        whole = model(torch.cat([ids, guessed[place : place + 1]], 1))[0, -4:]
        torch.testing.assert_close(logits[place], whole, atol=1e-5, rtol=1e-4)
        after = torch.cat([ids, guessed[place : place + 1, :count], follow[place : place + 1]], 1)
        torch.testing.assert_close(got[place, 0], model(after)[0, -1], atol=1e-5, rtol=1e-4)


@torch.inference_mode()
def test_a_fork_runs_ahead_of_what_it_came_from(model: HybridModel) -> None:
    ids = tokens(7)
    cache = slots.empty(model.config, torch.float32, "cpu")
    slots.resize(cache, 1, 16)
    slots.insert(cache, read(model, ids), 0)
    ahead = slots.fork(slots.view(cache, 1))
    for step in range(3):
        model(tokens(1, step), cache=ahead)
    part = slots.view(cache, 1)
    got = model(tokens(1, 40), cache=part)
    torch.testing.assert_close(got[0, 0], model(torch.cat([ids, tokens(1, 40)], 1))[0, -1], atol=1e-5, rtol=1e-4)


@torch.inference_mode()
@pytest.mark.parametrize("width", [1, 3])
def test_rows_of_several_caches_in_one_pass(model: HybridModel, width: int) -> None:
    prompts = [tokens(count, seed) for seed, count in enumerate(LENGTHS)]
    caches = [slots.empty(model.config, torch.float32, "cpu") for _ in range(2)]
    for place, ids in enumerate(prompts):
        slots.resize(caches[place // 2], place % 2 + 1, 16)
        slots.insert(caches[place // 2], read(model, ids), place % 2)
    follow = torch.cat([tokens(width, 20 + seed) for seed in range(4)])
    views = [slots.view(cache, 2) for cache in caches]
    got = model(follow, cache=views)
    for place, ids in enumerate(prompts):
        whole = model(torch.cat([ids, follow[place : place + 1]], 1))[0, -width:]
        torch.testing.assert_close(got[place], whole, atol=1e-5, rtol=1e-4)
    assert [view.lengths.tolist() for view in views] == [[3 + width, 11 + width], [6 + width, 1 + width]]
