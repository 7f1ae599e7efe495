"""study.json as the page shows it: claims and readings, each arm's step from another one, recall, loss over the seeds,
speed against cache.

Arms keep the order of their study. A step's difference, interval and p-value are those of the paired test that `study`
made; losses by tokens are read from the runs that each arm names: of training, or, where arms learn from a teacher, on
held-out text, since what they train on are divergences.
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
from halflap.report.plots import Curve, Drawing, Frame, both, curves_plot, thinned, tick, tick_count
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
    """One arm; losses in nats a token, `recall` a share, `speeds` under the names of SPEEDS, `latency` in seconds.

    role: whose rows of its runs' metrics are its own, where they have those of several.
    """

    name: str
    color: int
    previous: str | None
    loss: Measure
    as_cut: Measure | None
    recall: Measure | None
    speeds: dict[str, Fact | None]
    latency: Fact | None
    runs: tuple[Path, ...]
    role: str | None


@dataclass(frozen=True)
class StudyClaim:
    """What was expected, and whether it `holds`, is `reversed` or `open`."""

    says: str
    measure: str
    verdict: str
    difference: Difference


@dataclass(frozen=True)
class StudyView:
    """What the page shows; figures are None where nothing of the kind was measured."""

    file: Path
    baseline: str
    seeds: int
    measured: str
    arms: tuple[StudyArm, ...]
    of_teacher: bool
    claims: tuple[StudyClaim, ...]
    readings: tuple[Fact, ...]
    """Sentences."""
    loss: Markup | None
    recovery: Markup | None
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
        first, taught = next(iter(rows.items()))[1], node.get("teacher") is not None
        return StudyView(
            node.path,
            node.text("baseline") or arms[0].name,
            max(len(arm.loss.by_seed) for arm in arms),
            _measured(first),
            arms,
            taught,
            _claims(node),
            tuple(said for _, one in _members(node, "readings") if (said := one.fact("says")) is not None),
            _loss(arms, taught, problems),
            _recovery(arms),
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
        _measure(row, "loss_as_cut"),
        _measure(row, "recall"),
        {name: row.number(name) for name in SPEEDS},
        row.number("latency_seconds"),
        tuple(place / str(name) for name in runs.value) if runs is not None and isinstance(runs.value, list) else (),
        row.text("role"),
    )


def _members(node: Node, name: str) -> list[tuple[str, Node]]:
    inner = node.get(name)
    return [] if inner is None else list(inner.items())


def _claims(node: Node) -> tuple[StudyClaim, ...]:
    found = []
    for _, one in _members(node, "claims"):
        says, measure, verdict, difference = (*map(one.text, ("says", "measure", "verdict")), _difference(one))
        if says is not None and measure is not None and verdict is not None and difference is not None:
            found.append(StudyClaim(says, measure.replace("_", " "), verdict, difference))
    return tuple(found)


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


def _loss(arms: Sequence[StudyArm], taught: bool, problems: list[str]) -> Markup | None:
    """Loss by tokens: the mean over the seeds in a band from the lowest to the highest."""
    measure, words = ("held_out_loss", "held-out loss") if taught else ("loss", "training loss")
    curves = [curve for arm in arms if (curve := _band(arm, measure, problems)) is not None]
    return both(curves_plot(curves, "seeds", f"{words}, nats a token")) if curves else None


def _band(arm: StudyArm, measure: str, problems: list[str]) -> Curve | None:
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
            if row.text("arm") not in (None, arm.role):
                continue
            step, tokens, loss = row.number("step"), row.number("tokens"), row.number(measure)
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
        drawn = _dots(
            frame,
            [
                (arm, frame.x(speed), frame.y(cache / unit), f"{units.rate(speed)}, {units.size(cache)}")
                for arm, speed, cache in points
            ],
        )
        label_text = f"Decode speed against cache of {len(points)} arms; the table below holds the values"
        axes = frame.axes("decode, tokens a second", "cache", tick_count, lambda value: units.size(unit * value))
        return picture(width, height, label_text, [axes, *drawn])

    return draw


def _recovery(arms: Sequence[StudyArm]) -> Markup | None:
    """Loss as cut against loss once trained, of the arms that were cut: a rising line where one tells the other."""
    points = [(arm, float(arm.as_cut.mean), float(arm.loss.mean)) for arm in arms if arm.as_cut is not None]
    if len(points) < 3:
        return None

    def draw(width: int, height: int) -> Markup:
        across, up = padded((cut for _, cut, _ in points), 0.1), padded((loss for *_, loss in points), 0.1)
        frame = Frame.over(width, height, across, up)
        told = [
            (arm, frame.x(cut), frame.y(loss), f"{units.loss(cut)} as cut, {units.loss(loss)} trained")
            for arm, cut, loss in points
        ]
        label = f"Loss as cut against loss once trained of {len(points)} arms; the table above holds the values"
        axes = frame.axes("as cut, nats a token", "trained", tick, tick)
        return picture(width, height, label, [axes, *_dots(frame, told)])

    return both(draw)


def _dots(frame: Frame, told: Sequence[tuple[StudyArm, float, float, str]]) -> list[Markup]:
    """(arm, place across, place down, what its title says) as points, with names where there is room."""
    taken = [(at - 6, to - 6, at + 6, to + 6) for _, at, to, _ in told]
    drawn: list[Markup] = []
    for arm, at, to, says in told:
        parts = [element("title", f"{arm.name}: {says}"), element("circle", cx=at, cy=to, r=5)]
        if (label := _free(arm.name, at, to, taken, frame)) is not None:
            x, y, anchor = label
            parts.append(element("text", arm.name, x=x, y=y, text_anchor=anchor, class_="run-name"))
        drawn.append(group(parts, class_=f"c{arm.color}"))
    return drawn


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
