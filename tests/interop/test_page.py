"""The chat page in a browser: a message is answered while one looks, and the numbers move."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from typing import Any

import pytest

api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install -e '.[interop]'")
BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
WATCH = """() => {
  window.seen = [];
  new MutationObserver(() => {
    const replies = document.querySelectorAll(".turn.assistant p");
    if (replies.length) window.seen.push(replies[replies.length - 1].textContent.length);
  }).observe(document.getElementById("log"), { childList: true, subtree: true, characterData: true });
}"""


@pytest.fixture(scope="module")
def url(make_checkpoint: Any, serving: Any) -> Iterator[str]:
    directory = make_checkpoint("nemotron-h-tiny", unequal=True)
    with serving(directory, "--served-model-name", "tiny", "--max-context", "512") as url:
        yield url


@pytest.fixture
def page() -> Iterator[Any]:
    """A page of the browser on PATH, at $CHROMIUM, or that playwright has installed."""
    found = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, BROWSERS)), None)
    with api.sync_playwright() as playwright:
        try:
            browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        except api.Error as error:
            pytest.skip(f"there is no Chromium on PATH, at $CHROMIUM or of playwright's ({str(error).splitlines()[0]})")
        page = browser.new_page()
        page.set_default_timeout(60_000)
        yield page
        browser.close()


def say(page: Any, text: str) -> None:
    page.fill("#text", text)
    page.press("#text", "Enter")


def stream(text: str, usage: dict[str, int] | None) -> str:
    """The events of a reply."""
    events = [
        {"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": "stop"}]},
        {"choices": [], "usage": usage},
    ]
    return "".join(f"data: {json.dumps(event)}\n\n" for event in events) + "data: [DONE]\n\n"


def test_a_talk(page: Any, url: str) -> None:
    wrong: list[str] = []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda line: wrong.append(line.text) if "Content Security Policy" in line.text else None)
    page.goto(url)
    expect = api.expect
    expect(page.locator("#name")).to_have_text("tiny")
    page.click("summary")
    page.fill("#most", "60")
    page.fill("#temperature", "0")
    page.evaluate(WATCH)
    say(page, "Attention looks back at every word")
    notes = page.locator(".turn.assistant small")
    expect(notes).to_have_text(re.compile(r"\d+ tokens, [\d.]+/s, first after [\d.]+ s, 0 of \d+ prompt tokens cached"))
    first = page.inner_text(".turn.assistant p")
    grown = sorted(set(page.evaluate("window.seen")))
    assert len(grown) > 5 and grown[-1] == len(page.evaluate("document.querySelector('.turn.assistant p').textContent"))
    say(page, "A state remembers")
    expect(notes.nth(1)).to_have_text(re.compile(r", [1-9]\d* of \d+ prompt tokens cached"))
    assert page.inner_text(".turn.user >> nth=1") and page.inner_text(".turn.assistant p >> nth=0") == first
    expect(page.locator("#hits")).to_have_text(re.compile(r"[1-9]\d* \([1-9]\d* tokens\)"))
    expect(page.locator("#cache")).to_have_text(re.compile(r"[1-9][\d.]* [KMG]iB"))
    expect(page.locator("#rate")).to_have_text(re.compile(r"^\d+\.\d$"))
    page.wait_for_function("Number(document.getElementById('rate').textContent) > 0")
    expect(page.locator("#send")).to_have_text("Send")
    assert not wrong


def test_a_usage_without_details(page: Any, url: str) -> None:
    """vLLM leaves out prompt_tokens_details; the page goes on, and says what it was told."""
    wrong: list[str] = []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    usage = {"prompt_tokens": 7, "completion_tokens": 2, "total_tokens": 9}
    page.route("**/v1/chat/completions", lambda route: route.fulfill(body=stream("Hello", usage)))
    page.goto(url)
    say(page, "A state")
    api.expect(page.locator("#send")).to_have_text("Send")
    api.expect(page.locator(".turn.assistant small")).to_have_text(re.compile(r"2 tokens, .* 7 prompt tokens$"))
    say(page, "A second one")
    api.expect(page.locator(".turn.assistant p")).to_have_count(2)
    assert not wrong


def test_a_turn_without_an_answer_is_not_asked_again(page: Any, url: str) -> None:
    asked: list[list[dict[str, str]]] = []

    def answer(route: Any) -> None:
        asked.append(route.request.post_data_json["messages"])
        if len(asked) == 1:
            route.fulfill(status=503, json={"error": {"message": "the replica is lost"}})
        else:
            route.fulfill(body=stream("Hello", None))

    page.route("**/v1/chat/completions", answer)
    page.goto(url)
    say(page, "first")
    api.expect(page.locator(".turn.error p")).to_have_text("the replica is lost")
    say(page, "second")
    api.expect(page.locator(".turn.assistant p")).to_have_text("Hello")
    api.expect(page.locator("#send")).to_have_text("Send")
    say(page, "third")
    api.expect(page.locator(".turn.assistant p")).to_have_count(2)
    second, reply = {"role": "user", "content": "second"}, {"role": "assistant", "content": "Hello"}
    assert asked[1:] == [[second], [second, reply, {"role": "user", "content": "third"}]]


def test_what_goes_wrong_is_shown_and_a_talk_begins_anew(page: Any, url: str) -> None:
    page.goto(url)
    say(page, "word " * 800)
    api.expect(page.locator(".turn.error p")).to_have_text(re.compile("the context has 512"))
    page.click("summary")
    page.click("#reset")
    api.expect(page.locator(".turn")).to_have_count(0)
    api.expect(page.locator("#empty")).to_be_visible()
