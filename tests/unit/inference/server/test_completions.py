"""/v1/completions and /v1/score: what the engine says, in OpenAI's shapes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from halflap.inference.generate import generate
from halflap.inference.requests import Piece, Request, Token, TopToken
from halflap.inference.server.asked import Asked
from halflap.inference.server.objects import CompletionReply


def post(client: Any, path: str = "/v1/completions", **body: Any) -> Any:
    response = client.post(path, json=body)
    assert response.status_code == 200, response.text
    return response if body.get("stream") else response.json()


def test_greedy_text_is_that_of_generate(client: Any, model: Any, tokenizer: Any) -> None:
    prompts = ["the cat", "sat on the mat"]
    wanted = generate(model, prompts, 12, tokenizer=tokenizer)
    found = post(client, prompt=prompts, max_tokens=12, temperature=0)
    assert [c["text"] for c in found["choices"]] == [c.text for c in wanted]
    assert [c["index"] for c in found["choices"]] == [0, 1]
    assert [c["finish_reason"] for c in found["choices"]] == [c.finish_reason for c in wanted]
    usage = found["usage"]
    assert usage["completion_tokens"] == sum(len(c.tokens) for c in wanted)
    assert usage["prompt_tokens"] == sum(len(tokenizer.encode(p)) for p in prompts)
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert found["object"] == "text_completion" and found["model"] == "tiny"


def test_stream_brings_the_same_text(client: Any, events: Any) -> None:
    body = {"prompt": ["the", "cat"], "max_tokens": 10, "seed": 3, "n": 2, "logprobs": 2}
    whole = post(client, **body)
    chunks = events(post(client, **body, stream=True, stream_options={"include_usage": True}))
    assert (
        chunks[-1]["choices"] == [] and chunks[-1]["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"]
    )
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    for choice in whole["choices"]:
        mine = [c for chunk in chunks for c in chunk["choices"] if c["index"] == choice["index"]]
        assert "".join(c["text"] for c in mine) == choice["text"]
        assert [c["finish_reason"] for c in mine if c["finish_reason"]] == [choice["finish_reason"]]
        assert [t for c in mine for t in c["logprobs"]["tokens"]] == choice["logprobs"]["tokens"]


def test_names_of_vllm_say_where_a_reply_may_end(client: Any, model: Any, tokenizer: Any) -> None:
    free = generate(model, ["the cat"], 12, tokenizer=tokenizer, ignore_eos=True)[0].tokens
    body = {"prompt": "the cat", "max_tokens": 12, "temperature": 0, "ignore_eos": True}
    ended = post(client, **body, stop_token_ids=free[3:4])
    assert ended["usage"]["completion_tokens"] == free.index(free[3]) + 1
    assert ended["choices"][0]["finish_reason"] == "stop"
    assert post(client, **body, stop_token_ids=free[3:4], min_tokens=10)["usage"]["completion_tokens"] >= 10


def test_seeds_repeat_and_choices_differ(client: Any) -> None:
    body = {"prompt": "the cat", "max_tokens": 16, "temperature": 1.5, "n": 3, "seed": -7}
    first, second = post(client, **body), post(client, **body)
    texts = [c["text"] for c in first["choices"]]
    assert texts == [c["text"] for c in second["choices"]]
    assert len(set(texts)) > 1
    unseeded = {post(client, prompt="the cat", max_tokens=16, temperature=1.5)["choices"][0]["text"] for _ in range(3)}
    assert len(unseeded) > 1


def test_echo_scores_the_prompt_as_the_model_does(client: Any, model: Any, tokenizer: Any) -> None:
    ids = tokenizer.encode("the cat sat on the mat")
    found = post(client, prompt=ids, max_tokens=1, temperature=0, logprobs=1, echo=True)["choices"][0]
    scores = found["logprobs"]
    assert scores["token_logprobs"][0] is None and scores["top_logprobs"][0] is None
    with torch.inference_mode():
        table = model(torch.tensor([ids]))[0].log_softmax(-1)
    wanted = table[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0].tolist()
    assert scores["token_logprobs"][1:-1] == pytest.approx(wanted, abs=1e-4)
    assert scores["token_logprobs"][-1] == pytest.approx(float(table[-1].max()), abs=1e-4)
    assert [max(t.values()) for t in scores["top_logprobs"][1:]] == pytest.approx(
        table.max(-1).values.tolist(), abs=1e-4
    )
    assert found["text"].startswith("the cat sat on the mat")
    assert scores["text_offset"][1] == len(scores["tokens"][0])
    two = post(client, prompt=[ids, ids[:3]], max_tokens=1, n=2, logprobs=1, echo=True, seed=1)["choices"]
    assert [len(c["logprobs"]["tokens"]) for c in two] == [len(ids) + 1] * 2 + [4] * 2
    none = post(client, prompt="the cat", max_tokens=0, echo=True)["choices"][0]
    assert none["text"] == "the cat" and none["finish_reason"] == "length" and none["logprobs"] is None


def test_offsets_of_tokens_that_are_parts_of_a_character(client: Any, tokenizer: Any) -> None:
    text = "the 日本語 cat"
    found = post(client, prompt=text, max_tokens=30, temperature=2, seed=3, logprobs=0, echo=True)["choices"][0]
    scores, whole = found["logprobs"], found["text"]
    places = list(zip(scores["text_offset"], scores["tokens"], strict=True))
    assert any(token.startswith("bytes:\\x") for _, token in places)
    plain = [(offset, token) for offset, token in places if not token.startswith("bytes:") and token != "<eos>"]
    assert all(whole[offset:].startswith(token) for offset, token in plain) and len(plain) > 12
    assert scores["text_offset"] == sorted(scores["text_offset"])
    asked = len(tokenizer.encode(text))
    alone = post(client, prompt=text, max_tokens=30, temperature=2, seed=3, logprobs=0)["choices"][0]
    assert alone["logprobs"]["text_offset"] == [o - len(text) for o in scores["text_offset"][asked:]]


def test_parts_of_a_character_are_told_apart(client: Any, tokenizer: Any) -> None:
    """Each has its own bytes, its own place among the likeliest, and its own value."""
    parts = [tokenizer.token_bytes(token) for token in tokenizer.encode("🙃")]
    assert len(parts) > 1 and all("\ufffd" in part.decode(errors="replace") for part in parts)
    body = {"prompt": "the", "structured_outputs": {"choice": ["🙃"]}, "temperature": 0}
    scores = post(client, **body, logprobs=20)["choices"][0]["logprobs"]
    names = ["bytes:" + "".join(f"\\x{byte:02x}" for byte in part) for part in parts]
    assert scores["tokens"][: len(parts)] == names
    for token, value, top in zip(scores["tokens"], scores["token_logprobs"], scores["top_logprobs"], strict=True):
        assert top[token] == value and 20 <= len(top) <= 21


def test_a_token_is_never_given_the_value_of_another_that_reads_the_same() -> None:
    top = tuple(TopToken(i, text, value) for i, text, value in [(5, "a", -0.5), (6, "a", -1.0), (7, "b", -2.0)])
    reply = CompletionReply(Asked((Request((1,)),), 1, False, False, logprobs=True), "tiny", lambda token: b"")
    reply.add(0, Piece(0, "ab", (Token(6, "a", -1.0, top), Token(7, "b", -2.0, top)), "stop"))
    assert reply.whole({})["choices"][0]["logprobs"]["top_logprobs"] == [{"a": -1.0, "b": -2.0}, {"a": -0.5, "b": -2.0}]


def test_stop_and_bias(client: Any, tokenizer: Any) -> None:
    whole = post(client, prompt="the", max_tokens=20, temperature=0, ignore_eos=True)["choices"][0]["text"]
    stop = whole[4:6]
    cut = post(client, prompt="the", max_tokens=20, temperature=0, ignore_eos=True, stop=[stop])["choices"][0]
    assert cut["text"] == whole[: whole.index(stop)] and cut["finish_reason"] == "stop"
    token = tokenizer.encode("c")[0]
    biased = post(client, prompt="the", max_tokens=4, temperature=0, logit_bias={str(token): 100})["choices"][0]
    assert biased["text"] == "cccc"


def test_scores_of_continuations(client: Any, model: Any, tokenizer: Any) -> None:
    found = post(
        client, "/v1/score", context="the cat sat", continuations=[" on the mat", " 日本語"], token_log_probs=True
    )
    for score, text in zip(found["scores"], [" on the mat", " 日本語"], strict=True):
        ids = tokenizer.encode("the cat sat" + text)
        begin = len(tokenizer.encode("the cat sat"))
        with torch.inference_mode():
            table = model(torch.tensor([ids]))[0].log_softmax(-1)
        wanted = [float(table[i - 1, ids[i]]) for i in range(begin, len(ids))]
        assert score["log_prob"] == pytest.approx(sum(wanted), abs=1e-3) and score["tokens"] == len(wanted)
        assert score["greedy"] == all(int(table[i - 1].argmax()) == ids[i] for i in range(begin, len(ids)))
        assert [t["log_prob"] for t in score["token_log_probs"]] == pytest.approx(wanted, abs=1e-4)
    assert found["usage"]["completion_tokens"] == 0


def test_a_context_is_read_once_for_all_continuations(
    client: Any, make_client: Any, model: Any, tokenizer: Any
) -> None:
    from halflap.inference.engine import Engine
    from halflap.inference.requests import EngineSettings

    context = tokenizer.encode("sat on the mat, the cat " * 8)
    continuations = [tokenizer.encode("a cat " * (1 + i)) for i in range(5)] + [tokenizer.encode("c")[:1]]
    body = {"context": context, "continuations": continuations}
    singly = [post(client, "/v1/score", context=context, continuations=[each])["scores"][0] for each in continuations]
    for settings in (EngineSettings(prefill_chunk=16), EngineSettings(prefix_cache=1 << 24)):
        with Engine(model, tokenizer, settings) as engine:
            client = make_client(engine=engine)
            found = [post(client, "/v1/score", **body) for _ in range(2)]
        read = engine.stats()["prompt_tokens"]  # of a closed engine: a reply may come before its step is counted
        for score, alone in zip(found[0]["scores"], singly, strict=True):
            assert score["log_prob"] == pytest.approx(alone["log_prob"], abs=1e-4)
            assert (score["tokens"], score["greedy"]) == (alone["tokens"], alone["greedy"])
        again = found[1]["usage"]
        held = len(context) if settings.prefix_cache else 0
        assert again["prompt_tokens_details"]["cached_tokens"] == held
        assert again["prompt_tokens"] == len(context) + sum(map(len, continuations))
        assert read == 2 * (len(context) + sum(len(each) - 1 for each in continuations)) - held
    echoed = post(make_client(), prompt=context, max_tokens=0, echo=True, logprobs=0)
    assert echoed["usage"]["prompt_tokens_details"]["cached_tokens"] == 0


def test_scores_without_context_and_in_ids(client: Any, tokenizer: Any) -> None:
    ids = tokenizer.encode("the cat")
    empty = post(client, "/v1/score", context="", continuations=["the cat", ids])["scores"]
    assert empty[0]["log_prob"] == empty[1]["log_prob"] and empty[0]["tokens"] == len(ids)


@pytest.mark.parametrize(
    ("body", "param", "said"),
    [
        ({"prompt": "a", "suffix": "b"}, "suffix", "suffix"),
        ({"prompt": "a", "max_token": 3}, "max_token", "unrecognized"),
        ({}, "prompt", "missing"),
        ({"prompt": []}, "prompt", "prompt"),
        ({"prompt": [[]]}, "prompt[0]", "prompt"),
        ({"prompt": [999999]}, None, "999999"),
        ({"prompt": "a", "n": 100000}, "n", "128"),
        ({"prompt": ["a"] * 200, "n": 100}, "n", "512"),
        ({"prompt": "a", "n": 2, "best_of": 3}, "best_of", "best_of"),
        ({"prompt": "a", "temperature": -1}, "temperature", "0"),
        ({"prompt": "a", "temperature": "hot"}, "temperature", "number"),
        ({"prompt": "a", "logit_bias": {"x": 1}}, "logit_bias", ""),
        ({"prompt": "a", "logit_bias": {"99999": 1}}, None, "99999"),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens", "at least 1"),
        ({"prompt": "a", "max_tokens": 10**6}, "max_tokens", "512"),
        ({"prompt": "a " * 900}, None, "512"),
        ({"prompt": "a", "stop": "a" * 2000}, "stop", "1024"),
        ({"prompt": "a", "top_k": -2}, "top_k", "-1"),
        ({"prompt": "a", "stream_options": {}}, "stream_options", "stream"),
        ({"prompt": "a", "logprobs": 1000}, "logprobs", "20"),
    ],
)
def test_wrong_bodies_are_refused(client: Any, body: dict[str, Any], param: str | None, said: str) -> None:
    response = client.post("/v1/completions", json=body)
    error = response.json()["error"]
    assert response.status_code == 400 and error["type"] == "invalid_request_error"
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["param"] or "").startswith(param or "") and said in error["message"]
    assert post(client, prompt="a", max_tokens=1)
