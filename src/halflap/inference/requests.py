"""What is asked of the engine and what comes back, as data: requests, pieces of replies, settings. No torch.

A request is a prompt in token ids and `n` choices (replies to it); what comes back is a stream of pieces, each of one
choice. Log-probabilities are the model's own, in nats, before temperature, penalties and filters.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from numbers import Integral, Real
from typing import Any, Literal

from halflap.errors import HalflapError

FinishReason = Literal["stop", "length", "cancelled", "error"]
GrammarKind = Literal["json_schema", "regex", "lark"]
COLDEST = 1e-5  # temperatures below it take the likeliest token, and logits over them would overflow
MOST_LOGPROBS = 100
MOST_CHOICES = 1024
SSM_DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is chosen; temperature 0 takes the likeliest; top_k 0, top_p 1, min_p 0 filter nothing.

    repetition_penalty looks at prompt and reply; frequency_penalty (a token's count times it is taken from its logit)
    and presence_penalty at the reply alone. logit_bias is added to the logits of the given token ids.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        for entry in fields(self):
            if entry.name != "logit_bias":
                require_number(entry.name, getattr(self, entry.name), whole=entry.name in ("top_k", "seed"))
        checks = (
            ("temperature", self.temperature, 0 <= self.temperature < float("inf"), "at least 0 (0 is greedy)"),
            ("top_k", self.top_k, self.top_k >= 0, "a whole number of at least 0 (0 keeps every token)"),
            ("top_p", self.top_p, 0 <= self.top_p <= 1, "0 to 1 (1 keeps every token, 0 the likeliest)"),
            ("min_p", self.min_p, 0 <= self.min_p < 1, "at least 0 and below 1 (0 keeps every token)"),
            ("repetition_penalty", self.repetition_penalty, self.repetition_penalty > 0, "above 0 (1 changes nothing)"),
            *(
                (name, value, abs(value) < float("inf"), "a finite number (0 changes nothing)")
                for name, value in (
                    ("frequency_penalty", self.frequency_penalty),
                    ("presence_penalty", self.presence_penalty),
                )
            ),
        )
        for name, value, fine, allowed in checks:
            if not fine:
                raise HalflapError(f"{name} is {value}; it must be {allowed}: choose another value")
        for token, bias in self.logit_bias.items():
            require_number("logit_bias: a token id", token, whole=True)
            require_number(f"logit_bias of token {token}", bias, whole=False)
            if bias != bias or bias == float("inf"):
                raise HalflapError(f"logit_bias of token {token} is {bias}; it must be a number or -inf: change it")

    @property
    def greedy(self) -> bool:
        return self.temperature < COLDEST


def require_number(name: str, value: object, *, whole: bool) -> None:
    """Raise HalflapError unless a value from Python is a number of the kind that its field needs."""
    if isinstance(value, bool) or not isinstance(value, Integral if whole else Real):
        kind = "a whole number" if whole else "a number"
        raise HalflapError(f"{name} is {value!r}; it must be {kind}: choose another value")


def _require_whole(name: str, value: Any, low: int, high: int | None = None) -> None:
    """Raise HalflapError unless the value is a whole number of at least `low` and, if given, at most `high`."""
    require_number(name, value, whole=True)
    if value < low or (high is not None and value > high):
        allowed = f"at least {low}" if high is None else f"{low} to {high}"
        raise HalflapError(f"{name} is {value}; it must be {allowed}: choose another value")


@dataclass(frozen=True)
class Grammar:
    """What a reply must match: a JSON schema (as text; `{}` is any JSON), a regular expression, or rules for Lark or in
    llama.cpp's GBNF."""

    kind: GrammarKind
    text: str


@dataclass(frozen=True)
class Request:
    """`n` replies to one prompt (token ids, at least one); choice i samples as a single reply with seed `seed + i`.

    logprobs: how many of the likeliest tokens to report at each new token (0: the chosen one's log-probability alone).
    prompt_logprobs: the same for the prompt; max_new_tokens may then be 0. stop_ids end a reply as end tokens do, with
    ignore_eos too; before min_new_tokens neither comes. continuations: token ids of texts that may follow the prompt,
    scored in place of replies: n is their number, max_new_tokens 0, and a choice's `prompt` its scored tokens, with as
    many of the likeliest as prompt_logprobs says. group: a name that requests share which take turns with the rest as
    one; None: this one is a group. Raises HalflapError for a wrong value.
    """

    prompt: tuple[int, ...]
    max_new_tokens: int = 128
    sampling: SamplingParams = SamplingParams()
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    n: int = 1
    grammar: Grammar | None = None
    stop_ids: tuple[int, ...] = ()
    min_new_tokens: int = 0
    continuations: tuple[tuple[int, ...], ...] = ()
    group: str | None = None

    @property
    def longest(self) -> int:
        """Tokens of the longest text that it may come to."""
        return len(self.prompt) + max([self.max_new_tokens, *map(len, self.continuations)])

    def __post_init__(self) -> None:
        if not self.prompt:
            raise HalflapError("the prompt is empty; it must have at least one token: start with the beginning token")
        least = 0 if self.prompt_logprobs is not None else 1
        limits = (
            ("max_new_tokens", self.max_new_tokens, least, None),
            ("n", self.n, 1, MOST_CHOICES),
            ("logprobs", self.logprobs, 0, MOST_LOGPROBS),
            ("prompt_logprobs", self.prompt_logprobs, 0, MOST_LOGPROBS),
            ("min_new_tokens", self.min_new_tokens, 0, self.max_new_tokens),
        )
        for name, value, low, high in limits:
            if value is not None:
                _require_whole(name, value, low, high)
        if "" in self.stop:
            raise HalflapError("a stop string is empty; it must have at least one character: remove it")
        if self.continuations:
            self._check_continuations()
        if self.grammar is not None and self.min_new_tokens:
            raise HalflapError(
                "min_new_tokens and a grammar, which says where a reply ends, exclude each other: drop one"
            )

    def _check_continuations(self) -> None:
        if not all(self.continuations):
            raise HalflapError("a continuation has no token; give each at least one")
        if self.n != len(self.continuations) or self.max_new_tokens or self.prompt_logprobs is None:
            raise HalflapError(
                f"{len(self.continuations)} continuations are scored with n their number, max_new_tokens 0 and "
                "prompt_logprobs given: correct the request"
            )


@dataclass(frozen=True)
class TopToken:
    """One of the likeliest tokens at a place."""

    id: int
    text: str
    log_prob: float


@dataclass(frozen=True)
class Token:
    """A token of a reply or prompt; log_prob None where none was asked for, and at a prompt's first token.

    offset: characters of the reply before it; those of a prompt's tokens are not counted.
    """

    id: int
    text: str
    log_prob: float | None = None
    top: tuple[TopToken, ...] = ()
    offset: int = 0


@dataclass(frozen=True)
class Piece:
    """What one choice grew by. `text` lags behind `tokens` while it may be part of a character or a stop string.

    finish_reason is set on a choice's last piece. `prompt` comes with a choice's first piece, if asked for; where
    continuations are scored it holds the choice's.
    """

    choice: int
    text: str
    tokens: tuple[Token, ...] = ()
    finish_reason: FinishReason | None = None
    prompt: tuple[Token, ...] | None = None


@dataclass(frozen=True)
class Usage:
    """completion_tokens of all choices; cached_tokens of the prompt were found in the prefix cache."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int


NARROW_GUESSES = (
    "ssm_dtype is bfloat16, in which a state is rounded once a pass, so that guesses, which make passes longer, would "
    "change texts; leave out either ssm_dtype or speculate"
)


@dataclass(frozen=True)
class EngineSettings:
    """Limits of an engine.

    max_batch: choices decoded at once. max_context: tokens of a prompt and its reply; None is the model's own limit.
    memory: bytes that decode state may take, prefix cache apart; None does not limit it. prefill_chunk: prompt tokens
    read in one pass, between which others decode. prefix_cache: bytes, a draft model's share included (0: off).
    speculate: None, "lookup" (what followed the last tokens earlier in the text), or a draft HybridModel with the same
    tokenizer; max_draft: most tokens guessed at once. queue: requests that may wait (None: any number). ssm_dtype: how
    SSM states are kept between passes; "bfloat16" takes half the memory, rounds each state to 8 bits a pass, and
    decodes by the plain step.
    """

    max_batch: int = 16
    max_context: int | None = None
    memory: int | None = None
    prefill_chunk: int = 512
    prefix_cache: int = 0
    speculate: Any = None
    max_draft: int = 8
    queue: int | None = None
    ssm_dtype: str = "float32"

    def __post_init__(self) -> None:
        limits = (
            ("max_batch", self.max_batch, 1),
            ("max_context", self.max_context, 1),
            ("memory", self.memory, 0),
            ("prefill_chunk", self.prefill_chunk, 1),
            ("prefix_cache", self.prefix_cache, 0),
            ("max_draft", self.max_draft, 1),
            ("queue", self.queue, 0),
        )
        for name, value, low in limits:
            if value is not None or name not in ("max_context", "memory", "queue"):
                _require_whole(name, value, low)
        if self.ssm_dtype not in SSM_DTYPES:
            raise HalflapError(
                f"ssm_dtype is {self.ssm_dtype!r}; allowed are {', '.join(SSM_DTYPES)}: choose one of them"
            )
        if self.ssm_dtype != "float32" and self.speculate is not None:
            raise HalflapError(NARROW_GUESSES)
        if isinstance(self.speculate, str) and self.speculate != "lookup":
            raise HalflapError(
                f"speculate is {self.speculate!r}; it must be None, 'lookup' or a draft model: choose one of them"
            )
