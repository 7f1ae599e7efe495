"""llama.cpp loads what `export --format gguf` wrote and goes on with the same tokens, for each architecture written.

Through xllamacpp, whose wheel brings it built; its server takes and gives token ids.
"""

from __future__ import annotations

import dataclasses
import json
import os
import urllib.request
from collections.abc import Callable
from itertools import zip_longest
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("gguf", reason="gguf is not installed: pip install -e '.[gguf]'")
xllamacpp = pytest.importorskip("xllamacpp", reason="llama.cpp is not installed: pip install -e '.[interop]'")

from halflap.checkpoints.checkpoint import Checkpoint, fill_model, load_model, save_model  # noqa: E402
from halflap.checkpoints.gguf_import import open_gguf  # noqa: E402
from halflap.data.tokenizer import Tokenizer  # noqa: E402
from halflap.inference.generate import generate  # noqa: E402
from halflap.models.config import AttentionConfig, Mamba2Config, MLPConfig, ModelConfig, RopeScaling  # noqa: E402
from halflap.models.presets import preset  # noqa: E402

Cli = Callable[..., Any]
DEMO = Path(__file__).resolve().parents[2] / "demo" / "teacher"
NEW = 24
PROMPTS = [[1, 17, 40, 9, 200, 33], [1, 5], list(range(3, 60))]
TEXTS = ["The house stands on a hill", "def f(x):\n    return 12", "Hello  world, don't\n\n3 ünïcödé 日本 🎉"]


class LlamaCpp:
    """A model file served by llama.cpp in this process."""

    def __init__(self, file: Path) -> None:
        parameters = xllamacpp.CommonParams()
        parameters.model.path = str(file)
        parameters.n_ctx = 512
        parameters.n_parallel = 1
        parameters.warmup = False
        parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = 1
        parameters.cache_type_k = parameters.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        parameters.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED  # sums in float16
        self.server = xllamacpp.Server(parameters)

    def ask(self, path: str, **request: Any) -> dict[str, Any]:
        data = json.dumps(request).encode()
        headers = {"Content-Type": "application/json"}
        with urllib.request.urlopen(
            urllib.request.Request(self.server.listening_address + path, data, headers), timeout=120
        ) as reply:
            return json.load(reply)

    def greedy(self, prompt: list[int], count: int) -> list[int]:
        settings = {"temperature": 0.0, "samplers": ["temperature"], "cache_prompt": False}
        return self.ask("/completion", prompt=prompt, n_predict=count, return_tokens=True, **settings)["tokens"]


def with_block(config: ModelConfig, kind: type, **sizes: Any) -> ModelConfig:
    """The second block of a kind, changed."""
    place = [i for i, block in enumerate(config.blocks) if isinstance(block, kind)][1]
    block = dataclasses.replace(config.blocks[place], **sizes)
    return dataclasses.replace(config, blocks=(*config.blocks[:place], block, *config.blocks[place + 1 :]))


def scaled(block: Any) -> Any:
    """With the rotary scaling of Llama 3.1."""
    if not isinstance(block, AttentionConfig) or block.rope is None:
        return block
    return dataclasses.replace(block, rope=dataclasses.replace(block.rope, scaling=RopeScaling(8.0)))


def shapes() -> dict[str, ModelConfig]:
    hybrid, llama = (dataclasses.replace(preset(f"{n}-tiny"), vocab_size=320) for n in ("nemotron-h", "llama"))
    biased = tuple(dataclasses.replace(block, bias=True) for block in llama.blocks)  # type: ignore[call-arg]
    only = lambda symbols: tuple(block for block in hybrid.blocks if block.symbol in symbols)
    return {
        "nemotron_h": hybrid,
        "nemotron_h, unequal": with_block(with_block(hybrid, MLPConfig, intermediate_size=48), MLPConfig, bias=True),
        "nemotron_h, odd widths": dataclasses.replace(
            hybrid,
            hidden_size=90,
            blocks=tuple(
                dataclasses.replace(b, num_heads=8, head_dim=10, state_size=14) if isinstance(b, Mamba2Config) else b
                for b in hybrid.blocks
            ),
        ),
        "nemotron_h without MLPs": dataclasses.replace(hybrid, blocks=only("M*")),
        "mamba2": dataclasses.replace(hybrid, blocks=only("M")),
        "llama": llama,
        "llama, tied": dataclasses.replace(llama, tie_word_embeddings=True),
        "llama, scaled": dataclasses.replace(llama, blocks=tuple(map(scaled, llama.blocks))),
        "llama, unequal": with_block(
            with_block(llama, MLPConfig, intermediate_size=48), AttentionConfig, num_attention_heads=4
        ),
        "llama, biases": dataclasses.replace(llama, blocks=biased),
        "llama, unequal, biases": with_block(
            dataclasses.replace(llama, blocks=biased), MLPConfig, intermediate_size=48
        ),
        "llama, an attention fewer": dataclasses.replace(llama, blocks=(*llama.blocks[:2], *llama.blocks[3:])),
    }


@pytest.fixture
def write_uneven(write_model: Any, tmp_path: Path) -> Callable[[ModelConfig], Path]:
    """write_uneven(config) writes a model whose gains, biases and other vectors are no longer all alike."""

    def write(config: ModelConfig) -> Path:
        source = write_model(config, tmp_path / "model")
        model = load_model(source)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
        save_model(model, source)
        return source

    return write


def compare(halflap: Cli, source: Path, out: Path, prompts: list[list[int]], *options: str) -> LlamaCpp:
    """Export and compare greedy tokens; they may part only where our two best tokens are nearly equal."""
    words = ["export", source, "--format", "gguf", "--dtype", "float32", "--out", out, "--json", *options]
    result = halflap(*words).json
    file = Path(result["path"])
    opened = open_gguf(file) if result["padded"] else Checkpoint.open(source)
    model, served = fill_model(opened.config, opened.tensors(), torch.float32), LlamaCpp(file)
    for prompt, completion in zip(prompts, generate(model, prompts, NEW)):
        mine, theirs = (without_end(tokens, model.config) for tokens in (completion.tokens, served.greedy(prompt, NEW)))
        if mine != theirs:
            place = next(i for i, pair in enumerate(zip_longest(mine, theirs)) if pair[0] != pair[1])
            with torch.inference_mode():
                best = model(torch.tensor([[*prompt, *mine[:place]]]))[0, -1].topk(2).values
            assert best[0] - best[1] < 1e-4 * best[0].abs(), f"from token {place}: {mine[place:]}, not {theirs[place:]}"
    return served


def without_end(tokens: list[int], config: ModelConfig) -> list[int]:
    return tokens[:-1] if tokens and tokens[-1] == config.eos_token_id else tokens


@pytest.mark.parametrize("name", shapes())
def test_the_same_greedy_tokens(halflap: Cli, write_uneven: Any, tmp_path: Path, name: str) -> None:
    compare(halflap, write_uneven(shapes()[name]), tmp_path / "out", PROMPTS)


@pytest.mark.parametrize("name", ["nemotron_h", "llama"])
def test_a_student_that_was_cut(halflap: Cli, write_uneven: Any, cut_students: Any, tmp_path: Path, name: str) -> None:
    """Where hidden size or Mamba heads are cut, the correction of norms changes gains, eps and the stream's scale."""
    sizes: list[object] = ["--sizes.hidden-size", 64, "--sizes.intermediate-size", 160]
    sizes += ["--sizes.mamba-num-heads", 8] if name == "nemotron_h" else []
    student = cut_students(write_uneven(shapes()[name]), *sizes)
    compare(halflap, student, tmp_path / "out", PROMPTS)


def real_models() -> list[Any]:
    """The demo's teacher, and SmolLM2-135M where a directory is named."""
    given = os.environ.get("HALFLAP_SMOLLM2")
    missing = pytest.mark.skipif(given is None, reason="HALFLAP_SMOLLM2 names no checkpoint of SmolLM2-135M")
    return [pytest.param(DEMO, id="demo"), pytest.param(Path(given or "."), id="smollm2", marks=missing)]


@pytest.mark.parametrize("source", real_models())
def test_a_real_model_and_its_tokenizer(halflap: Cli, tmp_path: Path, source: Path) -> None:
    tokenizer = Tokenizer.load(source)
    served = compare(halflap, source, tmp_path / "out", [tokenizer.encode(text) for text in TEXTS])
    for text in TEXTS:
        assert served.ask("/tokenize", content=text)["tokens"] == tokenizer.encode(text)


def test_a_padded_student(halflap: Cli, write_uneven: Any, tmp_path: Path) -> None:
    narrow = with_block(shapes()["nemotron_h"], Mamba2Config, num_heads=8)
    compare(halflap, write_uneven(narrow), tmp_path / "out", PROMPTS, "--pad-to-stock")
