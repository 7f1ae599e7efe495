"""generate(): padding of either side, caches, beams, samples; what it writes is what halflap.generate writes."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

import halflap
from halflap.errors import HalflapError
from halflap.hf import HalflapCache, HalflapForCausalLM
from halflap.models.model import HybridModel
from halflap.ops import select

PROMPTS = ([5, 9, 31, 7, 120, 44, 3], [17, 4], [200, 201, 77, 8, 8, 8, 90, 150, 33, 260, 12, 6], [299])
NEW = 12


def padded(side: str = "left", prompts: Any = PROMPTS) -> dict[str, torch.Tensor]:
    width = max(map(len, prompts))
    rows = [[0] * (width - len(p)) + p if side == "left" else p + [0] * (width - len(p)) for p in map(list, prompts)]
    masks = [[0] * (width - len(p)) + [1] * len(p) for p in prompts]
    mask = torch.tensor(masks if side == "left" else [row[::-1] for row in masks])
    return {"input_ids": torch.tensor(rows), "attention_mask": mask}


def greedy(model: Any, inputs: dict[str, torch.Tensor], **fields: Any) -> list[list[int]]:
    model.generation_config.eos_token_id = None
    output = model.generate(**inputs, max_new_tokens=NEW, do_sample=False, **fields)
    return output[:, inputs["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize("side", ["left", "right"])
def test_greedy_text_is_ours_token_for_token(model: Any, model_dir: Path, side: str) -> None:
    ours = halflap.generate(model_dir, list(PROMPTS), max_new_tokens=NEW, ignore_eos=True)
    assert greedy(model, padded(side)) == [row.tokens for row in ours]


def test_a_padded_row_gets_what_it_gets_alone(model: Any) -> None:
    alone = [greedy(model, {"input_ids": torch.tensor([prompt])})[0] for prompt in PROMPTS]
    assert greedy(model, padded()) == alone
    assert greedy(model, padded(), use_cache=False) == alone
    assert greedy(model, padded(), prefill_chunk_size=5) == alone


def test_stops_at_the_end_token_and_pads(model: Any) -> None:
    text = greedy(model, padded())
    model.generation_config.pad_token_id = 0
    end = text[0][4]
    output = model.generate(**padded(), max_new_tokens=NEW, do_sample=False, eos_token_id=end)
    for row, free in zip(output[:, padded()["input_ids"].shape[1] :].tolist(), text):
        stop = free.index(end) + 1 if end in free else NEW
        assert row[:stop] == free[:stop] and set(row[stop:]) <= {0}


def test_beams_are_those_without_a_cache(model: Any) -> None:
    fields = {"num_beams": 3, "num_return_sequences": 3, "length_penalty": 0.8}
    cached, plain = greedy(model, padded(), **fields), greedy(model, padded(), **fields, use_cache=False)
    assert cached == plain and len(cached) == 3 * len(PROMPTS)


def test_beams_are_those_of_the_stock_class(stock_dir: Path) -> None:
    stock = AutoModelForCausalLM.from_pretrained(stock_dir)
    if not isinstance(stock, LlamaForCausalLM):
        pytest.skip("one stock class with a cache that can be reordered is enough")
    ours = HalflapForCausalLM.from_pretrained(stock_dir)
    assert greedy(ours, padded(), num_beams=4) == greedy(stock, padded(), num_beams=4)


def test_samples_need_only_the_seed(model: Any) -> None:
    def draw(seed: int, **fields: Any) -> list[list[int]]:
        torch.manual_seed(seed)
        options = {"do_sample": True, "temperature": 0.9, "top_p": 0.9, "num_return_sequences": 2}
        return model.generate(**padded(), max_new_tokens=NEW, **options, **fields).tolist()

    assert len(draw(0)) == 2 * len(PROMPTS)
    assert draw(0) == draw(0) == draw(0, use_cache=False)
    assert draw(0) != draw(1)


def test_a_conversation_goes_on_from_its_cache(model: Any) -> None:
    prompt = torch.tensor([[5, 9, 31, 7]])
    model.generation_config.eos_token_id = None
    first = model.generate(prompt, max_new_tokens=5, do_sample=False, return_dict_in_generate=True)
    assert isinstance(first.past_key_values, HalflapCache)
    longer = torch.cat([first.sequences, torch.tensor([[44, 6, 71]])], 1)
    kept = copy.deepcopy(first.past_key_values)
    for cache in (first.past_key_values, kept):  # the copy is independent of the original
        goes_on = model.generate(longer, past_key_values=cache, max_new_tokens=5, do_sample=False)
        assert goes_on.equal(model.generate(longer, max_new_tokens=5, do_sample=False))


def test_tokens_after_the_prompt_run_in_native_code(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    if not select.native_is_on():
        pytest.skip("no native code was built here")
    passes, whole = [], HybridModel.hidden_states

    def counted(network: Any, tokens: torch.Tensor, **how: Any) -> torch.Tensor:
        passes.append(tokens.shape[1])
        return whole(network, tokens, **how)

    monkeypatch.setattr(HybridModel, "hidden_states", counted)
    quick = greedy(model, padded())
    assert len(passes) == 1, "the prompts' alone"
    for fields in ({"output_hidden_states": True, "return_dict_in_generate": False}, {"use_cache": False}):
        passes.clear()
        assert greedy(model, padded(), **fields) == quick and len(passes) == NEW
    with ThreadPoolExecutor(3) as threads:  # each has its own buffers
        prompts = [torch.tensor([prompt]) for prompt in PROMPTS] * 3
        assert [row for (row,) in threads.map(lambda p: greedy(model, {"input_ids": p}), prompts)] == quick * 3
    hook = model.model.network.blocks[1].register_forward_hook(lambda *_: None)
    passes.clear()
    assert greedy(model, padded()) == quick and len(passes) == NEW, "a hook wants to see every pass"
    hook.remove()


def test_weights_may_change_from_one_text_to_the_next(model: Any) -> None:
    before = greedy(model, padded())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.mul_(1 + 0.5 * torch.rand(parameter.shape) if "norm" in name or "A_log" in name else 1.1)
    after = greedy(model, padded())
    assert after == greedy(model, padded(), use_cache=False) and after != before


def test_prefill_in_pieces_then_steps_equals_the_full_pass(model: Any) -> None:
    tokens = torch.randint(3, 300, (3, 23), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        full = model(tokens, use_cache=False).logits
        cache, parts, start = HalflapCache(), [], 0
        for size in (9, 1, 5, 1, 1, 6):
            parts.append(model(tokens[:, start : start + size], past_key_values=cache).logits)
            start += size
            assert cache.get_seq_length() == start
    torch.testing.assert_close(torch.cat(parts, 1), full, rtol=1e-4, atol=1e-4)


def test_a_pipeline_and_chat_templates(model_dir: Path) -> None:
    from transformers import pipeline

    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    tokenizer.padding_side = "left"
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    write = pipeline("text-generation", model=model, tokenizer=tokenizer, batch_size=2)
    outputs = write(["A half-lap joint", "The"], max_new_tokens=6, do_sample=False, return_full_text=False)
    ours = halflap.generate(model_dir, ["A half-lap joint", "The"], max_new_tokens=6)
    assert [row[0]["generated_text"] for row in outputs] == [row.text for row in ours]
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "Cut it."}], tokenize=False)
    assert chat == "user: Cut it.<eos>"


def test_logits_to_keep_and_hidden_states(model: Any) -> None:
    inputs = padded()
    with torch.no_grad():
        whole = model(**inputs, output_hidden_states=True)
        last = model(**inputs, logits_to_keep=2)
    torch.testing.assert_close(last.logits, whole.logits[:, -2:])
    assert len(whole.hidden_states) == len(model.model.network.blocks) + 1
    assert {tuple(h.shape) for h in whole.hidden_states} == {(*inputs["input_ids"].shape, model.config.hidden_size)}
    torch.testing.assert_close(model.lm_head(whole.hidden_states[-1]), whole.logits)


def test_tuples_and_what_the_config_asks_for(model: Any) -> None:
    inputs, config = padded(), model.config
    with torch.no_grad():
        whole = model(**inputs, labels=inputs["input_ids"])
        loss, logits, *_ = model(**inputs, labels=inputs["input_ids"], return_dict=False)
        assert torch.equal(loss, whole.loss) and torch.equal(logits, whole.logits)
        config.output_hidden_states = True
        try:
            assert len(model(**inputs).hidden_states) == len(model.model.network.blocks) + 1
            assert model(**inputs, output_hidden_states=False).hidden_states is None
        finally:
            config.output_hidden_states = False


@pytest.mark.parametrize("size", [1, 2, 5])
def test_prompts_read_in_pieces_give_the_same_text(model: Any, size: int) -> None:
    """Pieces of one column, of which a padded row has nothing, among them."""
    assert greedy(model, padded(), prefill_chunk_size=size) == greedy(model, padded())


def test_a_pass_that_fails_is_not_counted(model: Any) -> None:
    cache = HalflapCache()
    with torch.no_grad():
        model(torch.tensor([[5, 9, 31]]), past_key_values=cache)
        with pytest.raises((IndexError, RuntimeError)):
            model(torch.tensor([[10**6]]), past_key_values=cache)
    assert cache.get_seq_length() == 3


def test_half_precision_under_autocast(model: Any) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert len(greedy(model, padded())) == len(PROMPTS)


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"cache_implementation": "static"}, "halflap has its own cache"),
        ({"inputs_embeds": torch.zeros(1, 3, 96)}, "no inputs_embeds"),
        ({"prompt_lookup_num_tokens": 2}, "stateful"),
    ],
)
def test_what_cannot_be_is_refused(model: Any, fields: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        model.generate(torch.tensor([[5, 9, 31]]), max_new_tokens=3, do_sample=False, **fields)


def test_foreign_caches_and_lost_rows_are_refused(model: Any) -> None:
    from transformers import DynamicCache

    tokens = torch.tensor([[5, 9, 31]])
    with pytest.raises(HalflapError, match="no place for recurrent states"):
        model(tokens, past_key_values=DynamicCache())
    with torch.no_grad(), pytest.raises(HalflapError, match="holds 1 rows and the tokens have 2"):
        model(tokens.repeat(2, 1), past_key_values=model(tokens).past_key_values)
    with pytest.raises(HalflapError, match="cannot go back"):
        model.generate(tokens, max_new_tokens=2, return_dict_in_generate=True).past_key_values.crop(-1)
