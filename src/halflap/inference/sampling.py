"""From logits to the next token: penalties, filters and one draw, as pure functions.

Order and definitions are those of Hugging Face's `generate`: repetition penalty (Keskar et al. 2019), temperature,
top-k, top-p (Holtzman et al. 2020), min-p (Nguyen et al. 2024). A draw takes the largest of logits plus Gumbel noise
of the row's own generator (the Gumbel-max trick), so it depends on no other row of the batch, and two models that draw
with the same noise mostly draw the same token, which is how guesses come true (chooser.py).
Legend: B batch, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from halflap.inference.requests import SamplingParams

SEEDS = 1 << 63  # of generators
SMALLEST = 1e-38  # of exponential numbers, whose logarithm is taken


def row_generators(params: SamplingParams, rows: int) -> list[torch.Generator]:
    """One CPU generator a row: row i draws as a single prompt with seed `seed + i` would."""
    return [torch.Generator().manual_seed((params.seed + row) % SEEDS) for row in range(rows)]


def choose(
    logits: Tensor, params: SamplingParams, generators: Sequence[torch.Generator], seen: Tensor | None = None
) -> Tensor:
    """The next token of each row (B,) int64 from logits (B, V) in float32.

    `seen` (B, V) is True at tokens of the prompt and the text so far; it is needed only with a repetition penalty.
    """
    if seen is not None and params.repetition_penalty != 1:
        logits = penalise(logits, seen, params.repetition_penalty)
    if params.greedy:
        return logits.argmax(-1)
    return draw(filtered(logits / params.temperature, params), generators)


def penalise(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Divide positive and multiply negative logits (B, V) of the tokens in `seen` by the penalty."""
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def filtered(logits: Tensor, params: SamplingParams) -> Tensor:
    """Logits (B, V) with -inf at every token that top-k, then top-p, then min-p removes; one token always stays."""
    if 0 < params.top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(params.top_k).values[:, -1:], -torch.inf)
    if params.top_p < 1:
        ordered, order = logits.sort(-1)
        removed = ordered.softmax(-1).cumsum(-1) <= 1 - params.top_p
        removed[:, -1] = False
        logits = logits.masked_fill(torch.zeros_like(removed).scatter(1, order, removed), -torch.inf)
    if params.min_p > 0:
        probabilities = logits.softmax(-1)
        logits = logits.masked_fill(probabilities < params.min_p * probabilities.amax(-1, keepdim=True), -torch.inf)
    return logits


def draw(logits: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
    """One token a row (B,) from softmax(logits (B, V)), with the next noise of each row's generator."""
    return draw_with(logits, torch.stack([noise(logits.shape[-1], generator) for generator in generators]))


def noise(size: int, generator: torch.Generator) -> Tensor:
    """What one draw adds to logits: Gumbel noise (V,) float32, on the generator's device."""
    spread = torch.empty(size, device=generator.device).exponential_(generator=generator)
    return -spread.clamp_(min=SMALLEST).log_()


def draw_with(logits: Tensor, added: Tensor) -> Tensor:
    """The likeliest tokens (B,) of logits (B, V) plus noise (B, V); removed tokens stay at minus infinity."""
    return (logits + added.to(logits.device)).argmax(-1)
