"""Masks and positions of transformers become what the network takes, and outputs go back to their tokens."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from halflap.errors import HalflapError
from halflap.huggingface.rows import arrange
from halflap.models.cache import Cache
from halflap.models.model import HybridModel, initialize
from halflap.models.presets import preset

MASKS = st.lists(st.lists(st.booleans(), min_size=7, max_size=7).filter(any), min_size=1, max_size=3)


def tokens_like(mask: Tensor) -> Tensor:
    return torch.randint(3, 200, mask.shape, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module", params=["nemotron-h-tiny", "hymba-tiny"])
def network(request: pytest.FixtureRequest) -> Any:
    model = HybridModel(dataclasses.replace(preset(request.param), vocab_size=200)).eval()
    initialize(model, 0)
    return model


@given(MASKS, st.booleans())
@settings(max_examples=30)
def test_the_tokens_that_exist_come_first_and_find_their_way_back(mask: list[list[bool]], cached: bool) -> None:
    kept = torch.tensor(mask)
    tokens = tokens_like(kept)
    rows = arrange(tokens, kept.long(), cached=cached)
    back = rows.restore(rows.tokens[..., None])[..., 0]
    assert back[kept].equal(tokens[kept])
    for row, length in enumerate(kept.sum(1)):
        assert rows.places is None or rows.tokens[row, :length].equal(tokens[row, kept[row]])
        assert rows.lengths is None or rows.lengths[row] == length
    if cached and not kept.all():
        assert rows.lengths is not None


@torch.no_grad()
@pytest.mark.parametrize("sizes", [[1, 1, 1, 3], [1, 5], [2, 1, 1, 1, 1]])
def test_a_single_column_may_be_padding_too(network: Any, sizes: list[int]) -> None:
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1]])[:, : sum(sizes)]
    tokens = tokens_like(mask)
    cache, parts, start = Cache.create(network.config, 3), [], 0
    for size in sizes:
        rows = arrange(tokens[:, start : start + size], mask[:, : start + size], cached=True)
        parts.append(rows.restore(network.hidden_states(rows.tokens, cache=cache, lengths=rows.lengths)))
        start += size
    hidden = torch.cat(parts, 1)
    for row in range(3):
        there = mask[row] == 1
        alone = network.hidden_states(tokens[row : row + 1, there])[0]
        torch.testing.assert_close(hidden[row, there], alone, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("cached", [False, True])
def test_a_masked_row_gives_what_its_tokens_give_alone(network: Any, cached: bool) -> None:
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1], [1, 1, 0, 0, 0, 0], [0, 1, 1, 0, 1, 1]])
    tokens = tokens_like(mask)
    rows = arrange(tokens, mask, cached=cached)
    cache = Cache.create(network.config, 4) if cached else None
    hidden = rows.restore(network.hidden_states(rows.tokens, cache=cache, lengths=rows.lengths))
    for row in range(4):
        there = mask[row] == 1
        alone = network.hidden_states(tokens[row : row + 1, there])[0]
        torch.testing.assert_close(hidden[row, there], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("padded", [False, True])
def test_positions_that_start_again_begin_a_document(padded: bool) -> None:
    positions = torch.tensor([[0, 1, 2, 0, 1, 0, 1, 2]])
    mask = torch.ones_like(positions)
    if padded:
        positions, mask = (torch.cat([torch.zeros(1, 3, dtype=torch.int64), t], 1) for t in (positions, mask))
    rows = arrange(torch.ones_like(mask), mask, positions)
    assert rows.segments is not None and rows.segments.tolist() == [[1, 1, 1, 2, 2, 3, 3, 3]]
    by_number = arrange(torch.ones(1, 5, dtype=torch.int64), seq_idx=torch.tensor([[0, 0, 1, 1, 1]], dtype=torch.int32))
    assert by_number.segments is not None and by_number.segments.tolist() == [[1, 1, 2, 2, 2]]


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("fill", [0, 1])
def test_positions_counted_from_a_mask_are_one_document(fill: int, cached: bool) -> None:
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [1, 0, 1, 0, 1]])
    positions = (mask.cumsum(1) - 1).masked_fill(mask == 0, fill)
    assert arrange(torch.ones_like(mask), mask, positions, cached=cached).segments is None
    assert arrange(torch.ones_like(mask), None, torch.arange(5)[None] + 40).segments is None


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"attention_mask": torch.ones(2, 1, 5, 5)}, r"attention_mask has shape \(2, 1, 5, 5\)"),
        ({"attention_mask": torch.ones(2, 4)}, r"attention_mask has shape \(2, 4\)"),
        ({"position_ids": torch.ones(3, 2, 5)}, "one number a token"),
        ({"seq_idx": torch.ones(3, 5)}, "one number a token"),
    ],
)
def test_wrong_shapes_are_named(fields: dict[str, Tensor], complaint: str) -> None:
    with pytest.raises(HalflapError, match=complaint):
        arrange(torch.ones(2, 5, dtype=torch.int64), **fields)
