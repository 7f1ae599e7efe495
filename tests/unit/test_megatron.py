"""Nemotron-4 under Megatron's names: fused QKV by key/value head, both ways, and what is refused."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import yaml

from halflap.checkpoints.checkpoint import Checkpoint, load_model, save_model
from halflap.checkpoints.megatron import (
    CONFIG,
    cannot_write,
    config_of,
    is_megatron,
    join_qkv,
    open_megatron,
    settings_of,
    shapes,
    split_qkv,
    tensor_names,
)
from halflap.errors import HalflapError
from halflap.models.config import AttentionConfig, MLPConfig, ModelConfig, RopeConfig
from halflap.models.count import count_parameters
from halflap.models.model import HybridModel, initialize
from halflap.models.presets import nemotron_4, preset

Cli = Callable[..., Any]
HALF = RopeConfig(fraction=0.5)
# 96 and 8 heads, 48 and 8, 32 and 32, scaled down; heads together wider than the hidden size
HEADS = {"340b": (12, 1, 8), "15b": (12, 2, 8), "mha": (4, 4, 8), "wide": (6, 2, 12)}


def config_with(heads: tuple[int, int, int], **changes: Any) -> ModelConfig:
    config = nemotron_4(2, hidden=32, mlp=40, attention=heads, vocab=64, context=64)
    return dataclasses.replace(config, **changes)


def write_model(config: ModelConfig, directory: Path, dtype: str = "float32") -> Checkpoint:
    model = HybridModel(config)
    initialize(model, 0)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return save_model(model, directory, dtype=dtype)


@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("tail", [(5,), ()], ids=["weight", "bias"])
def test_fused_rows_go_by_key_value_head(heads: tuple[int, int, int], tail: tuple[int, ...]) -> None:
    H, K, d = heads
    block = AttentionConfig(*heads)
    fused = torch.arange((H + 2 * K) * d).reshape(-1, *(1 for _ in tail)).expand(-1, *tail)
    query, key, value = split_qkv(fused, block)
    assert torch.equal(join_qkv(query, key, value, block), fused)
    for head in range(H):  # row by row: a group is its queries, its key, its value
        group, place = divmod(head, H // K)
        start = group * (H // K + 2) * d + place * d
        assert torch.equal(query[head * d : (head + 1) * d], fused[start : start + d])
    for group in range(K):
        start = (group * (H // K + 2) + H // K) * d
        assert torch.equal(key[group * d : (group + 1) * d], fused[start : start + d])
        assert torch.equal(value[group * d : (group + 1) * d], fused[start + d : start + 2 * d])


def test_names_and_shapes_hold_every_parameter() -> None:
    config = preset("nemotron-4-340b")
    assert sum(torch.Size(shape).numel() for shape in shapes(config).values()) == count_parameters(config)
    assert shapes(config)["decoder.layers.95.self_attention.linear_qkv.weight"] == ((96 + 2 * 8) * 192, 18432)
    assert len(tensor_names(config)) == 4 + 8 * 96


@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_out_and_in_again_is_the_same_bits(
    halflap: Cli, tmp_path: Path, heads: tuple[int, int, int], dtype: str
) -> None:
    before = write_model(config_with(heads), tmp_path / "hf", dtype)
    out = halflap("export", tmp_path / "hf", "--format", "megatron", "--out", tmp_path / "meg", "--json").json
    assert out["format"] == "megatron" and out["max_abs_error"] == 0
    stored = safetensors.torch.load_file(tmp_path / "meg" / "model.safetensors")
    assert {name: tuple(t.shape) for name, t in stored.items()} == shapes(before.config)
    assert not (tmp_path / "meg" / "config.json").exists()  # no stock loader takes it for something else
    back = halflap("import", tmp_path / "meg", "--out", tmp_path / "back", "--json").json
    assert back["parameters"] == count_parameters(before.config) and back["dtype"] == dtype
    again = Checkpoint.open(tmp_path / "back")
    assert again.config == before.config and again.digest == before.digest
    assert [step["verb"] for step in again.lineage] == ["export", "import"]


@pytest.mark.parametrize(
    "changes",
    [
        {"tie_word_embeddings": True},
        {"blocks": (AttentionConfig(4, 2, 8, rope=HALF, bias=True), MLPConfig(24, bias=True)) * 2},
    ],
    ids=["tied", "biases"],
)
def test_tied_embeddings_and_biases(halflap: Cli, tmp_path: Path, changes: dict[str, Any]) -> None:
    before = write_model(config_with((4, 2, 8), **changes), tmp_path / "hf")
    halflap("export", tmp_path / "hf", "--format", "megatron", "--out", tmp_path / "meg", "--json").json  # noqa: B018
    halflap("import", tmp_path / "meg", "--out", tmp_path / "back", "--json").json  # noqa: B018
    assert Checkpoint.open(tmp_path / "back").digest == before.digest


@pytest.fixture
def exported(halflap: Cli, tmp_path: Path) -> Path:
    write_model(config_with((4, 2, 8)), tmp_path / "hf")
    assert halflap("export", tmp_path / "hf", "--format", "megatron", "--out", tmp_path / "meg").status == 0
    return tmp_path / "meg"


def rewrite(directory: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    file = directory / "model.safetensors"
    safetensors.torch.save_file(change(safetensors.torch.load_file(file)), file)


def settings_in(directory: Path) -> dict[str, Any]:
    return yaml.safe_load((directory / CONFIG).read_text())


def test_other_spellings_of_names_mean_the_same(exported: Path, tmp_path: Path) -> None:
    """NeMo's prefixes, norms that are modules of their own, Transformer Engine's extra states."""
    digest = open_megatron(exported, settings_in(exported)).digest

    def respell(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        names = (
            "module."
            + name.replace("self_attention.linear_qkv.layer_norm_", "input_layernorm.").replace(
                "mlp.linear_fc1.layer_norm_", "pre_mlp_layernorm."
            )
            for name in tensors
        )
        extra = {"module.decoder.layers.0.mlp.linear_fc1._extra_state": torch.zeros(1)}
        return dict(zip(names, tensors.values(), strict=True)) | extra

    rewrite(exported, respell)
    assert is_megatron(exported)
    assert open_megatron(exported, settings_in(exported)).digest == digest


def test_a_hugging_face_config_does_as_well(halflap: Cli, exported: Path, tmp_path: Path) -> None:
    (exported / CONFIG).unlink()
    shutil.copy(tmp_path / "hf" / "config.json", exported / "config.json")
    assert halflap("import", exported, "--out", tmp_path / "back").status == 0
    tokens = torch.arange(12)[None]
    with torch.no_grad():
        assert torch.equal(load_model(tmp_path / "back")(tokens), load_model(tmp_path / "hf")(tokens))


def test_both_generations_of_settings(exported: Path) -> None:
    config = open_megatron(exported, settings_in(exported)).config
    newer = {
        "config": {
            "_target_": "nemo.collections.llm.gpt.model.nemotron.Nemotron4Config15B",
            "num_layers": 2,
            "hidden_size": 32,
            "ffn_hidden_size": 40,
            "num_attention_heads": 4,
            "num_query_groups": 2,
            "kv_channels": 8,
            "seq_length": 64,
            "normalization": "LayerNorm",
            "layernorm_zero_centered_gamma": True,
            "rotary_percent": 0.5,
            "share_embeddings_and_output_weights": False,
        }
    }
    assert open_megatron(exported, newer).config == config
    assert settings_of(preset("nemotron-4-340b"))["kv_channels"] == 192


@pytest.mark.parametrize(
    "change, said",
    [
        ({"normalization": "RMSNorm"}, "normalization='RMSNorm', which Nemotron-4 has not; allowed is 'layernorm1p'"),
        ({"normalization": "LayerNorm"}, "without layernorm_zero_centered_gamma=true"),
        ({"num_moe_experts": 8}, "num_moe_experts=8"),
        ({"activation": "swiglu"}, "activation='swiglu'"),
        ({"rotary_interleaved": True}, "rotary_interleaved=True"),
        ({"num_layers": None}, "has no num_layers: add it"),
        ({"rotary_percentage": None}, "has no rotary_percent: add it"),
        ({"hidden_size": "wide"}, "hidden_size='wide'.* whole number"),
        ({"num_query_groups": 4}, "wrongly shaped|of 96 rows"),
        ({"num_layers": 3}, r"8 missing \(decoder.layers.2"),
        ({"num_layers": 1}, r"8 unknown \(decoder.layers.1"),
    ],
)
def test_settings_that_do_not_fit(exported: Path, change: dict[str, Any], said: str) -> None:
    with pytest.raises(HalflapError, match=said):
        open_megatron(exported, settings_in(exported) | change)


def test_one_tensor_parallel_rank_is_told_apart(halflap: Cli, exported: Path, tmp_path: Path) -> None:
    rewrite(exported, lambda tensors: {n: t[: len(t) // 2].clone() for n, t in tensors.items()})
    outcome = halflap("import", exported, "--out", tmp_path / "back")
    assert outcome.status == 1
    assert "has 32 of 64 rows, so these are the tensors of one of 2 tensor-parallel ranks" in outcome.err


def test_sharded_formats_are_named(halflap: Cli, tmp_path: Path) -> None:
    (tmp_path / "nemo" / "weights").mkdir(parents=True)
    (tmp_path / "nemo" / "weights" / "__0_0.distcp").touch()
    outcome = halflap("import", tmp_path / "nemo", "--out", tmp_path / "back")
    assert outcome.status == 1 and "sharded checkpoint of Megatron (__0_0.distcp)" in outcome.err


def test_what_cannot_be_written(halflap: Cli, tmp_path: Path) -> None:
    write_model(preset("llama-tiny"), tmp_path / "llama")
    outcome = halflap("export", tmp_path / "llama", "--format", "megatron", "--out", tmp_path / "meg")
    assert outcome.status == 1 and "it is a llama and this form is written for nemotron alone" in outcome.err
    config = config_with((4, 2, 8))
    assert cannot_write(config) is None
    uneven = (*config.blocks[:3], MLPConfig(24))
    assert "differ in intermediate_size" in str(cannot_write(dataclasses.replace(config, blocks=uneven)))


def test_an_empty_directory_of_tensors_has_the_published_vocabulary() -> None:
    config = preset("nemotron-4-15b")
    assert dataclasses.replace(config_of(settings_of(config), {}), tie_word_embeddings=False) == config
