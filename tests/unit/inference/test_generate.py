"""One batch of unequal prompts gives what each prompt gives alone, and text streams whole."""

from __future__ import annotations

import pytest
import torch

from halflap.data.tokenizer import Tokenizer, train_tokenizer
from halflap.errors import HalflapError
from halflap.inference import generate as generate_module
from halflap.inference.generate import generate, prefill
from halflap.models.config import AttentionConfig, Mamba2Config, MLPConfig, ModelConfig, RopeConfig
from halflap.models.model import HybridModel, initialize

MAMBA = Mamba2Config(num_heads=4, head_dim=8, num_groups=2, state_size=8, chunk_size=8)
ATTENTION = AttentionConfig(num_attention_heads=4, num_key_value_heads=2, head_dim=8)
ROTARY = AttentionConfig(num_attention_heads=4, num_key_value_heads=2, head_dim=8, rope=RopeConfig())
FAMILIES = {
    "nemotron_h": (MAMBA, MLPConfig(48), ATTENTION, MLPConfig(48), MAMBA),
    "llama": (ROTARY, MLPConfig(48, "silu", gated=True), ROTARY, MLPConfig(48, "silu", gated=True)),
}
VOCABULARY = 300
PROMPTS = [[5], [7, 8, 9, 10, 11], [200, 3, 17, 250, 9, 1, 1, 42, 8, 77, 120, 31, 64], [299, 0]]


def tiny(family: str, **changes: object) -> HybridModel:
    config = ModelConfig(family, VOCABULARY, 32, FAMILIES[family], **changes)  # type: ignore[arg-type]
    model = HybridModel(config).eval()
    initialize(model, 1)
    with torch.no_grad():  # initial weights are small: every model would repeat its last token
        for name, parameter in model.named_parameters():
            if name.endswith("proj.weight"):
                parameter.mul_(12)
    return model


@pytest.fixture(params=FAMILIES)
def model(request: pytest.FixtureRequest) -> HybridModel:
    return tiny(request.param)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(["the cat sat on the mat, ünïcödé 日本語 🙂 " * 4], VOCABULARY, progress=False)


def step_by_step(model: HybridModel, prompt: list[int], count: int) -> list[int]:
    """The slowest right way: a full pass for each token."""
    ids = list(prompt)
    with torch.inference_mode():
        for _ in range(count):
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(prompt) :]


def test_batch_equals_full_passes(model: HybridModel) -> None:
    got = generate(model, PROMPTS, 12)
    assert [c.tokens for c in got] == [step_by_step(model, prompt, 12) for prompt in PROMPTS]
    assert {c.finish_reason for c in got} == {"length"} and {c.text for c in got} == {""}


def test_prefill_in_several_passes(model: HybridModel, monkeypatch: pytest.MonkeyPatch) -> None:
    whole_cache, whole = prefill(model, PROMPTS)
    monkeypatch.setattr(generate_module, "SMALLEST_CHUNK", 5)
    monkeypatch.setattr(generate_module, "PREFILL_TOKENS", 5)
    cache, logits = prefill(model, PROMPTS)
    torch.testing.assert_close(logits, whole, atol=1e-5, rtol=1e-5)
    assert cache.lengths.tolist() == whole_cache.lengths.tolist() == [len(prompt) for prompt in PROMPTS]
    alone = torch.cat([prefill(model, [prompt])[1] for prompt in PROMPTS])
    torch.testing.assert_close(logits, alone, atol=1e-5, rtol=1e-5)


def test_rows_end_at_any_end_token_and_leave_the_batch(model: HybridModel) -> None:
    free = [c.tokens for c in generate(model, PROMPTS, 12)]
    ends = (free[0][3], free[1][5])
    stopping = tiny(model.config.family, eos_token_id=ends)
    for prompts in (PROMPTS, PROMPTS[::-1]):
        for completion, prompt in zip(generate(stopping, prompts, 12), prompts):
            expected = free[PROMPTS.index(prompt)]
            cut = next((i + 1 for i, token in enumerate(expected) if token in ends), 12)
            assert completion.tokens == expected[:cut]
            assert completion.finish_reason == ("stop" if expected[cut - 1] in ends else "length")
    assert [c.tokens for c in generate(stopping, PROMPTS, 12, ignore_eos=True)] == free


def test_sampling_is_seeded_and_independent_of_the_batch(model: HybridModel) -> None:
    options = {"temperature": 0.9, "top_k": 50, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.2}
    batch = generate(model, PROMPTS, 10, seed=3, **options)
    assert batch == generate(model, PROMPTS, 10, seed=3, **options)
    assert batch != generate(model, PROMPTS, 10, seed=4, **options)
    alone = [generate(model, [prompt], 10, seed=3 + row, **options)[0] for row, prompt in enumerate(PROMPTS)]
    assert alone == batch


def test_text_streams_whole(model: HybridModel, tokenizer: Tokenizer) -> None:
    pieces: dict[int, str] = {}
    got = generate(
        model,
        ["the cat", [5, 6], "日本"],
        40,
        temperature=1.5,
        tokenizer=tokenizer,
        ignore_eos=True,
        stream=lambda row, piece: pieces.update({row: pieces.get(row, "") + piece}),
    )
    for row, completion in enumerate(got):
        assert pieces[row] == completion.text
        assert completion.text == tokenizer.decode(completion.tokens, skip_special_tokens=True)


def test_stop_string_is_cut_away(model: HybridModel, tokenizer: Tokenizer) -> None:
    whole = generate(model, ["the cat"], 30, tokenizer=tokenizer, ignore_eos=True)[0]
    stop = whole.text[8:11]
    pieces: list[str] = []
    got = generate(
        model, ["the cat"], 30, tokenizer=tokenizer, ignore_eos=True, stop=[stop], stream=lambda _, p: pieces.append(p)
    )[0]
    assert got.text == whole.text[: whole.text.index(stop)] == "".join(pieces)
    assert got.finish_reason == "stop" and got.tokens == whole.tokens[: len(got.tokens)]


def test_an_empty_prompt_starts_from_the_beginning_token(tokenizer: Tokenizer) -> None:
    model = tiny("nemotron_h")
    start = generate(model, [[tokenizer.bos_id or 0]], 5, tokenizer=tokenizer)[0]
    assert generate(model, [""], 5, tokenizer=tokenizer)[0] == start
    with pytest.raises(HalflapError, match="prompt 0 is empty"):
        generate(model, [[]], 5)


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ("one text", {}, "must be a list"),
        (["text"], {}, "no tokenizer"),
        ([[1], [3, 300]], {}, "prompt 1 has token id 300.*0 to 299"),
        ([1, 17, 4], {}, r"prompt 0 is 1 \(int\)"),
        ([[1.5]], {}, "prompt 0"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens is 0"),
        ([[1]], {"temperature": -1.0}, "temperature is -1"),
        ([[1]], {"top_p": -0.1}, "top_p is -0.1"),
        ([[1]], {"stop": ["x"]}, "stop strings need a tokenizer"),
        ([[1]], {"stop": [5]}, "a stop string is 5"),
        ([[1]], {"stop": 5}, "a stop string is 5"),
    ],
)
def test_wrong_requests_say_what_is_allowed(prompts: list, options: dict, message: str) -> None:
    with pytest.raises(HalflapError, match=message):
        generate(tiny("nemotron_h"), prompts, **options)


def test_half_a_surrogate_is_no_text_and_any_seed_is_one(tokenizer: Tokenizer) -> None:
    model = tiny("nemotron_h")
    with pytest.raises(HalflapError, match="prompt 1 is no text"):
        generate(model, ["the", "\ud800"], 1, tokenizer=tokenizer)
    for seed in (-1, (1 << 63) - 1, 1 << 80):
        one, same = (generate(model, [[1]], 3, temperature=1.0, seed=seed) for _ in range(2))
        assert one == same


def test_rotary_positions_end(tokenizer: Tokenizer) -> None:
    with pytest.raises(HalflapError, match=r"need 21 positions.* has 20"):
        generate(tiny("llama", max_position_embeddings=20), [[1, 2]], 19)
    assert len(generate(tiny("nemotron_h", max_position_embeddings=20), [[1, 2]], 19, ignore_eos=True)[0].tokens) == 19


def test_without_a_number_there_are_as_many_tokens_as_positions(tokenizer: Tokenizer) -> None:
    few = tiny("llama", max_position_embeddings=20)
    assert len(generate(few, [[1, 2], [1, 2, 3]], ignore_eos=True)[0].tokens) == 17
    assert len(generate(tiny("nemotron_h", max_position_embeddings=20), [[1, 2]], ignore_eos=True)[0].tokens) == 128
    with pytest.raises(HalflapError, match=r"need 21 positions.* has 20"):
        generate(few, [[1] * 20])


def test_a_larger_tokenizer_is_refused(tokenizer: Tokenizer) -> None:
    config = ModelConfig("llama", tokenizer.vocab_size - 1, 32, FAMILIES["llama"])
    with pytest.raises(HalflapError, match="tokenizer has"):
        generate(HybridModel(config), ["the"], 1, tokenizer=tokenizer)


def test_no_prompts_give_nothing() -> None:
    assert generate(tiny("llama"), [], 5) == []
