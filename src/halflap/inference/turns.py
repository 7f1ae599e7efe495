"""Whose turn it is: replies wait in rounds, one of each group in a round.

A group is what one client asked for at once, of however many prompts and choices; so a short request waits for one
reply of a long one, not for all. Rounds are numbers given out on arrival: a group's replies get one after the other,
from the round after the one that is under way. No torch.
"""

from __future__ import annotations

from halflap.inference.requests import Request

MOST_GROUPS = 1024  # remembered before those whose rounds are over are forgotten


class Turns:
    """Numbers of rounds, from 1."""

    def __init__(self) -> None:
        self._now = 0
        self._last: dict[str, int] = {}  # round of each group

    def assign(self, request: Request) -> int:
        """The round of a request's first choice; each other one has the round after."""
        group = request.group
        first = 1 + max(self._now, self._last.get(group, 0) if group is not None else 0)
        if group is not None:
            if len(self._last) >= MOST_GROUPS:
                self._last = {name: last for name, last in self._last.items() if last > self._now}
            self._last[group] = first + request.n - 1
        return first

    def begun(self, turn: int) -> None:
        """A reply of this round has got its place."""
        self._now = max(self._now, turn)
