"""The released layout of Hymba: config keys and tensors both ways, the converter's rules, refusals by name."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from halflap.checkpoints import hymba
from halflap.checkpoints.checkpoint import Checkpoint, load_model, save_model, write_checkpoint
from halflap.checkpoints.config import FAMILIES, read_config
from halflap.checkpoints.names import expand
from halflap.errors import HalflapError
from halflap.inference.generate import generate
from halflap.models.config import HybridConfig, Mamba2Config, ModelConfig
from halflap.models.layout import layout, shape
from halflap.models.model import HybridModel, initialize
from halflap.models.presets import hymba as shape_of
from halflap.models.presets import preset

GROUPS = [
    *([1, 2], [3, 4], [5, 6], [7, 8], [9, 10], [11, 12], [13, 14]),
    *([16, 17, 18], [19, 20], [21, 22], [23, 24], [25, 26], [27, 28], [29, 30]),
]
# Section 7, as released.
RELEASED = {
    "architectures": ["HymbaForCausalLM"],
    "attention_dropout": 0.0,
    "attn_hidden_size": -1,
    "attn_implementation": "flex",
    "attn_implementation_new": "flex",
    "auto_map": {"AutoConfig": "configuration_hymba.HymbaConfig"},
    "bos_token_id": 1,
    "calc_logits_for_entire_prompt": False,
    "conv_dim": {str(layer): 3200 for layer in range(32)},
    "eos_token_id": 2,
    "global_attn_idx": [0, 15, 31],
    "hidden_act": "silu",
    "hidden_size": 1600,
    "initializer_range": 0.02,
    "intermediate_size": 5504,
    "kq_head_dim": -1,
    "kq_norm": "none",
    "kv_reuse_every_i_layer": -1,
    "kv_reuse_group": GROUPS,
    "kv_weight_reuse": False,
    "layer_type": ["h"] * 32,
    "mamba_conv_bias": True,
    "mamba_d_conv": 4,
    "mamba_d_state": 16,
    "mamba_dt_rank": 100,
    "mamba_expand": 2,
    "mamba_inner_layernorms": True,
    "mamba_proj_bias": False,
    "max_position_embeddings": 8192,
    "memory_tokens_interspersed_every": 0,
    "mlp_hidden_act": "silu",
    "model_type": "hymba",
    "num_attention_heads": 25,
    "num_experts": 1,
    "num_experts_per_tok": 1,
    "num_hidden_layers": 32,
    "num_key_value_heads": 5,
    "num_mamba": 1,
    "num_memory_tokens": 128,
    "orig_max_position_embeddings": 2048,
    "output_router_logits": False,
    "pad_token_id": 0,
    "rms_norm_eps": 1e-06,
    "rope": True,
    "rope_theta": 10000.0,
    "rope_type": "ntk",
    "router_aux_loss_coef": 0.001,
    "seq_length": 8192,
    "sliding_window": 1024,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.44.0",
    "use_cache": True,
    "use_mamba_kernels": True,
    "v_head_dim": 128,
    "vocab_size": 32001,
}


def tiny(**changes) -> ModelConfig:
    sizes = {"hidden": 40, "mlp": 24, "heads": (5, 1), "state": 4, "window": 6, "meta": 4, "vocab": 64, "context": 256}
    return shape_of(**({"layers": 8, "original_context": 64} | sizes | changes))


def test_the_released_config_is_the_preset():
    assert hymba.read_config(RELEASED) == preset("hymba-1.5b")


def test_the_config_we_write_has_the_released_keys_and_values():
    written = hymba.write_config(preset("hymba-1.5b"))
    about = {"architectures", "auto_map", "model_type", "torch_dtype", "transformers_version"}
    assert written == {key: value for key, value in RELEASED.items() if key not in about}


def test_derived_keys_may_be_left_to_their_derivation():
    bare = {key: value for key, value in RELEASED.items() if key not in ("conv_dim", "layer_type", "v_head_dim")}
    assert hymba.read_config(bare | {"mamba_dt_rank": "auto", "v_head_dim": -1}) == preset("hymba-1.5b")


@pytest.mark.parametrize(
    "changes",
    [
        {"original_context": None},
        {"meta": 0},
        {"layers": 3},
        {"heads": (4, 2)},
        {"layers": 12, "state": 3, "window": 2},
    ],
)
def test_configs_both_ways(changes):
    config = tiny(**changes)
    assert hymba.cannot_write(config) is None
    assert hymba.read_config(json.loads(json.dumps(hymba.write_config(config)))) == config


@given(hidden=st.integers(1, 9000), inner=st.integers(1, 20000))
def test_the_expansion_of_a_pruned_model_rounds_down_to_its_channels(hidden, inner):
    assert int(hymba._expand(inner, hidden) * hidden) == inner


def test_variants_of_the_released_config():
    no_windows = hymba.read_config(RELEASED | {"sliding_window": None, "kv_reuse_group": None})
    assert {b.attention.window for b in no_windows.blocks[::2]} == {None}
    assert hymba.read_config(hymba.write_config(no_windows)) == no_windows
    assert hymba.read_config(RELEASED | {"rope": False}).blocks[0].attention.rope is None
    relu = hymba.read_config(RELEASED | {"mlp_hidden_act": "relu2"})
    assert not relu.blocks[1].gated and hymba.read_config(hymba.write_config(relu)) == relu
    plain = hymba.read_config(RELEASED | {"mamba_inner_layernorms": False})
    assert "blocks.0.mixer.ssm.dt_norm.weight" not in layout(plain)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"num_experts": 2}, r"num_experts=2, .* allowed is 1"),
        ({"num_mamba": 2}, r"num_mamba=2, .* allowed is 1"),
        ({"kv_weight_reuse": True}, r"kv_weight_reuse=True, .* allowed is False"),
        ({"kv_reuse_every_i_layer": 2}, r"kv_reuse_every_i_layer=2"),
        ({"memory_tokens_interspersed_every": 512}, r"memory_tokens_interspersed_every=512"),
        ({"mamba_proj_bias": True}, r"mamba_proj_bias=True"),
        ({"kq_norm": "rms"}, r"kq_norm='rms'"),
        ({"rope_type": "dynamic_ntk"}, r"rope_type='dynamic_ntk', .* allowed is 'default' or 'ntk'"),
        ({"mlp_hidden_act": "gelu"}, r"mlp_hidden_act='gelu'"),
        ({"layer_type": ["h"] * 31 + ["m"]}, r"layer of type 'm'; allowed is 'h'"),
        ({"layer_type": ["h"] * 33}, r"layer of type 'h'; allowed is 'h' for each of num_hidden_layers"),
        ({"num_memory_tokens": "128"}, r"num_memory_tokens='128'; it must be a whole number"),
        ({"global_attn_idx": 3}, r"global_attn_idx=3; it must be a list"),
        ({"tie_word_embeddings": "yes"}, r"tie_word_embeddings='yes'; it must be true or false"),
        ({"rope_theta": -1}, r"rope_theta=-1; it must be a number above 0"),
        ({"rms_norm_eps": 0}, r"rms_norm_eps=0; it must be a number above 0"),
        (
            {"orig_max_position_embeddings": 0},
            r"orig_max_position_embeddings=0; it must be a whole number of at least 1",
        ),
        ({"sliding_window": None}, r"a kv_reuse_group and no sliding_window"),
        ({"attention_sinks": 4}, r"the key 'attention_sinks', which halflap's Hymba does not know"),
        ({"quantization_config": {"bits": 4}}, r"quantization_config"),
        ({"mamba_dt_rank": None}, r"does not say mamba_dt_rank"),
        ({"tie_word_embeddings": None}, r"does not say tie_word_embeddings"),
        ({"hidden_size": 1601}, r"gives hidden_size 1601, which its 25 heads .* do not divide"),
        ({"num_key_value_heads": 4}, r"num_attention_heads=25 is not divisible by num_key_value_heads=4"),
        ({"num_attention_heads": 0}, r"num_attention_heads=0; it must be a whole number of at least 1"),
        ({"v_head_dim": 64}, r"v_head_dim=64, .* make it 128"),
        ({"mamba_expand": 0}, r"mamba_expand=0; it must be a number that makes of hidden_size the SSM's channels"),
        ({"conv_dim": {"0": 1600}}, r"conv_dim of 1600 where mamba_expand makes 3200"),
        (
            {"max_position_embeddings": 1024},
            r"stretched \(NTK, factor 2\) from a context of 2048 tokens to one of 1024: give a context above 1024",
        ),
        ({"orig_max_position_embeddings": None}, r"'ntk' and no orig_max_position_embeddings"),
        ({"global_attn_idx": [0, 32]}, r"global_attn_idx .* names layer 32 of 32"),
        ({"num_memory_tokens": 8192}, r"num_meta_tokens is 8192; .* less than the context of 8192"),
        ({"kv_reuse_group": [[2, 1]]}, r"group \[2, 1\], but layer 1 comes before layer 2, .* flow forward"),
        ({"kv_reuse_group": [[14, 16]]}, r"group \[14, 16\], but a global layer"),
        ({"kv_reuse_group": [[14, 15]]}, r"group \[14, 15\], but a global layer"),
        ({"kv_reuse_group": [[1, 2], [2, 3]]}, r"group \[2, 3\], but layer 2 is in two groups"),
        ({"kv_reuse_group": [[30, 32]]}, r"group \[30, 32\], but there are 32 layers"),
        ({"kv_reuse_group": [[3]]}, r"has \[3\]; a group is two layers or more"),
    ],
)
def test_what_cannot_be_run_is_refused_by_name(changes, message):
    with pytest.raises(HalflapError, match=message):
        hymba.read_config(RELEASED | changes)


# ---- tensors

LAYER = (
    *("input_layernorm.weight", "pre_moe_layernorm.weight", "mamba.in_proj.weight", "mamba.out_proj.weight"),
    *("mamba.pre_avg_layernorm1.weight", "mamba.pre_avg_layernorm2.weight", "mamba.conv1d.weight"),
    *("mamba.conv1d.bias", "mamba.x_proj.0.weight", "mamba.dt_proj.0.weight", "mamba.dt_proj.0.bias"),
    *("mamba.A_log.0", "mamba.D.0", "mamba.dt_layernorm.weight", "mamba.B_layernorm.weight"),
    *("mamba.C_layernorm.weight", "moe.experts.0.gate_proj.weight", "moe.experts.0.up_proj.weight"),
    "moe.experts.0.down_proj.weight",
)


def test_every_released_tensor_has_its_place():
    names = expand(preset("hymba-1.5b"), FAMILIES["hymba"].rows)
    outside = {"model.embed_tokens.weight", "model.memory_tokens", "model.final_layernorm.weight"}
    expected = outside | {f"model.layers.{i}.{name}" for i in range(32) for name in LAYER}
    assert len(expected) == 611 and set(names.values()) == expected and len(names) == 611
    # attention's norm is the first, the SSM's the second
    assert names["blocks.6.mixer.attention_norm.weight"] == "model.layers.3.mamba.pre_avg_layernorm1.weight"
    assert names["blocks.6.mixer.ssm_norm.weight"] == "model.layers.3.mamba.pre_avg_layernorm2.weight"


def released_tensors(config: ModelConfig, dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    names = expand(config, FAMILIES["hymba"].rows)
    return {names[ours]: (torch.randn(shape(dims), generator=g) / 8).to(dtype) for ours, dims in layout(config).items()}


def put(directory: Path, config: ModelConfig, tensors: dict[str, Tensor]) -> Path:
    """A directory as the model page has it."""
    directory.mkdir(parents=True, exist_ok=True)
    written = {"architectures": ["HymbaForCausalLM"], "model_type": "hymba"} | hymba.write_config(config)
    (directory / "config.json").write_text(json.dumps(written))
    safetensors.torch.save_file(tensors, directory / "model.safetensors")
    return directory


def read_all(directory: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for file in sorted(directory.glob("*.safetensors")):
        found |= safetensors.torch.load_file(file)
    return found


def assert_same_bits(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype and tensor.shape == other[name].shape
        assert torch.equal(tensor.view(torch.int16), other[name].view(torch.int16)), name


def test_a_released_checkpoint_round_trips_bit_for_bit(tmp_path):
    tensors = released_tensors(tiny())
    opened = Checkpoint.open(put(tmp_path / "in", tiny(), tensors))
    assert opened.config == tiny()
    write_checkpoint(tmp_path / "out", opened.config, opened.tensors(), dtype=opened.dtypes)
    assert_same_bits(tensors, read_all(tmp_path / "out"))
    stock = json.loads((tmp_path / "out" / "config.json").read_text())
    assert stock["model_type"] == "hymba" and hymba.read_config(stock) == tiny()


def test_the_released_tensors_are_what_the_model_computes_with(tmp_path):
    tensors = released_tensors(tiny())
    model = load_model(put(tmp_path, tiny(), tensors), dtype="float32")
    prefix = "model.layers.4.mamba."
    mixer = model.blocks[8].mixer
    for theirs, ours in (
        ("in_proj.weight", mixer.in_proj.weight),
        ("A_log.0", mixer.ssm.A_log),
        ("dt_proj.0.bias", mixer.ssm.dt_bias),
        ("pre_avg_layernorm1.weight", mixer.attention_norm.weight),
    ):
        assert torch.equal(tensors[prefix + theirs].float(), ours)
    bfloat16 = load_model(tmp_path, dtype="bfloat16")
    kinds = {name.rsplit(".", 1)[-1] for name, p in bfloat16.named_parameters() if p.dtype == torch.float32}
    assert kinds == {"A_log", "D", "dt_bias"}
    text = generate(bfloat16, [[1, 5, 9], [7]], max_new_tokens=12, ignore_eos=True)
    assert [len(row.tokens) for row in text] == [12, 12]


def wrong_rows(tensors):
    tensors["model.layers.2.mamba.in_proj.weight"] = torch.cat([tensors["model.layers.2.mamba.in_proj.weight"]] * 2)


def missing(tensors):
    del tensors["model.layers.1.mamba.D.0"]


def extra(tensors):
    tensors["model.layers.0.moe.router.weight"] = torch.zeros(1, 40)


def second_expert(tensors):
    tensors["model.layers.0.moe.experts.1.up_proj.weight"] = torch.zeros(24, 40)


def other_head(tensors):
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1


def smaller_head(tensors):
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"][:32].clone()


@pytest.mark.parametrize(
    "spoil, message",
    [
        (
            wrong_rows,
            r"1 wrongly shaped \(model\.layers\.2\.mamba\.in_proj\.weight is \(400, 40\), expected \(200, 40\)",
        ),
        (missing, r"1 missing \(model\.layers\.1\.mamba\.D\.0\)"),
        (extra, r"1 unknown \(model\.layers\.0\.moe\.router\.weight\)"),
        (second_expert, r"1 unknown \(model\.layers\.0\.moe\.experts\.1\.up_proj\.weight\)"),
        (other_head, r"lm_head\.weight that differs from its embedding"),
        (smaller_head, r"lm_head\.weight that differs from its embedding"),
    ],
)
def test_tensors_that_do_not_fit_are_named(tmp_path, spoil, message):
    tensors = released_tensors(tiny())
    spoil(tensors)
    with pytest.raises(HalflapError, match=message):
        Checkpoint.open(put(tmp_path, tiny(), tensors))


def test_a_stored_head_must_be_the_embedding_or_untied(tmp_path):
    tensors = released_tensors(tiny())
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    assert "head.weight" not in Checkpoint.open(put(tmp_path / "equal", tiny(), tensors)).entries
    tensors["lm_head.weight"] = tensors["lm_head.weight"] + 1
    untied = dataclasses.replace(tiny(), tie_word_embeddings=False)
    opened = Checkpoint.open(put(tmp_path / "untied", untied, tensors))
    assert torch.equal(opened.read("head.weight"), tensors["lm_head.weight"])


@pytest.mark.parametrize("ours", ["unequal", "mamba2"])
def test_what_the_released_class_cannot_hold_keeps_our_names(tmp_path, ours):
    config = tiny()
    if ours == "unequal":
        blocks = (config.blocks[0], dataclasses.replace(config.blocks[1], intermediate_size=16), *config.blocks[2:])
        reason = "differ in intermediate_size"
    else:
        blocks = tuple(
            HybridConfig(b.attention, Mamba2Config(5, 16, 1, 4)) if isinstance(b, HybridConfig) else b
            for b in config.blocks
        )
        reason = "SSM heads are Mamba-2"
    config = dataclasses.replace(config, blocks=blocks)
    assert reason in str(hymba.cannot_write(config))
    model = HybridModel(config)
    initialize(model, 0)
    save_model(model, tmp_path)
    assert read_config(tmp_path) == config
    again = load_model(tmp_path)
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(model.eval()(tokens), again(tokens))


@pytest.mark.slow
def test_a_checkpoint_of_the_full_released_shape(tmp_path):
    """1.5B random weights: imported, written again bit for bit, and generating."""
    config = preset("hymba-1.5b")
    tensors = released_tensors(config)
    for name in tensors:
        if name.endswith("layernorm.weight") or "pre_avg" in name:
            tensors[name] = torch.ones_like(tensors[name])
    opened = Checkpoint.open(put(tmp_path / "in", config, tensors))
    assert opened.config == config and len(opened.entries) == 611
    write_checkpoint(tmp_path / "out", opened.config, opened.tensors(), dtype=opened.dtypes)
    assert_same_bits(tensors, read_all(tmp_path / "out"))
    del tensors
    model = load_model(tmp_path / "out", dtype="bfloat16")
    rows = generate(model, [list(range(3, 40)), [5, 6]], max_new_tokens=4, ignore_eos=True)
    assert [len(row.tokens) for row in rows] == [4, 4]
    with torch.no_grad():
        logits = model(torch.arange(3, 40)[None])[0, -1].float()
    assert logits.isfinite().all() and logits.std() > 0.1
    assert logits.max() - logits[rows[0].tokens[0]] <= 2**-7 * logits.abs().max()  # two roundings of bfloat16
