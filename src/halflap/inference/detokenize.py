"""New tokens to text while they come: whole UTF-8 characters only, and nothing that a stop string may still swallow.

A character may be spread over several tokens, and some decoders strip a leading space, so text is always decoded
together with a few tokens before it and the difference is taken. The concatenated pieces equal the decoded whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import accumulate
from typing import Protocol

CONTEXT = 8  # tokens decoded again before the new ones
WINDOW = 64  # tokens after which the decoded window moves on
REPLACEMENT = "�"
MOST_PENDING = 3  # replacement characters that one more byte may still turn into a letter (UTF-8 has at most 4 bytes)


class Decodes(Protocol):
    """What is needed of a tokenizer here."""

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = False) -> str: ...


class TextStream:
    """Text of one row: `push(token)` returns what became certain, `finish()` the rest; `stopped` after a stop.

    special: special tokens have text, too.
    """

    def __init__(
        self, tokenizer: Decodes, prompt: Sequence[int] = (), stop: Sequence[str] = (), special: bool = False
    ) -> None:
        self._tokenizer, self._stop, self._special = tokenizer, tuple(stop), special
        self._begun = [0] * len(stop)  # characters of each stop string that the text ends in
        self._ids = list(prompt[-CONTEXT:])
        certain, pending = self._decode()
        self._certain = len(certain)  # characters of the decoded window already taken over
        self._broken = len(pending)  # those that the prompt may have left broken: its own unless they become whole
        self._text = ""
        self._shown = 0
        self.begin = 0  # characters before the token taken last; of a character's parts, before the character
        self.stopped = False

    @property
    def text(self) -> str:
        """Everything certain so far, cut before the stop string."""
        return self._text

    def push(self, token: int) -> str:
        """Take one token; returns the text that is now certain and safe to show."""
        self._ids.append(token)
        certain, pending = self._decode()
        fresh = self._fresh(certain)
        own = fresh.lstrip(REPLACEMENT)  # what was pending before it is broken for good
        self.begin = len(self._text) + (len(fresh) - len(own) if own else 0)
        self._take(fresh)
        self._certain = max(self._certain, len(certain))
        if len(self._ids) > (2 * WINDOW if pending else WINDOW):
            self._ids = self._ids[-CONTEXT:]
            self._certain = len(self._decode()[0])
        return self._show(self._held_back())

    def finish(self) -> str:
        """The rest: unfinished characters as replacement characters, and text held back for a stop string."""
        if not self.stopped:
            certain, pending = self._decode()
            self._take(self._fresh(certain + pending))
        return self._show(0)

    def _fresh(self, window: str) -> str:
        """What the window's text has beyond what was taken over."""
        fresh = window[self._certain :]
        own = len(fresh) - len(fresh.lstrip(REPLACEMENT))
        dropped = min(self._broken, own)
        if fresh:
            self._broken = self._broken - dropped if dropped == len(fresh) else 0
        return fresh[dropped:]

    def _decode(self) -> tuple[str, str]:
        """The window's text, and the trailing replacement characters that are not certain yet."""
        text = self._tokenizer.decode(self._ids, skip_special_tokens=not self._special)
        pending = min(len(text) - len(text.rstrip(REPLACEMENT)), MOST_PENDING)
        return text[: len(text) - pending], text[len(text) - pending :]

    def _take(self, piece: str) -> None:
        before = len(self._text)
        self._text += piece
        self._begun = [_begun(stop, count, piece) for stop, count in zip(self._stop, self._begun, strict=True)]
        starts = [self._text.find(stop, max(0, before - len(stop) + 1)) for stop in self._stop]
        if found := [start for start in starts if start >= 0]:
            self.stopped = True
            self._text = self._text[: min(found)]

    def _held_back(self) -> int:
        """Length of the longest tail that begins a stop string."""
        return 0 if self.stopped else max(self._begun, default=0)

    def _show(self, held: int) -> str:
        end = len(self._text) - held
        piece = self._text[self._shown : end]
        self._shown = max(self._shown, end)
        return piece


def _begun(stop: str, count: int, piece: str) -> int:
    """Characters of `stop` that a text ends in which ended in `count` of them before `piece` (Knuth, Morris, Pratt)."""
    back = _failures(stop)
    for letter in piece:
        while count and (count == len(stop) or stop[count] != letter):
            count = back[count - 1]
        count += stop[count] == letter
    return count


@lru_cache(maxsize=256)
def _failures(stop: str) -> list[int]:
    """Of each beginning of `stop`, the length of its longest shorter end that begins `stop`, too."""
    found = [0] * len(stop)
    count = 0
    for place in range(1, len(stop)):
        while count and stop[count] != stop[place]:
            count = found[count - 1]
        count += stop[count] == stop[place]
        found[place] = count
    return found


def offsets(tokenizer: Decodes, ids: Sequence[int], text: str) -> list[int]:
    """Characters of `text`, which the ids were made from, before each of them; of a character's parts, before it."""
    parts = [tokenizer.decode([token]) for token in ids]
    if "".join(parts) == text:
        return list(accumulate(map(len, parts), initial=0))[:-1]
    found: list[int] = []
    for special in (False, True):
        stream = TextStream(tokenizer, special=special)
        found = []
        for token in ids:
            stream.push(token)
            found.append(min(stream.begin, len(text)))
        stream.finish()
        if stream.text == text:
            break
    return found
