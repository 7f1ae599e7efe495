"""Reading prompts: in passes on a fixed grid, each prompt into a cache of its own, going on from what is cached."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from halflap.inference.continuations import Continuations
from halflap.inference.grammar import GrammarMatcher
from halflap.inference.prefix_cache import PrefixCache
from halflap.inference.replies import Reply, Texts, score_prompt
from halflap.inference.requests import FinishReason, Piece, Request, Token, Usage
from halflap.inference.stream import Stream
from halflap.models.cache import Cache
from halflap.models.model import HybridModel


@dataclass(eq=False)
class Job:
    """A request from when it is queued until its last reply ends; `place` tokens of its prompt are read."""

    stream: Stream
    order: int
    matcher: GrammarMatcher | None = None
    cache: Cache | None = None
    place: int = 0
    cached: int = 0
    branch: int | None = None
    hidden: Tensor | None = None  # (D,) of the last token read
    replies: list[Reply] = field(default_factory=list)
    scored: list[Token] = field(default_factory=list)
    continuations: Continuations | None = None  # once the prompt is read
    passes: Iterator[int] = iter(())  # over them
    copies: int = 0  # rows that these take beside its own
    error: str | None = None

    @property
    def request(self) -> Request:
        return self.stream.request

    @property
    def prompt(self) -> tuple[int, ...]:
        return self.stream.request.prompt

    @property
    def scores_prompt(self) -> bool:
        return self.request.prompt_logprobs is not None and not self.request.continuations

    @property
    def room(self) -> int:
        """Tokens that its cache has room for while it is read."""
        return self.request.longest if self.request.continuations else len(self.prompt)

    @property
    def prompt_tokens(self) -> tuple[Token, ...] | None:
        return tuple(self.scored) if self.scores_prompt else None

    @property
    def done(self) -> bool:
        return len(self.replies) == self.request.n and all(reply.finish_reason for reply in self.replies)

    def abort(self, reason: FinishReason) -> None:
        """A last piece for every choice that has none."""
        for reply in self.replies:
            if reply.finish_reason is None:
                reply.finish(reason)
        for choice in range(len(self.replies), self.request.n):
            self.stream.put(Piece(choice, "", finish_reason=reason))

    def usage(self) -> Usage:
        prompt = len(self.prompt) + sum(map(len, self.request.continuations))
        return Usage(prompt, sum(len(reply.tokens) for reply in self.replies), self.cached)


class Reader:
    """Reads one pass of one prompt at a time."""

    def __init__(
        self,
        model: HybridModel,
        chunk: int,
        prefix: PrefixCache | None,
        create: Callable[[int], Cache],
        texts: Texts,
    ) -> None:
        self._model, self._chunk, self._prefix, self._create, self._texts = model, chunk, prefix, create, texts

    def begin(self, job: Job) -> None:
        """Its cache, with what is known of its prompt in it; a prompt whose probabilities are wanted is read whole."""
        if self._prefix is not None and not job.scores_prompt:
            hit = self._prefix.find(job.prompt, job.room)
            if hit is not None:
                job.cache, job.place, job.cached = hit.cache, hit.depth, hit.depth
                job.hidden, job.branch = hit.hidden, hit.branch
        if job.cache is None:
            job.cache = self._create(job.room)
        if job.scores_prompt:
            job.scored.append(Token(job.prompt[0], self._texts[job.prompt[0]]))

    def read(self, job: Job) -> Tensor | None:
        """One pass; the logits (V,) after the prompt's last token once it is read."""
        assert job.cache is not None
        start, end = job.place, self._border(job)
        if start < end:
            device = self._model.device
            tokens = torch.tensor([job.prompt[start:end]], device=device)
            hidden = self._model.hidden_states(tokens, cache=job.cache)[0]
            job.hidden, job.place = hidden[-1].clone(), end  # a view would keep the whole pass
            if job.scores_prompt:
                self._score(job, hidden, start)
            if self._prefix is not None:
                self._prefix.store(job.prompt[:end], job.cache, 0, job.hidden)
        if job.place < len(job.prompt):
            return None
        assert job.hidden is not None
        return self._model.logits(job.hidden)

    def score(self, job: Job, at_once: int) -> None:
        """Begin to score the continuations of a prompt that is read, as many together as `at_once`."""
        request = job.request
        assert job.cache is not None and job.hidden is not None
        job.continuations = Continuations(
            self._model, self._texts, request.continuations, request.prompt_logprobs or 0, at_once
        )
        job.passes = job.continuations.passes(job.cache, job.hidden, self._chunk)
        job.copies = at_once if request.n > 1 else 0

    def _border(self, job: Job) -> int:
        """Where the pass ends: on the grid, where the prompt parts from others, or at its end."""
        end = min(len(job.prompt), (job.place // self._chunk + 1) * self._chunk)
        return job.branch if job.branch is not None and job.place < job.branch < end else end

    def _score(self, job: Job, hidden: Tensor, start: int) -> None:
        """Log-probabilities of the tokens after each hidden state (T, D), the first of which is token `start`'s."""
        targets = job.prompt[start + 1 : start + 1 + len(hidden)]
        if targets:
            count = job.request.prompt_logprobs or 0
            found = score_prompt(self._model, hidden[: len(targets)], targets, count, self._texts)
            job.scored += [Token(t, self._texts[t], *score) for t, score in zip(targets, found, strict=True)]
