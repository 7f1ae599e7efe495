"""What is read off a study's table beside its rows: claims that hold or do not, and numbers that need several arms.

    claims:
      - {says: Whole groups beat blind cuts, lower: group-aware, higher: group-blind, measure: loss}
    readings:
      tokens_to_reach: {arm: distilled, by: [scratch-4x, scratch-16x]}
      rank_correlation: {cheap: loss_as_cut, dear: loss}

A claim is that one arm has less of a measure than another; pairs of equal seed are tested (evaluate/paired.py), and it
holds, or is reversed, when the whole 95 % interval is on one side of zero. Rows are those of study_table.py, by name; a
measure has a value a seed under `MEASURE_by_seed`. A reading is a function in `READINGS`.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
import statistics
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from scipy import stats

from halflap.commands.study_file import Claim, Study
from halflap.errors import HalflapError
from halflap.evaluate.paired import paired
from halflap.recipe import unknown_name

MEASURES = ("loss", "loss_as_cut", "bits_per_byte", "perplexity", "recall", "latency_seconds")
"""What a row has a value a seed of, where it was measured."""
OF_ALL = ("loss", "bits_per_byte", "perplexity")

Rows = Mapping[str, Mapping[str, Any]]


def check(plan: Study) -> None:
    """Raise HalflapError for a claim or reading that the results will not hold: before hours of work."""
    try:
        for claim in plan.claims:
            _require(plan, claim.measure, (claim.lower, claim.higher))
        for name, fields in plan.readings.items():
            _check_reading(plan, name, fields)
    except HalflapError as error:
        raise HalflapError(f"study {plan.name}: {error}") from None


def _check_reading(plan: Study, name: str, fields: Mapping[str, Any]) -> None:
    if name not in READINGS:
        raise HalflapError(unknown_name(name, list(READINGS), "reading"))
    parameters = dict([*inspect.signature(READINGS[name]).parameters.items()][1:])
    if unknown := [field for field in fields if field not in parameters]:
        raise HalflapError(unknown_name(unknown[0], list(parameters), f"field of the reading {name}"))
    needed = [field for field, parameter in parameters.items() if parameter.default is parameter.empty]
    if missing := [field for field in needed if not fields.get(field)]:
        raise HalflapError(f"the reading {name} has no {missing[0]}; it needs {', '.join(needed)}: add it")
    if not isinstance(fields.get("arm", ""), str):
        raise HalflapError(f"the reading {name} has arm {fields['arm']!r}; it must be the name of one arm")
    measures = [str(fields.get(f, parameters[f].default)) for f in ("cheap", "dear") if f in parameters] or ["loss"]
    arms = [arm for field in ("arm", "by", "arms") for arm in _listed(fields.get(field))]
    for measure in measures:
        _require(plan, measure, arms)
    ranked = {*arms} or [arm for arm in plan.arms if {*measures} <= {*measures_of(plan, arm)}]
    if name == "rank_correlation" and len(ranked) < 2:
        raise HalflapError(
            f"the reading {name} finds {len(ranked)} of the arms that it may rank with {' and '.join(measures)}; it "
            "needs at least two"
        )


def _require(plan: Study, measure: str, arms: Sequence[str]) -> None:
    if measure not in MEASURES:
        raise HalflapError(unknown_name(measure, list(MEASURES), "measure"))
    for arm in arms:
        if arm not in plan.arms:
            raise HalflapError(unknown_name(str(arm), list(plan.arms), "arm to read from"))
        if measure not in (known := measures_of(plan, arm)):
            raise HalflapError(
                f"arm {arm!r} will have no {measure}, only {', '.join(known)}; read one of these, or leave the arm out"
            )


def measures_of(plan: Study, arm: str) -> tuple[str, ...]:
    """What a row of that arm will have a value a seed of."""
    if plan.teacher is None:
        return (*OF_ALL, *(["recall"] if plan.recall else []))
    as_cut = [] if plan.compressions[arm].control == "scratch" else ["loss_as_cut"]
    timed = ["latency_seconds"] if any(one.needs_times for one in plan.compressions.values()) else []
    return (*OF_ALL, *as_cut, *timed)


def read(plan: Study, table: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Claims with their verdicts, and readings, each with a sentence under `says`."""
    rows = {row["name"]: row for row in table}
    lists = ("by", "arms")
    readings = [
        {"name": name} | READINGS[name](rows, **{f: _listed(v) if f in lists else v for f, v in fields.items()})
        for name, fields in plan.readings.items()
    ]
    matched = {name: arm.match for name, arm in plan.compressions.items() if arm.match}
    return {
        "claims": [judge(claim, rows) for claim in plan.claims],
        "readings": [*readings, *({"name": "matched"} | one for one in at_equal(rows, matched))],
    }


def judge(claim: Claim, rows: Rows) -> dict[str, Any]:
    """Verdict `holds`, `reversed` or `open` (not told from chance), with the difference of `lower` to `higher`."""
    values = [_by_seed(rows, name, claim.measure) for name in (claim.lower, claim.higher)]
    found = paired(*values)
    verdict = "open"
    if found.interval is not None and found.interval[1] < 0:
        verdict = "holds"
    elif found.interval is not None and found.interval[0] > 0:
        verdict = "reversed"
    return dataclasses.asdict(claim) | dataclasses.asdict(found) | {"verdict": verdict}


def at_equal(rows: Rows, matched: Mapping[str, Mapping[str, str]]) -> list[dict[str, Any]]:
    """How near the arms came to what another arm's student has."""
    measures = {"params": ("parameters", "parameters"), "latency": ("latency_seconds", "predicted latency")}
    found = []
    for name, match in matched.items():
        for budget, other in match.items():
            measure, words = measures[budget]
            share = rows[name][measure] / rows[other][measure]
            says = f"{name} was to have the {words} of {other}, and has {100 * share:.1f} % of it"
            found.append({"arm": name, "of": other, "measure": measure, "share": share, "says": says})
    return found


def tokens_to_reach(rows: Rows, arm: str, by: Sequence[str]) -> dict[str, Any]:
    """Tokens that arms `by` need to reach the loss of `arm`, divided by the tokens that it was trained on.

    Each of `by` is trained to the end of its own schedule; between them loss is taken as linear in the logarithm of the
    tokens. A seed whose longest run does not reach it gives only a bound, and so does one whose shortest run is below.
    """
    own = rows[arm]["tokens_trained"]
    curve = sorted(by, key=lambda name: rows[name]["tokens_trained"])
    tokens = [rows[name]["tokens_trained"] for name in curve]
    ratios: list[float | None] = []
    for seed, target in enumerate(_by_seed(rows, arm, "loss")):
        reached = crossing(tokens, [_by_seed(rows, name, "loss")[seed] for name in curve], target)
        ratios.append(None if reached is None else reached / own)
    known, most = [ratio for ratio in ratios if ratio is not None], tokens[-1] / own
    if len(known) < len(ratios):
        says = f"from scratch the loss of {arm} takes more than {most:.3g} times its tokens"
        says += f" in {len(ratios) - len(known)} of {len(ratios)} seeds" if known else ""
    else:
        least = " or less" if min(known) <= tokens[0] / own else ""
        says = (
            f"from scratch the loss of {arm} takes {statistics.fmean(known):.3g} times its tokens{least} "
            f"(from {min(known):.3g} to {max(known):.3g} over the seeds)"
        )
    return {"ratio_by_seed": ratios, "longest": most, "says": says}


def crossing(tokens: Sequence[float], losses: Sequence[float], target: float) -> float | None:
    """Where a curve first comes down to the target, linear in log tokens between points; None when it never does."""
    if losses[0] <= target:
        return tokens[0]
    for (before, high), (after, low) in zip(zip(tokens, losses), zip(tokens[1:], losses[1:])):
        if low <= target:
            share = (high - target) / (high - low)
            return math.exp(math.log(before) + share * math.log(after / before))
    return None


def rank_correlation(
    rows: Rows, cheap: str = "loss_as_cut", dear: str = "loss", arms: Sequence[str] = ()
) -> dict[str, Any]:
    """Whether one measure puts arms in the order of another: Spearman's and Kendall's coefficients, seed by seed.

    Without `arms` all that have both are ranked. `regret` is what choosing the best by `cheap` costs in `dear`, by the
    means over seeds.
    """
    names = list(arms) or [name for name, row in rows.items() if {f"{cheap}_by_seed", f"{dear}_by_seed"} <= row.keys()]
    each = [[_by_seed(rows, name, measure) for name in names] for measure in (cheap, dear)]
    seeds = list(zip(*(zip(*values) for values in each)))
    correlate: dict[str, Callable[..., Any]] = {"spearman": stats.spearmanr, "kendall": stats.kendalltau}
    with warnings.catch_warnings(action="ignore", category=stats.ConstantInputWarning):
        coefficients = {name: [float(of(a, b).statistic) for a, b in seeds] for name, of in correlate.items()}
    means = [[statistics.fmean(values) for values in measure] for measure in each]
    chosen = min(range(len(names)), key=lambda place: means[0][place])
    place, regret = sorted(means[1]).index(means[1][chosen]) + 1, means[1][chosen] - min(means[1])
    ranges = ", ".join(_over_seeds(name, values) for name, values in coefficients.items())
    says = (
        f"{cheap.replace('_', ' ')} ranks {len(names)} students as {dear.replace('_', ' ')} does with {ranges}; "
        f"the best by the first, {names[chosen]}, is number {place} by the second, {regret:.3f} behind"
    )
    return {
        **{f"{name}_by_seed": [None if math.isnan(v) else v for v in values] for name, values in coefficients.items()},
        "students": len(names),
        "chosen": names[chosen],
        "regret": regret,
        "says": says,
    }


def _over_seeds(name: str, values: Sequence[float]) -> str:
    if any(map(math.isnan, values)):  # where a measure is the same of all
        return f"{name.capitalize()} of no value, for there are no ranks"
    return f"{name.capitalize()} {statistics.fmean(values):.2f} ({min(values):.2f} to {max(values):.2f} over the seeds)"


READINGS: Mapping[str, Callable[..., dict[str, Any]]] = {
    "tokens_to_reach": tokens_to_reach,
    "rank_correlation": rank_correlation,
}


def _by_seed(rows: Rows, name: str, measure: str) -> Sequence[float]:
    return rows[name][f"{measure}_by_seed"]


def _listed(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else list(value or ())
