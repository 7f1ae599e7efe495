"""Packed weights: rounding and packing, models that hold them, their files, and what is refused."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from halflap import load, save
from halflap.checkpoints.checkpoint import Checkpoint, fill_model, load_model, save_model, write_checkpoint
from halflap.checkpoints.config import read_config, read_quantization
from halflap.checkpoints.files import read_header
from halflap.errors import HalflapError
from halflap.inference.generate import generate, prefill
from halflap.inference.requests import EngineSettings, Request
from halflap.inference.scheduler import Scheduler
from halflap.inference.stream import Stream
from halflap.models.config import ModelConfig
from halflap.models.layout import layout, shape
from halflap.models.model import HybridModel, initialize
from halflap.models.presets import preset
from halflap.models.quantization import KEPT_ROWS, Quantization, matrices, slices, split_part, stored, weight_bytes
from halflap.models.quantized import pack_matrix, pack_tensors, unpack_matrix
from halflap.ops.quantized import dequantize, levels, pack, quantize, to_e4m3, unpack

Cli = Callable[..., Any]
FAMILIES = ("nemotron-h-tiny", "llama-tiny", "nemotron-4-tiny", "hymba-tiny")
FORMS = {
    "int8": Quantization(8),
    "int4": Quantization(4, 32),
    "int4, all": Quantization(4, 64, keep=()),
    "int4, some": Quantization(4, 128, keep=("dt", "B", "q", "z", "embedding")),
    "fp8": Quantization.asked("fp8"),
    "fp8, all": Quantization.asked("fp8", keep=()),
}
TOLERANCE = 3e-4
"""Of logits of size 1: kernels round activations to 16 bits of the largest of some, which adds up over a few blocks."""


# ---- numbers


@given(st.integers(1, 9), st.integers(1, 150), st.sampled_from([4, 8]), st.integers(0, 99))
@settings(max_examples=50)
def test_packing_loses_nothing(rows: int, inputs: int, bits: int, seed: int) -> None:
    values = torch.randint(1 << bits, (rows, inputs), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    packed = pack(values, bits)
    assert packed.shape == (rows, -(-inputs * bits // 32))
    assert torch.equal(unpack(packed, bits, inputs), values)
    word = int(packed[0, 0]) & 0xFFFFFFFF
    assert [word >> bits * i & (1 << bits) - 1 for i in range(min(inputs, 32 // bits))] == values[
        0, : 32 // bits
    ].tolist()


@given(st.integers(32, 200), st.sampled_from([4, 8]), st.sampled_from([32, 64, 128]), st.integers(0, 99))
@settings(max_examples=50)
def test_rounding_is_better_than_by_the_largest_value(inputs: int, bits: int, group: int, seed: int) -> None:
    rows = 64  # a single group may be unlucky with the starts of its search
    weight = torch.randn(rows, inputs, generator=torch.Generator().manual_seed(seed))
    packed, scale = quantize(weight, bits, group)
    assert scale.dtype == torch.bfloat16 and scale.shape == (rows, -(-inputs // group))
    found = dequantize(packed, scale, bits, group, inputs)
    simple = torch.empty_like(weight)
    for start in range(0, inputs, group):
        part = weight[:, start : start + group]
        step = part.abs().amax(1, keepdim=True) / levels(bits)[1]
        simple[:, start : start + group] = (part / step).round() * step
    error, simple_error = (float((other - weight).square().sum()) for other in (found, simple))
    assert error <= 1.05 * simple_error + 2**-17 * float(weight.square().sum())  # bfloat16 scales: 2^-9 of a weight


def test_groups_of_zeros_and_importance() -> None:
    weight = torch.randn(4, 96, generator=torch.Generator().manual_seed(0))
    weight[:, 32:64] = 0
    packed, scale = quantize(weight, 4, 32)
    assert torch.equal(dequantize(packed, scale, 4, 32, 96)[:, 32:64], torch.zeros(4, 32))
    importance = torch.zeros(96)
    importance[::7] = 1.0
    errors = [
        float(((dequantize(*quantize(weight, 4, 32, wanted), 4, 32, 96) - weight) ** 2 @ importance).sum())
        for wanted in (None, importance)
    ]
    assert errors[1] < 0.5 * errors[0]


@given(st.integers(1, 9), st.integers(1, 150), st.integers(0, 99))
def test_floats_of_8_bits_err_by_a_sixteenth_of_a_weight_at_most(rows: int, inputs: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, inputs, generator=generator) * 10 ** (3 * torch.randn(rows, 1, generator=generator))
    packed, scale = to_e4m3(weight)
    assert packed.shape == weight.shape and scale.shape == (rows, 1) and scale.dtype == torch.bfloat16
    back = dequantize(packed, scale, 8, inputs, inputs)
    normal = weight.abs() >= 2**-6 * scale.float()  # smaller ones have fewer digits, spaced as the smallest normal ones
    assert ((back - weight).abs() <= torch.where(normal, 2**-4 * weight.abs(), 2**-10 * scale.float() * 1.0001)).all()


def test_a_row_of_zeros_stays_one_in_floats_of_8_bits() -> None:
    assert not dequantize(*to_e4m3(torch.zeros(2, 5)), 8, 5, 5).any()


# ---- models


@functools.cache
@torch.inference_mode(False)
def plain(name: str) -> HybridModel:
    model = HybridModel(dataclasses.replace(preset(name), vocab_size=250))
    initialize(model, seed=1)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith("proj.weight"):
                parameter.mul_(4)
    return model.eval()


def packed_tensors(model: HybridModel, form: Quantization) -> dict[str, Tensor]:
    return dict(pack_tensors(((n, t.detach()) for n, t in model.state_dict().items()), model.config, form))


@functools.cache
@torch.inference_mode(False)
def pair(name: str, form: str) -> tuple[HybridModel, HybridModel]:
    """The packed model, and a plain one with the same weights written out."""
    model, quantization = plain(name), FORMS[form]
    parts = packed_tensors(model, quantization)
    packed = fill_model(model.config, parts.items(), torch.float32, quantization=quantization)
    table = matrices(model.config, quantization)
    weights = {
        key: unpack_matrix({p: parts[key + p] for p in table[key].parts()}, table[key]) if key in table else parts[key]
        for key in layout(model.config)
    }
    return packed, fill_model(model.config, weights.items(), torch.float32)


def tokens_of(model: HybridModel, rows: int, time: int) -> Tensor:
    return torch.randint(model.config.vocab_size, (rows, time), generator=torch.Generator().manual_seed(time))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", FAMILIES)
@torch.inference_mode()
def test_packed_models_are_their_weights_written_out(name: str, form: str) -> None:
    packed, written = pair(name, form)
    tokens = tokens_of(packed, 3, 40)
    expected = written(tokens)
    scale = float(expected.abs().max())
    assert float((packed(tokens) - expected).abs().max()) < TOLERANCE * max(1, scale)
    cache, logits = prefill(packed, tokens[:, :33].tolist(), ahead=8)
    for step in range(33, 40):
        assert float((logits - expected[:, step - 1]).abs().max()) < TOLERANCE * max(1, scale)
        logits = packed(tokens[:, step : step + 1], cache=cache)[:, -1]
    assert packed.head_weight.shape == written.head_weight.shape
    assert torch.equal(packed.head_weight, written.head_weight)


@pytest.mark.parametrize("form", ["int4", "fp8"])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_engine_batches_packed_models(name: str, form: str) -> None:
    packed, _ = pair(name, form)
    prompts = [tokens_of(packed, 1, time)[0].tolist() for time in (3, 17, 34)]
    alone = [generate(packed, [prompt], 6, ignore_eos=True)[0].tokens for prompt in prompts]
    scheduler = Scheduler(packed, None, EngineSettings(max_batch=3, max_context=64, prefix_cache=0))
    streams = [Stream(Request(tuple(prompt), 6, ignore_eos=True)) for prompt in prompts]
    for stream in streams:
        scheduler.add(stream)
    while scheduler.busy:
        scheduler.step()
    assert [[token.id for token in stream.result()[0].tokens] for stream in streams] == alone


def test_bfloat16_models_keep_scales_and_words() -> None:
    model, form = plain("nemotron-h-tiny"), FORMS["int4"]
    parts = packed_tensors(model, form)
    narrow = fill_model(model.config, parts.items(), torch.bfloat16, quantization=form)
    state = narrow.state_dict()
    for name, tensor in parts.items():
        if split_part(name)[1] not in ("", KEPT_ROWS):
            assert torch.equal(state[name], tensor) and state[name].dtype == tensor.dtype
    assert narrow.dtype == torch.bfloat16
    with torch.inference_mode():
        assert narrow(tokens_of(narrow, 2, 9)).dtype == torch.float32


# ---- what is packed


@pytest.mark.parametrize("name", FAMILIES)
def test_slices_are_all_rows_of_all_linear_maps(name: str) -> None:
    config = preset(name)
    rows: dict[str, int] = {}
    for part in slices(config):
        assert part.start == rows.get(part.parameter, 0) and part.stop > part.start
        rows[part.parameter] = part.stop
    linear = {
        n: shape(d)[0]
        for n, d in layout(config).items()
        if n.endswith(("_proj.weight", "embedding.weight", "head.weight"))
    }
    assert rows == linear


@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_protected_stays_bit_for_bit(name: str) -> None:
    model, form = plain(name), FORMS["int4"]
    parts, state = packed_tensors(model, form), model.state_dict()
    assert {n: tuple(t.shape) for n, t in parts.items()} == {n: s for n, (_, s) in stored(model.config, form).items()}
    whole = {key: tensor for key, tensor in parts.items() if not split_part(key)[1]}
    assert all(torch.equal(tensor, state[key]) for key, tensor in whole.items())
    assert not {key for key in state if key not in whole and not key.endswith(("_proj.weight", "head.weight"))}
    kept = {part.parameter: (part.start, part.stop) for part in slices(model.config) if part.name == "dt"}
    for key, (start, stop) in kept.items():
        rows = parts.get(key + KEPT_ROWS, parts.get(key))
        assert rows is not None and torch.equal(rows, state[key][start:stop])
    assert name not in ("nemotron-h-tiny", "hymba-tiny") or kept


def test_bytes_are_those_of_the_tensors() -> None:
    model, form = plain("nemotron-h-tiny"), FORMS["int4"]
    packed = fill_model(model.config, packed_tensors(model, form).items(), torch.float32, quantization=form)
    assert weight_bytes(model.config, form, 4) == sum(t.nbytes for t in packed.state_dict().values())
    assert weight_bytes(model.config, None, 4) == sum(t.nbytes for t in model.state_dict().values())


def test_rows_come_back_in_their_order() -> None:
    form = Quantization(8, keep=("x", "C"))
    config = preset("nemotron-h-tiny")
    matrix = matrices(config, form)["blocks.0.mixer.in_proj.weight"]
    assert [packed for _, packed in matrix.runs] == [True, False, True, False, True]
    weight = torch.randn(
        sum(rows for rows, _ in matrix.runs), matrix.inputs, generator=torch.Generator().manual_seed(2)
    )
    again = unpack_matrix(pack_matrix(weight, matrix), matrix)
    assert float((again - weight).abs().max()) < float(weight.abs().max()) / 200


# ---- files


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", FAMILIES)
def test_files_give_back_every_bit(name: str, form: str, tmp_path: Path) -> None:
    packed, _ = pair(name, form)
    first = save_model(packed, tmp_path / "first")
    again = load_model(tmp_path / "first")
    assert again.quantization == FORMS[form] == first.quantization
    assert all(
        torch.equal(a, b) for a, b in zip(packed.state_dict().values(), again.state_dict().values(), strict=True)
    )
    save(again, tmp_path / "second")
    second = Checkpoint.open(tmp_path / "second", packed=True)
    assert second.digest == first.digest
    assert (tmp_path / "second/model.safetensors").read_bytes() == (tmp_path / "first/model.safetensors").read_bytes()


def test_digest_knows_what_is_kept(tmp_path: Path) -> None:
    model = plain("nemotron-h-tiny")
    digests = set()
    for keep in (("B",), ("C",)):
        form = Quantization(8, keep=keep)
        parts = packed_tensors(model, form)
        digests.add(
            write_checkpoint(tmp_path / keep[0], model.config, parts.items(), dtype="float32", quantization=form).digest
        )
    assert len(digests) == 2


@pytest.mark.parametrize(
    "name, called, suffix", [("int4", "pack-quantized", "_packed"), ("fp8", "float-quantized", "")]
)
def test_stock_config_says_what_is_packed(tmp_path: Path, name: str, called: str, suffix: str) -> None:
    model, form = plain("llama-tiny"), Quantization.asked(name, keep=("embedding", "head", "o"))
    write_checkpoint(tmp_path, model.config, packed_tensors(model, form).items(), dtype="float32", quantization=form)
    said = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert said["format"] == called and said["config_groups"]["group_0"]["weights"]["num_bits"] == form.bits
    assert "model.layers.0.mlp.up_proj.weight" + suffix in read_header(tmp_path / "model.safetensors")
    assert "model.layers.0.self_attn.o_proj" in said["ignore"]
    (tmp_path / "halflap.json").unlink()  # as another tool would have written it
    assert read_quantization(tmp_path, read_config(tmp_path)) == form
    assert load_model(tmp_path).quantization == form


# ---- verbs


def test_export_packs_and_unpacks(halflap: Cli, tiny_checkpoint: Path, tmp_path: Path) -> None:
    words = ("export", tiny_checkpoint, "--quantize", "int4", "--out", tmp_path / "four", "--json")
    result = halflap(*words).json
    assert result["weights"].startswith("int4, a scale for 32 inputs") and result["max_abs_error"] > 0
    opened = Checkpoint.open(tmp_path / "four", packed=True)
    assert opened.lineage[-1]["verb"] == "export" and "int4" in opened.lineage[-1]["weights"]
    assert opened.quantization == Quantization(4, 32, ("dt", "embedding"))
    copied = halflap("export", tmp_path / "four", "--out", tmp_path / "copy", "--json").json
    assert copied["max_abs_error"] == 0
    assert Checkpoint.open(tmp_path / "copy", packed=True).digest == opened.digest
    plain = halflap("export", tmp_path / "four", "--quantize", "off", "--out", tmp_path / "off", "--json").json
    assert "weights" not in plain and plain["max_abs_error"] < TOLERANCE
    tokens = torch.arange(20)[None]
    with torch.inference_mode():
        assert float((load(tmp_path / "off")(tokens) - load(tmp_path / "four")(tokens)).abs().max()) < TOLERANCE


def test_refusals_say_what_to_do(halflap: Cli, tiny_checkpoint: Path, tmp_path: Path) -> None:
    def sentence(*words: object) -> str:
        outcome = halflap(*words)
        assert outcome.status in (1, 2)
        return outcome.err

    four = tmp_path / "four"
    halflap("export", tiny_checkpoint, "--quantize", "int4", "--group-size", "64", "--out", four)
    assert "packs" not in sentence("export", tiny_checkpoint, "--quantize", "int3", "--out", tmp_path / "a")
    assert "'zz', which is no part" in sentence(
        "export", tiny_checkpoint, "--quantize", "int4", "--keep", "zz", "--out", tmp_path / "b"
    )
    assert "floats have 8 bits and one scale a row" in sentence(
        "export", tiny_checkpoint, "--quantize", "fp8", "--group-size", "64", "--out", tmp_path / "g"
    )
    parts = ["z", "x", "B", "C", "dt", "q", "k", "v", "o", "out", "gate", "up", "down", "embedding", "head"]
    assert "keep names all there is to pack" in sentence(
        "export", tiny_checkpoint, "--quantize", "int4", "--keep", *parts, "--out", tmp_path / "i"
    )
    assert "int4 weights already" in sentence("export", four, "--keep", "dt", "--out", tmp_path / "h")
    assert "add --quantize int8, int4" in sentence(
        "export", tiny_checkpoint, "--group-size", "64", "--out", tmp_path / "c"
    )
    assert "int4 weights already" in sentence("export", four, "--quantize", "int8", "--out", tmp_path / "d")
    assert "--quantize off" in sentence("export", four, "--format", "gguf", "--out", tmp_path / "e")
    text = tmp_path / "text.txt"
    text.write_text("a few words")
    assert "for running alone" in sentence("score", four, "--data", text, "--out", tmp_path / "f")
    with pytest.raises(HalflapError, match="int4 weights, which are for running alone: take the checkpoint"):
        Checkpoint.open(four)


def test_unknown_quantization_is_refused(tmp_path: Path) -> None:
    config: ModelConfig = preset("llama-tiny")
    model = HybridModel(config)
    initialize(model, 0)
    save_model(model, tmp_path)
    (tmp_path / "halflap.json").unlink()
    file = tmp_path / "config.json"
    data = json.loads(file.read_text())
    said = {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized", "config_groups": {}}
    for quantization, words in (
        ({"quant_method": "gptq", "bits": 4}, "a quantization_config; quantized weights are not read"),
        (said, "of compressed-tensors/nvfp4-pack-quantized"),
        (said | {"format": "pack-quantized"}, "is not understood"),
    ):
        file.write_text(json.dumps(data | {"quantization_config": quantization}))
        with pytest.raises(HalflapError, match=words):
            load_model(tmp_path)


def test_training_refuses_packed_models() -> None:
    from halflap.train.config import Fit
    from halflap.train.fit import fit
    from halflap.train.objectives.language import NextToken

    packed, _ = pair("nemotron-h-tiny", "int8")
    with pytest.raises(HalflapError, match="int8 weights, which cannot be trained"):
        fit(packed, NextToken(), lambda _: [], Fit(), tokens=10)  # type: ignore[call-arg]
