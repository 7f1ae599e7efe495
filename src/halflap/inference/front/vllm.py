"""The command line that serves a checkpoint with vLLM, and what vLLM cannot do with it. Nothing here runs vLLM."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from halflap.checkpoints.config import family_of, uses_own_names
from halflap.checkpoints.padding import padded_config
from halflap.errors import HalflapError
from halflap.models.config import AttentionConfig, Mamba2Config, MLPConfig, ModelConfig

OURS = ("--host", "--port", "--uds", "--api-key", "--allowed-origins", "--served-model-name", "--model", "--root-path",
        "--fd")  # fmt: skip
"""What vLLM is asked where, and under which name: the front's to say. Flags that begin with --ssl, too."""
TOOL_PARSERS = {"<tool_call>": "hermes", "python_tag": "llama3_json"}
"""What a chat template that writes calls has in it, and vLLM's parser of that format."""


@dataclass(frozen=True)
class VllmSettings:
    """What vLLM is told.

    max_context: tokens of a prompt and its reply. max_batch: replies written at once. cache_memory: bytes of keys,
    values and states, or None for vLLM's own choice. ray: on a Ray cluster. on_cpu: vLLM's wheel for processors.
    more: words for vLLM itself, which override.
    """

    name: str
    max_context: int
    max_batch: int
    dtype: str = "auto"
    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    ray: bool = False
    prefix_cache: bool = True
    cache_memory: int | None = None
    on_cpu: bool = False
    more: Sequence[str] = field(default=())

    def __post_init__(self) -> None:
        for word in self.more:
            flag = word.partition("=")[0].replace("_", "-")
            if flag in OURS or flag.startswith("--ssl"):
                raise HalflapError(
                    f"engine_args has {word!r}, which is the front's to choose; leave it out (halflap's own flags say "
                    "where to listen, for whom and under which name)"
                )


def command(
    executable: Sequence[str],
    directory: Path,
    socket: Path,
    config: ModelConfig,
    settings: VllmSettings,
    template: str | Path,
) -> list[str]:
    """The words that start vLLM on a checkpoint, behind a Unix socket.

    template: the checkpoint's chat template, or the file of one where it has none.
    """
    words = [*executable, "serve", str(directory), "--uds", str(socket), "--served-model-name", settings.name]
    words += ["--max-model-len", str(settings.max_context), "--max-num-seqs", str(settings.max_batch)]
    words += ["--dtype", "float32" if settings.on_cpu and settings.dtype == "auto" else settings.dtype]
    words += ["--tensor-parallel-size", str(settings.tensor_parallel)]
    words += ["--pipeline-parallel-size", str(settings.pipeline_parallel)]
    if settings.ray:
        words += ["--distributed-executor-backend", "ray"]
    # Of hybrids vLLM keeps states at coarse blocks only: short prompts never hit, and on processors it may crash.
    hybrid = any(block.ssm is not None for block in config.blocks)
    words += ["--enable-prefix-caching" if settings.prefix_cache and not hybrid else "--no-enable-prefix-caching"]
    if settings.cache_memory is not None and not settings.on_cpu:
        words += ["--kv-cache-memory-bytes", str(settings.cache_memory)]
    if isinstance(template, Path):
        words += ["--chat-template", str(template)]
    elif parser := next((p for mark, p in TOOL_PARSERS.items() if mark in template and "tools" in template), None):
        words += ["--enable-auto-tool-choice", "--tool-call-parser", parser]
    return [*words, "--uvicorn-log-level", "warning", *settings.more]


def environment(settings: VllmSettings, address: str | None) -> dict[str, str | None]:
    """What is changed for vLLM. address: the Ray cluster's, or None for one that vLLM finds or starts."""
    found: dict[str, str | None] = {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    found |= {"VLLM_API_KEY": None, "HALFLAP_API_KEY": None}  # the front asks for keys
    if settings.cache_memory is not None and settings.on_cpu:
        found["VLLM_CPU_KVCACHE_SPACE"] = str(max(1, -(-settings.cache_memory // 2**30)))  # GiB
    if settings.ray:
        found |= {"RAY_USAGE_STATS_ENABLED": "0"} | ({"RAY_ADDRESS": address} if address not in (None, "auto") else {})
    return found


def check_loads(directory: Path, config: ModelConfig, settings: VllmSettings) -> None:
    """Raise HalflapError when vLLM cannot load a checkpoint, or not over so many devices."""
    family = family_of(config)
    if family.name == "hymba":
        raise HalflapError("vLLM has no Hymba; serve it with --engine halflap, with --replicas on many cores or GPUs")
    if reason := family.cannot_write(config):
        padded = "`halflap export MODEL --pad-to-stock --out DIR` pads it, and " if _padding_helps(config) else ""
        raise HalflapError(
            f"vLLM loads stock classes and none can hold this model, because {reason}; {padded}--engine halflap serves "
            "it as it is"
        )
    if uses_own_names(directory):
        raise HalflapError(
            f"{directory} has tensors under halflap's own names, which vLLM does not know; "
            "`halflap export MODEL --out DIR` writes it for stock classes"
        )
    if not (directory / "tokenizer.json").exists():
        raise HalflapError(f"{directory} has no tokenizer.json, which vLLM needs; put the model's tokenizer there")
    if reason := _cannot_split(config, settings, len(config.blocks) // family.depth_unit):
        raise HalflapError(f"vLLM cannot spread this model so: {reason}; choose another number")


def _padding_helps(config: ModelConfig) -> bool:
    try:
        return family_of(config).cannot_write(padded_config(config)) is None
    except HalflapError:
        return False


def _cannot_split(config: ModelConfig, settings: VllmSettings, layers: int) -> str | None:
    ways = settings.tensor_parallel
    if settings.pipeline_parallel > layers:
        return f"it has {layers} layers, fewer than --pipeline-parallel {settings.pipeline_parallel}"
    for block in config.blocks:
        for name, count in _divided(block, ways):
            if count % ways:
                return f"its {name} ({count}) cannot be divided by --tensor-parallel {ways}"
    return None


def _divided(block: Any, ways: int) -> list[tuple[str, int]]:
    """What vLLM cuts into `ways` parts; key/value heads that are fewer are copied, as is a single group."""
    if isinstance(block, AttentionConfig):
        few = ways > block.num_key_value_heads and ways % block.num_key_value_heads == 0
        keys = [] if few else [("key/value heads", block.num_key_value_heads)]
        return [("attention heads", block.num_attention_heads), *keys]
    if isinstance(block, MLPConfig):
        return [("intermediate size", block.intermediate_size)]
    if isinstance(block, Mamba2Config):
        groups = [] if block.num_groups == 1 else [("Mamba groups", block.num_groups)]
        return [("Mamba heads", block.num_heads), *groups]
    return []


def with_stops(body: Mapping[str, Any], stops: Sequence[str]) -> dict[str, Any]:
    """A body whose reply ends at these texts, too, as turns do that are written without a template of the model's."""
    given = body.get("stop")
    before = [given] if isinstance(given, str) else given if isinstance(given, list) else []
    return {**body, "stop": [*before, *stops]}
