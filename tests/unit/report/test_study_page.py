"""The page of a study and of tasks, from invented numbers: steps between arms, bands over seeds, bars."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from halflap.report.artifacts import read_run
from halflap.report.page import build
from halflap.report.study import read_study
from halflap.report.tasks import read_tasks

ARMS = (("attention", 2.0, 0.2), ("mamba", 2.1, 0.05), ("both <&>", 1.9, 0.4))


def write(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


def row(place: int) -> dict[str, Any]:
    name, loss, recall = ARMS[place]
    found: dict[str, Any] = {"name": name, "pattern": "*-", "previous": ARMS[place - 1][0] if place else None}
    found["runs"] = [f"arms/{place}/seed-{seed}" for seed in (0, 1)]
    for measure, value in (("loss", loss), ("recall", recall)):
        found |= {measure: value, f"{measure}_spread": 0.01, f"{measure}_by_seed": [value - 0.01, value + 0.01]}
        if place:
            for other, against in (("baseline", ARMS[0]), ("previous", ARMS[place - 1])):
                difference = value - against[1 if measure == "loss" else 2]
                tested = {
                    "difference": difference,
                    "interval": [difference - 0.02, difference + 0.02],
                    "p_value": 0.031,
                }
                found[f"{measure}_against_{other}"] = tested
    speeds = {"training_tokens_per_second": 900.0, "prefill_tokens_per_second": 5000.0}
    found |= speeds | {"decode_tokens_per_second": 100.0 * (place + 1), "cache_bytes": 40_000 // (place + 1)}
    return found | {"batch": 1, "prompt": 512, "output": 8}


@pytest.fixture
def study(tmp_path: Path) -> Path:
    run = tmp_path / "ladder"
    rows = [row(place) for place in range(len(ARMS))]
    write(run / "study.json", {"study": "ladder", "asks": "Which?", "baseline": "attention", "arms": rows})
    for place, (_, loss, _) in enumerate(ARMS):
        for seed in (0, 1):
            steps = [
                {"step": s, "tokens": 100 * s + seed, "loss": loss + 1 / s + 0.1 * seed, "lr": 0.1} for s in range(1, 9)
            ]
            file = run / "arms" / str(place) / f"seed-{seed}" / "metrics.jsonl"
            file.parent.mkdir(parents=True)
            file.write_text("".join(json.dumps(one) + "\n" for one in steps))
    return run


def page_of(*runs: Path) -> str:
    return build(runs, runs[0].parent / "page.html").read_text(encoding="utf-8")


def words(page: str) -> str:
    return re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", page)).replace("\N{NO-BREAK SPACE}", " ")


def test_steps_are_in_order_with_their_tests(study: Path) -> None:
    page = page_of(study)
    said = words(page[page.index('id="steps"') : page.index('id="recall"')])
    assert (
        said.index("attention 2.000") < said.index("mamba from attention") < said.index("both &lt;&amp;&gt; from mamba")
    )
    assert "2.100 ± 0.010 +0.100 +0.080 to +0.120, p 0.031" in said
    assert "−0.200 −0.220 to −0.180, p 0.031 −0.100 −0.120 to −0.080" in said
    assert 'href="ladder/study.json#/arms/1/loss_against_previous/difference"' in page
    recalled = words(page[page.index('id="recall"') : page.index('id="cost"')])
    assert "5.0 % ± 1.0 % −15.0 −17.0 to −13.0" in recalled
    assert 'id="loss"' not in page and "batch 1, prompt of 512 tokens" in page


def test_bands_reach_from_the_lowest_to_the_highest_seed(study: Path) -> None:
    page = page_of(study)
    assert page.count('class="band"') == 2 * len(ARMS)  # wide and narrow
    view = read_study([read_run(study)], [])
    assert view is not None and view.loss is not None and view.tradeoff is not None
    first = re.search(r'points="([^"]*)" class="band"', str(view.loss))
    assert first is not None and len(first[1].split()) == 16
    names = re.findall(r'class="run-name">([^<]*)<', str(view.tradeoff))
    assert names.count("attention") == 2 and "both &lt;&amp;&gt;" in names


def test_a_study_of_one_seed_or_of_an_older_form_has_a_page_too(study: Path) -> None:
    content = json.loads((study / "study.json").read_text())
    for one in content["arms"]:
        for name in list(one):
            if name.endswith(("_spread", "_against_previous", "_against_baseline")) or name in ("runs", "recall"):
                del one[name]
        one["loss_by_seed"] = one["loss_by_seed"][:1]
    write(study / "study.json", content)
    page = page_of(study)
    assert "nothing here is told from chance" in words(page)
    assert 'id="recall"' not in page and 'class="band"' not in page


def test_a_study_of_compression_says_what_holds_and_draws_losses_as_cut(study: Path) -> None:
    content = json.loads((study / "study.json").read_text())
    for place, one in enumerate(content["arms"]):
        one |= {"loss_as_cut": 3.0 + place, "loss_as_cut_spread": 0.1, "loss_as_cut_by_seed": [3.0, 3.0], "role": "a"}
        one |= {"latency_seconds": 0.002}
    claim = {"says": "Attention is better", "measure": "loss_as_cut", "verdict": "holds", "difference": -0.5}
    content |= {"teacher": {"loss": 1.5}, "claims": [claim | {"interval": [-0.7, -0.3], "p_value": 0.01}]}
    content |= {"readings": [{"name": "matched", "says": "mamba has 97 % of it"}]}
    write(study / "study.json", content)
    file = study / "arms" / "0" / "seed-0" / "metrics.jsonl"
    rows = [{"step": s, "tokens": 100 * s, "held_out_loss": 2.5, "arm": arm} for s in (1, 2) for arm in ("a", "b")]
    file.write_text("".join(json.dumps(one) + "\n" for one in rows))
    page = page_of(study)
    found = words(page[page.index('id="readings"') : page.index('id="steps"')])
    assert "Attention is better loss as cut holds −0.500 −0.700 to −0.300, p 0.01" in found
    assert "Mamba has 97 % of it." in found
    assert "As cut and trained" in page and "held-out loss, nats a token" in page and "3.000 ± 0.100" in words(page)
    view = read_study([read_run(study)], [])
    assert view is not None and view.recovery is not None and len(view.claims) == 1 and view.loss is not None


TASKS = {
    "piqa": {"acc": 0.6, "acc_stderr": 0.05, "acc_interval": [0.5, 0.7], "items": 100},
    "wikitext": {"word_perplexity": 31.5},
    "probe_copy": {
        "form": "text",
        "acc": 0.1,
        "acc_interval": [0.0, 0.2],
        "choice_acc": 0.5,
        "choice_acc_interval": [0.4, 0.6],
        "chance": 0.125,
        "loss": 3.25,
        "items": 40,
        "by_length": [
            {"length": length, "choice_acc": share, "choice_acc_interval": [0.3, 0.7], "loss": 3.0, "items": 20}
            for length, share in ((256, 0.625), (512, 0.375))
        ],
    },
}


def test_tasks_are_bars_side_by_side(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write(tmp_path / name / "scores.json", {"loss": None, "tasks": TASKS})
        write(tmp_path / name / "status.json", {"state": "finished", "verb": "evaluate", "result": {}})
    page = page_of(tmp_path / "one", tmp_path / "two")
    said = words(page)
    assert "one, two" in said and "piqa accuracy; one" in said and "60.0 % 50.0 % to 70.0 %" in said
    assert "probe_copy right answer is the likeliest; two" in said and "12.5 %" in said
    assert "probe_copy answer is written; one" in said and "wikitext word perplexity; one 31.50" in said
    assert "62.5 % 30.0 % to 70.0 % 37.5 %" in said and "loss of right answers; one 3.000" in said
    assert page.count('class="chance"') == 2 and "scores.json , which" not in said
    assert 'href="two/scores.json#/tasks/piqa/acc"' in page
    found = read_tasks([read_run(tmp_path / "one")])
    assert found is not None and not found.several and found.lengths == (256, 512)
    assert [score.bar is None for score in found.scores] == [False, True, False, False]


def test_scores_without_tasks_have_no_such_section(tmp_path: Path) -> None:
    write(tmp_path / "one" / "scores.json", {"loss": 2.0, "tasks": {}})
    assert 'id="tasks"' not in page_of(tmp_path / "one")
