"""Texts end at the tokens of config.json, of generation_config.json and of the tokenizer, wherever they are made."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import halflap
from halflap.checkpoints.checkpoint import load_model, save_model
from halflap.checkpoints.config import read_ends
from halflap.errors import HalflapError
from halflap.inference.engine import Engine
from halflap.inference.generate import generate
from halflap.inference.requests import Request
from halflap.models.model import HybridModel, initialize
from halflap.models.presets import preset

Cli = Callable[..., Any]
PROMPT = (5, 9, 77)
NEW = 12


@pytest.fixture
def made(tmp_path: Path) -> tuple[Path, list[int]]:
    """A checkpoint whose generation_config.json alone ends its text at the fifth token, and that text without it."""
    config = dataclasses.replace(preset("llama-tiny"), vocab_size=300, eos_token_id=2)
    model = HybridModel(config).eval()
    initialize(model, 1)
    for name, parameter in model.named_parameters():
        if name.endswith("proj.weight"):
            parameter.data.mul_(8)
    text = generate(model, [PROMPT], NEW, ignore_eos=True)[0].tokens
    assert text[4] not in text[:4] and 2 not in text
    save_model(model, tmp_path / "teacher")
    say(tmp_path / "teacher", [2, text[4]])
    return tmp_path / "teacher", text


def say(directory: Path, ends: object) -> None:
    file = directory / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token_id": ends, "top_k": 7}))


def test_a_text_ends_where_generation_config_says(made: tuple[Path, list[int]]) -> None:
    directory, text = made
    model = load_model(directory)
    assert generate(model, [PROMPT], NEW)[0].tokens == text[:5]
    assert generate(model, [PROMPT], NEW, ignore_eos=True)[0].tokens == text
    with Engine(model) as engine:
        (piece,) = engine.submit(Request(PROMPT, NEW)).result()
        assert [token.id for token in piece.tokens] == text[:5] and piece.finish_reason == "stop"
    halflap.save(model, directory.parent / "again")
    assert read_ends(directory.parent / "again", model.config) == (2, text[4])


@pytest.mark.parametrize("verb", ["prune", "export"])
def test_a_student_ends_where_its_teacher_does(made: tuple[Path, list[int]], halflap: Cli, verb: str) -> None:
    directory, text = made
    out = directory.parent / verb
    words = ("--sizes.drop-blocks", 0, 1) if verb == "prune" else ("--quantize", "int8", "--group-size", 32)
    assert halflap(verb, directory, *words, "--out", out, "--json").status == 0
    found = next(out.rglob("config.json")).parent
    assert read_ends(found, load_model(found).config) == (2, text[4])
    assert json.loads((found / "generation_config.json").read_text())["top_k"] == 7


def test_gguf_keeps_three_ends_and_says_which_it_cannot(made: tuple[Path, list[int]], halflap: Cli) -> None:
    pytest.importorskip("gguf", reason="gguf is not installed: pip install -e '.[gguf]'")
    from halflap.checkpoints.gguf_import import open_gguf
    from halflap.checkpoints.gguf_tokenizer import ENDS

    directory, _ = made
    say(directory, [7, 8, 9])
    out = halflap("export", directory, "--format", "gguf", "--out", directory.parent / "gguf", "--json").json
    assert [open_gguf(out["path"]).fields[key] for key in ENDS] == [2, 7, 8] and "ends at 9" in out["remark"]


def test_what_is_no_token_id_is_refused(made: tuple[Path, list[int]]) -> None:
    directory, _ = made
    say(directory, ["<eos>"])
    with pytest.raises(HalflapError, match="eos_token_id '<eos>'"):
        load_model(directory)
