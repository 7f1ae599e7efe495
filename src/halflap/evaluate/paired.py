"""Is one model better than another beyond chance, when both were trained with the same seeds?

Runs of one seed share the order of the text and the draw of the weights, so their difference varies less than either:
the differences are tested, not the two groups (Student's t for pairs).
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from scipy import stats


@dataclass(frozen=True)
class Paired:
    """Mean difference to the baseline; with two seeds or more its 95 % interval and the two-sided p-value."""

    difference: float
    interval: tuple[float, float] | None
    p_value: float | None


def paired(values: Sequence[float], baseline: Sequence[float]) -> Paired:
    """values and baseline in the order of their seeds; raises ValueError when they are not equally many."""
    differences = [value - other for value, other in zip(values, baseline, strict=True)]
    mean, count = statistics.fmean(differences), len(differences)
    if count < 2:
        return Paired(mean, None, None)
    error = statistics.stdev(differences) / count**0.5
    if error == 0:
        return Paired(mean, (mean, mean), 1.0 if mean == 0 else 0.0)
    reach = float(stats.t.ppf(0.975, count - 1)) * error
    return Paired(mean, (mean - reach, mean + reach), float(2 * stats.t.sf(abs(mean / error), count - 1)))
