"""Counts from the config alone, against the published numbers and against the real thing."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from halflap.errors import HalflapError
from halflap.models.cache import Cache
from halflap.models.config import AttentionConfig
from halflap.models.count import (
    cache_bytes,
    count_block_parameters,
    count_non_embedding_parameters,
    count_parameters,
    flops_per_token,
    memory_bytes,
)
from halflap.models.model import HybridModel
from halflap.models.patterns import PATTERN_8B, PATTERN_47B, PATTERN_56B
from halflap.models.presets import PRESETS, nemotron_h, preset

MIB, GIB = 1 << 20, 1 << 30


@pytest.mark.parametrize(
    "name, mamba, attention, mlp, total, without",
    [
        ("8b", 109_640_064, 41_947_136, 176_164_864, 8_100_852_736, 7_027_110_912),
        ("4b", 72_752_464, 31_460_352, 75_500_544, 4_489_223_040, 3_683_916_672),
        ("56b", 438_432_512, 151_003_136, 536_879_104, 56_324_350_464, 54_176_866_816),
        ("47b", 438_432_512, 151_003_136, 503_324_672, 46_791_554_816, 44_644_071_168),
    ],
)
def test_published_parameter_counts(name, mamba, attention, mlp, total, without):
    config = preset(f"nemotron-h-{name}")
    blocks = dict(zip(config.pattern(), count_block_parameters(config)))
    assert blocks == {"M": mamba, "*": attention, "-": mlp}
    assert count_parameters(config) == total
    assert count_non_embedding_parameters(config) == without


def test_smollm2_has_134_million_parameters():
    assert count_parameters(preset("smollm2-135m")) == 134_515_008


@pytest.mark.parametrize(
    "hidden, mlp, heads, channels, total",
    [
        (3072, 12288, 112, 64, 4_489_223_040),
        (3072, 10752, 128, 64, 4_490_551_296),
        (3328, 9984, 112, 64, 4_495_167_616),
        (3072, 12288, 112, 60, 4_390_068_096),
        (3072, 12288, 120, 56, 4_390_658_496),
        (3072, 13056, 112, 56, 4_404_159_360),
        (3072, 11520, 112, 64, 4_375_976_832),
        (3072, 13056, 96, 64, 4_374_648_576),
        (3072, 13824, 128, 48, 4_490_256_384),
        (3072, 12288, 104, 62, 4_329_276_480),
        (3072, 16128, 64, 64, 4_371_992_064),
    ],
)
def test_counts_of_the_published_search(hidden, mlp, heads, channels, total):
    config = nemotron_h(PATTERN_8B, hidden=hidden, mlp=mlp, mamba=(heads, channels, 8, 128), attention=(32, 8, 128))
    assert count_parameters(config) == total


def test_published_patterns():
    assert [PATTERN_8B.count(s) for s in "M*-"] == [24, 4, 24]
    assert [i for i, s in enumerate(PATTERN_8B) if s == "*"] == [7, 18, 29, 40]
    assert [PATTERN_56B.count(s) for s in "M*-"] == [54, 10, 54] and len(PATTERN_56B) == 118
    assert [i for i, s in enumerate(PATTERN_56B) if s == "*"] == [7, 18, 29, 40, 51, 62, 73, 84, 95, 106]
    assert [PATTERN_47B.count(s) for s in "M*-"] == [45, 5, 48]
    assert [i for i, s in enumerate(PATTERN_47B) if s == "*"] == [17, 38, 49, 60, 86]
    rest = iter(PATTERN_56B)
    assert all(symbol in rest for symbol in PATTERN_47B)  # an order-preserving subsequence


@pytest.mark.parametrize("name", [n for n in PRESETS if n.endswith("tiny")])
def test_counted_parameters_are_the_real_ones(name):
    config = preset(name)
    for tied in (False, True):
        config = dataclasses.replace(config, tie_word_embeddings=tied)
        model = HybridModel(config)
        assert count_parameters(config) == sum(p.numel() for p in model.parameters())
        assert count_block_parameters(config) == [sum(p.numel() for p in b.parameters()) for b in model.blocks]


@pytest.mark.parametrize(
    "name, kv_a_token, ssm, conv, kv_8k, kv_64k, all_64k",
    [
        ("8b", 16, 96, 1.875, 128, 1.0, 1.096),
        ("4b", 16, 84, 1.6875, 128, 1.0, 1.084),
        ("56b", 40, 864, 8.4375, 320, 2.5, 3.35),
        ("47b", 20, 720, 7.03125, 160, 1.25, 1.96),
    ],
)
def test_published_cache_sizes(name, kv_a_token, ssm, conv, kv_8k, kv_64k, all_64k):
    """Keys and values in KiB a token, MiB at 8,192, GiB at 65,536; states in MiB; W columns of convolution as there."""
    config = preset(f"nemotron-h-{name}")

    def kv(context):
        return cache_bytes(config, context) - cache_bytes(config, 0)

    assert kv(1) == kv_a_token * 1024 and kv(8192) == kv_8k * MIB and kv(65536) == kv_64k * GIB
    assert cache_bytes(config, 0, conv_columns=0) == ssm * MIB
    assert cache_bytes(config, 0, conv_columns=0, ssm_bits=16) == ssm * MIB / 2
    assert cache_bytes(config, 0, conv_columns=4) == (ssm + conv) * MIB
    assert cache_bytes(config, 65536, conv_columns=4) / GIB == pytest.approx(all_64k, abs=0.005)
    assert cache_bytes(config, 65536, batch=7) == 7 * cache_bytes(config, 65536)


def test_the_published_memory_budget_of_the_47b():
    """31.7 GiB: 4-bit weights, 1-byte keys and values at a million tokens, bfloat16 states."""
    used = memory_bytes(preset("nemotron-h-47b"), 10**6, weight_bits=4, kv_bits=8, ssm_bits=16)
    assert used / GIB == pytest.approx(31.69, abs=0.01)


@pytest.mark.parametrize("name", ["nemotron-h-tiny", "llama-tiny"])
def test_counted_cache_bytes_are_the_held_ones(name):
    config = preset(name)
    tokens = torch.randint(0, config.vocab_size, (3, 20))
    model = HybridModel(config).eval()
    cache = Cache.create(config, 3, capacity=20)
    with torch.no_grad():
        model(tokens, cache=cache)
    assert cache.nbytes() == cache_bytes(config, 20, batch=3, kv_bits=32, conv_bits=32, ssm_bits=32)


@pytest.mark.parametrize("name", ["nemotron-h-8b", "smollm2-135m"])
def test_flops_are_twice_the_matrices_and_what_the_context_adds(name):
    config = preset(name)
    matrices = count_parameters(config) - config.vocab_size * config.hidden_size * (not config.tie_word_embeddings)
    assert flops_per_token(config, 1) == pytest.approx(2 * matrices, rel=0.02)
    attention = [b for b in config.blocks if isinstance(b, AttentionConfig)]
    a_token = sum(4 * b.num_attention_heads * b.head_dim for b in attention)
    assert flops_per_token(config, 5001) - flops_per_token(config, 1) == 5000 * a_token
    longer = flops_per_token(config, 20001, "prefill") - flops_per_token(config, 10001, "prefill")
    assert longer == 5000 * a_token  # on average a prompt's token sees half of it


def test_prefill_flops_of_one_mamba_block_by_hand():
    """Dao & Gu 2024, section 6, with chunk Q: QGN + QP H + 2 NP H multiply-adds beside the projections."""
    config = nemotron_h("M", hidden=32, mlp=1, mamba=(8, 4, 2, 16), attention=(1, 1, 2), vocab=64)
    chunk, heads, channels, groups, state = 128, 8, 4, 2, 16
    inner, conv = heads * channels, heads * channels + 2 * groups * state
    projections = 32 * (inner + conv + heads) + inner * 32
    scan = chunk * groups * state + chunk * inner + 2 * inner * state
    extra = 3 * chunk * heads + 2 * inner
    expected = 2 * (projections + 4 * conv + scan + 64 * 32) + extra
    assert flops_per_token(config, 1000, "prefill") == expected


def test_an_unknown_preset_lists_those_there_are():
    with pytest.raises(HalflapError, match=r"'nemotron-h-9b' is neither .* nemotron-h-8b"):
        preset("nemotron-h-9b")
