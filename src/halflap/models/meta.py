"""Meta tokens in a pass without a cache: M learned vectors before each document of a row, packed or not (Hymba, 5).

They are ordinary positions to every mixer, the first M of their document; the hidden states at them are dropped.
Padding (segment 0) gets none. Rows with fewer documents than others end in tokens that nobody looks at.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from halflap.ops.ssd import segment_runs


class Widened(NamedTuple):
    """Rows of L = T + M (most documents of a row) positions, made from rows of T tokens."""

    tokens: Tensor  # (B, L) int64; at a meta position any token
    slot: Tensor  # (B, L) int64, which meta token, -1 where none
    runs: Tensor  # (B, L) int64
    place: Tensor  # (B, T) int64, where each token went


def widen(tokens: Tensor, segments: Tensor, count: int) -> Widened:
    """Make room for `count` meta tokens before each document of tokens (B, T), as segments (B, T) number them."""
    time = tokens.shape[1]
    steps = torch.arange(time, device=tokens.device)
    runs = segment_runs(segments)
    first = torch.ones_like(runs, dtype=torch.bool)
    first[:, 1:] = runs[:, 1:] != runs[:, :-1]
    documents = (first & (segments != 0)).cumsum(1)
    place = steps + count * documents
    total = time + count * int(documents[:, -1].max())
    at = torch.arange(total, device=tokens.device).expand(len(tokens), -1).contiguous()
    owner = torch.searchsorted(place, at)  # the token here, or the next one where this is a meta position
    beyond = owner == time
    owner = owner.clamp(max=time - 1)
    before = place.gather(1, owner) - at
    slot = torch.where((before > 0) & ~beyond, count - before, -1)
    runs = torch.where(beyond, time, runs.gather(1, owner))
    return Widened(tokens.gather(1, owner), slot, runs, place)


def with_meta_tokens(embedded: Tensor, slot: Tensor, meta_tokens: Tensor) -> Tensor:
    """embedded (B, L, D) with the meta tokens (M, D) in their slots."""
    meta = torch.nn.functional.embedding(slot.clamp(min=0), meta_tokens)
    return torch.where((slot >= 0)[..., None], meta, embedded)


def text_places(tokens: Tensor, segments: Tensor | None, count: int) -> Tensor:
    """Where each of tokens (B, T) stands among the positions of a pass without a cache: (B, T) int64."""
    return widen(tokens, torch.ones_like(tokens) if segments is None else segments, count).place


def at_places(hidden: Tensor, places: Tensor) -> Tensor:
    """hidden (B, L, D) at places (B, T): (B, T, D)."""
    return hidden.gather(1, places[..., None].expand(-1, -1, hidden.shape[2]))


def at_text(states: Tensor, tokens: Tensor, segments: Tensor | None, count: int) -> Tensor:
    """states (B, L, D) of a pass at its tokens (B, T) alone: (B, T, D); themselves without meta tokens."""
    return states if states.shape[1] == tokens.shape[1] else at_places(states, text_places(tokens, segments, count))
