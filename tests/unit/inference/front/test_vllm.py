"""The command line for vLLM, and what is refused before anything is started."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from halflap.errors import HalflapError
from halflap.inference.front.vllm import VllmSettings, check_loads, command, environment, with_stops
from halflap.models.config import MLPConfig
from halflap.models.presets import preset

SETTINGS = VllmSettings("m", 512, 8)
HERMES = "{% for t in tools %}<tool_call>{% endfor %}"


def words_of(name: str = "llama-tiny", template: str | Path = "", **changes: Any) -> str:
    settings = dataclasses.replace(SETTINGS, **changes)
    return " ".join(command(["vllm"], Path("/d"), Path("/s"), preset(name), settings, template))


def test_the_command_line() -> None:
    assert words_of() == (
        "vllm serve /d --uds /s --served-model-name m --max-model-len 512 --max-num-seqs 8 --dtype auto "
        "--tensor-parallel-size 1 --pipeline-parallel-size 1 --enable-prefix-caching --uvicorn-log-level warning"
    )
    assert "--no-enable-prefix-caching" in words_of(prefix_cache=False)
    assert "--no-enable-prefix-caching" in words_of("nemotron-h-tiny")
    assert "--dtype float32" in words_of(on_cpu=True) and "--dtype bfloat16" in words_of(on_cpu=True, dtype="bfloat16")
    spread = words_of(tensor_parallel=4, pipeline_parallel=2, ray=True)
    assert "--tensor-parallel-size 4 --pipeline-parallel-size 2 --distributed-executor-backend ray" in spread
    assert words_of(more=("--max-num-seqs", "99")).endswith("--max-num-seqs 99")  # vLLM takes the last


def test_tools_and_templates() -> None:
    assert "--tool-call-parser hermes" in words_of(template=HERMES)
    assert "--enable-auto-tool-choice" not in words_of(template="{{ messages }} <tool_call>")
    assert "--chat-template /plain" in words_of(template=Path("/plain"))
    assert with_stops({"stop": "a", "n": 1}, ("b",)) == {"stop": ["a", "b"], "n": 1}
    assert with_stops({}, ("b",)) == {"stop": ["b"]} and with_stops({"stop": ["a"]}, ("b",)) == {"stop": ["a", "b"]}


def test_memory_and_clusters() -> None:
    memory = dataclasses.replace(SETTINGS, cache_memory=3 * 2**29)
    assert "--kv-cache-memory-bytes 1610612736" in words_of(cache_memory=3 * 2**29)
    assert environment(dataclasses.replace(memory, on_cpu=True), None)["VLLM_CPU_KVCACHE_SPACE"] == "2"
    assert "VLLM_CPU_KVCACHE_SPACE" not in environment(memory, None)
    ray = dataclasses.replace(SETTINGS, ray=True)
    assert environment(ray, "10.0.0.1:6379")["RAY_ADDRESS"] == "10.0.0.1:6379"
    assert "RAY_ADDRESS" not in environment(ray, "auto")


@pytest.mark.parametrize("word", ["--port", "--port=3", "--api-key", "--uds", "--ssl-keyfile", "--served_model_name=x"])
def test_what_is_the_fronts_is_not_passed_on(word: str) -> None:
    with pytest.raises(HalflapError, match="the front's to choose"):
        dataclasses.replace(SETTINGS, more=("--enforce-eager", word))


def stock(directory: Path) -> Path:
    (directory / "config.json").write_text('{"model_type": "llama"}')
    (directory / "tokenizer.json").write_text("{}")
    return directory


def test_what_vllm_cannot_load(tmp_path: Path) -> None:
    hybrid = preset("nemotron-h-tiny")
    with pytest.raises(HalflapError, match=r"no tokenizer\.json"):
        (tmp_path / "config.json").write_text('{"model_type": "nemotron_h"}')
        check_loads(tmp_path, hybrid, SETTINGS)
    check_loads(stock(tmp_path), hybrid, SETTINGS)
    place = next(i for i, block in enumerate(hybrid.blocks) if isinstance(block, MLPConfig))
    narrow = dataclasses.replace(hybrid.blocks[place], intermediate_size=16)
    unequal = dataclasses.replace(hybrid, blocks=(*hybrid.blocks[:place], narrow, *hybrid.blocks[place + 1 :]))
    with pytest.raises(HalflapError, match=r"differ in intermediate_size .*`halflap export MODEL --pad-to-stock"):
        check_loads(tmp_path, unequal, SETTINGS)
    with pytest.raises(HalflapError, match="vLLM has no Hymba; serve it with --engine halflap"):
        check_loads(tmp_path, preset("hymba-tiny"), SETTINGS)
    (tmp_path / "config.json").write_text('{"model_type": "halflap"}')
    with pytest.raises(HalflapError, match="`halflap export MODEL --out DIR` writes it for stock classes"):
        check_loads(tmp_path, hybrid, SETTINGS)


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("llama-tiny", {"tensor_parallel": 3}, r"its key/value heads \(2\) cannot be divided by --tensor-parallel 3"),
        ("nemotron-h-tiny", {"tensor_parallel": 3}, r"cannot be divided by --tensor-parallel 3"),
        ("nemotron-4-tiny", {"tensor_parallel": 3}, r"key/value heads \(2\) cannot be divided by --tensor-parallel 3"),
        ("llama-tiny", {"pipeline_parallel": 99}, r"it has \d+ layers, fewer than --pipeline-parallel 99"),
    ],
)
def test_how_vllm_cannot_spread_a_model(tmp_path: Path, name: str, changes: dict[str, int], reason: str) -> None:
    with pytest.raises(HalflapError, match=reason):
        check_loads(stock(tmp_path), preset(name), dataclasses.replace(SETTINGS, **changes))


def test_key_value_heads_may_be_copied(tmp_path: Path) -> None:
    """Six query heads over two key/value heads go to six devices; the MLP must, too."""
    check_loads(stock(tmp_path), preset("nemotron-4-tiny"), dataclasses.replace(SETTINGS, tensor_parallel=6))
    config = preset("llama-tiny")
    blocks = tuple(
        dataclasses.replace(block, intermediate_size=384) if isinstance(block, MLPConfig) else block
        for block in config.blocks
    )
    six = dataclasses.replace(SETTINGS, tensor_parallel=6)
    check_loads(stock(tmp_path), dataclasses.replace(config, blocks=blocks), six)
    with pytest.raises(HalflapError, match=r"intermediate size \(256\)"):
        check_loads(tmp_path, config, six)
