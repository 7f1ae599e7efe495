"""The state that meta tokens leave is computed once for all sequences, so no sequence may write into it."""

from __future__ import annotations

import copy

import pytest
import torch

from halflap.inference.generate import generate
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
