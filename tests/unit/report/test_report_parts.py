"""Arms, units, ticks, kept masks and figures by themselves."""

from __future__ import annotations

import io
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from halflap.commands.show_compress import search as show_search
from halflap.errors import HalflapError
from halflap.report import plots, strips, units
from halflap.report.arms import Arm, Arms, across_seeds, arms_markdown
from halflap.report.artifacts import Node, Source, read_run
from halflap.report.importance import read_importance
from halflap.report.judgements import read_judgements, verdict
from halflap.report.measures import read_candidates, read_series, read_speed
from halflap.report.page import build
from halflap.report.shapes import read_shapes
from halflap.report.svg import Scale, element, log_ticks, padded, ticks

FINITE = st.floats(-1e12, 1e12, allow_nan=False)


# ---- artifacts


def test_a_node_names_its_place() -> None:
    node = Node(Path("a.json"), {"x/y": [{"v": 2.5}], "n": None, "bad": float("nan")})
    found = node.fact("x/y", 0, "v")
    assert found is not None and found.value == 2.5
    assert found.sources == (Source(Path("a.json"), "/x~1y/0/v"),)
    assert (
        node.fact("n") is None
        and node.fact("bad") is None
        and node.fact("x/y") is None
        and node.fact("x/y", 7, "v") is None
    )


# ---- arms


def arms(loss: float, seed: int) -> Arms:
    rows = (
        Arm("teacher", 100, 3.0, role="teacher"),
        Arm("student", 50, loss, (loss - 0.1, loss + 0.1), 1.2, 30.0, 1000, 9.0, role="student"),
    )
    return Arms(rows, (seed,), "text")


def test_arms_come_back_as_they_were_saved(tmp_path: Path) -> None:
    table = arms(3.5, 1)
    table.save(tmp_path / "arms.json")
    assert Arms.load(tmp_path / "arms.json") == table
    assert {"arms", "seeds"} <= set(json.loads((tmp_path / "arms.json").read_text()))


@pytest.mark.parametrize(
    "content", ['{"arms": [{"name": "x"}]}', '{"arms": [3]}', '{"arms": [{"name": "x", "loss_ci": 4}]}', "{"]
)
def test_a_bad_table_of_arms_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "arms.json").write_text(content)
    with pytest.raises(HalflapError, match=r"arms\.json.*Arms\.save"):
        Arms.load(tmp_path / "arms.json")


def test_across_seeds_is_mean_and_range() -> None:
    table = across_seeds([arms(3.5, 1), arms(3.7, 2), arms(3.6, 3)])
    student = table.arms[1]
    assert student.loss == pytest.approx(3.6) and student.loss_ci == (3.5, 3.7) and student.losses == (3.5, 3.7, 3.6)
    assert table.seeds == (1, 2, 3) and table.interval == "range over 3 seeds"
    with pytest.raises(HalflapError, match="different arms"):
        across_seeds([arms(3.5, 1), Arms(arms(3.5, 1).arms[:1])])


def test_arms_as_markdown() -> None:
    text = arms_markdown(across_seeds([arms(3.5, 1), arms(3.7, 2)]))
    lines = text.splitlines()
    assert lines[3] == "| **student** | 50 | 1,000 |  | 3.600 | 3.500 to 3.700 | 1.200 | 30.00 |"
    assert "range over 2 seeds" in lines[-1] and "Seeds 1, 2." in lines[-1]
    assert len({line.count("|") for line in lines[:4]}) == 1


# ---- what the run says


def test_verdict_of_the_demo(demo: Path) -> None:
    said = verdict(read_judgements([read_run(demo)]))
    assert said.difference is not None and said.difference.value == pytest.approx(0.219) and said.apart is True
    assert said.closed is not None and said.closed.value == pytest.approx(1 - 0.219 / 2.075)
    assert [arm.name for arm in said.beaten] == ["from scratch", "group-blind", "random ranking"]
    assert not said.tied and not said.better


def test_shapes_follow_the_plan(compress_run: Path) -> None:
    shapes = read_shapes([read_run(compress_run)], [])
    assert shapes is not None and shapes.dropped == [13, 21]
    kept = sum(block.parameters_after for block in shapes.blocks)
    assert (
        shapes.parameters_after is not None
        and 0 < kept < shapes.parameters_after.value < shapes.parameters_before.value
    )
    assert all(0 < block.share < 1 for block in shapes.blocks if block.after is not None)


def test_kept_masks_are_the_plans(compress_run: Path) -> None:
    run = read_run(compress_run)
    plan = run.document("pruned/pruning_plan.json")
    assert plan is not None
    importance = read_importance(compress_run / "importance.safetensors", plan)
    axes = {axis.name: axis for axis in importance.axes}
    assert importance.hidden_kept == 288 and axes["Mamba heads"].cut and not axes["Query heads"].cut
    for row in axes["Mamba heads"].rows:
        assert row.kept is not None
        table = plan.value["keep"].get(f"blocks.{row.block}.head")
        expected = [sorted(r) for r in table] if row.block in plan.value["keep_blocks"] else [[]] * 4
        assert [[i for i, kept in enumerate(group) if kept] for group in row.kept] == expected
    for row in axes["MLP neurons"].rows:
        assert row.kept is not None and row.left == (0 if row.block == 21 else 1024)
        assert list(row.cells[0]) == sorted(row.cells[0], reverse=True)
        assert list(row.kept[0]) == sorted(row.kept[0], reverse=True), "the best are kept"


def test_importance_without_a_plan_marks_nothing(compress_run: Path) -> None:
    importance = read_importance(compress_run / "importance.safetensors", None)
    assert importance.hidden_kept is None
    assert all(row.kept is None and row.left is None for axis in importance.axes for row in axis.rows)


def test_candidates_and_speed(compress_run: Path) -> None:
    run = read_run(compress_run)
    found = read_candidates([run])
    assert found is not None and [c.chosen for c in found[1]] == [True] + [False] * 10
    assert found[1][0].sizes.startswith("24 blocks, 320 hidden")
    speed = read_speed([run])
    assert speed is not None and speed.models == ("teacher", "student") and len(speed.rows) == 2
    ratio = speed.ratio(speed.rows[0], "decode_tokens_per_second")
    assert ratio is not None and ratio.value == pytest.approx(262 / 150) and len(ratio.sources) == 2


def test_agreement_and_rounds_are_shown(compress_run: Path, tmp_path: Path) -> None:
    result = json.loads((compress_run / "search.json").read_text())
    for row in result["candidates"]:
        row |= {"accuracy": None, "agreement": None, "rounds": [], "variants": []}
    for place, row in enumerate(result["candidates"][:4]):
        row |= {"accuracy": 0.25, "agreement": 0.625}
        row["rounds"] = [{"tokens": 2_000_000, "loss": 4.5}, {"tokens": 4_000_000, "loss": 4.25}][: 2 - place // 2]
    result["candidates"][0]["variants"] = ["whole", "intermediate_size 192", "dropped", "whole"]
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "search.json").write_text(json.dumps(result))
    page = build([tmp_path / "run"], tmp_path / "page.html").read_text()
    text = " ".join(re.sub("<[^>]*>", " ", page.replace("\N{NO-BREAK SPACE}", " ")).split())
    assert "25.0 %" in text and "62.5 %" in text and "4.500 → 4.250" in text
    assert "4 candidates to 2.00 M tokens, 2 candidates to 4.00 M tokens" in text
    console = Console(file=io.StringIO(), width=200)
    show_search(result | {"path": "search.json", "pattern": "M-M*"}, console)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "agreement" in shown and "62.5 %" in shown and "after 4 M" in shown
    assert "2 blocks whole; 1 blocks intermediate size 192; 1 blocks dropped" in text
    assert "M~.*  M 1 whole, 1 dropped; - 1 neurons 192; * 1 whole" in shown
    assert "short distillation: 4 to 2 M, 2 to 4 M tokens each, 12 M in all" in shown


def test_series_are_told_apart_by_their_words(tmp_path: Path) -> None:
    rows = [{"step": i, "tokens": 10 * i, "loss": 5.0 - i, "arm": arm} for i in (1, 2) for arm in ("a", "b")]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    series = read_series([("run", read_run(tmp_path))])
    assert [one.name for one in series] == ["a", "b"]
    assert all(one.train and one.train.points == ((10.0, 4.0), (20.0, 3.0)) and one.held_out is None for one in series)


def test_a_divergence_is_not_taken_for_a_loss(compress_run: Path) -> None:
    (one,) = read_series([("run", read_run(compress_run))])
    assert one.divergence == "forward_kl" and one.last_held_out is not None and one.last_held_out.value < 3.5
    rows = [{"tokens": 10 * i, "loss": 3.0, "phase": "text"} for i in (1, 2)]
    (compress_run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read_series([("run", read_run(compress_run))]) == [], "an evaluation is no training"


# ---- numbers as text


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("count", 950, "950"),
        ("count", 31_457_280, "31.5 M"),
        ("count", 8_100_000_000, "8.10 B"),
        ("size", 1536, "1.50 KiB"),
        ("size", 512, "512 B"),
        ("seconds", 0.42, "0.42 s"),
        ("seconds", 185, "3 min 5 s"),
        ("seconds", 7620, "2 h 7 min"),
        ("loss", 3.2431, "3.243"),
        ("signed_loss", 0.2, "+0.200"),
        ("signed_loss", -0.2, "−0.200"),
        ("percent", 0.4984, "49.8 %"),
        ("times", 1.7467, "1.75×"),
        ("rate", 2600.4, "2,600 tok/s"),
        ("error", 3.4e-13, "3.4e−13"),
        ("error", 0, "0"),
        ("digest", "sha256:0123456789abcdef", "0123456789ab"),
        ("plain", True, "yes"),
        ("plain", 0.21234, "0.2123"),
    ],
)
def test_units(name: str, value: Any, text: str) -> None:
    assert units.FORMATS[name](value).replace(units.SPACE, " ") == text


@given(
    st.one_of(FINITE, st.floats()),
    st.sampled_from(["count", "size", "loss", "perplexity", "percent", "times", "plain"]),
)
@settings(max_examples=80)
def test_every_number_has_a_text(value: float, name: str) -> None:
    if math.isfinite(value) or name in ("loss", "perplexity", "plain"):
        assert units.FORMATS[name](value)


# ---- drawing


@given(FINITE, st.floats(1e-6, 1e9), st.integers(2, 8))
@settings(max_examples=80)
def test_ticks_are_inside_and_about_as_many_as_wanted(low: float, width: float, wanted: int) -> None:
    high = low + width
    if not high > low or width < abs(low) * 1e-9:
        return
    found = ticks(low, high, wanted)
    slack = width * 1e-6 + abs(low) * 1e-9
    assert 0 < len(found) <= 2 * wanted + 1
    assert all(low - slack <= value <= high + slack for value in found)


def test_log_ticks_and_scales() -> None:
    assert log_ticks(0.006, 2.0) == pytest.approx([0.01, 0.03, 0.1, 0.3, 1.0])
    assert Scale(1, 100, 0, 10, log=True)(10) == pytest.approx(5)
    assert Scale(2, 2, 0, 10)(2) == 5
    assert padded([]) == (0.0, 1.0) and padded([3.0])[0] < 3 < padded([3.0])[1]


def test_elements_escape() -> None:
    assert element("text", "a<b&c", class_='x"y', viewBox="0 0 1 1", stroke_width=2.0) == (
        '<text class="x&#34;y" viewBox="0 0 1 1" stroke-width="2">a&lt;b&amp;c</text>'
    )


def numbers_of(drawing: str) -> list[float]:
    return [float(text) for text in re.findall(r'(?:cx|cy|x|y|x1|x2|y1|y2)="(-?[\d.]+)"', drawing)]


@pytest.mark.parametrize("losses", [[3.5], [3.5, 3.5], [9.0, 3.1], [40.0, 3.1, 3.2]])
def test_candidates_stay_inside_the_picture(losses: list[float]) -> None:
    points = [plots.CandidatePoint(str(i), 1e6 * (i + 1), loss, loss / 2, i == 0, "") for i, loss in enumerate(losses)]
    for width, height in (plots.WIDE, plots.NARROW):
        drawing = plots.candidates_plot(points, 1.4)(width, height)
        assert "nan" not in drawing and all(-1 <= value <= max(width, height) + 30 for value in numbers_of(drawing))


def test_plots_of_little_data_are_drawn() -> None:
    one = plots.Curve("r", "held-out", ((5.0, 3.0), (5.0, 3.0)))
    assert "polyline" in plots.curves_plot([one], "x", "loss")(*plots.WIDE)
    bars = [plots.DepthBar(0, "mlp", 0.0, None), plots.DepthBar(1, "mamba2", 0.0, False)]
    assert "nan" not in plots.depth_plot(bars, "kl")(*plots.NARROW)
    assert "nan" not in plots.hidden_plot([0.0, 0.0], 1)(*plots.WIDE)
    assert "<svg" in strips.heat_strip([[0.0, 0.0]], None, "none")


def test_thinned_keeps_the_last_point_and_the_mean() -> None:
    points = [(float(i), float(np.sin(i))) for i in range(1001)]
    thin = plots.thinned(points, 100)
    assert len(thin) <= 100 and thin[-1] == points[-1] and thin == tuple(sorted(thin))


def test_a_far_arm_leaves_the_axis_to_the_others() -> None:
    losses = [3.2, 3.5, 3.6, 3.7, 4.0, 9.0]
    low, high = strips.whisker_span(losses, [None] * 6)
    assert low < 3.2 and 4.0 < high < 4.3
    assert 'class="arrow"' in strips.whisker(9.0, None, (low, high), "far")
    near = strips.whisker(3.5, (3.4, 3.6), (low, high), "near", (3.45, 3.55))
    assert 'class="arrow"' not in near
    assert all(0 <= float(share) <= 100 for share in re.findall(r'"([\d.]+)%"', near))
