"""Rank the likeliest candidates by loss as cut, then the best of them after a short distillation; keep everything.

What a loss is, and how a candidate is built and trained, is the caller's business: `score` and `refine` are functions
of a plan. The result is written after every loss, so that an interrupted search goes on where it stopped.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from halflap.compress.axes import Sizes
from halflap.compress.plan import PruningPlan
from halflap.compress.space import Fitting
from halflap.errors import HalflapError
from halflap.files import write_json
from halflap.progress import Progress

FORMAT = "halflap-search-1"


@dataclass(frozen=True)
class Trial:
    """A candidate with its loss as cut and after a short distillation, None where not measured."""

    sizes: Sizes
    costs: Mapping[str, float]
    hurt: float
    loss: float | None = None
    refined_loss: float | None = None
    variants: tuple[str, ...] = ()

    @property
    def rank(self) -> tuple[bool, float]:
        """Sorts the measured first, by the loss nearest to the student's fate."""
        loss = self.loss if self.refined_loss is None else self.refined_loss
        return self.refined_loss is None, float("inf") if loss is None else loss


@dataclass(frozen=True)
class SearchResult:
    """All candidates, the best first; `made_from` says of what (teacher, importance, budget) by name and digest.

    `plan` is the pruning plan of the best as JSON, None while the search goes on.
    """

    made_from: Mapping[str, Any]
    tried: int
    trials: tuple[Trial, ...]
    remark: str | None = None
    plan: Mapping[str, Any] | None = None

    @property
    def chosen(self) -> Trial:
        return self.trials[0]

    @property
    def best_plan(self) -> PruningPlan:
        """That of the chosen, once the search is over."""
        assert self.plan is not None
        return PruningPlan.from_json(self.plan)

    def to_json(self) -> dict[str, Any]:
        rows = [_row(trial) for trial in self.trials]
        return {
            "format": FORMAT,
            "made_from": dict(self.made_from),
            "tried": self.tried,
            "remark": self.remark,
            "candidates": [row | {"chosen": place == 0} for place, row in enumerate(rows)],
            "plan": self.plan,
        }

    def save(self, path: str | Path) -> None:
        write_json(path, self.to_json())

    @staticmethod
    def load(path: str | Path) -> SearchResult:
        try:
            data = json.loads(Path(path).read_text("utf-8"))
            if data["format"] != FORMAT:
                raise HalflapError(
                    f"{str(path)!r} is of format {data['format']!r}, and {FORMAT!r} is read here; search again"
                )
            trials = tuple(
                Trial(
                    *(_sizes(row["sizes"]), row["costs"], row["hurt"], row["loss"], row["refined_loss"]),
                    variants=tuple(row.get("variants", ())),
                )
                for row in data["candidates"]
            )
            return SearchResult(data["made_from"], data["tried"], trials, data["remark"], data["plan"])
        except FileNotFoundError:
            raise HalflapError(f"search result {str(path)!r} does not exist; make it with `halflap search`") from None
        except (ValueError, KeyError, TypeError) as error:
            if isinstance(error, HalflapError):
                raise
            raise HalflapError(f"{str(path)!r} is not a search result ({error!r}); give a search.json") from error


def search(
    fitting: Fitting,
    plan_for: Callable[[Trial], PruningPlan],
    score: Callable[[PruningPlan], float],
    *,
    made_from: Mapping[str, Any],
    path: str | Path,
    shortlist: int = 8,
    refine: Callable[[PruningPlan], float] | None = None,
    refined: int = 3,
) -> SearchResult:
    """Score the `shortlist` likeliest candidates, refine the `refined` best of those, and write `path`.

    Losses that `path` already holds for the same `made_from` are taken from there.
    """
    known = _known(path, made_from)
    trials = [
        Trial(c.sizes, c.costs, c.hurt, *known.get((c.sizes, c.variants), (None, None)), variants=c.variants)
        for c in fitting.candidates
    ]

    def measure(what: str, field: str, places: list[int], loss_of: Callable[[PruningPlan], float]) -> None:
        with Progress(what, len(places), unit="candidates") as progress:
            for place in places:
                if getattr(trials[place], field) is None:
                    loss = loss_of(plan_for(trials[place]))
                    trials[place] = dataclasses.replace(trials[place], **{field: loss})
                    _result(made_from, fitting, trials).save(path)
                progress.advance()

    measure("candidates as cut", "loss", list(range(min(shortlist, len(trials)))), score)
    if refine is not None:
        best = sorted(range(min(shortlist, len(trials))), key=lambda place: trials[place].loss or 0.0)
        measure("candidates after a short distillation", "refined_loss", best[:refined], refine)
    found = _result(made_from, fitting, trials)
    result = dataclasses.replace(found, plan=plan_for(found.chosen).to_json())
    result.save(path)
    return result


def _result(made_from: Mapping[str, Any], fitting: Fitting, trials: list[Trial]) -> SearchResult:
    return SearchResult(made_from, fitting.tried, tuple(sorted(trials, key=lambda trial: trial.rank)), fitting.remark)


def _known(path: str | Path, made_from: Mapping[str, Any]) -> dict[Any, tuple[float | None, float | None]]:
    """Losses of an earlier, interrupted search of the very same."""
    if not Path(path).exists():
        return {}
    earlier = SearchResult.load(path)
    if dict(earlier.made_from) != json.loads(json.dumps(dict(made_from))):
        return {}
    return {(trial.sizes, trial.variants): (trial.loss, trial.refined_loss) for trial in earlier.trials}


def _row(trial: Trial) -> dict[str, Any]:
    row = dataclasses.asdict(trial) | {"sizes": _given(trial.sizes), "variants": list(trial.variants)}
    if not trial.variants:
        del row["variants"]
    return row


def _given(sizes: Sizes) -> dict[str, Any]:
    return {name: value for name, value in dataclasses.asdict(sizes).items() if value not in (None, (), [])}


def _sizes(data: Mapping[str, Any]) -> Sizes:
    values: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in data.items()}
    return Sizes(**values)
