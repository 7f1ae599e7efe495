"""A study killed, changed under way or spread over machines ends as one that nothing happened to, or says no."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from halflap.commands.study_file import read_study
from halflap.errors import HalflapError
from halflap.parallel import fanout

TEXT = Path(__file__).resolve().parents[2] / "demo" / "text" / "validation.jsonl.xz"
STUDY = {
    "study": "tiny",
    "baseline": "attention",
    "vocab_size": 300,
    "tokens": "1k",
    "seeds": [0, 1],
    "base": {
        "hidden_size": 16,
        "repeat": 2,
        "max_position_embeddings": 64,
        "blocks": {
            "*": {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8},
            "M": {"num_heads": 4, "head_dim": 8, "num_groups": 2, "state_size": 4},
            "-": {"intermediate_size": 128},
        },
    },
    "arms": {"attention": {"pattern": "*-"}, "mamba": {"pattern": "M-"}, "both": {"pattern": "M*-"}},
    "fit": {"sequence_length": 32, "batch_size": 2, "save_every": 1},
    "speed": {"prompt": [8], "output": [2]},
}
Cli = Callable[..., Any]


def write(place: Path, **changes: Any) -> Path:
    file = place / "study.yaml"
    file.write_text(json.dumps(STUDY | changes))  # JSON is YAML
    return file


def words(file: Path, out: Path, data: Path = TEXT) -> list[str]:
    return ["study", str(file), "--data", str(data), "--eval-tokens", "300", "--out", str(out), "--json"]


def losses(result: dict[str, Any]) -> list[list[float]]:
    return [row["loss_by_seed"] for row in result["arms"]]


def test_a_killed_study_goes_on_and_ends_the_same(halflap: Cli, tmp_path: Path) -> None:
    file, out = write(tmp_path), tmp_path / "killed"
    process = subprocess.Popen([sys.executable, "-m", "halflap", *words(file, out)], stdout=subprocess.DEVNULL)
    training = out / "arms" / "mamba" / "seed-0" / "training"
    while not (training.is_dir() and len(os.listdir(training)) > 1) and process.poll() is None:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and not (out / "study.json").exists()
    done, begun = (out / "arms" / arm / "seed-0" for arm in ("attention", "mamba"))
    assert (done / "result.json").exists() and (begun / "training").exists()
    written = (done / "result.json").stat().st_mtime_ns
    gone_on = halflap(*words(file, out)).json
    assert (done / "result.json").stat().st_mtime_ns == written  # what is done is passed over
    assert losses(gone_on) == losses(halflap(*words(file, tmp_path / "whole")).json)


def test_steps_are_measured_from_the_arm_above_or_the_one_named(halflap: Cli, tmp_path: Path) -> None:
    arms = {**STUDY["arms"], "both": {"pattern": "M*-", "against": "attention"}}  # type: ignore[dict-item]
    file = write(tmp_path, arms=arms, tokens="300")
    assert read_study(str(file), "smoke").against == {"mamba": "attention", "both": "attention"}
    rows = halflap(*words(file, tmp_path / "run")).json["arms"]
    assert [row["previous"] for row in rows] == [None, "attention", "attention"]
    assert rows[2]["loss_against_previous"] == rows[2]["loss_against_baseline"]
    assert "loss_against_previous" not in rows[0] and rows[0]["runs"] == [f"arms/attention/seed-{n}" for n in (0, 1)]
    with pytest.raises(HalflapError, match="'bot' is not a reference for arm 'mamba' that exists; did you mean 'both'"):
        read_study(str(write(tmp_path, arms=arms | {"mamba": {"against": "bot"}})), "smoke")


def test_what_changes_half_way_is_refused(halflap: Cli, tmp_path: Path) -> None:
    data, out = tmp_path / "text.jsonl", tmp_path / "run"
    rows = [json.dumps({"text": f"Number {n} is followed by {n + 1}, as ever. " * 4}) for n in range(200)]
    data.write_text("\n".join(rows))
    file = write(tmp_path, tokens="300", seeds=[0])
    halflap(*words(file, out, data)).json  # noqa: B018
    (out / "status.json").unlink()
    (out / "arms" / "both" / "seed-0" / "result.json").unlink()
    write(tmp_path, tokens="400", seeds=[0])
    said = halflap(*words(file, out, data))
    assert said.status == 1 and "holds another run: the content of study" in said.err
    write(tmp_path, tokens="300", seeds=[0])
    data.write_text("\n".join(rows[1:]))
    said = halflap(*words(file, out, data))
    assert said.status == 1 and "the content of data" in said.err and "--overwrite to start again" in said.err
    data.write_text("\n".join(rows))
    begun = out / "arms" / "mamba" / "seed-0" / "task.json"
    begun.write_text(json.dumps(json.loads(begun.read_text()) | {"text": ["other"], "tokens": 5}))
    said = halflap(*words(file, out, data))
    assert said.status == 1 and "arm 'mamba' with seed 0 was begun" in said.err
    assert "another text and another tokens" in said.err


def test_a_cluster_needs_ray(monkeypatch: pytest.MonkeyPatch, halflap: Cli, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    said = halflap(*words(write(tmp_path), tmp_path / "run"), "--ray", "auto")
    assert said.status == 1 and "pip install 'halflap[cluster]'" in said.err
    assert not (tmp_path / "run" / "corpus").exists()


@pytest.mark.slow
def test_a_cluster_gives_the_same(halflap: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Relative paths too: workers stand elsewhere."""
    pytest.importorskip("ray", reason="ray is not installed; pip install 'halflap[cluster]'")
    arms = {name: STUDY["arms"][name] for name in ("attention", "mamba")}  # type: ignore[index]
    file = write(tmp_path, arms=arms, tokens="300")
    monkeypatch.chdir(tmp_path)
    here = halflap(*words(file, Path("here"))).json
    assert losses(halflap(*words(file, Path("cluster")), "--ray", "local").json) == losses(here)
    with pytest.raises(HalflapError, match="64 cores and 0 GPUs, and the largest of 1 nodes"):
        fanout.map(abs, [1], cluster=fanout.Cluster("local", cpus=64))
    with pytest.raises(ValueError, match="invalid literal"):
        fanout.map(int, ["x"], cluster=fanout.Cluster("local"))
    with pytest.raises(HalflapError, match="no Ray cluster answers at"):
        fanout.map(abs, [1], cluster=fanout.Cluster("127.0.0.1:1"))
