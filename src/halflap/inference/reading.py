"""Reading prompts: in passes on a fixed grid, each prompt into a cache of its own, going on from what is cached.

Short prompts share a pass, in which they lie one after the other: the weights are read once for all of them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from halflap.inference.chooser import Chooser
from halflap.inference.continuations import Continuations
from halflap.inference.grammar import GrammarMatcher
from halflap.inference.prefix_cache import NEAR, PrefixCache, common
from halflap.inference.replies import Reply, Texts, score_prompt
from halflap.inference.requests import FinishReason, Piece, Request, Token, Usage
from halflap.inference.stream import Stream
from halflap.models.cache import Cache
from halflap.models.model import HybridModel


@dataclass(eq=False)
class Job:
    """A request from when it is queued until its last reply ends; `place` tokens of its prompt are read.

    `order` is its place among all; `turn` the round (turns.py) of its first choice.
    """

    stream: Stream
    order: int
    turn: int
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

    def begin_replies(
        self, texts: Texts, ends: frozenset[int], vocab_size: int, device: torch.device
    ) -> Sequence[Reply]:
        """A reply of each choice, which ends at `ends` if the request does not say otherwise."""
        request = self.request
        ends = (frozenset() if request.ignore_eos else ends) | set(request.stop_ids)
        late = (request.min_new_tokens, tuple(ends))  # tokens that do not come before their time
        for choice in range(request.n):
            matcher = None if self.matcher is None else self.matcher.copy()
            chooser = Chooser(request.sampling, choice, request.prompt, vocab_size, device, matcher, late)
            self.replies.append(Reply(self.stream, choice, self.order, chooser, texts, ends))
        return self.replies

    def end_scored(self) -> None:
        """Send its continuations, scored."""
        assert self.continuations is not None
        for choice, tokens in enumerate(self.continuations.tokens):
            self.stream.put(Piece(choice, "", finish_reason="length", prompt=tuple(tokens)))
        self.stream.end(self.usage())

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
    """Reads a pass of one prompt, or of several at a time."""

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

    def together(self, jobs: Sequence[Job]) -> list[Job]:
        """The first of them, and as many of the next as the pass has room for."""
        rests = [self._border(job, job.place) - job.place for job in jobs]
        return [job for job, total in zip(jobs, itertools.accumulate(rests)) if job is jobs[0] or total <= self._chunk]

    def joins(self, job: Job, others: Sequence[Job]) -> bool:
        """Whether a prompt that waits fits into the next pass of others.

        It waits where it begins as one of them does: then it is to find that in the prefix cache.
        """
        known = 0
        if self._prefix is not None and not job.scores_prompt:
            known = self._prefix.known(job.prompt)
            if any(common(other.prompt, job.prompt) >= known + NEAR for other in others):
                return False
        rests = [self._border(other, other.place) - other.place for other in others]
        return sum(rests) + self._border(job, known) - known <= self._chunk

    def read(self, jobs: Sequence[Job]) -> list[tuple[Job, Tensor]]:
        """One pass; those whose prompts are read by it, each with the logits (V,) after its last token."""
        spans = [(job, job.place, self._border(job, job.place)) for job in jobs]
        if spans := [(job, start, end) for job, start, end in spans if start < end]:
            self._pass(spans)
        done = [job for job in jobs if job.place == len(job.prompt)]
        last = [job.hidden for job in done if job.hidden is not None]
        return list(zip(done, self._model.logits(torch.stack(last)), strict=True)) if done else []

    def _pass(self, spans: Sequence[tuple[Job, int, int]]) -> None:
        """Tokens start .. end of each prompt."""
        tokens = [token for job, start, end in spans for token in job.prompt[start:end]]
        caches = [job.cache for job, _, _ in spans if job.cache is not None]
        counts = [end - start for _, start, end in spans]
        read = torch.tensor([tokens], device=self._model.device)
        states = self._model.hidden_states(read, cache=caches, counts=counts)[0].split(counts)
        for (job, start, end), cache, hidden in zip(spans, caches, states, strict=True):
            job.hidden, job.place = hidden[-1].clone(), end  # a view would keep the whole pass
            if job.scores_prompt:
                self._score(job, hidden, start)
            if self._prefix is not None:
                self._prefix.store(job.prompt[:end], cache, 0, job.hidden)

    def score(self, job: Job, at_once: int) -> None:
        """Begin to score the continuations of a prompt that is read, as many together as `at_once`."""
        request = job.request
        assert job.cache is not None and job.hidden is not None
        job.continuations = Continuations(
            self._model, self._texts, request.continuations, request.prompt_logprobs or 0, at_once
        )
        job.passes = job.continuations.passes(job.cache, job.hidden, self._chunk)
        job.copies = at_once if request.n > 1 else 0

    def _border(self, job: Job, place: int) -> int:
        """Where a pass from `place` ends: on the grid, where the prompt parts from others, or at its end."""
        end = min(len(job.prompt), (place // self._chunk + 1) * self._chunk)
        return job.branch if job.branch is not None and place < job.branch < end else end

    def _score(self, job: Job, hidden: Tensor, start: int) -> None:
        """Log-probabilities of the tokens after each hidden state (T, D), the first of which is token `start`'s."""
        targets = job.prompt[start + 1 : start + 1 + len(hidden)]
        if targets:
            count = job.request.prompt_logprobs or 0
            found = score_prompt(self._model, hidden[: len(targets)], targets, count, self._texts)
            job.scored += [Token(t, self._texts[t], *score) for t, score in zip(targets, found, strict=True)]
