"""Training a Hymba: gradients of everything, through sharing, packing and recomputation; what the loss may not see."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from halflap.models.config import HybridConfig, ModelConfig
from halflap.models.model import HybridModel, initialize
from halflap.models.presets import hymba
from halflap.ops.vocabulary_loss import cross_entropy_sum


def tiny(**changes) -> ModelConfig:
    sizes = {"hidden": 40, "mlp": 24, "heads": (5, 1), "state": 4, "window": 6, "meta": 4, "vocab": 64}
    return hymba(**({"layers": 8, "context": 256, "original_context": 64} | sizes | changes))


def random_model(config: ModelConfig) -> HybridModel:
    """Weights large enough that every part matters."""
    model = HybridModel(config).double().eval()
    initialize(model, 0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("proj.weight"):
                p.mul_(1 / (0.02 * math.sqrt(p.shape[1])))
            elif name in ("embedding.weight", "meta_tokens"):
                p.mul_(30)
    return model


def text(batch: int, time: int, seed: int = 0) -> Tensor:
    return torch.randint(64, (batch, time), generator=torch.Generator().manual_seed(seed))


def loss_of(net: HybridModel, tokens: Tensor, targets: Tensor, weights: Tensor, segments: Tensor | None) -> Tensor:
    hidden = net.hidden_states(tokens, segments=segments)
    return cross_entropy_sum(hidden.flatten(0, 1), net.head_weight, targets.flatten(), weights.flatten())


def test_gradients_of_every_kind_of_parameter() -> None:
    """Central differences in one random direction of each parameter of two layers, producer and consumer."""
    net = random_model(tiny(layers=6, heads=(5, 1)))
    tokens = text(1, 12)
    weights = torch.ones(1, 11, dtype=torch.float64)

    def loss() -> Tensor:
        return loss_of(net, tokens[:, :-1], tokens[:, 1:], weights, None)

    loss().backward()
    g = torch.Generator().manual_seed(3)
    for name, p in net.named_parameters():
        if name.startswith("blocks.") and int(name.split(".")[1]) not in (6, 7, 8):
            continue
        direction = torch.randn(p.shape, generator=g, dtype=torch.float64)
        kept, step = p.detach().clone(), 1e-5
        with torch.no_grad():
            values = [loss().item() for sign in (1, -1) if p.copy_(kept + sign * step * direction) is not None]
            p.copy_(kept)
        numeric = (values[0] - values[1]) / (2 * step)
        exact = (p.grad * direction).sum().item()
        assert numeric == pytest.approx(exact, rel=1e-5, abs=1e-6), name


def test_a_producers_keys_and_values_learn_from_its_consumers() -> None:
    net = random_model(tiny())
    with torch.no_grad():
        net.blocks[2].mixer.out_proj.weight.zero_()  # its own attention has no effect
    loss_of(net, text(1, 10), text(1, 10, 1), torch.ones(1, 10, dtype=torch.float64), None).backward()
    rows = net.blocks[2].mixer.in_proj.weight.grad.split([40, 8, 16, 80, 80])
    assert rows[0].abs().max() == 0 and rows[1].abs().max() > 0 and rows[2].abs().max() > 0


def test_blocks_run_again_in_the_backward_give_the_same_gradients() -> None:
    gradients = []
    for again in (None, torch.utils.checkpoint.checkpoint):
        net = random_model(tiny()).train()
        net.recompute = again
        tokens, segments = text(2, 14), torch.tensor([[1] * 9 + [2] * 5, [1] * 14])
        loss_of(net, tokens, tokens, torch.ones(2, 14, dtype=torch.float64), segments).backward()
        gradients.append([p.grad for p in net.parameters()])
    assert all(torch.allclose(a, b, rtol=1e-12, atol=1e-14) for a, b in zip(*gradients, strict=True))


def test_packed_gradients_are_the_sum_of_the_documents() -> None:
    net = random_model(tiny())
    documents = [text(1, n, seed=n) for n in (9, 5)]
    ones = torch.ones(1, 14, dtype=torch.float64)
    for document in documents:
        loss_of(net, document, document, ones[:, : document.shape[1]], None).backward()
    alone = [p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    row = torch.cat(documents, 1)
    loss_of(net, row, row, ones, torch.tensor([[1] * 9 + [2] * 5])).backward()
    for a, p in zip(alone, net.parameters(), strict=True):
        assert torch.allclose(a, p.grad, rtol=1e-9, atol=1e-11)


@torch.no_grad()
def test_the_loss_knows_no_meta_positions_and_no_padding() -> None:
    model, tokens = random_model(tiny()), text(1, 10)
    losses = []
    for left, right in ((0, 0), (0, 1), (0, 9), (7, 0), (3, 3)):
        row = torch.cat([torch.zeros(1, left, dtype=torch.int64), tokens, torch.zeros(1, right, dtype=torch.int64)], 1)
        weights = torch.zeros(row.shape, dtype=torch.float64)
        weights[:, left : left + 9] = 1
        segments = torch.zeros_like(row)
        segments[:, left : left + 10] = 1
        losses.append(float(loss_of(model, row, row.roll(-1, 1), weights, segments if left or right else None)))
    logits = model(tokens)[0, :-1].log_softmax(-1)
    by_hand = -float(logits.gather(1, tokens[0, 1:, None]).sum())
    assert losses == pytest.approx([by_hand] * 5, rel=1e-12)


# ---- associative recall across a distance

KEYS, VALUES, PAIRS = 6, 6, 4
FILLER = KEYS + VALUES


def recall(rows: int, seed: int, distance: int) -> tuple[Tensor, Tensor]:
    """Pairs of a key and its value, `distance` of filler, then one of the keys; the answer (rows,) is its value."""
    g = torch.Generator().manual_seed(seed)
    keys = torch.rand(rows, KEYS, generator=g).argsort(1)[:, :PAIRS]
    values = KEYS + torch.randint(VALUES, (rows, PAIRS), generator=g)
    asked = torch.randint(PAIRS, (rows, 1), generator=g)
    pairs = torch.stack([keys, values], 2).flatten(1)
    tokens = torch.cat([pairs, torch.full((rows, distance), FILLER), keys.gather(1, asked)], 1)
    return tokens, values.gather(1, asked)[:, 0]


def windows(config: ModelConfig, whole: set[int]) -> ModelConfig:
    """With these global layers and no sharing."""
    blocks = list(config.blocks)
    for layer in range(len(blocks) // 2):
        hybrid = blocks[2 * layer]
        assert isinstance(hybrid, HybridConfig)
        attention = dataclasses.replace(hybrid.attention, window=None if layer in whole else 4, key_value_source=None)
        blocks[2 * layer] = dataclasses.replace(hybrid, attention=attention)
    return dataclasses.replace(config, blocks=tuple(blocks))


def trained(config: ModelConfig, distance: int, steps: int = 1500) -> tuple[float, float]:
    """Loss and share of right answers on fresh examples, after training until that is nearly perfect."""
    model = HybridModel(dataclasses.replace(config, initializer_range=0.05))
    initialize(model, 0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.98), weight_decay=0.0)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1, (step + 1) / 50) * min(1, (steps - step) / (0.3 * steps))
        tokens, answers = recall(32, step + 1, distance)
        loss = F.cross_entropy(model.hidden_states(tokens)[:, -1] @ model.head_weight.t(), answers)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if loss.item() < 0.003:
            break
    with torch.no_grad():
        tokens, answers = recall(512, 0, distance)
        logits = model(tokens)[:, -1]
        return float(F.cross_entropy(logits, answers)), float((logits.argmax(1) == answers).float().mean())


@pytest.mark.slow
def test_one_global_layer_recalls_what_windows_cannot() -> None:
    """Beyond the reach of all windows together only the states are left, here of one number a channel.

    Within their reach the same model, trained alike, recalls: three layers of 4 keys back see 12; all lies within 8.
    """
    base = hymba(
        3, hidden=48, mlp=96, heads=(4, 2), state=1, meta=2, vocab=FILLER + 1, context=64, original_context=None
    )
    loss, right = trained(windows(base, {2}), distance=16)
    assert loss < 0.05 and right > 0.98
    _, beyond = trained(windows(base, set()), distance=16)
    _, within = trained(windows(base, set()), distance=0)
    assert beyond < 0.6 and within > 0.95
