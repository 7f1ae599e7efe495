"""Amounts as people write them: `4.3B`, `12M`, `50%`, `31.7GiB`, `20ms`.

Counts take decimal suffixes (K, M, B, T), and so do rates, such as tokens a second, which need not be whole; bytes and
times always need their unit, because a bare number would have to be guessed; a share (`50%`) is of the teacher's count
of that very thing. Exact: `4.3B` is 4,300,000,000.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from decimal import Decimal
from typing import Literal

from halflap.errors import HalflapError

Unit = Literal["count", "bytes", "seconds", "rate"]

_THOUSANDS = {"": Decimal(1), "K": Decimal(10**3), "M": Decimal(10**6), "B": Decimal(10**9), "T": Decimal(10**12)}
UNITS: dict[Unit, dict[str, Decimal]] = {
    "count": _THOUSANDS,
    "bytes": {"B": Decimal(1)}
    | {f"{prefix}B": Decimal(1000 ** (i + 1)) for i, prefix in enumerate("KMGT")}
    | {f"{prefix}iB": Decimal(1024 ** (i + 1)) for i, prefix in enumerate("KMGT")},
    "seconds": {
        "ns": Decimal("1e-9"),
        "us": Decimal("1e-6"),
        "ms": Decimal("1e-3"),
        "s": Decimal(1),
        "min": Decimal(60),
        "h": Decimal(3600),
    },
    "rate": _THOUSANDS,
}
WHOLE: tuple[Unit, ...] = ("count", "bytes")
"""Units of which there are no parts."""
EXAMPLES: dict[Unit, str] = {
    "count": "a number such as 4.3e9, 4.3B or 12M",
    "bytes": "bytes with their unit, such as 31.7GiB or 512MB",
    "seconds": "a time with its unit, such as 20ms or 1.5s",
    "rate": "a number a second such as 5000 or 0.5",
}
_NUMBER = re.compile(r"\s*([+-]?(?:\d[\d_]*\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)\s*([^\W\d_]*|%)\s*")


@dataclass(frozen=True)
class Amount:
    """A count, bytes, seconds, or a number a second; with `share`, `value` is a fraction of the teacher's own."""

    value: float
    unit: Unit = "count"
    share: bool = False

    def of(self, whole: float) -> float:
        """The absolute amount: a share of `whole`, or the value itself."""
        return self.value * whole if self.share else self.value

    def __str__(self) -> str:
        """The shortest spelling that `parse_amount` reads back to an equal amount."""
        if self.share:
            return f"{_plain(Decimal(repr(self.value)) * 100)}%"
        value = Decimal(repr(self.value))
        fits = [(suffix, value / scale) for suffix, scale in UNITS[self.unit].items() if value >= scale]
        candidates = [f"{_plain(number)}{suffix}" for suffix, number in fits] or [
            f"{_plain(value / UNITS[self.unit][suffix])}{suffix}" for suffix in list(UNITS[self.unit])[:1]
        ]
        exact = [text for text in candidates if parse_amount(text, self.unit) == self]
        return min(exact or candidates, key=len)


def parse_amount(
    value: str | float | Amount, unit: Unit | None = None, *, share: bool = True, largest_share: float = 1.0
) -> Amount:
    """Read an amount of `unit` (of the unit its suffix names when None; `4.3B` is then a count).

    A plain number is a count. Raises HalflapError on anything else: a suffix of another unit, a bare number where
    a unit is needed, a share above the largest or where `share=False`, a negative number, or infinity.
    """
    if isinstance(value, Amount):
        if unit is not None and value.unit != unit and not value.share:
            raise _wrong(str(value), unit, share, largest_share)
        return value
    match = None if isinstance(value, bool) else _NUMBER.fullmatch(str(value))
    if match is None:
        raise _wrong(value, unit, share, largest_share)
    number, suffix = Decimal(match[1].replace("_", "")), match[2]
    if suffix == "%":
        if not share or not 0 < number <= 100 * Decimal(repr(largest_share)):
            raise _wrong(value, unit, share, largest_share)
        return Amount(float(number / 100), unit or "count", share=True)
    kind, scale = _scale(suffix, unit)
    if kind is None or number < 0 or abs(number.adjusted()) > 30:
        raise _wrong(value, unit, share, largest_share)
    exact = number * scale
    if kind in WHOLE and exact != exact.to_integral_value():
        if kind == "count" or suffix == "B":
            raise _wrong(value, unit, share, largest_share)
        exact = exact.to_integral_value()  # 31.7GiB ends in a fraction of a byte
    return Amount(int(exact) if kind in WHOLE else float(exact), kind)


def parse_count(value: str | float) -> int:
    """A whole number such as a count of tokens: `65536`, `2M`, `1e6`; no shares. Raises HalflapError otherwise."""
    return int(parse_amount(value, "count", share=False).value)


def _scale(suffix: str, unit: Unit | None) -> tuple[Unit | None, Decimal]:
    """The unit that owns the suffix; the case of a suffix matters only where it would be ambiguous, so nowhere."""
    suffix = {"µs": "us", "μs": "us", "sec": "s", "m": "M", "k": "K", "b": "B", "t": "T"}.get(suffix, suffix)
    for kind, scales in UNITS.items():
        for known, scale in scales.items():
            if unit in (None, kind) and suffix.lower() == known.lower():
                return kind, scale
    return None, Decimal(1)


def _plain(number: Decimal) -> str:
    text = f"{number.normalize():f}"
    return text if len(text) <= 20 else repr(float(number))


def _wrong(value: object, unit: Unit | None, share: bool, largest_share: float) -> HalflapError:
    allowed = EXAMPLES[unit] if unit else ", or ".join(EXAMPLES[kind] for kind in UNITS if kind != "rate")
    example = "50%" if largest_share == 1 else "150%"
    percent = f", or a share of the teacher's such as {example}, at most {100 * largest_share:g}%" if share else ""
    return HalflapError(f"{str(value)!r} is not an amount that fits here: write {allowed}{percent}")
