"""Nemotron-4: counts, the norm, the half rotary embedding, initialisation, configs refused, FLOP conventions."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from halflap.checkpoints.config import FAMILIES
from halflap.checkpoints.nemotron import cannot_write, read_config, write_config
from halflap.errors import HalflapError
from halflap.models.config import AttentionConfig, Mamba1Config, MLPConfig, ModelConfig, NTKScaling, RopeConfig
from halflap.models.count import count_non_embedding_parameters, count_parameters
from halflap.models.model import HybridModel, initialize
from halflap.models.norm import LayerNorm1P
from halflap.models.presets import nemotron_4, preset
from halflap.models.rope import inverse_frequencies, rotary_tables, rotate
from halflap.models.utilization import (
    model_flops_utilization,
    peak_flops_per_second,
    training_flops_per_token,
)
from halflap.ops.activation import squared_relu
from halflap.ops.norm import layer_norm_1p

NEMOTRON_3_8B = nemotron_4(32, hidden=4096, mlp=16384, attention=(32, 32, 128))


@pytest.mark.parametrize(
    "config, shape, total, without",
    [
        (preset("nemotron-4-340b"), (96, 18432, 96, 8, 192, 73728), 341_029_195_776, 331_592_011_776),
        (preset("nemotron-4-15b"), (32, 6144, 48, 8, 128, 24576), 15_628_775_424, 12_483_047_424),
        (preset("minitron-8b"), (32, 4096, 48, 8, 128, 16384), 8_271_699_968, 6_174_547_968),
        (preset("minitron-4b"), (32, 3072, 24, 8, 128, 9216), 4_190_509_056, 2_617_645_056),
        (preset("nemotron-mini-4b"), (32, 3072, 24, 8, 128, 9216), 4_190_509_056, 2_617_645_056),
        (NEMOTRON_3_8B, (32, 4096, 32, 32, 128, 16384), 8_540_135_424, 6_442_983_424),
    ],
    ids=["340b", "15b", "minitron-8b", "minitron-4b", "mini-4b", "nemotron-3-8b"],
)
def test_published_parameter_counts(config: ModelConfig, shape: tuple[int, ...], total: int, without: int) -> None:
    L, h, H, K, d, f = shape
    formula = L * (2 * h * H * d + 2 * h * K * d + 2 * h * f + 4 * h) + 2 * h + 2 * 256000 * h
    with torch.device("meta"):
        model = HybridModel(config)
    assert sum(p.numel() for p in model.parameters()) == count_parameters(config) == formula == total
    assert count_non_embedding_parameters(config) == without


# ---- the norm


def reference(x: Any, weight: Any, bias: Any, eps: float) -> Any:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() * (1 + weight.double()) + bias


def tensors(size: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(size)
    x, weight, bias = (torch.randn(*shape, size, generator=generator) for shape in ((3, 5), (), ()))
    return (2 * x + 1).to(dtype), 0.3 * weight, bias


@pytest.mark.parametrize("size", [1, 7, 32, 100])
def test_the_norm_is_its_formula(size: int) -> None:
    x, weight, bias = tensors(size, torch.float64)
    expected = reference(x, weight, bias, 0.01)
    torch.testing.assert_close(layer_norm_1p(x, weight.double(), bias.double(), 0.01), expected, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(layer_norm_1p(x.float(), weight, bias, 0.01).double(), expected, atol=1e-5, rtol=1e-5)
    narrow = layer_norm_1p(x.bfloat16(), weight, bias, 0.01, torch.float32)
    torch.testing.assert_close(
        narrow.double(), reference(x.bfloat16().double(), weight, bias, 0.01), atol=1e-5, rtol=1e-5
    )


def test_a_fresh_norm_is_plain_layer_norm() -> None:
    x, *_ = tensors(24, torch.float32)
    assert torch.equal(LayerNorm1P(24, 1e-5)(x), F.layer_norm(x, (24,), eps=1e-5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_of_a_constant_row_the_bias_remains(dtype: torch.dtype) -> None:
    for size in (7, 64, 3072):
        _, weight, bias = tensors(size, dtype)
        x = torch.tensor([[0.1], [-3.7], [1234.5]]).expand(3, size).to(dtype)
        assert torch.equal(layer_norm_1p(x, weight, bias.to(dtype), 1e-5), bias.to(dtype).expand(3, size))


def test_before_a_mixer_the_norm_gives_what_autocast_wants() -> None:
    x, *_ = tensors(24, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert LayerNorm1P(24, 1e-5, before_mixer=True)(x).dtype is torch.bfloat16
        assert LayerNorm1P(24, 1e-5)(x).dtype is torch.float32
        assert LayerNorm1P(24, 1e-5, before_mixer=True)(x.double()).dtype is torch.float32
    assert LayerNorm1P(24, 1e-5, before_mixer=True)(x).dtype is torch.float32


def test_gradients_of_the_norm() -> None:
    x, weight, bias = (t.double().requires_grad_() for t in tensors(6, torch.float64))
    assert torch.autograd.gradcheck(lambda *args: layer_norm_1p(*args, 1e-2), (x, weight, bias))


# ---- rotary embedding, activation, initialisation


def test_the_second_half_of_a_head_does_not_turn_and_the_first_knows_distances_only() -> None:
    rope, dim = RopeConfig(fraction=0.5), 12
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 1, 1, dim, generator=generator, dtype=torch.float64) for _ in range(2))

    def at(x: torch.Tensor, position: int) -> torch.Tensor:
        return rotate(x, *rotary_tables(torch.tensor([[position]]), inverse_frequencies(rope, dim), x.dtype))

    for position in (1, 7, 1000):
        for x in (q, k):
            assert torch.equal(at(x, position)[..., 6:], x[..., 6:])
            assert not torch.equal(at(x, position)[..., :6], x[..., :6])
    products = [(at(q, n + 5)[..., :6] * at(k, n)[..., :6]).sum() for n in (0, 3, 900)]
    torch.testing.assert_close(products[1:], products[:1] * 2)
    assert inverse_frequencies(rope, dim).tolist() == pytest.approx([10000 ** (-2 * i / 6) for i in range(3)])


def test_squared_relu() -> None:
    x = torch.tensor([-1.0, 0.0, 2.0], requires_grad=True)
    y = squared_relu(x)
    y.sum().backward()
    assert x.grad is not None
    assert y.tolist() == [0, 0, 4] and x.grad.tolist() == [0, 0, 4]


@pytest.mark.parametrize("name, std", [("nemotron-4-15b", 0.0134), ("nemotron-4-340b", 0.0063)])
def test_fresh_weights(name: str, std: float) -> None:
    """Gains are one (stored as 0), biases 0, and every matrix has the config's deviation."""
    std_of_preset = preset(name).initializer_range
    config = nemotron_4(4, hidden=256, mlp=1024, attention=(4, 2, 64), vocab=2048, std=std_of_preset)
    model = HybridModel(config)
    initialize(model, 0)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            assert not parameter.any()
        else:
            assert parameter.std().item() == pytest.approx(std, rel=0.02), name
    assert model.head is not None
    assert model.head.weight.data_ptr() != model.embedding.weight.data_ptr()


@pytest.mark.parametrize(
    "name, layers, blocks",
    [("nemotron-h-8m", "M-M-M*-M-M-M*-", 14), ("llama-tiny", "*-*-*-*-", 8), ("hymba-tiny", "H-" * 8, 1)],
)
def test_only_some_families_shrink_what_writes_into_the_residual_stream(name: str, layers: str, blocks: int) -> None:
    """By the square root of the number of blocks, as their pre-training does; all in one, for their small matrices."""
    config = preset(name)
    assert config.pattern() == layers
    model = HybridModel(config)
    initialize(model, 0)
    found: dict[bool, list[torch.Tensor]] = {True: [], False: []}
    for key, parameter in model.named_parameters():
        if key.endswith("proj.weight"):
            found[key.split(".")[-2] in ("out_proj", "o_proj", "down_proj")].append(parameter.detach().flatten())
    assert torch.cat(found[False]).std().item() == pytest.approx(0.02, rel=0.02)
    assert torch.cat(found[True]).std().item() == pytest.approx(0.02 / blocks**0.5, rel=0.02)


def test_json_says_the_norm_only_where_it_is_another() -> None:
    """Configs written before there were two kinds keep their digests."""
    config = preset("nemotron-4-tiny")
    assert config.to_json()["norm"] == "layer1p" and ModelConfig.from_json(config.to_json()) == config
    assert "norm" not in preset("llama-tiny").to_json()
    with pytest.raises(HalflapError, match="norm 'batch' is not known; allowed are rms, layer1p"):
        ModelConfig.from_json(config.to_json() | {"norm": "batch"})


# ---- FLOP conventions


@pytest.mark.parametrize(
    "gpus, seconds, sequences, megatron, plain",
    [(1536, 10.3, 768, 42.3, 41.1), (3072, 10.3, 1536, 42.3, 41.1), (6144, 8.0, 2304, 40.9, 39.7)],
)
def test_the_published_utilization(gpus: int, seconds: float, sequences: int, megatron: float, plain: float) -> None:
    """The three phases of the 340B's batch ramp: 4096 tokens a sequence, 989 TFLOP/s a GPU."""
    config, speed = preset("nemotron-4-340b"), sequences * 4096 / seconds
    peak = gpus * (peak_flops_per_second("NVIDIA H100 80GB HBM3") or 0)
    assert 100 * model_flops_utilization(config, 4096, speed, peak) == pytest.approx(megatron, abs=0.1)
    assert 100 * model_flops_utilization(config, 4096, speed, peak, "6n") == pytest.approx(plain, abs=0.1)


def test_training_flops_by_hand() -> None:
    L, h, H, K, d, f, s, V = 3, 32, 4, 2, 12, 40, 100, 64
    config = nemotron_4(L, hidden=h, mlp=f, attention=(H, K, d), vocab=V)
    forward = L * (4 * h * H * d + 4 * h * K * d + 4 * h * f + 4 * s * H * d) + 2 * V * h
    assert training_flops_per_token(config, s) == 3 * forward
    assert training_flops_per_token(config, s, "6n") == 6 * count_parameters(config)
    with pytest.raises(HalflapError, match="convention 'nemo' is not known; allowed are megatron, 6n"):
        training_flops_per_token(config, s, "nemo")  # type: ignore[arg-type]
    assert peak_flops_per_second("Some CPU") is None


# ---- configs


@pytest.mark.parametrize("key", ["partial_rotary_factor", "rotary_percent", "rope_percent", "rope_percentage"])
def test_every_spelling_of_the_turned_part(key: str) -> None:
    assert read_config({key: 0.25}).blocks[0].rope == RopeConfig(fraction=0.25)  # type: ignore[union-attr]


def test_an_empty_config_is_the_15b() -> None:
    config = read_config({})
    assert config.blocks[0].num_key_value_heads == 48  # type: ignore[union-attr]
    assert read_config({"num_key_value_heads": 8}) == preset("nemotron-4-15b")


@pytest.mark.parametrize("name", ["nemotron-4-340b", "nemotron-4-15b", "minitron-8b", "minitron-4b", "nemotron-4-tiny"])
def test_configs_survive_the_round_trip(name: str) -> None:
    assert cannot_write(preset(name)) is None
    assert read_config(write_config(preset(name))) == preset(name)


@pytest.mark.parametrize(
    "data, said",
    [
        ({"hidden_size": 4096}, "hidden_size=4096 and num_attention_heads=48, whose quotient .* add head_dim"),
        ({"head_dim": 128, "kv_channels": 64}, r"differently \(head_dim=128, kv_channels=64\)"),
        ({"norm_eps": 1e-5, "layer_norm_eps": 1e-6}, "norm_eps=1e-05, layer_norm_eps=1e-06"),
        ({"head_dim": 10}, "turns 5 channels; it must be an even number"),
        ({"partial_rotary_factor": 0}, "partial_rotary_factor=0 .* even number from 2"),
        (
            {"partial_rotary_factor": 0.5, "rope_parameters": {"partial_rotary_factor": 0.25}},
            r"partial_rotary_factor=0.5, rope_parameters.partial_rotary_factor=0.25",
        ),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4}}, "type 'yarn'; allowed are default and llama3"),
        ({"hidden_act": "gelu"}, "MLP activation 'gelu' is not known; allowed are relu2, silu"),
        ({"num_key_value_heads": 7}, "not divisible by num_key_value_heads=7"),
        ({"sliding_window": 512}, "sliding_window=512, which halflap's Nemotron does not support"),
        ({"quantization_config": {"bits": 8}}, "quantized weights are not read"),
        ({"norm_eps": -1}, "norm_eps=-1; it must be a number above 0"),
        ({"eos_token_id": [3, "x"]}, r"eos_token_id=\[3, 'x'\]; a token id is a whole number or null"),
        ({"rope_theta": 0}, "rope_theta=0; it must be a number above 0"),
        ({"rope_parameters": "x"}, "rope_parameters='x'; it must be an object"),
        ({"num_hidden_layers": 0}, "num_hidden_layers=0; it must be a whole number of at least 1"),
    ],
)
def test_what_cannot_be_run_is_refused(data: dict[str, Any], said: str) -> None:
    with pytest.raises(HalflapError, match=said):
        read_config(data)


ATTENTION, MLP = AttentionConfig(4, 2, 8, rope=RopeConfig(fraction=0.5)), MLPConfig(24)
NARROW = AttentionConfig(2, 2, 8, rope=RopeConfig(fraction=0.5))


@pytest.mark.parametrize(
    "blocks, norm, said",
    [
        ((ATTENTION, MLP), "rms", "norms are RMSNorms"),
        ((ATTENTION, MLP, MLP), "layer1p", "not pairs of attention and MLP (*--)"),
        ((AttentionConfig(4, 2, 8), MLP), "layer1p", "no rotary embedding"),
        ((ATTENTION, MLPConfig(24, gated=True)), "layer1p", "MLPs are gated"),
        ((ATTENTION, MLP, NARROW, MLP), "layer1p", "differ in num_attention_heads (2, 4)"),
        ((ATTENTION, MLP, ATTENTION, MLPConfig(16)), "layer1p", "differ in intermediate_size (16, 24)"),
        ((AttentionConfig(4, 2, 14, rope=RopeConfig(fraction=0.56)), MLP), "layer1p", "rounds down"),
    ],
)
def test_what_the_stock_class_cannot_be_told(blocks: tuple[Any, ...], norm: Any, said: str) -> None:
    assert re.search(re.escape(said), str(cannot_write(ModelConfig("nemotron", 64, 32, blocks, norm=norm))))


@pytest.mark.parametrize("family", ["llama", "nemotron", "nemotron_h"])
def test_no_stock_class_has_what_hymba_has(family: str) -> None:
    def reason(mixer: Any, **model: Any) -> str:
        norm = "layer1p" if family == "nemotron" else "rms"
        first = AttentionConfig(4, 2, 8)
        return str(
            FAMILIES[family].cannot_write(ModelConfig(family, 64, 32, (first, MLP, mixer, MLP), norm=norm, **model))
        )

    assert "window of 16 tokens" in reason(AttentionConfig(4, 2, 8, window=16))
    assert "value heads are 12 wide" in reason(AttentionConfig(4, 2, 8, value_head_dim=12))
    assert "stretched (NTK)" in reason(AttentionConfig(4, 2, 8, rope=RopeConfig(scaling=NTKScaling(16, 32))))
    assert "3 meta tokens" in reason(ATTENTION, num_meta_tokens=3)
    pairs = "not pairs" if family != "nemotron_h" else "mamba1 blocks"
    assert pairs in reason(Mamba1Config(16, 4, 2))


@pytest.mark.parametrize("family", ["llama", "nemotron_h"])
def test_other_families_cannot_say_layer_norm(family: str) -> None:
    config = ModelConfig(family, 64, 32, (ATTENTION, MLP), norm="layer1p")
    assert "LayerNorms" in str(FAMILIES[family].cannot_write(config))
