"""Which replica gets a request: one that has read its beginning before, unless it is much busier than another.

A request is seen as the texts of its turns, one after the other, hashed at certain places, and a table remembers which
replicas have read up to each place. A hit is worth the characters that need not be read again, in units of the work of
one running request; so one number compares it with a queue.
"""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

STEP = 256  # characters between places at the beginning of a long text
GROWTH = 16  # and later, one part in so many of the text before
MOST_PLACES = 1024  # of one request; the last ones
CHARACTERS = 1024  # that cost about what one more running request costs everybody
CONTINUED = 4.0  # running requests that going on with a conversation is worth at least
MOST_WORTH = 16.0  # a queue that no prefix is worth waiting in


class Place(NamedTuple):
    """A place in a request's text: its digest up to there, and the characters."""

    digest: bytes
    characters: int


def places(body: Mapping[str, Any]) -> list[Place]:
    """Where a body of chat or completions is hashed, in order: the same places for all that begin alike.

    The last one is where a request may be gone on from: the end of a conversation's last turn, or, as a text goes on
    without a mark, the last place on the grid in it (its end when it is shorter than a step).
    """
    messages = body.get("messages")
    if not isinstance(messages, list):
        prompt = body.get("prompt", body.get("context", ""))
        first = prompt[0] if isinstance(prompt, list) and prompt and isinstance(prompt[0], str | list) else prompt
        found = _hashed([_text(first)])
        return found[:-1] or found  # a text ends where its writer stopped, which is no place of the longer one
    tools = [_text(body["tools"])] if body.get("tools") else []
    return _hashed(tools + [_turn(message) for message in messages])


def _turn(message: Any) -> str:
    if not isinstance(message, Mapping):
        return _text(message)
    said = [_text(message[name]) for name in ("content", "tool_calls") if message.get(name)]
    return "\x1f".join([str(message.get("role")), *said, "\x1e"])


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, sort_keys=True)


def _hashed(texts: Sequence[str]) -> list[Place]:
    """The end of each text, and within them offsets from the beginning of the first that no text changes."""
    found: list[Place] = []
    digest, grid, start = hashlib.blake2b(digest_size=8), _grid(), 0
    mark = next(grid)
    for text in texts:
        at, end = start, start + len(text)
        while at < end:
            cut = min(mark, end)
            digest.update(text[at - start : cut - start].encode(errors="replace"))
            found.append(Place(digest.digest(), cut))
            at, mark = cut, next(grid) if cut == mark else mark
        start = end
    return found[-MOST_PLACES:]


def _grid() -> Iterator[int]:
    place = STEP
    while True:
        yield place
        place += max(STEP, place // GROWTH)


class Load(NamedTuple):
    """How busy a replica is: texts it is writing, and requests it has had."""

    running: int
    served: int


def choose(worth: Mapping[int, float], loads: Mapping[int, Load]) -> int:
    """The replica with the least to do for a request, among those of `loads`, which must not be empty.

    worth: what each has read of it already, in running requests. Of equals the one that had the fewest requests.
    """
    return min(loads, key=lambda r: (loads[r].running - worth.get(r, 0.0), loads[r].served, r))


@dataclass
class Affinity:
    """What replicas have read: digests of beginnings, least recently met first, at most `entries` of them."""

    entries: int = 65_536
    _read: OrderedDict[bytes, dict[int, bool]] = field(default_factory=OrderedDict)  # and whether a request ended there

    def worth(self, asked: Sequence[Place]) -> dict[int, float]:
        """What each replica that knows a beginning of the request saves by it, in running requests."""
        characters: dict[int, int] = {}
        continued: set[int] = set()
        for place in asked:
            for replica, ended in self._read.get(place.digest, {}).items():
                characters[replica] = place.characters
                if ended:
                    continued.add(replica)
        return {
            replica: min(MOST_WORTH, max(count / CHARACTERS, CONTINUED if replica in continued else 0.0))
            for replica, count in characters.items()
        }

    def remember(self, asked: Sequence[Place], replica: int) -> None:
        """A replica reads this request, whose reply will most likely be gone on from."""
        for number, place in enumerate(asked, 1):
            known = self._read.setdefault(place.digest, {})
            known[replica] = known.get(replica, False) or number == len(asked)
            self._read.move_to_end(place.digest)
        while len(self._read) > self.entries:
            self._read.popitem(last=False)

    def forget(self, replica: int) -> None:
        """A replica has lost what it had read."""
        for digest in [digest for digest, known in self._read.items() if known.pop(replica, None) is not None]:
            if not self._read[digest]:
                del self._read[digest]
