"""What clients of a front see: streams as they come, errors in one form, and a replica's end as a sentence."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest

Play = Callable[..., None]


def refused(response: Any, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["message"]
    return error


async def idle(stage: Any) -> None:
    """Until the front has let every replica go; it must."""
    while any(replica.running for replica in stage.replicas):
        await asyncio.sleep(0.01)


def test_a_stream_comes_event_by_event(play: Play) -> None:
    async def scene(stage: Any) -> None:
        (engine,) = stage.engines
        engine.allowed = asyncio.Semaphore(0)
        seen = []
        async with stage.client.stream("POST", "/v1/completions", json={"prompt": "x", "stream": True}) as response:
            lines = response.aiter_lines()
            for word in engine.words:  # the engine goes on only when the one before has come through
                engine.allowed.release()
                seen.append(json.loads((await anext(lines)).removeprefix("data: "))["text"])
                assert await anext(lines) == "" and seen[-1] == word
            assert await anext(lines) == "data: [DONE]"
        assert response.headers["content-type"] == "text/event-stream"
        await idle(stage)

    play(scene, engines=1)


@pytest.mark.parametrize("stream", [True, False])
def test_hanging_up_reaches_the_engine_and_frees_the_place(play: Play, stream: bool) -> None:
    async def scene(stage: Any) -> None:
        (engine,) = stage.engines
        engine.allowed = asyncio.Semaphore(1 if stream else 0)
        request = asyncio.create_task(stage.post(stream=stream))
        while not engine.asked:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.05)
        assert stage.replicas[0].running == 1
        request.cancel()
        await engine.hung_up.wait()
        engine.allowed = asyncio.Semaphore(1000)
        await idle(stage)
        assert (await stage.post()).status_code == 200

    play(scene, engines=1, choices=1)


def test_a_replica_that_ends_within_a_stream(play: Play) -> None:
    async def scene(stage: Any) -> None:
        stage.engines[0].breaks_off = True
        *words, last = await stage.events()
        assert [word["text"] for word in words] == ["a", "b", "c"]  # whole events alone
        assert last["error"]["code"] == "replica_lost" and "send the request again" in last["error"]["message"]
        await idle(stage)

    play(scene, engines=1)


def test_a_replica_that_is_not_there_is_passed_over(play: Play) -> None:
    async def scene(stage: Any) -> None:
        stage.replicas[0].launch.socket.unlink()
        for number in range(4):
            assert (await stage.post(prompt=f"{number}")).json() == {"engine": "e1"}
        assert not stage.replicas[0].ready and (await stage.client.get("/health")).json()["replicas"] == {
            "replica 0": "starting",
            "replica 1": "ready",
        }
        stage.replicas[1].ready = False
        response = await stage.post()
        assert refused(response, 503)["code"] == "no_replica" and "Retry-After" in response.headers
        assert (await stage.client.get("/health")).status_code == 503
        stage.replicas[1].ready = True
        stage.engines[1].status, stage.engines[1].error = 503, b'{"error": {"message": "stopping"}}'
        assert refused(await stage.post(), 503)["code"] == "no_replica"

    play(scene)


def test_a_conversation_stays_and_others_go_elsewhere(play: Play) -> None:
    async def scene(stage: Any) -> None:
        homes = {}
        talks = {name: [{"role": "user", "content": f"I am {name}"}] for name in ("Ann", "Bob", "Cid", "Dee")}
        for turn in range(3):
            for name, messages in talks.items():
                reply = await stage.client.post("/v1/chat/completions", json={"messages": messages})
                assert homes.setdefault(name, reply.json()["engine"]) == reply.json()["engine"]
                messages += [{"role": "assistant", "content": "Hello"}, {"role": "user", "content": f"again, {turn}"}]
        assert sorted(homes.values()) == ["e0", "e0", "e1", "e1"]
        stage.front.lost(stage.replicas[0])
        assert not stage.front.affinity.worth([]) and len(stage.engines[0].asked) == 6
        stage.engines[0].allowed = stage.engines[1].allowed = asyncio.Semaphore(0)  # one for both
        waiting = [asyncio.create_task(stage.post(prompt="the same")) for _ in range(12)]
        while sum(r.running for r in stage.replicas) < 12:
            await asyncio.sleep(0.01)
        assert [r.running for r in stage.replicas] == [6, 6]  # not all twelve where the first one was
        for _ in waiting:
            stage.engines[0].allowed.release()
        await asyncio.gather(*waiting)

    play(scene)


def test_limits_are_the_fronts(play: Play) -> None:
    async def scene(stage: Any) -> None:
        key = {"Authorization": "Bearer k"}
        body = {"prompt": "x"}
        post = lambda **options: stage.client.post("/v1/completions", **{"json": body, "headers": key, **options})
        assert refused(await post(headers={}), 401)["code"] == "invalid_api_key"
        assert (await post()).status_code == 200
        assert b"authorization" not in stage.engines[0].asked[0]["headers"]
        refused(await post(json={**body, "user": "x" * 2000}), 413)
        refused(await post(content=b"a=b", json=None), 415)
        typed = {**key, "Content-Type": "application/json"}
        for raw in (b"{", b"[" * 900, b"3", b'{"prompt": "\xff"}'):
            refused(await post(content=raw, json=None, headers=typed), 400)
        assert refused(await post(json={**body, "model": "other"}), 404)["code"] == "model_not_found"
        refused(await post(json={**body, "model": 3}), 404)
        refused(await stage.client.post("/v1/embeddings", json=body, headers=key), 404)
        refused(await stage.client.get("/v1/completions", headers=key), 405)
        stage.engines[0].allowed = asyncio.Semaphore(0)
        slow = asyncio.create_task(post())
        while not stage.replicas[0].running:
            await asyncio.sleep(0.01)
        response = await post()
        assert refused(response, 429)["code"] == "queue_full" and response.headers["Retry-After"] == "1"
        assert refused(await slow, 504)["code"] == "timeout"
        stage.engines[0].allowed = asyncio.Semaphore(1)
        text = (await post(json={**body, "stream": True})).text
        assert '"code": "timeout"' in text and text.endswith("data: [DONE]\n\n")
        stage.front.stopping = True
        refused(await post(), 503)

    play(scene, engines=1, keys=("k",), body_bytes=1000, choices=1, seconds=0.3)


@pytest.mark.parametrize(
    ("status", "body", "message"),
    [
        (400, b'{"error": {"message": "too long", "type": "BadRequestError", "param": null, "code": 400}}', "too long"),
        (404, b'{"detail": "Not Found"}', "Not Found"),
        (422, b'{"detail": [{"loc": ["body"]}]}', '[{"loc": ["body"]}]'),
        (500, b"Internal Server Error", "Internal Server Error"),
        (502, b'{"object": "error", "message": "no", "code": 502}', "no"),
    ],
)
def test_errors_of_any_engine_have_one_form(play: Play, status: int, body: bytes, message: str) -> None:
    async def scene(stage: Any) -> None:
        stage.engines[0].status, stage.engines[0].error = status, body
        error = refused(await stage.post(), status)
        assert error["code"] is None and error["message"] == message
        assert error["type"] in ("invalid_request_error", "server_error")

    play(scene, engines=1)


def test_numbers_of_all_replicas_under_their_names(play: Play) -> None:
    from prometheus_client.parser import text_string_to_metric_families

    async def scene(stage: Any) -> None:
        for number in range(3):
            await stage.post(prompt=f"{number}")
        await stage.events()
        text = (await stage.client.get("/metrics")).text
        families = list(text_string_to_metric_families(text))
        assert len({family.name for family in families}) == len(families)
        values = {(s.name, *sorted(s.labels.items())): s.value for f in families for s in f.samples}
        assert values["n_total", ("engine", "e0"), ("replica", "0")] == 2
        assert values["n_total", ("engine", "e1"), ("replica", "1")] == 2
        assert values["halflap_front_requests_total", ("path", "/v1/completions"), ("status", "200")] == 4
        assert values["halflap_front_time_to_first_event_seconds_count",] == 1
        stage.replicas[1].ready = False
        text = (await stage.client.get("/metrics")).text
        assert 'n_total{engine="e0"' in text and 'n_total{engine="e1"' not in text

    play(scene)


def test_what_every_server_has(play: Play) -> None:
    async def scene(stage: Any) -> None:
        (model,) = (await stage.client.get("/v1/models")).json()["data"]
        assert model["id"] == "m" and model["max_model_len"] == 64
        assert (await stage.client.get("/v1/models/m")).json() == model
        assert (await stage.client.get("/health")).json()["status"] == "ok"
        assert "<html" in (await stage.client.get("/")).text
        paths = (await stage.client.get("/openapi.json")).json()["paths"]
        assert "/v1/completions" in paths and "/v1/score" not in paths

    play(scene)


def test_bodies_may_be_changed_for_an_engine(play: Play) -> None:
    async def scene(stage: Any) -> None:
        await stage.post(stop="a")
        assert stage.engines[0].asked[0]["stop"] == ["a", "b"]

    play(scene, engines=1, amend=lambda path, body: {**body, "stop": [body["stop"], "b"]})
