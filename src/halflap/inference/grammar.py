"""Replies that match a JSON schema, a regular expression or a grammar of rules: which tokens may come next.

The grammars are llguidance's (optional; `pip install halflap[serve]`), which compiles them against the tokenizer.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from halflap.errors import HalflapError
from halflap.inference.requests import Grammar

if TYPE_CHECKING:
    from halflap.data.tokenizer import Tokenizer

WORD = 32  # tokens in a word of a mask
MOST_KNOWN = 8  # compiled grammars that are kept, as many requests bring the same
MOST_SYMBOLS = 20_000  # of a compiled grammar: some 4,000 properties, which take a second; time grows with the square


class Grammars:
    """Grammars over one tokenizer and a model's vocabulary. Raises HalflapError without llguidance or an end token."""

    def __init__(self, tokenizer: Tokenizer | None, vocab_size: int, ends: Iterable[int]) -> None:
        try:
            import llguidance
        except ImportError:
            raise HalflapError(
                "a reply's grammar needs llguidance, which is not installed; run: pip install 'halflap[serve]'"
            ) from None
        ends = sorted(ends)
        if tokenizer is None or not ends:
            raise HalflapError(
                "a reply's grammar needs a tokenizer with an end token, and the model has none; use its own tokenizer"
            )
        self._library: Any = llguidance
        self._limits = llguidance.LLParserLimits(max_grammar_size=MOST_SYMBOLS, verbose_errors=False)
        self._vocab_size = vocab_size
        self._known: OrderedDict[Grammar, GrammarMatcher] = OrderedDict()
        self._lock = threading.Lock()
        try:
            self._tokenizer = llguidance.LLTokenizer(tokenizer.content, n_vocab=vocab_size, eos_token=ends)
        except Exception as error:
            raise HalflapError(
                f"llguidance does not read this tokenizer ({error}); send the request without a grammar"
            ) from None

    def matcher(self, grammar: Grammar) -> GrammarMatcher:
        """At the grammar's start. From any thread. Raises HalflapError for one that cannot be read."""
        with self._lock:
            known = self._known.get(grammar)
        if known is None:
            known = self._new_matcher(grammar)
        with self._lock:
            self._known[grammar] = known
            self._known.move_to_end(grammar)
            if len(self._known) > MOST_KNOWN:
                self._known.popitem(last=False)
            return known.copy()

    def _new_matcher(self, grammar: Grammar) -> GrammarMatcher:
        try:
            matcher = self._library.LLMatcher(self._tokenizer, self._compiled(grammar), limits=self._limits)
        except ValueError as error:
            raise _unreadable(grammar, str(error)) from None
        if matcher.is_error():
            raise _unreadable(grammar, matcher.get_error())
        return GrammarMatcher(matcher, self._vocab_size)

    def _compiled(self, grammar: Grammar) -> str:
        kinds = self._library.LLMatcher
        if grammar.kind == "json_schema":
            schema = json.loads(grammar.text)
            return kinds.grammar_from_json_schema(json.dumps(schema), overrides={"whitespace_flexible": False})
        if grammar.kind == "regex":
            return kinds.grammar_from_regex(grammar.text)
        if grammar.kind == "lark":
            return self._library.grammar_from("grammar", grammar.text)
        raise HalflapError(
            f"grammar kind {grammar.kind!r} is not known; allowed are json_schema, regex, lark: choose one"
        )


def _unreadable(grammar: Grammar, reason: str) -> HalflapError:
    first = " ".join(reason.split())[:300]
    return HalflapError(f"the {grammar.kind} grammar {grammar.text[:80]!r} cannot be used ({first}); correct it")


class GrammarMatcher:
    """How far one reply has come."""

    def __init__(self, matcher: Any, vocab_size: int) -> None:
        self._matcher, self._vocab_size = matcher, vocab_size
        self._words = torch.zeros(-(-vocab_size // WORD), dtype=torch.int32)
        self._bits = torch.arange(WORD, dtype=torch.int32)

    def copy(self) -> GrammarMatcher:
        return GrammarMatcher(self._matcher.deep_copy(), self._vocab_size)

    def allowed(self) -> Tensor:
        """(V,) bool: the tokens that may come next."""
        self._matcher.unsafe_compute_mask_ptr(self._words.data_ptr(), self._words.nbytes)
        return ((self._words[:, None] >> self._bits) & 1).flatten()[: self._vocab_size].bool()

    def take(self, token: int) -> None:
        if not self._matcher.is_stopped():
            self._matcher.consume_token(token)

    @property
    def finished(self) -> bool:
        """Nothing more can come."""
        return self._matcher.is_stopped()

    @property
    def error(self) -> str | None:
        """Why it cannot go on, in a sentence."""
        if not self._matcher.is_error():
            return None
        return f"the grammar failed on this reply ({self._matcher.get_error()[:200]}); simplify it"
