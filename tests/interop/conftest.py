"""Tiny checkpoints of every family with a tokenizer: one for a stock class, and one with unequal blocks."""

from __future__ import annotations

import contextlib
import dataclasses
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

# A family joins all of these tests by the name of its small preset.
FAMILIES = ("nemotron-h-tiny", "llama-tiny", "nemotron-4-tiny", "hymba-tiny")
TEXT = [
    "A half-lap joint takes two different pieces.",
    "Each piece is cut down by half, and the joined piece has the thickness of one.",
    "Attention looks back at every word; a state remembers what it was told.",
    "The quick brown fox jumps over the lazy dog, again and again.",
]
CHAT_TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}<eos>{% endfor %}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.interop)


@pytest.fixture(scope="session", autouse=True)
def registered() -> None:
    pytest.importorskip("transformers", reason="transformers is not installed: pip install -e '.[interop]'")
    import halflap.hf  # noqa: F401


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    from halflap.data.tokenizer import train_tokenizer

    return train_tokenizer(TEXT * 4, 300, progress=False).with_chat_template(CHAT_TEMPLATE)


@pytest.fixture(scope="session")
def make_checkpoint(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """make_checkpoint(preset, unequal=...) is the directory of a small model of that shape, made once."""
    made: dict[tuple[str, bool], Path] = {}

    def make(name: str, *, unequal: bool) -> Path:
        from halflap.models.presets import preset

        if (name, unequal) not in made:
            config = dataclasses.replace(preset(name), vocab_size=320)
            config = with_unequal_blocks(config) if unequal else config
            made[name, unequal] = write(config, tokenizer, tmp_path_factory.mktemp("models") / name)
        return made[name, unequal]

    return make


@pytest.fixture(scope="session")
def write_model(tokenizer: Any) -> Callable[[Any, Path], Path]:
    """write_model(config, directory) writes a small model of any shape and returns its directory."""
    return lambda config, directory: write(config, tokenizer, directory)


@pytest.fixture(scope="session")
def cut_students(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """cut_students(teacher, "--sizes.hidden-size", 64, ...) is a student as `score` and `prune` make it."""
    from halflap.cli import main

    def cut(teacher: Path, *sizes: object) -> Path:
        folder = tmp_path_factory.mktemp("cut")
        (folder / "text.txt").write_text("\n\n".join(TEXT * 20))
        measured = ("score", teacher, "--data", folder / "text.txt", "--tokens", "1K", "--sequence-length", 32)
        cutting = ("prune", teacher, "--importance", folder / "scored" / "importance.safetensors", *sizes)
        for words in ((*measured, "--out", folder / "scored"), (*cutting, "--out", folder / "pruned")):
            assert main([*map(str, words), "--quiet"]) == 0
        return folder / "pruned" / "checkpoint"

    return cut


@pytest.fixture(scope="session", params=FAMILIES)
def stock_dir(request: pytest.FixtureRequest, make_checkpoint: Any) -> Path:
    """A checkpoint in the layout of its family's stock class."""
    return make_checkpoint(request.param, unequal=False)


@pytest.fixture(scope="session", params=FAMILIES)
def model_dir(request: pytest.FixtureRequest, make_checkpoint: Any) -> Path:
    """A checkpoint whose blocks are unequal, as a student's may be: no stock class can express it."""
    return make_checkpoint(request.param, unequal=True)


@pytest.fixture
def model(model_dir: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(model_dir)


def with_unequal_blocks(config: Any) -> Any:
    """The first MLP at half its width."""
    place = next(i for i, block in enumerate(config.blocks) if block.kind == "mlp")
    block = config.blocks[place]
    narrow = dataclasses.replace(block, intermediate_size=block.intermediate_size // 2)
    return dataclasses.replace(config, blocks=(*config.blocks[:place], narrow, *config.blocks[place + 1 :]))


def write(config: Any, tokenizer: Any, directory: Path) -> Path:
    from halflap.checkpoints.checkpoint import save_model
    from halflap.models.model import HybridModel, initialize

    model = HybridModel(config)
    initialize(model, seed=0)
    for name, parameter in model.named_parameters():  # decisive logits, and blocks that count, so that texts vary
        if parameter.ndim == 2 and name.startswith(("blocks.", "head.")) and "A_log" not in name:
            parameter.data.mul_(4)
    save_model(model, directory)
    tokenizer.save(directory)
    return directory


@pytest.fixture(scope="session")
def serving() -> Callable[..., contextlib.AbstractContextManager[str]]:
    """serving(directory, *words): the address of a `halflap serve`, which must end with status 0 when told to."""

    @contextlib.contextmanager
    def start(directory: Path, *words: str) -> Iterator[str]:
        command = [sys.executable, "-m", "halflap", "serve", str(directory), "--port", "0", *words]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
        assert process.stderr is not None
        for line in process.stderr:
            if found := re.search(r"http://127\.0\.0\.1:\d+", line):
                break
        else:
            pytest.fail("the server did not start")
        yield found[0]
        process.terminate()
        process.communicate(timeout=60)
        assert process.returncode == 0

    return start
