"""Properties of Hymba that need no second implementation: masks, windows, causality, states, memory."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from halflap.models import attention as attention_module
from halflap.models.cache import Cache
from halflap.models.config import HybridConfig, ModelConfig
from halflap.models.context import SequenceContext
from halflap.models.count import cache_bytes
from halflap.models.model import HybridModel, initialize
from halflap.models.presets import hymba, preset
from halflap.ops.attention import attention, within_window

META, WINDOW = 4, 6


def tiny(**changes) -> ModelConfig:
    sizes = {"hidden": 40, "mlp": 24, "heads": (5, 1), "state": 4, "window": WINDOW, "meta": META, "vocab": 64}
    return hymba(**({"layers": 8, "context": 256, "original_context": 64} | sizes | changes))


def random_model(config: ModelConfig, dtype: torch.dtype = torch.float64) -> HybridModel:
    """Weights large enough that every part matters."""
    model = HybridModel(config).to(dtype).eval()
    initialize(model, 0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("proj.weight"):
                p.mul_(1 / (0.02 * math.sqrt(p.shape[1])))
            elif name in ("embedding.weight", "meta_tokens"):
                p.mul_(30)
    return model


@pytest.fixture(scope="module")
def model() -> HybridModel:
    return random_model(tiny())


def text(batch: int, time: int, seed: int = 0) -> Tensor:
    return torch.randint(64, (batch, time), generator=torch.Generator().manual_seed(seed))


# ---- masks and windows


@settings(max_examples=40)
@given(st.integers(1, 12), st.integers(1, 9), st.integers(0, 5), st.integers(0, 8))
def test_the_mask_is_the_published_predicate(time: int, window: int, meta: int, past: int) -> None:
    """And no key is counted twice: a mask has one entry a key."""
    keys = torch.arange(past + time)
    mask = within_window(keys[past:], keys, window, meta)[0, 0]
    for i in range(time):
        q = past + i
        seen = [k for k in range(past + time) if k <= q and (q - k <= window or k < meta)]
        assert mask[i].nonzero().flatten().tolist() == seen
        assert set(range(min(meta, q + 1))) <= set(seen)  # meta tokens are never lost
    if past == 0:
        assert mask[0].sum() == 1


def test_the_mask_of_packed_documents_counts_from_their_starts() -> None:
    starts = torch.tensor([[0, 0, 0, 0, 4, 4, 4, 4, 4]])
    mask = within_window(torch.arange(9), torch.arange(9), 1, 2, starts)[0, 0]
    assert mask[8].nonzero().flatten().tolist() == [0, 1, 2, 3, 4, 5, 7, 8]  # other documents are masked elsewhere
    assert mask[3].nonzero().flatten().tolist() == [0, 1, 2, 3] and mask[7].tolist()[6:] == [True, True, False]


def unshared(config: ModelConfig, window: int | None) -> ModelConfig:
    blocks = tuple(
        dataclasses.replace(b, attention=dataclasses.replace(b.attention, window=window, key_value_source=None))
        if isinstance(b, HybridConfig)
        else b
        for b in config.blocks
    )
    return dataclasses.replace(config, blocks=blocks)


@torch.no_grad()
def test_a_window_as_long_as_the_text_is_none() -> None:
    whole = random_model(unshared(tiny(), None))
    windowed = HybridModel(unshared(tiny(), 20 + META)).double().eval()
    windowed.load_state_dict(whole.state_dict())
    tokens = text(2, 20)
    assert torch.equal(whole(tokens), windowed(tokens))
    for sizes in ([20], [1] * 20, [7, 1, 12]):  # with a cache there is another mask, and a ring of keys
        caches = [Cache.create(net.config, 2, 20, torch.float64) for net in (whole, windowed)]
        for part in tokens.split(sizes, 1):
            assert torch.equal(whole(part, cache=caches[0]), windowed(part, cache=caches[1]))


@torch.no_grad()
def test_what_lies_behind_the_window_has_no_effect_and_meta_tokens_have(model: HybridModel) -> None:
    """On the attention output of a windowed layer, given its input."""
    mixer = model.blocks[2].mixer
    taken: list[Tensor] = []
    handle = mixer.attention_norm.register_forward_pre_hook(lambda _, args: taken.append(args[0]))
    x = torch.randn(1, 30, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for place in (None, 10, 2):  # nothing, a real token, a meta token
        changed = x.clone()
        if place is not None:
            changed[0, place] += 1
        context = SequenceContext(torch.arange(30)[None], meta=META)
        mixer(changed, context)
    handle.remove()
    plain, real, meta = taken
    assert not torch.equal(plain[0, 10 + WINDOW], real[0, 10 + WINDOW])
    assert torch.equal(plain[0, 10 + WINDOW + 1 :], real[0, 10 + WINDOW + 1 :])
    assert (plain[0, 2:] != meta[0, 2:]).any(1).all()


# ---- causality


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_later_tokens_change_no_bit_of_earlier_logits(model: HybridModel, dtype: torch.dtype) -> None:
    net = model if dtype == torch.float64 else random_model(tiny(), dtype)
    tokens = text(1, 24)
    before = net(tokens)
    for place in (23, 12, 1):
        changed = tokens.clone()
        changed[0, place] = (changed[0, place] + 1) % 64
        after = net(changed)
        assert torch.equal(before[:, :place], after[:, :place]) and not torch.equal(before[:, place], after[:, place])


@torch.no_grad()
def test_meta_tokens_do_not_see_the_prompt(model: HybridModel) -> None:
    taken: list[Tensor] = []
    handles = [b.register_forward_hook(lambda _, args, out: taken.append(out[:, :META])) for b in model.blocks]
    model(text(1, 10, seed=1)), model(text(1, 10, seed=2)), model(text(1, 17, seed=3))
    for handle in handles:
        handle.remove()
    one, other, longer = (taken[i : i + len(model.blocks)] for i in range(0, len(taken), len(model.blocks)))
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert all((a - b).abs().max() < 1e-12 for a, b in zip(one, longer, strict=True))  # another shape may round anew


# ---- states


@torch.no_grad()
@pytest.mark.parametrize("length", [WINDOW - 1, WINDOW, WINDOW + 1, WINDOW + META + 2, 3 * WINDOW])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-9), (torch.float32, 1e-4)])
def test_steps_equal_one_pass(model: HybridModel, length: int, dtype: torch.dtype, tolerance: float) -> None:
    net = model if dtype == torch.float64 else random_model(tiny(), dtype)
    tokens = text(2, length)
    cache = Cache.create(net.config, 2, 1, dtype)
    steps = torch.cat([net(tokens[:, t : t + 1], cache=cache) for t in range(length)], 1)
    assert (steps - net(tokens)).abs().max() < tolerance


@torch.no_grad()
def test_the_meta_state_is_computed_once_and_shared_by_rows(model: HybridModel) -> None:
    state = model.meta_state(torch.float64, "cpu")
    assert model.meta_state(torch.float64, "cpu") is state
    cache = Cache.create(model.config, 3, 8, torch.float64)
    cache.start_from(state)
    for held, source in zip(cache.blocks[::2], state.blocks[::2], strict=True):
        assert all(torch.equal(row, source.ssm.ssm[0]) for row in held.ssm.ssm)
        if held.attention is not None:
            assert all(torch.equal(row[:, :META], source.attention.keys[0]) for row in held.attention.keys)
    cache.blocks[0].ssm.ssm.zero_()
    assert state.blocks[0].ssm.ssm.abs().max() > 0  # a copy
    other = random_model(tiny())
    first = other.meta_state(torch.float64, "cpu")
    other.meta_tokens.mul_(2)
    assert other.meta_state(torch.float64, "cpu") is not first


@torch.no_grad()
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-9), (torch.float32, 1e-4)])
def test_the_meta_state_serves_every_later_position_of_every_row(
    model: HybridModel, dtype: torch.dtype, tolerance: float
) -> None:
    """As if the meta tokens went before each row again, in one pass and in steps behind it; the rows all differ."""
    net = model if dtype == torch.float64 else random_model(tiny(), dtype)
    tokens = text(3, 3 * WINDOW + META)
    again = net(tokens)  # without a cache the meta tokens are computed with the row
    cache = Cache.create(net.config, 3, tokens.shape[1], dtype)
    cache.start_from(net.meta_state(dtype, "cpu"))
    parts = tokens.split([WINDOW + 2, *[1] * (tokens.shape[1] - WINDOW - 2)], 1)
    assert (torch.cat([net(part, cache=cache) for part in parts], 1) - again).abs().max() < tolerance
    alone = Cache.create(net.config, 1, tokens.shape[1], dtype)
    alone.start_from(net.meta_state(dtype, "cpu"))
    assert (net(tokens[1:2], cache=alone) - again[1:2]).abs().max() < tolerance


def states_of(cache: Cache) -> list[Tensor]:
    found = []
    for block in cache.blocks[::2]:
        found += [block.ssm.conv, block.ssm.ssm]
        if block.attention is not None:
            found += [block.attention.keys, block.attention.values]
    return found


@settings(max_examples=15)
@given(st.lists(st.sampled_from([1, 2, 3, WINDOW, WINDOW + 1]) | st.integers(1, 20), min_size=1, max_size=6))
@torch.no_grad()
def test_chunks_equal_one_prefill(model: HybridModel, sizes: list[int]) -> None:
    tokens = text(2, sum(sizes))
    caches = [Cache.create(model.config, 2, sum(sizes), torch.float64) for _ in range(2)]
    whole = model(tokens, cache=caches[0])
    parts = [model(part, cache=caches[1]) for part in tokens.split(sizes, 1)]
    assert (torch.cat(parts, 1) - whole).abs().max() < 1e-9
    for one, other in zip(*map(states_of, caches), strict=True):
        assert (one - other).abs().max() < 1e-9


def assert_keeps_the_same(row: Cache, alone: Cache, tokens: int) -> None:
    """What two rows keep of so many tokens; behind that, padding may have left anything."""
    for state, own in zip(row.blocks[::2], alone.blocks[::2], strict=True):
        assert (state.ssm.conv - own.ssm.conv).abs().max() < 1e-9
        assert (state.ssm.ssm - own.ssm.ssm).abs().max() < 1e-9
        if state.attention is None:
            continue
        held = META + (tokens if state.attention.window is None else min(tokens, WINDOW + 1))
        for name in ("keys", "values"):
            one, other = (getattr(x.attention, name)[:, :, :held] for x in (state, own))
            assert one.shape[2] == held and (one - other).abs().max() < 1e-9


@torch.no_grad()
def test_rows_of_unequal_length_in_several_passes(model: HybridModel) -> None:
    """Right-padded prompts, then more tokens of unequal number (some none), then steps: as each row alone."""
    counts = [[3, 15, 8], [10, 0, 1], [1, 1, 1], [0, 4, 9], [1, 1, 1]]
    rows = text(3, 40)
    cache = Cache.create(model.config, 3, 4, torch.float64)
    done = [0, 0, 0]
    for step in counts:
        longest = max(step)
        tokens = torch.zeros(3, longest, dtype=torch.int64)
        for b, n in enumerate(step):
            tokens[b, :n] = rows[b, done[b] : done[b] + n]
        full = step == [longest] * 3
        out = model(tokens, cache=cache, lengths=None if full else torch.tensor(step))
        for b, n in enumerate(step):
            alone = model(rows[b : b + 1, : done[b] + n])[0, done[b] :]
            assert n == 0 or (out[b, :n] - alone).abs().max() < 1e-9
            done[b] += n
    alone = Cache.create(model.config, 1, 40, torch.float64)
    for b in range(3):  # and what is kept
        single = alone.clone()
        model(rows[b : b + 1, : done[b]], cache=single)
        assert_keeps_the_same(cache.row(b), single, done[b])


@torch.no_grad()
def test_right_padded_rows_keep_what_each_keeps_alone(model: HybridModel) -> None:
    """Also rows that fill no ring of a windowed layer."""
    lengths = [2, 15, 5]
    tokens = text(3, max(lengths))
    cache = Cache.create(model.config, 3, max(lengths), torch.float64)
    logits = model(tokens, cache=cache, lengths=torch.tensor(lengths))
    assert cache.lengths.tolist() == lengths
    for b, n in enumerate(lengths):
        single = Cache.create(model.config, 1, max(lengths), torch.float64)
        assert (model(tokens[b : b + 1, :n], cache=single) - logits[b : b + 1, :n]).abs().max() < 1e-9
        assert_keeps_the_same(cache.row(b), single, n)


@torch.no_grad()
def test_permuted_rows_give_permuted_outputs(model: HybridModel) -> None:
    tokens, order = text(3, 12), [2, 0, 1]
    cache = Cache.create(model.config, 3, 12, torch.float64)
    first, then = model(tokens, cache=cache), text(3, 1, seed=5)
    permuted = cache.select(order)
    assert (model(tokens[order]) - first[order]).abs().max() < 1e-12
    assert (model(then[order], cache=permuted) - model(then, cache=cache)[order]).abs().max() < 1e-12


# ---- fusion and wide values


@settings(max_examples=20)
@given(st.floats(-2, 6), st.sampled_from([0, 2, 8]), st.sampled_from(["attention_norm", "ssm_norm"]))
@torch.no_grad()
def test_the_scale_of_a_branch_does_not_matter(model: HybridModel, power: float, block: int, name: str) -> None:
    """Of a global layer, a windowed one and one that reads another's keys."""
    mixer, scale = model.blocks[block].mixer, 10.0**power
    x = torch.randn(1, 12, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    norm, inputs = mixer.get_submodule(name), []
    outputs = []
    for factor in (1.0, scale):
        taken = norm.register_forward_pre_hook(lambda _, args, factor=factor: (args[0] * factor,))
        seen = norm.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
        outputs.append(mixer(x, SequenceContext(torch.arange(12)[None], meta=META)))
        taken.remove(), seen.remove()
    smallest = min(float(branch.square().mean(-1).min()) for branch in inputs)  # eps weighs in where a row is small
    assert (outputs[1] - outputs[0]).abs().max() <= (1e-12 + norm.eps / smallest) * outputs[0].abs().max()


@torch.no_grad()
def test_without_one_gain_half_of_the_other_branch_is_left() -> None:
    mixer = random_model(tiny()).blocks[0].mixer
    x = torch.randn(1, 12, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    taken: list[Tensor] = []
    for silent, kept in ((mixer.attention_norm, mixer.ssm_norm), (mixer.ssm_norm, mixer.attention_norm)):
        gain = silent.weight.clone()
        silent.weight.zero_()
        handle = kept.register_forward_hook(lambda _, args, out: taken.append(out))
        out = mixer(x, SequenceContext(torch.arange(12)[None], meta=META))
        handle.remove()
        silent.weight.copy_(gain)
        assert torch.allclose(out, mixer.out_proj(taken[-1] / 2), atol=1e-12)


@pytest.mark.parametrize("time, keys", [(1, 9), (7, 7), (40, 40), (3, 12)])
def test_wide_values_are_halves_side_by_side(time: int, keys: int) -> None:
    g = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 6, time, 8, generator=g).double(), torch.randn(2, 2, keys, 8, generator=g).double()
    v = torch.randn(2, 2, keys, 16, generator=g).double()
    mask = (lambda: torch.rand(2, 1, time, keys, generator=g) < 0.7) if time not in (1, keys) else (lambda: None)
    allowed = mask()
    halves = [attention(q, k, part, lambda: allowed) for part in v.split(8, 3)]
    assert (attention(q, k, v, lambda: allowed) - torch.cat(halves, 3)).abs().max() < 1e-12


# ---- memory


@torch.no_grad()
@pytest.mark.parametrize("length", [3, WINDOW, WINDOW + 1, 25])
def test_bytes_counted_are_bytes_held(model: HybridModel, length: int) -> None:
    cache = Cache.create(model.config, 2, length, torch.float64)
    model(text(2, length), cache=cache)
    assert cache.nbytes() == cache_bytes(model.config, length, 2, 64, 64, conv_bits=64)
    assert cache.nbytes(tokens_only=True) == cache.nbytes()


@torch.no_grad()
def test_bytes_counted_are_bytes_held_of_a_bfloat16_model() -> None:
    """Whose states stay float32, as the count has it by default."""
    net = random_model(tiny(), torch.bfloat16)
    cache = Cache.create(net.config, 2, 25, torch.bfloat16)
    net(text(2, 25), cache=cache)
    assert cache.nbytes() == cache_bytes(net.config, 25, 2)


@torch.no_grad()
def test_only_global_layers_grow_behind_the_window(model: HybridModel) -> None:
    cache = Cache.create(model.config, 1, 1, torch.float64)
    model(text(1, 30), cache=cache)
    sizes = {}
    for count in (30, 31, 45):
        model(text(1, count - int(cache.lengths[0])), cache=cache) if count > 30 else None
        written = [cache.nbytes(tokens_only=True)]
        for block in cache.blocks[::2]:
            if block.attention is not None and block.attention.window is not None:
                assert block.attention.keys.shape[2] == block.attention.values.shape[2] == META + WINDOW + 1
        sizes[count] = written[0]
    a_token = 3 * (8 + 16) * 8
    assert sizes[31] - sizes[30] == a_token and sizes[45] - sizes[31] == 14 * a_token


@torch.no_grad()
def test_members_of_a_group_read_the_same_keys(model: HybridModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers 4, 5 and 6 are a triple; nothing is evicted before the last of them has looked."""
    seen: list[Tensor] = []
    real = attention_module.select.attention

    def record(query, key, value, *args, **kwargs):
        seen.append(key.clone())
        return real(query, key, value, *args, **kwargs)

    cache = Cache.create(model.config, 1, 30, torch.float64)
    model(text(1, 20), cache=cache)
    monkeypatch.setattr(attention_module.select, "attention", record)
    for tokens in (text(1, 1), text(1, 5)):
        seen.clear()
        model(tokens, cache=cache)
        assert len(seen) == 8 and torch.equal(seen[4], seen[5]) and torch.equal(seen[5], seen[6])
        assert torch.equal(seen[1], seen[2]) and not torch.equal(seen[2], seen[4])


def test_consumers_hold_no_keys_or_values() -> None:
    config = preset("hymba-tiny")
    net = HybridModel(config)
    hidden, inner = config.hidden_size, 2 * config.hidden_size
    cache = Cache.create(config, 1)
    for layer in (2, 5, 6):
        mixer = net.blocks[2 * layer].mixer
        assert mixer.in_proj.weight.shape == (hidden + 2 * inner, hidden)
        assert not any(name in key for key in mixer.state_dict() for name in ("k_proj", "v_proj", "q_proj"))
        assert cache.blocks[2 * layer].attention is None
