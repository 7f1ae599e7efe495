"""The costs of rounding parts alone: what they add up from, that the model comes back, and the verb."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from halflap.checkpoints.checkpoint import fill_model, save_model
from halflap.data.tokenizer import train_tokenizer
from halflap.evaluate.sensitivity import sensitivity
from halflap.models.model import HybridModel, initialize
from halflap.models.presets import preset
from halflap.models.quantization import Quantization, slices
from halflap.models.quantized import pack_tensors

FORM = Quantization(4, 32, keep=("dt", "embedding"))


def model_of(name: str) -> HybridModel:
    model = HybridModel(dataclasses.replace(preset(name), vocab_size=64))
    initialize(model, 0)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith("proj.weight"):
                parameter.mul_(6)
    return model.eval()


@pytest.mark.parametrize("name", ["nemotron-h-tiny", "llama-tiny", "hymba-tiny"])
def test_costs_are_those_of_the_packed_model(name: str) -> None:
    model = model_of(name)
    row = torch.randint(64, (1, 33), generator=torch.Generator().manual_seed(0))
    state = {key: tensor.detach().clone() for key, tensor in model.state_dict().items()}
    found = sensitivity(model, [row], FORM)
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())
    packed = fill_model(model.config, pack_tensors(state.items(), model.config, FORM), torch.float32, quantization=FORM)
    with torch.inference_mode():
        before, after = (m(row[:, :-1])[0].log_softmax(-1) for m in (model, packed))
    kl = float((before.exp() * (before - after)).sum(-1).mean())
    assert found["whole"]["kl"] == pytest.approx(kl, rel=1e-3)
    parts = [part for part in found["parts"] if part["slice"] != "all"]
    assert [(part["parameter"], part["slice"]) for part in parts] == [
        (s.parameter, s.name) for s in slices(model.config)
    ]
    assert all(part["kl"] > -1e-7 for part in parts)
    assert len(found["parts"]) == len(parts) + len(model.blocks)


def test_the_verb_shows_the_map(halflap: Callable[..., Any], tmp_path: Path) -> None:
    text = "the half lap joint takes two pieces and cuts each down to the thickness of one "
    (tmp_path / "wood.jsonl").write_text(json.dumps({"text": 3 * text}) + "\n")
    tokenizer = train_tokenizer([text], 300)
    model = HybridModel(dataclasses.replace(preset("nemotron-h-tiny"), vocab_size=tokenizer.vocab_size))
    initialize(model, 0)
    tokenizer.save(tmp_path / "tokenizer")
    save_model(model, tmp_path / "model", tokenizer_from=tmp_path / "tokenizer")
    words = ("analyze", tmp_path / "model", "--data", tmp_path / "wood.jsonl", "--tokens", 40)
    run = (*words, "--quantize", "int4", "--out", tmp_path / "run")
    found = halflap(*run, "--json").json
    assert {"z", "x", "B", "C", "dt", "q", "all"} <= {part["slice"] for part in found["quantization"]["parts"]}
    assert "KL divergence" in halflap(*run).out
    assert "Packing each part alone" in (tmp_path / "run" / "report.html").read_text()
    outcome = halflap(*words, "--group-size", 64, "--out", tmp_path / "x")
    assert outcome.status == 2 and "add --quantize" in outcome.err
