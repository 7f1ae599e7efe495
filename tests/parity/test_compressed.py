"""Pruned students opened by transformers' stock classes: the same logits as ours, in one pass and through a cache."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")

from halflap.checkpoints.checkpoint import Checkpoint, load_model, save_model, write_checkpoint  # noqa: E402
from halflap.compress.axes import Sizes  # noqa: E402
from halflap.compress.metrics import collect  # noqa: E402
from halflap.compress.prune import apply_plan  # noqa: E402
from halflap.compress.ranking import plan_for  # noqa: E402
from halflap.data.batch import Batch  # noqa: E402
from halflap.inference.generate import generate  # noqa: E402
from halflap.models.cache import Cache  # noqa: E402
from halflap.models.config import AttentionConfig, Mamba2Config, MLPConfig, ModelConfig, RopeConfig  # noqa: E402
from halflap.models.model import HybridModel, initialize  # noqa: E402
from halflap.models.presets import hymba  # noqa: E402

MAMBA, MLP = Mamba2Config(16, 6, 4, 8, chunk_size=16), MLPConfig(40)
HYBRID = ModelConfig("nemotron_h", 64, 48, (MAMBA, MLP, MAMBA, AttentionConfig(8, 2, 6), MLP, MAMBA, MLP))
LLAMA = ModelConfig(
    "llama",
    64,
    48,
    (AttentionConfig(6, 2, 8, rope=RopeConfig()), MLPConfig(60, activation="silu", gated=True)) * 3,
    tie_word_embeddings=True,
)
NEMOTRON = ModelConfig(
    "nemotron", 64, 48, (AttentionConfig(8, 4, 8, rope=RopeConfig(fraction=0.5)), MLPConfig(60)) * 3, norm="layer1p"
)
CUTS = {
    # an attention block stays: the stock class cannot decode without one
    "hybrid": (HYBRID, Sizes(32, 24, 8, 4, num_attention_heads=4, drop_blocks=(6,))),
    "hybrid heads": (HYBRID, Sizes(mamba_num_heads=12)),
    "hybrid states": (HYBRID, Sizes(ssm_state_size=5, num_key_value_heads=1)),
    "llama": (LLAMA, Sizes(hidden_size=40, intermediate_size=33, num_attention_heads=4, num_blocks=4)),
    "nemotron": (NEMOTRON, Sizes(hidden_size=41, intermediate_size=33, num_attention_heads=4, num_blocks=4)),
    "nemotron heads": (NEMOTRON, Sizes(num_key_value_heads=3)),
}
HYMBA = dataclasses.replace(
    hymba(6, hidden=48, mlp=40, heads=(6, 2), state=6, window=8, meta=3, vocab=64, context=64, original_context=None),
    eos_token_id=None,
)
HYMBA_CUTS = {
    "hymba": (HYMBA, Sizes(40, 33, num_attention_heads=4, mamba_head_dim=11, ssm_state_size=5)),
    "hymba depth": (HYMBA, Sizes(num_blocks=6, num_key_value_heads=1)),
}
CLASSES = {"nemotron_h": "NemotronHForCausalLM", "llama": "LlamaForCausalLM", "nemotron": "NemotronForCausalLM"}
TOKENS = torch.randint(0, 64, (2, 21), generator=torch.Generator().manual_seed(1))


def make_teacher(config: ModelConfig, directory: Path) -> Checkpoint:
    model = HybridModel(config)
    initialize(model, 0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.rand(parameter.shape, generator=generator)
            if name.endswith("dt_bias"):  # time steps above the bound that transformers clamps prefill to
                parameter.copy_(-3.5 + 2.5 * noise)
            elif name.endswith(("norm.weight", "norm.bias")):
                parameter.add_(0.4 * (noise - 0.5))
            elif name.endswith("proj.weight"):
                parameter.mul_(4)
    return save_model(model, directory)


def gap(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a - b).abs().max().item()


@torch.no_grad()
@pytest.mark.parametrize("name", CUTS)
@pytest.mark.parametrize("correction", ["masked", "none", "calibrated"])
def test_students_open_in_the_stock_class(tmp_path: Path, name: str, correction: str) -> None:
    config, sizes = CUTS[name]
    teacher = make_teacher(config, tmp_path / "teacher")
    batch = Batch(TOKENS, TOKENS, torch.ones(TOKENS.shape))
    scores = collect(load_model(teacher.path), [batch], teacher=teacher.digest)
    plan = plan_for(scores, teacher.digest, config, sizes, correction)
    write_checkpoint(tmp_path / "student", plan.student, apply_plan(plan, teacher.tensors()))
    theirs: Any = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "student", dtype=torch.float32).eval()
    assert type(theirs).__name__ == CLASSES[config.family]
    mine = load_model(tmp_path / "student")
    full = theirs(TOKENS).logits
    assert full.abs().max() > 0.3
    assert gap(mine(TOKENS), full) <= 1e-5
    cache, past = Cache.create(mine.config, 2), None
    for start, stop in [(0, 15), *((t, t + 1) for t in range(15, 21))]:
        step = TOKENS[:, start:stop]
        output = theirs(step, past_key_values=past, use_cache=True)
        past = output.past_key_values
        assert gap(mine(step, cache=cache), output.logits) <= 1e-5


@torch.no_grad()
@pytest.mark.parametrize("name", ["nemotron", "hymba", "hymba depth"])
def test_pruned_students_write_the_same_in_transformers(tmp_path: Path, name: str) -> None:
    """32 greedy tokens of prompts of unequal length, left-padded there; of Hymba by the class that we register."""
    import halflap.hf  # noqa: F401

    config, sizes = (CUTS | HYMBA_CUTS)[name]
    teacher = make_teacher(config, tmp_path / "teacher")
    scores = collect(
        load_model(teacher.path), [Batch(TOKENS, TOKENS, torch.ones(TOKENS.shape))], teacher=teacher.digest
    )
    plan = plan_for(scores, teacher.digest, config, sizes)
    write_checkpoint(tmp_path / "student", plan.student, apply_plan(plan, teacher.tensors()))
    theirs: Any = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "student", dtype=torch.float32).eval()
    rows = [TOKENS[0, :7], TOKENS[1]]
    mine = [out.tokens for out in generate(load_model(tmp_path / "student"), [r.tolist() for r in rows], 32)]
    tokens = torch.stack([torch.nn.functional.pad(row, (21 - len(row), 0)) for row in rows])
    mask = torch.stack([torch.nn.functional.pad(torch.ones_like(row), (21 - len(row), 0)) for row in rows])
    out = theirs.generate(tokens, attention_mask=mask, max_new_tokens=32, do_sample=False, pad_token_id=0)
    assert out[:, 21:].tolist() == mine
