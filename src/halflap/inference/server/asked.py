"""A checked body to what the engine is asked: requests, and how their replies are to be shown."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from halflap.inference.requests import Request, SamplingParams
from halflap.inference.server.bodies import CompletionBody, SamplingBody
from halflap.inference.server.bodies_chat import ChatBody
from halflap.inference.server.config import ServerSettings
from halflap.inference.server.errors import ApiError, wrong
from halflap.inference.server.forms import answer_form, grammar_of
from halflap.inference.server.prompts import Prompts
from halflap.inference.server.tools import ToolFormat

MOST_CHOICES = 512  # of one HTTP request, all prompts together
COMPLETION_TOKENS = 16


@dataclass(frozen=True)
class Asked:
    """Requests to the engine; choice c of request r is choice r * n + c of the reply."""

    requests: tuple[Request, ...]
    n: int
    stream: bool
    include_usage: bool
    running_usage: bool = False  # in every chunk, of its choice so far
    echo: tuple[str, ...] = ()  # the prompt's text of each request, to begin its choices with
    echo_offsets: tuple[Sequence[int], ...] = ()  # where in it each token of the prompt begins, for log-probabilities
    logprobs: bool = False
    tool_format: ToolFormat | None = None
    tool_names: frozenset[str] = frozenset()
    most_calls: int | None = None
    trimmed: bool = False  # space before the reply is the template's own


def choices(body: CompletionBody) -> int:
    """Of all prompts together. Raises ApiError for more than may be."""
    prompts, n = len(_prompts(body.prompt)), body.n or 1
    if prompts * n > MOST_CHOICES:
        raise wrong("n", f"{prompts} prompts times n {n} are more than {MOST_CHOICES} choices; ask for fewer")
    return prompts * n


def completion(body: CompletionBody, prompts: Prompts, settings: ServerSettings) -> Asked:
    """`/v1/completions`. Raises ApiError and HalflapError."""
    n, echo = body.n or 1, bool(body.echo)
    if body.best_of not in (None, n):
        raise wrong("best_of", f"best_of is {body.best_of}; only the same as n ({n}) is supported: leave it out")
    most = COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens
    if most == 0 and not echo:
        raise wrong("max_tokens", "max_tokens is 0; it must be at least 1 without echo: ask for a token or more")
    given, encoded, new = _prompts(body.prompt), [], []
    for prompt in given:
        encoded.append(prompts.text(prompt, settings.max_context))
        new.append(_fitting(len(encoded[-1]), most, settings, "max_tokens"))
    common: dict[str, Any] = {
        "sampling": sampling(body),
        "stop": stops(body),
        "ignore_eos": bool(body.ignore_eos),
        "stop_ids": tuple(body.stop_token_ids or ()),
        "min_new_tokens": body.min_tokens or 0,
        "logprobs": body.logprobs,
        "prompt_logprobs": (body.logprobs or 0) if echo and (body.logprobs is not None or most == 0) else None,
        "n": n,
        "grammar": grammar_of(body),
    }
    texts = tuple(p if isinstance(p, str) else prompts.decode(p) for p in given) if echo else ()
    scored = body.logprobs is not None
    return Asked(
        tuple(Request(ids, room, **common) for ids, room in zip(encoded, new, strict=True)),
        n,
        bool(body.stream),
        *usage_wanted(body),
        texts,
        tuple(map(prompts.offsets, encoded, texts)) if scored else (),
        scored,
    )


def chat(body: ChatBody, prompts: Prompts, settings: ServerSettings) -> Asked:
    """`/v1/chat/completions`. Raises ApiError and HalflapError."""
    tools = list(body.tools or ()) if body.tool_choice != "none" else []
    grammar, form = answer_form(body, prompts.tool_format)
    described = [tool.model_dump(exclude_none=True) for tool in tools]
    ids = prompts.conversation([message.plain() for message in body.messages], described, settings.max_context)
    most = body.max_completion_tokens or body.max_tokens
    called = "max_tokens" if body.max_tokens and not body.max_completion_tokens else "max_completion_tokens"
    if body.top_logprobs and not body.logprobs:
        raise wrong("top_logprobs", "top_logprobs needs logprobs: true; add it, or leave top_logprobs out")
    request = Request(
        ids,
        _fitting(len(ids), most, settings, called),
        sampling(body),
        stops(body) + prompts.stop,
        bool(body.ignore_eos),
        (body.top_logprobs or 0) if body.logprobs else None,
        n=body.n or 1,
        grammar=grammar,
        stop_ids=tuple(body.stop_token_ids or ()),
        min_new_tokens=body.min_tokens or 0,
    )
    return Asked(
        (request,),
        request.n,
        bool(body.stream),
        *usage_wanted(body),
        logprobs=bool(body.logprobs),
        tool_format=form,
        tool_names=frozenset(tool.function.name for tool in tools),
        most_calls=1 if body.parallel_tool_calls is False else None,
        trimmed=not prompts.has_template and grammar is None,
    )


def sampling(body: SamplingBody) -> SamplingParams:
    """OpenAI's defaults: temperature 1, and a seed of its own for every request that brings none."""
    seed = secrets.randbits(62) if body.seed is None else body.seed % 2**62
    return SamplingParams(
        temperature=1.0 if body.temperature is None else body.temperature,
        top_k=max(0, body.top_k or 0),
        top_p=1.0 if body.top_p is None else body.top_p,
        min_p=body.min_p or 0.0,
        repetition_penalty=body.repetition_penalty or 1.0,
        seed=seed,
        frequency_penalty=body.frequency_penalty or 0.0,
        presence_penalty=body.presence_penalty or 0.0,
        logit_bias={int(token): bias for token, bias in (body.logit_bias or {}).items()},
    )


def stops(body: SamplingBody) -> tuple[str, ...]:
    given = [body.stop] if isinstance(body.stop, str) else body.stop or []
    return tuple(stop for stop in given if stop)


def usage_wanted(body: SamplingBody) -> tuple[bool, bool]:
    """Whether a stream ends with its usage, and whether each chunk has what there is of it."""
    if body.stream_options is not None and not body.stream:
        raise wrong("stream_options", "stream_options needs stream: true; add it, or leave stream_options out")
    options = body.stream_options
    if options is None or not options.include_usage:
        return False, False
    return True, bool(options.continuous_usage_stats)


def _prompts(prompt: str | Sequence[Any]) -> list[str | list[int]]:
    if isinstance(prompt, str) or isinstance(prompt[0], int):
        return [prompt]  # pyright: ignore[reportReturnType]
    return list(prompt)


def _fitting(prompt: int, asked: int | None, settings: ServerSettings, name: str) -> int:
    """New tokens at most: those asked for, or all that fit. Raises ApiError when the context does not suffice."""
    room = settings.max_context - prompt
    if asked is None and room > 0:
        return room
    if room < max(1 if asked is None else asked, 0):
        wanted = "" if asked is None else f" and {asked} new ones are asked for ({name})"
        message = (
            f"the prompt has {prompt} tokens{wanted}; the context has {settings.max_context}: shorten the prompt"
            f"{'' if asked is None else ' or ask for fewer'}"
        )
        raise ApiError(400, message, param=name if room > 0 else None, code="context_length_exceeded")
    return room if asked is None else asked
