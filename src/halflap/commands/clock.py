"""Students held against the clock: what a cost table predicts of them, beside what a pass of them really takes.

A sum over blocks is off by several percent for a whole student, and by much the same for all that are near one budget.
So before anything is cut, the likeliest students take turns with the teacher, predictions are multiplied by what they
were off (the pace), and candidates are found again, until both agree. Before a student is shortlisted it is timed too,
and what is late does not get in.
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
from halflap.commands.sections import Budgets
from halflap.commands.students import Teacher, budget_of
from halflap.commands.tables import joined
from halflap.compress.cost_table import CostTable
from halflap.compress.costs import SPARE, WITHIN, Budget
from halflap.compress.search import PATIENCE
from halflap.compress.space import Candidate, Fitting
from halflap.errors import HalflapError
from halflap.files import write_json
from halflap.models.config import ModelConfig
from halflap.progress import Progress, say

CLOCK = "clock.json"
MOST_CORRECTIONS, ASKED = 4, 3
"""How often the pace is corrected at most, and by how many of the likeliest students each time."""
AGREES = 0.01
"""Share of a prediction by which the clock may differ from it without a correction."""
BUSY = 1.5
"""Times what the table tells of the teacher from which on a timing is suspect."""
Shape = Callable[[Candidate], ModelConfig]


@dataclass(frozen=True)
class Clock:
    """A budget of time, the teacher beside whom students are timed, and the file that keeps all timings.

    relative: the ceiling is a share of the teacher's time.
    """

    budget: Budget
    relative: bool
    teacher: Teacher
    file: Path

    def seconds(self, student: ModelConfig) -> float:
        """A pass of a student, where the teacher's takes what the table says; of a ceiling in seconds and a table of
        another model, which only predicts the teacher's, what the pass took."""
        assert self.budget.table is not None
        table, condition, config = self.budget.table, self.budget.condition, self.teacher.config
        told = table.seconds(config, condition)
        if student == config:
            return told
        times = self._times(student)
        teacher, taken = (statistics.median(times[name]) for name in ("teacher", "student"))
        return taken * told / teacher if self.relative or config == table.model else taken

    def _times(self, student: ModelConfig) -> dict[str, list[float]]:
        """Seconds of the teacher's passes and the student's, taken in turns; once for each student and machine."""
        config, condition, device = self.teacher.config, self.budget.condition, self.teacher.device
        dtype = timing.computed_in(self.teacher)
        known = read_json(self.file) if self.file.exists() else {}
        asked = [timing.machine(device, dtype), str(condition), config.to_json(), student.to_json()]
        key = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()
        if key not in known:
            known[key] = timing.in_turns({"teacher": config, "student": student}, condition, device, dtype)
            write_json(self.file, known)
            self._say_if_busy(statistics.median(known[key]["teacher"]))
        return known[key]

    def _say_if_busy(self, teacher_seconds: float) -> None:
        table, config = self.budget.table, self.teacher.config
        assert table is not None
        slower = teacher_seconds / table.seconds(config, self.budget.condition)
        if config == table.model and slower > BUSY:
            say(
                f"the teacher's pass takes {slower:.1f} times what it took for the cost table: something else keeps "
                "the machine busy, and times that are measured now may mislead"
            )

    def in_time(self, student: ModelConfig) -> bool:
        """With something to spare, as two timings of one shape differ; the teacher itself needs nothing."""
        spare = 0 if student == self.teacher.config else SPARE
        return (1 + spare) * self.seconds(student) <= self.budget.ceilings["latency"]

    def late(self, student: ModelConfig) -> str | None:
        """What is to be said of one that was taken although it is late, as all were that were asked."""
        if self.in_time(student):
            return None
        return (
            f"none of the likeliest students is within the budget by the clock with {SPARE:.0%} to spare; this one has "
            f"{self.budget.say('latency', self.seconds(student))} where "
            f"{self.budget.say('latency', self.budget.ceilings['latency'])} are allowed: allow smaller sizes with "
            f"--space.max-width-cut and --space.max-depth-cut, or {self.budget.flag('latency')}"
        )


def clock_of(budgets: Budgets, table: CostTable | None, teacher: Teacher, file: Path) -> Clock | None:
    """None where no time is limited, and, said, where there is no room for the teacher and a student in turn."""
    budget = budget_of(budgets, teacher.config, table)
    if "latency" not in budget.ceilings:
        return None
    if not timing.has_room(teacher, budget.condition):
        say("there is not memory enough to time students beside their teacher: predictions of the cost table decide")
        return None
    return Clock(budget, timing.is_relative(budgets, budget), teacher, file)


Find = Callable[[float | None], Fitting]
"""Candidates where students take so many times what the table tells; None where that is not known."""


def agreed(clock: Clock | None, find: Find, shape_of: Shape) -> Fitting:
    """The candidates of a pace at which the clock agrees with predictions on the likeliest."""
    pace, found = None, find(None)
    if clock is None:
        return found
    with Progress("students by the clock", unit="timings") as progress:
        for _ in range(MOST_CORRECTIONS):
            off, good = [], []
            for candidate in found.candidates[:ASKED]:
                shape = shape_of(candidate)
                off.append(clock.seconds(shape) / candidate.costs["latency"])
                good.append(clock.in_time(shape) and _uses_budget(clock, candidate, shape))
                progress.advance()
            again = statistics.median(off)
            if all(good) or (pace is not None and abs(again - 1) <= AGREES):
                break
            try:
                found = find((pace or 1) * again)
            except HalflapError:  # nothing is that fast: the clock decides among those that are predicted to be
                break
            pace = (pace or 1) * again
    if pace is None or abs(pace - 1) <= AGREES:
        return found
    remark = (
        f"the likeliest students took {abs(pace - 1):.1%} {'more' if pace > 1 else 'less'} than the cost table tells, "
        "and predicted times were corrected by that"
    )
    return dataclasses.replace(found, remark=joined(found.remark, remark))


def in_time_first(clock: Clock | None, find: Find, shape_of: Shape) -> Fitting:
    """The candidates on which clock and predictions agree, the likeliest that is in time ahead of the others.

    Where none of those that are asked is, the likeliest of all, which is said.
    """
    found = agreed(clock, find, shape_of)
    if clock is None:
        return found
    asked = found.candidates[: PATIENCE * ASKED]
    best = next((one for one in asked if clock.in_time(shape_of(one))), found.candidates[0])
    remark = joined(found.remark, clock.late(shape_of(best)))
    others = (one for one in found.candidates if one is not best)
    return dataclasses.replace(found, candidates=(best, *others), remark=remark)


def _uses_budget(clock: Clock, candidate: Candidate, shape: ModelConfig) -> bool:
    """Whether a student comes near a ceiling, that of time by the clock."""
    spent = {**candidate.costs, "latency": clock.seconds(shape)}
    return any(spent[name] >= WITHIN * limit for name, limit in clock.budget.ceilings.items())
