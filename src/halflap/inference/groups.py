"""The slots: running replies in groups of similar length, each in a cache of its own, all decoded in one pass.

A row costs what the longest of its group does, in memory and in attention, so a long text among short ones does not
make them long; a reply that outgrows its group moves on to the next. Memory is counted from the config before any is
taken (memory.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from halflap.inference.memory import Budget
from halflap.inference.replies import Reply
from halflap.models import slots
from halflap.models.cache import Cache

SHORTEST = 256  # tokens up to which replies are in the first group
EXACT = (False, 1)  # to `Slots._size`: no more than needed
STEEP = 4  # how much longer the next group's may be

Size = tuple[int, int]  # rows, and tokens that each has room for


@dataclass(eq=False)
class Group:
    """Replies of at most `bound` tokens: reply i is row i of the cache."""

    bound: int
    cache: Cache
    rows: list[Reply] = field(default_factory=list)

    @property
    def longest(self) -> int:
        return max((reply.length for reply in self.rows), default=0)


class Slots:
    """At most `most` replies."""

    def __init__(self, create: Callable[[], Cache], budget: Budget, most: int) -> None:
        self._create, self._budget, self.most = create, budget, most
        self._groups: dict[int, Group] = {}
        self._alike = budget.row(1 << 40) == budget.row(1 << 41)  # rows do not grow with their text

    @property
    def groups(self) -> list[Group]:
        """Those with replies, the short ones first."""
        return [self._groups[bound] for bound in sorted(self._groups)]

    @property
    def rows(self) -> list[Reply]:
        return [reply for group in self.groups for reply in group.rows]

    def where(self, reply: Reply) -> tuple[Group, int]:
        return next((group, group.rows.index(reply)) for group in self.groups if reply in group.rows)

    def nbytes(self) -> int:
        return sum(group.cache.nbytes() for group in self.groups)

    def fit(self, width: int, beside: int = 0, arriving: int | None = None, *, only_ask: bool = False) -> bool:
        """Make room for `width` more tokens of every reply, and for one more of `arriving` tokens that then follow.

        Returns whether that and `beside` bytes besides fit the memory; otherwise nothing is done. A little more than
        asked is taken where it fits: twice the rows and some tokens.
        """
        wanted = self._wanted(width, arriving)
        for slack in ((True, slots.GROW), (False, slots.GROW), (False, 8), EXACT):
            sizes = {bound: self._size(bound, *size, *slack) for bound, size in wanted.items()}
            counted = [(rows, self._counted(room, wanted[bound])) for bound, (rows, room) in sizes.items()]
            if (not only_ask and self._is_held(sizes)) or self._budget.fits(counted, beside):
                if not only_ask:
                    self._apply(sizes)
                return True
        return False

    def force(self, width: int, arriving: int | None = None) -> None:
        """`fit` whatever the memory: of a single reply, which was found fit when it was asked for."""
        wanted = self._wanted(width, arriving)
        self._apply({bound: self._size(bound, *size, *EXACT) for bound, size in wanted.items()})

    def add(self, reply: Reply, row: Cache) -> None:
        """Put a reply, whose state is a cache of one row, where `fit(.., arriving=its length)` made room."""
        group = self._groups[self._bound(reply.length)]
        slots.insert(group.cache, row, len(group.rows))
        group.rows.append(reply)

    def adopt(self, reply: Reply, row: Cache, width: int) -> None:
        """The only reply: its cache of one row becomes its group's, with room for `width` more tokens."""
        slots.resize(row, 1, reply.length + width)
        bound = self._bound(reply.length)
        self._groups[bound] = Group(bound, row, [reply])

    def remove(self, reply: Reply) -> None:
        """Its group's last row moves to its place."""
        group, index = self.where(reply)
        slots.move(group.cache, len(group.rows) - 1, index)
        group.rows[index] = group.rows[-1]
        group.rows.pop()
        if not group.rows:
            del self._groups[group.bound]
            return
        have, room = slots.capacity(group.cache)
        least = group.longest + slots.GROW
        if 4 * len(group.rows) <= have or (room < slots.UNLIMITED and 4 * least <= room):
            slots.resize(group.cache, 2 * len(group.rows), min(room, 2 * least))

    def clear(self) -> None:
        self._groups.clear()

    def _bound(self, length: int) -> int:
        """Of the group for a reply of so many tokens that goes on."""
        bound = SHORTEST
        while bound <= length and not self._alike:
            bound *= STEEP
        return bound

    def _target(self, reply: Reply, group: Group) -> int:
        """The group that it belongs to; one does not go back to a shorter one."""
        return max(group.bound, self._bound(reply.length))

    def _wanted(self, width: int, arriving: int | None) -> dict[int, Size]:
        """What each group must hold."""
        wanted: dict[int, Size] = {}
        lengths = [(self._target(reply, group), reply.length) for group in self.groups for reply in group.rows]
        if arriving is not None:
            lengths.append((self._bound(arriving), arriving))
        for bound, length in lengths:
            count, longest = wanted.get(bound, (0, 0))
            wanted[bound] = count + 1, max(longest, length + width)
        return wanted

    def _size(self, bound: int, count: int, tokens: int, double: bool, step: int) -> Size:
        """Rows, perhaps twice as many as there were, of a multiple of `step` tokens; what suffices stays."""
        have, room = slots.capacity(self._groups[bound].cache) if bound in self._groups else (0, 0)
        if count <= have and tokens <= room:
            return have, room
        longer = -(-tokens // step) * step
        if not double:
            return count, longer
        return (have if count <= have else min(self.most, max(count, 2 * have))), max(room, longer)

    @staticmethod
    def _counted(room: int, wanted: Size) -> int:
        """Tokens of a row for the budget; one whose own state does not grow has room without end, a draft's may not."""
        return wanted[1] if room == slots.UNLIMITED else room

    def _is_held(self, sizes: dict[int, Size]) -> bool:
        """Whether nothing new is taken."""
        return sizes == {group.bound: slots.capacity(group.cache) for group in self.groups}

    def _apply(self, sizes: dict[int, Size]) -> None:
        for bound in sorted(sizes, reverse=True):  # so that who leaves a group has left when it is cut to size
            if bound not in self._groups:
                self._groups[bound] = Group(bound, self._create())
            group = self._groups[bound]
            slots.resize(group.cache, *sizes[bound])
            for other in [other for other in self.groups if other.bound < bound]:
                for reply in [r for r in other.rows if self._target(r, other) == bound]:
                    slots.insert(group.cache, slots.take(other.cache, other.rows.index(reply)), len(group.rows))
                    self.remove(reply)
                    group.rows.append(reply)
