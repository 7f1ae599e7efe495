"""A study whose arms are cut from a teacher: what a file may say, and a run with every kind of arm, interrupted."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from halflap.checkpoints.config import read_config
from halflap.commands import study_students, teaching, timing
from halflap.commands.study_file import read_study
from halflap.compress.cost_model import Condition
from halflap.errors import HalflapError
from halflap.models.config import ModelConfig
from halflap.models.count import count_non_embedding_parameters

ARMS = {
    "heads": {"sizes": {"mamba_num_heads": 8}},
    "blind": {"control": "group_blind", "of": "heads"},
    "channels": {"match": {"latency": "heads"}, "space": {"mamba_head_dim": [14, 12, 10, 8, 6]}, "against": "heads"},
    "scratch": {"control": "scratch", "of": "heads", "tokens": 600, "fit": {"learning_rate": 0.003}},
}
STUDY = {
    "study": "tiny",
    "asks": "Which?",
    "teacher": "nowhere",
    "baseline": "heads",
    "tokens": 300,
    "seeds": [0, 1],
    "eval_tokens": 300,
    "base": {
        "calibration_tokens": 128, "depth_metric": "block_influence", "top_k": 16, "score_tokens": 64, "shortlist": 1,
        "phase": "prefill", "context": 64, "space": {"max_width_cut": 0, "max_depth_cut": 0},
    },
    "arms": ARMS,
    "fit": {"sequence_length": 32, "batch_size": 4, "evaluate_every": 1},
    "claims": [{"says": "Groups kept are better", "lower": "heads", "higher": "blind", "measure": "loss_as_cut"}],
    "readings": {
        "tokens_to_reach": {"arm": "heads", "by": ["scratch"]},
        "rank_correlation": {"arms": ["heads", "blind", "channels"]},
    },
}  # fmt: skip
Cli = Callable[..., Any]


def write(place: Path, **changes: Any) -> Path:
    file = place / "study.yaml"
    file.write_text(json.dumps(STUDY | changes))  # JSON is YAML
    return file


def made_up_seconds(config: ModelConfig, condition: Condition, *_: Any) -> float:
    return 1e-3 + 1e-8 * condition.tokens * count_non_embedding_parameters(config)


@pytest.fixture(autouse=True)
def device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "seconds_of", made_up_seconds)


@pytest.fixture
def place(teacher_place: Path) -> Path:
    return teacher_place


def with_other_threads(work: Callable[[Any], None]) -> Callable[[Any], None]:
    """As a worker has fewer than the study, which has timed the blocks."""

    def share(item: Any) -> None:
        threads = torch.get_num_threads()
        torch.set_num_threads(threads + 1)
        try:
            work(item)
        finally:
            torch.set_num_threads(threads)

    return share


def words(file: Path, place: Path, out: Path) -> tuple[object, ...]:
    given = ("--teacher", place / "teacher", "--data", place / "text.jsonl", "--data.held-out", 0.2)
    return ("study", file, *given, "--out", out, "--json")


def test_arms_share_their_work_and_an_interrupted_study_ends_the_same(
    halflap: Cli, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, out, teach, calls = write(tmp_path), tmp_path / "run", teaching.distill_into, []
    monkeypatch.setattr(study_students, "cut_and_judge", with_other_threads(study_students.cut_and_judge))

    def interrupted(*rest: Any, **more: Any) -> Any:
        calls.append(1)
        if len(calls) == 4:  # the third student, or a control, of four
            raise KeyboardInterrupt
        return teach(*rest, **more)

    with monkeypatch.context() as patch:
        patch.setattr(teaching, "distill_into", interrupted)
        assert halflap(*words(file, place, out)).status == 130
    kept = {path: path.stat().st_mtime_ns for path in (*out.glob("scores/*/*.safetensors"), *out.glob("teacher.json"))}
    result = halflap(*words(file, place, out)).json
    assert len(kept) == 3 and all(path.stat().st_mtime_ns == written for path, written in kept.items())
    whole = halflap(*words(file, place, tmp_path / "whole")).json
    assert [row["loss_by_seed"] for row in result["arms"]] == [row["loss_by_seed"] for row in whole["arms"]]
    assert result["claims"] == whole["claims"] and result["readings"] == whole["readings"]

    rows = {row["name"]: row for row in result["arms"]}
    student = json.loads((out / "arms" / "heads" / "seed-1" / "status.json").read_text())["result"]["student"]
    fresh = json.loads((out / "arms" / "scratch" / "seed-1" / "result.json").read_text())
    assert {judged["context"] for judged in (result["teacher"], student, fresh)} == {32}
    assert list(rows) == list(ARMS) and "loss_against_baseline" not in rows["heads"]
    assert rows["heads"]["parameters"] == rows["blind"]["parameters"] == rows["scratch"]["parameters"]
    assert rows["blind"]["loss_as_cut_by_seed"] != rows["heads"]["loss_as_cut_by_seed"]
    assert "loss_as_cut" not in rows["scratch"] and rows["scratch"]["tokens_trained"] > rows["heads"]["tokens_trained"]
    assert 0.95 <= rows["channels"]["latency_seconds"] / rows["heads"]["latency_seconds"] <= 1.0001
    assert [one["name"] for one in result["readings"]] == ["tokens_to_reach", "rank_correlation", "matched"]
    assert result["claims"][0]["verdict"] in ("holds", "reversed", "open")
    run = out / "arms" / "heads" / "seed-1"
    assert read_config(run) == read_config(out / "arms" / "scratch" / "seed-1")
    assert not [*out.glob("arms/**/latency.json")], "a student was timed beside others"
    assert not (run / "training").exists() and len(list((out / "teacher-logits").iterdir())) == 2

    shown = halflap(*words(file, place, out)[:-1]).out
    assert "Groups kept are better (loss_as_cut" in shown and "the teacher's is" in shown and "as cut" in shown
    assert " tokens " in shown.splitlines()[1] and "seeds of" not in shown  # one arm reads more than the others
    page = (out / "report.html").read_text()
    assert 'id="readings"' in page and "Groups kept are better" in page and "held-out loss, nats a token" in page


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"arms": {"heads": {"prams": "50%"}}},
            "arm 'heads': 'prams' is not a field that exists; did you mean 'params'",
        ),
        (
            {"arms": {"heads": {"metric": "actvation"}}},
            "arm 'heads': .*metric is 'actvation'.*did you mean 'activation'",
        ),
        ({"arms": {"heads": {"seed": 3}}}, "arm 'heads': seed is not for one arm to set"),
        ({"arms": {"heads": {"eval_context": 60}}}, "arm 'heads': eval_context is not for one arm to set"),
        ({"arms": {"heads": {"eval_tokens": 60}}}, "arm 'heads': eval_tokens is not for one arm to set"),
        ({"base": {"eval_tokens": 60}}, "base has eval_tokens"),
        ({"arms": ARMS | {"blind": {"control": "blind", "of": "heads"}}}, "a control is one of scratch, group_blind"),
        ({"arms": ARMS | {"blind": {"control": "group_blind"}}}, "`of` another arm; give both, or neither"),
        (
            {"arms": ARMS | {"blind": {"control": "group_blind", "of": "heads", "params": "50%"}}},
            "params is that of arm 'heads', whose control this is",
        ),
        (
            {"arms": ARMS | {"blind": {"control": "random", "of": "chanels"}}},
            "leans on 'chanels', which is no other arm .* those are heads: name",
        ),
        ({"arms": ARMS | {"channels": {"match": {"flops": "heads"}}}}, "'flops' is not a budget to match that exists"),
        ({"arms": ARMS | {"whole": {}}}, "arm 'whole': nothing says how small"),
        ({"claims": [{"says": "x", "lower": "heads"}]}, "claims is incomplete"),
        ({"vocab_size": 300}, "'vocab_size' is not a field of a study"),
    ],
)
def test_a_wrong_study_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(HalflapError, match=message):
        read_study(str(write(tmp_path, **changes)), "small")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"claims": [STUDY["claims"][0] | {"measure": "los"}]}, "did you mean 'loss'"),  # type: ignore[index]
        ({"readings": {"ranks": {}}}, "'ranks' is not a reading that exists"),
        ({"readings": {"rank_correlation": {"chep": "loss"}}}, "did you mean 'cheap'"),
        ({"readings": {"tokens_to_reach": {"arm": "head", "by": ["scratch"]}}}, "did you mean 'heads'"),
        ({"readings": {"tokens_to_reach": {"arm": "heads"}}}, "the reading tokens_to_reach has no by"),
        ({"readings": {"tokens_to_reach": {"arm": ["heads"], "by": ["scratch"]}}}, "must be the name of one arm"),
        ({"readings": {"rank_correlation": {"arms": ["heads", "heads"]}}}, "finds 1 of the arms"),
        ({"readings": {"rank_correlation": {"cheap": "lss"}}}, "did you mean 'loss'"),
        ({"readings": {"rank_correlation": {"arms": ["heads", "scratch"]}}}, "arm 'scratch' will have no loss_as_cut"),
        (
            {"readings": {"rank_correlation": {"arms": ["heads"]}}},
            "finds 1 of the arms that it may rank with loss_as_cut and loss",
        ),
        ({"claims": [STUDY["claims"][0] | {"measure": "recall"}]}, "will have no recall"),  # type: ignore[index]
        ({"arms": {"heads": {"sizes": {"mamba_num_heads": 10}}}, "claims": [], "readings": {}}, "multiple of 4"),
    ],
)
def test_what_cannot_be_is_said_before_any_work(
    halflap: Cli, place: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    said = halflap(*words(write(tmp_path, **changes), place, tmp_path / "run"))
    assert said.status == 1 and message in said.err and not (tmp_path / "run" / "teacher.json").exists()


@pytest.mark.parametrize(
    "arms, message",
    [
        ({"tiny": {"params": "1%"}}, "arm 'tiny': a budget of"),
        (
            {"states": {"sizes": {"ssm_state_size": 8}}, "blind": {"control": "group_blind", "of": "states"}},
            "arm 'blind': it is the control group_blind of 'states', whose students keep all their Mamba heads",
        ),
    ],
)
def test_what_no_student_can_be_is_said_before_others_are_trained(
    halflap: Cli, place: Path, tmp_path: Path, arms: dict[str, Any], message: str
) -> None:
    file = write(tmp_path, arms={"heads": ARMS["heads"], **arms}, claims=[], readings={})
    said = halflap(*words(file, place, tmp_path / "run"))
    assert said.status == 1 and message in said.err and not list(tmp_path.glob("run/arms/*"))


def test_a_dry_run_counts_arms_as_their_teacher(halflap: Cli, place: Path, tmp_path: Path) -> None:
    found = halflap(*words(write(tmp_path), place, tmp_path / "run"), "--dry-run").json
    assert [row["arm"] for row in found["arms"]] == list(ARMS)
    assert found["parameters"] == found["arms"][0]["parameters"] > 400_000
    rows = {row["arm"]: row for row in found["arms"]}
    assert rows["blind"] == rows["heads"] | {"arm": "blind"}  # trained as it is
    a_pass = rows["heads"]["flops"] // 4 // rows["heads"]["tokens"]  # three of its own, and the teacher's
    assert rows["scratch"]["flops"] == rows["scratch"]["tokens"] * 3 * a_pass


def test_a_teacher_or_text_that_is_not_there_is_named(halflap: Cli, place: Path, tmp_path: Path) -> None:
    file = write(tmp_path, data=["no.jsonl"])
    said = halflap("study", file, "--out", tmp_path / "run")
    assert said.status == 1 and "'no.jsonl', which is not there" in said.err and "--data" in said.err
    said = halflap("study", file, "--data", place / "text.jsonl", "--out", tmp_path / "run")
    assert said.status == 1 and "the study's teacher is 'nowhere'" in said.err and "--teacher" in said.err
