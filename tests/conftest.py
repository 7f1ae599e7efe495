"""What tests share: one thread, the shared data, tiny models and checkpoints, the command line in process."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import settings

# the same examples in every run and on every machine; `pytest --hypothesis-profile default` draws fresh ones
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")
ROOT = Path(__file__).resolve().parent.parent
if shutil.which("nvidia-smi") is None:  # triton looks at it when first imported: its kernels then run without a GPU
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Tiny tensors only lose by more threads, and other work shares the machine."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Remembered digests go to the test's own folder."""
    remembered = tmp_path_factory.getbasetemp() / "digests.json"
    monkeypatch.setattr("halflap.inputs.cache_file", lambda: remembered)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real text and benchmarks beside the project, or at HALFLAP_SHARED."""
    data = Path(os.environ.get("HALFLAP_SHARED", ROOT.parent / "shared")) / "data"
    if not data.is_dir():
        pytest.skip(f"{data} is not there; HALFLAP_SHARED names the folder that holds data/")
    return data


@pytest.fixture(scope="session", params=["nemotron-h-tiny", "llama-tiny", "nemotron-4-tiny"])
def tiny_config(request: pytest.FixtureRequest) -> Any:
    """The small shape of each family, with blocks enough for every kind."""
    from halflap.models.presets import preset

    return dataclasses.replace(preset(request.param), vocab_size=256)


@pytest.fixture(scope="session")
def tiny_checkpoint(tiny_config: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face directory with random weights."""
    from halflap.checkpoints.checkpoint import save_model
    from halflap.models.model import HybridModel, initialize

    model = HybridModel(tiny_config)
    initialize(model, seed=0)
    directory = tmp_path_factory.mktemp("checkpoints") / tiny_config.family
    save_model(model, directory)
    return directory


@pytest.fixture(scope="module")
def teacher_place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher with random weights and a tokenizer, and text."""
    from halflap.checkpoints.checkpoint import save_model
    from halflap.data.tokenizer import train_tokenizer
    from halflap.models.model import HybridModel, initialize
    from halflap.models.presets import preset

    folder, generator = tmp_path_factory.mktemp("teacher"), random.Random(0)
    documents = [" ".join(generator.choices(["half", "lap", "joint", "wood"], k=60)) for _ in range(60)]
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    train_tokenizer(documents, 280).save(folder / "tokenizer")
    model = HybridModel(preset("nemotron-h-tiny"))
    initialize(model, 0)
    save_model(model, folder / "teacher", tokenizer_from=folder / "tokenizer")
    return folder


class Outcome(NamedTuple):
    """What a command line did."""

    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """Standard output, which must be exactly one JSON object."""
        assert self.status == 0, self.err
        return json.loads(self.out)


@pytest.fixture
def halflap(capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """The command line, in this process."""
    from halflap.cli import main
    from halflap.progress import set_quiet

    def run(*words: object) -> Outcome:
        capsys.readouterr()
        try:
            status = main([str(word) for word in words])
        finally:
            set_quiet(False)
        captured = capsys.readouterr()
        return Outcome(status, captured.out, captured.err)

    return run
