"""vLLM on the CPU loads students of equal widths, gives the same greedy tokens, and is served by `halflap serve`.

vLLM pins most of what it stands on, so it lives in an environment of its own: `make test-vllm` makes one and names its
interpreter in HALFLAP_VLLM_PYTHON.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
import urllib.error
import urllib.request
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
def interpreter() -> str:
    found = os.environ.get("HALFLAP_VLLM_PYTHON") or (sys.executable if find_spec("vllm") else None)
    if found is None:
        pytest.skip("vLLM is not installed: `make test-vllm` installs it into an environment of its own")
    return found


@pytest.fixture(scope="module")
def vllm_tokens(interpreter: str, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], list[list[int]]]:
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
    compare(vllm_tokens, write_model(student(name), tmp_path / "model"))


@pytest.mark.parametrize("name", ["llama-tiny", "nemotron-h-tiny", "nemotron-4-tiny"])
def test_a_student_that_was_cut(
    vllm_tokens: Callable[[Path], list[list[int]]], write_model: Any, cut_students: Any, tmp_path: Path, name: str
) -> None:
    """Where hidden size or Mamba heads are cut, the correction of norms changes gains, eps and the stream's scale."""
    sizes: list[object] = ["--sizes.hidden-size", 72, "--sizes.intermediate-size", 160]  # a multiple of Llama's heads
    sizes += ["--sizes.mamba-num-heads", 8] if name == "nemotron-h-tiny" else []
    compare(vllm_tokens, cut_students(write_model(student(name), tmp_path / "model"), *sizes))


def compare(vllm_tokens: Callable[[Path], list[list[int]]], source: Path) -> None:
    model = load_model(source)
    ours = generate(model, PROMPTS, NEW, ignore_eos=True)
    for prompt, mine, theirs in zip(PROMPTS, ours, vllm_tokens(source)):
        if mine.tokens != theirs:  # they may part only where our two best tokens are nearly equal
            place = next(i for i in range(NEW) if mine.tokens[i] != theirs[i])
            with torch.inference_mode():
                best = model(torch.tensor([[*prompt, *mine.tokens[:place]]]))[0, -1].topk(2).values
            assert best[0] - best[1] < 1e-4 * best[0].abs(), f"token {place}: {mine.tokens[place]}, not {theirs[place]}"


def test_served_by_the_front(interpreter: str, write_model: Any, tmp_path: Path) -> None:
    """`halflap serve --engine vllm`: chat, streams, numbers and errors through the front, and an end of all of it."""
    source = write_model(student("nemotron-h-tiny"), tmp_path / "model")
    words = ["--engine", "vllm", "--vllm-command", str(Path(interpreter).with_name("vllm")), "--port", "0"]
    words += ["--device", "cpu", "--max-context", "128", "--max-batch", "4", "--cache-memory", "1GiB"]
    words += ["--engine-args=--enforce-eager", "--api-key", "k"]
    command = [sys.executable, "-m", "halflap", "serve", str(source), *words]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, **ENVIRONMENT})
    assert process.stderr is not None
    said = []
    try:
        for line in process.stderr:
            said.append(line)
            if found := re.search(r"model is at (http://127\.0\.0\.1:\d+)", line):
                break
        else:
            pytest.fail("".join(said[-40:]))
        url = found[1]
        body = {"messages": [{"role": "user", "content": "look"}], "max_tokens": 6, "temperature": 0}
        whole = json.loads(ask(f"{url}/v1/chat/completions", body))
        assert whole["model"] == "model" and whole["usage"]["completion_tokens"] <= 6
        lines = ask(f"{url}/v1/chat/completions", {**body, "stream": True}).split("\n\n")
        chunks = [json.loads(line.removeprefix("data: ")) for line in lines if line and "[DONE]" not in line]
        text = "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks)
        assert text == whole["choices"][0]["message"]["content"] and "data: [DONE]" in lines
        with pytest.raises(urllib.error.HTTPError) as refused:
            ask(f"{url}/v1/chat/completions", {**body, "max_tokens": 1000})
        error = json.load(refused.value)["error"]
        assert refused.value.code == 400 and error["type"] == "invalid_request_error" and "128" in error["message"]
        assert re.search(r'vllm:generation_tokens_total\{.*replica="0"\}', ask(f"{url}/metrics"))
    finally:
        process.terminate()
        process.communicate(timeout=60)
    assert process.returncode == 0


def ask(url: str, body: Any = None) -> str:
    headers = {"Content-Type": "application/json", "Authorization": "Bearer k"}
    data = None if body is None else json.dumps(body).encode()
    with urllib.request.urlopen(urllib.request.Request(url, data, headers), timeout=120) as reply:
        return reply.read().decode()
