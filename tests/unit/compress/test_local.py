"""Variants that learn what their block does: they do learn it, alone, and fit into every plan that has them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from halflap.commands.students import build
from halflap.compress.axes import Sizes
from halflap.compress.library import WHOLE, Variant
from halflap.compress.local import distill_block, lessons_of, save_block, trained_block, trained_tensors
from halflap.compress.metrics import collect
from halflap.compress.plan import PruningPlan
from halflap.compress.ranking import plan_of_variants
from halflap.compress.replace import Replacement, replacement
from halflap.data.batch import Batch
from halflap.models.config import Mamba1Config, Mamba2Config, MLPConfig, ModelConfig
from halflap.models.context import SequenceContext
from halflap.models.model import HybridModel, initialize
from halflap.models.presets import hymba
from halflap.train.config import Fit

TEACHER = "t" * 64
M2, M1 = Mamba2Config(8, 8, 2, 4, chunk_size=4), Mamba1Config(24, 4, 2, norm_eps=1e-5)
CONFIGS = {
    "mamba2": ModelConfig("none", 40, 32, (M2, MLPConfig(24), M2)),
    "mamba1 and 2": ModelConfig("none", 40, 32, (M1, M2, M2), tie_word_embeddings=True),
    "hymba": hymba(6, hidden=32, mlp=24, heads=(4, 2), state=4, window=4, meta=3, vocab=40, context=64,
                   original_context=16),
}  # fmt: skip
CUTS = {
    Mamba2Config: Variant(Sizes(mamba_num_heads=4)),
    Mamba1Config: Variant(Sizes(mamba_intermediate_size=16, ssm_state_size=3)),
    MLPConfig: Variant(Sizes(intermediate_size=8)),
}


def make_model(config: ModelConfig) -> HybridModel:
    model = HybridModel(config).double().eval()
    initialize(model, 0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("proj.weight"):
                parameter.mul_(1 / (0.02 * parameter.shape[1] ** 0.5))
    return model


def batch(seed: int) -> Batch:
    tokens = torch.randint(0, 40, (2, 12), generator=torch.Generator().manual_seed(seed))
    return Batch(tokens, tokens.roll(-1, 1), torch.ones(2, 12))


def plan_of(model: HybridModel, variants: list[Variant]) -> PruningPlan:
    scores = collect(model, [batch(9)], "activation", teacher=TEACHER)
    return plan_of_variants(scores, TEACHER, model.config, variants, "masked")


def variants_of(config: ModelConfig, only: int | None = None) -> list[Variant]:
    cuts = [CUTS.get(type(block), Variant(Sizes(num_attention_heads=2))) for block in config.blocks]
    return [cut if only is None or place == only else WHOLE for place, cut in enumerate(cuts)]


def learn(
    model: HybridModel,
    variants: list[Replacement],
    index: int,
    batches: Callable[[int], Batch],
    steps: int,
    settings: Fit,
) -> list[float]:
    lessons = lessons_of(model, batches, index)
    return distill_block(variants, index, lessons, steps, settings, model.config.num_meta_tokens)


@pytest.mark.parametrize(("name", "index"), [("mamba2", 0), ("mamba2", 1), ("hymba", 4), ("hymba", 7)])
def test_a_variant_learns_what_its_block_does(name: str, index: int) -> None:
    """On fresh batches every step, so what is learnt holds for text not seen before; the teacher stays as it is."""
    model = make_model(CONFIGS[name])
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    plan = plan_of(model, variants_of(model.config, index))
    settings = Fit(learning_rate=3e-3, schedule="constant", weight_decay=0.0)
    first = learn(model, [replacement(model, plan, index)], index, batch, 1, settings)[0]
    one, other = (replacement(model, plan, index) for _ in range(2))
    last = learn(model, [one, other], index, batch, 40, settings)
    assert 0 < last[0] == last[1] < 0.9 * first < 1.5
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


@pytest.mark.parametrize("name, index", [("mamba2", 1), ("hymba", 4)])
def test_what_stands_in_padding_is_not_learnt(name: str, index: int) -> None:
    """Nor what stands in other rows of a batch, which the means would weigh by its length."""
    model = make_model(CONFIGS[name])
    plan = plan_of(model, variants_of(model.config, index))
    settings = Fit(learning_rate=3e-3, schedule="constant", weight_decay=0.0)
    trained, losses = [], []
    for time, filler in ((7, 0), (12, 0), (12, 31)):
        tokens = batch(1).tokens[:1, :time].clone()
        tokens[:, 7:] = filler
        segments = (torch.arange(time) < 7).long()[None]
        padded = Batch(tokens, tokens.roll(-1, 1), segments.float(), segments)
        variant = replacement(model, plan, index)
        losses += learn(model, [variant], index, lambda _, padded=padded: padded, 3, settings)
        trained.append(torch.cat([p.detach().flatten() for p in variant.block.parameters()]))
    assert (trained[1] - trained[0]).abs().max() < 1e-9 and torch.equal(trained[1], trained[2])
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-9)


@pytest.mark.parametrize("name, index", [("mamba2", 0), ("hymba", 4)])
def test_documents_of_one_row_teach_what_they_do_in_rows_of_their_own(name: str, index: int) -> None:
    """Meta tokens stand before each of them."""
    model = make_model(CONFIGS[name])
    plan = plan_of(model, variants_of(model.config, index))
    settings = Fit(learning_rate=3e-3, schedule="constant", weight_decay=0.0)
    apart = batch(1).tokens[:, :6]
    together = apart.reshape(1, 12)
    trained = []
    for tokens, segments in ((apart, torch.ones_like(apart)), (together, 1 + (torch.arange(12) >= 6).long()[None])):
        rows = Batch(tokens, tokens.roll(-1, 1), segments.clamp(max=1).float(), segments)
        variant = replacement(model, plan, index)
        learn(model, [variant], index, lambda _, rows=rows: rows, 3, settings)
        trained.append(torch.cat([p.detach().flatten() for p in variant.block.parameters()]))
    assert (trained[0] - trained[1]).abs().max() < 1e-9


@pytest.mark.parametrize("name", CONFIGS)
def test_trained_blocks_fit_into_every_plan(name: str, tmp_path: Path) -> None:
    """The whole student shares one eps and scales its residual stream, which the plan of one block does not."""
    model = make_model(CONFIGS[name])
    whole = plan_of(model, variants_of(model.config))
    context = SequenceContext(torch.arange(12).expand(2, 12), readers=model.readers)
    stream = torch.randn(2, 12, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    for index in range(len(model.blocks)):
        plan = plan_of(model, variants_of(model.config, index))
        trained = replacement(model, plan, index)
        with torch.no_grad():
            for parameter in trained.block.parameters():
                parameter.mul_(1 + 0.1 * torch.randn_like(parameter))
        assert trained_block(tmp_path, whole, index) == {}
        save_block(tmp_path, plan, index, trained)
        assert all(
            torch.equal(t, trained.block.state_dict()[k]) for k, t in trained_block(tmp_path, plan, index).items()
        )
        again = replacement(model, whole, index, trained_block(tmp_path, whole, index))
        with torch.no_grad():
            model.blocks[index](stream, context)  # keys and values for those that read them
            assert torch.allclose(again(stream, context), trained(stream, context), rtol=1e-9, atol=1e-12)
    student = build(model, whole)
    found = trained_tensors(tmp_path, whole)
    assert {key.split(".")[1] for key in found} == {str(i) for i in range(len(model.blocks))}
    assert not student.load_state_dict(found, strict=False).unexpected_keys
    assert whole.scales.keys() & {"embedding.weight"} or name == "mamba1 and 2"


def test_another_cut_finds_no_file(tmp_path: Path) -> None:
    model = make_model(CONFIGS["mamba2"])
    plan = plan_of(model, variants_of(model.config, 1))
    save_block(tmp_path, plan, 1, replacement(model, plan, 1))
    keep = {"blocks.1.neuron": tuple(range(8))} if plan.keep["blocks.1.neuron"] != tuple(range(8)) else {}
    assert trained_block(tmp_path, dataclasses.replace(plan, keep=keep), 1) == {}
    assert trained_block(tmp_path, plan_of(model, variants_of(model.config)), 1)
