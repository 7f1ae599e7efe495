"""Studies that were run, as docs/studies shows them: `python benchmarks/study_pages.py runs/studies/*`.

Of each run directory: its study.json goes to results/studies/NAME.json, its figures to docs/studies/NAME-FIGURE.svg,
and its tables into docs/studies/NAME.md between the two marks, or into a new page. What a page says around the tables
is written by hand and stays.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from halflap.commands.show import equal_tokens
from halflap.report import page, units
from halflap.report.artifacts import read_run
from halflap.report.study import StudyView, read_study

PAGES = Path(__file__).parent.parent / "docs" / "studies"
RESULTS = Path(__file__).parent / "results" / "studies"
BEGIN, END = "<!-- tables: benchmarks/study_pages.py -->", "<!-- end of tables -->"
NONE = "–"

Row = Mapping[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="run directories of `halflap study`")
    for path in parser.parse_args().runs:
        problems: list[str] = []
        view = read_study([read_run(path)], problems)
        if view is None or problems:
            raise SystemExit(f"{path} is no finished study{': ' + problems[0] if problems else ''}")
        found = json.loads((path / "study.json").read_text())
        RESULTS.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path / "study.json", RESULTS / f"{found['study']}.json")
        write_page(found, write_figures(view, found["study"]))


def write_figures(view: StudyView, name: str) -> list[str]:
    """Files of the figures that the study has."""
    written = []
    for kind, drawing in (("loss", view.loss), ("recovery", view.recovery), ("speed", view.tradeoff)):
        if drawing is None:
            continue
        wide = re.search(r'<div class="wide">(<svg.*?</svg>)</div>', str(drawing), re.DOTALL)
        assert wide is not None
        file = PAGES / f"{name}-{kind}.svg"
        file.write_text(standing_alone(wide[1]) + "\n")
        written.append(file.name)
    return written


def standing_alone(drawing: str) -> str:
    """A figure of the report page as a file of its own, with what the page's style sheet says of it."""
    style = (Path(page.__file__).parent / "templates" / "style.css").read_text()
    colors = style[: style.index("*, *::before")]
    rules = style[style.index("/* drawings */") :].replace(".narrow { display: none; }", "")
    rules = re.sub(r"@media[^{]*print.*", "", rules, flags=re.DOTALL)
    own = "svg { background: var(--paper); }"
    return drawing.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1).replace(
        ">", f"><style>{colors}{rules}{own}</style>", 1
    )


def write_page(found: Row, figures: Sequence[str]) -> None:
    """The tables and figures into the study's page."""
    file = PAGES / f"{found['study']}.md"
    pictures = "\n\n".join(f"![{name.removesuffix('.svg')}]({name})" for name in figures)
    tables = "\n\n".join(part for part in (claims(found), arms(found), speeds(found["arms"]), pictures) if part)
    block = f"{BEGIN}\n\n{tables}\n\n{END}"
    text = file.read_text() if file.exists() else f"# {found['study']}: {found['asks']}\n\n{BEGIN}{END}\n"
    before, rest = text.split(BEGIN)
    file.write_text(before + block + rest.split(END)[1])
    print(f"written to {file}")


def claims(found: Row) -> str:
    said = [
        (one["says"], one["measure"].replace("_", " "), one["verdict"], difference(one, signed(one["measure"])))
        for one in found["claims"]
    ]
    readings = [f"- {one['says']}." for one in found["readings"] if one.get("says")]
    return "\n\n".join(
        part for part in (table(("expected", "of", "here", "difference"), said), "\n".join(readings)) if part
    )


def arms(found: Row) -> str:
    """Sizes, losses and recall: mean and standard deviation over the seeds, and the step from the arm before."""
    rows = found["arms"]
    optional = [(name, title) for name, title in (("loss_as_cut", "as cut"), ("recall", "recall")) if name in rows[0]]
    titles = ["arm", "parameters", "loss", "step", f"to {found['baseline']}", *(title for _, title in optional)]
    if "recall" in rows[0]:
        titles.append("step in recall")
    if not (alike := equal_tokens(rows)):
        titles.insert(2, "tokens")
    body = []
    for row in rows:
        previous = f" (from {row['previous']})" if row.get("previous") else ""
        cells = [f"{row['name']}{previous}", units.count(row["parameters"]), over_seeds(row, "loss", units.loss)]
        cells += [difference(row.get(f"loss_against_{other}"), units.signed_loss) for other in ("previous", "baseline")]
        cells += [over_seeds(row, name, signless(name)) for name, _ in optional]
        if "recall" in rows[0]:
            cells.append(difference(row.get("recall_against_previous"), units.points))
        if not alike:
            cells.insert(2, units.count(row["tokens_trained"]))
        body.append(cells)
    return table(titles, body)


def speeds(rows: Sequence[Row]) -> str:
    measured = [row for row in rows if "decode_tokens_per_second" in row]
    titles = ("arm", "training, tokens/s", "prefill, tokens/s", "decode, tokens/s", "cache", "counted")
    body = [
        (
            row["name"],
            *(f"{row[f'{what}_tokens_per_second']:,.0f}" for what in ("training", "prefill", "decode")),
            units.size(row["cache_bytes"]),
            units.size(row["cache_bytes_counted"]),
        )
        for row in measured
    ]
    if not body:
        return ""
    first = measured[0]
    how = f"Speed in float32 at batch {first['batch']}, {first['prompt']} tokens read and {first['output']} decoded."
    return f"{how}\n\n{table(titles, body)}"


def over_seeds(row: Row, name: str, said: Callable[[float], str]) -> str:
    if row.get(name) is None:
        return NONE
    spread = row.get(f"{name}_spread")
    return said(row[name]) + ("" if spread is None else f" ± {said(spread)}")


def difference(one: Row | None, said: Callable[[float], str]) -> str:
    """With its 95 % interval and p-value."""
    if one is None:
        return NONE
    text = said(one["difference"])
    if one["interval"] is not None:
        low, high = map(said, one["interval"])
        text += f" ({low} to {high}; p {one['p_value']:.2g})"
    return text


def signed(measure: str) -> Callable[[float], str]:
    return units.points if measure == "recall" else units.signed_loss


def signless(measure: str) -> Callable[[float], str]:
    return units.percent if measure == "recall" else units.loss


def table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """In Markdown; nothing of no rows."""
    if not rows:
        return ""
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


if __name__ == "__main__":
    main()
