"""Clients that people use, against `halflap serve`: openai, lm-evaluation-harness, schemathesis."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings

openai = pytest.importorskip("openai", reason="openai is not installed: pip install -e '.[interop]'")
schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is not installed: pip install -e '.[interop]'")
KEY = "sk-local"


@pytest.fixture(scope="module")
def directory(make_checkpoint: Any) -> Path:
    return make_checkpoint("nemotron-h-tiny", unequal=True)


@pytest.fixture(scope="module")
def url(directory: Path, serving: Any) -> Iterator[str]:
    with serving(directory, "--api-key", KEY, "--served-model-name", "tiny", "--max-context", "512") as url:
        yield url


@pytest.fixture(scope="module")
def client(url: str) -> Any:
    return openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0)


HELLO = [{"role": "user", "content": "Attention looks back"}]
TOOL = {
    "type": "function",
    "function": {
        "name": "look",
        "parameters": {
            "type": "object",
            "properties": {"at": {"enum": ["word", "state"]}},
            "required": ["at"],
            "additionalProperties": False,
        },
    },
}


def test_openai_chat(client: Any) -> None:
    assert client.models.list().data[0].id == "tiny" == client.models.retrieve("tiny").id
    body = {"model": "tiny", "messages": HELLO, "max_completion_tokens": 12, "seed": 1}
    whole = client.chat.completions.create(**body, logprobs=True, top_logprobs=3)
    chunks = list(client.chat.completions.create(**body, stream=True, stream_options={"include_usage": True}))
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert (
        text == whole.choices[0].message.content and chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    )
    assert len(whole.choices[0].logprobs.content) == whole.usage.completion_tokens
    assert len(whole.choices[0].logprobs.content[0].top_logprobs) == 3


def test_openai_tools_and_forms(client: Any) -> None:
    body = {"model": "tiny", "tools": [TOOL], "tool_choice": "required"}
    message = client.chat.completions.create(messages=HELLO, **body).choices[0].message
    assert json.loads(message.tool_calls[0].function.arguments)["at"] in ("word", "state")
    answer = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "seen"}
    client.chat.completions.create(model="tiny", messages=[*HELLO, message, answer], tools=[TOOL], max_tokens=4)
    schema = TOOL["function"]["parameters"]
    form = {"type": "json_schema", "json_schema": {"name": "seen", "schema": schema, "strict": True}}
    reply = client.chat.completions.create(model="tiny", messages=HELLO, response_format=form)
    assert json.loads(reply.choices[0].message.content)["at"] in ("word", "state")


def test_openai_completions(client: Any) -> None:
    reply = client.completions.create(model="tiny", prompt=["The quick", "brown"], max_tokens=3, echo=True, logprobs=1)
    assert [choice.text.startswith(p) for choice, p in zip(reply.choices, ["The quick", "brown"], strict=True)] == [
        True
    ] * 2
    scores = reply.choices[0].logprobs
    assert scores.token_logprobs[0] is None and len(scores.tokens) == len(scores.text_offset)
    pieces = client.completions.create(model="tiny", prompt="The", max_tokens=5, stream=True)
    assert [piece.choices[0].finish_reason for piece in pieces][-1] in ("stop", "length")


def test_openai_errors(client: Any, url: str) -> None:
    with pytest.raises(openai.NotFoundError, match="this server has 'tiny'"):
        client.chat.completions.create(model="gpt", messages=HELLO)
    with pytest.raises(openai.BadRequestError, match="context has 512"):
        client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "word " * 800}])
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{url}/v1", api_key="no").models.list()


def test_lm_evaluation_harness_scores_as_the_model_does(
    url: str, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`local-completions` sends ids, asks for echo and reads log-probabilities; those of the module are the measure."""
    pytest.importorskip("tenacity", reason="lm-eval's API models need tenacity: pip install -e '.[interop]'")
    from lm_eval.api.instance import Instance
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    import halflap
    from halflap.inference.answers import score_answers

    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    judge = LocalCompletionsAPI(
        model="tiny",
        base_url=f"{url}/v1/completions",
        tokenizer=str(directory),
        tokenizer_backend="huggingface",
        max_length=128,
        batch_size=2,
    )
    pairs = [("Attention looks back at", " every word"), ("A state remembers", " what it was told"), ("The", " fox")]
    asked = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    found = judge.loglikelihood(asked, disable_tqdm=True)
    model: Any = halflap.load(directory)
    encode = model.tokenizer.encode
    wanted = score_answers(model, [(encode(c), encode(c + a)[len(encode(c)) :]) for c, a in pairs])
    assert [score for score, _ in found] == pytest.approx([answer.log_prob for answer in wanted], abs=1e-3)
    assert [greedy for _, greedy in found] == [answer.greedy for answer in wanted]


def test_lm_evaluation_harness_runs_a_whole_task(
    url: str, directory: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A task of two answers through `local-completions`, beside the same task through our own harness model."""
    pytest.importorskip("tenacity", reason="lm-eval's API models need tenacity: pip install -e '.[interop]'")
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    import halflap
    from halflap.evaluate.lm_eval import Tasks, run_tasks

    ends = [["every word", "no state"], ["a fox", "one piece"], ["the thickness", "was told again"]]
    items = [{"start": "Attention looks back at", "ends": pair, "right": i % 2} for i, pair in enumerate(ends * 4)]
    data = tmp_path / "items.jsonl"
    data.write_text("".join(json.dumps(item) + "\n" for item in items), "utf-8")

    def task() -> ConfigurableTask:
        measures = [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}]
        files = {"data_files": {"test": str(data)}}
        return ConfigurableTask(
            config={
                "task": "two_ends", "dataset_path": "json", "dataset_kwargs": files, "test_split": "test",
                "output_type": "multiple_choice", "doc_to_text": "{{start}}", "doc_to_choice": "{{ends}}",
                "doc_to_target": "{{right}}", "num_fewshot": 2, "metric_list": measures,
            }
        )  # fmt: skip

    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    options = f"model=tiny,base_url={url}/v1/completions,tokenizer={directory},max_length=128,num_concurrent=4"
    found: Any = simple_evaluate(
        "local-completions", model_args=options, tasks=[task()], batch_size=2, bootstrap_iters=0,
        task_manager=TaskManager(include_defaults=False),
    )  # fmt: skip
    model: Any = halflap.load(directory)
    ours = run_tasks(model, model.tokenizer, Tasks({"two_ends": task()}), seed=1234)  # the harness's own seed
    assert found["results"]["two_ends"]["acc,none"] == ours["tasks"]["two_ends"]["acc"]
    assert len(found["samples"]["two_ends"]) == 12


@pytest.mark.parametrize("mode", list(schemathesis.GenerationMode), ids=lambda mode: mode.value)
def test_fuzzed_from_the_openapi_document(url: str, mode: Any) -> None:
    """Statuses, types and shapes of all answers are those documented, and nothing ends in a server error.

    Limits across fields (max_tokens against the context) cannot be written in a schema, so that one check is left out.
    """
    from schemathesis.specs.openapi.checks import positive_data_acceptance

    excluded = [positive_data_acceptance]
    headers = {"Authorization": f"Bearer {KEY}"}
    for result in schemathesis.openapi.from_url(f"{url}/openapi.json").get_all_operations():
        operation = result.ok()
        if mode is schemathesis.GenerationMode.NEGATIVE and operation.method == "get":
            continue  # nothing of these can be wrong

        @settings(max_examples=20, database=None, suppress_health_check=list(HealthCheck))
        @given(case=operation.as_strategy(generation_mode=mode))
        def check(case: Any) -> None:
            case.call_and_validate(headers=headers, excluded_checks=excluded, timeout=60)

        check()
