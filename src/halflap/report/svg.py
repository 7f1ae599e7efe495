"""The few pieces that the figures are drawn with: scales, round ticks and escaped elements.

Colours are CSS classes (`templates/style.css`), so that one drawing serves the light and the dark page.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from markupsafe import Markup, escape

Child = Markup | str


def element(name: str, *children: Child, **attributes: object) -> Markup:
    """One element; `class_` is `class`, underscores become hyphens, None is left out, text children are escaped."""
    parts = [f' {_attribute(key)}="{escape(_text(value))}"' for key, value in attributes.items() if value is not None]
    inner = Markup("").join(children)
    return Markup(f"<{name}{''.join(parts)}/>" if not children else f"<{name}{''.join(parts)}>{inner}</{name}>")


def group(children: Iterable[Child], **attributes: object) -> Markup:
    return element("g", Markup("").join(children), **attributes)


def picture(width: float, height: float, label: str, children: Iterable[Child], *, class_: str = "plot") -> Markup:
    """A drawing of fixed proportions that fills the width of its place; `label` is read out instead of it."""
    return element(
        "svg",
        *children,
        viewBox=f"0 0 {_text(width)} {_text(height)}",
        class_=class_,
        role="img",
        aria_label=label,
    )


@dataclass(frozen=True)
class Scale:
    """Values `low..high` to pixels `start..end`; logarithmic when `log`."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high, at = (
            (math.log(x) for x in (self.low, self.high, value)) if self.log else (self.low, self.high, value)
        )
        return self.start + (self.end - self.start) * ((at - low) / (high - low) if high != low else 0.5)


def ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """Round values (1, 2, 2.5, 5 times a power of ten) inside `low..high`, about `wanted` of them."""
    if not high > low:
        return [low]
    rough = (high - low) / wanted
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(index * step, 12) for index in range(first, math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """Round values for a logarithmic axis: powers of ten with 2 and 5 between, or plain ticks on a short span."""
    if high / low < 8:
        return ticks(low, high, wanted)
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for steps in ((1, 2, 5), (1, 3), (1,)):
        values = [step * 10.0**power for power in powers for step in steps if low <= step * 10.0**power <= high]
        if len(values) <= wanted + 2:
            return values
    return values


def padded(values: Iterable[float], share: float = 0.06) -> tuple[float, float]:
    """The span of the finite values with a margin on both sides; `(0, 1)` when there are none."""
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return 0.0, 1.0
    low, high = min(finite), max(finite)
    margin = (high - low) * share or abs(high) * 0.05 or 1.0
    return low - margin, high + margin


def _attribute(key: str) -> str:
    return key.rstrip("_").replace("_", "-") if key not in ("viewBox", "preserveAspectRatio") else key


def _text(value: object) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)
