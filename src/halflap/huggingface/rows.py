"""Attention masks, positions and packing to what the network takes, and its outputs back to where they belong.

The network knows two kinds of rows: several documents one after the other (`segments`), and one document that a cache
continues, padded at the right (`lengths`). A mask says which tokens exist: the others are dropped, so left padding,
right padding and holes all become right padding, and a row gets what it would get alone. Positions count from a
document's first token whatever numbers are given; where they do not go up by one, the next document begins.
Legend: B batch, T time, D hidden.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from halflap.errors import HalflapError


class Rows(NamedTuple):
    """What the network takes; `places` (B, T) says which of its outputs belongs to each given token, None: its own."""

    tokens: Tensor
    segments: Tensor | None = None
    lengths: Tensor | None = None
    places: Tensor | None = None

    def restore(self, hidden: Tensor) -> Tensor:
        """Outputs of the network (B, T', D) at the given tokens (B, T, D); a masked one repeats the last before it."""
        if self.places is None:
            return hidden
        return hidden.gather(1, self.places[..., None].expand(-1, -1, hidden.shape[-1]))


def arrange(
    tokens: Tensor,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    seq_idx: Tensor | None = None,
    *,
    cached: bool = False,
) -> Rows:
    """Rows from tokens (B, T), a mask (B, T or more; the last T count) and what numbers packed documents (B or 1, T).

    Without a cache, right padding stays as it is: causality keeps it out of what it follows, and no loss looks at it.
    """
    time = tokens.shape[1]
    if time == 1:  # the next token of each row; a cache knows the rest
        exists = None if attention_mask is None or not cached else _mask(attention_mask, tokens)
        return Rows(tokens) if exists is None or bool(exists.all()) else Rows(tokens, lengths=exists.sum(1))
    positions, numbers = _a_token("position_ids", position_ids, tokens), _a_token("seq_idx", seq_idx, tokens)
    mask = None if attention_mask is None else _mask(attention_mask, tokens)
    if mask is None or bool(mask.all()) or (not cached and bool((mask[:, 1:] <= mask[:, :-1]).all())):
        return Rows(tokens, _segments(positions, numbers))
    lengths = mask.sum(1)
    order = torch.argsort((~mask).to(torch.int8), dim=1, stable=True)[:, : max(1, int(lengths.max()))]
    positions, numbers = (None if given is None else given.gather(1, order) for given in (positions, numbers))
    places = (mask.cumsum(1) - 1).clamp(min=0)
    return Rows(tokens.gather(1, order), _segments(positions, numbers, lengths), lengths if cached else None, places)


def _segments(positions: Tensor | None, numbers: Tensor | None, lengths: Tensor | None = None) -> Tensor | None:
    """Documents numbered from 1 (B, T), or None when every row, up to its length, is one."""
    if numbers is None and positions is not None:  # less the place in the row, a document's positions are all alike
        numbers = positions - torch.arange(positions.shape[1], device=positions.device)
    if numbers is None:
        return None
    borders = numbers[:, 1:] != numbers[:, :-1]
    if lengths is not None:
        borders &= torch.arange(1, numbers.shape[1], device=numbers.device) < lengths[:, None]
    return F.pad(borders.cumsum(1), (1, 0)) + 1 if bool(borders.any()) else None


def _mask(given: Tensor, tokens: Tensor) -> Tensor:
    if given.dim() != 2 or len(given) != len(tokens) or given.shape[1] < tokens.shape[1]:
        raise HalflapError(
            f"attention_mask has shape {tuple(given.shape)} and the tokens {tuple(tokens.shape)}; it must be (batch, "
            "all tokens so far) with 1 for each token that exists: pass the tokenizer's"
        )
    return given[:, -tokens.shape[1] :].to(tokens.device) != 0


def _a_token(name: str, given: Tensor | None, tokens: Tensor) -> Tensor | None:
    if given is None:
        return None
    if given.dim() != 2 or given.shape[1] != tokens.shape[1] or len(given) not in (1, len(tokens)):
        raise HalflapError(
            f"{name} has shape {tuple(given.shape)} and the tokens {tuple(tokens.shape)}; it must have one number a "
            "token: correct it or leave it out"
        )
    return given.to(tokens.device, torch.int64).expand(tokens.shape)
