"""config.json of both families: every spelling, what is refused and how, and the way back."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from halflap.checkpoints import config as checkpoint_config
from halflap.checkpoints import llama, nemotron_h
from halflap.checkpoints.config import FAMILIES, read_config, read_lineage, write_config
from halflap.errors import HalflapError
from halflap.models.config import AttentionConfig, Mamba2Config, MLPConfig, ModelConfig, RopeConfig, RopeScaling
from halflap.models.presets import PRESETS, preset

# the spelling of the code that came with the first checkpoints
ORIGINAL = {
    "model_type": "nemotron_h",
    "vocab_size": 64,
    "hidden_size": 48,
    "hybrid_override_pattern": "M-M*-M-",
    "num_hidden_layers": 7,
    "intermediate_size": 40,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "attention_head_dim": 6,
    "mamba_num_heads": 16,
    "mamba_head_dim": 6,
    "mamba_n_groups": 4,
    "ssm_state_size": 8,
    "mamba_d_conv": 3,
    "mamba_conv_bias": True,
    "mamba_chunk_size": 16,
    "mamba_expand": 7,
    "mamba_dt_limit": [0.0, math.inf],
    "mamba_dt_min": 0.001,
    "layer_norm_epsilon": 1e-6,
    "max_position_embeddings": 77,
}
# what transformers writes
NATIVE = {
    "model_type": "nemotron_h",
    "vocab_size": 64,
    "hidden_size": 48,
    "layers_block_type": [
        *("linear_attention", "mlp", "linear_attention", "full_attention"),
        *("mlp", "linear_attention", "mlp"),
    ],
    "intermediate_size": 40,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "mamba_num_heads": 16,
    "mamba_head_dim": 6,
    "n_groups": 4,
    "ssm_state_size": 8,
    "conv_kernel": 3,
    "use_conv_bias": True,
    "chunk_size": 16,
    "expand": 2,
    "time_step_limit": [0.0, {"__float__": "Infinity"}],
    "time_step_min": 0.001,
    "layer_norm_epsilon": 1e-6,
    "max_position_embeddings": 77,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "mtp_layers_block_type": ["full_attention", "moe"],
}
LLAMA = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
}


def put(directory, data) -> None:
    (directory / "config.json").write_text(json.dumps(data))


# ---- Nemotron-H


def test_both_dialects_mean_the_same_model():
    one = nemotron_h.read_config(ORIGINAL)
    assert one == nemotron_h.read_config(NATIVE)
    assert one.pattern() == "M-M*-M-" and one.norm_eps == 1e-6
    mamba = one.blocks[0]
    assert isinstance(mamba, Mamba2Config)
    assert (mamba.inner_size, mamba.conv_kernel, mamba.chunk_size, mamba.norm_eps) == (96, 3, 16, 1e-6)
    assert mamba.time_step_limit == (0.0, math.inf)  # never time_step_min, which is for initialisation
    attention = one.blocks[3]
    assert attention == AttentionConfig(8, 2, 6)


@pytest.mark.parametrize("key", ["layers_block_type", "layer_types"])
@pytest.mark.parametrize("names", [("mamba", "attention", "mlp"), ("linear_attention", "full_attention", "mlp")])
def test_every_spelling_of_the_blocks(key, names):
    data = {k: v for k, v in NATIVE.items() if k != "layers_block_type"}
    assert nemotron_h.read_config(data | {key: list(names)}).pattern() == "M*-"


def test_marks_of_training_frameworks_in_the_pattern_are_skipped():
    data = ORIGINAL | {"hybrid_override_pattern": "M-|M*-|M-/*E/*E"}
    assert nemotron_h.read_config(data).pattern() == "M-M*-M-"


def test_expand_is_never_used_for_sizes():
    assert nemotron_h.read_config(ORIGINAL | {"mamba_expand": 99, "expand": 99}) == nemotron_h.read_config(ORIGINAL)


def test_absent_keys_take_the_defaults_of_the_stock_class():
    config = nemotron_h.read_config({"hybrid_override_pattern": preset("nemotron-h-8b").pattern()})
    assert dataclasses.replace(config, max_position_embeddings=8192) == preset("nemotron-h-8b")


def test_a_time_step_limit_is_taken_over():
    mamba = nemotron_h.read_config(ORIGINAL | {"mamba_dt_limit": [0.001, "inf"]}).blocks[0]
    assert isinstance(mamba, Mamba2Config) and mamba.time_step_limit == (0.001, math.inf)


@pytest.mark.parametrize(
    "change, complaint",
    [
        ({"hybrid_override_pattern": "M-E-"}, "block 2 .* mixture-of-experts"),
        ({"hybrid_override_pattern": "M-X-"}, "letter 'X' at position 2"),
        ({"use_bias": True}, "use_bias=True"),
        ({"mamba_proj_bias": True}, "mamba_proj_bias=True"),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"mamba_hidden_act": "gelu"}, "mamba_hidden_act='gelu'"),
        ({"mlp_hidden_act": "gelu"}, "'gelu' is not known; allowed are relu2, silu"),
        ({"sliding_window": 128}, "sliding_window=128"),
        ({"quantization_config": {"quant_method": "fp8"}}, "dequantize"),
        ({"mamba_n_groups": 3}, "mamba_num_heads=16 is not divisible by n_groups=3"),
        ({"num_key_value_heads": 3}, "num_attention_heads=8 is not divisible by num_key_value_heads=3"),
        ({"n_groups": 8}, "n_groups=8, mamba_n_groups=4"),
        ({"layers_block_type": ["mamba", "mlp"]}, "'M-M\\*-M-' under hybrid_override_pattern and 'M-'"),
        ({"hybrid_override_pattern": None}, "nothing about its blocks"),
        ({"hybrid_override_pattern": None, "layer_types": ["mamba", "rnn"]}, "a block of type 'rnn'"),
        ({"hidden_size": "48"}, "hidden_size is '48'"),
        ({"hidden_size": 0}, "hidden_size is 0"),
        ({"mamba_dt_limit": 5}, "a value of a kind that its key cannot have"),
        ({"layer_norm_epsilon": "tiny"}, "'tiny' where a number is needed"),
        ({"layer_types": 5}, "a value of a kind that its key cannot have"),
        ({"eos_token_id": [2, "</s>"]}, "eos_token_id=.* a token id is a whole number or null"),
    ],
)
def test_what_cannot_be_run_is_refused_by_name(tmp_path, change, complaint):
    put(tmp_path, ORIGINAL | change)
    with pytest.raises(HalflapError, match=complaint) as caught:
        read_config(tmp_path)
    assert "config.json" in str(caught.value) and "\n" not in str(caught.value)


def test_experts_are_refused_in_the_list_too():
    with pytest.raises(HalflapError, match="mixture-of-experts"):
        nemotron_h.read_config(NATIVE | {"layers_block_type": ["mamba", "moe"]})


# ---- Llama


def test_one_llama_layer_is_two_blocks():
    config = llama.read_config(LLAMA)
    assert config.pattern() == "*-*-"
    assert config.blocks[0] == AttentionConfig(4, 2, 12, rope=RopeConfig(10000.0))
    assert config.blocks[1] == MLPConfig(40, activation="silu", gated=True)
    assert FAMILIES["llama"].depth_unit == 2 and FAMILIES["nemotron_h"].depth_unit == 1


SCALING = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize(
    "change",
    [
        {"rope_theta": 5e5, "rope_scaling": SCALING | {"original_max_position_embeddings": 64}},
        {"rope_theta": 5e5, "rope_scaling": {"type": "llama3"} | SCALING | {"original_max_position_embeddings": 64}},
        {"rope_parameters": SCALING | {"rope_theta": 5e5, "original_max_position_embeddings": 64}},
    ],
)
def test_every_spelling_of_the_rotary_embedding(change):
    attention = llama.read_config(LLAMA | change).blocks[0]
    assert isinstance(attention, AttentionConfig)
    assert attention.rope == RopeConfig(5e5, scaling=RopeScaling(8.0, 1.0, 4.0, 64))


@pytest.mark.parametrize(
    "change, complaint",
    [
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "of type 'yarn'; allowed are default and llama3"),
        ({"rope_scaling": {"rope_type": "llama3"}}, "has no factor"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ({"hidden_act": "gelu"}, "'gelu' is not known"),
        ({"num_attention_heads": 0}, "num_attention_heads=0"),
        ({"head_dim": 11}, "must be an even number"),
        ({"quantization_config": {"bits": 4}}, "quantized weights"),
    ],
)
def test_a_llama_that_cannot_be_run_is_refused_by_name(change, complaint):
    with pytest.raises(HalflapError, match=complaint):
        llama.read_config(LLAMA | change)


# ---- there and back


@st.composite
def stock_configs(draw) -> ModelConfig:
    """Any config that a stock class can express."""
    size = st.integers(1, 6)
    heads, groups, kv = draw(size), draw(size), draw(size)
    common = {
        "vocab_size": draw(st.integers(3, 50)),
        "norm_eps": draw(st.sampled_from([1e-5, 1e-6])),
        "max_position_embeddings": draw(st.integers(1, 5000)),
        "initializer_range": draw(st.sampled_from([0.02, 0.1])),
        "bos_token_id": draw(st.one_of(st.none(), st.integers(0, 9))),
        "eos_token_id": draw(st.one_of(st.none(), st.integers(0, 9), st.tuples(st.integers(0, 9), st.integers(0, 9)))),
        "pad_token_id": draw(st.one_of(st.none(), st.integers(0, 9))),
    }
    if draw(st.booleans()):
        rope = RopeConfig(draw(st.sampled_from([1e4, 5e5])), 1.0, draw(st.sampled_from([None, RopeScaling(8.0)])))
        attention = AttentionConfig(kv * heads, kv, 2 * draw(size), rope, draw(st.booleans()))
        mlp = MLPConfig(draw(size), draw(st.sampled_from(["silu", "relu2"])), True, draw(st.booleans()))
        return ModelConfig(
            family="llama",
            hidden_size=kv * heads * draw(size),
            blocks=(attention, mlp) * draw(size),
            tie_word_embeddings=draw(st.booleans()),
            **common,
        )
    limit = draw(st.sampled_from([(0.0, math.inf), (0.001, math.inf)]))
    kinds = [
        Mamba2Config(
            groups * heads, draw(size), groups, draw(size), draw(size), draw(size), draw(st.booleans()), limit,
            common["norm_eps"],
        ),
        AttentionConfig(kv * heads, kv, draw(size)),
        MLPConfig(draw(size), draw(st.sampled_from(["silu", "relu2"])), False, draw(st.booleans())),
    ]  # fmt: skip
    return ModelConfig(
        family="nemotron_h",
        hidden_size=draw(st.integers(1, 50)),
        blocks=tuple(draw(st.lists(st.sampled_from(kinds), min_size=1, max_size=6))),
        residual_in_fp32=draw(st.booleans()),
        **common,
    )


@settings(max_examples=80)
@given(config=stock_configs())
def test_a_config_survives_its_stock_form_and_ours(tmp_path_factory, config):
    family = FAMILIES[config.family]
    assert family.cannot_write(config) is None
    assert family.read_config(json.loads(json.dumps(family.write_config(config)))) == config
    directory = tmp_path_factory.mktemp("config")
    write_config(directory, config, "float32", "0")
    assert read_config(directory) == config
    (directory / "halflap.json").unlink()
    assert read_config(directory) == config


@pytest.mark.parametrize("name", [name for name, config in PRESETS.items() if config.family in FAMILIES])
def test_every_preset_has_a_stock_form(name):
    family = FAMILIES[preset(name).family]
    assert family.cannot_write(preset(name)) is None
    assert family.read_config(family.write_config(preset(name))) == preset(name)


def test_the_time_step_floor_we_write_never_binds_unless_a_limit_does():
    tiny = preset("nemotron-h-tiny")
    assert 0 < nemotron_h.write_config(tiny)["time_step_min"] < 1e-6
    limited = replace_block(tiny, 0, time_step_limit=(0.001, math.inf), every=True)
    assert nemotron_h.write_config(limited)["time_step_min"] == 0.001


# ---- models no stock class can express


def replace_block(config: ModelConfig, index: int, *, every: bool = False, **changes) -> ModelConfig:
    kind = type(config.blocks[index])
    blocks = [
        dataclasses.replace(block, **changes) if i == index or (every and isinstance(block, kind)) else block
        for i, block in enumerate(config.blocks)
    ]
    return dataclasses.replace(config, blocks=tuple(blocks))


@pytest.mark.parametrize(
    "name, index, changes, reason",
    [
        ("nemotron-h-tiny", 0, {"num_heads": 8}, r"differ in mamba_num_heads \(12, 8\)"),
        ("nemotron-h-tiny", 0, {"head_dim": 8}, "mamba_head_dim"),
        ("nemotron-h-tiny", 0, {"state_size": 8}, "ssm_state_size"),
        ("nemotron-h-tiny", 0, {"num_groups": 2}, "n_groups"),
        ("nemotron-h-tiny", 0, {"norm_eps": 2e-5}, "epsilon"),
        ("nemotron-h-tiny", 0, {"time_step_limit": (0.0, 1.0)}, "upper limit of 1"),
        ("nemotron-h-tiny", 1, {"intermediate_size": 8}, "intermediate_size"),
        ("nemotron-h-tiny", 1, {"gated": True}, "gated"),
        ("nemotron-h-tiny", 3, {"rope": RopeConfig()}, "rotary"),
        ("llama-tiny", 0, {"num_attention_heads": 4}, r"num_attention_heads|num_key_value_heads"),
        ("llama-tiny", 0, {"rope": None}, "rotary"),
        ("llama-tiny", 1, {"intermediate_size": 8}, "intermediate_size"),
        ("llama-tiny", 1, {"gated": False}, "not gated"),
    ],
)
def test_unequal_blocks_have_no_stock_form_and_keep_halflap_json(tmp_path, name, index, changes, reason):
    config = replace_block(preset(name), index, **changes)
    assert FAMILIES[config.family].cannot_write(config) is not None
    write_config(tmp_path, config, "float32", "0")
    data = json.loads((tmp_path / "config.json").read_text())
    assert data["architectures"] == ["HalflapForCausalLM"] and data["model_type"] == "halflap"
    assert read_config(tmp_path) == config
    why = json.loads((tmp_path / "halflap.json").read_text())["not_stock_because"]
    assert re.search(reason, why)


def test_a_llama_that_lost_single_blocks_or_a_fitting_width_is_not_stock():
    tiny = preset("llama-tiny")
    assert "not pairs" in str(llama.cannot_write(dataclasses.replace(tiny, blocks=tiny.blocks[1:])))
    assert "not pairs" in str(llama.cannot_write(dataclasses.replace(tiny, blocks=tiny.blocks[:-1])))
    assert llama.cannot_write(dataclasses.replace(tiny, blocks=tiny.blocks[2:])) is None
    assert "not a multiple" in str(llama.cannot_write(dataclasses.replace(tiny, hidden_size=80)))


def test_without_attention_the_stock_class_is_told_not_to_use_its_cache():
    config = preset("nemotron-h-tiny")
    mamba = dataclasses.replace(config, blocks=tuple(block for block in config.blocks if block.attention is None))
    assert nemotron_h.write_config(config)["use_cache"] and not nemotron_h.write_config(mamba)["use_cache"]


def test_tied_embeddings_are_not_stock_for_nemotron_h():
    tied = dataclasses.replace(preset("nemotron-h-tiny"), tie_word_embeddings=True)
    assert "tied" in str(nemotron_h.cannot_write(tied))


# ---- directories


def test_a_disagreement_of_the_two_files_names_field_and_values(tmp_path):
    tiny = preset("nemotron-h-tiny")
    write_config(tmp_path, tiny, "float32", "0")
    data = json.loads((tmp_path / "config.json").read_text())
    put(tmp_path, data | {"vocab_size": 513})
    with pytest.raises(HalflapError, match=r"disagree on vocab_size \(512 and 513\)"):
        read_config(tmp_path)
    put(tmp_path, data | {"mamba_num_heads": 8})
    with pytest.raises(HalflapError, match=r"disagree on num_heads of block 0 \(12 and 8\)"):
        read_config(tmp_path)
    put(tmp_path, data | {"hybrid_override_pattern": "M-"})
    with pytest.raises(HalflapError, match=r"disagree on the number of blocks \(7 and 2\)"):
        read_config(tmp_path)


def test_a_run_directory_stands_for_its_checkpoint(tmp_path):
    (tmp_path / "checkpoint").mkdir()
    put(tmp_path / "checkpoint", LLAMA)
    assert read_config(tmp_path) == llama.read_config(LLAMA)


@pytest.mark.parametrize(
    "make, complaint",
    [
        (lambda d: None, "has no config.json"),
        (lambda d: (d / "config.json").write_text("{"), "cannot be read as JSON"),
        (lambda d: (d / "config.json").write_text("[1]"), "an object is needed"),
        (
            lambda d: put(d, {"model_type": "gpt2"}),
            "model_type 'gpt2'; allowed are nemotron_h, llama, nemotron, hymba, halflap",
        ),
        (lambda d: put(d, {"model_type": "halflap"}), "no halflap.json beside it"),
        (lambda d: (d / "halflap.json").write_text('{"format": 99}'), "has format 99 and this halflap reads 1"),
    ],
)
def test_a_directory_that_is_no_checkpoint_says_why(tmp_path, make, complaint):
    make(tmp_path)
    with pytest.raises(HalflapError, match=complaint):
        read_config(tmp_path)


def test_paths_that_are_no_directories(tmp_path):
    with pytest.raises(HalflapError, match="does not exist"):
        read_config(tmp_path / "nowhere")
    (tmp_path / "x.gguf").touch()
    with pytest.raises(HalflapError, match="halflap import"):
        read_config(tmp_path / "x.gguf")


def test_broken_lineage_is_named(tmp_path):
    assert read_lineage(tmp_path) == []
    (tmp_path / "lineage.json").write_text('{"steps": 3}')
    with pytest.raises(HalflapError, match=r"lineage\.json has no list"):
        read_lineage(tmp_path)


def test_reading_a_config_loads_no_torch(tmp_path):
    put(tmp_path, ORIGINAL)
    code = (
        "import sys; from halflap.checkpoints.config import read_config;"
        "from halflap.models.count import count_parameters;"
        "count_parameters(read_config(sys.argv[1])); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
    assert checkpoint_config.FAMILIES.keys() == {"nemotron_h", "llama", "nemotron", "hymba"}
