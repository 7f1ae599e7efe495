"""The command line as a user meets it: statuses, one sentence, one JSON object, torch only when needed."""

from __future__ import annotations

import dataclasses
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

import halflap as package
from halflap import cli, environment
from halflap.cli import VERBS, Verb
from halflap.compress.costs import Budget, costs
from halflap.errors import HalflapError, RecipeError
from halflap.models.count import count_parameters
from halflap.models.presets import preset
from halflap.run import Run

Cli = Callable[..., Any]
HALFLAP = [sys.executable, "-m", "halflap"]


@pytest.fixture(autouse=True)
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def corpus_verb(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Any, Run], dict[str, Any]]], None]:
    """Stand in for what the verb `corpus` does, to see what the command line makes of it."""

    def stand_in(function: Callable[[Any, Run], dict[str, Any]]) -> None:
        monkeypatch.setattr(cli, "_resolve", lambda _: function)

    return stand_in


@pytest.mark.parametrize("words", [["--help"], ["--version"], [], ["compress", "--help"], ["compress", "x", "--show"]])
def test_help_and_show_load_no_torch(words: list[str]) -> None:
    code = f"import sys; from halflap.cli import main; assert main({words!r}) == 0; assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout and not done.stderr


def test_importing_halflap_and_inspecting_load_no_torch() -> None:
    code = (
        "import sys, halflap; assert set(m for m in sys.modules if m.startswith('halflap')) == {'halflap'};"
        "halflap.inspect('nemotron-h-8b'); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_help_names_every_verb(halflap: Cli) -> None:
    outcome = halflap("--help")
    assert outcome.status == 0
    assert [verb for verb in VERBS if f" {verb} " not in outcome.out] == []


def test_every_verb_shows_its_recipe_and_its_function_exists(halflap: Cli) -> None:
    for verb, row in VERBS.items():
        shown = halflap(verb, *(["x"] if _needs_a_word(row.recipe) else []), "--show")
        assert shown.out.startswith(f"verb: {verb}\n"), shown.err
        assert callable(cli._resolve(row.function)), verb


def test_inspect_gives_exactly_one_json_object(halflap: Cli) -> None:
    result = halflap("inspect", "nemotron-h-4b", "--context", "1024", "8K", "--batch", "2", "--json").json
    assert result["family"] == "nemotron_h"
    assert result["parameters"] == 4_489_223_040
    assert result["pattern"].count("*") == 4 and len(result["blocks"]) == 52
    assert set(result["cache_bytes"]) == {"1024", "8000"}
    wanted = {"family", "pattern", "parameters", "non_embedding_parameters", "flops_per_token", "cache_bytes", "blocks"}
    assert wanted <= set(result)


def test_inspect_for_people_and_the_list_of_presets(halflap: Cli) -> None:
    assert "4,489,223,040" in halflap("inspect", "nemotron-h-4b").out
    assert "nemotron-h-56b" in halflap("inspect", "--list").out


def test_inspect_reads_checkpoints_runs_and_shapes(halflap: Cli, tiny_checkpoint: Path) -> None:
    from halflap.checkpoints.checkpoint import load_model

    real = sum(parameter.numel() for parameter in load_model(tiny_checkpoint).parameters())
    assert halflap("inspect", tiny_checkpoint, "--json").json["parameters"] == real
    Path("run").mkdir()
    Path("run/checkpoint").symlink_to(tiny_checkpoint)
    assert halflap("inspect", "run", "--json").json["parameters"] == real
    Path("shape.yaml").write_text("preset: nemotron-h-tiny\nvocab_size: 1000\n")
    assert halflap("inspect", "shape.yaml", "--json").json["vocab_size"] == 1000
    Path("hf.yaml").write_text((tiny_checkpoint / "config.json").read_text())
    assert halflap("inspect", "hf.yaml", "--json").json["parameters"] == real


@pytest.mark.parametrize(
    ("words", "status", "sentence"),
    [
        ("inspect nowhere", 1, "model is 'nowhere', neither a path nor a preset"),
        ("inspect nemotron-h-4c", 1, "did you mean 'nemotron-h-"),
        ("inspect", 2, "inspect needs MODEL"),
        ("inspect nemotron-h-8b --contxt 5", 2, "did you mean '--context'?"),
        ("inspct", 2, "did you mean 'inspect'?"),
        ("compress nemotron-h-8b --data x", 1, "a preset: a shape without weights"),
        ("compress nowhere --data x", 1, "model is 'nowhere', a path that does not exist"),
        ("export . --format gguff", 2, "--format is 'gguff'"),
        ("generate nowhere --temperature -1", 2, "temperature is -1"),
        ("chat nowhere --top-p 2", 2, "top_p is 2"),
        ("generate nowhere --regex a --json-schema {}", 2, "json_schema and regex both"),
        ("inspect shape.yaml", 1, "did you mean 'shape.yml'?"),
        (
            "inspect shape.yml",
            1,
            "'vocabsize' is not a field to change in a preset that exists; did you mean 'vocab_size'?",
        ),
    ],
)
def test_mistakes_are_one_sentence_on_standard_error(words: str, status: int, sentence: str, halflap: Cli) -> None:
    Path("shape.yml").write_text("preset: nemotron-h-tiny\nvocabsize: 1000\n")
    outcome = halflap(*words.split())
    assert (outcome.status, outcome.out) == (status, "")
    assert sentence in outcome.err
    assert outcome.err.startswith("halflap: ") and outcome.err.count("\n") == 1


def test_from_python_the_same_names_the_same_sentence_and_the_same_object(halflap: Cli) -> None:
    assert (
        package.inspect("nemotron-h-4b", context=[1024])
        == halflap("inspect", "nemotron-h-4b", "--context", "1024", "--json").json
    )
    with pytest.raises(package.HalflapError) as error:
        package.inspect("nowhere")
    assert halflap("inspect", "nowhere").err == f"halflap: {error.value}\n"
    with pytest.raises(package.HalflapError, match="'contxt' is not a field that exists; did you mean"):
        package.inspect("nemotron-h-4b", contxt=3)
    with pytest.raises(package.HalflapError, match="name the others"):
        package.inspect("a", "b")


def test_from_python_what_was_not_foreseen_is_one_sentence_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(call: object) -> None:
        raise OSError(28, "No space left on device", "/full/file")

    monkeypatch.setattr(cli, "execute", fail)
    with pytest.raises(package.HalflapError, match=r"No space left on device \(/full/file\); free some space") as error:
        package.inspect("nemotron-h-4b")
    assert isinstance(error.value.__cause__, OSError)


def test_a_file_named_with_out_replaces_no_part_of_an_input(halflap: Cli, tiny_checkpoint: Path) -> None:
    before = (tiny_checkpoint / "config.json").read_text()
    words = ("search", tiny_checkpoint, "--importance", tiny_checkpoint, "--params", "50%")
    refused = halflap(*words, "--out", tiny_checkpoint / "config.json")
    assert refused.status == 1 and "belongs to the input model" in refused.err
    assert (tiny_checkpoint / "config.json").read_text() == before


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (OSError(28, "No space left on device", "f"), "No space left on device (f); free some space: what was written"),
        (PermissionError(13, "Permission denied", "f"), "(f); see to it that the file can be read or written"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), "the memory does not"),
    ],
)
def test_what_was_not_foreseen_says_how_to_mend_it(error: Exception, says: str) -> None:
    assert says in cli.unexpected(error)


def test_an_empty_path_is_refused(halflap: Cli, tiny_checkpoint: Path) -> None:
    refused = halflap("score", tiny_checkpoint, "--data", "")
    assert refused.status in (1, 2) and "empty path" in refused.err


def test_the_cache_of_inspect_is_that_of_the_memory_budget() -> None:
    config, budget = preset("nemotron-h-4b"), Budget(context=4096, batch=2, weight_bits=4, cache_bits=8)
    found = package.inspect("nemotron-h-4b", context=[4096], batch=2, cache_bits=8)
    assert costs(config, budget)["memory"] == count_parameters(config) // 2 + found["cache_bytes"]["4096"]


def test_a_verb_that_is_also_a_folder_stays_callable() -> None:
    import halflap.compress.axes  # noqa: F401 - sets the attribute `compress` of the package

    with pytest.raises(package.HalflapError, match="model is 'nowhere'"):
        package.compress("nowhere", params="50%")
    assert package.compress.__name__ == "halflap.compress"
    with pytest.raises(AttributeError, match="no attribute 'compres'"):
        package.compres  # noqa: B018


def test_a_run_is_found_again_and_its_result_is_the_same(halflap: Cli, corpus_verb: Any) -> None:
    calls = []
    corpus_verb(lambda recipe, run: calls.append(1) or {"tokens": 5, "bytes": 7})
    Path("a.txt").write_text("text")
    first = halflap("corpus", "--data", "a.txt", "--out", "shards", "--json")
    second = halflap("corpus", "--data", "a.txt", "--out", "shards", "--json")
    assert first.json == second.json == {"tokens": 5, "bytes": 7}
    assert len(calls) == 1
    assert "this run is finished: shards holds its result" in second.err
    assert Path("shards/metrics.jsonl").read_text() == ""
    Path("shards/report.html").unlink()  # as of a process that was killed before it was there
    assert halflap("corpus", "--data", "a.txt", "--out", "shards").status == 0 and Path("shards/report.html").exists()
    other = halflap("corpus", "--data", "a.txt", "--out", "shards", "--seed", "1")
    assert other.status == 1 and "seed is 0 there and 1 here" in other.err
    assert halflap("corpus", "--data", "a.txt", "--out", "shards", "--seed", "1", "--overwrite").status == 0
    assert len(calls) == 2


def test_what_a_verb_prints_is_no_result(halflap: Cli, corpus_verb: Any) -> None:
    corpus_verb(lambda recipe, run: print("chatter") or {"tokens": float("nan")})
    outcome = halflap("corpus", "--json")
    assert outcome.json == {"tokens": None}
    assert "chatter" in outcome.err


@pytest.mark.parametrize(
    ("error", "status", "sentence"),
    [
        (HalflapError("the sentence"), 1, "halflap: the sentence"),
        (RecipeError("the sentence"), 2, "halflap: the sentence"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (OSError(28, "No space left on device", "x.safetensors"), 1, "No space left on device (x.safetensors)"),
        (MemoryError(), 1, "the memory does not suffice"),
        (RuntimeError("first line\nsecond"), 1, "unexpected RuntimeError: first line; --traceback"),
        (ModuleNotFoundError("No module named 'gguf'", name="gguf"), 1, "`pip install 'halflap[gguf]'`"),
    ],
)
def test_every_failure_is_a_status_and_a_sentence(
    error: BaseException, status: int, sentence: str, halflap: Cli, corpus_verb: Any
) -> None:
    def fail(recipe: Any, run: Run) -> dict[str, Any]:
        raise error

    corpus_verb(fail)
    outcome = halflap("corpus", "--out", "x", "--json")
    assert (outcome.status, outcome.out) == (status, "")
    assert sentence in outcome.err and outcome.err.count("\n") == 1
    assert "Traceback" not in outcome.err
    assert not Path("x/status.json").exists() and not Path("x/.lock").exists()
    if status == 1:
        assert "Traceback" in halflap("corpus", "--out", "x", "--traceback").err


def test_out_may_name_the_artifact_itself(halflap: Cli, corpus_verb: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(VERBS, "corpus", Verb("config:CorpusRecipe", "x:y", artifact="importance.safetensors"))

    def write(recipe: Any, run: Run) -> dict[str, Any]:
        (run.path / "importance.safetensors").write_bytes(b"x")
        return {}

    corpus_verb(write)
    for _ in range(2):
        assert halflap("corpus", "--out", "deep/imp.safetensors").status == 0
        assert Path("deep/imp.safetensors").read_bytes() == b"x"
        Path("deep/imp.safetensors").unlink()
    assert len(list(Path("runs").iterdir())) == 1


SLOW = """
import signal, sys, time
from pathlib import Path
from halflap import cli

signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background jobs, tests too, ignore

def work(recipe, run):
    (run.path / "part").write_text("x")
    print("working", file=sys.stderr, flush=True)
    time.sleep(60)

cli._resolve = lambda name: work
sys.exit(cli.main(["corpus", "--out", "run"]))
"""


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_ends_with_130_and_the_same_command_goes_on(
    sent: signal.Signals, halflap: Cli, corpus_verb: Any
) -> None:
    process = subprocess.Popen([sys.executable, "-c", SLOW], stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None and process.stderr.readline() == "working\n"
    process.send_signal(sent)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert err == "halflap: interrupted; run keeps what was done, and the same command goes on from there\n"
    corpus_verb(lambda recipe, run: {"resumed": run.resumed})
    outcome = halflap("corpus", "--out", "run", "--json")
    assert outcome.json == {"resumed": True}
    assert "going on with the interrupted run in run" in outcome.err


def test_a_closed_pipe_is_no_error() -> None:
    process = subprocess.Popen(
        [*HALFLAP, "inspect", "nemotron-h-56b", "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait() == 0


def test_the_version_and_the_versions() -> None:
    done = subprocess.run([*HALFLAP, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"{package.__version__}\n"
    versions = environment.versions()
    assert versions["halflap"] == package.__version__ and versions["torch"]


@pytest.mark.slow
def test_help_is_quick() -> None:
    took = []
    for _ in range(5):
        start = time.perf_counter()
        subprocess.run([*HALFLAP, "--help"], stdout=subprocess.DEVNULL, check=True, env=os.environ)
        took.append(time.perf_counter() - start)
    assert min(took) < 0.3, took


def test_show_as_json_is_one_object(halflap: Cli) -> None:
    assert halflap("compress", "x", "--params", "50%", "--show", "--json").json["params"] == "50%"
    assert json.loads(halflap("doctor", "--show", "--json").out)["seed"] == 0


def test_a_server_serves_again_and_its_keys_are_kept_nowhere(
    halflap: Cli, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(cli, "_resolve", lambda _: lambda recipe, run: {"keys": asked.append(recipe.listening.api_key)})
    out = tmp_path / "served"
    for number, key in enumerate(("hunter1", "hunter2", "hunter2")):
        words = ("serve", tiny_checkpoint, "--out", out, "--api-key", key, "--port", "0")
        monkeypatch.setattr(sys, "argv", ["halflap", *map(str, words), f"--api-key={key}"])
        outcome = halflap(*words)
        assert outcome.status == 0 and len(asked) == number + 1 and asked[-1] == (key,), outcome.err
        assert "going on" not in outcome.err and "finished" not in outcome.err
    files = [file.read_text() for file in out.rglob("*") if file.is_file()]
    assert len(files) >= 4 and not any("hunter" in text for text in files)
    assert halflap("serve", tiny_checkpoint, "--out", out, "--port", "1").err.count("port is 0 there and 1 here") == 1


def test_a_secret_is_not_shown(halflap: Cli) -> None:
    for form in ((), ("--json",)):
        outcome = halflap("serve", "somewhere", "--api-key", "hunter2", "--show", *form)
        assert "hunter2" not in outcome.out and "api_key" not in outcome.out
        assert "api_key is a secret and left out here" in outcome.err
    assert not halflap("serve", "somewhere", "--show").err


def _needs_a_word(recipe: type) -> bool:
    return any(not field.kw_only and field.default is dataclasses.MISSING for field in dataclasses.fields(recipe))


@pytest.mark.parametrize("seed", ["-1", "1.5", "9223372036854775808", "x"])
def test_a_seed_is_a_whole_number_from_zero(halflap: Callable[..., Any], seed: str) -> None:
    outcome = halflap("generate", "nowhere", "--seed", seed)
    assert outcome.status == 2 and "seed" in outcome.err and "whole number from 0 to 2^63 - 1" in outcome.err


def test_every_verb_takes_the_common_flags(halflap: Callable[..., Any]) -> None:
    """Types of fields that a section inherits are found where it stands."""
    for verb in VERBS:
        outcome = halflap(verb, "--seed", "3", "--dtype", "bfloat16", "--quiet", "--show", "--json")
        assert "unexpected" not in outcome.err, (verb, outcome.err)
