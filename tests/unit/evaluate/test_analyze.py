"""Analyses against what is known: even attention, removed branches, domains; and the verb with its page."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from halflap.checkpoints.checkpoint import save_model
from halflap.data.tokenizer import train_tokenizer
from halflap.errors import HalflapError
from halflap.evaluate.analyze import analyze
from halflap.evaluate.documents import Document
from halflap.models.model import HybridModel, initialize
from halflap.models.presets import preset

LENGTH = 24
SENTENCE = "the half lap joint takes two pieces and cuts each down to the thickness of one "


def model_of(name: str, **changes: Any) -> HybridModel:
    model = HybridModel(dataclasses.replace(preset(name), vocab_size=64, **changes))
    initialize(model, 0)
    return model.eval()


def documents(seed: int) -> list[Document]:
    tokens = np.random.default_rng(seed).integers(0, 64, LENGTH)
    return [Document(tokens, np.ones(LENGTH))]


@torch.no_grad()
def without_queries(model: HybridModel) -> HybridModel:
    """Queries are zero, so that attention is even over what is visible."""
    for block, config in zip(model.blocks, model.config.blocks, strict=True):
        if (attention := config.attention) is not None:
            weight = block.mixer.q_proj.weight if config is attention else block.mixer.in_proj.weight
            weight[: attention.num_attention_heads * attention.head_dim] = 0
    return model


@pytest.mark.parametrize("name", ["nemotron-h-tiny", "llama-tiny", "hymba-tiny"])
def test_even_attention_is_shared_out_as_counted(name: str) -> None:
    model = without_queries(model_of(name))
    meta = model.config.num_meta_tokens
    found = analyze(model, {"a": documents(0)}, context=64, tokens=64, removal_tokens=16)
    visible = meta + 1 + np.arange(LENGTH)  # all of it lies within the window
    expected = {
        "meta": float(np.mean(meta / visible)),
        "first": float(np.mean(1 / visible)),
        "self": float(np.mean(np.where(np.arange(LENGTH) == 0, 0, 1 / visible))),
    }
    rows = [layer for layer in found.layers if "attention" in layer]
    assert len(rows) == sum(block.attention is not None for block in model.config.blocks)
    for layer in rows:
        assert sum(layer["attention"].values()) == pytest.approx(1)
        assert {name: layer["attention"][name] for name in expected} == pytest.approx(expected, abs=1e-6)
        assert layer["entropy"] == pytest.approx(float(np.mean(np.log(visible))), abs=1e-6)
    assert list(found.domains) == (["a"] if meta else [])


def test_a_window_keeps_far_tokens_out() -> None:
    block = dataclasses.replace(preset("llama-tiny").blocks[0], window=3)
    model = without_queries(model_of("llama-tiny", family="hymba", blocks=(block, preset("llama-tiny").blocks[1])))
    layer = analyze(model, {"a": documents(0)}, context=64, tokens=64, removal_tokens=16).layers[0]
    visible = np.minimum(4, 1 + np.arange(LENGTH))
    assert layer["window"] == 3
    assert layer["attention"]["first"] == pytest.approx(np.sum(1 / visible[:4]) / LENGTH, abs=1e-6)
    assert layer["entropy"] == pytest.approx(float(np.mean(np.log(visible))), abs=1e-6)


def test_a_branch_that_gives_zero_is_worth_nothing() -> None:
    model = model_of("hymba-tiny")
    with torch.no_grad():
        model.blocks[0].mixer.ssm_norm.weight.zero_()
        model.blocks[1].mixer.down_proj.weight.zero_()
    found = analyze(model, {"a": documents(0), "b": documents(1)}, context=64, tokens=64, removal_tokens=32)
    assert found.layers[0]["loss_added_without"]["ssm"] == 0 != found.layers[0]["loss_added_without"]["attention"]
    assert found.layers[1]["loss_added_without"] == {"mlp": 0.0}
    assert np.allclose(np.diag(found.similarity), 1) and found.similarity[0][1] < 1


def test_the_analysis_leaves_the_model_as_it_was() -> None:
    model, tokens = model_of("hymba-tiny"), torch.arange(20)[None]
    before = model(tokens)
    analyze(model, {"a": documents(0)}, context=64, tokens=64, removal_tokens=16)
    assert torch.equal(model(tokens), before)


def test_what_is_too_short_to_analyse_is_named() -> None:
    model, short = model_of("nemotron-h-tiny"), [dataclasses.replace(documents(0)[0], tokens=np.array([5]))]
    with pytest.raises(HalflapError, match="the text of 'b' has no row of two tokens"):
        analyze(model, {"a": documents(0), "b": short}, context=64, tokens=64, removal_tokens=16)
    for few in ({"context": 1, "tokens": 64}, {"context": 64, "tokens": 1}):
        with pytest.raises(HalflapError, match="--tokens and --context of at least 2"):
            analyze(model, {"a": documents(0)}, removal_tokens=16, **few)


def test_the_verb_leaves_a_page(halflap: Callable[..., Any], tmp_path: Path) -> None:
    for name, text in (("wood", 3 * SENTENCE), ("stone", 3 * SENTENCE[::-1])):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"text": text}) + "\n")
    tokenizer = train_tokenizer([SENTENCE], 300)
    model = HybridModel(dataclasses.replace(preset("hymba-tiny"), vocab_size=tokenizer.vocab_size))
    initialize(model, 0)
    tokenizer.save(tmp_path / "tokenizer")
    save_model(model, tmp_path / "model", tokenizer_from=tmp_path / "tokenizer")
    data = (tmp_path / "wood.jsonl", tmp_path / "stone.jsonl")
    run = ("analyze", tmp_path / "model", "--data", *data, "--tokens", 40, "--out", tmp_path / "run")
    found = halflap(*run, "--json").json
    assert [layer["kind"] for layer in found["layers"][:2]] == ["hybrid", "mlp"] and list(found["domains"]) == [
        "wood",
        "stone",
    ]
    assert found["tokens"] == sum(found["tokens_by_domain"].values()) and found["tokens_by_domain"]["wood"] <= 40
    page = (tmp_path / "run" / "report.html").read_text()
    assert "meta tokens" in page and "loss added" in page
    assert "meta tokens of wood" in halflap(*run).out
    outcome = halflap("analyze", tmp_path / "model", "--data", data[0], data[0], "--out", tmp_path / "x")
    assert outcome.status == 1 and "more than once" in outcome.err
