"""Numbers and records as words and tables, for every verb's result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text


def joined(*remarks: str | None) -> str | None:
    """Remarks as one, without those that are not made; None where none is."""
    return "; ".join(remark for remark in remarks if remark) or None


def generic(result: Mapping[str, Any], console: Console) -> None:
    """Name and value a line; a list of records becomes a table."""
    pairs = Table.grid(padding=(0, 2))
    tables: list[tuple[str, Sequence[Mapping[str, Any]]]] = []
    for name, value in result.items():
        if isinstance(value, list) and value and all(isinstance(item, Mapping) for item in value):
            tables.append((name, value))
        elif isinstance(value, Mapping):
            inner = ", ".join(
                f"{key} {number(item)}" for key, item in value.items() if not isinstance(item, dict | list)
            )
            pairs.add_row(Text(name.replace("_", " "), style="bold"), inner)
        else:
            pairs.add_row(Text(name.replace("_", " "), style="bold"), number(value))
    console.print(pairs)
    for name, rows in tables:
        console.print(records(rows, name.replace("_", " ")))


def records(rows: Sequence[Mapping[str, Any]], title: str) -> Table:
    columns = list(
        dict.fromkeys(key for row in rows for key, value in row.items() if not isinstance(value, dict | list))
    )
    table = Table(title=title, title_justify="left", box=None, header_style="bold", pad_edge=False)
    for column in columns:
        numeric = all(isinstance(row.get(column), int | float | None) for row in rows)
        table.add_column(column.replace("_", " "), justify="right" if numeric else "left")
    for row in rows:
        table.add_row(*(number(row.get(column)) for column in columns))
    return table


def number(value: Any) -> str:
    """Whole numbers with separators, fractions with four digits, text as it is."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 1e5 else f"{value:,.0f}"
    if isinstance(value, list | tuple):
        return ", ".join(number(item) for item in value)
    return "" if value is None else str(value)


def size(value: int) -> str:
    """Bytes with a binary unit."""
    amount = float(value)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if amount < 1024:
            return f"{amount:.4g} {unit}"
        amount /= 1024
    return f"{amount:.4g} TiB"


def short(value: float) -> str:
    """Counts as 4.49 B, 12 M, 512 K."""
    for scale, suffix in ((1e12, " T"), (1e9, " B"), (1e6, " M"), (1e3, " K")):
        if abs(value) >= scale:
            return f"{value / scale:.4g}{suffix}"
    return f"{value:.4g}"


def fit_text(row: Mapping[str, Any]) -> str:
    """How well a cost table tells the times of stacks of blocks that its fit has not seen."""
    error = f"{row['median_error']:.1%} off in the median, {row['worst_error']:.1%} at worst"
    return f"the fit to {row['stacks']} stacks of blocks is {error}, each left out in turn"
