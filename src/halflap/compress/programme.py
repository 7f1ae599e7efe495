"""The best choices under all budgets at once, as a mixed-integer programme (Bercovich et al. 2024, section 3.4).

    minimise    sum_c score_c x_c                          x_c in {0, 1}: option c is chosen
    subject to  sum_c covers_ic x_c = 1                    of each block i
                sum_c cost_kc x_c + rest_k <= limit_k      of each budget k
                the library's rules (what goes together, a block of each kind, depth)
                sum_c blocks_c x_c y_c <= alpha L          of each earlier choice y: diversity

Solved by HiGHS in scipy. What comes back is counted again from the student's own config; no torch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from scipy import sparse
from scipy.optimize import Bounds, LinearConstraint, milp

from halflap.compress.costs import Budget, costs
from halflap.compress.library import Library, Variant
from halflap.errors import HalflapError
from halflap.models.config import ModelConfig
from halflap.models.sharing import keep_blocks
from halflap.processes import silenced

GAP, NODES = 1e-3, 20_000
"""A choice is the best, or where that is not proven after so many nodes of the search, misses the best sum of scores by
such a share at most. Nodes, not seconds: the choice is the same on every machine."""
SOLVED, INFEASIBLE = 0, 2  # scipy's status
ATTEMPTS = 10  # a solver keeps a limit to 1e-7 of it, where a count may be over by single parameters


@dataclass(frozen=True)
class Choice:
    """Chosen options by index, the sum of their scores, every cost of the student, and the share of the sum by which
    the best is proven to be no lower."""

    options: tuple[int, ...]
    score: float
    costs: Mapping[str, float]
    gap: float


class Solved(NamedTuple):
    options: tuple[int, ...]
    gap: float


class Programme:
    """The constraints of one library under one budget, made once for many choices.

    Raises HalflapError on a budget that nothing meets, with the smallest that can be, and on budgets that nothing meets
    together.
    """

    def __init__(self, library: Library, budget: Budget) -> None:
        self.library, self.budget, self.limits = library, budget, budget.ceilings
        if not self.limits:
            raise HalflapError(
                "no budget was given; set at least one of --params, --non-embedding-params, --memory, --flops, "
                "--latency, --throughput"
            )
        counted = {name: library.costs(name, budget) for name in self.limits}
        self.added = {name: added for name, (added, _) in counted.items()}
        self.rest = {name: rest for name, (_, rest) in counted.items()}
        self.covers = library.covers
        blocks = LinearConstraint(sparse.csr_array(self.covers), 1, 1)
        self._always: list[LinearConstraint] = [
            blocks,
            *(LinearConstraint(rule.weights[None], -np.inf, rule.at_most) for rule in library.rules()),
        ]
        self._check_reachable()

    def choices(self, scores: np.ndarray, count: int = 1, overlap: float = 0.8, gap: float = GAP) -> list[Choice]:
        """Up to `count` choices, the best first, no two alike in more than a share `overlap` of the blocks nor in all.

        scores (C,): what each option does to the model, lower is better.
        """
        found: list[Choice] = []
        cuts: list[LinearConstraint] = []
        blocks = len(self.covers)
        most_alike = min(np.floor(overlap * blocks + 1e-9), blocks - 1)
        while len(found) < count and (choice := self._best(scores, cuts, gap)) is not None:
            found.append(choice)
            alike = np.zeros(len(scores))
            alike[list(choice.options)] = self.covers.sum(0)[list(choice.options)]
            cuts.append(LinearConstraint(alike[None], -np.inf, most_alike))
        if not found:
            raise HalflapError(self._together())
        return found

    def _best(self, scores: np.ndarray, cuts: Sequence[LinearConstraint], gap: float) -> Choice | None:
        """None when nothing is left. A limit that the count finds broken is lowered by what it was broken by."""
        limits = dict(self.limits)
        for _ in range(ATTEMPTS):
            solved = self._solve(scores, [*self._always, *self._budgets(limits), *cuts], gap)
            if solved is None:
                return None
            options = solved.options
            counted = costs(student_of(self.library.teacher, self.library.variants(options)), self.budget)
            over = {name: counted[name] - limit for name, limit in self.limits.items() if counted[name] > limit}
            if not over:
                return Choice(options, float(scores[list(options)].sum()), counted, solved.gap)
            limits |= {name: limits[name] - excess for name, excess in over.items()}
        name = next(iter(over))
        raise HalflapError(
            f"the solver's choice has {self.budget.say(name, counted[name])}, more than the budget of "
            f"{self.budget.say(name, self.limits[name])}, even after {ATTEMPTS} attempts; {self.budget.flag(name)} a "
            "little"
        )

    def _budgets(self, limits: Mapping[str, float]) -> list[LinearConstraint]:
        """In shares of what is left for the blocks, so that the solver's tolerance means the same for all."""
        rows = []
        for name, limit in limits.items():
            scale = max(abs(limit - self.rest[name]), 1.0 if limit >= 1 else abs(limit))
            rows.append(LinearConstraint(self.added[name][None] / scale, -np.inf, (limit - self.rest[name]) / scale))
        return rows

    def _solve(self, objective: np.ndarray, rows: Sequence[LinearConstraint], gap: float) -> Solved | None:
        scale = float(np.abs(objective).max()) or 1.0  # HiGHS stops at an absolute gap of 1e-6 too
        given: dict[str, Any] = {
            "integrality": np.ones(len(objective)),
            "bounds": Bounds(0, 1),
            "constraints": list(rows),
        }
        with silenced():
            result = milp(1000 * objective / scale, **given, options={"mip_rel_gap": 0.0, "node_limit": NODES})
            unfinished = result.status not in (SOLVED, INFEASIBLE)
            if unfinished and (result.x is None or result.mip_gap > gap):
                result = milp(1000 * objective / scale, **given, options={"mip_rel_gap": gap})
        if result.x is None:
            return None
        return Solved(tuple(np.flatnonzero(result.x > 0.5).tolist()), float(result.mip_gap) if result.fun else 0.0)

    def _smallest(self, name: str, rows: Sequence[LinearConstraint] = ()) -> float | None:
        solved = self._solve(self.added[name], [*self._always, *rows], 0.0)
        if solved is None:
            return None
        return costs(student_of(self.library.teacher, self.library.variants(solved.options)), self.budget)[name]

    def _check_reachable(self) -> None:
        for name, limit in self.limits.items():
            smallest = self._smallest(name)
            if smallest is None or smallest > limit:
                raise HalflapError(
                    f"a budget of {self.budget.say(name, limit)} cannot be met: the smallest student of this library "
                    f"has {'none at all' if smallest is None else self.budget.say(name, smallest)} (its hidden size "
                    f"stays {self.library.teacher.hidden_size}, and at most {self.library.max_dropped} of "
                    f"{len(self.covers)} blocks are dropped); {self.budget.flag(name)}, or allow smaller blocks with "
                    "--space.max-width-cut, --space.max-depth-cut or lists such as --space.intermediate-size"
                )
        if self._solve(np.zeros(len(self.library.options)), [*self._always, *self._budgets(self.limits)], GAP) is None:
            raise HalflapError(self._together())

    def _together(self) -> str:
        smallest = {}
        for name in self.limits:
            others = self._budgets({other: limit for other, limit in self.limits.items() if other != name})
            smallest[name] = self._smallest(name, others)
        return self.budget.unmet_together(self.limits, smallest, "blocks")


def student_of(teacher: ModelConfig, variants: Sequence[Variant]) -> ModelConfig:
    """The shape that these variants leave of a teacher; norms' eps still the teacher's."""
    kept = [index for index, variant in enumerate(variants) if not variant.dropped]
    whole = keep_blocks(teacher.blocks, kept)
    blocks = tuple(variants[index].of(block) for index, block in zip(kept, whole, strict=True))
    return dataclasses.replace(teacher, blocks=blocks)
