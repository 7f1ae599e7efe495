"""study.json as the page shows it: each arm's step from another one, recall, loss over the seeds, speed against cache.

Arms keep the order of their study. A step's difference, interval and p-value are those of the paired test that `study`
made; training losses by tokens are read from the runs that each arm names.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup

from halflap.errors import HalflapError
from halflap.report import strips, units
from halflap.report.artifacts import Fact, Node, RunFiles, read_run
from halflap.report.measures import COLORS
from halflap.report.plots import Curve, Drawing, Frame, both, curves_plot, thinned, tick_count
from halflap.report.svg import element, group, padded, picture

SPEEDS = ("training_tokens_per_second", "prefill_tokens_per_second", "decode_tokens_per_second", "cache_bytes")
LETTER = 7.8  # pixels of a label's letter, for placing


@dataclass(frozen=True)
class Difference:
    """Of one arm to another, paired by seed: mean, 95 % interval and p-value where there were seeds enough."""

    value: Fact
    interval: tuple[Fact, Fact] | None
    p_value: Fact | None


@dataclass(frozen=True)
class Measure:
    """A number of one arm over the seeds, and how it differs from the first and from the arm its step is from."""

    mean: Fact
    spread: Fact | None
    by_seed: tuple[float, ...]
    to_baseline: Difference | None
    to_previous: Difference | None


@dataclass(frozen=True)
class StudyArm:
    """One arm; `loss` in nats a token, `recall` a share, `speeds` under the names of SPEEDS."""

    name: str
    color: int
    previous: str | None
    loss: Measure
    recall: Measure | None
    speeds: dict[str, Fact | None]
    runs: tuple[Path, ...]


@dataclass(frozen=True)
class StudyView:
    """What the page shows; figures are None where nothing of the kind was measured."""

    file: Path
    baseline: str
    seeds: int
    measured: str
    arms: tuple[StudyArm, ...]
    loss: Markup | None
    recall: dict[str, Markup]
    recall_axis: Markup | None
    tradeoff: Markup | None


def read_study(runs: Sequence[RunFiles], problems: list[str]) -> StudyView | None:
    """Of the first run that is a study; runs of arms that cannot be read are named in `problems`."""
    for run in runs:
        node = run.document("study.json")
        rows = node.get("arms") if node is not None else None
        if node is None or rows is None:
            continue
        found = [_arm(run.path, row, place % COLORS) for place, (_, row) in enumerate(rows.items())]
        arms = tuple(arm for arm in found if arm is not None)
        if not arms:
            continue
        whiskers, axis = _recall(arms)
        first = next(iter(rows.items()))[1]
        return StudyView(
            node.path,
            node.text("baseline") or arms[0].name,
            max(len(arm.loss.by_seed) for arm in arms),
            _measured(first),
            arms,
            _loss(arms, problems),
            whiskers,
            axis,
            _tradeoff(arms),
        )
    return None


def _arm(place: Path, row: Node, color: int) -> StudyArm | None:
    loss, runs = _measure(row, "loss"), row.get("runs")
    if loss is None:
        return None
    return StudyArm(
        row.text("name") or f"arm {color}",
        color,
        row.text("previous"),
        loss,
        _measure(row, "recall"),
        {name: row.number(name) for name in SPEEDS},
        tuple(place / str(name) for name in runs.value) if runs is not None and isinstance(runs.value, list) else (),
    )


def _measure(row: Node, name: str) -> Measure | None:
    mean, by_seed = row.number(name), row.get(f"{name}_by_seed")
    if mean is None:
        return None
    values = tuple(map(float, by_seed.value)) if by_seed is not None and isinstance(by_seed.value, list) else ()
    differences = (_difference(row.get(f"{name}_against_{other}")) for other in ("baseline", "previous"))
    return Measure(mean, row.number(f"{name}_spread"), values, *differences)


def _difference(node: Node | None) -> Difference | None:
    value = node.number("difference") if node is not None else None
    return (
        None if node is None or value is None else Difference(value, node.interval("interval"), node.number("p_value"))
    )


def _measured(row: Node) -> str:
    numbers = [row.number(name) for name in ("batch", "prompt")]
    if not all(numbers):
        return ""
    return f"batch {numbers[0].value}, prompt of {units.count(numbers[1].value)} tokens"  # type: ignore[union-attr]


# ---- figures


def _loss(arms: Sequence[StudyArm], problems: list[str]) -> Markup | None:
    """Training loss by tokens: the mean over the seeds in a band from the lowest to the highest."""
    curves = [curve for arm in arms if (curve := _band(arm, problems)) is not None]
    return both(curves_plot(curves, "seeds", "training loss, nats a token")) if curves else None


def _band(arm: StudyArm, problems: list[str]) -> Curve | None:
    steps: dict[
        float, list[tuple[float, float]]
    ] = {}  # seeds pack their rows otherwise: a step's tokens differ a little
    for path in arm.runs:
        try:
            rows = read_run(path).metrics
        except HalflapError as error:
            problems.append(str(error))
            continue
        for row in rows:
            step, tokens, loss = row.number("step"), row.number("tokens"), row.number("loss")
            if step is not None and tokens is not None and loss is not None:
                steps.setdefault(float(step), []).append((float(tokens), float(loss)))
    if len(steps) < 2:
        return None
    pairs = [tuple(zip(*steps[step])) for step in sorted(steps)]
    mean, low, high = (
        thinned([(statistics.fmean(tokens), of(losses)) for tokens, losses in pairs])
        for of in (statistics.fmean, min, max)
    )
    return Curve(arm.name, "seeds", mean, arm.color, tuple((a, b) for (_, a), (_, b) in zip(low, high)))


def _recall(arms: Sequence[StudyArm]) -> tuple[dict[str, Markup], Markup | None]:
    """A whisker for each arm that was asked, from the lowest to the highest seed, and their axis."""
    asked = [(arm.name, arm.recall) for arm in arms if arm.recall is not None]
    if not asked:
        return {}, None
    low, high = padded([value for _, recall in asked for value in (*recall.by_seed, float(recall.mean))], 0.1)
    span = (max(0.0, low), min(1.0, high))
    found = {}
    for name, recall in asked:
        mean, seeds = float(recall.mean), recall.by_seed
        text = f"{name}: {units.percent(mean)} of answers right"
        found[name] = strips.whisker(mean, (min(seeds), max(seeds)) if seeds else None, span, text, seeds)
    return found, strips.whisker_axis(span, lambda share: f"{100 * share:g}{units.SPACE}%")


def _tradeoff(arms: Sequence[StudyArm]) -> Markup | None:
    """Decode speed against the cache that it needs, for the arms that were timed."""
    points = []
    for arm in arms:
        speed, cache = arm.speeds["decode_tokens_per_second"], arm.speeds["cache_bytes"]
        if speed is not None and cache is not None and float(cache) > 0:
            points.append((arm, float(speed), float(cache)))
    return both(tradeoff_plot(points)) if len(points) > 1 else None


def tradeoff_plot(points: Sequence[tuple[StudyArm, float, float]]) -> Drawing:
    """(arm, tokens a second, bytes): fast and small is at the lower right; a name stands where there is room."""
    fastest, sizes = max(speed for _, speed, _ in points), [cache for *_, cache in points]
    unit = 1024.0 ** math.floor(math.log(min(sizes), 1024))  # round ticks in binary units

    def draw(width: int, height: int) -> Markup:
        span = (min(sizes) / unit / 1.3, max(sizes) / unit * 1.3)
        frame = Frame.over(width, height, (0.0, 1.08 * fastest), span, log_y=True)
        places = [(frame.x(speed), frame.y(cache / unit)) for _, speed, cache in points]
        taken = [(at - 6, to - 6, at + 6, to + 6) for at, to in places]
        drawn: list[Markup] = []
        for (arm, speed, cache), (at, to) in zip(points, places):
            title = element("title", f"{arm.name}: {units.rate(speed)}, {units.size(cache)}")
            parts = [title, element("circle", cx=at, cy=to, r=5)]
            if (label := _free(arm.name, at, to, taken, frame)) is not None:
                x, y, anchor = label
                parts.append(element("text", arm.name, x=x, y=y, text_anchor=anchor, class_="run-name"))
            drawn.append(group(parts, class_=f"c{arm.color}"))
        label_text = f"Decode speed against cache of {len(points)} arms; the table below holds the values"
        axes = frame.axes("decode, tokens a second", "cache", tick_count, lambda value: units.size(unit * value))
        return picture(width, height, label_text, [axes, *drawn])

    return draw


def _free(
    name: str, at: float, to: float, taken: list[tuple[float, float, float, float]], frame: Frame
) -> tuple[float, float, str] | None:
    """Where a name touches nothing, right of its point, left, above or below; its box is then taken."""
    wide = LETTER * len(name)
    anchored = ((at + 9, to + 4, "start"), (at - 9, to + 4, "end"), (at, to - 11, "middle"), (at, to + 19, "middle"))
    for x, y, anchor in anchored:
        left = x - wide * {"start": 0.0, "middle": 0.5, "end": 1.0}[anchor]
        box = (left, y - 11, left + wide, y + 3)
        inside = box[0] >= frame.x.start and box[2] <= frame.width and box[1] >= 16 and box[3] <= frame.y.start
        if inside and not any(box[0] < o[2] and o[0] < box[2] and box[1] < o[3] and o[1] < box[3] for o in taken):
            taken.append(box)
            return x, y, anchor
    return None
