"""The documents of a corpus: each kept text once, in order, with a count of what was left out and why.

A running digest of the texts handed out says whether two passes over the sources met the same documents, whatever
happened to the files or to the rule that keeps them in between.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Tally:
    """Documents `seen` so far; of these `excluded` were not to be kept and `duplicates` repeat another."""

    seen: int = 0
    excluded: int = 0
    duplicates: int = 0
    text_digest: str = ""


class Documents:
    """The distinct documents to keep, in order, with the tally of what has been handed out so far."""

    def __init__(self, documents: Iterator[str], keep: Callable[[str], bool] | None) -> None:
        self._documents, self._keep = documents, keep
        self._digests: set[bytes] = set()
        self._running = hashlib.sha256()
        self.seen = self.excluded = self.duplicates = 0

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        for text in self._documents:
            self.seen += 1
            digest = hashlib.sha256(text.encode()).digest()
            if self._keep is not None and not self._keep(text):
                self.excluded += 1
            elif digest[:16] in self._digests:
                self.duplicates += 1
            else:
                self._digests.add(digest[:16])
                self._running.update(digest)
                return text
        raise StopIteration

    @property
    def tally(self) -> Tally:
        return Tally(self.seen, self.excluded, self.duplicates, self._running.hexdigest())

    def skip_to(self, tally: Tally) -> bool:
        """Pass over documents until `tally` is reached; False when these documents never give it."""
        while self.seen < tally.seen:
            if next(self, None) is None:
                break
        return self.tally == tally
