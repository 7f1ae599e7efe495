"""Tokens decoded by one native program are what the blocks in float64 say, for every mixer and form of weights.

Passes of a few tokens a row are what tokens one by one come to, bit for bit, and states can wait.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Sequence

import pytest
import torch
from torch import Tensor

from halflap.models import slots
from halflap.models.cache import Cache, fields, parts
from halflap.models.config import (
    AttentionConfig,
    HybridConfig,
    LinearConfig,
    Mamba1Config,
    Mamba2Config,
    MLPConfig,
    ModelConfig,
    RopeConfig,
)
from halflap.models.decoder import Decoder
from halflap.models.model import HybridModel, initialize
from halflap.models.presets import preset
from halflap.models.quantization import Quantization
from halflap.models.quantized import pack_tensors, prepare
from halflap.ops import select
from halflap.ops.native import build

pytestmark = pytest.mark.skipif(build.load().library is None, reason="the kernels need a C++ compiler")

ROPE = RopeConfig(fraction=2 / 3)
MAMBA = Mamba2Config(num_heads=6, head_dim=5, num_groups=2, state_size=11, chunk_size=8)
SCAN = Mamba1Config(inner_size=40, state_size=5, dt_rank=3)
WIDE = AttentionConfig(4, 2, 6, ROPE, value_head_dim=10)
WINDOWED = dataclasses.replace(WIDE, window=4)
READER = dataclasses.replace(WINDOWED, key_value_source=2)
GROUPED = Mamba2Config(num_heads=4, head_dim=10, num_groups=2, state_size=6, chunk_size=8)
CONFIGS: dict[str, ModelConfig] = {
    "nemotron_h": preset("nemotron-h-tiny"),
    "llama": preset("llama-tiny"),
    "nemotron": preset("nemotron-4-tiny"),
    "hymba": preset("hymba-tiny"),
    "odd sizes": ModelConfig(
        "nemotron_h", 37, 23, (MAMBA, MLPConfig(29), AttentionConfig(3, 1, 7, None, bias=True), LinearConfig())
    ),
    "windows": ModelConfig(
        "hymba",
        50,
        24,
        (
            *(HybridConfig(WIDE, SCAN), MLPConfig(31, "silu", gated=True), HybridConfig(WINDOWED, SCAN)),
            *(HybridConfig(READER, SCAN), Mamba1Config(24, 3, 4, inner_norms=False), HybridConfig(WINDOWED, GROUPED)),
        ),
        num_meta_tokens=3,
    ),
}
STEPS = 9


def made(config: ModelConfig) -> HybridModel:
    """Random weights, large enough that every block matters."""
    model = HybridModel(dataclasses.replace(config, vocab_size=min(config.vocab_size, 64))).eval()
    initialize(model, 3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("proj.weight"):
                parameter.mul_(6)
            elif name.endswith("bias") or "norm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def packed(model: HybridModel, quantization: Quantization) -> HybridModel:
    parts = dict(pack_tensors(model.state_dict().items(), model.config, quantization))
    model = prepare(copy.deepcopy(model), quantization)
    model.load_state_dict(parts)
    return model


@pytest.fixture(params=[1, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(1)


@torch.no_grad()
def started(model: HybridModel, rows: int, generator: torch.Generator, states: torch.dtype | None = None) -> Cache:
    """A cache of rows of unequal lengths, its SSM states in the given dtype."""
    lengths = torch.randint(1, 8, (rows,), generator=generator)
    cache = Cache.create(model.config, rows, 4, model.dtype, ssm_dtype=states)
    tokens = torch.randint(0, model.config.vocab_size, (rows, 8), generator=generator)
    model(tokens, cache=cache, lengths=lengths)
    return cache


@torch.no_grad()
def continued(step: object, cache: Cache, tokens: Tensor) -> Tensor:
    """Logits (B, T, V) of tokens read one by one."""
    return torch.cat([step(token[:, None], cache=cache) for token in tokens.T], 1)  # type: ignore[operator]


@pytest.mark.parametrize("rows", [1, 2, 7])
@pytest.mark.parametrize("name", CONFIGS)
def test_float32_agrees_with_float64(name: str, rows: int, threads: int) -> None:
    model, generator = made(CONFIGS[name]), torch.Generator().manual_seed(rows)
    exact = copy.deepcopy(model).double()
    tokens = torch.randint(0, model.config.vocab_size, (rows, STEPS), generator=generator)
    state = generator.get_state()
    with select.using("plain"):
        expected_cache = started(exact, rows, generator)
        expected = continued(exact, expected_cache, tokens)
    generator.set_state(state)
    cache, decode = started(model, rows, generator), Decoder(model)
    assert decode._program is not None
    found = continued(decode, cache, tokens)
    assert found.dtype == torch.float32
    # sums of up to 256 float32 numbers in six blocks: a few times sqrt(256) roundings of 6e-8
    scale = float(expected.abs().max())
    assert float((found - expected).abs().max()) < 2e-5 * scale
    assert torch.equal(cache.lengths, expected_cache.lengths) and cache.used == expected_cache.used
    # what is left in the cache serves a pass over several tokens
    with torch.no_grad():
        more = model(tokens, cache=cache)
        with select.using("plain"):
            wanted = exact(tokens, cache=expected_cache)
    assert float((more - wanted).abs().max()) < 2e-5 * scale


@pytest.mark.parametrize("length", [1, 15, 16, 63, 64, 65, 190])
def test_attention_over_more_positions_than_it_holds_scores_of(length: int, threads: int) -> None:
    attention = (AttentionConfig(7, 1, 12, ROPE), AttentionConfig(12, 2, 18, ROPE, value_head_dim=40, window=70))
    model, generator = made(ModelConfig("hymba", 37, 24, attention)), torch.Generator().manual_seed(length)
    exact, tokens = copy.deepcopy(model).double(), torch.randint(0, 37, (2, length + 3), generator=generator)

    def decoded(one: HybridModel, step: object) -> Tensor:
        cache = Cache.create(model.config, 2, length + 3, one.dtype)
        with torch.no_grad():
            one(tokens[:, :length], cache=cache)
        return continued(step, cache, tokens[:, length:])

    decode = Decoder(model)
    assert decode._program is not None
    with select.using("plain"):
        expected = decoded(exact, exact)
    assert float((decoded(model, decode) - expected).abs().max()) < 2e-5 * float(expected.abs().max())


@pytest.mark.parametrize("threads", [3, 16], indirect=True)
@pytest.mark.parametrize("lengths", [(2100,), (1300, 5, 640)], ids=str)
def test_positions_are_divided_among_threads_that_outnumber_the_heads(lengths: tuple[int, ...], threads: int) -> None:
    windowed = AttentionConfig(12, 2, 18, ROPE, value_head_dim=40, window=600)
    blocks = (AttentionConfig(7, 1, 12, ROPE), windowed, dataclasses.replace(windowed, key_value_source=1))
    model = made(ModelConfig("hymba", 37, 24, blocks, num_meta_tokens=5))
    exact, generator = copy.deepcopy(model).double(), torch.Generator().manual_seed(threads)
    tokens = torch.randint(0, 37, (len(lengths), max(lengths) + 4), generator=generator)

    def decoded(one: HybridModel, step: object) -> Tensor:
        cache = Cache.create(model.config, len(lengths), max(lengths) + 4, one.dtype)
        with torch.no_grad():
            one(tokens[:, :-4], cache=cache, lengths=torch.tensor(lengths))
        return continued(step, cache, tokens[:, -4:])

    decode = Decoder(model)
    assert decode._program is not None
    with select.using("plain"):
        expected = decoded(exact, exact)
    found = decoded(model, decode)
    # sums of some 2,000 weights that are at most 1 together, in blocks of 64: no worse than over one block
    assert float((found - expected).abs().max()) < 2e-5 * float(expected.abs().max())
    assert found.equal(decoded(model, decode)), "whoever comes last adds the parts in their order"


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("name", CONFIGS)
def test_bfloat16_is_no_further_from_float64_than_the_model(name: str, rows: int) -> None:
    model, generator = made(CONFIGS[name]).bfloat16(), torch.Generator().manual_seed(rows)
    exact = copy.deepcopy(model).double()
    tokens = torch.randint(0, model.config.vocab_size, (rows, STEPS), generator=generator)
    state, errors = generator.get_state(), []
    with select.using("plain"):
        expected = continued(exact, started(exact, rows, generator), tokens)
        for step in (model, Decoder(model)):
            generator.set_state(state)
            errors.append(continued(step, started(model, rows, generator), tokens) - expected)
    generator.set_state(state)
    decode = Decoder(model)
    assert decode._program is not None
    error = continued(decode, started(model, rows, generator), tokens) - expected
    plain = float(errors[0].pow(2).mean().sqrt())
    assert float(error.pow(2).mean().sqrt()) < 1.2 * plain  # it rounds less often; both are random


@pytest.mark.parametrize("quantization", [Quantization(8), Quantization(8, 64), Quantization(4, 32)], ids=str)
@pytest.mark.parametrize("name", ["nemotron_h", "hymba", "odd sizes", "windows"])
def test_packed_weights(name: str, quantization: Quantization) -> None:
    model, generator = packed(made(CONFIGS[name]), quantization), torch.Generator().manual_seed(0)
    tokens = torch.randint(0, model.config.vocab_size, (5, STEPS), generator=generator)
    state = generator.get_state()
    with select.using("plain"):
        expected = continued(model, started(model, 5, generator), tokens)
    generator.set_state(state)
    decode = Decoder(model)
    assert decode._program is not None
    found = continued(decode, started(model, 5, generator), tokens)
    # activations are rounded to 16 bits of the largest of some, which adds up over blocks and through states
    assert float((found - expected).abs().max()) < 5e-4 * float(expected.abs().max())


@pytest.mark.parametrize("sizes", [(2, 1, 3), (40, 1, 30)], ids=["few", "more than the program takes at once"])
def test_rows_of_several_caches_in_one_step(sizes: tuple[int, ...]) -> None:
    model, generator = made(CONFIGS["windows"]), torch.Generator().manual_seed(0)
    decode = Decoder(model)
    caches = [started(model, rows, generator) for rows in sizes]
    copies = [cache.clone() for cache in caches]
    tokens = torch.randint(0, model.config.vocab_size, (sum(sizes), 1), generator=generator)
    with torch.no_grad():
        together = decode(tokens, cache=caches)
        apart = [model(part, cache=cache) for part, cache in zip(tokens.split(sizes), copies, strict=True)]
    torch.testing.assert_close(together, torch.cat(apart), rtol=0, atol=1e-4)
    assert [cache.lengths.tolist() for cache in caches] == [cache.lengths.tolist() for cache in copies]


def test_a_view_of_slots_is_advanced_in_place() -> None:
    model, generator = made(CONFIGS["windows"]), torch.Generator().manual_seed(0)
    cache, decode = started(model, 4, generator), Decoder(model)
    expected = cache.select([0, 1])
    slots.resize(cache, 4, 32)
    view = slots.view(cache, 2)
    tokens = torch.randint(0, model.config.vocab_size, (2, 1), generator=generator)
    with torch.no_grad():
        torch.testing.assert_close(decode(tokens, cache=view), model(tokens, cache=expected), rtol=0, atol=1e-4)
        slots.absorb(cache, view)
        taken = slots.take(cache, 1)
        torch.testing.assert_close(
            decode(tokens[1:], cache=taken), model(tokens, cache=expected)[1:], rtol=0, atol=1e-4
        )


def test_what_the_program_cannot_run_the_model_runs() -> None:
    model, generator = made(CONFIGS["nemotron_h"]), torch.Generator().manual_seed(0)
    decode = Decoder(model)
    tokens = torch.randint(0, model.config.vocab_size, (2, 3), generator=generator)
    with torch.no_grad():
        fresh, several = Cache.create(model.config, 2), Cache.create(model.config, 2)
        expected = model(tokens, cache=several)
        found = torch.cat([decode(tokens[:, :1], cache=fresh), decode(tokens[:, 1:], cache=fresh)], 1)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    cache = started(model, 2, generator)
    assert decode(tokens[:, :1], cache=cache).requires_grad  # gradients are the model's
    assert Decoder(made(CONFIGS["nemotron_h"]).double())._program is None
    hooked = made(CONFIGS["nemotron_h"])
    hooked.get_submodule("blocks.0.mixer").register_forward_hook(lambda *_: None)
    assert Decoder(hooked)._program is None
    with select.using("plain"):
        assert Decoder(model)._program is None


# --- several tokens a row

STATES = {"float32, narrow states": torch.bfloat16, "bfloat16, narrow states": torch.bfloat16}  # rounded every token
FORMS = ["float32", "bfloat16", "int8", "int8 in bfloat16", "int4", *STATES]


def formed(name: str, form: str) -> HybridModel:
    model = made(CONFIGS[name])
    if "int" in form:
        model = packed(model, Quantization(8 if "int8" in form else 4, 32))
    return model.bfloat16() if "bfloat16" in form else model


def read(decode: Decoder, cache: Cache, tokens: Sequence[Tensor], held: bool = False) -> list[Tensor]:
    """Logits (T, V) of some tokens of each row in one pass."""
    lengths = torch.tensor([len(row) for row in tokens])
    wide = torch.nn.utils.rnn.pad_sequence(list(tokens), batch_first=True)
    if held:
        cache.hold()
    with torch.inference_mode():
        assert decode.is_native(wide, [cache])
        logits = decode(wide, cache, lengths)
    return [row[:count] for row, count in zip(logits, lengths.tolist(), strict=True)]


def one_by_one(decode: Decoder, cache: Cache, row: int, tokens: Tensor) -> tuple[Tensor, Cache]:
    """Logits (T, V) of one row's tokens, alone; and its cache after them."""
    own = cache.select([row])
    with torch.inference_mode():
        logits = [decode(token[None, None], own)[0] for token in tokens]
    return torch.cat(logits) if logits else torch.empty(0), own


def same_state(one: Cache, other: Cache) -> bool:
    """Of one row: every number that later passes may read."""
    length = one.meta + int(one.lengths[0])
    assert one.lengths.tolist() == other.lengths.tolist()
    for mine, theirs in zip(parts(one), parts(other), strict=True):
        for name, tensor in fields(mine).items():
            slots = min(length, tensor.shape[2]) if name in ("keys", "values") else None
            a, b = (t[:, :, :slots] if slots is not None else t for t in (tensor, getattr(theirs, name)))
            if not a.equal(b):
                return False
    return True


@pytest.mark.parametrize("held", [False, True], ids=["advanced", "held"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", CONFIGS)
def test_several_tokens_are_single_ones_bit_for_bit(name: str, form: str, held: bool) -> None:
    """Rows of unequal lengths and numbers of tokens; a held pass goes on by any number of them."""
    model, generator = formed(name, form), torch.Generator().manual_seed(len(name) + held)
    cache, decode = started(model, 4, generator, STATES.get(form)), Decoder(model)
    for counts, taken in (((3, 1, 6, 2), (1, 1, 6, 2)), ((1, 8, 2, 5), (1, 3, 1, 4)), ((1, 1, 1, 1), (1, 1, 1, 1))):
        tokens = [torch.randint(0, model.config.vocab_size, (count,), generator=generator) for count in counts]
        before = cache.clone()
        found = read(decode, cache, tokens, held)
        if held:
            assert cache.lengths.equal(before.lengths)
            cache.commit(torch.tensor(taken))
        for row, (own, count) in enumerate(zip(tokens, taken if held else counts, strict=True)):
            assert found[row].equal(one_by_one(decode, before, row, own)[0])
            assert same_state(one_by_one(decode, before, row, own[:count])[1], cache.select([row]))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["nemotron_h", "hymba", "windows"])
def test_a_row_does_not_depend_on_those_beside_it(name: str, form: str) -> None:
    model, generator = formed(name, form), torch.Generator().manual_seed(1)
    cache, decode = started(model, 40, generator, STATES.get(form)), Decoder(model)
    tokens = torch.randint(0, model.config.vocab_size, (40, 1), generator=generator)
    alone = torch.cat([one_by_one(decode, cache, row, tokens[row])[0] for row in range(40)])
    for rows in (2, 3, 5, 8, 13, 31, 40):
        assert torch.stack(read(decode, cache.select(list(range(rows))), list(tokens[:rows])))[:, 0].equal(alone[:rows])


@pytest.mark.parametrize("name", CONFIGS)
def test_a_short_pass_is_what_float64_says(name: str, threads: int) -> None:
    model, generator = made(CONFIGS[name]), torch.Generator().manual_seed(2)
    exact = copy.deepcopy(model).double()
    tokens = torch.randint(0, model.config.vocab_size, (3, STEPS), generator=generator)
    state = generator.get_state()
    with select.using("plain"), torch.no_grad():
        expected = exact(tokens, cache=started(exact, 3, generator))
    generator.set_state(state)
    found = torch.stack(read(Decoder(model), started(model, 3, generator), list(tokens)))
    assert float((found - expected).abs().max()) < 2e-5 * float(expected.abs().max())  # as of single tokens


@pytest.mark.parametrize("threads", [1, 3, 16], indirect=True)
def test_long_texts_read_by_any_number_of_threads(threads: int) -> None:
    """Positions are divided by their number alone, so that neither threads nor tokens beside change a sum."""
    model, generator = made(CONFIGS["windows"]), torch.Generator().manual_seed(3)
    cache, decode = Cache.create(model.config, 2, 1400), Decoder(model)
    text = torch.randint(0, model.config.vocab_size, (2, 1300), generator=generator)
    with torch.inference_mode():
        torch.set_num_threads(1)
        model(text, cache=cache, lengths=torch.tensor([1300, 700]))
    tokens = torch.randint(0, model.config.vocab_size, (2, 5), generator=generator)
    alone = torch.stack([one_by_one(decode, cache, row, tokens[row])[0] for row in range(2)])
    torch.set_num_threads(threads)
    assert torch.stack(read(decode, cache, list(tokens), held=True)).equal(alone)


def test_rows_of_several_caches_that_hold() -> None:
    """More than one run takes: each cache goes on by itself."""
    model, generator = made(CONFIGS["windows"]), torch.Generator().manual_seed(4)
    decode, sizes = Decoder(model), (9, 1, 7)
    caches = [started(model, rows, generator) for rows in sizes]
    befores = [cache.clone() for cache in caches]
    tokens = torch.randint(0, model.config.vocab_size, (sum(sizes), 4), generator=generator)
    counts = torch.randint(1, 5, (sum(sizes),), generator=generator)
    for cache in caches:
        cache.hold()
    with torch.inference_mode():
        logits = decode(tokens, caches)
    place = 0
    for cache, before, taken in zip(caches, befores, counts.split(sizes), strict=True):
        cache.commit(taken)
        for row, count in enumerate(taken.tolist()):
            expected, after = one_by_one(decode, before, row, tokens[place][:count])
            assert logits[place, :count].equal(expected) and same_state(after, cache.select([row]))
            place += 1
