"""Passes that leave a model which is read a block at a time, each going on without blocks or with another in place.

With one block in memory there is no coming back to an earlier one. So what a change of one block does to all that
follows is a stream of its own, which leaves the intact one there (`models/streams.py`): all streams, the trunk and its
branches, are carried through a block before the next one is read. The operations are those of the model in memory, in
the same order, so what comes out at the end is equal bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from halflap.checkpoints.shelf import Shelf
from halflap.checkpoints.streamed import StreamedModel
from halflap.compress.plan import Row
from halflap.data.batch import Batch
from halflap.models.model import Block, HybridModel
from halflap.models.streams import BlockFunction, Stream

TRUNK = ""


class Branch(NamedTuple):
    """A pass that does not go through some consecutive blocks of the model.

    make: gives what stands in place of the one block, while that is in memory; None: nothing does. The keys and values
    of a block in whose place is nothing are still read by others, as the trunk has them.
    """

    name: str
    blocks: Row
    make: Callable[[], BlockFunction] | None = None

    def runs_at(self, index: int) -> bool:
        """Whether it goes through block `index`, or through what stands there for it."""
        return index > self.blocks[-1] or (self.make is not None and index in self.blocks)


@dataclass
class Sweep:
    """Batches on their way through a model, on a shelf between two blocks.

    branched: how many of the first batches have branches. passed: called after each pass through a block.
    """

    model: StreamedModel
    batches: Sequence[Batch]
    shelf: Shelf
    branched: int
    passed: Callable[[], object] = lambda: None

    def enter(self, name: str = TRUNK) -> None:
        """What the first block is given, of every batch; the embedding must be in memory."""
        for number, batch in enumerate(self.batches):
            self.write(name, number, Stream(*self.model.shell.enter(batch.tokens, batch.segments)))

    def replace(self, index: int, branches: Sequence[Branch]) -> None:
        """Begin the branches that have another block in place of block `index`, before the trunk goes through it."""
        for branch in branches:
            if branch.make is not None and branch.blocks == (index,):
                self._leave(index, branch.name, branch.make())

    def _leave(self, index: int, name: str, instead: BlockFunction) -> None:
        for number in range(self.branched):
            before = self.read(TRUNK, number)
            self.write(name, number, before.beside(before.hidden).through(index, instead))
            self.passed()

    def advance(
        self,
        index: int,
        block: Block,
        branches: Sequence[Branch] = (),
        begin: Callable[[Batch], None] = lambda batch: None,
        trunk: str = TRUNK,
    ) -> None:
        """The trunk through a block, and the beginning of branches without it; `begin` is told of each batch."""
        without = [branch for branch in branches if branch.make is None and index in branch.blocks]
        for number, batch in enumerate(self.batches):
            begin(batch)
            before = self.read(trunk, number)
            after = before.through(index, block)
            self.write(trunk, number, after)
            self.passed()
            for branch in without if number < self.branched else ():
                started = index > branch.blocks[0]
                stays = self.read(branch.name, number).hidden if started else before.hidden
                self.write(branch.name, number, after.beside(stays))

    def follow(self, index: int, block: Block, branches: Sequence[Branch]) -> None:
        """The branches that have left before a block, through it."""
        for number in range(self.branched):
            for branch in branches:
                if branch.blocks[-1] < index:
                    self.write(branch.name, number, self.read(branch.name, number).through(index, block))
                    self.passed()

    def final(self, whole: HybridModel, name: str, number: int) -> Tensor:
        """The normalised final hidden states (B, T, D) of a stream that is through; the last part is in memory."""
        last = self.read(name, number)
        return whole.leave(last.hidden, last.context)

    def read(self, name: str, number: int) -> Stream:
        batch = self.batches[number]
        return self.shelf.read(_key(name, number), self.model.context_of(batch.tokens, batch.segments))

    def write(self, name: str, number: int, stream: Stream) -> None:
        self.shelf.write(_key(name, number), stream)

    def keep(self, name: str) -> None:
        """Have the streams of every batch stay as they are."""
        for number in range(len(self.batches)):
            self.shelf.keep(_key(name, number))


def _key(name: str, number: int) -> str:
    return f"{number}-{name}" if name else f"{number}"
