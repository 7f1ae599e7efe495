"""Places of replies, which are counted choice by choice, and what is counted of those that end early."""

from __future__ import annotations

import threading
import time
from typing import Any

from halflap.inference.requests import Piece, Usage

from .test_errors import BODY, PATH, Held, refused


def test_too_many_requests(make_client: Any) -> None:
    engine = Held()
    client = make_client(engine=engine, choices=1)
    first: list[Any] = []
    thread = threading.Thread(target=lambda: first.append(client.post(PATH, json=BODY)))
    thread.start()
    while not engine.streams:
        time.sleep(0.01)
    response = client.post(PATH, json=BODY)
    refused(response, 429)
    assert int(response.headers["Retry-After"]) >= 1
    engine.release()
    thread.join()
    assert first[0].status_code == 200 and first[0].json()["choices"][0]["text"] == "ab"


def test_choices_count_against_the_queue(make_client: Any) -> None:
    engine = Held()
    client = make_client(engine=engine, choices=3)
    many = {**BODY, "prompt": ["a", "b"], "n": 2}
    threads = [
        threading.Thread(target=client.post, args=(PATH,), kwargs={"json": BODY | more}) for more in ({}, {"n": 2})
    ]
    for number, thread in enumerate(threads, 1):
        thread.start()
        while len(engine.streams) < number:
            time.sleep(0.01)
    assert refused(client.post(PATH, json=BODY), 429)["code"] == "queue_full"
    for stream in engine.streams:
        for choice in range(stream.request.n):
            stream.put(Piece(choice, "b", finish_reason="stop"))
        stream.end(Usage(1, 2, 0))
    for thread in threads:
        thread.join()
    alone = threading.Thread(target=client.post, args=(PATH,), kwargs={"json": many})
    alone.start()  # more than there are places at all, and nobody else is there
    while len(engine.streams) < 4:
        time.sleep(0.01)
    assert len({stream.request.group for stream in engine.streams}) == 3
    refused(client.post(PATH, json=BODY), 429)
    for stream in engine.streams[2:]:
        for choice in range(2):
            stream.put(Piece(choice, "b", finish_reason="stop"))
        stream.end(Usage(1, 2, 0))
    alone.join()


def test_tokens_of_replies_that_are_given_up_are_counted(make_client: Any) -> None:
    client = make_client(seconds=0.5)
    body = {"prompt": "the cat", "max_tokens": 500, "ignore_eos": True, "n": 4}
    before = counted(client)
    refused(client.post(PATH, json=body), 504)
    while (now := counted(client))["completion"] == before["completion"]:  # until the engine has let them go
        time.sleep(0.01)
    assert now["prompt"] > before["prompt"]
    client.post(PATH, json=BODY)
    assert counted(client)["completion"] == now["completion"] + 2  # each once


def counted(client: Any) -> dict[str, float]:
    lines = [line for line in client.get("/metrics").text.splitlines() if line.startswith("halflap_tokens_total")]
    return {line.split('"')[1]: float(line.split()[-1]) for line in lines} or {"prompt": 0.0, "completion": 0.0}


def test_scores_take_a_place_for_each_continuation(make_service: Any) -> None:
    from starlette.testclient import TestClient

    from halflap.inference.server.app import application

    service = make_service()
    taken: list[int] = []
    enter = service.enter
    service.enter = lambda choices: (taken.append(choices), enter(choices))
    body = {"context": "the ca", "continuations": ["t sat", "ke", "日", "t", "n"]}  # whose beginnings join the context
    assert len(TestClient(application(service)).post("/v1/score", json=body).json()["scores"]) == 5
    assert taken == [5]
