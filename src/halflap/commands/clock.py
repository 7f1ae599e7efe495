"""Students held against the clock: what a cost table predicts of them, beside what a pass of them really takes.

A sum over blocks is off by several percent for a whole student, and by much the same for all that are near one budget.
So before anything is cut, the likeliest students take turns with the teacher, predictions are corrected by what they
were off, and candidates are found again, until both agree. Of a search's shortlist each is then timed too, and what is
late does not get in.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from halflap.checkpoints.config import read_json
from halflap.commands import timing
from halflap.commands.students import Teacher
from halflap.compress.costs import Budget
from halflap.compress.space import Candidate, Fitting
from halflap.files import write_json
from halflap.models.config import ModelConfig
from halflap.progress import Progress

CLOCK = "clock.json"
CORRECTIONS, LIKELIEST = 4, 3
"""How often predictions are corrected at most, and by how many of the likeliest students."""
SPARE = 0.02
"""Share of its ceiling that a corrected prediction leaves free: two timings of one shape differ by about that."""


@dataclass(frozen=True)
class Clock:
    """A budget of time, the teacher whose passes its table tells, and the file that keeps what was timed."""

    budget: Budget
    teacher: Teacher
    file: Path

    def seconds(self, student: ModelConfig) -> float:
        """A pass of a student, when the teacher's takes what the table says of it."""
        assert self.budget.table is not None
        condition, config = self.budget.condition, self.teacher.config
        whole = self.budget.table.seconds(config, condition)
        if student == config:
            return whole
        known = read_json(self.file) if self.file.exists() else {}
        key = f"{condition}: {_digest(student)} beside {_digest(config)}"
        if key not in known:
            shapes, dtype = {"teacher": config, "student": student}, timing.computed_in(self.teacher)
            known[key] = timing.in_turns(shapes, condition, self.teacher.device, dtype)
            write_json(self.file, known)
        times = known[key]
        return whole * statistics.median(times["student"]) / statistics.median(times["teacher"])

    def holds(self, student: ModelConfig) -> bool:
        return self.seconds(student) <= self.budget.ceilings["latency"]


def clock_of(budget: Budget, teacher: Teacher, file: Path) -> Clock | None:
    """None where no time is limited."""
    return Clock(budget, teacher, file) if "latency" in budget.ceilings else None


def agreed(
    clock: Clock | None, find: Callable[[float], Fitting], shape_of: Callable[[Candidate], ModelConfig]
) -> Fitting:
    """The candidates found with predictions times a factor at which the clock agrees with them on the likeliest."""
    factor, found = 1.0, find(1.0)
    if clock is None:
        return found
    with Progress("candidates by the clock", unit="timings") as progress:
        for _ in range(CORRECTIONS):
            off = []
            for candidate in found.candidates[:LIKELIEST]:
                off.append(clock.seconds(shape_of(candidate)) / candidate.costs["latency"])
                progress.advance()
            again = (1 + SPARE) * statistics.median(off)
            if abs(again - 1) <= SPARE:
                break
            factor *= again
            found = find(factor)
    if factor == 1:
        return found
    off = factor / (1 + SPARE) - 1
    remark = (
        f"the likeliest students took {abs(off):.1%} {'more' if off > 0 else 'less'} than the cost table tells, so "
        f"predicted times were corrected by that, and by {SPARE:.0%} to spare"
    )
    return dataclasses.replace(found, remark="; ".join(filter(None, (found.remark, remark))))


def likeliest(
    clock: Clock | None, find: Callable[[float], Fitting], shape_of: Callable[[Candidate], ModelConfig]
) -> tuple[Candidate, str | None]:
    """Of the candidates on which the clock agrees the first that holds, and what is to be known of them.

    Where none of the first holds, the first of all.
    """
    found = agreed(clock, find, shape_of)
    held = (one for one in found.candidates[: 3 * LIKELIEST] if clock is None or clock.holds(shape_of(one)))
    return next(held, found.candidates[0]), found.remark


def _digest(config: ModelConfig) -> str:
    return hashlib.sha256(json.dumps(config.to_json(), sort_keys=True).encode()).hexdigest()[:16]
