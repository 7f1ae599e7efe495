"""Look at the likeliest candidates, rank the best of them as cut, then the best of those after short distillations.

What is measured, and how a candidate is built and trained, is the caller's business: `score` and `refine` are functions
of plans. Distillations come in rounds (successive halving: Jamieson & Talwalkar 2016), of all that are refined, then of
the better half, and so on, each on twice the tokens. The result is written after every score and every round,
so that an interrupted search goes on where it stopped.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from halflap.compress.axes import Sizes
from halflap.compress.plan import PruningPlan
from halflap.compress.space import Candidate, Fitting
from halflap.errors import HalflapError
from halflap.files import write_json
from halflap.progress import Progress

FORMAT = "halflap-search-1"
PATIENCE = 3
"""Up to so many times as many candidates as a shortlist has places are asked whether they hold."""


class Round(NamedTuple):
    """Tokens that a candidate had been distilled on, all rounds together, and its loss then."""

    tokens: int
    loss: float


@dataclass(frozen=True)
class Trial:
    """A candidate with what was measured of it as cut, None where nothing was, and after each round of distillation.

    loss       nats a token of the text
    accuracy   share of its tokens that are the likeliest
    agreement  share of the teacher's likeliest tokens that are
    variants   of method puzzle, what becomes of each of the teacher's blocks
    glance     loss, accuracy and agreement by name, on the few tokens of a first look
    """

    sizes: Sizes
    costs: Mapping[str, float]
    hurt: float
    loss: float | None = None
    accuracy: float | None = None
    agreement: float | None = None
    rounds: tuple[Round, ...] = ()
    variants: tuple[str, ...] = ()
    glance: Mapping[str, float] | None = None

    @property
    def refined_loss(self) -> float | None:
        """After the last round; None before any."""
        return self.rounds[-1].loss if self.rounds else None

    @property
    def last_loss(self) -> float:
        """The last that was measured, infinite before any."""
        found = self.refined_loss if self.rounds else self.loss
        return math.inf if found is None else found


Order = Callable[[Iterable[Trial], float], list[Trial]]
"""Of trials measured as cut, and the difference up to which losses are equal, the best first."""


def lowest_first(trials: Iterable[Trial], loss: Callable[[Trial], float], tolerance: float) -> list[Trial]:
    """By loss; of equal losses by the higher throughput, then the lower latency where these are known, then by what the
    losses are and by parameters.

    Equal are those within `tolerance` of the lowest, then those of the rest within it of the lowest of the rest, and so
    on: measured from neighbour to neighbour a chain of small differences would make all equal.
    """
    left = sorted(trials, key=lambda trial: (loss(trial), trial.costs.get("params", 0.0)))
    found: list[Trial] = []
    while left:
        most = loss(left[0]) + tolerance
        count = next((place for place, trial in enumerate(left) if loss(trial) > most), len(left))
        found += sorted(left[:count], key=_speed)
        left = left[count:]
    return found


def _loss_after(number: int, trial: Trial) -> float:
    return trial.rounds[number].loss


def _speed(trial: Trial) -> tuple[float, float]:
    """Lower is faster; all alike where no times are known."""
    return -trial.costs.get("throughput", 0.0), trial.costs.get("latency", 0.0)


def by_loss(trials: Iterable[Trial], tolerance: float = 0.0) -> list[Trial]:
    return lowest_first(trials, lambda trial: math.inf if trial.loss is None else trial.loss, tolerance)


def by_agreement(trials: Iterable[Trial], tolerance: float = 0.0) -> list[Trial]:
    """The rankings by accuracy and by agreement merged: taken from both in turn, ties by the lower loss.

    So the first n hold the best of either (Nemotron-H, section 5, keeps 130 of 400).
    """
    trials = by_loss(trials, tolerance)
    places = []
    for name in ("accuracy", "agreement"):
        values = sorted((getattr(trial, name) or 0.0 for trial in trials), reverse=True)
        places.append([values.index(getattr(trial, name) or 0.0) for trial in trials])
    ranks = [(min(pair), max(pair)) for pair in zip(*places, strict=True)]
    return [trial for _, trial in sorted(zip(ranks, trials, strict=True), key=lambda pair: pair[0])]


class Stage(NamedTuple):
    """A round to come: how many candidates take part, and the tokens each has been distilled on at its end."""

    candidates: int
    tokens: int


def stages(candidates: int, tokens: int, halving: bool = True) -> tuple[Stage, ...]:
    """Rounds that cost `candidates` times `tokens` in all, or less by their rounding down.

    With halving all get t tokens, the better half go on to 2 t, the better half of these to 4 t, until two are left.
    """
    live, tokens_each = [candidates], [1]
    while halving and live[-1] > 2:
        live.append(math.ceil(live[-1] / 2))
        tokens_each.append(2 * tokens_each[-1])
    steps = [after - before for before, after in zip([0, *tokens_each], tokens_each, strict=False)]
    first = max(1, candidates * tokens // sum(count * step for count, step in zip(live, steps, strict=True)))
    return tuple(Stage(count, first * share) for count, share in zip(live, tokens_each, strict=True))


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
            trials = tuple(map(_trial, data["candidates"]))
            return SearchResult(data["made_from"], data["tried"], trials, data["remark"], data["plan"])
        except FileNotFoundError:
            raise HalflapError(f"search result {str(path)!r} does not exist; make it with `halflap search`") from None
        except (ValueError, KeyError, TypeError) as error:
            if isinstance(error, HalflapError):
                raise
            raise HalflapError(f"{str(path)!r} is not a search result ({error!r}); give a search.json") from error


Score = Callable[[Sequence[PruningPlan]], Iterable[Mapping[str, float]]]
"""Plans -> what is measured of the student of each as cut, by the names of `Trial`, in order."""
Refine = Callable[[Sequence[PruningPlan], int], Sequence[Round]]
"""(plans, tokens) -> each after distillation on so many tokens in all, at the least; what earlier rounds did counts."""


class Look(NamedTuple):
    """A first look: at how many of the likeliest candidates, and what measures them on few tokens."""

    candidates: int
    score: Score


def ranked_search(
    fitting: Fitting,
    plan_for: Callable[[Trial], PruningPlan],
    score: Score,
    *,
    made_from: Mapping[str, Any],
    path: str | Path,
    shortlist: int = 8,
    look: Look | None = None,
    holds: Callable[[PruningPlan], bool] | None = None,
    order: Order = by_loss,
    tolerance: float = 0.0,
    rounds: Sequence[Stage] = (),
    refine: Refine | None = None,
) -> SearchResult:
    """Score a `shortlist` of candidates, refine the best of those in `rounds`, and write `path`.

    The shortlist is the best of a first look, without one the likeliest, of those that `holds` says yes of. Losses that
    differ by no more than `tolerance` are equal (`lowest_first`). What `path` already holds for the same `made_from` is
    taken from there.
    """
    known = _known(path, made_from)
    count = shortlist * (1 if holds is None else PATIENCE) if look is None else max(shortlist, look.candidates)
    trials = [_again(known.get((c.sizes, c.variants)), c) for c in fitting.candidates[:count]]
    beyond = [untried(candidate) for candidate in fitting.candidates[count:]]

    def ordered(trials: Iterable[Trial]) -> list[Trial]:
        return order(trials, tolerance)

    def save(trials: Sequence[Trial], others: Sequence[Trial]) -> None:
        _result(made_from, fitting, _ranked(trials, ordered), others).save(path)

    if look is not None and len(trials) > shortlist:
        trials = _by_glance(_measured(trials, _glanced_at, look.score, plan_for, partial(save, others=beyond)), ordered)
    trials, others = _shortlisted(trials, shortlist, plan_for, holds)
    unseen = [*others, *beyond]
    trials = ordered(_measured(trials, _scored, score, plan_for, partial(save, others=unseen)))
    for number, stage in enumerate(rounds if refine is not None else ()):
        best, rest = trials[: stage.candidates], trials[stage.candidates :]
        if refine is not None and any(len(trial.rounds) <= number for trial in best):
            found = refine([plan_for(trial) for trial in best], stage.tokens)
            best = [
                dataclasses.replace(trial, rounds=(*trial.rounds[:number], done))
                for trial, done in zip(best, found, strict=True)
            ]
        trials = [*lowest_first(best, partial(_loss_after, number), tolerance), *rest]
        _result(made_from, fitting, trials, unseen).save(path)
    result = _result(made_from, fitting, trials, unseen)
    result = dataclasses.replace(result, plan=plan_for(result.chosen).to_json())
    result.save(path)
    return result


def _shortlisted(
    trials: Sequence[Trial],
    count: int,
    plan_for: Callable[[Trial], PruningPlan],
    holds: Callable[[PruningPlan], bool] | None,
) -> tuple[list[Trial], list[Trial]]:
    """The first `count` of those that hold, and the others. Where none that is asked holds, the first all the same."""
    places = [*range(min(count, len(trials)))]
    if holds is not None:
        asked = (place for place in range(min(PATIENCE * count, len(trials))) if holds(plan_for(trials[place])))
        places = [*itertools.islice(asked, count)] or places
    return [trials[place] for place in places], [t for place, t in enumerate(trials) if place not in places]


class _Measurement(NamedTuple):
    """What a trial may have: its name, whether it has it, and the trial with it."""

    name: str
    has: Callable[[Trial], bool]
    put: Callable[[Trial, Mapping[str, float]], Trial]


_glanced_at = _Measurement(
    "first look at candidates",
    lambda trial: trial.glance is not None,
    lambda trial, found: dataclasses.replace(trial, glance=dict(found)),
)
_scored = _Measurement(
    "candidates as cut",
    lambda trial: trial.loss is not None,
    lambda trial, found: dataclasses.replace(trial, **found),
)


def _measured(
    trials: Sequence[Trial],
    measurement: _Measurement,
    score: Score,
    plan_for: Callable[[Trial], PruningPlan],
    save: Callable[[Sequence[Trial]], None],
) -> list[Trial]:
    """The trials with the measurement, saved after every one that lacked it."""
    trials = list(trials)
    todo = [place for place, trial in enumerate(trials) if not measurement.has(trial)]
    with Progress(measurement.name, len(trials), unit="candidates") as progress:
        progress.start_at(len(trials) - len(todo))
        plans = [plan_for(trials[place]) for place in todo]
        for place, found in zip(todo, score(plans) if plans else (), strict=True):
            if broken := [name for name, value in found.items() if not math.isfinite(value)]:
                raise HalflapError(
                    f"{measurement.name}: {broken[0]} of {_said(trials[place])} is {found[broken[0]]}, no number; the "
                    "teacher's weights may not be finite, or its text reaches what no other did: `halflap score` on "
                    "that text names the block"
                )
            trials[place] = measurement.put(trials[place], found)
            save(trials)
            progress.advance()
    return trials


def _said(trial: Trial) -> str:
    sizes = ", ".join(f"{name} {value}" for name, value in trial.sizes.to_json().items())
    return f"the candidate of {sizes or 'variants ' + ' '.join(trial.variants)}"


def _by_glance(trials: Sequence[Trial], order: Callable[[Iterable[Trial]], list[Trial]]) -> list[Trial]:
    """In the order that what was seen at the first look gives."""
    seen = [dataclasses.replace(trial, **dict(trial.glance or {})) for trial in trials]
    places = {id(one): place for place, one in enumerate(seen)}
    return [trials[places[id(one)]] for one in order(seen)]


def _again(known: Trial | None, candidate: Candidate) -> Trial:
    """With what an earlier search measured, and the costs of this one: predicted times may have been corrected."""
    return untried(candidate) if known is None else dataclasses.replace(known, costs=candidate.costs)


def untried(candidate: Candidate) -> Trial:
    """Before anything is measured of it."""
    return Trial(candidate.sizes, candidate.costs, candidate.hurt, variants=candidate.variants)


def _ranked(trials: Iterable[Trial], order: Callable[[Iterable[Trial]], list[Trial]]) -> list[Trial]:
    """Those already measured first."""
    trials = list(trials)
    measured = [trial for trial in trials if trial.loss is not None]
    return [*order(measured), *(trial for trial in trials if trial.loss is None)]


def _result(
    made_from: Mapping[str, Any], fitting: Fitting, trials: Sequence[Trial], unseen: Sequence[Trial]
) -> SearchResult:
    return SearchResult(made_from, fitting.tried, (*trials, *unseen), fitting.remark)


def _known(path: str | Path, made_from: Mapping[str, Any]) -> dict[tuple[Sizes, tuple[str, ...]], Trial]:
    """Trials of an earlier, interrupted search of the very same."""
    if not Path(path).exists():
        return {}
    earlier = SearchResult.load(path)
    if dict(earlier.made_from) != json.loads(json.dumps(dict(made_from))):
        return {}
    return {(trial.sizes, trial.variants): trial for trial in earlier.trials}


def _row(trial: Trial) -> dict[str, Any]:
    rounds = [done._asdict() for done in trial.rounds]
    measured = {"rounds": rounds, "refined_loss": trial.refined_loss}
    kept = {"sizes": trial.sizes.to_json(), "variants": list(trial.variants)}
    return dataclasses.asdict(trial) | kept | measured


def _trial(row: Mapping[str, Any]) -> Trial:
    scores = {name: row.get(name) for name in ("loss", "accuracy", "agreement")}
    rounds = tuple(Round(done["tokens"], done["loss"]) for done in row.get("rounds", ()))
    more = {"glance": row.get("glance"), "variants": tuple(row.get("variants", ()))}
    return Trial(Sizes.from_json(row["sizes"]), row["costs"], row["hurt"], **scores, rounds=rounds, **more)
