"""Name tables: which tensor of a file is which parameter of ours, checked both ways.

A row pairs a name of the file with one of ours; `{i}` is the file's layer number, and block `stride * i + offset` is
ours, because a layer of some families is two of our blocks. A table is expanded for a config through the layout, so
one dictionary serves reading and writing, and what it does not cover is an error with a list.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from halflap.errors import HalflapError
from halflap.models.config import ModelConfig
from halflap.models.layout import layout

SHOWN = 4  # names given of each list in an error


class NameRow(NamedTuple):
    """One line of a name table; `{i}` stands for the layer in `theirs` and for the block in `ours`."""

    theirs: str
    ours: str
    stride: int = 1
    offset: int = 0


def expand(config: ModelConfig, rows: Iterable[NameRow]) -> dict[str, str]:
    """Our name to the file's name for every parameter of the layout; without rows the names are ours."""
    table = tuple((re.compile(re.escape(row.ours).replace(r"\{i\}", r"(\d+)")), row) for row in rows)
    return {name: _translate(name, table) if table else name for name in layout(config)}


def _translate(name: str, table: tuple[tuple[re.Pattern[str], NameRow], ...]) -> str:
    for pattern, row in table:
        match = pattern.fullmatch(name)
        if match is None:
            continue
        if not match.groups():
            return row.theirs
        layer, rest = divmod(int(match[1]) - row.offset, row.stride)
        if rest == 0:
            return row.theirs.format(i=layer)
    raise LookupError(f"the name table has no row for {name}")


def match_tensors(
    where: str,
    expected: Mapping[str, tuple[int, ...]],
    names: Mapping[str, str],
    shapes: Mapping[str, tuple[int, ...]],
    *,
    prefixes: tuple[str, ...] = (),
    ignored: Iterable[str] = (),
) -> dict[str, str]:
    """Our name to the name in the file, for every parameter.

    expected: our names to shapes; names: ours to the file's; shapes: what the file has; prefixes: spellings of the
    first one that a file may use instead; ignored: patterns of tensors that carry nothing. One HalflapError lists what
    is missing, unknown and wrongly shaped.
    """
    ours_of = {theirs: ours for ours, theirs in names.items()}
    skip = re.compile("|".join(f"(?:{pattern})" for pattern in ignored) or r"(?!)")
    found: dict[str, str] = {}
    unknown: list[str] = []
    for name in shapes:
        ours = ours_of.get(_respell(name, prefixes))
        if ours is not None and ours not in found:
            found[ours] = name
        elif not skip.search(name):
            unknown.append(name)
    missing = [names[ours] for ours in expected if ours not in found]
    wrong = [
        f"{name} is {tuple(shapes[name])}, expected {expected[ours]}"
        for ours, name in found.items()
        if tuple(shapes[name]) != expected[ours]
    ]
    if missing or unknown or wrong:
        raise HalflapError(complaint(where, missing, unknown, wrong))
    return found


def _respell(name: str, prefixes: tuple[str, ...]) -> str:
    for prefix in prefixes[1:]:
        if name.startswith(prefix):
            return prefixes[0] + name.removeprefix(prefix)
    return name


def complaint(where: str, missing: list[str], unknown: list[str], wrong: list[str]) -> str:
    """The sentence for tensors that do not fit a config."""
    parts = [
        f"{len(items)} {what} ({', '.join(items[:SHOWN])}{', ...' if len(items) > SHOWN else ''})"
        for what, items in (("missing", missing), ("unknown", unknown), ("wrongly shaped", wrong))
        if items
    ]
    return (
        f"the tensors of {where} do not fit its config: {'; '.join(parts)}; every tensor must have its place: "
        "use the config.json that belongs to these weights, or copy the weights again"
    )
