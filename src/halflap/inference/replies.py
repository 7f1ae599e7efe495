"""Replies while they are written, and log-probabilities as requests ask for them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from halflap.inference.chooser import Chooser
from halflap.inference.detokenize import TextStream
from halflap.inference.requests import FinishReason, Piece, Token, TopToken
from halflap.inference.stream import Stream

if TYPE_CHECKING:
    from halflap.data.tokenizer import Tokenizer
    from halflap.models.model import HybridModel

SCORED_AT_ONCE = 64  # places of a prompt whose logits are held at once


class Texts:
    """The text of single tokens as they read within a text, with the space that some begin with; remembered."""

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self.tokenizer = tokenizer
        self._known: dict[int, str] = {}

    def __getitem__(self, token: int) -> str:
        if self.tokenizer is None:
            return ""
        if token not in self._known:
            self._known[token] = self.tokenizer.token_bytes(token).decode(errors="replace")
        return self._known[token]


class Reply:
    """One choice of a request while it is written. `order` is the request's place in the queue of all."""

    def __init__(
        self, stream: Stream, choice: int, order: int, chooser: Chooser, texts: Texts, ends: frozenset[int]
    ) -> None:
        self.stream, self.choice, self.order, self.chooser = stream, choice, order, chooser
        self.tokens: list[int] = []
        self.finish_reason: FinishReason | None = None
        self.error: str | None = None
        self.acceptance = 0.0  # share of guesses that came true lately
        request = stream.request
        self.prompt, self._limit = request.prompt, request.max_new_tokens
        self._wanted, self._texts, self._ends = request.logprobs, texts, ends
        tokenizer = texts.tokenizer
        self._text = None if tokenizer is None else TextStream(tokenizer, request.prompt, request.stop)
        self._new: list[Token] = []
        self._shown = ""

    @property
    def length(self) -> int:
        """Tokens that the cache holds: all but the last, which is to be read next."""
        return len(self.prompt) + max(0, len(self.tokens) - 1)

    @property
    def left(self) -> int:
        return self._limit - len(self.tokens)

    def add(self, token: int, logits: Tensor) -> None:
        """Take the token chosen at logits (V,)."""
        self.chooser.take(token)
        self.tokens.append(token)
        value, best = None, ()
        if self._wanted is not None:
            value, best = score_row(logits, token, self._wanted, self._texts)
        ended, offset = token in self._ends, 0
        if self._text is not None:
            offset = len(self._text.text)
            if not ended:
                self._shown += self._text.push(token)
                offset = self._text.begin
        self._new.append(Token(token, self._texts[token], value, best, offset))
        grammar = self.chooser.matcher
        if grammar is not None and grammar.error:
            self.finish_reason, self.error = "error", grammar.error
        elif ended or (self._text is not None and self._text.stopped) or (grammar is not None and grammar.finished):
            self.finish_reason = "stop"
        elif self.left <= 0:
            self.finish_reason = "length"

    def flush(self, prompt: tuple[Token, ...] | None = None) -> None:
        """Send what was added."""
        if self.finish_reason is not None:
            self.chooser.rest()
            if self._text is not None:
                self._shown += self._text.finish()
        self.stream.put(Piece(self.choice, self._shown, tuple(self._new), self.finish_reason, prompt))
        self._shown, self._new = "", []

    def finish(self, reason: FinishReason, prompt: tuple[Token, ...] | None = None) -> None:
        self.finish_reason = reason
        self.flush(prompt)


def score_row(logits: Tensor, token: int, count: int, texts: Texts) -> tuple[float, tuple[TopToken, ...]]:
    """The token's log-probability at logits (V,), and the `count` likeliest tokens."""
    return score_next(logits, [token], count, texts)[0]


def score_next(
    logits: Tensor, targets: Sequence[int], count: int, texts: Texts
) -> list[tuple[float, tuple[TopToken, ...]]]:
    """The same for several tokens that may all come at these logits."""
    log_probs = F.log_softmax(logits, -1)
    best = log_probs.topk(min(count, len(log_probs)))
    top = tuple(TopToken(i, texts[i], p) for i, p in zip(best.indices.tolist(), best.values.tolist(), strict=True))
    return [(value, top) for value in log_probs[torch.tensor(targets, device=logits.device)].tolist()]


def score_prompt(
    model: HybridModel, hidden: Tensor, targets: Sequence[int], count: int, texts: Texts
) -> list[tuple[float, tuple[TopToken, ...]]]:
    """The same for targets (M,), each following its hidden state (M, D)."""
    found = []
    for start in range(0, len(targets), SCORED_AT_ONCE):
        part = slice(start, start + SCORED_AT_ONCE)
        logits = model.logits(hidden[part])
        found += _scores(logits, targets[part], count, texts)
    return found


def _scores(
    logits: Tensor, targets: Sequence[int], count: int, texts: Texts
) -> list[tuple[float, tuple[TopToken, ...]]]:
    log_probs = F.log_softmax(logits, -1)
    best = log_probs.topk(min(count, log_probs.shape[1]), -1)
    own = log_probs.gather(1, torch.tensor(targets, device=logits.device)[:, None])[:, 0].tolist()
    return [
        (value, tuple(TopToken(i, texts[i], p) for i, p in zip(ids, tops, strict=True)))
        for value, ids, tops in zip(own, best.indices.tolist(), best.values.tolist(), strict=True)
    ]
