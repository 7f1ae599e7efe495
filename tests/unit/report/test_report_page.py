"""The page of a fabricated demo: complete, self-contained, every number where its link says, honest in its words."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest

from halflap.errors import HalflapError
from halflap.report.page import build

SECTIONS = ("shape", "arms", "loss", "candidates", "importance", "speed", "lineage", "settings")
VOID = {"meta", "link", "br", "img", "input", "hr"}


class Page(HTMLParser):
    """Links, sections and ids of a page; closing tags must match."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[tuple[dict[str, str | None], str]] = []
        self.sections: dict[str, str] = {}
        self.ids: list[str] = []
        self.open: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        named = dict(attrs)
        if named.get("id"):
            self.ids.append(str(named["id"]))
        if tag not in VOID:
            self.open.append((tag, named))
        if tag == "a":
            self.links.append((named, ""))

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        del tag, attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open[-1][0] == tag, (tag, self.open[-3:])
        self.open.pop()

    def handle_data(self, data: str) -> None:
        for tag, named in self.open:
            if tag == "section":
                name = str(named["id"])
                self.sections[name] = self.sections.get(name, "") + data
        if self.open and self.open[-1][0] == "a":
            named, text = self.links[-1]
            self.links[-1] = (named, text + data)


def made(path: Path, *runs: Path) -> tuple[str, Page]:
    out = build(list(runs) or [path], path / "report.html")
    text = out.read_text(encoding="utf-8")
    return text, Page(text)


def at_pointer(base: Path, href: str) -> Any:
    """What stands where a link points."""
    name, _, pointer = href.partition("#")
    file = base / unquote(name)
    assert file.is_file(), href
    pointer = unquote(pointer)
    if file.suffix == ".jsonl":
        number, _, pointer = pointer.removeprefix("line ").partition(" ")
        value = json.loads(file.read_text().splitlines()[int(number) - 1])
    elif file.suffix == ".json":
        value = json.loads(file.read_text())
    else:
        return None
    for key in pointer.split("/")[1:]:
        key = key.replace("~1", "/").replace("~0", "~")
        value = value[int(key)] if isinstance(value, list) else value[key]
    return value


def test_page_is_one_small_file_without_requests_or_scripts(demo: Path) -> None:
    text, page = made(demo)
    assert len(text.encode()) < 1_000_000
    assert "<script" not in text and "@import" not in text and "url(" not in text.replace("url(#", "")
    assert not re.findall(r'(?:src|href)="(?:https?:)?//', text)
    assert len(page.ids) == len(set(page.ids))
    assert set(SECTIONS) <= set(page.ids)
    assert all("No data" not in words for words in page.sections.values())


def test_every_number_stands_where_its_link_says(demo: Path) -> None:
    _, page = made(demo)
    numbers = [(named, text) for named, text in page.links if named.get("class") == "n"]
    assert len(numbers) > 150
    checked = 0
    for named, text in numbers:
        value = at_pointer(demo, str(named["href"]))
        computed = str(named["title"]).startswith("computed from")
        if isinstance(value, float) and not computed and re.fullmatch(r"\d+\.\d{3}", text):
            assert f"{value:.3f}" == text, named
            checked += 1
    assert checked > 50


def test_page_is_the_same_from_the_same_files(demo: Path) -> None:
    assert made(demo)[0] == made(demo)[0]


def test_page_beside_another_directory_links_relatively(demo: Path, tmp_path: Path) -> None:
    out = build([demo], tmp_path / "pages" / "deep" / "page.html")
    page = Page(out.read_text(encoding="utf-8"))
    for named, _ in page.links:
        if named.get("class") in ("n", "file"):
            at_pointer(out.parent, str(named["href"]))
            assert str(named["href"]).startswith("../../demo/")


def test_a_compress_run_alone_is_enough(compress_run: Path) -> None:
    text, page = made(compress_run)
    assert all("No data" not in words for words in page.sections.values())
    assert "0.219 above" in re.sub(r"<[^>]*>", "", text)
    assert "pruned + distilled" in page.sections["arms"] and "95 % bootstrap over documents" in page.sections["arms"]


def test_missing_artifacts_leave_a_section_that_says_so(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("")
    text, page = made(tmp_path)
    for name in SECTIONS:
        assert "No data" in page.sections[name], name
    assert "nothing is claimed here about quality" in text


@pytest.mark.parametrize(
    "content", ["{}", "[]", "null", "3", '{"candidates": 1, "rows": {}, "teacher": 4, "arms": [{}]}', "{"]
)
def test_odd_artifacts_never_stop_the_page(compress_run: Path, content: str) -> None:
    names = ("status.json", "search.json", "scores.json", "bench.json", "arms.json", "inputs.json")
    for name in names:
        (compress_run / name).write_text(content)
    text, _ = made(compress_run)
    assert all((f"half/{name} cannot be read" in text) == (content == "{") for name in names)


def test_a_damaged_importance_and_a_cut_line_are_named(compress_run: Path) -> None:
    (compress_run / "importance.safetensors").write_bytes(b"\x00" * 40)
    with (compress_run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 999, "lo')
    text, page = made(compress_run)
    assert "importance.safetensors cannot be read" in text
    assert "metrics.jsonl line 253 is not JSON" in text
    assert "No data" in page.sections["importance"]


@pytest.mark.parametrize("make", ["missing", "file", "folder"])
def test_what_is_no_run_directory_is_refused(tmp_path: Path, make: str) -> None:
    path = tmp_path / "thing"
    if make == "file":
        path.write_text("x")
    if make == "folder":
        path.mkdir()
    with pytest.raises(HalflapError, match=r"thing.*run director"):
        build([path], tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


def test_no_runs_or_a_directory_as_target_are_refused(compress_run: Path) -> None:
    with pytest.raises(HalflapError, match="no run was given"):
        build([], compress_run / "page.html")
    with pytest.raises(HalflapError, match="is a directory"):
        build([compress_run], compress_run)


def test_names_are_escaped(tmp_path: Path) -> None:
    run = tmp_path / "<b>run & co"
    run.mkdir()
    (run / "recipe.yaml").write_text("note: </pre><script>alert(1)</script>")
    text, _ = made(run)
    assert "<script" not in text and "<b>run" not in text and "&lt;b&gt;run &amp; co" in text


def words(path: Path) -> str:
    text = re.sub(r"<[^>]*>", "", made(path)[0]).replace("\N{NO-BREAK SPACE}", " ")
    return " ".join(text[text.index("halflap report") :].split())


def change_loss(demo: Path, name: str, loss: float) -> None:
    table = json.loads((demo / "arms.json").read_text())
    for arm in table["arms"]:
        if arm["name"] == name:
            arm["loss"], arm["loss_ci"] = loss, [loss - 0.02, loss + 0.02]
    (demo / "arms.json").write_text(json.dumps(table))


def test_headline_says_when_intervals_overlap(demo: Path) -> None:
    assert "the intervals do not overlap" in words(demo)
    change_loss(demo, "pruned + distilled", 3.25)
    assert "the intervals overlap, so this text cannot tell them apart" in words(demo)


def test_headline_admits_a_control_that_is_better_or_as_good(demo: Path) -> None:
    assert "better than from scratch (4.027), group-blind (3.571) and random ranking (3.694)." in words(demo)
    change_loss(demo, "random ranking", 3.3)
    change_loss(demo, "group-blind", 3.47)
    said = words(demo)
    assert (
        "it is better than from scratch (4.027); not distinguishable from group-blind (3.470); but worse than random"
        in said
    )


def test_headline_says_when_the_student_is_better_than_its_teacher(demo: Path) -> None:
    change_loss(demo, "pruned + distilled", 3.1)
    assert "−0.143 from its teacher" in words(demo)


def test_failed_certificate_is_not_hidden(compress_run: Path) -> None:
    file = compress_run / "pruned" / "certificate.json"
    certificate = json.loads(file.read_text())
    file.write_text(json.dumps(certificate | {"passed": False, "exact_max_abs_error": 0.65}))
    said = words(compress_run)
    assert "✗ failed" in said and "it differs from its masked teacher: logits within 0.65" in said


def test_report_loads_no_torch() -> None:
    code = "import sys, halflap.report.page; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_command_line(halflap: Any, demo: Path, tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    assert halflap("report", demo, "--out", out, "--json").json == {"path": str(out)}
    assert out.is_file()
    assert halflap("report", demo, "--json").json == {"path": str(demo / "report.html")}
    assert halflap("report").status == 2
    other = tmp_path / "other"
    other.mkdir()
    assert halflap("report", other).status == 1
