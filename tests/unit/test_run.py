"""Run directories: finished ones are found, interrupted ones go on, others are refused by what differs."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from halflap.errors import HalflapError
from halflap.inputs import content_of_inputs, digest_inputs
from halflap.run import Run, open_run, read_metrics

SETTINGS: dict[str, Any] = {"data": ["text.txt"], "data.field": "text", "params": "50%", "fit.steps": 3, "out": None}


@pytest.fixture(autouse=True)
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("some text\n")


def begin(out: str | None = "runs/a", verb: str = "prune", overwrite: bool = False, **changes: Any) -> Run:
    settings = SETTINGS | {"out": out} | {name.replace("__", "."): value for name, value in changes.items()}
    return open_run(verb, settings, {"data": settings["data"]}, overwrite=overwrite)


def work(run: Run) -> None:
    """Leave something behind, as an interrupted verb does."""
    with run:
        (run.path / "partial").write_text("x")


def test_a_finished_run_has_all_files_and_status_comes_last() -> None:
    with begin() as run:
        run.log({"step": 1, "loss": float("nan")})
        assert not (run.path / "status.json").exists()
        run.finish({"parameters": 3, "path": Path("x"), "bad": float("inf")})
    names = {file.name for file in Path("runs/a").iterdir()}
    assert names == {"recipe.yaml", "environment.json", "inputs.json", "metrics.jsonl", "status.json"}
    status = json.loads(Path("runs/a/status.json").read_text())
    assert status["result"] == {"parameters": 3, "path": "x", "bad": None}
    assert read_metrics(Path("runs/a")) == [{"step": 1, "loss": None}]
    environment = json.loads(Path("runs/a/environment.json").read_text())
    assert environment["versions"]["halflap"] and environment["machine"]["cores"] >= 1


def test_the_same_recipe_on_the_same_inputs_finds_its_finished_run() -> None:
    with begin() as run:
        run.finish({"loss": 1.5})
    before = Path("runs/a/status.json").stat().st_mtime_ns
    with begin() as again:
        assert again.result == {"loss": 1.5}
        assert not again.resumed
    assert Path("runs/a/status.json").stat().st_mtime_ns == before


def test_work_that_is_done_anew_is_never_found_finished() -> None:
    with begin() as run:
        (run.path / "talk.json").write_text("{}")
        run.finish({"turns": 1})
    with open_run("prune", SETTINGS | {"out": "runs/a"}, {"data": SETTINGS["data"]}, anew=True) as again:
        assert again.result is None and not again.resumed
        assert not (again.path / "status.json").exists() and (again.path / "talk.json").exists()
        assert again.finish({"turns": 2}) == {"turns": 2}


def test_an_interrupted_run_goes_on() -> None:
    work(begin())
    with begin() as again:
        assert again.resumed and again.result is None
        assert (again.path / "partial").exists()
        again.finish({})
    assert json.loads(Path("runs/a/status.json").read_text())["resumed"] is True


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"params": "40%"}, 'params is "50%" there and "40%" here'),
        ({"fit__steps": 4}, "fit.steps is 3 there and 4 here"),
        ({"data__field": "body"}, "data.field"),
        ({"new": 1}, "new is not set there and 1 here"),
        ({"verb": "distill"}, "holds a run of prune, not of distill"),
    ],
)
def test_another_recipe_in_the_same_directory_is_refused_by_the_field(changes: dict[str, Any], sentence: str) -> None:
    work(begin())
    with pytest.raises(HalflapError) as error:
        begin(**changes)
    assert sentence in str(error.value) and "--overwrite" in str(error.value)
    assert Path("runs/a/partial").exists()


def test_changed_content_of_an_input_is_refused_by_its_name() -> None:
    work(begin())
    Path("text.txt").write_text("other text\n")
    with pytest.raises(HalflapError, match=r"the content of data \(text.txt\) has changed since"):
        begin()


def test_the_same_input_may_lie_elsewhere_and_gain_what_is_said_of_it() -> None:
    """A card, a certificate or scores beside a model change nothing that is read of it; its weights do."""
    Path("model").mkdir()
    Path("model/config.json").write_text("{}")
    work(begin(data=["model"]))
    shutil.copytree("model", "moved")
    for name in ("README.md", "certificate.json", "importance.safetensors"):
        Path("moved", name).write_text("said")
    Path("moved/broken").symlink_to("nowhere")
    with begin(data=["moved"]) as again:
        assert again.resumed
    Path("moved/model.safetensors").write_text("weights")
    with pytest.raises(HalflapError, match=r"the content of data \(moved\) has changed"):
        begin(data=["moved"])


@pytest.mark.parametrize("name", ["json", "quiet"])
def test_how_a_run_talks_is_no_part_of_it(name: str) -> None:
    work(begin(**{name: False}))
    with begin(**{name: True}) as again:
        assert again.resumed


def test_a_run_that_failed_before_it_did_anything_does_not_hold_its_directory() -> None:
    with begin():
        pass
    with begin(params="40%") as again:
        assert not again.resumed
    assert "40%" in Path("runs/a/recipe.yaml").read_text()


def test_overwrite_starts_again() -> None:
    work(begin())
    Path("runs/a/folder").mkdir()
    with begin(overwrite=True, params="40%") as again:
        assert not again.resumed and again.result is None
        assert not (again.path / "partial").exists() and not (again.path / "folder").exists()


def test_without_out_the_directory_is_named_by_recipe_and_inputs() -> None:
    with begin(out=None) as one:
        first = one.path
    with begin(out=None) as two:
        assert two.path == first and first.parent == Path("runs") and first.name.startswith("prune-")
    with begin(out=None, params="40%") as other:
        assert other.path != first
    Path("text.txt").write_text("other\n")
    with begin(out=None) as changed:
        assert changed.path != first


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_directory_that_is_no_run_is_never_touched(overwrite: bool) -> None:
    Path("precious").mkdir()
    Path("precious/file").write_text("x")
    with pytest.raises(HalflapError, match="holds 'file' and is not a run directory"):
        begin("precious", overwrite=overwrite)
    with pytest.raises(HalflapError, match="is or lies below a file"):
        begin("precious/file", overwrite=overwrite)
    assert Path("precious/file").read_text() == "x"


def test_an_input_inside_the_output_is_refused() -> None:
    work(begin())
    Path("runs/a/more.txt").write_text("x")
    with pytest.raises(HalflapError, match="holds the input data"):
        begin(data=["runs/a/more.txt"], overwrite=True)


def test_what_a_killed_process_was_writing_is_removed() -> None:
    work(begin())
    Path("runs/a/checkpoint").mkdir()
    for name in (".model.gguf.0a1b2c3d.tmp", "checkpoint/.model.safetensors.1-2.tmp"):
        (Path("runs/a") / name).write_text("x")
    with begin() as run:
        assert run.resumed and not list(Path("runs/a").rglob("*.tmp"))


def test_an_output_inside_a_folder_of_text_is_refused_and_inside_a_checkpoint_is_no_part_of_it() -> None:
    Path("texts").mkdir()
    Path("texts/a.txt").write_text("a")
    with pytest.raises(HalflapError, match=r"lies in the input data \('texts'\)"):
        begin("texts/runs/a", data=["texts"])
    Path("model").mkdir()
    Path("model/config.json").write_text("{}")
    with begin("model/small", data=["model"]) as run:
        run.finish({"loss": 1.5})
    with begin("model/small", data=["model"]) as again:
        assert again.result == {"loss": 1.5}


def test_a_last_line_cut_by_a_kill_is_dropped_and_repeated_steps_replace_old_rows() -> None:
    with begin() as run:
        for step in (1, 2, 3):
            run.log({"phase": "distill", "step": step, "loss": step})
        run.log({"phase": "score", "step": 9})
    with Path("runs/a/metrics.jsonl").open("a") as file:
        file.write('{"phase": "distill", "st')
    with begin() as again:
        for step in (2, 3, 4):
            again.log({"phase": "distill", "step": step, "loss": 10 * step})
    rows = read_metrics(Path("runs/a"))
    assert [(row["step"], row["loss"]) for row in rows if row["phase"] == "distill"] == [
        (1, 1),
        (2, 20),
        (3, 30),
        (4, 40),
    ]
    assert [row["step"] for row in rows if row["phase"] == "score"] == [9]


def test_a_series_that_says_where_it_resumed_keeps_its_rows_until_there() -> None:
    with begin() as run:
        for row in ({"step": 1}, {"step": 2}, {"step": 2, "held_out_loss": 1.0}, {"step": 3}):
            run.log(row)
    with begin() as again:
        again.log({"resumed_at": 2, "tokens": 20})
        again.log({"step": 3, "again": True})
    rows = read_metrics(Path("runs/a"))
    assert [row.get("step") for row in rows] == [1, 2, 2, None, 3]
    assert rows[2]["held_out_loss"] == 1.0 and rows[-1]["again"]


def test_a_verb_that_keeps_nothing_says_so() -> None:
    run = Run("inspect")
    run.log({"step": 1})
    assert run.finish({"parameters": 1}) == {"parameters": 1}
    with pytest.raises(HalflapError, match="inspect keeps no run directory here; give one with --out DIR"):
        run.path  # noqa: B018


HOLD = """
import sys, time
from halflap.run import open_run
with open_run("prune", {"out": "runs/a"}, {}) as run:
    run.log({"step": 1})
    print("holding", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder() -> Any:
    process = subprocess.Popen([sys.executable, "-c", HOLD], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "holding\n"
    yield process
    process.kill()
    process.wait()


def test_a_second_process_is_refused_by_the_first_ones_id(holder: subprocess.Popen[str]) -> None:
    with pytest.raises(HalflapError, match=f"process {holder.pid} is working in 'runs/a'"):
        open_run("prune", {"out": "runs/a"}, {})


def test_the_lock_of_a_killed_process_is_taken_over(holder: subprocess.Popen[str]) -> None:
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    assert Path("runs/a/.lock").exists()
    with open_run("prune", {"out": "runs/a"}, {}) as run:
        assert run.resumed
    assert not Path("runs/a/.lock").exists()


def test_digests_follow_content_and_large_files_are_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Path("corpus")
    folder.mkdir()
    (folder / "big.bin").write_bytes(bytes(5 * 2**20))
    (folder / "small.txt").write_text("x")
    named = {"data": ["corpus"], "model": ["nemotron-h-8b"]}
    first = digest_inputs(named)
    assert first["model"] == [{"path": "nemotron-h-8b"}]
    assert first["data"][0]["files"] == 2 and first["data"][0]["bytes"] == 5 * 2**20 + 1

    import halflap.inputs

    read: list[str] = []
    real = halflap.inputs.digest_file
    monkeypatch.setattr(halflap.inputs, "digest_file", lambda file: read.append(file.name) or real(file))
    assert digest_inputs(named) == first
    assert read == ["small.txt"]
    time.sleep(0.01)
    (folder / "big.bin").write_bytes(b"1" + bytes(5 * 2**20 - 1))
    assert content_of_inputs(digest_inputs(named)) != content_of_inputs(first)


def test_of_a_run_directory_the_checkpoint_is_the_input() -> None:
    checkpoint = Path("teacher/checkpoint")
    checkpoint.mkdir(parents=True)
    (checkpoint / "config.json").write_text("{}")
    first = content_of_inputs(digest_inputs({"model": ["teacher"]}))
    Path("teacher/status.json").write_text("{}")
    assert content_of_inputs(digest_inputs({"model": ["teacher"]})) == first
