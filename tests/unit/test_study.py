"""Studies: arms at equal parameters, what a study file may say, and a run that is gone on with and shown."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from halflap.commands.study import check_demands
from halflap.commands.study_file import SIZES, Speed, read_study, shipped
from halflap.commands.study_readings import check
from halflap.errors import HalflapError, RecipeError
from halflap.evaluate.paired import paired
from halflap.models.count import count_parameters
from halflap.models.stack import build, read_stack, with_parameters
from halflap.recipe import read_yaml

TEXT = Path(__file__).resolve().parents[2] / "demo" / "text" / "validation.jsonl.xz"
BLOCKS = {
    "*": {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8},
    "M": {"num_heads": 4, "head_dim": 8, "num_groups": 2, "state_size": 4},
    "-": {"intermediate_size": 64},
}
BASE = {"hidden_size": 32, "blocks": BLOCKS, "repeat": 3, "max_position_embeddings": 128}
STUDY = {
    "study": "tiny",
    "asks": "Which?",
    "baseline": "attention",
    "vocab_size": 300,
    "tokens": "1k",
    "seeds": [0, 1],
    "base": BASE,
    "arms": {"attention": {"pattern": "*-"}, "mamba": {"pattern": "M-"}},
    "fit": {"sequence_length": 32, "batch_size": 4},
    "speed": {"prompt": [16], "output": [2]},
    "recall": {"probe": "probe_mqar", "length": 32, "vocab_size": 64, "steps": 2, "rows": 8},
}


def write(place: Path, **changes: Any) -> Path:
    file = place / "study.yaml"
    file.write_text(json.dumps(STUDY | changes))  # JSON is YAML
    return file


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", [name for name in shipped() if not read_study(name, "smoke").teacher])
def test_shipped_studies_have_equal_arms_in_every_size(name: str, size: str) -> None:
    study = read_study(name, size)
    models = study.models(study.vocab_size)
    check_demands(study, models)
    counts = [count_parameters(config) for config in models.values()]
    assert max(counts) / min(counts) <= 1.01 and study.baseline in study.arms
    assert len(study.seeds) >= 3 or size != "small"


@settings(max_examples=20)
@given(target=st.integers(100_000, 3_000_000), pattern=st.sampled_from(["*-", "M-", "M-*-", "MM*-"]))
def test_a_parameter_budget_is_met_by_the_width_of_the_mlps(target: int, pattern: str) -> None:
    config = build(read_stack({**BASE, "pattern": pattern}, "arm"), 300)
    assert abs(count_parameters(with_parameters(config, target)) / target - 1) <= 0.005


def test_windows_and_shared_keys_follow_the_rule() -> None:
    fields = {**BASE, "pattern": "*-", "repeat": 8, "window": 16, "share_key_values": True}
    attention = [b.attention for b in build(read_stack(fields, "arm"), 300).blocks if b.attention is not None]
    assert [a.window is None for a in attention] == [layer in (0, 3, 7) for layer in range(8)]
    assert [a.key_value_source for a in attention] == [None, None, 2, None, None, 8, 8, None]
    none = build(read_stack(fields | {"global_layers": []}, "arm"), 300)
    assert all(b.attention.window == 16 for b in none.blocks if b.attention is not None)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"share_key_values": True}, "needs a window"),
        ({"window": 8, "global_layers": [9]}, "names layer 9; the 3 attention layers are 0 to 2"),
        ({"pattern": "*X"}, "letter 'X'"),
        ({"blocks": {"Q": {}}}, "blocks has 'Q'; allowed are"),
        ({"hidden": 3}, "'hidden' is not a field of a model"),
    ],
)
def test_a_wrong_arm_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(HalflapError, match=message):
        build(read_stack({**BASE, "pattern": "*-", **fields}, "arm"), 300)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"arm": {}}, "'arm' is not a field of a study that exists; did you mean 'arms'"),
        ({"arms": {}}, "has no arms"),
        ({"baseline": "atention"}, "did you mean 'attention'"),
        ({"arms": {"attention": {"from": "mamba"}}}, "starts from 'mamba', which is no arm above it"),
        ({"fit": {"rate": 1}}, "'fit.rate' is not a field that exists"),
        ({"sizes": {"small": {}}}, "has no size 'smoke'; it has small"),
        (
            {"arms": {"attention": {"pattern": "*-"}, "bare": {"pattern": "MM"}}},
            "arm 'bare': the model MMMMMM has no MLP",
        ),
        (
            {"arms": {"attention": {"pattern": "*-"}, "wide": {"pattern": "*-", "hidden_size": 256}}},
            r"arm 'wide': .* more than 0.5 % from the [\d,]+ of the others",
        ),
        ({"parameters": "10k"}, "arm 'attention': .* more than 0.5 % from the 10,000"),
    ],
)
def test_a_wrong_study_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(HalflapError, match=message):
        read_study(str(write(tmp_path, **changes)), "smoke").models(300)


def test_pairs_are_tested_by_their_differences() -> None:
    found = paired([1.0, 2.0, 3.1], [1.5, 2.5, 3.5])  # differences -0.5, -0.5, -0.4: t is -14 with 2 degrees of freedom
    assert found.difference == pytest.approx(-1.4 / 3) and found.p_value == pytest.approx(1 - 14 / 198**0.5)
    assert found.interval is not None and found.interval[1] < 0
    assert paired([1.0], [2.0]).p_value is None and paired([1.0, 2.0], [1.0, 2.0]).p_value == 1


def test_a_study_is_run_found_again_and_gone_on_with(halflap: Callable[..., Any], tmp_path: Path) -> None:
    file, out = write(tmp_path), tmp_path / "run"
    words = ("study", file, "--data", TEXT, "--size", "smoke", "--eval-tokens", 500, "--out", out, "--json")
    first = halflap(*words).json
    assert [row["name"] for row in first["arms"]] == ["attention", "mamba"]
    attention, mamba = first["arms"]
    assert abs(mamba["parameters"] / attention["parameters"] - 1) <= 0.005
    assert len(mamba["loss_by_seed"]) == 2 and "loss_against_baseline" not in attention
    assert mamba["cache_bytes"] == mamba["cache_bytes_counted"] and 0 <= mamba["recall"] <= 1
    assert mamba["loss_against_baseline"]["difference"] == pytest.approx(mamba["loss"] - attention["loss"])
    assert "mamba" in (out / "report.html").read_text()
    (out / "status.json").unlink()
    (out / "arms" / "mamba" / "seed-1" / "result.json").unlink()
    again = halflap(*words).json
    assert again["arms"][1]["loss_by_seed"] == mamba["loss_by_seed"]  # the same run ends as it did
    shown = halflap(*words[:-1]).out
    assert "judged on" in shown and "2 seeds of" in shown and " tokens " not in shown.splitlines()[1]


def test_a_study_by_a_wrong_name_names_the_nearest(halflap: Callable[..., Any], tmp_path: Path) -> None:
    outcome = halflap("study", "hymba-lader", "--data", TEXT, "--out", tmp_path / "x")
    assert outcome.status == 1 and "did you mean 'hymba-ladder'" in outcome.err


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"seeds": []}, r"seeds is \[\]; at least one, and each once"),
        ({"seeds": [1, 1]}, r"seeds is \[1, 1\]; at least one, and each once"),
        ({"seeds": "x"}, "seeds is 'x'; it must be a list of whole numbers"),
        ({"seeds": [-1]}, r"seeds is \[-1\]; it must be a list of whole numbers from 0"),
        ({"seeds": [True, False]}, r"seeds is \[True, False\]; it must be"),
        ({"seeds": [1 << 70]}, "it must be a list of whole numbers from 0 to 2"),
        ({"tokens": 0}, "tokens is 0; it must be at least 1"),
        ({"readings": {"tokens_to_reach": None}}, "the reading tokens_to_reach has no arm"),
        (
            {"claims": [{"says": "x", "lower": "mamba", "higher": "attention", "measure": "loss_as_cut"}]},
            "arm 'mamba' will have no loss_as_cut, only loss, bits_per_byte, perplexity, recall",
        ),
        ({"baseline": 1}, "1 is no name of an arm, as YAML reads it; write it in quotes"),
        (
            {"arms": STUDY["arms"] | {"a b": {"pattern": "*-"}, "a-b": {"pattern": "M-"}}},  # type: ignore[operator]
            "arm 'a-b' would be kept in the folder of arm 'a b'",
        ),
        ({"arms": STUDY["arms"] | {"..": {"pattern": "*-"}}}, "arm '..' is no name of a folder"),  # type: ignore[operator]
        ({"speed": {"prompt": []}}, r"speed.prompt is \[\]; it must be a list of whole numbers above 0"),
        ({"arms": ["attention"]}, "study.yaml has a value of the wrong kind"),
        ({"arms": {"attention": {"pattern": 5}}}, "arm 'attention' has a value of the wrong kind"),
    ],
)
def test_values_of_the_wrong_kind_are_refused_as_a_wrong_recipe(tmp_path: Path, changes: Any, said: str) -> None:
    with pytest.raises(HalflapError, match=said):
        plan = read_study(str(write(tmp_path, **changes)), "small")
        plan.models(300)
        check(plan)


def test_a_name_given_twice_is_refused_with_its_lines(tmp_path: Path) -> None:
    file = tmp_path / "study.yaml"
    file.write_text(
        "study: tiny\narms:\n  attention: {pattern: '*-'}\n  mamba: {pattern: M-}\n  attention: {pattern: M*-}\n"
    )
    with pytest.raises(RecipeError, match="says 'attention' twice, at lines 3 and 5; keep one"):
        read_study(str(file), "small")


def test_anchors_may_be_merged_and_overridden(tmp_path: Path) -> None:
    lines = ("common: &B {x: 1, z: 0}", "base: {inner: &A {<<: *B, x: 2}}", "arm: {<<: *A, y: 5}", "1: a", "'1': b")
    (tmp_path / "a.yaml").write_text("\n".join(lines))
    found: dict[Any, Any] = read_yaml(tmp_path / "a.yaml")
    assert found["arm"] == {"x": 2, "z": 0, "y": 5} and found[1] == "a" and found["1"] == "b"


def test_a_number_is_no_name(tmp_path: Path) -> None:
    file = tmp_path / "study.yaml"
    file.write_text(write(tmp_path).read_text().replace('"mamba"', "1"))
    with pytest.raises(RecipeError, match="1 is no name of an arm, as YAML reads it; write it in quotes"):
        read_study(str(file), "small")


def test_a_dry_run_counts_every_arm_and_trains_none(halflap: Callable[..., Any], tmp_path: Path) -> None:
    words = ("study", write(tmp_path), "--data", TEXT, "--out", tmp_path / "run", "--dry-run", "--json")
    found = halflap(*words).json
    assert [row["arm"] for row in found["arms"]] == ["attention", "mamba"] and found["seeds"] == [0, 1]
    assert found["tokens"] == 4000 and found["flops"] == sum(row["flops"] for row in found["arms"]) > 0
    assert not (tmp_path / "run").exists() and "mamba" in halflap(*words[:-1]).out
    refused = halflap("study", write(tmp_path, parameters=100), *words[2:])
    assert refused.status == 1 and "from the 100" in refused.err


def test_text_may_be_one_path(tmp_path: Path) -> None:
    assert read_study(str(write(tmp_path, data="text.txt")), "small").data == ("text.txt",)


def test_the_usual_speed_is_as_long_as_the_shapes_reach(tmp_path: Path) -> None:
    file = write(tmp_path, speed={})
    assert read_study(str(file), "small").speed == Speed(prompt=(96,), output=(32,))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"speed": {"prompt": [120], "output": [16]}}, "arm 'attention': speed's longest prompt and output needs 136"),
        ({"fit": {"sequence_length": 256}}, "arm 'attention': fit.sequence_length needs 256 positions"),
        (
            {"recall": {**STUDY["recall"], "length": 512, "vocab_size": 128}},
            "arm 'attention': recall.length needs 512 positions",
        ),  # type: ignore[dict-item]
        ({"recall": {**STUDY["recall"], "probe": "probe_mqra"}}, "did you mean 'probe_mqar'"),  # type: ignore[dict-item]
    ],
)
def test_what_no_arm_can_do_is_refused_before_any_is_trained(
    halflap: Callable[..., Any], tmp_path: Path, changes: Any, said: str
) -> None:
    blocks = BLOCKS | {"*": BLOCKS["*"] | {"rope": {}}}
    file = write(tmp_path, base=BASE | {"blocks": blocks}, **changes)
    outcome = halflap("study", str(file), "--data", str(TEXT), "--out", str(tmp_path / "run"))
    assert outcome.status == 1 and said in outcome.err and not (tmp_path / "run" / "arms").exists()
