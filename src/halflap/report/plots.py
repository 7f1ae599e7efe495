"""The figures with axes: candidates, loss curves, hidden curve, depth scores.

Each is drawn twice, for a wide and for a narrow page (`both`), so that its type stays readable; the style sheet shows
one. All values come in as plain numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from halflap.report import units
from halflap.report.svg import Scale, element, group, log_ticks, padded, picture, ticks

WIDE, NARROW = (760, 340), (358, 300)
Drawing = Callable[[int, int], Markup]


@dataclass(frozen=True)
class Curve:
    """Loss against tokens of one run: `color` is its class, `points` are (tokens, nats) in order.

    `band` is the lowest and the highest of several runs at each point.
    """

    name: str
    split: str
    points: tuple[tuple[float, float], ...]
    color: int = 0
    band: tuple[tuple[float, float], ...] = ()


@dataclass(frozen=True)
class CandidatePoint:
    """One candidate: its cost, and the loss as cut and after its short distillation where measured."""

    name: str
    cost: float
    zero_shot: float | None
    refined: float | None
    chosen: bool
    detail: str

    @property
    def best(self) -> float:
        return self.refined if self.refined is not None else self.zero_shot if self.zero_shot is not None else math.nan


def both(draw: Drawing, *, wide: tuple[int, int] = WIDE, narrow: tuple[int, int] = NARROW) -> Markup:
    """The drawing for a wide and for a narrow page; the style sheet hides one of them."""
    return element("div", draw(*wide), class_="wide") + element("div", draw(*narrow), class_="narrow")


@dataclass(frozen=True)
class Frame:
    """The plotting area of a picture with its two scales."""

    x: Scale
    y: Scale
    width: int
    height: int

    @staticmethod
    def over(
        width: int, height: int, x: tuple[float, float], y: tuple[float, float], *, log_y: bool = False, right: int = 14
    ) -> Frame:
        return Frame(Scale(*x, 48, width - right), Scale(*y, height - 42, 24, log=log_y), width, height)

    def axes(
        self, x_title: str, y_title: str, x_text: Callable[[float], str], y_text: Callable[[float], str]
    ) -> Markup:
        """Grid lines, tick labels and the names of both axes."""
        x, y = self.x, self.y
        parts = []
        for value in log_ticks(y.low, y.high) if y.log else ticks(y.low, y.high):
            parts += [
                element("line", x1=x.start, x2=x.end, y1=y(value), y2=y(value), class_="grid"),
                element("text", y_text(value), x=x.start - 8, y=y(value) + 4, text_anchor="end", class_="tick"),
            ]
        shown = ticks(x.low, x.high, 6 if self.width > 500 else 3)
        for value in shown:
            parts.append(
                element("text", x_text(value), x=x(value), y=y.start + 18, text_anchor="middle", class_="tick")
            )
            parts.append(element("line", x1=x(value), x2=x(value), y1=y.start, y2=y.start + 4, class_="axis"))
        parts += [
            element("line", x1=x.start, x2=x.end, y1=y.start, y2=y.start, class_="axis"),
            element("text", x_title, x=x.end, y=self.height - 4, text_anchor="end", class_="name"),
            element("text", y_title, x=4, y=12, class_="name"),
        ]
        return group(parts)


def candidates_plot(
    points: Sequence[CandidatePoint],
    teacher: float | None,
    cost: str = "parameters",
    cost_text: Callable[[float], str] | None = None,
) -> Drawing:
    """Cost against loss: hollow as cut, filled after short distillation, the Pareto front, the chosen one."""
    losses = [v for p in points for v in (p.zero_shot, p.refined) if v is not None]
    span = padded([*losses, *([teacher] if teacher is not None else [])], 0.1)
    log_y = min(losses) > 0 and max(losses) > 3 * min(losses)
    if log_y:
        span = (min([*losses, teacher or math.inf]) / 1.12, max(losses) * 1.12)

    def draw(width: int, height: int) -> Markup:
        frame = Frame.over(width, height, padded([p.cost for p in points], 0.08), span, log_y=log_y)
        x, y = frame.x, frame.y
        label = f"{len(points)} candidates: {cost} against held-out loss; the table below holds the values"
        return picture(
            width,
            height,
            label,
            [
                frame.axes(cost, "loss, nats a token", cost_text or tick_count, tick),
                _teacher_line(frame, teacher),
                _front(frame, points),
                *(_stem(p, x, y) for p in points),
                *(_dot(p, x, y) for p in sorted(points, key=lambda p: p.chosen)),
            ],
        )

    return draw


def _teacher_line(frame: Frame, teacher: float | None) -> Markup:
    if teacher is None:
        return Markup("")
    at = frame.y(teacher)
    line = element("line", x1=frame.x.start, x2=frame.x.end, y1=at, y2=at, class_="reference")
    text = element("text", f"teacher {units.loss(teacher)}", x=frame.x.end, y=at - 6, text_anchor="end", class_="note")
    return line + text


def _front(frame: Frame, points: Sequence[CandidatePoint]) -> Markup:
    """Steps through the candidates that no smaller one beats."""
    best, corners = math.inf, []
    for point in sorted((p for p in points if math.isfinite(p.best)), key=lambda p: (p.cost, p.best)):
        if point.best < best:
            corners.append((frame.x(point.cost), frame.y(point.best)))
            best = point.best
    if len(corners) < 2:
        return Markup("")
    path = f"M{corners[0][0]:.1f} {corners[0][1]:.1f}" + "".join(f"H{cx:.1f}V{cy:.1f}" for cx, cy in corners[1:])
    return element("path", d=f"{path}H{frame.x.end:.1f}", class_="front")


def _stem(point: CandidatePoint, x: Scale, y: Scale) -> Markup:
    if point.zero_shot is None or point.refined is None:
        return Markup("")
    at = x(point.cost)
    return element("line", x1=at, x2=at, y1=y(point.zero_shot), y2=y(point.refined), class_="stem")


def _dot(point: CandidatePoint, x: Scale, y: Scale) -> Markup:
    at, parts = x(point.cost), []
    if point.zero_shot is not None:
        parts.append(element("circle", cx=at, cy=y(point.zero_shot), r=4.5, class_="hollow"))
    if point.refined is not None:
        parts.append(element("circle", cx=at, cy=y(point.refined), r=5, class_="solid"))
    if point.chosen and math.isfinite(point.best):
        parts.append(element("circle", cx=at, cy=y(point.best), r=9.5, class_="ring"))
        below = y(point.best) + 26 < y.start
        parts.append(
            element(
                "text", "chosen", x=at, y=y(point.best) + (25 if below else -17), text_anchor="middle", class_="mark"
            )
        )
    return group([element("title", f"{point.name}: {point.detail}"), *parts], class_="chosen" if point.chosen else None)


def curves_plot(curves: Sequence[Curve], identity: str, y_title: str) -> Drawing:
    """Loss against tokens of several runs; what lies above the axis (first steps) is clipped."""
    values = sorted(value for curve in curves for _, value in curve.points)
    ends = [curve.points[-1][1] for curve in curves]
    ceiling = max(values[int(0.97 * (len(values) - 1))], max(ends), *(_typical(curve) for curve in curves))
    span = padded([values[0], min(ceiling, values[-1])])
    tokens = [0.0, max(x for curve in curves for x, _ in curve.points)]

    def draw(width: int, height: int) -> Markup:
        names = _end_names(curves) if width > 500 else {}
        frame = Frame.over(width, height, (tokens[0], tokens[1] or 1.0), span, right=150 if names else 14)
        x, y, clip = frame.x, frame.y, f"clip-{identity}-{width}"
        area = element("rect", x=x.start, y=y.end, width=x.end - x.start + 5, height=y.start - y.end)
        lines = [
            group(
                [element("title", f"{curve.name}, {curve.split}"), *_line(curve, x, y)],
                class_=f"c{curve.color} {curve.split}",
            )
            for curve in sorted(curves, key=lambda curve: curve.split != "train")
        ]
        label = (
            f"{y_title} against tokens of {len({c.name for c in curves})} trainings; the table below holds the values"
        )
        parts = [
            element("clipPath", area, id=clip),
            frame.axes("tokens", y_title, tick_count, tick),
            group(lines, clip_path=f"url(#{clip})"),
            *_labels(names, frame),
        ]
        return picture(width, height, label, parts)

    return draw


def _end_names(curves: Sequence[Curve]) -> dict[str, Curve]:
    """One curve for each run whose name is short enough to stand at its end; none for a single run or too many."""
    found = {curve.name: curve for curve in sorted(curves, key=lambda curve: curve.split != "train")}
    return found if 1 < len(found) <= 8 and all(len(name) <= 22 for name in found) else {}


def _labels(names: dict[str, Curve], frame: Frame) -> list[Markup]:
    """Names at the right of the curves' ends, pushed apart where they would touch."""
    ends = sorted((min(max(frame.y(c.points[-1][1]), frame.y.end), frame.y.start), name) for name, c in names.items())
    places: list[float] = []
    for at, _ in ends:
        places.append(max(at, places[-1] + 16) if places else at)
    over = max(0.0, places[-1] - frame.y.start) if places else 0.0
    return [
        element("text", name, x=frame.x.end + 12, y=at - over + 4, class_=f"run-name c{names[name].color}")
        for at, (_, name) in zip(places, ends)
    ]


def _typical(curve: Curve) -> float:
    """A held-out loss once the first twentieth of its curve is over: what must stay in view."""
    return curve.points[len(curve.points) // 20][1] if curve.split == "held-out" else -math.inf


def _line(curve: Curve, x: Scale, y: Scale) -> list[Markup]:
    pairs = [(x(tokens), y(value)) for tokens, value in curve.points]
    line = element("polyline", points=" ".join(f"{a:.1f},{b:.1f}" for a, b in pairs), class_="curve")
    if curve.band:
        edges = [(a, y(low)) for (a, _), (low, _) in zip(pairs, curve.band)]
        edges += [(a, y(high)) for (a, _), (_, high) in reversed(list(zip(pairs, curve.band)))]
        area = element("polygon", points=" ".join(f"{a:.1f},{b:.1f}" for a, b in edges), class_="band")
        return [area, line]
    if curve.split != "held-out" or len(pairs) > 40:
        return [line]
    return [line, *(element("circle", cx=a, cy=b, r=3) for a, b in pairs)]


def thinned(points: Sequence[tuple[float, float]], most: int = 240) -> tuple[tuple[float, float], ...]:
    """At most `most` points: means of equal runs of neighbours, the last point kept as it is."""
    if len(points) <= most:
        return tuple(points)
    size = math.ceil(len(points) / (most - 1))
    buckets = [points[start : start + size] for start in range(0, len(points) - 1, size)]
    means = [(sum(x for x, _ in b) / len(b), sum(y for _, y in b) / len(b)) for b in buckets]
    return (*means, points[-1])


def hidden_plot(values: Sequence[float], kept: int | None) -> Drawing:
    """Importance of the hidden channels, highest first, and how many were kept."""
    ordered = sorted(values, reverse=True)
    positive = [value for value in ordered if value > 0]
    log_y = len(positive) > 1 and positive[0] > 30 * positive[-1]
    low, high = (positive[-1], positive[0] * 1.15) if log_y else (0.0, (ordered[0] or 1.0) * 1.06)
    points = thinned([(float(i + 1), max(v, low)) for i, v in enumerate(ordered)], 300)

    def draw(width: int, height: int) -> Markup:
        frame = Frame.over(width, height, (0.0, float(len(ordered))), (low, high), log_y=log_y)
        x, y = frame.x, frame.y
        outline = " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in points)
        parts = [frame.axes("hidden channels, most important first", "importance", tick_count, tick)]
        if kept is not None and kept < len(ordered):
            cut = x(float(kept))
            far = cut > (x.start + x.end) / 2
            side = "end" if far else "start"
            parts += [
                element("rect", x=cut, y=y.end, width=x.end - cut, height=y.start - y.end, class_="cut-area"),
                element("line", x1=cut, x2=cut, y1=y.end, y2=y.start, class_="cut-line"),
                element(
                    "text", f"{kept:,} kept", x=cut + (-8 if far else 8), y=y.end + 12, text_anchor=side, class_="note"
                ),
            ]
        parts.append(element("polyline", points=outline, class_="curve hidden-curve"))
        cut_text = f"; the first {kept} of {len(ordered)} are kept" if kept is not None else ""
        return picture(width, height, f"Importance of the hidden channels in falling order{cut_text}", parts)

    return draw


@dataclass(frozen=True)
class DepthBar:
    """One block's score: what removing it does; `kept` is None when nothing was decided."""

    block: int
    kind: str
    value: float
    kept: bool | None


def depth_plot(bars: Sequence[DepthBar], y_title: str) -> Drawing:
    """A stem for each block, coloured by kind; blocks that went are hollow and crossed."""
    positive = [bar.value for bar in bars if bar.value > 0]
    log_y = len(positive) > 1 and max(positive) > 30 * min(positive)
    low, high = (
        (min(positive) / 1.4, max(positive) * 1.4)
        if log_y
        else (min(0.0, *(b.value for b in bars)), (max(positive, default=1.0)) * 1.1)
    )

    def draw(width: int, height: int) -> Markup:
        frame = Frame.over(width, height, (-0.8, len(bars) - 0.2), (low, high), log_y=log_y)
        x, y = frame.x, frame.y
        stems = []
        for place, bar in enumerate(bars):
            at, top = x(float(place)), y(max(bar.value, low))
            shapes = [
                element("line", x1=at, x2=at, y1=y.start, y2=top, class_="depth-stem"),
                element("circle", cx=at, cy=top, r=3.6),
            ]
            if bar.kept is False:
                shapes[1] = element("path", d=f"M{at - 4:.1f} {top - 4:.1f}l8 8m0-8l-8 8", class_="cross")
            title = f"block {bar.block}, {bar.kind}: {units.plain(bar.value)}{', dropped' if bar.kept is False else ''}"
            stems.append(
                group(
                    [element("title", title), *shapes], class_=f"kind-{bar.kind}{' gone' if bar.kept is False else ''}"
                )
            )
        label = f"Depth score of {len(bars)} blocks; the table below holds the values"
        names = {float(place): str(bar.block) for place, bar in enumerate(bars)}
        return picture(
            width, height, label, [frame.axes("block", y_title, lambda value: names.get(value, ""), tick), *stems]
        )

    return draw


def tick_count(value: float) -> str:
    """A count without needless zeros: `2 M`, `16.5 M`."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if abs(value) >= size:
            return f"{value / size:.4g}{units.SPACE}{letter}"
    return f"{value:,.0f}"


def tick(value: float) -> str:
    if value == 0:
        return "0"
    if abs(value) >= 1e5 or abs(value) < 1e-3:
        mantissa, exponent = f"{value:.0e}".split("e")
        return f"{mantissa}e{units.MINUS if int(exponent) < 0 else ''}{abs(int(exponent))}"
    return f"{value:,.4g}".replace("-", units.MINUS)
