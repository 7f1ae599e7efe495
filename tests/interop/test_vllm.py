"""vLLM on the CPU loads students of equal widths and goes on with the same greedy tokens.

vLLM pins most of what it stands on, so it lives in an environment of its own: `make test-vllm` makes one and names its
interpreter in HALFLAP_VLLM_PYTHON.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from halflap.checkpoints.checkpoint import load_model
from halflap.inference.generate import generate
from halflap.models.config import AttentionConfig, MLPConfig, ModelConfig
from halflap.models.presets import preset

NEW = 16
PROMPTS = [[1, 17, 40, 9, 200, 33], [1, 5], list(range(3, 40))]  # short of a block of its prefix cache
SCRIPT = """
import json, sys
from vllm import LLM, SamplingParams

if __name__ == "__main__":
    directory, prompts, count = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
    model = LLM(directory, dtype="float32", enforce_eager=True, max_model_len=128, max_num_seqs=4)
    settings = SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True, detokenize=False)
    outputs = model.generate([{"prompt_token_ids": prompt} for prompt in prompts], settings)
    print("TOKENS", json.dumps([list(output.outputs[0].token_ids) for output in outputs]), flush=True)
"""
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}


@pytest.fixture(scope="module")
def vllm_tokens(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], list[list[int]]]:
    interpreter = os.environ.get("HALFLAP_VLLM_PYTHON") or (sys.executable if find_spec("vllm") else None)
    if interpreter is None:
        pytest.skip("vLLM is not installed: `make test-vllm` installs it into an environment of its own")
    script = tmp_path_factory.mktemp("vllm") / "greedy.py"
    script.write_text(SCRIPT)

    def run(directory: Path) -> list[list[int]]:
        words = [interpreter, str(script), str(directory), json.dumps(PROMPTS), str(NEW)]
        done = subprocess.run(words, capture_output=True, text=True, timeout=600, env={**os.environ, **ENVIRONMENT})
        assert done.returncode == 0, done.stderr[-4000:]
        return json.loads(next(line for line in done.stdout.splitlines() if line.startswith("TOKENS"))[7:])

    return run


def student(name: str) -> ModelConfig:
    """A small shape with heads of a size that vLLM's kernels have, narrower than its preset as a student is."""
    config = dataclasses.replace(preset(name), vocab_size=320)
    blocks = []
    for block in config.blocks:
        if isinstance(block, AttentionConfig):
            block = dataclasses.replace(block, head_dim=32)
        elif isinstance(block, MLPConfig):
            block = dataclasses.replace(block, intermediate_size=208)
        blocks.append(block)
    return dataclasses.replace(config, blocks=tuple(blocks))


@pytest.mark.parametrize("name", ["llama-tiny", "nemotron-h-tiny", "nemotron-4-tiny"])
def test_the_same_greedy_tokens(
    vllm_tokens: Callable[[Path], list[list[int]]], write_model: Any, tmp_path: Path, name: str
) -> None:
    source = write_model(student(name), tmp_path / "model")
    model = load_model(source)
    ours = generate(model, PROMPTS, NEW, ignore_eos=True)
    for prompt, mine, theirs in zip(PROMPTS, ours, vllm_tokens(source)):
        if mine.tokens != theirs:  # they may part only where our two best tokens are nearly equal
            place = next(i for i in range(NEW) if mine.tokens[i] != theirs[i])
            with torch.inference_mode():
                best = model(torch.tensor([[*prompt, *mine.tokens[:place]]]))[0, -1].topk(2).values
            assert best[0] - best[1] < 1e-4 * best[0].abs(), f"token {place}: {mine.tokens[place]}, not {theirs[place]}"
