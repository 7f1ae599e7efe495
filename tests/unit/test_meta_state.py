"""The state that meta tokens leave is computed once for all sequences, so no sequence may write into it."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch

from halflap.inference.generate import generate
from halflap.models.cache import Cache
from halflap.models.model import HybridModel, initialize
from halflap.models.presets import preset


@pytest.mark.parametrize("rows", [1, 2])
def test_one_text_after_another_starts_from_the_same_state(rows: int) -> None:
    model = HybridModel(preset("hymba-tiny")).eval()
    initialize(model, 0)
    prompts = [[5]] * rows  # one token: the first pass is already a step, which advances states in place
    generate(model, [[5, 9]], 1, ignore_eos=True)
    assert model._meta_state is not None
    before = [(state.ssm.conv.clone(), state.ssm.ssm.clone()) for state in model._meta_state[1].blocks[::2]]  # type: ignore[union-attr]
    generate(model, prompts, 9, ignore_eos=True)
    after = [(state.ssm.conv, state.ssm.ssm) for state in model._meta_state[1].blocks[::2]]  # type: ignore[union-attr]
    assert all(a.equal(b) and c.equal(d) for (a, c), (b, d) in zip(before, after, strict=True))


def test_a_model_that_has_read_can_be_copied() -> None:
    model = HybridModel(preset("hymba-tiny")).eval()
    initialize(model, 0)
    tokens = torch.tensor([[5, 9]])
    generate(model, tokens.tolist(), 1, ignore_eos=True)
    assert torch.equal(copy.deepcopy(model)(tokens), model(tokens))


@torch.no_grad()
def cached_and_whole(model: HybridModel) -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.tensor([[5, 9, 3, 7]])
    return model(tokens, cache=Cache.create(model.config, 1, 4, model.dtype)), model(tokens)


def trained(model: HybridModel) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)
    model(torch.tensor([[5, 9, 3]])).square().mean().backward()
    optimizer.step()


def written_past_autograd(model: HybridModel) -> None:
    for parameter in model.parameters():
        parameter.data += 0.01


@pytest.mark.parametrize("change", [trained, written_past_autograd])
def test_changes_that_no_version_counts_are_seen(change: Callable[[HybridModel], None]) -> None:
    model = HybridModel(preset("hymba-tiny"))
    initialize(model, 0)
    before, _ = cached_and_whole(model)
    versions = [parameter._version for parameter in model.parameters()]
    change(model)
    assert versions == [parameter._version for parameter in model.parameters()]
    after, whole = cached_and_whole(model)
    assert float((after - before).abs().max()) > 1e-2
    torch.testing.assert_close(after, whole, rtol=0, atol=1e-4)


def test_a_cached_pass_gives_no_wrong_gradients() -> None:
    model = HybridModel(preset("hymba-tiny")).double()
    initialize(model, 0)
    tokens = torch.tensor([[5, 9, 3, 7], [2, 8, 4, 6]])
    loss = model(tokens, cache=Cache.create(model.config, 2, 4, torch.float64)).square().sum()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()  # without the meta tokens' graph it would go through and leave their part out
