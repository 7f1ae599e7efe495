"""The page: reads the runs, makes every section's figures and tables, fills the template, writes one file.

The file needs nothing beside it: style and drawings are inside, there is no script and no request. Its links lead to
the artifacts by relative path, so it belongs beside the runs it was made from. A section without data says which file
it would be made from.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

import halflap
from halflap.errors import HalflapError
from halflap.files import atomic_write
from halflap.report import history, plots, strips, units
from halflap.report.analysis import read_analysis
from halflap.report.artifacts import Fact, Node, RunFiles, Source, read_run
from halflap.report.importance import Importance, read_importance
from halflap.report.judgements import Judgements, read_judgements, verdict, with_parameters
from halflap.report.measures import (
    Candidate,
    Series,
    Speed,
    read_candidates,
    read_series,
    read_speed,
    rounds_of,
    swept_by,
)
from halflap.report.shapes import KINDS, Shapes, read_shapes, size_rows
from halflap.report.study import read_study
from halflap.report.svg import element
from halflap.report.tasks import read_tasks


def build(runs: Sequence[Path], out: Path) -> Path:
    """Write the report of `runs` (run directories) to `out` and return its path.

    Raises HalflapError when there is no run, or a path is no run directory.
    """
    if not runs:
        raise HalflapError(
            "no run was given to report on; give one or more run directories (the --out of finished runs)"
        )
    if out.is_dir():
        raise HalflapError(
            f"{str(out)!r} is a directory and the report is one file; give a name such as {str(out / 'report.html')!r}"
        )
    problems: list[str] = []
    sources = _with_arms([read_run(Path(run)) for run in runs], problems)
    links = Links(out.parent)
    page = _environment(links).get_template("page.html.j2").render(_context(sources, problems, links))
    with atomic_write(out, "w") as file:
        file.write(page)
    return out


@dataclass(frozen=True)
class Sources:
    """The runs that were given and those that their tables of arms point to; `curves` are (shown name, run)."""

    runs: list[RunFiles]
    curves: list[tuple[str, RunFiles]] = field(default_factory=list)


def _with_arms(runs: list[RunFiles], problems: list[str]) -> Sources:
    """Add the runs that an arms.json names; the teacher's own training is not among the curves."""
    found = Sources(list(runs))
    known = {run.path.resolve(): run for run in runs}
    named: dict[Path, str | None] = {}
    for run in runs:
        table = run.document("arms.json")
        rows = table.get("arms") if table is not None else None
        for arm in [arm for _, arm in rows.items()] if rows is not None else []:
            if (where := arm.text("run")) is None:
                continue
            path = (run.path / where).resolve()
            if path == run.path.resolve():
                continue
            if path not in known and path.is_dir():
                try:
                    known[path] = read_run(run.path / where)
                    found.runs.append(known[path])
                except HalflapError as error:
                    problems.append(str(error))
            named.setdefault(path, None if arm.text("role") == "teacher" else arm.text("name"))
    for path, run in known.items():
        name = named.get(path, run.name)
        if run.metrics and name is not None:
            found.curves.append((name, run))
    problems += [problem for run in found.runs for problem in run.problems]
    return found


class Links:
    """Numbers as links to the file they come from, relative to the page's directory."""

    def __init__(self, base: Path) -> None:
        self.base = base.resolve()

    def href(self, source: Source) -> str:
        path = quote(Path(os.path.relpath(source.path.resolve(), self.base)).as_posix())
        return f"{path}#{quote(source.pointer, safe='/~')}" if source.pointer else path

    def place(self, source: Source) -> str:
        name = Path(os.path.relpath(source.path.resolve(), self.base)).as_posix()
        return f"{name} {source.pointer}".strip()

    def number(self, fact: Fact | None, kind: str = "plain", missing: str = "not measured") -> Markup:
        """The fact in the format `kind`, linked to its first source; its title names them all."""
        if fact is None:
            return element(
                "span",
                element("span", missing, class_="hidden"),
                element("span", "–", aria_hidden="true"),
                class_="none",
            )
        text = units.FORMATS[kind](fact.value)
        places = [self.place(source) for source in fact.sources]
        title = f"computed from {'; '.join(places)}" if len(places) > 1 else "".join(places)
        href = next((self.href(source) for source in fact.sources), None)
        return element("a", text, href=href, title=title, class_="n")

    def file(self, path: Path, pointer: str = "") -> Markup:
        """A link to an artifact by its name."""
        source = Source(path, pointer)
        return element("a", self.place(Source(path)), href=self.href(source), class_="file")


def _environment(links: Links) -> Environment:
    environment = Environment(
        loader=PackageLoader("halflap.report"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    environment.filters.update(
        {
            "num": links.number,
            "formatted": lambda value, kind: units.FORMATS[kind](value),
            **{f"as_{name}": function for name, function in units.FORMATS.items()},
        }
    )
    environment.globals.update(file=links.file, kinds=KINDS)
    return environment


def _context(sources: Sources, problems: list[str], links: Links) -> dict[str, Any]:
    runs = sources.runs
    shapes = read_shapes(runs, problems)
    judgements = read_judgements(runs)
    before, after = (shapes.parameters_before, shapes.parameters_after) if shapes is not None else (None, None)
    judgements = with_parameters(judgements, before, after)
    importance = _importance(runs, problems)
    candidates = read_candidates(runs)
    study = read_study(runs, problems)
    series = [] if study is not None and study.loss is not None else read_series(sources.curves)
    teacher, topic = judgements.of("teacher"), _topic(runs)
    context = {
        "topic": topic,
        "version": halflap.__version__,
        "title": runs[0].name,
        "finished": next(
            (text[:10] for run in runs if (d := run.document("status.json")) and (text := d.text("finished"))), None
        ),
        "runs": runs,
        "shapes": shapes,
        "sizes": size_rows(shapes.teacher, shapes.student) if shapes else (),
        "judged": judgements,
        "verdict": verdict(judgements),
        "whiskers": _whiskers(judgements),
        "importance": importance,
        "importance_plots": _importance_plots(importance, shapes),
        "search_file": candidates[0].path if candidates else None,
        "candidates": candidates[1] if candidates else [],
        "agreements": any(one.agreement for one in candidates[1]) if candidates else False,
        "rounds": rounds_of(candidates[1]) if candidates else [],
        "candidates_plot": _candidates_plot(candidates, teacher and teacher.loss),
        "study": study,
        "tasks": read_tasks(runs),
        "series": series,
        "curves_plot": _curves_plot(series, divergence=False),
        "divergence_plot": _curves_plot(series, divergence=True),
        "stored": next((node for run in runs if (node := _stored(run)) is not None), None),
        "speed": read_speed(runs, *(() if topic and judgements.arms else (before, after))),
        "latency": next((node for run in runs if (node := run.document("latency.json")) is not None), None),
        "analysis": read_analysis(runs),
        "lineage": history.read_lineage(runs),
        "certificate": history.read_certificate(runs),
        "settings": history.read_settings(runs),
        "problems": problems,
    }
    return context | {"speed_card": _speed_card(context["speed"])}


def _stored(run: RunFiles) -> Node | None:
    """What a run's stored teacher logits take and lose: of `compress`, or of `distill`."""
    training, status = run.document("training.json"), run.document("status.json")
    of_arm = training.get("said", "teacher_logits") if training is not None else None
    return of_arm or (status.get("result", "teacher_logits") if status is not None else None)


def _topic(runs: Sequence[RunFiles]) -> dict[str, str] | None:
    """Title and question of a page that is not about a teacher and its student: a study, an analysis, evaluations."""
    for run in runs:
        if (study := run.document("study.json")) is not None:
            return {"title": study.text("study") or run.name, "asks": study.text("asks") or ""}
        if run.document("analysis.json") is not None and len(runs) == 1:
            return {"title": run.name, "asks": "What attention, SSM and MLP do, block by block."}
    status = [run.document("status.json") for run in runs]
    if all(document is not None and document.text("verb") == "evaluate" for document in status):
        return {"title": ", ".join(run.name for run in runs), "asks": "Held-out text and tasks."}
    return None


def _importance(runs: Sequence[RunFiles], problems: list[str]) -> Importance | None:
    for run in runs:
        if run.importance is None:
            continue
        plan = run.document("pruned/pruning_plan.json", "checkpoint/pruning_plan.json", "pruning_plan.json")
        try:
            return read_importance(run.importance, plan)
        except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
            problems.append(f"{run.name}/importance.safetensors cannot be read: {error}")
    return None


DEPTH_NAMES = {
    "kl": "KL divergence from the whole model when the block is removed",
    "loss": "loss added when the block is removed",
    "block_influence": "block influence, 1 − cosine of what goes in and out",
    "hidden_mse": "mean squared change of the final hidden state when the block is removed",
    "logit_mse": "relative squared change of the logits when the block is removed",
    "taylor": "first-order estimate of the change of the loss when the block is removed",
    "kl_rank": "mean rank within rows by KL divergence",
    "loss_rank": "mean rank within rows by added loss",
    "hidden_mse_rank": "mean rank within rows by the change of the final hidden state",
    "logit_mse_rank": "mean rank within rows by the change of the logits",
}


def _importance_plots(importance: Importance | None, shapes: Shapes | None) -> dict[str, Any]:
    """The hidden curve, a plot for each depth metric, and a strip for each row of each axis."""
    if importance is None:
        return {"hidden": None, "depth": [], "strip": None}
    dropped = set(shapes.dropped) if shapes is not None else set()
    kinds = [block.kind for block in shapes.blocks] if shapes is not None else []
    compared = shapes is not None and shapes.student is not None
    depth = []
    for metric, values in sorted(importance.depth.items(), key=lambda item: item[0] == "block_influence"):
        bars = [
            plots.DepthBar(i, kinds[i] if i < len(kinds) else "mlp", float(v), i not in dropped if compared else None)
            for i, v in enumerate(values)
        ]
        name = DEPTH_NAMES.get(metric, metric.replace("_", " "))
        depth.append(
            (
                name,
                bars,
                plots.both(
                    plots.depth_plot(bars, "KL, nats a token" if metric == "kl" else metric.replace("_", " ")),
                    wide=(760, 250),
                    narrow=(358, 230),
                ),
            )
        )
    hidden = None
    if importance.hidden is not None:
        draw = plots.hidden_plot(importance.hidden.tolist(), importance.hidden_kept)
        hidden = plots.both(draw, wide=(760, 250), narrow=(358, 230))
    return {"hidden": hidden, "depth": depth, "strip": strips.heat_strip}


def _candidates_plot(candidates: tuple[Node, Sequence[Candidate]] | None, teacher: Fact | None) -> Markup | None:
    if candidates is None:
        return None
    node, found = candidates
    points = [one.point() for one in found if one.zero_shot is not None or one.refined is not None]
    if not points:
        return None
    by, at = swept_by(node), float(teacher) if teacher is not None else None
    if by is None:
        return plots.both(plots.candidates_plot(points, at))
    return plots.both(plots.candidates_plot(points, at, by.axis, plots.tick if by.scale != 1 else None))


def _curves_plot(series: Sequence[Series], *, divergence: bool) -> Markup | None:
    """Next-token losses of all trainings, or the divergences from a teacher that distillation minimises."""
    if divergence:
        found = [one.train for one in series if one.divergence and one.train is not None]
        curves = [dataclasses.replace(curve, split="divergence") for curve in found]
        names = {one.divergence.replace("_kl", " KL") for one in series if one.divergence}
        draw = plots.curves_plot(curves, "divergence", f"{', '.join(sorted(names))}, nats a token") if curves else None
    else:
        curves = [one.train for one in series if not one.divergence and one.train is not None]
        curves += [one.held_out for one in series if one.held_out is not None]
        draw = plots.curves_plot(curves, "loss", "loss, nats a token") if curves else None
    return plots.both(draw) if draw is not None else None


def _whiskers(judgements: Judgements) -> dict[str, Any]:
    """A whisker for each arm on one axis, the axis, and whether one lies beyond it."""
    arms = [arm for arm in judgements.arms if arm.loss is not None]
    if not arms:
        return {"rows": {}, "axis": None, "beyond": False}
    span = strips.whisker_span([float(arm.loss) for arm in arms if arm.loss], [arm.bounds for arm in arms])
    rows = {}
    for arm in arms:
        assert arm.loss is not None
        text = f"{arm.name}: loss {units.loss(float(arm.loss))}"
        if arm.bounds:
            text += f", interval {units.loss(arm.bounds[0])} to {units.loss(arm.bounds[1])}"
        rows[arm.name] = strips.whisker(float(arm.loss), arm.bounds, span, text, arm.losses)
    return {
        "rows": rows,
        "axis": strips.whisker_axis(span),
        "beyond": any(float(arm.loss) > span[1] for arm in arms if arm.loss),
    }


def _speed_card(speed: Speed | None) -> dict[str, Any] | None:
    """Decode speed of the last model in the first cell that has it, and its ratio to the first model."""
    for row in speed.rows if speed is not None else ():
        fact = row.cells[-1].get("decode_tokens_per_second")
        if speed is not None and fact is not None:
            before = row.cells[0].get("decode_tokens_per_second") if len(row.cells) > 1 else None
            return {"row": row, "after": fact, "before": before, "ratio": speed.ratio(row, "decode_tokens_per_second")}
    return None
