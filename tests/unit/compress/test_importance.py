"""Scores: invariances, planted loud and dead indices, what each metric reads, files, and depth on removal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from halflap.compress.depth import DEPTH_METRICS, depth_scores
from halflap.compress.importance import Importance, Scoring, score_shapes
from halflap.compress.metrics import METRICS, collect
from halflap.data.batch import Batch
from halflap.errors import HalflapError
from halflap.models.config import AttentionConfig, Mamba2Config, MLPConfig, ModelConfig, RopeConfig
from halflap.models.model import HybridModel, initialize

HYBRID = ModelConfig(
    "nemotron_h", 31, 12, (Mamba2Config(8, 6, 4, 8), MLPConfig(10), AttentionConfig(8, 2, 4), MLPConfig(10))
)
LLAMA = ModelConfig(
    "llama",
    31,
    12,
    (AttentionConfig(6, 2, 4, rope=RopeConfig()), MLPConfig(14, activation="silu", gated=True)) * 2,
    tie_word_embeddings=True,
)
CONFIGS = pytest.mark.parametrize("config", [HYBRID, LLAMA], ids=["hybrid", "llama"])


def make_model(config: ModelConfig, seed: int = 0) -> HybridModel:
    model = HybridModel(config).double().eval()
    initialize(model, seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("proj.weight"):
                parameter.mul_(20)
    return model


def rows(count: int = 6, time: int = 9, seed: int = 0) -> Batch:
    tokens = torch.randint(0, 31, (count, time + 1), generator=torch.Generator().manual_seed(seed))
    return Batch(tokens[:, :-1], tokens[:, 1:], torch.ones(count, time))


def close(one: Importance, other: Importance, factor: float = 1.0) -> bool:
    return set(one.widths) == set(other.widths) and all(
        torch.allclose(one.widths[name] * factor, other.widths[name], rtol=1e-5, atol=1e-7) for name in one.widths
    )


@CONFIGS
def test_every_axis_is_scored(config: ModelConfig) -> None:
    for metric in METRICS:
        scores = collect(make_model(config), [rows()], metric)
        assert {name: tuple(value.shape) for name, value in scores.widths.items()} == score_shapes(config)
        assert all((value >= 0).all() and value.isfinite().all() for value in scores.widths.values())
        assert all(value.shape == (len(config.blocks),) for value in scores.depth.values())


@CONFIGS
def test_batch_size_and_order_of_rows_change_nothing(config: ModelConfig) -> None:
    model, batch = make_model(config), rows()
    together = collect(model, [batch])
    single = collect(model, [batch.rows(i, i + 1) for i in (3, 0, 5, 1, 4, 2)])
    assert close(together, single)
    assert torch.allclose(together.depth["block_influence"], single.depth["block_influence"])
    assert together.tokens == single.tokens == 54


def test_padding_counts_nowhere() -> None:
    model, batch = make_model(HYBRID), rows(2, 9)
    segments = torch.ones(2, 9, dtype=torch.int64)
    segments[1, 5:] = 0
    padded = Batch(batch.tokens, batch.targets, batch.weights, segments)
    short = Batch(batch.tokens[1:, :5], batch.targets[1:, :5], batch.weights[1:, :5])
    expected = collect(model, [batch.rows(0, 1), short])
    found = collect(model, [padded])
    assert close(expected, found) and found.tokens == 14
    for name in expected.energy:
        assert torch.allclose(expected.energy[name], found.energy[name], rtol=1e-5)


def test_scores_are_what_the_formula_says() -> None:
    """The FFN's, from the activations of a plain forward; pre- and post-activation, mean over time, L2 over rows."""
    model, batch = make_model(HYBRID), rows()
    seen: list[Tensor] = []
    mixer: Any = model.blocks[1].mixer
    handle = mixer.up_proj.register_forward_hook(lambda *args: seen.append(args[2].detach()))
    model(batch.tokens)
    handle.remove()
    post = F.relu(seen[0]).square().mean(1).square().sum(0).sqrt()
    pre = seen[0].abs().mean(1).square().sum(0).sqrt()
    assert torch.allclose(collect(model, [batch]).widths["blocks.1.neuron"].double(), post, rtol=1e-5)
    scores = collect(model, [batch], scoring=Scoring(neuron="pre"))
    assert torch.allclose(scores.widths["blocks.1.neuron"].double(), pre, rtol=1e-5)


@pytest.mark.parametrize("source", ["x", "z", "o"])
def test_mamba_heads_can_be_scored_from_three_places(source: str) -> None:
    model, batch = make_model(HYBRID), rows()
    seen: list[Tensor] = []
    mixer: Any = model.blocks[0].mixer
    handles = [
        mixer.in_proj.register_forward_hook(lambda *args: seen.append(args[2])),
        mixer.out_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0])),
    ]
    with torch.no_grad():
        model(batch.tokens)
    for handle in handles:
        handle.remove()
    watched = {"z": seen[0][..., :48], "x": seen[0][..., 48:96], "o": seen[1]}[source]
    expected = watched.abs().mean(1).square().sum(0).sqrt().reshape(4, 2, 6)
    found = collect(model, [batch], scoring=Scoring(mamba=source)).widths["blocks.0.inner"]
    assert torch.allclose(found.double(), expected, rtol=1e-5)


def test_scores_scale_with_the_activation() -> None:
    model, batch = make_model(HYBRID), rows()
    before = collect(model, [batch])
    with torch.no_grad():
        model.blocks[3].mixer.up_proj.weight.mul_(2)  # the last block: nothing after it changes
    after = collect(model, [batch])
    assert torch.allclose(after.widths["blocks.3.neuron"], 4 * before.widths["blocks.3.neuron"], rtol=1e-5)


def test_planted_indices_rank_first_and_last() -> None:
    model = make_model(HYBRID)
    with torch.no_grad():
        up = model.blocks[1].mixer.up_proj.weight
        up[3], up[7] = 0, up[7] * 100
        value = model.blocks[2].mixer.o_proj.weight
        assert value.shape == (12, 32)
        x_rows = model.blocks[0].mixer.in_proj.weight[48:96].view(4, 2, 6, 12)
        x_rows[2, 1], x_rows[0, 0] = 0, x_rows[0, 0] * 100
    scores = collect(model, [rows()]).widths
    assert scores["blocks.1.neuron"].argmin() == 3 and scores["blocks.1.neuron"].argmax() == 7
    heads = torch.linalg.vector_norm(scores["blocks.0.inner"], dim=-1)
    assert heads.argmin() == 5 and heads.argmax() == 0  # (group 2, head 1) and (group 0, head 0)


def test_energies_are_shares_of_what_the_norm_divides_by() -> None:
    """Mean squares of normalised inputs: they sum to the number of channels, but for eps."""
    energy = collect(make_model(HYBRID), [rows()]).energy
    assert set(energy) == {*(f"blocks.{i}.norm.weight" for i in range(4)), "norm.weight", "blocks.0.mixer.norm.weight"}
    for name, value in energy.items():
        groups = value.reshape(4, -1) if "mixer" in name else value.reshape(1, -1)
        assert (groups.sum(1) / groups.shape[1]).sub(1).abs().max() < 0.05, name


def test_watching_changes_nothing_and_leaves_nothing_behind() -> None:
    model, batch = make_model(HYBRID), rows()
    before = model(batch.tokens)
    collect(model, [batch])
    assert torch.equal(before, model(batch.tokens))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_no_text_is_refused() -> None:
    with pytest.raises(HalflapError, match="no calibration text"):
        collect(make_model(HYBRID), [])
    with pytest.raises(HalflapError, match="allowed are activation, taylor, weight_norm, random"):
        collect(make_model(HYBRID), [rows()], "magnitude")


def test_random_scores_follow_the_seed() -> None:
    model = make_model(HYBRID)
    one, same, other = (collect(model, [], "random", seed=seed) for seed in (1, 1, 2))
    assert close(one, same) and not close(one, other)


def test_weight_norm_of_neurons_is_that_of_rows_and_columns() -> None:
    model = make_model(HYBRID)
    mixer: Any = model.blocks[1].mixer
    expected = (mixer.up_proj.weight.square().sum(1) + mixer.down_proj.weight.square().sum(0)).sqrt()
    found = collect(model, [], "weight_norm").widths["blocks.1.neuron"]
    assert torch.allclose(found.double(), expected, rtol=1e-5)


def test_importance_survives_its_file(tmp_path: Path) -> None:
    scores = collect(make_model(HYBRID), [rows()], teacher="t", calibration="c")
    scores.save(tmp_path / "importance.safetensors")
    read = Importance.load(tmp_path / "importance.safetensors")
    assert read.digest == scores.digest and (read.teacher, read.calibration, read.tokens) == ("t", "c", 54)
    read.check_teacher("t")
    with pytest.raises(HalflapError, match="measured on checkpoint"):
        read.check_teacher("other")


@pytest.mark.parametrize("content", [b"", b"nonsense", b"\x08\x00\x00\x00\x00\x00\x00\x00{}      "])
def test_a_damaged_file_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "importance.safetensors"
    path.write_bytes(content)
    with pytest.raises(HalflapError, match="again"):
        Importance.load(path)
    with pytest.raises(HalflapError, match="does not exist"):
        Importance.load(tmp_path / "absent")


# ---- depth


@CONFIGS
@pytest.mark.parametrize("metric", [*DEPTH_METRICS, "block_influence"])
def test_a_block_without_output_scores_zero(config: ModelConfig, metric: str) -> None:
    model = make_model(config)
    with torch.no_grad():
        for name in ("out_proj", "o_proj"):
            if hasattr(model.blocks[0].mixer, name):
                getattr(model.blocks[0].mixer, name).weight.zero_()
    batches = [rows(2), rows(3, seed=1)]
    scores = (
        collect(model, batches).depth[metric]
        if metric == "block_influence"
        else depth_scores(model, batches, metric).mean
    )
    assert scores[0].abs() < 1e-12 and (scores[1:].abs() > 1e-6).all()


@pytest.mark.parametrize("metric", DEPTH_METRICS)
def test_removal_equals_a_model_without_the_block(metric: str) -> None:
    """Against whole models with the output projection of one block silenced."""
    model, batch = make_model(HYBRID), rows(3)
    scores = depth_scores(model, [batch], metric).mean
    with torch.no_grad():
        full = model(batch.tokens)
        hidden = model.hidden_states(batch.tokens)
        for index, name in enumerate(["out_proj", "down_proj", "o_proj", "down_proj"]):
            without = make_model(HYBRID)
            getattr(without.blocks[index].mixer, name).weight.zero_()
            cut, cut_hidden = without(batch.tokens), without.hidden_states(batch.tokens)
            log_p, log_q = full.log_softmax(-1), cut.log_softmax(-1)
            picked = batch.targets[..., None]
            expected = {
                "kl": (log_p.exp() * (log_p - log_q)).sum(-1).mean(),
                "loss": (log_p - log_q).gather(-1, picked).mean(),
                "hidden_mse": (hidden - cut_hidden).square().mean(),
                "logit_mse": (full - cut).square().sum() / full.square().sum(),
            }[metric]
            assert scores[index] == pytest.approx(float(expected), rel=1e-4)


def test_unknown_depth_metric_is_refused() -> None:
    with pytest.raises(HalflapError, match="those that do are kl"):
        depth_scores(make_model(HYBRID), [rows()], "size")
    with pytest.raises(HalflapError, match="no calibration text"):
        depth_scores(make_model(HYBRID), [], "kl")
