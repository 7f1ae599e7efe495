"""The scores of `replace.py` for a model of which one block is in memory at a time, equal bit for bit.

Every variant is a branch that leaves the teacher's stream at its block (`branches.py`). A reading of the weights serves
as many of them as STREAMS_AT_ONCE bytes hold; the next one begins at the first block that has variants left, with the
teacher's stream as it was there. So J options a block cost J L / 2 passes as in memory, and readings that grow shorter.
On the disk (`checkpoints/shelf.py`) are the branches of a reading and the teacher's stream beside them, of 4 D bytes a
token each and twice while a block is worked on, and two more of the teacher's, which wait.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from halflap.checkpoints.passes import copies_at_once
from halflap.checkpoints.shelf import STREAMS, Shelf
from halflap.checkpoints.streamed import ENTRY, EXIT, StreamedModel
from halflap.compress.branches import TRUNK, Branch, Sweep
from halflap.compress.library import WHOLE, Library, Option
from halflap.compress.partial import Scratch
from halflap.compress.replace import Replacement, Scores, count_targets, divergence
from halflap.data.batch import Batch
from halflap.progress import Progress

FULL, NEXT = "full", "next"
"""Folders of the teacher's streams behind the last block, and at the block where the next reading begins."""

Make = Callable[[Option], Replacement]


def replacement_scores_streamed(
    model: StreamedModel,
    batches: Sequence[Batch],
    library: Library,
    make: Make,
    scratch: Scratch,
    known: Scores | None = None,
    save: Callable[[Scores], None] = lambda scores: None,
) -> Scores:
    """`replace.replacement_scores`; streams lie in the scratch directory, and none stay.

    make: is called while the option's block is in memory. `save` is called with all so far after each score; a killed
    call, given those as `known`, goes on after the last block that was done.
    """
    count, scores = count_targets(batches), dict(known or {})
    todo = [option for option in library.options if option.variant != WHOLE]
    if all(option.name in scores for option in todo):
        return scores
    assert scratch.directory is not None
    sweep, full, ahead = (
        Sweep(model, batches, Shelf(scratch.directory / folder, scratch.made_from), len(batches))
        for folder in (STREAMS, FULL, NEXT)
    )
    readings = _readings(sweep, sorted(todo, key=lambda option: option.blocks[0]), scores)
    passes = sum(reading.passes(sweep) for reading in readings)
    with torch.inference_mode(), Progress("replace blocks", passes, unit="passes") as bar:
        sweep.passed = bar.advance
        if sweep.shelf.done is None:
            with model.resident(ENTRY):
                sweep.enter()
            _commit(sweep, readings[0], 0)
        bar.start_at(readings[0].passes(sweep, sweep.shelf.notes["passed"]))
        for number, reading in enumerate(readings):
            bar.note(reading=f"{number + 1}/{len(readings)}")
            _carry(sweep, ahead, reading, make, bar)
            if reading.first:
                _copy(sweep, full)
                full.shelf.commit()
            for name, total in _totals(sweep, full, [o for o in reading.options if o.name not in scores]):
                scores[name] = total / count
                save({o.name: scores[o.name] for o in todo if o.name in scores})  # in the order of `replace.py`
            if number + 1 < len(readings):
                _copy(ahead, sweep)
                _commit(sweep, readings[number + 1], readings[number + 1].start)
    for one in (sweep, full, ahead):
        one.shelf.remove()
    return {option.name: scores[option.name] for option in todo}


@dataclass(frozen=True)
class Reading:
    """What one reading of the weights serves.

    start: the block before which the trunk begins. until: how many blocks the trunk has passed when no option needs it
    any more; of the first reading all, for the teacher's final streams. following: where the next reading begins.
    """

    options: tuple[Option, ...]
    start: int
    until: int
    following: int | None
    first: bool

    def branches(self, make: Make) -> list[Branch]:
        return [Branch(o.name, o.blocks, None if o.variant.dropped else partial(make, o)) for o in self.options]

    def passes(self, sweep: Sweep, stop: int | None = None) -> int:
        """Passes through blocks, up to block `stop`; or through all and what the branches' ends are compared by."""
        end = len(sweep.model.config.blocks) + 1 if stop is None else stop
        trunk = max(0, min(self.until, end) - self.start)
        first = (o.blocks[-1] + o.variant.dropped for o in self.options)  # that a branch goes through
        return len(sweep.batches) * (trunk + sum(max(0, end - index) for index in first))


def _readings(sweep: Sweep, todo: Sequence[Option], scores: Scores) -> list[Reading]:
    """What is left to read: first of all what is under way, if all others begin behind where that has set out from."""
    inputs = [(batch.tokens, batch.segments) for batch in sweep.batches]
    room = max(1, copies_at_once(sweep.model, inputs) - 1)  # beside the trunk
    missing = [option for option in todo if option.name not in scores]
    if sweep.shelf.done is not None:
        notes = dict(sweep.shelf.notes["reading"])
        names = notes.pop("options")
        first = Reading(tuple(option for option in todo if option.name in names), **notes)
        others = [option for option in missing if option not in first.options]
        if all(first.following is not None and first.following <= option.blocks[0] for option in others):
            return [first, *_groups(sweep, others, room, first.following, False)]
        sweep.shelf.remove()
        sweep.shelf = Shelf(sweep.shelf.directory, sweep.shelf.made_from)
    return _groups(sweep, missing, room, 0, True)


def _groups(sweep: Sweep, options: Sequence[Option], room: int, start: int | None, first: bool) -> list[Reading]:
    found: list[Reading] = []
    for place in range(0, len(options), room):
        own, rest = options[place : place + room], options[place + room :]
        following = rest[0].blocks[0] if rest else None
        until = len(sweep.model.config.blocks) if first else max(option.blocks[-1] + 1 for option in own)
        assert start is not None
        found.append(Reading(tuple(own), start, max(until, following or 0), following, first))
        start, first = following, False
    return found


def _carry(sweep: Sweep, ahead: Sweep, reading: Reading, make: Make, progress: Progress) -> None:
    """All streams of a reading through every block that is left; ahead: gets what the next one begins with."""
    branches, blocks = reading.branches(make), len(sweep.model.config.blocks)
    for index, block in sweep.model.blocks(sweep.shelf.notes["passed"]):
        progress.note(block=f"{index + 1}/{blocks}")
        if index == reading.following:
            _copy(sweep, ahead)
            ahead.shelf.commit()
        if index < reading.until:
            sweep.replace(index, branches)
            sweep.advance(index, block, branches)
        sweep.follow(index, block, branches)
        _commit(sweep, reading, index + 1)


def _totals(sweep: Sweep, full: Sweep, options: Sequence[Option]) -> Iterator[tuple[str, float]]:
    """Of each option the sum over tokens of the divergence."""
    with sweep.model.resident(EXIT) as whole:
        for option in options:
            total = 0.0
            for number, batch in enumerate(sweep.batches):
                teacher, replaced = full.final(whole, TRUNK, number), sweep.final(whole, option.name, number)
                total += divergence(whole.head_weight, teacher, replaced, batch)
                sweep.passed()
            yield option.name, total


def _copy(source: Sweep, to: Sweep) -> None:
    """The trunk as it is, to another shelf."""
    for number in range(len(source.batches)):
        to.write(TRUNK, number, source.read(TRUNK, number))


def _commit(sweep: Sweep, reading: Reading, passed: int) -> None:
    """passed: blocks that the streams of the reading have passed."""
    notes = {**vars(reading), "options": [option.name for option in reading.options]}
    sweep.shelf.commit({"passed": passed, "reading": notes})
