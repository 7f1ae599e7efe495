"""The harness's answers from our model are what plain passes give, and the local tasks ask what the stock tasks ask."""

from __future__ import annotations

import gzip
import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

if importlib.util.find_spec("lm_eval") is None:
    pytest.skip("lm-evaluation-harness is not installed (halflap[eval])", allow_module_level=True)

import lm_eval

from halflap.data.tokenizer import Tokenizer, train_tokenizer
from halflap.errors import HalflapError
from halflap.evaluate.lm_eval import HalflapLM, load_tasks, run_tasks
from halflap.evaluate.local_tasks import local_tasks, resolve_task
from halflap.inference.generate import generate
from halflap.models.config import AttentionConfig, Mamba2Config, MLPConfig, ModelConfig
from halflap.models.model import HybridModel, initialize

TEXT = "the cat sat on the mat. a dog ran in the park and a bird sang. "


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer([TEXT * 3], 300, progress=False)


@pytest.fixture(scope="module")
def model() -> HybridModel:
    mamba = Mamba2Config(num_heads=4, head_dim=8, num_groups=2, state_size=8, chunk_size=8)
    config = ModelConfig("nemotron_h", 300, 32, (mamba, MLPConfig(48), AttentionConfig(4, 2, 8)), eos_token_id=2)
    model = HybridModel(config).double().eval()
    initialize(model, 3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("proj.weight"):
                parameter.mul_(10)
    return model


def request(*args: object) -> SimpleNamespace:
    return SimpleNamespace(args=args)


def plain_score(model: HybridModel, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    with torch.inference_mode():
        log_probs = model(torch.tensor([context + continuation[:-1]]))[0, -len(continuation) :].log_softmax(-1)
    target = torch.tensor(continuation)
    return float(log_probs.gather(1, target[:, None]).sum()), bool((log_probs.argmax(-1) == target).all())


def test_loglikelihood(model: HybridModel, tokenizer: Tokenizer) -> None:
    pairs = [("the cat", " sat on"), ("", "a dog"), ("a bird sang and the dog", " ran")]
    got = HalflapLM(model, tokenizer).loglikelihood([request(*pair) for pair in pairs])
    for (context, continuation), (log_prob, is_greedy) in zip(pairs, got):
        before = tokenizer.encode(context) if context else [tokenizer.bos_id or 0]
        whole = tokenizer.encode(context + continuation)
        after = whole[len(before) :] if context else whole
        expected = plain_score(model, before, after)
        assert log_prob == pytest.approx(expected[0], abs=1e-9) and is_greedy == expected[1]
    written = generate(model, [[5, 6]], 4)[0].tokens
    assert HalflapLM(model, tokenizer)._loglikelihood_tokens([(None, [5, 6], written)])[0][1]


def test_long_prompts_lose_their_beginning_and_are_counted(model: HybridModel, tokenizer: Tokenizer) -> None:
    harness = HalflapLM(model, tokenizer, context=8)
    context, continuation = tokenizer.encode(TEXT * 2), tokenizer.encode(" the end")
    got = harness._loglikelihood_tokens([(None, context, continuation)])[0][0]
    kept = (context + continuation)[-9 : -len(continuation)]
    assert got == pytest.approx(plain_score(model, kept, continuation)[0], abs=1e-9)
    assert harness.truncated == 1


def test_rolling(model: HybridModel, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(TEXT)
    whole = plain_score(model, [tokenizer.bos_id or 0], ids)[0]
    got = HalflapLM(model, tokenizer).loglikelihood_rolling([request(TEXT), request("a")])
    assert got[0] == pytest.approx(whole, abs=1e-9)
    shorter = HalflapLM(model, tokenizer, context=16).loglikelihood_rolling([request(TEXT)])[0]
    assert shorter != pytest.approx(whole, abs=1e-6)


def test_generate_until(model: HybridModel, tokenizer: Tokenizer) -> None:
    prompts = ["the cat", "a dog ran in the", "a"]
    alone = [c.text for c in generate(model, prompts, 12, tokenizer=tokenizer)]
    harness = HalflapLM(model, tokenizer)
    settings = {"until": [], "max_gen_toks": 12}
    assert harness.generate_until([request(p, settings) for p in prompts]) == alone
    stop = alone[0][4]
    cut = harness.generate_until([request("the cat", {"until": [stop], "max_gen_toks": 12, "do_sample": False})])
    assert cut == [alone[0][: alone[0].index(stop)]]


def test_wrong_requests(
    model: HybridModel, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(HalflapError, match=r"'helaswag_local' is not known; did you mean 'hellaswag_local'"):
        load_tasks(["helaswag_local"])
    monkeypatch.setenv("HALFLAP_DATA", str(tmp_path))
    with pytest.raises(HalflapError, match=r"task copa_local reads copa/validation.jsonl.gz.*set HALFLAP_DATA"):
        load_tasks(["copa_local"])
    with pytest.raises(HalflapError, match="no tokenizer"):
        HalflapLM(model, None)


@pytest.fixture
def copa(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data folder with three items of one task."""
    names = ("premise", "choice1", "choice2", "question", "label")
    rows = [
        ("The cat sat.", "The dog ran.", "A bird sang.", "effect", 1),
        ("The dog ran.", "A cat sat.", "The park.", "cause", 0),
        ("A bird sang.", "The mat.", "The cat.", "cause", 0),
    ]
    (tmp_path / "copa").mkdir()
    with gzip.open(tmp_path / "copa/validation.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(dict(zip(names, row))) + "\n" for row in rows)
    monkeypatch.setenv("HALFLAP_DATA", str(tmp_path))
    return tmp_path


def test_a_task_from_end_to_end(
    model: HybridModel, tokenizer: Tokenizer, copa: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tasks = load_tasks(["copa_local"])
    result = run_tasks(model, tokenizer, tasks)
    harness = HalflapLM(model, tokenizer)
    questions = [
        ("The cat sat therefore", [" the dog ran.", " a bird sang."], 1),
        ("The dog ran because", [" a cat sat.", " the park."], 0),
        ("A bird sang because", [" the mat.", " the cat."], 0),
    ]
    right = 0
    for text, choices, label in questions:
        scores = [harness.loglikelihood([request(text, " " + choice)])[0][0] for choice in choices]
        right += scores.index(max(scores)) == label
    assert result["tasks"]["copa_local"]["acc"] == pytest.approx(right / 3)
    assert result["tasks"]["copa_local"]["items"] == 3 and result["truncated"] == 0
    assert "acc_stderr" in result["tasks"]["copa_local"]
    assert run_tasks(model, tokenizer, tasks, limit=2)["tasks"]["copa_local"]["items"] == 2
    with pytest.raises(HalflapError, match="limit is 0"):
        run_tasks(model, tokenizer, tasks, limit=0)
    assert capsys.readouterr().out == ""


STOCK = {
    "lambada_local": "lambada/lambada_openai.yaml",
    "hellaswag_local": "hellaswag/hellaswag.yaml",
    "arc_easy_local": "arc/arc_easy.yaml",
    "arc_challenge_local": "arc/arc_challenge.yaml",
    "piqa_local": "piqa/piqa.yaml",
    "winogrande_local": "winogrande/default.yaml",
    "openbookqa_local": "openbookqa/openbookqa.yaml",
    "copa_local": "super_glue/copa/default.yaml",
    "blimp_local": "blimp/_template_yaml",
}


@pytest.mark.parametrize("name", STOCK)
def test_local_tasks_ask_what_stock_tasks_ask(name: str, shared_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both task files over the same local items give the same contexts, choices and right answers."""
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks._yaml_loader import load_yaml

    monkeypatch.setenv("HALFLAP_DATA", str(shared_data))
    our_config = resolve_task(local_tasks()[name])
    stock = load_yaml(Path(lm_eval.__file__).parent / "tasks" / STOCK[name])
    splits = {key: value for key, value in our_config.items() if key.endswith("_split")}
    source = {key: our_config[key] for key in ("dataset_path", "dataset_kwargs")}
    unused = {"training_split": None, "validation_split": None, "test_split": None, "dataset_name": None, "tag": None}
    their_config = {**stock, **unused, **splits, **source, "task": "stock"}
    their_config.pop("tag")
    ours: Any = ConfigurableTask(config=our_config)
    theirs: Any = ConfigurableTask(config=their_config)
    assert len(ours.eval_docs) == len(theirs.eval_docs) > 40
    for mine, other in zip(ours.eval_docs.select(range(40)), theirs.eval_docs.select(range(40))):
        assert ours.doc_to_text(mine) == theirs.doc_to_text(other)
        if ours.config.doc_to_choice is not None:
            assert ours.doc_to_choice(mine) == theirs.doc_to_choice(other)
        target, expected = ours.doc_to_target(mine), theirs.doc_to_target(other)
        choices = theirs.doc_to_choice(other) if theirs.config.doc_to_choice is not None else []
        assert target == expected or (isinstance(target, int) and choices[target] == expected)
    assert set(ours.aggregation()) == set(theirs.aggregation())


def test_every_task_file_is_complete() -> None:
    names = "arc_challenge arc_easy blimp boolq copa hellaswag lambada openbookqa piqa wikitext2 winogrande"
    assert list(local_tasks()) == [f"{name}_local" for name in names.split()]


def test_a_limit_is_spread_where_the_file_is_sorted() -> None:
    from halflap.evaluate.lm_eval import _indices

    def task(**metadata: Any) -> Any:
        return SimpleNamespace(eval_docs=range(10), config=SimpleNamespace(metadata=metadata))

    assert _indices(task(), 3) == [0, 1, 2]
    assert _indices(task(spread=True), 3) == [0, 3, 6]
    assert _indices(task(spread=True), 99) == list(range(10))
