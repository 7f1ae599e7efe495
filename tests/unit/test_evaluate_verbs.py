"""`evaluate`, `bench` and `generate` as a user meets them: flags, JSON, files, and one sentence for what is wrong."""

from __future__ import annotations

import io
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

import halflap as package
from halflap.checkpoints.checkpoint import save_model
from halflap.commands import generate as generate_verb
from halflap.data.corpus import build_corpus
from halflap.data.tokenizer import Tokenizer, train_tokenizer
from halflap.inference.generate import Completion
from halflap.models.model import HybridModel, initialize
from halflap.models.presets import preset

Cli = Callable[..., Any]
TEXT = "The sea is grey and the house stands on a hill. Nobody came, and nobody left. " * 8


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint with a tokenizer."""
    directory = tmp_path_factory.mktemp("verbs") / "model"
    network = HybridModel(preset("llama-tiny"))
    initialize(network, 0)
    save_model(network, directory, dtype="bfloat16")
    train_tokenizer([TEXT], 300, progress=False).save(directory)
    return directory


@pytest.fixture
def text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(TEXT)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"line": row}) + "\n" for row in TEXT.split(". ")))
    return tmp_path / "text.txt"


def test_evaluate_text(halflap: Cli, model: Path, text: Path) -> None:
    result = halflap("evaluate", model, "--data", text, "--context", 32, "--stride", 16, "--json").json
    assert {"loss", "perplexity", "bits_per_byte", "tokens", "tasks"} <= set(result)
    tokens = len(Tokenizer.load(model).encode(TEXT))
    assert result["tokens"] == tokens - 1 and result["tasks"] == {} and result["dtype"] == "float32"
    low, high = result["loss_interval"]
    assert low < result["loss"] < high
    assert package.evaluate(model, eval_data=[text], context=32, stride=16) == result
    people = halflap("evaluate", model, "--data", text, "--tokens", "100")
    assert "bits per byte" in people.out and "100 tokens of 1 documents" in people.out


def test_rows_apart_and_joined(halflap: Cli, model: Path, text: Path) -> None:
    rows = text.parent / "rows.jsonl"
    apart = halflap("evaluate", model, "--data", rows, "--data.field", "line", "--json").json
    joined = halflap("evaluate", model, "--data", rows, "--data.field", "line", "--data.join", "--json").json
    whole = len(Tokenizer.load(model).encode("\n\n".join(row for row in TEXT.split(". ") if row)))
    assert apart["documents"] > 10 and joined["documents"] == 1 and joined["tokens"] == whole - 1


def test_shards(halflap: Cli, model: Path, text: Path) -> None:
    tokenizer = Tokenizer.load(model)
    build_corpus([text], tokenizer, "shards")
    by_text, by_shards = (halflap("evaluate", model, "--data", d, "--json").json for d in (text, "shards"))
    assert by_shards["loss"] == pytest.approx(by_text["loss"]) and by_shards["bytes"] == by_text["bytes"]
    assert "cannot join" in halflap("evaluate", model, "--data", "shards", "--data.join").err
    train_tokenizer([TEXT], 290, progress=False).save("other")
    build_corpus([text], Tokenizer.load("other"), "foreign")
    outcome = halflap("evaluate", model, "--data", "foreign")
    assert outcome.status == 1 and "must be the same" in outcome.err


def test_a_run_keeps_scores(halflap: Cli, model: Path, text: Path) -> None:
    words = ("evaluate", model, "--data", text, "--out", "run", "--json")
    first = halflap(*words)
    assert json.loads(Path("run/scores.json").read_text()) == first.json
    again = halflap(*words)
    assert again.json == first.json and "this run is finished" in again.err


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        ([], 2, "nothing to judge on"),
        (["--data", "gone.txt"], 1, "does not exist"),
        (["--data", "empty.txt"], 1, "holds no text"),
        (["--data", "text.txt", "--context", "8", "--stride", "9"], 1, "at most 8"),
        (["--data", "text.txt", "--context", "9999"], 1, "rotary embedding has 512"),
        (["--data", "text.txt", "--tokens", "0"], 2, "at least 1"),
        (["--data", "rows.jsonl", "--data.field", "lines"], 1, "lines"),
    ],
)
def test_evaluate_says_what_is_wrong(
    halflap: Cli, model: Path, text: Path, words: list[str], status: int, message: str
) -> None:
    (text.parent / "empty.txt").touch()
    outcome = halflap("evaluate", model, *words)
    assert (outcome.status, outcome.out) == (status, "")
    assert message in outcome.err and outcome.err.count("\n") == 1


def test_a_misspelt_task(halflap: Cli, model: Path) -> None:
    pytest.importorskip("lm_eval")
    outcome = halflap("evaluate", model, "--tasks", "lamda_local")
    assert outcome.status == 1 and "did you mean 'lambada_local'" in outcome.err


def test_a_tokenizer_of_another_model(halflap: Cli, model: Path, text: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    network = HybridModel(preset("llama-tiny"))
    initialize(network, 0)
    save_model(network, other)
    outcome = halflap("evaluate", other, "--data", text)
    assert outcome.status == 1 and "no tokenizer.json" in outcome.err
    train_tokenizer([TEXT + "".join(map(chr, range(0x4E00, 0x4F00)))] * 2, 900, progress=False).save(other)
    for words in (["evaluate", other, "--data", text], ["generate", other, "--prompt", "The"]):
        outcome = halflap(*words)
        assert outcome.status == 1 and "vocab_size is 512" in outcome.err


def test_bench(halflap: Cli, model: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    grid = ["--prompt", "8", "16", "--output", "2", "--batch", "1", "2", "--repeats", "1"]
    result = halflap("bench", model, *grid, "--out", "speed", "--json").json
    assert len(result["rows"]) == 4 and result["weights"] == "checkpoint" and result["kernels"]["ops"]
    assert result["hardware"]["cores"] >= 1 and json.loads(Path("speed/bench.json").read_text()) == result
    shape = halflap("bench", "nemotron-h-tiny", "--prompt", "4", "--output", "2", "--dtype", "bfloat16", "--json").json
    assert shape["weights"] == "random" and shape["rows"][0]["dtype"] == "bfloat16"
    assert "decode" in halflap("bench", "llama-tiny", "--prompt", "4", "--output", "2", "--repeats", "1").out
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=2**34, total=2**35))
    outcome = halflap("bench", "nemotron-h-56b", "--dtype", "float32")
    assert outcome.status == 1 and "209.8 GiB as float32" in outcome.err


def test_generate(halflap: Cli, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ("generate", model, "--max-new-tokens", 12, "--ignore-eos")
    one = halflap(*words, "--prompt", "The sea", "--json").json
    assert set(one) == {"text", "tokens", "finish_reason"} and len(one["tokens"]) == 12
    assert halflap(*words, "--prompt", "The sea").out.strip() == one["text"].strip()
    two = halflap(*words, "--prompt", "A", "The sea", "--json").json
    assert two["tokens"][1] == one["tokens"] and two["finish_reason"] == ["length", "length"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("The sea\n"))
    assert halflap(*words, "--json").json == one
    stop = one["text"][3:5]
    cut = halflap(*words, "--prompt", "The sea", "--stop", stop, "--json").json
    assert cut["finish_reason"] == "stop" and cut["text"] == one["text"][: one["text"].index(stop)]
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    outcome = halflap(*words)
    assert outcome.status == 2 and "--prompt TEXT" in outcome.err


def test_generated_text_is_written_as_it_is(halflap: Cli, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "a[:x:]\tb :100: [red]c"
    monkeypatch.setattr(generate_verb, "continue_prompts", lambda *given, **more: [Completion(text, [1], "stop")])
    assert halflap("generate", model, "--prompt", "The sea").out == text + "\n"


def test_generate_by_a_schema_or_an_expression(halflap: Cli, model: Path, tmp_path: Path) -> None:
    pytest.importorskip("llguidance")
    words = ("generate", model, "--prompt", "The sea", "--max-new-tokens", 40, "--json")
    one = {"type": "object", "properties": {"a": {"enum": ["x", "y"]}}, "required": ["a"]}
    schema = json.dumps(one | {"additionalProperties": False})
    (tmp_path / "schema.json").write_text(schema)
    for given in (schema, tmp_path / "schema.json"):
        assert json.loads(halflap(*words, "--json-schema", given).json["text"])["a"] in ("x", "y")
    assert re.fullmatch(r"[a-c]{3}", halflap(*words, "--regex", "[a-c]{3}").json["text"])
    for wrong, said in (("nowhere.json", "neither a schema nor a file"), ("{no", "cannot be used")):
        outcome = halflap(*words, "--json-schema", wrong)
        assert outcome.status in (1, 2) and said in outcome.err


def test_generate_shows_text_on_a_terminal_as_it_comes(
    halflap: Cli, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    words = ("generate", model, "--prompt", "The sea", "--max-new-tokens", "8", "--ignore-eos")
    expected = halflap(*words, "--json").json["text"]
    monkeypatch.setattr(generate_verb, "_terminal", lambda: terminal)
    outcome = halflap(*words)
    assert terminal.getvalue() == expected + "\n" and outcome.out == ""
