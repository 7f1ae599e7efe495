"""Texts are encoded within the limits: of the queue, of time, and only where they may fit the context."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from halflap.data.tokenizer import Tokenizer
from halflap.inference.server import service as services

from .test_errors import BODY, PATH, Held, refused

CHAT, SCORE = "/v1/chat/completions", "/v1/score"


class Encoding:
    """Stands where texts are encoded, until it is let go; `most` were there at once."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.came, self.here, self.most = 0, 0, 0
        self.open = threading.Event()
        self._lock = threading.Lock()
        encode = Tokenizer.encode_batch

        def held(*given: Any, **named: Any) -> list[list[int]]:
            with self._lock:
                self.came, self.here = self.came + 1, self.here + 1
                self.most = max(self.most, self.here)
            self.open.wait(20)
            with self._lock:
                self.here -= 1
            return encode(*given, **named)

        patch.setattr(Tokenizer, "encode_batch", held)


def until(true: Callable[[], bool]) -> None:
    for _ in range(1000):
        if true():
            return
        time.sleep(0.01)
    raise AssertionError("it did not come about in 10 seconds")


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (PATH, {"prompt": "a " * 50_000}),
        (PATH, {"prompt": ["a " * 50_000], "stream": True}),
        (CHAT, {"messages": [{"role": "user", "content": "a " * 50_000}]}),
        (SCORE, {"context": "a " * 50_000, "continuations": ["b"]}),
        (SCORE, {"context": [5], "continuations": ["a " * 50_000]}),
    ],
)
def test_a_text_that_cannot_fit_is_not_encoded(
    client: Any, monkeypatch: pytest.MonkeyPatch, path: str, body: dict[str, Any]
) -> None:
    encoding = Encoding(monkeypatch)
    encoding.open.set()
    error = refused(client.post(path, json=body), 400)
    assert error["code"] == "context_length_exceeded" and "tokens or more; the context has 512" in error["message"]
    assert encoding.came == 0


def test_a_place_is_taken_before_a_text_is_encoded(make_client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    client, encoding = make_client(engine=Held(), choices=1, seconds=20), Encoding(monkeypatch)
    first = threading.Thread(target=client.post, args=(PATH,), kwargs={"json": {**BODY, "stream": True}})
    first.start()
    until(lambda: encoding.came == 1)
    assert refused(client.post(PATH, json=BODY), 429)["code"] == "queue_full"
    assert encoding.came == 1
    encoding.open.set()


@pytest.mark.parametrize("stream", [True, False])
def test_the_time_of_a_request_covers_its_encoding(
    make_service: Any, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    from starlette.testclient import TestClient

    from halflap.inference.server.app import application

    engine = Held()
    service = make_service(engine=engine, seconds=0.2)
    client, encoding = TestClient(application(service)), Encoding(monkeypatch)
    body = {"context": "a", "continuations": ["b"] * 9} if not stream else {**BODY, "stream": True}
    assert refused(client.post(PATH if stream else SCORE, json=body), 504)["code"] == "timeout"
    text = service.metrics.text().decode()
    assert "halflap_requests_active 0.0" in text and 'status="504"' in text
    encoding.open.set()
    service._threads.shutdown()  # waits until the thread has noticed
    assert not engine.streams and encoding.came <= 2  # of its first continuation alone


def test_so_many_texts_are_encoded_at_once(make_client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(services, "THREADS", 2)
    client, encoding = make_client(), Encoding(monkeypatch)
    answers: list[int] = []
    threads = [
        threading.Thread(target=lambda: answers.append(client.post(PATH, json=BODY).status_code)) for _ in range(5)
    ]
    for thread in threads:
        thread.start()
    until(lambda: encoding.here == 2 and "halflap_requests_active 5.0" in client.get("/metrics").text)
    encoding.open.set()
    for thread in threads:
        thread.join()
    assert answers == [200] * 5 and encoding.most == 2
