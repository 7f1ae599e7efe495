"""Text from prompts, one batch at a time: all prompts are read together, then every row decodes until it ends.

Rows may be unequal: prompts are right-padded and the model is told how many tokens count, so a row gets what it would
get alone. Finished rows leave the batch, and only the last position's logits are ever made.
"""

from __future__ import annotations

import json
import operator
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from halflap.checkpoints.config import end_ids
from halflap.errors import HalflapError
from halflap.inference.chooser import Chooser, choose_rows
from halflap.inference.detokenize import TextStream
from halflap.inference.grammar import Grammars
from halflap.inference.requests import Grammar, SamplingParams, require_number
from halflap.models.cache import Cache
from halflap.models.config import ModelConfig
from halflap.models.decoder import Decoder
from halflap.models.model import HybridModel

if TYPE_CHECKING:
    from halflap.data.tokenizer import Tokenizer

Prompt = str | Sequence[int]
PREFILL_TOKENS = 8192  # tokens of one prefill pass, all rows together: bounds its memory whatever the prompts
SMALLEST_CHUNK = 256
NEW_TOKENS = 128  # where no number is asked for
CACHE_AHEAD = 512  # new tokens for which cache memory is taken at once


@dataclass(frozen=True)
class Completion:
    """`tokens` are the new ones, an end token included; `text` is theirs without special tokens or stop string."""

    text: str
    tokens: list[int]
    finish_reason: Literal["stop", "length"]


@dataclass
class _Row:
    """A sequence being decoded."""

    chooser: Chooser
    stream: TextStream | None
    tokens: list[int] = field(default_factory=list)
    finish_reason: Literal["stop", "length"] | None = None

    def push(self, token: int, end_tokens: frozenset[int], limit: int) -> str:
        """Take one token; returns the text that may be shown."""
        self.chooser.take(token)
        self.tokens.append(token)
        ended = token in end_tokens
        piece = "" if self.stream is None or ended else self.stream.push(token)
        grammar = self.chooser.matcher
        if grammar is not None and grammar.error:
            raise HalflapError(grammar.error)
        if ended or (self.stream is not None and self.stream.stopped) or (grammar is not None and grammar.finished):
            self.finish_reason = "stop"
        elif len(self.tokens) >= limit:
            self.finish_reason = "length"
        if self.finish_reason and self.stream is not None:
            piece += self.stream.finish()
        return piece

    def completion(self) -> Completion:
        return Completion(self.stream.text if self.stream else "", self.tokens, self.finish_reason or "length")


@torch.inference_mode()
def generate(
    model: HybridModel,
    prompts: Sequence[Prompt],
    max_new_tokens: int | None = None,
    *,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    seed: int = 0,
    stop: Sequence[str] = (),
    ignore_eos: bool = False,
    json_schema: Mapping[str, Any] | str | None = None,
    regex: str | None = None,
    tokenizer: Tokenizer | None = None,
    stream: Callable[[int, str], None] | None = None,
) -> list[Completion]:
    """Continue prompts (text or token ids) as one batch; greedy unless `temperature` is above 0.

    Each text matches `json_schema` (as data, or as JSON) or `regex` (of Rust's crate regex), as far as it comes within
    `max_new_tokens`, by default 128 or as many as there are positions for. `tokenizer` defaults to `model.tokenizer`;
    without any, prompts must be token ids and `text` is "". `stream(row, piece)` is called as text becomes certain. Row
    i samples as a single prompt with seed `seed + i` would. Raises HalflapError for a wrong prompt, token id, schema or
    sampling value, or when the model's positions do not suffice.
    """
    params = SamplingParams(temperature, top_k, top_p, min_p, repetition_penalty, seed)
    tokenizer = tokenizer or getattr(model, "tokenizer", None)
    stop = _checked_stop(stop, tokenizer)
    if max_new_tokens is not None:
        require_number("max_new_tokens", max_new_tokens, whole=True)
        if max_new_tokens < 1:
            raise HalflapError(f"max_new_tokens is {max_new_tokens}; it must be at least 1: ask for a token or more")
    ids = encode_prompts(prompts, model.config, tokenizer)
    if not ids:
        return []
    if max_new_tokens is None:
        max_new_tokens = max(1, min(NEW_TOKENS, most_positions(model.config) - max(map(len, ids))))
    require_positions(model.config, max(map(len, ids)) + max_new_tokens, "the longest prompt and its new tokens need")
    ends = end_tokens(model, tokenizer)
    grammar = _grammar(json_schema, regex)
    matcher = None if grammar is None else Grammars(tokenizer, model.config.vocab_size, ends).matcher(grammar)
    rows = [
        _Row(
            Chooser(params, row, prompt, model.config.vocab_size, model.device, matcher and matcher.copy()),
            None if tokenizer is None else TextStream(tokenizer, prompt, stop),
        )
        for row, prompt in enumerate(ids)
    ]
    for index, piece in _decode(model, ids, rows, frozenset() if ignore_eos else ends, max_new_tokens):
        if stream is not None:
            stream(index, piece)
    return [row.completion() for row in rows]


def _decode(model: HybridModel, prompts: list[list[int]], rows: list[_Row], ends: frozenset[int], limit: int):
    """Advance all rows until each is finished; yields (row, text) as text becomes certain."""
    cache, logits = prefill(model, prompts, ahead=min(limit, CACHE_AHEAD))
    decode = Decoder(model)
    active = list(range(len(rows)))
    while True:
        tokens = choose_rows(logits, [rows[row].chooser for row in active])
        for row, token in zip(active, tokens, strict=True):
            if piece := rows[row].push(token, ends, limit):
                yield row, piece
        keep = [place for place, row in enumerate(active) if rows[row].finish_reason is None]
        if not keep:
            return
        if len(keep) < len(active):
            active, cache = [active[place] for place in keep], cache.select(keep)
        last = torch.tensor([rows[row].tokens[-1:] for row in active], device=model.device)
        logits = decode(last, cache=cache)[:, -1]


def prefill(model: HybridModel, prompts: Sequence[Sequence[int]], *, ahead: int = 0) -> tuple[Cache, Tensor]:
    """Read non-empty prompts of any lengths as one batch; returns their cache and the next token's logits (B, V).

    Long prompts go in several passes, so that memory is bounded; `ahead` is how many more tokens to reserve for.
    """
    device, dtype = model.device, model.dtype
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    longest = int(lengths.max())
    tokens = torch.zeros(len(prompts), longest, dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = torch.tensor(prompt)
    tokens = tokens.to(device)
    cache = Cache.create(model.config, len(prompts), longest + ahead, dtype, device)
    last = torch.zeros(len(prompts), model.config.hidden_size, dtype=dtype, device=device)
    chunk = max(SMALLEST_CHUNK, PREFILL_TOKENS // len(prompts))
    for start in range(0, longest, chunk):
        part = tokens[:, start : start + chunk]
        count = (lengths - start).clamp(0, part.shape[1])
        ragged = bool((count < part.shape[1]).any())
        hidden = model.hidden_states(part, cache=cache, lengths=count if ragged else None)
        here = (lengths > start) & (lengths <= start + chunk)  # rows whose last token is in this pass
        last[here] = hidden[here, count[here] - 1].to(dtype)
    return cache, model.logits(last)


def _grammar(json_schema: Mapping[str, Any] | str | None, regex: str | None) -> Grammar | None:
    if json_schema is not None and regex is not None:
        raise HalflapError("json_schema and regex are both given, and a text matches one of them; keep one")
    if regex is not None:
        return Grammar("regex", regex)
    if json_schema is None:
        return None
    return Grammar("json_schema", json_schema if isinstance(json_schema, str) else json.dumps(json_schema))


def end_tokens(model: HybridModel, tokenizer: Tokenizer | None) -> frozenset[int]:
    """Ids that end a sequence: those of config.json, of generation_config.json, and the tokenizer's."""
    ends = (*end_ids(model.config), *model.more_ends, tokenizer.eos_id if tokenizer else None)
    return frozenset(i for i in ends if i is not None)


def most_positions(config: ModelConfig) -> int:
    """What rotary attention was made for; without it there is no end."""
    rotary = any(block.attention is not None and block.attention.rope is not None for block in config.blocks)
    return config.max_position_embeddings if rotary else sys.maxsize


def require_positions(config: ModelConfig, length: int, what: str) -> None:
    """Raise HalflapError when `length` passes `most_positions`."""
    if length > most_positions(config):
        raise HalflapError(
            f"{what} {length} positions, and the model's rotary embedding has {config.max_position_embeddings}: "
            "give or ask for at most as many"
        )


def encode_prompts(prompts: Sequence[Prompt], config: ModelConfig, tokenizer: Tokenizer | None) -> list[list[int]]:
    """Token ids of each prompt; an empty one becomes the token that starts a document. Raises HalflapError."""
    if isinstance(prompts, str):
        raise HalflapError("prompts is one text; it must be a list of prompts: write [prompt]")
    if tokenizer is not None:
        tokenizer.check_matches(config.vocab_size)
    return [_encode_prompt(index, prompt, config, tokenizer) for index, prompt in enumerate(prompts)]


def _encode_prompt(index: int, prompt: object, config: ModelConfig, tokenizer: Tokenizer | None) -> list[int]:
    if isinstance(prompt, str):
        if tokenizer is None:
            raise HalflapError(f"prompt {index} is text and the model has no tokenizer; give token ids, or a tokenizer")
        try:
            prompt.encode()
        except UnicodeEncodeError as error:
            raise HalflapError(f"prompt {index} is no text ({error}); give whole characters, or token ids") from None
        ids = with_prefix(tokenizer, tokenizer.encode(prompt))
    else:
        ids = _checked_ids(index, prompt, config.vocab_size)
    if not ids:
        own = (tokenizer.bos_id, tokenizer.eos_id) if tokenizer else (None, None)
        known = (config.bos_token_id, own[0], *end_ids(config), own[1])
        ids = [i for i in known if i is not None][:1]
    if not ids:
        raise HalflapError(f"prompt {index} is empty and the model has no token to start from; give at least one token")
    return ids


def with_prefix(tokenizer: Tokenizer, ids: list[int]) -> list[int]:
    """Ids of a text behind what the tokenizer puts before every text, unless the text brings that along."""
    prefix = list(tokenizer.prefix_ids)
    return ids if ids[: len(prefix)] == prefix else prefix + ids


def _checked_ids(index: int, prompt: object, vocab_size: int) -> list[int]:
    values = prompt.tolist() if isinstance(prompt, Tensor) else prompt
    try:
        ids = [operator.index(value) for value in values]  # type: ignore[union-attr]
    except TypeError:
        raise HalflapError(
            f"prompt {index} is {prompt!r:.60} ({type(prompt).__name__}); "
            "a prompt is text or a list of token ids: change it"
        ) from None
    if wrong := [i for i in ids if not 0 <= i < vocab_size]:
        raise HalflapError(
            f"prompt {index} has token id {wrong[0]}; the model's ids go from 0 to {vocab_size - 1}: "
            "use its own tokenizer"
        )
    return ids


def _checked_stop(stop: Sequence[str], tokenizer: Tokenizer | None) -> tuple[str, ...]:
    texts = (stop,) if isinstance(stop, str) else tuple(stop) if isinstance(stop, Iterable) else (stop,)
    if wrong := [text for text in texts if not isinstance(text, str)]:
        raise HalflapError(f"a stop string is {wrong[0]!r}; it must be a text: change it")
    if texts and tokenizer is None:
        raise HalflapError("stop strings need a tokenizer and the model has none; give one, or stop by token count")
    if "" in texts:
        raise HalflapError("a stop string is empty; it must have at least one character: remove it")
    return texts
