"""Continuous batching: which requests are read, which replies decode, and what waits, one step at a time.

A step reads about one pass of prompt tokens for the requests whose turn it is (turns.py), puts replies into free slots,
and decodes one token (with guesses several) of every reply that has a slot (groups.py). A request is begun when a slot
and its memory are free; when running replies outgrow the memory, the youngest is put aside whole and comes back first.
What is done in a step depends on nothing but what was asked for and, where tokens are guessed, on measured times, which
change no token.
"""

from __future__ import annotations

import bisect
import contextlib
import time
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from halflap.inference.chooser import choose_rows
from halflap.inference.draft import Draft
from halflap.inference.generate import end_tokens
from halflap.inference.grammar import GrammarMatcher
from halflap.inference.groups import Slots
from halflap.inference.memory import Budget
from halflap.inference.parked import Parked, SwappedOut
from halflap.inference.prefix_cache import PrefixCache
from halflap.inference.reading import Job, Reader
from halflap.inference.replies import Reply, Texts
from halflap.inference.requests import EngineSettings, FinishReason
from halflap.inference.rows import OneRow
from halflap.inference.speculate import Lookup, Pace, Speculator
from halflap.inference.stream import Stream
from halflap.inference.turns import Turns
from halflap.models import slots
from halflap.models.decoder import Decoder
from halflap.models.model import HybridModel

if TYPE_CHECKING:
    from halflap.data.tokenizer import Tokenizer


AHEAD = 32  # tokens that a reply must have room for beside others, so that it is not put aside again at once
NO_GUESSES = (
    "replies are written without guesses (speculate): in bfloat16 and without the C++ kernels a pass over several "
    "tokens rounds otherwise than single ones, so guesses would change texts; install g++ or clang++, or take --dtype "
    "float32"
)


class Scheduler:
    """Everything that runs or waits; not thread-safe."""

    def __init__(self, model: HybridModel, tokenizer: Tokenizer | None, settings: EngineSettings) -> None:
        self.model, self.settings, self.device = model, settings, model.device
        self.decode = Decoder(model)
        self.guesser = settings.speculate
        if self.guesser is not None and self.device.type == "cpu" and self.decode.depends_on_width:
            warnings.warn(NO_GUESSES, stacklevel=2)
            self.guesser = None
        self.texts, self.ends = Texts(tokenizer), end_tokens(model, tokenizer)
        draft = self.guesser if isinstance(self.guesser, HybridModel) else None
        configs = [model.config] if draft is None else [model.config, draft.config]
        self.ssm_dtype = torch.bfloat16 if settings.ssm_dtype == "bfloat16" else None
        self.budget = Budget(configs, model.dtype, settings.memory, self.ssm_dtype)
        shares = self.budget.shares(settings.prefix_cache, settings.prefill_chunk)
        self.remembered = 0 if draft is None else shares[1]  # bytes of what a draft model has read
        one_row = OneRow(model, self.ssm_dtype)
        self.prefix = PrefixCache(shares[0], one_row) if settings.prefix_cache else None
        self.reader = Reader(model, settings.prefill_chunk, self.prefix, one_row, self.texts)
        self.speculator = self._new_speculator()
        self.pace = Pace()
        self.slots = Slots(
            lambda: slots.empty(model.config, model.dtype, model.device, self.ssm_dtype),
            self.budget,
            settings.max_batch,
        )
        self.turns = Turns()
        self.waiting: list[Job] = []  # by turn
        self.reading: list[Job] = []
        self.parked: list[Parked] = []
        self.jobs: dict[int, Job] = {}  # by order: those begun or waiting
        self.waiting_for: str | None = None
        self.counts = dict.fromkeys(("requests", "prompt_tokens", "new_tokens", "preempted", "guessed", "right"), 0)
        self._order = 0

    def add(self, stream: Stream, matcher: GrammarMatcher | None = None) -> None:
        """Queue a request that `Engine.check` found fit, with its compiled grammar."""
        job = Job(stream, self._order, self.turns.assign(stream.request), matcher)
        self._order += 1
        self.counts["requests"] += 1
        self.jobs[job.order] = job
        bisect.insort(self.waiting, job, key=lambda job: (job.turn, job.order))

    @property
    def rows(self) -> list[Reply]:
        """The replies that decode, in the order of a pass."""
        return self.slots.rows

    @property
    def free_slots(self) -> int:
        return self.settings.max_batch - len(self.rows) - len(self.parked) - len(self.reading)

    @property
    def busy(self) -> bool:
        return bool(self.jobs)

    @torch.inference_mode()
    def step(self) -> None:
        self._sweep()
        self._read()
        if self.rows:
            self._decode()

    @torch.inference_mode()
    def abandon(self, reason: FinishReason, error: str | None = None) -> None:
        """End every request."""
        for job in list(self.jobs.values()):
            with contextlib.suppress(Exception):  # what failed may fail again at a reply's last words
                self._end_job(job, reason, error)
        for parked in self.parked:
            parked.drop()
        self.parked, self.reading = [], []
        self.waiting.clear()
        self.slots.clear()
        self.speculator = self._new_speculator()

    def _new_speculator(self) -> Speculator | None:
        if isinstance(self.guesser, HybridModel):
            return Draft(self.guesser, self.model.config, self.settings.prefill_chunk, self.budget, self.remembered)
        return Lookup() if self.guesser == "lookup" else None

    # ---- ends

    def _sweep(self) -> None:
        """What its reader gave up."""
        for job in [job for job in self.jobs.values() if job.stream.cancelled]:
            for reply in [reply for reply in self.rows if reply.order == job.order]:
                self._remove(reply)
            for parked in [parked for parked in self.parked if parked.reply.order == job.order]:
                parked.drop()
                self.parked.remove(parked)
            if job in self.waiting:
                self.waiting.remove(job)
            if job in self.reading:
                self.reading.remove(job)
            self._end_job(job, "cancelled")

    def _end_job(self, job: Job, reason: FinishReason, error: str | None = None) -> None:
        """End whatever of a request has not ended."""
        try:
            job.abort(reason)
        finally:
            job.stream.end(job.usage(), error)
            self.jobs.pop(job.order, None)

    def _finished(self, reply: Reply) -> None:
        """A reply said its last piece."""
        job = self.jobs.get(reply.order)
        if job is None:
            return
        job.error = reply.error or job.error
        if job.done:
            job.stream.end(job.usage(), job.error)
            del self.jobs[job.order]

    def _remove(self, reply: Reply) -> None:
        """Free its slot."""
        self.slots.remove(reply)
        if self.speculator is not None:
            self.speculator.remove(reply)

    # ---- prompts

    def _read(self) -> None:
        """About one pass of prompt tokens."""
        spent = 0
        self._gather()  # before a slot goes to replies whose turn is later
        self._place()
        while spent < self.settings.prefill_chunk and self._gather():
            scoring = next((job for job in self.reading if job.continuations is not None), None)
            read = self._read_prompts() if scoring is None else self._score(scoring)
            self.counts["prompt_tokens"] += read
            spent += read

    def _gather(self) -> bool:
        """Begin the requests that the next pass has room for; whether there is anything to read."""
        while self._may_begin() and (not self.reading or self.reader.joins(self.waiting[0], self.reading)):
            job = self.waiting.pop(0)
            self.turns.begun(job.turn)
            self.reading.append(job)
            self.reader.begin(job)
        return bool(self.reading)

    def _read_prompts(self) -> int:
        """The next pass over prompts; the tokens read."""
        jobs = self.reader.together(self.reading)
        before = sum(job.place for job in jobs)
        for job, logits in self.reader.read(jobs):
            if job.request.continuations:
                self.reader.score(job, self._copies(job))
            else:
                self.reading.remove(job)
                self._begin_replies(job, logits)
                self._place()
        return sum(job.place for job in jobs) - before

    def _score(self, job: Job) -> int:
        """The next pass over the continuations of a prompt; the tokens read."""
        read = next(job.passes, 0)
        if not read:
            self.reading.remove(job)
            job.end_scored()
            del self.jobs[job.order]
        return read

    def _copies(self, job: Job) -> int:
        """How many of a prompt's continuations there is memory for at once."""
        count, row = job.request.n, self.budget.row(job.room)
        while count > 1 and not self.slots.fit(1, self._beside() + count * row, only_ask=True):
            count //= 2
        return count

    def _may_begin(self) -> bool:
        """Whether the request whose turn it is gets a slot now; why not is in `waiting_for`."""
        self.waiting_for = None
        if not self.waiting:
            return False
        job = self.waiting[0]
        earlier = sum(self._turn(parked) < (job.turn, job.order) for parked in self.parked)
        if len(self.rows) + earlier + len(self.reading) >= self.settings.max_batch:
            self.waiting_for = f"a slot: all {self.settings.max_batch} are taken"
            return False
        if not self.rows and not self.parked and not self.reading:
            return True
        length = job.room
        coming = sum(self.budget.row(one.room + slots.GROW) for one in self.reading)  # their slots, once they are read
        beside = self._beside() + coming + self.budget.row(length)
        # beside states that are kept for later choices, which nothing puts aside, it must fit whole
        whole = job.request.longest if self.parked else length
        if not earlier and self.slots.fit(slots.GROW, beside, whole, only_ask=True):
            return True
        self.waiting_for = (
            f"memory: a prompt of {length} tokens beside what runs does not fit {self.budget.bytes} bytes"
        )
        return False

    def _begin_replies(self, job: Job, logits: Tensor) -> None:
        """First tokens, from logits (V,); those that go on are parked until they get a slot."""
        for reply in job.begin_replies(self.texts, self.ends, self.model.config.vocab_size, self.device):
            reply.acceptance = self.pace.acceptance
            if job.request.max_new_tokens:
                self._take(reply, choose_rows(logits[None], [reply.chooser])[0], logits)
                reply.flush(job.prompt_tokens)
            else:
                reply.finish("length", job.prompt_tokens)
            if reply.finish_reason is None:
                assert job.cache is not None
                reply.chooser.rest()
                self.parked.append(Parked(reply, job.cache))
            else:
                self._finished(reply)
        job.cache = None

    # ---- slots

    def _place(self) -> None:
        """Fill free slots with what is parked, by turns; those are left that prompts of earlier turns need."""
        self.parked.sort(key=self._turn)
        while self.parked:
            parked = self.parked[0]
            left = sum((job.turn, job.order) < self._turn(parked) for job in self.reading)
            if len(self.rows) + left >= self.settings.max_batch:
                return
            reply, owners = parked.reply, sum(other.cache is parked.cache for other in self.parked)
            if not self.rows and owners == 1:  # a single one was found fit when it was asked for, once and not twice
                self.slots.adopt(reply, parked.bring(), 1)
            elif self._make_room(AHEAD if self.rows else 1, reply):
                self.slots.add(reply, parked.bring())
            else:
                return
            self.turns.begun(self._turn(parked)[0])
            self.parked.pop(0)
            parked.drop()

    def _turn(self, parked: Parked) -> tuple[int, int, int]:
        """When a reply gets a slot, least first: those put aside have had their turn."""
        order, choice = parked.reply.order, parked.reply.choice
        return (0 if isinstance(parked, SwappedOut) else self.jobs[order].turn + choice), order, choice

    def _make_room(self, width: int, arriving: Reply | None = None) -> bool:
        """For `width` more tokens of every reply; a single one was found fit when it was asked for."""
        length = None if arriving is None else arriving.length
        if self.slots.fit(width, self._beside(), length):
            return True
        if len(self.rows) + (arriving is not None) > 1:
            return False
        self.slots.force(width, length)
        return True

    def _beside(self) -> int:
        """Bytes of states outside the slots."""
        held = {id(parked.cache): parked.nbytes for parked in self.parked}
        return sum(held.values()) + sum((1 + job.copies) * self.budget.row(job.room) for job in self.reading)

    def _put_aside(self) -> None:
        """The youngest reply gives up its slot."""
        reply = max(self.rows, key=lambda reply: (reply.order, reply.choice))
        group, index = self.slots.where(reply)
        self.parked.append(SwappedOut(reply, slots.take(group.cache, index)))
        self.counts["preempted"] += 1
        self._remove(reply)

    # ---- tokens

    def _decode(self) -> None:
        """One pass over all rows."""
        guesser, most = self.speculator, self.settings.max_draft
        guesses = {} if guesser is None else self.pace.guesses(guesser, self.rows, most)
        if not self._make_room(1 + max(map(len, guesses.values()), default=0)):
            guesses = {}
            while not self._make_room(1):
                self._put_aside()
        groups, rows, started = self.slots.groups, self.rows, time.perf_counter()
        guessed = [guesses.get(reply, []) for reply in rows]
        width = 1 + max(map(len, guessed))
        tokens = [
            [reply.tokens[-1], *guess, *[0] * (width - 1 - len(guess))]
            for reply, guess in zip(rows, guessed, strict=True)
        ]
        views = [slots.view(group.cache, len(group.rows)) for group in groups]
        if width > 1:
            for view in views:
                view.hold()
        lengths = torch.tensor([1 + len(guess) for guess in guessed], device=self.device) if width > 1 else None
        logits = self.decode(torch.tensor(tokens, device=self.device), cache=views, lengths=lengths)
        taken = self._choose(rows, logits, guessed)
        counts = torch.tensor(taken, device=self.device).split([len(group.rows) for group in groups])
        for group, view, count in zip(groups, views, counts, strict=True):
            if width > 1:
                view.commit(count)
            slots.absorb(group.cache, view)
        if self.speculator is not None:
            self.pace.measured(len(rows), width, time.perf_counter() - started)
        for reply, guess, got in zip(rows, guessed, taken, strict=True):
            self.pace.observe(reply, len(guess), got - 1)
            reply.flush()
        for reply in [reply for reply in rows if reply.finish_reason is not None]:
            self._leave(reply)

    def _leave(self, reply: Reply) -> None:
        """A reply has ended: remember its text, free its slot."""
        if self.prefix is not None:
            group, index = self.slots.where(reply)
            self.prefix.store([*reply.prompt, *reply.tokens[:-1]], group.cache, index)
        self._remove(reply)
        self._finished(reply)

    def _choose(self, rows: Sequence[Reply], logits: Tensor, guesses: Sequence[Sequence[int]]) -> list[int]:
        """How many tokens each row gets from logits (B, T, V): up to the first that was not guessed, or its end."""
        taken = [0] * len(rows)
        alive = list(range(len(rows)))
        for place in range(logits.shape[1]):
            here = logits[:, place] if len(alive) == len(rows) else logits[alive, place]
            chosen = choose_rows(here, [rows[row].chooser for row in alive])
            going = []
            for row, token, scores in zip(alive, chosen, here, strict=True):
                self._take(rows[row], token, scores)
                taken[row] += 1
                guess = guesses[row]
                if rows[row].finish_reason is None and place < len(guess) and guess[place] == token:
                    going.append(row)
            if not (alive := going):
                break
        self.counts["guessed"] += sum(map(len, guesses))
        self.counts["right"] += sum(taken) - len(taken)
        return taken

    def _take(self, reply: Reply, token: int, logits: Tensor) -> None:
        reply.add(token, logits)
        self.counts["new_tokens"] += 1

    def stats(self) -> dict[str, Any]:
        """Plain numbers; see `Engine.stats`."""
        held = sum(parked.nbytes for parked in {id(p.cache): p for p in self.parked}.values())
        swapped = sum(parked.swapped for parked in self.parked if isinstance(parked, SwappedOut))
        return {
            "running": len(self.rows),
            "waiting": len(self.waiting) + len(self.parked) + len(self.reading),
            "waiting_for": self.waiting_for,
            "slots": self.settings.max_batch,
            "cache_bytes": {"slots": self.slots.nbytes(), "beside": held, "swapped_out": swapped},
            "cache_kinds": self.budget.kinds([reply.length for reply in self.rows]),
            **self.counts,
            "prefix_cache": None if self.prefix is None else self.prefix.stats(),
        }
