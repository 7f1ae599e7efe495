"""From logits to the next token: penalties, filters and one draw, as pure functions.

Order and definitions are those of Hugging Face's `generate`: repetition penalty (Keskar et al. 2019), temperature,
top-k, top-p (Holtzman et al. 2020), min-p (Nguyen et al. 2024); of tokens that are equally likely none is cut before
another. The noise of a draw (ops/sampling.py) follows from the reply's seed, the token's place in the reply and its
number. So a reply depends on nothing else that runs, and two models that draw with the same noise mostly draw the same
token, which is how guesses come true (chooser.py).
Legend: B batch, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from halflap.inference.requests import SamplingParams
from halflap.ops.sampling import Draw, least_kept

WORDS = 1 << 64
STEP = 0x9E3779B97F4A7C15  # 2^64 / golden ratio


def penalise(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Divide positive and multiply negative logits (B, V) of the tokens in `seen` by the penalty."""
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def filtered(logits: Tensor, params: SamplingParams) -> Tensor:
    """Logits (B, V) with -inf at every token that top-k, then top-p, then min-p removes; one token always stays."""
    least = least_kept(logits, [drawing(params, 0, 0)] * len(logits))
    return logits.masked_fill(logits.double() < least, -torch.inf)


def drawing(params: SamplingParams, seed: int, place: int) -> Draw:
    """How the token at a place of a reply is drawn."""
    temperature = 0.0 if params.greedy else params.temperature
    return Draw(temperature, params.top_k, params.top_p, params.min_p, noise_key(seed, place))


def noise_key(seed: int, place: int) -> int:
    """64 bits that belong to a place of the reply with a seed: two rounds of SplitMix64 (Steele et al. 2014)."""
    return _mixed(_mixed(seed % WORDS) + place * STEP)


def _mixed(x: int) -> int:
    x = (x + STEP) % WORDS
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % WORDS
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % WORDS
    return x ^ (x >> 31)
