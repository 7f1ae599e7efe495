"""halflap.json, where somebody has written into it, and models that two configs can say."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from halflap.checkpoints.config import read_config, write_config
from halflap.errors import HalflapError
from halflap.models.config import AttentionConfig, HybridConfig, Mamba1Config, MLPConfig, ModelConfig, RopeConfig
from halflap.models.presets import preset


def changed(directory: Path, **values: Any) -> Path:
    """A Hymba of which halflap.json alone is there, with fields set; `attention__rope` is block 0's attention's."""
    write_config(directory, preset("hymba-tiny"), "float32", "0")
    (directory / "config.json").unlink()
    data = json.loads((directory / "halflap.json").read_text())
    for name, value in values.items():
        owner, _, field = name.rpartition("__")
        (data["config"]["blocks"][0][owner] if owner else data["config"])[field] = value
    if "attention" in values:
        data["config"]["blocks"][0]["attention"] = data["config"].pop("attention")
    (directory / "halflap.json").write_text(json.dumps(data))
    return directory


@pytest.mark.parametrize(
    "values, complaint",
    [
        ({"num_meta_tokens": 8.0}, "ModelConfig.num_meta_tokens is 8.0; it must be a whole number"),
        ({"num_meta_tokens": True}, "ModelConfig.num_meta_tokens is True; it must be a whole number"),
        ({"attention__key_value_source": "2"}, "AttentionConfig.key_value_source is '2'; it must be a whole number"),
        ({"attention__rope": 5}, "a value of a kind that its key cannot have"),
        ({"attention": None}, "a value of a kind that its key cannot have"),
        ({"blocks": 5}, "a value of a kind that its key cannot have"),
        ({"blocks": []}, "the model has no blocks"),
    ],
)
def test_a_value_that_cannot_be_names_the_file(tmp_path: Path, values: dict[str, Any], complaint: str) -> None:
    with pytest.raises(HalflapError, match=rf"halflap\.json.*{complaint}"):
        read_config(changed(tmp_path, **values))


def test_a_missing_field_is_named(tmp_path: Path) -> None:
    directory = changed(tmp_path)
    data = json.loads((directory / "halflap.json").read_text())
    del data["config"]["vocab_size"]
    (directory / "halflap.json").write_text(json.dumps(data))
    with pytest.raises(HalflapError, match=r"halflap\.json: ModelConfig has no vocab_size: give the missing field"):
        read_config(directory)


@pytest.mark.parametrize("width", [None, 8])
def test_value_heads_as_wide_as_keys_can_be_said_in_two_ways(tmp_path: Path, width: int | None) -> None:
    attention = AttentionConfig(4, 2, 8, RopeConfig(), value_head_dim=width)
    assert attention == dataclasses.replace(attention, value_head_dim=8)
    mlp = MLPConfig(16, "silu", gated=True)
    pairs = {
        "hymba": (HybridConfig(attention, Mamba1Config(32, 4, 2)), mlp),
        "llama": (attention, mlp),
    }
    for family, blocks in pairs.items():
        config = ModelConfig(family, 64, 32, blocks * 2, norm_eps=1e-6)
        write_config(tmp_path / family, config, "float32", "0")
        assert read_config(tmp_path / family) == config


@pytest.mark.parametrize("key", ["tie_word_embeddings", "attention_bias", "mlp_bias"])
@pytest.mark.parametrize("family", ["nemotron-4-tiny", "llama-tiny"])
def test_a_word_is_no_truth_value(tmp_path: Path, family: str, key: str) -> None:
    write_config(tmp_path, preset(family), "float32", "0")
    data = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(data | {key: "false"}))
    with pytest.raises(HalflapError, match=f"config.json has {key}='false'; allowed are true and false"):
        read_config(tmp_path)
