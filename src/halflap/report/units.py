"""Numbers as people read them: three or four digits, a unit, a no-break space between.

Every function takes the plain number of its artifact (counts, bytes, seconds, nats) and returns text. `FORMATS` names
them for the page's template.
"""

from __future__ import annotations

import math
from collections.abc import Callable

SPACE = "\N{NO-BREAK SPACE}"
MINUS = "\N{MINUS SIGN}"


def digits(value: float, significant: int = 3) -> str:
    """At least `significant` digits, never an exponent between 1e-4 and 1e15, thousands separated by commas."""
    if not math.isfinite(value):
        return "not a number" if math.isnan(value) else f"{MINUS if value < 0 else ''}∞"
    if value == 0:
        return "0"
    magnitude = math.floor(math.log10(abs(value)))
    if magnitude < -4 or magnitude >= 15:
        mantissa, exponent = f"{value:.{significant - 1}e}".split("e")
        return f"{_signed(mantissa)}e{_signed(str(int(exponent)))}"
    return _signed(f"{value:,.{max(0, significant - 1 - magnitude)}f}")


def count(value: float) -> str:
    """A plain count: `1,234`, then `12.3 K`, `31.4 M`, `4.30 B`, `1.20 T`."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e5, "K")):
        if abs(value) >= size:
            return f"{digits(value / min(size, 1e3 if letter == 'K' else size))}{SPACE}{letter}"
    return _signed(f"{value:,.0f}")


def size(value: float) -> str:
    """Bytes in binary units: `512 B`, `1.25 MiB`."""
    for power, unit in ((4, "TiB"), (3, "GiB"), (2, "MiB"), (1, "KiB")):
        if abs(value) >= 1024**power:
            return f"{digits(value / 1024**power)}{SPACE}{unit}"
    return f"{value:,.0f}{SPACE}B"


def seconds(value: float) -> str:
    """`0.42 s`, `42 s`, `3 min 5 s`, `2 h 7 min`."""
    if value < 10:
        return f"{digits(value, 2)}{SPACE}s"
    whole = int(value + 0.5)
    if whole < 60:
        return f"{whole}{SPACE}s"
    high, low, units = (
        (whole // 60, whole % 60, ("min", "s")) if whole < 3600 else (whole // 3600, whole % 3600 // 60, ("h", "min"))
    )
    return f"{high}{SPACE}{units[0]}" + (f" {low}{SPACE}{units[1]}" if low else "")


def milliseconds(value: float) -> str:
    return f"{digits(value)}{SPACE}ms"


def latency(value: float) -> str:
    """Seconds of a pass in milliseconds."""
    return milliseconds(1e3 * value)


def loss(value: float) -> str:
    """Nats a token, to a thousandth."""
    return _signed(f"{value:,.3f}") if abs(value) < 1000 else digits(value)


def perplexity(value: float) -> str:
    return digits(value, 4 if value < 1000 else 3)


def signed_loss(value: float) -> str:
    """A difference of losses with its sign always shown."""
    return f"{'+' if value > 0 else ''}{loss(value)}"


def percent(value: float) -> str:
    """A share of one as percent: `49.8 %`."""
    return f"{_signed(f'{100 * value:.1f}')}{SPACE}%"


def points(value: float) -> str:
    """A difference of shares in percentage points with its sign always shown: `+4.7`."""
    return f"{'+' if value > 0 else ''}{_signed(f'{100 * value:.1f}')}"


def times(value: float) -> str:
    """A ratio: `1.84×`."""
    return f"{value:.2f}×"


def rate(value: float) -> str:
    """Tokens a second."""
    return f"{digits(value)}{SPACE}tok/s" if value < 1e5 else f"{count(value)}{SPACE}tok/s"


def error(value: float) -> str:
    """A small deviation: `3.1e−6`."""
    return "0" if value == 0 else (digits(value, 2) if abs(value) >= 0.01 else _exponent(value))


def digest(value: object) -> str:
    """The first twelve characters of a digest, without the name of its algorithm."""
    return str(value).rpartition(":")[2][:12]


def short(value: float) -> str:
    """Two digits are enough, as for a spread."""
    return digits(value, 2)


def plain(value: object) -> str:
    """A number in about four digits, yes or no, anything else as it is."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if not isinstance(value, int | float):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else digits(value, 4)


def _signed(text: str) -> str:
    return text.replace("-", MINUS)


def _exponent(value: float) -> str:
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{_signed(mantissa)}e{_signed(str(int(exponent)))}"


FORMATS: dict[str, Callable[..., str]] = {
    "count": count,
    "size": size,
    "seconds": seconds,
    "milliseconds": milliseconds,
    "latency": latency,
    "loss": loss,
    "signed_loss": signed_loss,
    "perplexity": perplexity,
    "percent": percent,
    "points": points,
    "times": times,
    "rate": rate,
    "error": error,
    "digest": digest,
    "short": short,
    "plain": plain,
}
