"""Nemotron-4 in parts and in eight bits: shards cut by pruning plans add up to the model; E4M3 weights do little harm.

Both are properties of what we have (plans, layouts, checkpoints as tensors); nothing here runs on several devices.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from halflap.checkpoints.checkpoint import fill_model
from halflap.compress.plan import PruningPlan
from halflap.compress.prune import apply_plan
from halflap.models.context import SequenceContext
from halflap.models.model import HybridModel, initialize
from halflap.models.presets import nemotron_4
from halflap.models.quantization import Quantization
from halflap.models.quantized import pack_tensors
from halflap.ops.quantized import dequantize, to_e4m3

LAYERS, HEADS, KV_HEADS, NEURONS, VOCAB = 2, 16, 8, 32, 64
CONFIG = nemotron_4(LAYERS, hidden=32, mlp=NEURONS, attention=(HEADS, KV_HEADS, 8), vocab=VOCAB)


def random_model() -> HybridModel:
    model = HybridModel(CONFIG).double().eval()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.data = 0.3 * noise if "norm" in name else noise / parameter.shape[-1] ** 0.5
    return model


def shard(model: HybridModel, rank: int, ranks: int) -> HybridModel:
    """Rank `rank`'s heads and neurons. With more ranks than key/value heads, several hold the same one."""
    per_kv = max(1, ranks // KV_HEADS)  # ranks that share a key/value head
    start = rank * KV_HEADS // ranks
    kv = tuple(range(start, start + max(1, KV_HEADS // ranks)))
    queries = HEADS // KV_HEADS // per_kv  # of each of its key/value heads
    first = rank % per_kv * queries
    neurons = tuple(range(rank * NEURONS // ranks, (rank + 1) * NEURONS // ranks))
    keep: dict[str, tuple[int, ...] | tuple[tuple[int, ...], ...]] = {}
    for block in range(0, 2 * LAYERS, 2):
        keep[f"blocks.{block}.kv"] = kv
        keep[f"blocks.{block}.query"] = (tuple(range(first, first + queries)),) * len(kv)
        keep[f"blocks.{block + 1}.neuron"] = neurons
    plan = PruningPlan("t" * 64, CONFIG, keep=keep)
    part = HybridModel(plan.student).double().eval()
    part.load_state_dict(dict(apply_plan(plan, model.state_dict().items())))
    return part


@torch.no_grad()
@pytest.mark.parametrize("ranks", [1, 2, 4, 8, 16])
def test_blocks_are_the_sums_of_their_shards(ranks: int) -> None:
    """Tensor parallelism: heads and neurons are divided, what they write into the residual stream is added up."""
    model = random_model()
    shards = [shard(model, rank, ranks) for rank in range(ranks)]
    tokens = torch.randint(VOCAB, (2, 9), generator=torch.Generator().manual_seed(1))
    hidden = model.embedding(tokens)
    context = SequenceContext(positions=torch.arange(9).expand(2, 9))
    for index, block in enumerate(model.blocks):
        normed = block.get_submodule("norm")(hidden)
        mixers = [part.get_submodule(f"blocks.{index}.mixer") for part in shards]
        hidden = hidden + torch.stack([mixer(normed, context) for mixer in mixers]).sum(0)
    logits = model.norm(hidden) @ model.head_weight.T
    expected = model(tokens)
    assert expected.std() > 0.1
    torch.testing.assert_close(logits, expected, atol=1e-12, rtol=1e-12)


# ---- E4M3, a scale for each output channel


def test_e4m3_errs_by_a_sixteenth_at_most_and_by_three_percent_in_the_mean() -> None:
    weight = torch.randn(256, 512, generator=torch.Generator().manual_seed(0))
    packed, scale = to_e4m3(weight)
    back, scale = dequantize(packed, scale, 8, 512, 512), scale.float()
    torch.testing.assert_close(scale, weight.abs().amax(1, keepdim=True) / 448, rtol=2**-8, atol=0)  # bfloat16
    normal = (weight / scale).abs() >= 2**-6  # the smallest number with a full mantissa
    assert normal.float().mean() > 0.99
    assert ((back - weight).abs()[normal] / weight.abs()[normal]).max() <= 2**-4
    assert (back - weight).norm() / weight.norm() <= 0.03
    assert torch.equal(back.abs().amax(1), (448 * scale)[:, 0])


def chain(rows: int, seed: int) -> Tensor:
    """Text of a first-order chain with few likely followers: something to learn in seconds."""
    generator = torch.Generator().manual_seed(seed)
    followers = torch.randint(VOCAB, (VOCAB, 4), generator=torch.Generator().manual_seed(7))
    tokens = torch.randint(VOCAB, (rows, 1), generator=generator)
    while tokens.shape[1] < 33:
        choice = torch.randint(4, (rows, 1), generator=generator)
        tokens = torch.cat([tokens, followers[tokens[:, -1]].gather(1, choice)], 1)
    return tokens


def loss_of(model: HybridModel, tokens: Tensor) -> Tensor:
    return F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


def test_e4m3_weights_change_a_trained_models_perplexity_by_less_than_a_percent() -> None:
    model = HybridModel(CONFIG)
    initialize(model, 0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(120):
        loss = loss_of(model, chain(16, step))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        tokens = chain(64, 1000)
        before = loss_of(model, tokens)
        assert before < 1.8  # of log 64 = 4.2 untrained, log 4 = 1.4 at best
        form = Quantization.asked("fp8")  # embedding, head and norms stay as they are
        packed = pack_tensors(model.state_dict().items(), CONFIG, form)
        after = loss_of(fill_model(CONFIG, packed, torch.float32, quantization=form), tokens)
    assert after != before and abs(float((after - before).exp()) - 1) <= 0.01
