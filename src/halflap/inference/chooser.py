"""How the tokens of replies are chosen when every row has parameters of its own.

The noise of a reply's draws follows from its seed and the token's place. So what it gets depends neither on the batch
nor on guesses: a draft model that guesses the token at a place draws with the noise that the model will draw with, and
a guess is right when both choose the same token. Output under speculation is thus the very output without it, and for
distributions that differ by a total variation of d a guess comes true with at least (1 - d) / (1 + d), against 1 - d of
rejection sampling (Daliri et al. 2024). Legend: B batch, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from halflap.inference.requests import SamplingParams
from halflap.inference.sampling import drawing, penalise
from halflap.ops import select
from halflap.ops.sampling import Draw


class Matcher(Protocol):
    """A grammar and how far a reply has come in it."""

    def allowed(self) -> Tensor: ...

    def take(self, token: int) -> None: ...

    @property
    def finished(self) -> bool: ...

    @property
    def error(self) -> str | None: ...


class Chooser:
    """Of one reply: parameters, how many tokens it has, what it and its prompt have said, its grammar."""

    def __init__(
        self,
        params: SamplingParams,
        choice: int,
        prompt: Sequence[int],
        vocab_size: int,
        device: torch.device | str = "cpu",
        matcher: Matcher | None = None,
        late: tuple[int, Sequence[int]] = (0, ()),
    ) -> None:
        """late: how many tokens come before any of the given ones may."""
        self.params, self.matcher = params, matcher
        self._barred = late[0] if late[1] else 0  # so many tokens more
        self._late = torch.tensor(late[1], dtype=torch.int64, device=device)
        self._seed, self._place = params.seed + choice, 0
        self._prompt, self._said = prompt, list[int]()
        self._vocab_size, self._device = vocab_size, device
        self._penalises = bool(params.repetition_penalty != 1 or params.frequency_penalty or params.presence_penalty)
        self._seen: Tensor | None = None
        self._counts: Tensor | None = None
        self._bias: tuple[Tensor, Tensor] | None = None  # tokens and what is added to their logits

    @property
    def adjusts(self) -> bool:
        return self._barred > 0 or self._penalises or bool(self.params.logit_bias) or self.matcher is not None

    def adjusted(self, logits: Tensor) -> Tensor:
        """Logits (V,) after penalties, bias, what may not end it yet, and grammar."""
        if self._penalises:
            logits = self._penalised(logits)
        if self.params.logit_bias:
            if self._bias is None:
                values = torch.tensor(list(self.params.logit_bias.values()), dtype=torch.float32, device=self._device)
                self._bias = torch.tensor(list(self.params.logit_bias), device=self._device), values
            logits = logits.index_add(0, *self._bias)
        if self._barred > 0:
            logits = logits.index_fill(0, self._late, -torch.inf)
        if self.matcher is not None:
            logits = logits.masked_fill(~self.matcher.allowed().to(logits.device), -torch.inf)
        return logits

    def _penalised(self, logits: Tensor) -> Tensor:
        params = self.params
        if self._counts is None:  # or seen, which are made together
            said = torch.tensor(self._said, dtype=torch.int64, device=self._device)
            self._counts = torch.bincount(said, minlength=self._vocab_size).float()
            self._seen = self._counts > 0
            self._seen[torch.tensor(self._prompt, dtype=torch.int64, device=self._device)] = True
        assert self._seen is not None
        if params.repetition_penalty != 1:
            logits = penalise(logits, self._seen, params.repetition_penalty)
        if params.frequency_penalty or params.presence_penalty:
            logits = logits - params.frequency_penalty * self._counts
            logits = logits - params.presence_penalty * (self._counts > 0)
        return logits

    def rest(self) -> None:
        """Let go of what is as large as the vocabulary until a token is chosen again: many choices may wait."""
        self._seen = self._counts = None

    def drawing(self, ahead: int = 0) -> Draw:
        """How the token `ahead` of the next is drawn."""
        return drawing(self.params, self._seed, self._place + ahead)

    def take(self, token: int) -> None:
        """The token that came."""
        self._barred -= 1
        self._place += 1
        if self._penalises:
            self._said.append(token)
        if self._seen is not None and self._counts is not None:
            self._seen[token] = True
            self._counts[token] += 1
        if self.matcher is not None:
            self.matcher.take(token)


def choose_rows(logits: Tensor, choosers: Sequence[Chooser], ahead: int = 0) -> list[int]:
    """The token of each row of logits (B, V) float32, `ahead` of its next."""
    adjusting = [row for row, chooser in enumerate(choosers) if chooser.adjusts]
    if adjusting:
        logits = logits.clone()
        for row in adjusting:
            logits[row] = choosers[row].adjusted(logits[row])
    return select.draw(logits, [chooser.drawing(ahead) for chooser in choosers]).tolist()
