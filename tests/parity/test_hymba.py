"""Hymba against a direct, slow transcription of its published equations, in float64 and under the released names.

The transcription takes one document at a time and one position at a time, knows no cache, no batch and no packing, and
was written from the specification alone. Section numbers are the specification's.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from halflap.checkpoints.hymba import HYMBA, cannot_write
from halflap.checkpoints.names import expand
from halflap.models.cache import Cache
from halflap.models.config import ModelConfig
from halflap.models.model import HybridModel, initialize
from halflap.models.presets import hymba
from halflap.ops import select

TOLERANCE = 1e-9


class Sizes(NamedTuple):
    """What the released config would say; groups and global layers as section 4.3 has them for 8 layers."""

    layers: int = 8
    hidden: int = 40
    heads: int = 5
    kv_heads: int = 1
    state: int = 4
    rank: int = 2
    meta: int = 4
    window: int = 6
    whole: tuple[int, ...] = (0, 3, 7)
    groups: tuple[tuple[int, ...], ...] = ((1, 2), (4, 5, 6))
    original: int | None = 64
    context: int = 256

    def config(self) -> ModelConfig:
        return hymba(
            self.layers, hidden=self.hidden, mlp=24, heads=(self.heads, self.kv_heads), state=self.state,
            window=self.window, meta=self.meta, vocab=64, context=self.context, original_context=self.original,
        )  # fmt: skip


VARIANTS = {
    "spec": Sizes(),
    "two key/value heads": Sizes(hidden=32, heads=4, kv_heads=2),
    "no meta tokens": Sizes(meta=0),
    "plain rope": Sizes(original=None),
    "four layers": Sizes(layers=4, whole=(0, 1, 3), groups=()),
}


def rms(x: Tensor, gain: Tensor) -> Tensor:
    return gain * x / torch.sqrt((x * x).mean() + 1e-6)


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def rotate(head: Tensor, position: int, s: Sizes) -> Tensor:
    """3.2: pair j with j + 32; the base is stretched by (2 Lmax / Lorig - 1) ^ (64 / 62), at 64 channels a head."""
    size = len(head)
    base = 10000.0
    if s.original is not None:
        base *= (2 * s.context / s.original - 1) ** (size / (size - 2))
    turned = head.clone()
    for j in range(size // 2):
        angle = position * base ** (-2 * j / size)
        a, b = head[j], head[j + size // 2]
        turned[j] = a * math.cos(angle) - b * math.sin(angle)
        turned[j + size // 2] = b * math.cos(angle) + a * math.sin(angle)
    return turned


def visible(query: int, key: int, layer: int, s: Sizes, window: int) -> bool:
    """5: absolute positions, meta tokens first."""
    return key <= query and (layer in s.whole or query - key <= window or key < s.meta)


class Trace(NamedTuple):
    logits: Tensor  # (T, V)
    attention: list[Tensor]  # of each layer (M + T, d), before its norm
    ssm: list[Tensor]  # the same
    keys: dict[int, Tensor]  # of each layer that has its own (M + T, kv heads, channels), rotated
    states: list[Tensor]  # of each layer (d, N) after the last token


def transcription(w: dict[str, Tensor], s: Sizes, tokens: list[int], decoded_from: int | None = None) -> Trace:
    """decoded_from: from this token on, the window of the released decoder, one shorter."""
    source = {layer: group[0] for group in s.groups for layer in group[1:]}
    rows = [*w["model.memory_tokens"]] if s.meta else []
    rows += [w["model.embed_tokens.weight"][token] for token in tokens]
    shared: dict[int, tuple[Tensor, Tensor]] = {}
    found = Trace(torch.empty(0), [], [], {}, [])
    for layer in range(s.layers):
        prefix = f"model.layers.{layer}."
        own = {name.removeprefix(prefix): tensor for name, tensor in w.items() if name.startswith(prefix)}
        normed = [rms(x, own["input_layernorm.weight"]) for x in rows]
        mixed = mixer(own, s, layer, normed, source.get(layer, layer), shared, found, decoded_from)
        rows = [x + m for x, m in zip(rows, mixed)]
        for i, x in enumerate(rows):  # 3.5
            a = rms(x, own["pre_moe_layernorm.weight"])
            expert = "moe.experts.0."
            up = silu(own[expert + "gate_proj.weight"] @ a) * (own[expert + "up_proj.weight"] @ a)
            rows[i] = x + own[expert + "down_proj.weight"] @ up
    last = [w["model.embed_tokens.weight"] @ rms(x, w["model.final_layernorm.weight"]) for x in rows[s.meta :]]
    found.keys.update({layer: keys for layer, (keys, _) in shared.items()})
    return found._replace(logits=torch.stack(last))


def mixer(w, s, layer, normed, source, shared, found, decoded_from) -> list[Tensor]:
    """3.1 to 3.4."""
    d, dk, dv = 2 * s.hidden, s.hidden // s.heads, 2 * s.hidden // s.heads
    widths = [s.heads * dk, s.kv_heads * dk, s.kv_heads * dv, d, d] if source == layer else [s.heads * dk, d, d]
    assert w["mamba.in_proj.weight"].shape == (sum(widths), s.hidden)
    parts = [(w["mamba.in_proj.weight"] @ x).split(widths) for x in normed]
    queries = [[rotate(h, p, s) for h in part[0].split(dk)] for p, part in enumerate(parts)]
    if source == layer:
        keys = [torch.stack([rotate(h, p, s) for h in part[1].split(dk)]) for p, part in enumerate(parts)]
        shared[layer] = torch.stack(keys), torch.stack([torch.stack(part[2].split(dv)) for part in parts])
    keys, values = shared[source]
    attended = []
    for q, heads in enumerate(queries):
        window = s.window if decoded_from is None or q < s.meta + decoded_from else s.window - 1
        seen = [k for k in range(len(queries)) if visible(q, k, layer, s, window)]
        out = []
        for i, head in enumerate(heads):
            kv = i // (s.heads // s.kv_heads)
            scores = torch.stack([head @ keys[k, kv] for k in seen]) / math.sqrt(dk)
            weights = torch.exp(scores - scores.max())
            out.append(sum(a * values[k, kv] for a, k in zip(weights / weights.sum(), seen)))
        attended.append(torch.cat(out))
    scanned, state = mamba(w, s, [part[-2] for part in parts], [part[-1] for part in parts])
    found.attention.append(torch.stack(attended))
    found.ssm.append(torch.stack(scanned))
    found.states.append(state)
    norms = w["mamba.pre_avg_layernorm1.weight"], w["mamba.pre_avg_layernorm2.weight"]
    return [w["mamba.out_proj.weight"] @ (rms(a, norms[0]) + rms(b, norms[1])) / 2 for a, b in zip(attended, scanned)]


def mamba(w, s, xs, zs) -> tuple[list[Tensor], Tensor]:
    """3.3."""
    kernel, bias = w["mamba.conv1d.weight"][:, 0], w["mamba.conv1d.bias"]
    A, D = -torch.exp(w["mamba.A_log.0"]), w["mamba.D.0"]
    state, outputs = torch.zeros_like(A), []
    for t, z in enumerate(zs):
        taps = [kernel[:, 3 - back] * xs[t - back] for back in range(4) if t - back >= 0]
        u = silu(sum(taps) + bias)
        dt, B, C = (w["mamba.x_proj.0.weight"] @ u).split([s.rank, s.state, s.state])
        dt, B, C = (rms(v, w[f"mamba.{n}_layernorm.weight"]) for v, n in ((dt, "dt"), (B, "B"), (C, "C")))
        dt = torch.log1p(torch.exp(w["mamba.dt_proj.0.weight"] @ dt + w["mamba.dt_proj.0.bias"]))
        state = torch.exp(dt[:, None] * A) * state + (dt * u)[:, None] * B[None, :]
        outputs.append((state @ C + D * u) * silu(z))
    return outputs, state


# ---- the model


def random_model(s: Sizes) -> tuple[HybridModel, dict[str, Tensor]]:
    """Weights large enough that every part matters, and the same under the released names."""
    config = s.config()
    assert cannot_write(config) is None
    model = HybridModel(config).double().eval()
    initialize(model, 0)
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=g, dtype=torch.float64)
            if name.endswith("norm.weight"):
                p.copy_(1 + 0.3 * noise)
            elif name.endswith((".A_log", ".D", ".bias")):
                p.add_(0.3 * noise)
            elif name.endswith("proj.weight"):
                p.copy_(noise / math.sqrt(p.shape[1]))
            elif name in ("embedding.weight", "meta_tokens"):
                p.copy_(0.7 * noise)
    names = expand(config, HYMBA.rows)
    return model, {names[ours]: tensor for ours, tensor in model.state_dict().items()}


def text(length: int, seed: int = 0) -> list[int]:
    return torch.randint(64, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.fixture(scope="module", params=VARIANTS)
def pair(request) -> tuple[Sizes, HybridModel, dict[str, Tensor], list[int], Trace]:
    s = VARIANTS[request.param]
    model, weights = random_model(s)
    tokens = text(20)
    return s, model, weights, tokens, transcription(weights, s, tokens)


@torch.no_grad()
def test_logits(pair):
    _, model, _, tokens, expected = pair
    assert (model(torch.tensor([tokens]))[0] - expected.logits).abs().max() < TOLERANCE
    assert expected.logits.std() > 0.5  # otherwise it proves little


@torch.no_grad()
def test_both_branches_of_every_layer(pair):
    """Consumers among them: they attend to the producer's keys, rotated once at their absolute position."""
    s, model, _, tokens, expected = pair
    taken: dict[tuple[int, str], Tensor] = {}

    def take(layer, name):
        def hook(module, args):
            taken[layer, name] = args[0][0]

        return hook

    handles = []
    for layer in range(s.layers):
        block = model.blocks[2 * layer].mixer
        handles += [getattr(block, f"{n}_norm").register_forward_pre_hook(take(layer, n)) for n in ("attention", "ssm")]
    model(torch.tensor([tokens]))
    for handle in handles:
        handle.remove()
    for layer in range(s.layers):
        assert (taken[layer, "attention"] - expected.attention[layer]).abs().max() < TOLERANCE
        assert (taken[layer, "ssm"] - expected.ssm[layer]).abs().max() < TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize("sizes", [[1] * 20, [20], [7, 1, 12], [2, 18]])
def test_cached_passes(pair, sizes):
    """Logits, and in the end every state: keys, of windowed layers in a ring, and SSM states."""
    s, model, _, tokens, expected = pair
    cache = Cache.create(model.config, 1, 2, torch.float64)
    parts, start = [], 0
    for size in sizes:
        parts.append(model(torch.tensor([tokens[start : start + size]]), cache=cache)[0])
        start += size
    assert (torch.cat(parts) - expected.logits).abs().max() < TOLERANCE
    consumers = {layer for group in s.groups for layer in group[1:]}
    for layer in range(s.layers):
        state = cache.blocks[2 * layer]
        assert (state.ssm.ssm[0] - expected.states[layer]).abs().max() < TOLERANCE
        assert (state.attention is None) == (layer in consumers)
        if state.attention is None:
            continue
        for position in range(s.meta + 20):
            slot = position
            if layer not in s.whole and position >= s.meta:
                if position < s.meta + 20 - (s.window + 1):
                    continue  # no longer held
                slot = s.meta + (position - s.meta) % (s.window + 1)
            held = state.attention.keys[0, :, slot]
            assert (held - expected.keys[layer][position]).abs().max() < TOLERANCE


@torch.no_grad()
def test_packed_and_padded_rows(pair):
    """Documents of a row each have their own meta tokens; padding left, right and between has none."""
    s, model, weights, _, _ = pair
    documents = [text(n, seed=n) for n in (9, 1, 6)]
    expected = [transcription(weights, s, d).logits for d in documents]
    rows = [
        [(0, 3), (1, 0), (2, 1), (0, 2)],  # segment, document or length of padding
        [(1, 2), (0, 1), (5, 0), (0, 5)],
    ]
    tokens, segments, where = [], [], []
    for parts in rows:
        row: list[int] = []
        numbers: list[int] = []
        for number, which in parts:
            if number:
                where.append((len(tokens), len(row), which))
            row += documents[which] if number else [3] * which
            numbers += [number] * (len(row) - len(numbers))
        tokens.append(row)
        segments.append(numbers)
    width = max(map(len, tokens))
    tokens = [row + [0] * (width - len(row)) for row in tokens]
    segments = [row + [0] * (width - len(row)) for row in segments]
    found = model(torch.tensor(tokens), segments=torch.tensor(segments))
    for row, start, which in where:
        part = found[row, start : start + len(documents[which])]
        assert (part - expected[which]).abs().max() < TOLERANCE


@torch.no_grad()
def test_the_released_decoders_window_of_one_token_fewer():
    s = Sizes()
    model, weights = random_model(s)
    tokens = text(24)
    expected = transcription(weights, s, tokens, decoded_from=9).logits
    cache = Cache.create(model.config, 1, 24, torch.float64, decode_window_compat=True)
    parts = [model(torch.tensor([tokens[:9]]), cache=cache)[0]]
    parts += [model(torch.tensor([[token]]), cache=cache)[0] for token in tokens[9:]]
    assert (torch.cat(parts) - expected).abs().max() < TOLERANCE
    assert (expected - transcription(weights, s, tokens).logits).abs().max() > 1e-3


@pytest.fixture(scope="module")
def long() -> tuple[HybridModel, list[int], Tensor]:
    model, weights = random_model(Sizes())
    return model, text(30), transcription(weights, Sizes(), text(30)).logits


@torch.no_grad()
@pytest.mark.parametrize("kernels", ["plain", "auto"])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 0.1)])
def test_in_narrower_types_and_with_kernels(long, kernels, dtype, tolerance):
    """Largest error in float32; of bfloat16, whose steps are 0.4 %, the error's root mean square."""
    model, tokens, expected = long
    narrow = HybridModel(model.config).eval()
    narrow.load_state_dict(model.state_dict())
    narrow = narrow.to(dtype)
    with select.using(kernels):
        whole = narrow(torch.tensor([tokens]))[0]
        cache = Cache.create(model.config, 1, 30, dtype)
        parts = [narrow(torch.tensor([tokens[:22]]), cache=cache)[0]]
        parts += [narrow(torch.tensor([[token]]), cache=cache)[0] for token in tokens[22:]]
    for found in (whole, torch.cat(parts)):
        error = found - expected
        size = error.abs().max() if dtype == torch.float32 else error.square().mean().sqrt() / expected.std()
        assert size < tolerance
