"""The engine: requests from any thread, answered together by one thread that runs the model.

engine = Engine(model, tokenizer, EngineSettings(max_batch=16))
for piece in engine.submit(Request(prompt=(1, 17, 4), max_new_tokens=32)):
    print(piece.text, end="")
engine.close()
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from typing import TYPE_CHECKING, Any

from halflap.errors import HalflapError
from halflap.inference.generate import require_positions
from halflap.inference.grammar import GrammarMatcher, Grammars
from halflap.inference.requests import EngineSettings, Request
from halflap.inference.scheduler import Scheduler
from halflap.inference.stream import Stream
from halflap.models.model import HybridModel

if TYPE_CHECKING:
    from halflap.data.tokenizer import Tokenizer

LOG = logging.getLogger(__name__)
PUBLISHED = 0.1  # seconds between fresh numbers
SPAN = 10.0  # seconds that tokens a second are counted over


class QueueFull(HalflapError):
    """As many requests wait as the settings allow."""


class Engine:
    """Continuous batching over slots; see `EngineSettings`. `tokenizer` defaults to `model.tokenizer`; it may be None,
    and text is then "". A context manager closes it.
    """

    def __init__(
        self, model: HybridModel, tokenizer: Tokenizer | None = None, settings: EngineSettings | None = None
    ) -> None:
        self.model, self.settings = model, settings or EngineSettings()
        self.tokenizer = tokenizer or getattr(model, "tokenizer", None)
        if self.tokenizer is not None:
            self.tokenizer.check_matches(model.config.vocab_size)
        self._scheduler = Scheduler(model, self.tokenizer, self.settings)
        self._grammars: Grammars | None = None
        self._require_useful_prefix_cache()
        self._changed = threading.Condition()
        self._arrived: deque[tuple[Stream, GrammarMatcher | None]] = deque()
        self._closing = False
        self._free = self.settings.max_batch
        self._recent: tuple[tuple[float, int], ...] = ()  # when, and the new tokens until then
        self._stats = self._counted()
        self._thread = threading.Thread(target=self._run, name="halflap-engine", daemon=True)
        self._thread.start()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def submit(self, request: Request) -> Stream:
        """Queue a request; its pieces come through the stream.

        Raises HalflapError for one that can never run (its tokens, length, memory or grammar) and QueueFull when too
        many wait.
        """
        matcher = self.check(request)
        stream = Stream(request, self._wake)
        with self._changed:
            if self._closing:
                raise HalflapError("the engine is closed; make a new one")
            waiting, limit = len(self._scheduler.waiting) + len(self._arrived), self.settings.queue
            if limit is not None and waiting >= limit + self._free:
                raise QueueFull(f"{waiting} requests wait and at most {limit} may; try again in a moment")
            self._arrived.append((stream, matcher))
            self._changed.notify()
        return stream

    def check(self, request: Request) -> GrammarMatcher | None:
        """Raise HalflapError for a request that can never run; its grammar, compiled."""
        config, settings = self.model.config, self.settings
        for name, ids in (
            ("prompt", request.prompt),
            ("logit_bias", request.sampling.logit_bias),
            ("stop_ids", request.stop_ids),
            ("continuations", [i for each in request.continuations for i in each]),
        ):
            if wrong := [i for i in ids if not 0 <= i < config.vocab_size]:
                raise HalflapError(
                    f"{name} has token id {wrong[0]}; the model's ids go from 0 to {config.vocab_size - 1}: correct it"
                )
        length, rows = request.longest, 2 if len(request.continuations) > 1 else 1  # its prompt's too
        if settings.max_context is not None and length > settings.max_context:
            raise HalflapError(
                f"the prompt has {len(request.prompt)} tokens and {length - len(request.prompt)} may follow it; "
                f"together they may be {settings.max_context}: shorten the prompt or ask for fewer"
            )
        require_positions(config, length, "the prompt and its new tokens need")
        budget = self._scheduler.budget
        if not budget.fits([(rows, length)]):
            raise HalflapError(
                f"{length} tokens take {rows * budget.row(length):,} bytes of cache and the engine has "
                f"{budget.bytes:,}; shorten the prompt, ask for fewer tokens or give more memory"
            )
        if request.stop and self.tokenizer is None:
            raise HalflapError("stop strings need a tokenizer and the model has none; give one, or stop by token count")
        return None if request.grammar is None else self._load_grammars().matcher(request.grammar)

    def stats(self) -> dict[str, Any]:
        """Numbers of a moment ago.

        running and waiting replies, waiting_for (why the next one waits), slots; cache_bytes held (slots, beside,
        swapped_out) and cache_kinds (what the running replies need of it, by kind); requests, prompt_tokens,
        new_tokens, preempted, guessed, right (guesses that came true) since the start; tokens_per_second (new ones,
        over the last seconds); prefix_cache (requests, hits, hit_tokens, bytes, ...; None when off).
        """
        now = time.monotonic()
        recent = [(then, count) for then, count in self._recent if then >= now - SPAN]
        rate = (recent[-1][1] - recent[0][1]) / (now - recent[0][0]) if len(recent) > 1 else 0.0
        return self._stats | {"tokens_per_second": rate}

    def close(self) -> None:
        """Stop; what runs ends with "cancelled"."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()

    # ---- the engine's thread

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closing or self._arrived or self._scheduler.busy)
                arrived = list(self._arrived)
                self._arrived.clear()
            for stream, matcher in arrived:
                self._scheduler.add(stream, matcher)
            if self._closing:
                self._scheduler.abandon("cancelled")
                return
            self._step()

    def _step(self) -> None:
        try:
            self._scheduler.step()
        except Exception as error:  # one step's failure (memory, a kernel) must not end the engine
            LOG.exception("a step of the engine failed")
            message = f"the engine failed ({type(error).__name__}: {error}); send the request again"
            self._scheduler.abandon("error", message)
        self._free, now = self._scheduler.free_slots, time.monotonic()
        if not self._scheduler.busy or now >= self._stats["time"] + PUBLISHED:
            self._stats = self._counted()

    def _counted(self) -> dict[str, Any]:
        now, stats = time.monotonic(), self._scheduler.stats()
        kept = (sample for sample in self._recent if sample[0] >= now - SPAN)
        self._recent = (*kept, (now, stats["new_tokens"]))
        return {**stats, "time": now}

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify()

    def _load_grammars(self) -> Grammars:
        if self._grammars is None:
            self._grammars = Grammars(self.tokenizer, self.model.config.vocab_size, self._scheduler.ends)
        return self._grammars

    def _require_useful_prefix_cache(self) -> None:
        prefix = self._scheduler.prefix
        if prefix is not None and (least := prefix.smallest(self.settings.prefill_chunk)) > prefix.budget:
            raise HalflapError(
                f"prefix_cache is {prefix.budget:,} bytes, and one entry of {self.settings.prefill_chunk} tokens takes "
                f"{least:,} with this model: give several times that, a smaller prefill_chunk, or 0 to turn it off"
            )
