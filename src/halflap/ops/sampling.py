"""One draw a row from softmax(logits / temperature) after top-k, top-p and min-p: the plain form.

A draw takes the largest of scaled logits plus Gumbel noise (the Gumbel-max trick), and the noise at a token is a
function of the row's key and the token's number alone: a keyed hash whose 32 bits are taken as a uniform number. So a
draw depends neither on the other rows nor on how many there are, and needs no state of a generator.

What is kept, by scaled logit z and probability, in this order: top-k the k largest z; top-p of those the fewest of the
likeliest whose probabilities sum to p or more; min-p what is at least min_p times as likely as the likeliest. A token
with the very z of the last one kept stays too, so each filter is a least z, and the likeliest token always stays.
Noise, exponentials and sums are in float64, so that this and the native form differ in the 16th digit alone.
Legend: B batch, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

FIRST_LOOK = 1024  # of the likeliest tokens, which mostly hold top-p's share
SPREAD = 0x9E3779B9  # 2^32 / golden ratio
MULTIPLIERS = (0x21F0AAAD, 0x735A2D97)  # of a hash with low bias (Wellons 2018)
WORD = 1 << 32


class Draw(NamedTuple):
    """How a row's token is drawn: temperature 0 takes the likeliest; top_k 0, top_p 1 and min_p 0 filter nothing.

    key: 64 bits that say which noise.
    """

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    key: int


def draw(logits: Tensor, rows: Sequence[Draw]) -> Tensor:
    """The token of each row (B,) int64 of logits (B, V), float32 or wider; on their device."""
    if not any(row.temperature for row in rows):
        return logits.argmax(-1)
    scaled = logits / _column([row.temperature or 1 for row in rows], logits)
    scores = gumbel([row.key for row in rows], logits.shape[-1], logits.device)
    scores *= _column([float(row.temperature > 0) for row in rows], scores)
    scores += scaled
    if any(row.temperature and (row.top_k or row.top_p < 1 or row.min_p) for row in rows):
        scores.masked_fill_(scaled.double() < least_kept(scaled, rows), -torch.inf)
    return scores.argmax(-1)


def least_kept(scaled: Tensor, rows: Sequence[Draw]) -> Tensor:
    """The least scaled logit of each row (B, 1) float64 that its filters keep, of scaled logits (B, V)."""
    least = scaled.new_full((len(rows), 1), -torch.inf, dtype=torch.float64)
    vocabulary = scaled.shape[-1]
    cut = [row for row, asked in enumerate(rows) if 0 < asked.top_k < vocabulary]
    if cut:
        counts = torch.tensor([[rows[row].top_k] for row in cut], device=scaled.device)
        least[cut] = scaled[cut].topk(int(counts.max())).values.gather(1, counts - 1).double()
    cut = [row for row, asked in enumerate(rows) if asked.top_p < 1]
    if cut:
        least[cut] = _least_of_share(scaled[cut], least[cut], [rows[row].top_p for row in cut])
    cut = [row for row, asked in enumerate(rows) if asked.min_p > 0]
    if cut:
        shares = scaled.new_tensor([[math.log(rows[row].min_p)] for row in cut], dtype=torch.float64)
        least[cut] = least[cut].maximum(scaled[cut].amax(-1, keepdim=True).double() + shares)
    return least


def _least_of_share(scaled: Tensor, least: Tensor, shares: Sequence[float]) -> Tensor:
    """Top-p among what is at least `least` (B, 1): its own least scaled logits (B, 1) float64."""
    largest = scaled.amax(-1, keepdim=True)
    weights = (scaled.double() - largest.double()).exp_().masked_fill_(scaled.double() < least, 0)
    wanted = _column(shares, weights) * weights.sum(-1, keepdim=True)
    for count in (min(FIRST_LOOK, scaled.shape[-1]), scaled.shape[-1]):
        top = scaled.topk(count)
        held = weights.gather(1, top.indices)
        kept = (held.cumsum(-1) - held < wanted).sum(-1, keepdim=True)  # those before which something is missing
        if bool((kept < count).all()):
            break
    return top.values.gather(1, kept.clamp(min=1) - 1).double().maximum(least)


def gumbel(keys: Sequence[int], size: int, device: torch.device | str = "cpu") -> Tensor:
    """The noise (B, V) float64 of tokens 0 .. size - 1 under each key."""
    halves = [(_signed(key % WORD), _signed(key // WORD % WORD)) for key in keys]
    first, second = torch.tensor(halves, dtype=torch.int32, device=device).T[:, :, None]
    numbers = torch.arange(size, dtype=torch.int32, device=device) * _signed(SPREAD)
    bits = _mixed(_mixed(numbers + first) ^ second).long() & (WORD - 1)
    uniform = bits.double().add_(0.5).div_(WORD)
    return uniform.log_().neg_().log_().neg_()


def _mixed(x: Tensor) -> Tensor:
    """A hash of 32 bits, one to one; products wrap."""
    x = (x ^ ((x >> 16) & 0xFFFF)) * _signed(MULTIPLIERS[0])
    x = (x ^ ((x >> 15) & 0x1FFFF)) * _signed(MULTIPLIERS[1])
    return x ^ ((x >> 15) & 0x1FFFF)


def _signed(word: int) -> int:
    return word - WORD if word >= WORD // 2 else word


def _column(values: Sequence[float], like: Tensor) -> Tensor:
    """(B, 1) in the type and on the device of a tensor."""
    return like.new_tensor([[value] for value in values])
