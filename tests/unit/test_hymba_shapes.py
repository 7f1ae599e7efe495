"""Hymba from its config alone: which layers are global, who shares keys and values, counts, cache bytes, refusals."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from halflap.errors import HalflapError
from halflap.models.config import (
    AttentionConfig,
    HybridConfig,
    Mamba1Config,
    Mamba2Config,
    MLPConfig,
    ModelConfig,
    NTKScaling,
    RopeConfig,
)
from halflap.models.count import (
    cache_bytes,
    cache_parts,
    count_block_parameters,
    count_non_embedding_parameters,
    count_parameters,
    flops_per_token,
)
from halflap.models.layout import layout, shape
from halflap.models.model import HybridModel
from halflap.models.presets import PRESETS, hymba, preset
from halflap.models.rope import inverse_frequencies
from halflap.models.sharing import global_layers, keep_blocks, sharing_groups, sources

PUBLISHED_GROUPS = (
    *((1, 2), (3, 4), (5, 6), (7, 8), (9, 10), (11, 12), (13, 14)),
    *((16, 17, 18), (19, 20), (21, 22), (23, 24), (25, 26), (27, 28), (29, 30)),
)


def test_the_rule_gives_the_published_plan():
    assert global_layers(32) == (0, 15, 31)
    assert sharing_groups(32, (0, 15, 31)) == PUBLISHED_GROUPS


def test_the_preset_follows_the_published_plan():
    blocks = preset("hymba-1.5b").blocks[::2]
    attention = [block.attention for block in blocks]
    assert [i for i, a in enumerate(attention) if a.window is None] == [0, 15, 31]
    assert {i: a.key_value_source // 2 for i, a in enumerate(attention) if a.key_value_source is not None} == sources(
        PUBLISHED_GROUPS
    )
    assert sum(a.key_value_source is None for a in attention) == 17
    assert {a.window for a in attention} == {None, 1024}


@pytest.mark.parametrize("layers", range(1, 41))
def test_groups_of_any_depth(layers):
    whole = global_layers(layers)
    groups = sharing_groups(layers, whole)
    assert {0, layers - 1} <= set(whole)
    members = [layer for group in groups for layer in group]
    assert len(set(members)) == len(members) and not set(members) & set(whole)
    for group in groups:
        assert group == tuple(range(group[0], group[0] + len(group))) and len(group) in (2, 3)
    alone = set(range(layers)) - set(members) - set(whole)
    assert all({layer - 1, layer + 1} <= set(whole) for layer in alone)  # a run of one has nobody to share with


@pytest.mark.parametrize(
    "name, total, tensors",
    [
        ("hymba-125m", 129_944_064, 24 * 19 + 3),
        ("hymba-350m", 353_701_888, 611),
        ("hymba-1.5b", 1_522_797_824, 611),
    ],
)
def test_published_counts(name, total, tensors):
    config = preset(name)
    assert count_parameters(config) == total
    assert len(layout(config)) == tensors
    with torch.device("meta"):
        built = list(HybridModel(config).parameters())
    assert sum(parameter.numel() for parameter in built) == total and len(built) == tensors
    assert count_parameters(config) - count_non_embedding_parameters(config) == 32001 * config.hidden_size
    outside = (32001 + 128 + 1) * config.hidden_size
    assert sum(count_block_parameters(config)) + outside == total


def test_shapes_of_the_released_tensors():
    shapes = {name: shape(dims) for name, dims in layout(preset("hymba-1.5b")).items()}
    mixer = {
        name.removeprefix("blocks.2.mixer."): s for name, s in shapes.items() if name.startswith("blocks.2.mixer.")
    }
    assert mixer == {
        "in_proj.weight": (8960, 1600),
        "ssm.conv1d.weight": (3200, 1, 4),
        "ssm.conv1d.bias": (3200,),
        "ssm.x_proj.weight": (132, 3200),
        "ssm.dt_norm.weight": (100,),
        "ssm.B_norm.weight": (16,),
        "ssm.C_norm.weight": (16,),
        "ssm.dt_proj.weight": (3200, 100),
        "ssm.dt_bias": (3200,),
        "ssm.A_log": (3200, 16),
        "ssm.D": (3200,),
        "attention_norm.weight": (3200,),
        "ssm_norm.weight": (3200,),
        "out_proj.weight": (1600, 3200),
    }
    assert shapes["blocks.4.mixer.in_proj.weight"] == (8000, 1600)  # layer 2 reads layer 1's keys and values
    assert shapes["meta_tokens"] == (128, 1600)


def test_a_consumer_shares_its_producers_axes():
    """Cutting a key/value head of the producer cuts the consumer's queries and the SSM channels averaged with them."""
    table = layout(preset("hymba-tiny"))
    rows, _ = table["blocks.4.mixer.in_proj.weight"]
    assert [[axis.name for axis in span] for span in rows] == [
        ["blocks.2.kv", "blocks.4.query", "blocks.2.head_dim"],
        *[["blocks.2.kv", "blocks.4.query", "blocks.2.value_channel"]] * 2,
    ]
    (rows,) = table["blocks.4.mixer.ssm.D"]
    assert [axis.name for axis in rows[0]] == ["blocks.2.kv", "blocks.4.query", "blocks.2.value_channel"]


# Section 6.3, MB of 10^6 bytes: 16 bits for everything, tails of 4 columns, windows without the newest token
FIGURES = [
    (8000, {"whole": 46.080, "windowed": 27.525, "meta": 4.178, "ssm": 3.277, "convolution": 0.819}, 81.879),
    (8192, {"whole": 47.186, "windowed": 27.525, "meta": 4.178, "ssm": 3.277, "convolution": 0.819}, 82.985),
    (1000, {"whole": 5.760}, 40.914),
    (2000, {"whole": 11.520}, 47.319),
    (16000, {"whole": 92.160}, 127.959),
]


@pytest.mark.parametrize("context, parts, total", FIGURES)
def test_published_cache_figures(context, parts, total):
    config = preset("hymba-1.5b")
    found = cache_parts(config, context, ssm_bits=16, conv_columns=4, window_slots=0)
    assert {name: round(found[name] / 1e6, 3) for name in parts} == parts
    assert round(cache_bytes(config, context, ssm_bits=16, conv_columns=4, window_slots=0) / 1e6, 3) == total
    assert round(cache_parts(config, context, conv_columns=3)["convolution"] / 1e6, 3) == 0.614


def test_the_figures_that_give_the_published_ratios():
    """Section 6.4: which sums make 78.6 MB, and the transformers it is compared with."""
    config = preset("hymba-1.5b")
    parts = cache_parts(config, 8000, ssm_bits=16, conv_columns=4, window_slots=0)
    without_states = sum(parts.values()) - parts["ssm"]
    assert round(without_states / 1e6, 3) == 78.602
    assert round((parts["whole"] + parts["windowed"] + parts["meta"]) / 1e6, 2) == 77.78
    for layers, heads, width, figures in ((28, 8, 128, (917.504, 939.524)), (16, 8, 64, (262.144, 268.435))):
        blocks = (AttentionConfig(heads, heads, width),) * layers
        llama = ModelConfig("llama", 32000, 64, blocks)
        assert tuple(round(cache_bytes(llama, n) / 1e6, 3) for n in (8000, 8192)) == figures
    assert round(917.504e6 / sum(parts.values()), 2) == 11.21


def unshared(config, window):
    blocks = tuple(
        dataclasses.replace(b, attention=dataclasses.replace(b.attention, key_value_source=None, window=window(b)))
        if isinstance(b, HybridConfig)
        else b
        for b in config.blocks
    )
    return dataclasses.replace(config, blocks=blocks, num_meta_tokens=0)


@pytest.mark.parametrize("context, windowed, whole", [(8000, 103.10, 491.52), (8192, 104.20, 503.32)])
def test_what_sharing_and_windows_save(context, windowed, whole):
    config = preset("hymba-1.5b")
    for variant, figure in (
        (unshared(config, lambda block: block.attention.window), windowed),
        (unshared(config, lambda block: None), whole),
    ):
        parts = cache_parts(variant, context, window_slots=0)
        assert round((parts["whole"] + parts["windowed"]) / 1e6, 2) == figure


def test_counted_by_default_is_what_we_hold():
    """One token more in each windowed block, three columns of convolution, float32 states."""
    parts = cache_parts(preset("hymba-1.5b"), 8000)
    published = cache_parts(preset("hymba-1.5b"), 8000, ssm_bits=16, conv_columns=4, window_slots=0)
    assert parts["windowed"] - published["windowed"] == 14 * 1920
    assert parts["ssm"] == 2 * published["ssm"] and parts["convolution"] == published["convolution"] * 3 / 4


def test_flops_of_windowed_attention_stop_growing():
    config = preset("hymba-1.5b")
    a_token = 2 * 25 * (64 + 128)
    at = {n: flops_per_token(config, n) for n in (1, 1025, 1026, 8192)}
    assert at[1025] - at[1] == 1024 * 32 * a_token  # all layers see all
    assert at[8192] - at[1026] == (8192 - 1026) * 3 * a_token  # then the global ones alone
    matrices = count_parameters(config)
    assert at[1] == pytest.approx(2 * matrices + 129 * 32 * a_token, rel=0.02)
    few, many = (flops_per_token(config, n, "prefill") for n in (10**4, 10**5))
    assert few < many < flops_per_token(config, 10**5)


def test_the_stretched_rope_base():
    rope = RopeConfig(10000.0, scaling=NTKScaling(2048, 8192))
    speed = inverse_frequencies(rope, 64)
    base = float(speed[1]) ** -32
    assert base == pytest.approx(74_534.8, rel=1e-6)
    plain = inverse_frequencies(RopeConfig(10000.0), 64)
    assert float(plain[1]) ** -32 == pytest.approx(10000.0, rel=1e-12)


@pytest.mark.parametrize("name", [name for name in PRESETS if name.startswith("hymba")])
def test_the_config_as_json_and_back(name):
    config = preset(name)
    assert ModelConfig.from_json(json.loads(json.dumps(config.to_json()))) == config


def test_older_configs_say_nothing_new():
    """Digests of checkpoints written before there were windows and meta tokens stay what they were."""
    data = preset("llama-tiny").to_json()
    assert set(data["blocks"][0]) == {"kind", "num_attention_heads", "num_key_value_heads", "head_dim", "rope", "bias"}
    assert "num_meta_tokens" not in data and "norm" not in data


# ---- refusals


def attention(window=8, source=None, **changes):
    sizes = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8} | changes
    return AttentionConfig(**sizes, window=window, key_value_source=source)


def model(*blocks, **changes):
    return ModelConfig("hymba", 64, 32, blocks, **changes)


MLP = MLPConfig(16)


@pytest.mark.parametrize(
    "blocks, message",
    [
        ((attention(), attention(source=2), attention()), r"block 1 .* block 2 .* does not come before it"),
        ((attention(), attention(source=1)), r"block 1 .* block 1 .* does not come before it"),
        ((attention(), attention(source=-1)), r"does not come before it"),
        ((MLP, attention(source=0)), r"block 1 .* block 0 .* has no attention \(mlp\)"),
        ((attention(), attention(source=0), attention(source=1)), r"block 2 .* which itself reads those of block 0"),
        ((attention(), attention(window=None), attention(source=0)), r"a global block.* is among them or between"),
        ((attention(window=None), attention(window=None, source=0)), r"a global block.* is among them or between"),
        ((attention(window=None), attention(source=0)), r"whose window is None where its own is 8"),
        ((attention(), attention(source=0, num_key_value_heads=1)), r"whose num_key_value_heads is 2 .* its own is 1"),
        ((attention(), attention(source=0, value_head_dim=16)), r"whose value_dim is 8 where its own is 16"),
    ],
)
def test_keys_and_values_that_cannot_be_shared(blocks, message):
    with pytest.raises(HalflapError, match=message):
        model(*blocks)


def test_a_block_without_the_keys_and_values_it_reads():
    config = model(attention(), MLP, attention(source=0), MLP, attention())
    kept = keep_blocks(config.blocks, (0, 2, 3, 4))
    assert [b.attention and b.attention.key_value_source for b in kept] == [None, 0, None, None]
    moved = keep_blocks(preset("hymba-tiny").blocks, tuple(range(2, 16)))
    assert moved[2].attention.key_value_source == 0
    with pytest.raises(HalflapError, match=r"block 2 reads the keys and values of block 0, which is dropped"):
        keep_blocks(config.blocks, (1, 2, 3, 4))


@pytest.mark.parametrize("meta", [32, 100, -1])
def test_meta_tokens_must_fit_the_context(meta):
    with pytest.raises(HalflapError, match=rf"num_meta_tokens is {meta}; .* less than the context of 32"):
        model(attention(), max_position_embeddings=32, num_meta_tokens=meta)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: attention(num_attention_heads=5), r"num_attention_heads=5 is not divisible by num_key_value_heads=2"),
        (lambda: HybridConfig(attention(), Mamba1Config(48, 4, 2)), r"4 attention heads .* 8 channels .* 48 in all"),
        (lambda: HybridConfig(attention(), Mamba2Config(4, 8, 1, 4)), r"1 groups .* group for each of the 2 key/value"),
        (lambda: HybridConfig(attention(), Mamba2Config(2, 16, 2, 4)), r"head of 8 channels for each of the 4 query"),
        (lambda: HybridConfig(attention(bias=True), Mamba1Config(32, 4, 2)), r"has bias=True"),
        (lambda: attention(window=0), r"AttentionConfig.window is 0; it must be a whole number of at least 1"),
        (lambda: Mamba1Config(32, 4, 0), r"Mamba1Config.dt_rank is 0"),
    ],
)
def test_sizes_that_do_not_go_together(make, message):
    with pytest.raises(HalflapError, match=message):
        make()


def test_a_builder_for_other_depths():
    config = hymba(4, hidden=64, mlp=64, heads=(4, 2), meta=0, window=16, vocab=64)
    assert [b.attention.window for b in config.blocks[::2]] == [None, None, 16, None]
