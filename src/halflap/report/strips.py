"""Drawings that stretch with their place: heat strips of importance, and whiskers on an axis of percentages."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from markupsafe import Markup

from halflap.report.plots import tick
from halflap.report.svg import Scale, element, padded, ticks

LEVELS = 14


def heat_strip(
    groups: Sequence[Sequence[float]], kept: Sequence[Sequence[bool]] | None, label: str, root: bool = False
) -> Markup:
    """Cells shaded by value over the row's largest, a gap between groups, a bar below every kept index.

    `root` shades by the square root, for values that fall off steeply.

    One path for each shade, so that a hundred rows stay small.
    """
    top = max((value for values in groups for value in values), default=0.0) or 1.0
    cells = sum(map(len, groups))
    gap = cells * 0.012 if len(groups) > 1 else 0.0
    shades: dict[int, list[str]] = {}
    bars, at = [], 0.0
    for number, values in enumerate(groups):
        for index, value in enumerate(values):
            share = max(value, 0.0) / top
            shade = min(LEVELS - 1, int(LEVELS * (math.sqrt(share) if root else share)))
            shades.setdefault(shade, []).append(f"M{at:.5g} 0h1v14h-1z")
            if kept is not None and kept[number][index]:
                bars.append(f"M{at:.5g} 16.5h1v2.5h-1z")
            at += 1
        at += gap
    parts = [
        element("path", d="".join(cells), opacity=(shade + 1) / LEVELS, class_="cell")
        for shade, cells in sorted(shades.items())
    ]
    if bars:
        parts.append(element("path", d="".join(bars), class_="kept"))
    box = f"0 0 {at - gap:.5g} 20"
    return element("svg", *parts, viewBox=box, preserveAspectRatio="none", class_="strip", role="img", aria_label=label)


def whisker(
    value: float,
    interval: tuple[float, float] | None,
    span: tuple[float, float],
    text: str,
    losses: Sequence[float] = (),
) -> Markup:
    """A dot with its interval on a shared axis of percentages; a value beyond the axis is an arrow at its edge."""
    at = Scale(*span, 2.0, 98.0)
    mid = 13
    parts: list[Markup] = [element("line", x1="0", x2="100%", y1=mid, y2=mid, class_="rail")]
    if value > span[1]:
        arrow = element("path", d=f"M-9 {mid - 5}l7 5l-7 5", class_="arrow")
        parts.append(element("svg", arrow, x="100%", overflow="visible"))
    else:
        parts += [
            element("circle", cx=_share(at(loss)), cy=mid, r=2, class_="seed") for loss in losses if loss <= span[1]
        ]
        if interval is not None:
            low, high = _share(at(max(interval[0], span[0]))), _share(at(min(interval[1], span[1])))
            parts.append(element("line", x1=low, x2=high, y1=mid, y2=mid, class_="interval"))
            parts += [element("line", x1=end, x2=end, y1=mid - 5, y2=mid + 5, class_="end") for end in (low, high)]
        parts.append(element("circle", cx=_share(at(value)), cy=mid, r=4.5, class_="dot"))
    return element("svg", *parts, class_="whisker", height=2 * mid, width="100%", role="img", aria_label=text)


def whisker_axis(span: tuple[float, float], text: Callable[[float], str] = tick) -> Markup:
    """Tick labels of the shared axis, in the words of `text`."""
    at = Scale(*span, 2.0, 98.0)
    labels = [
        element("text", text(value), x=_share(at(value)), y=12, text_anchor="middle", class_="tick")
        for value in ticks(*span, 4)
    ]
    return element("svg", *labels, class_="whisker", height=16, width="100%", aria_hidden="true")


def bar(value: float, interval: tuple[float, float] | None, chance: float | None, text: str, color: int) -> Markup:
    """A share of one as a bar from nothing to all, with its interval and a mark where chance would be."""
    mid = 13
    at = Scale(0.0, 1.0, 0.0, 100.0)
    parts: list[Markup] = [
        element("rect", x="0", y=mid - 6, width="100%", height=12, class_="all"),
        element("rect", x="0", y=mid - 6, width=_share(at(value)), height=12, class_="share"),
    ]
    if chance is not None:
        parts.append(element("line", x1=_share(at(chance)), x2=_share(at(chance)), y1=2, y2=24, class_="chance"))
    if interval is not None:
        low, high = (_share(at(end)) for end in interval)
        parts.append(element("line", x1=low, x2=high, y1=mid, y2=mid, class_="interval"))
        parts += [element("line", x1=end, x2=end, y1=mid - 4, y2=mid + 4, class_="end") for end in (low, high)]
    return element("svg", *parts, class_=f"whisker c{color}", height=2 * mid, width="100%", role="img", aria_label=text)


def bar_axis() -> Markup:
    """Tick labels of the bars, in percent."""
    places = ((0, "start"), (50, "middle"), (100, "end"))
    labels = [
        element("text", f"{share} %", x=f"{share}%", y=12, text_anchor=anchor, class_="tick")
        for share, anchor in places
    ]
    return element("svg", *labels, class_="whisker", height=16, width="100%", aria_hidden="true")


def whisker_span(losses: Sequence[float], intervals: Sequence[tuple[float, float] | None]) -> tuple[float, float]:
    """From the best to the worst; an arm more than three times as far beyond the median as the best is left off."""
    ordered = sorted(losses)
    low, median = ordered[0], ordered[len(ordered) // 2]
    limit = median + 3 * max(median - low, 1e-9)
    shown = [x for loss, pair in zip(losses, intervals) if loss <= limit for x in (loss, *(pair or ()))]
    return padded(shown, 0.08)


def _share(percent: float) -> str:
    return f"{percent:.2f}%"
