"""Greedy text of both families equals transformers' `generate`, alone and in a batch; so do losses and scores."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")

from halflap.checkpoints.checkpoint import load_model  # noqa: E402
from halflap.data.tokenizer import Tokenizer, train_tokenizer  # noqa: E402
from halflap.evaluate.documents import tokenise  # noqa: E402
from halflap.evaluate.held_out import evaluate_text  # noqa: E402
from halflap.inference.generate import generate  # noqa: E402
from halflap.inference.log_probs import sequence_log_probs  # noqa: E402
from halflap.inference.requests import SamplingParams  # noqa: E402
from halflap.inference.sampling import filtered, penalise  # noqa: E402

VOCABULARY = 320
NEMOTRON_H = {
    "hidden_size": 48,
    "layers_block_type": ["mamba", "mlp", "mamba", "attention", "mlp", "mamba", "mlp"],
    "mamba_num_heads": 16,
    "mamba_head_dim": 6,
    "ssm_state_size": 8,
    "n_groups": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "intermediate_size": 40,
    "chunk_size": 16,
}
LLAMA = {
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
IDS = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
TEXT = "The house stands on a hill above the sea, and the sea is grey.\nNobody lives in the house. " * 4


def reference(family: str) -> Any:
    """transformers' model with random weights of a size that makes every part matter."""
    torch.manual_seed(0)
    if family == "nemotron_h":
        model = transformers.NemotronHForCausalLM(transformers.NemotronHConfig(**NEMOTRON_H, **IDS))
    else:
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA, **IDS))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("dt_bias"):
                parameter.uniform_(-3.5, -1.0)  # time steps above the clamp that its prefill and decode treat unlike
            elif name.endswith("A_log"):
                parameter.uniform_(0.0, 2.0)
            elif name.endswith((".D", "norm.weight", "norm_f.weight")):
                parameter.normal_(1.0, 0.2)
            else:
                parameter.normal_(0.0, 0.15)
    return model.eval()


@pytest.fixture(scope="module", params=["nemotron_h", "llama"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Path]:
    """(transformers' model, ours of the same files, their directory with a tokenizer)."""
    theirs = reference(request.param)
    directory = tmp_path_factory.mktemp(request.param)
    theirs.save_pretrained(directory)
    train_tokenizer([TEXT], VOCABULARY, progress=False).save(directory)
    return theirs, load_model(directory), directory


def their_continuation(model: Any, prompt: list[int], count: int) -> list[int]:
    out = model.generate(torch.tensor([prompt]), max_new_tokens=count, do_sample=False)
    return out[0, len(prompt) :].tolist()


def prompts(count: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    lengths = torch.randint(1, 40, (count,), generator=generator).tolist()
    return [torch.randint(3, VOCABULARY, (length,), generator=generator).tolist() for length in lengths]


def test_greedy_equals_generate(pair: tuple[Any, Any, Path]) -> None:
    theirs, ours, _ = pair
    asked = prompts(6)
    expected = [their_continuation(theirs, prompt, 20) for prompt in asked]
    assert len({tuple(tokens) for tokens in expected}) == 6
    assert [completion.tokens for completion in generate(ours, asked, 20)] == expected


def test_end_token_ends_both(pair: tuple[Any, Any, Path]) -> None:
    theirs, ours, directory = pair
    asked = prompts(4)
    end = their_continuation(theirs, asked[1], 8)[4]
    theirs.generation_config.eos_token_id = end
    expected = [their_continuation(theirs, prompt, 12) for prompt in asked]
    theirs.generation_config.eos_token_id = 2
    ended = load_model(directory)
    ended.config = dataclasses.replace(ours.config, eos_token_id=end)
    assert [completion.tokens for completion in generate(ended, asked, 12)] == expected


def test_a_batch_equals_their_batch(pair: tuple[Any, Any, Path]) -> None:
    """Equal lengths, because their Mamba layers let left padding into the state."""
    theirs, ours, _ = pair
    asked = [prompt[:9] for prompt in prompts(12) if len(prompt) >= 9][:4]
    out = theirs.generate(torch.tensor(asked), max_new_tokens=15, do_sample=False)
    for completion, row in zip(generate(ours, asked, 15), out[:, 9:].tolist(), strict=True):
        assert completion.tokens == row[: len(completion.tokens)]


def test_filters_equal_theirs() -> None:
    from transformers.generation import logits_process as process

    logits = torch.randn(4, 60, generator=torch.Generator().manual_seed(0)) * 3
    ids = torch.randint(0, 60, (4, 9), generator=torch.Generator().manual_seed(1))
    seen = torch.zeros(4, 60, dtype=torch.bool).scatter(1, ids, True)
    expected = process.RepetitionPenaltyLogitsProcessor(1.3)(ids, logits.clone())
    torch.testing.assert_close(penalise(logits, seen, 1.3), expected)
    warpers = [
        process.TemperatureLogitsWarper(0.7),
        process.TopKLogitsWarper(20),
        process.TopPLogitsWarper(0.8),
        process.MinPLogitsWarper(0.05),
    ]
    expected = logits.clone()
    for warper in warpers:
        expected = warper(ids, expected)
    torch.testing.assert_close(filtered(logits / 0.7, SamplingParams(0.7, 20, 0.8, 0.05)), expected)


@torch.no_grad()
def test_sequence_log_probs_equal_theirs(pair: tuple[Any, Any, Path]) -> None:
    theirs, ours, _ = pair
    asked = prompts(7)
    for ids, got in zip(asked, sequence_log_probs(ours, asked, batch_tokens=50), strict=True):
        log_probs = theirs(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
        expected = log_probs.gather(1, torch.tensor(ids)[1:, None])[:, 0]
        torch.testing.assert_close(got, expected, atol=2e-5, rtol=0)


@torch.no_grad()
def test_perplexity_of_a_stream_equals_theirs(pair: tuple[Any, Any, Path]) -> None:
    """The usual way: one stream in windows, each scored from its second token on; ours scores the first one too."""
    theirs, ours, directory = pair
    tokenizer = Tokenizer.load(directory)
    ids = torch.tensor(tokenizer.encode(TEXT))
    context = 32
    total, count = 0.0, 0
    for start in range(0, len(ids) - 1, context):
        window = ids[start : start + context + 1]
        logits = theirs(window[None, :-1]).logits[0]
        total += torch.nn.functional.cross_entropy(logits, window[1:], reduction="sum").item()
        count += len(window) - 1
    result = evaluate_text(ours, tokenise([TEXT], tokenizer), context=context)
    assert result.tokens == count == len(ids) - 1
    assert result.perplexity == pytest.approx(math.exp(total / count), rel=1e-5)


@pytest.mark.slow
def test_tasks_score_as_in_the_harness_own_model(
    pair: tuple[Any, Any, Path], shared_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lm_eval")
    from lm_eval.evaluator import evaluate as harness_evaluate
    from lm_eval.models.huggingface import HFLM

    from halflap.evaluate.lm_eval import _indices, load_tasks, run_tasks

    theirs, ours, directory = pair
    monkeypatch.setenv("HALFLAP_DATA", str(shared_data))
    names, limit = ["hellaswag_local", "lambada_local", "copa_local", "blimp_local", "winogrande_local"], 6
    tasks = load_tasks(names)
    got = run_tasks(ours, Tokenizer.load(directory), tasks, limit=limit, context=256)
    fast = transformers.AutoTokenizer.from_pretrained(directory)
    hf_model: Any = HFLM
    harness = hf_model(pretrained=theirs, tokenizer=fast, batch_size=1, max_length=256, device="cpu", dtype="float32")
    samples = {name: _indices(task, limit) for name, task in tasks.tasks.items()}
    task_dict: Any = {"tasks": tasks.tasks, "groups": {}, "group_map": {}}
    for task in tasks.tasks.values():
        task._instances = None
    results: Any = harness_evaluate(harness, task_dict, samples=samples, bootstrap_iters=10, log_samples=False)
    assert set(got["tasks"]) == set(names)
    for name in names:
        expected = results["results"][name]
        for metric in ("acc", "acc_norm", "perplexity"):
            if f"{metric},none" in expected:
                assert got["tasks"][name][metric] == pytest.approx(expected[f"{metric},none"], rel=1e-3), (name, metric)
