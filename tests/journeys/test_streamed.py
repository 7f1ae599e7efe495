"""Verbs that read the weights a block at a time: when they do, that they say the same, and what they refuse."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from halflap.checkpoints import passes
from halflap.checkpoints.checkpoint import save_model
from halflap.commands import device, memory
from halflap.compress.importance import Importance
from halflap.data.tokenizer import train_tokenizer
from halflap.models.count import count_parameters
from halflap.models.model import HybridModel, initialize
from halflap.models.presets import hymba
from halflap.models.streams import Stream

CONFIG = hymba(
    4, hidden=64, mlp=96, heads=(4, 2), state=8, window=16, meta=4, vocab=512, context=128, original_context=64
)
SCORE = ("--tokens", "1K", "--sequence-length", 32, "--json")
Cli = Callable[..., Any]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher with random weights, its tokenizer, and text of 60 short documents."""
    folder = tmp_path_factory.mktemp("streamed")
    words = [f"{first}{second}" for first in ("ha", "ma", "sta", "ga") for second in ("te", "d", "lf", "mba")]
    generator = random.Random(0)
    documents = [" ".join(generator.choices(words, k=generator.randint(30, 90))) for _ in range(60)]
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    train_tokenizer(documents, 300).save(folder / "tokenizer")
    model = HybridModel(CONFIG)
    initialize(model, 0)
    save_model(model, folder / "teacher", tokenizer_from=folder / "tokenizer", dtype="bfloat16")
    return folder


def test_score_search_prune_and_verify_say_the_same(halflap: Cli, place: Path, tmp_path: Path) -> None:
    text = ("--data", place / "text.jsonl")
    found = {}
    for name, flags in (("memory", ()), ("streamed", ("--stream",))):
        out = tmp_path / name
        scored = halflap("score", place / "teacher", *text, *SCORE, *flags, "--out", out / "score").json
        assert scored["streamed"] == bool(flags) and not (out / "score" / "scoring").exists()
        importance = out / "score" / "importance.safetensors"
        searched = halflap(
            *("search", place / "teacher", "--importance", importance, *text, "--params", "60%", *flags),
            *("--shortlist", 2, "--score-tokens", 256, "--fit.sequence-length", 32, "--fit.batch-size", 4),
            *("--out", out / "search", "--json"),
        ).json
        found[name] = importance.read_bytes(), [(c["sizes"], c["loss"]) for c in searched["candidates"]]
    assert found["memory"] == found["streamed"]
    plan = tmp_path / "streamed" / "search" / "search.json"
    assert halflap("prune", place / "teacher", "--plan", plan, "--out", tmp_path / "pruned", "--json").json["verified"]
    assert halflap("verify", tmp_path / "pruned", "--tokens", 64, "--json").json["passed"]


def test_evaluate_says_the_same(halflap: Cli, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ("evaluate", place / "teacher", "--data", place / "text.jsonl", "--context", 24, "--stride", 16)
    words = (*words, "--tokens", 500, "--json")
    plain = halflap(*words).json
    streamed = halflap(*words, "--stream").json
    assert (plain.pop("streamed"), streamed.pop("streamed")) == (False, True)
    assert streamed == plain
    monkeypatch.setattr(passes, "STREAMS_AT_ONCE", 30_000)  # bytes: several readings
    again = halflap(*words, "--stream").json
    assert again["loss"] == plain["loss"]


class Interrupts:
    """Stops after so many steps of a stream through a block; counts them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.done, self.most = 0, 10**6
        through = Stream.through

        def step(stream: Stream, index: int, block: Any) -> Stream:
            if self.done == self.most:
                raise KeyboardInterrupt
            self.done += 1
            return through(stream, index, block)

        monkeypatch.setattr(Stream, "through", step)

    def at(self, most: int) -> None:
        self.done, self.most = 0, most


def test_a_killed_evaluation_goes_on(
    halflap: Cli, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = (
        "evaluate",
        place / "teacher",
        "--data",
        place / "text.jsonl",
        "--context",
        24,
        "--tokens",
        500,
        "--stream",
    )
    monkeypatch.setattr(passes, "STREAMS_AT_ONCE", 60_000)  # bytes: several readings
    steps = Interrupts(monkeypatch)
    whole = halflap(*words, "--json").json
    count = steps.done
    steps.at(round(0.7 * count))
    assert halflap(*words, "--out", tmp_path / "run").status == 130
    steps.at(count)
    assert halflap(*words, "--out", tmp_path / "run", "--json").json == whole
    assert steps.done < 0.4 * count and not (tmp_path / "run" / "scoring").exists()


@pytest.mark.parametrize("method", ["homogeneous", "minipuzzle"])
def test_a_killed_search_goes_on(
    halflap: Cli, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    halflap("score", place / "teacher", "--data", place / "text.jsonl", *SCORE, "--out", tmp_path / "score")
    words = ("search", place / "teacher", "--importance", tmp_path / "score", "--data", place / "text.jsonl")
    words = (*words, "--params", "95%", "--method", method, "--shortlist", 3, "--score-tokens", 256, "--stream")
    words = (*words, "--fit.sequence-length", 32, "--fit.batch-size", 2, "--json", "--out")
    steps = Interrupts(monkeypatch)
    whole = halflap(*words, tmp_path / "whole").json["candidates"]
    count = steps.done
    steps.at(round(0.7 * count))
    assert halflap(*words, tmp_path / "run").status == 130
    steps.at(count)
    assert halflap(*words, tmp_path / "run").json["candidates"] == whole
    assert steps.done < 0.5 * count and not (tmp_path / "run" / "streams").exists()


def test_what_does_not_fit_is_streamed(
    halflap: Cli, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = 4 * count_parameters(CONFIG)
    monkeypatch.setattr(device, "free_memory", lambda _: weights - 1)
    words = ("score", place / "teacher", "--data", place / "text.jsonl", *SCORE)
    assert halflap(*words, "--out", tmp_path / "run").json["streamed"]
    monkeypatch.setattr(device, "free_memory", lambda _: weights // 10)
    outcome = halflap(*words, "--out", tmp_path / "other")
    assert outcome.status == 1 and outcome.err.count("\n") == 1
    assert "the weights are read a block at a time, and block 0 alone takes 0.0 GiB as float32 where" in outcome.err
    assert outcome.err.endswith("or --dtype bfloat16 with score and evaluate\n")
    assert halflap(*words, "--dtype", "bfloat16", "--out", tmp_path / "narrow").json["streamed"]


def test_layers_go_one_by_one(halflap: Cli, place: Path, tmp_path: Path) -> None:
    found = []
    for flags in ((), ("--stream",)):
        out = tmp_path / str(len(flags))
        words = ("score", place / "teacher", "--data", place / "text.jsonl", *SCORE, "--depth-iterative", 4)
        removed = halflap(*words, *flags, "--out", out).json["removed"]
        found.append((removed, Importance.load(out / "importance.safetensors").to_bytes()))
        assert len(removed) == 4 and not (out / "scoring").exists()
    assert found[0] == found[1]


def test_arithmetic_is_what_is_asked_for(halflap: Cli, place: Path, tmp_path: Path) -> None:
    found = []
    for flags in ((), ("--stream",)):
        out = tmp_path / str(len(flags))
        words = ("score", place / "teacher", "--data", place / "text.jsonl", *SCORE, "--dtype", "bfloat16")
        halflap(*words, *flags, "--out", out)
        found.append(Importance.load(out / "importance.safetensors").to_bytes())
    assert found[0] == found[1]


def test_what_needs_the_whole_model_is_refused(
    halflap: Cli, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcome = halflap("evaluate", place / "teacher", "--tasks", "probes", "--stream")
    assert outcome.status == 2 and "leave out the probes" in outcome.err and outcome.err.count("\n") == 1
    text = ("--data", place / "text.jsonl")
    for flags, message in (
        (("--metric", "taylor"), "'taylor' needs the whole model in memory"),
        (("--depth-metric", "taylor"), "'taylor' needs the whole model in memory"),
    ):
        outcome = halflap("score", place / "teacher", *text, *SCORE, *flags, "--stream", "--out", tmp_path / flags[0])
        assert outcome.status == 1 and message in outcome.err
    halflap("score", place / "teacher", *text, *SCORE, "--out", tmp_path / "score")
    importance = tmp_path / "score" / "importance.safetensors"
    outcome = halflap(
        *("search", place / "teacher", "--importance", importance, *text, "--params", "60%", "--stream"),
        *("--shortlist-tokens", "1K", "--fit.sequence-length", 32, "--out", tmp_path / "search"),
    )
    assert outcome.status == 2 and "leave out --shortlist-tokens" in outcome.err
    monkeypatch.setattr(memory, "free_memory", lambda _: 4 * count_parameters(CONFIG) - 1)
    words = ("compress", place / "teacher", "--importance", importance, *text, "--params", "60%")
    outcome = halflap(*words, "--tokens", "1K", "--fit.sequence-length", 32, "--out", tmp_path / "compress")
    assert outcome.status == 1 and outcome.err.endswith("on a machine with more memory\n")


def test_agreement_with_the_teacher_is_the_same(halflap: Cli, place: Path, tmp_path: Path) -> None:
    importance = tmp_path / "score" / "importance.safetensors"
    halflap("score", place / "teacher", "--data", place / "text.jsonl", *SCORE, "--out", tmp_path / "score")
    found = []
    for flags in ((), ("--stream",)):
        words = ("search", place / "teacher", "--importance", importance, "--data", place / "text.jsonl", *flags)
        more = ("--params", "95%", "--method", "minipuzzle", "--shortlist", 2, "--score-tokens", 256)
        out = tmp_path / str(len(flags))
        found.append(halflap(*words, *more, "--fit.sequence-length", 32, "--out", out, "--json").json["candidates"])
    assert found[0] == found[1]


def test_packed_weights_are_judged_too(halflap: Cli, place: Path, tmp_path: Path) -> None:
    halflap("export", place / "teacher", "--quantize", "int8", "--out", tmp_path / "packed", "--json")
    words = ("evaluate", tmp_path / "packed", "--data", place / "text.jsonl", "--tokens", 300, "--json")
    plain, streamed = halflap(*words).json, halflap(*words, "--stream").json
    assert streamed["streamed"] and streamed["loss"] == pytest.approx(plain["loss"], rel=1e-3)
