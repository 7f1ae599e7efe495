"""Chat templates are other people's programs: they see what they are given, for a while, in bounded memory."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from halflap.data import chat
from halflap.data.sandbox import TemplateWorker
from halflap.errors import HalflapError

MESSAGES = [{"role": "user", "content": "naïve 日本 🙂 <b>"}]
PEEKING = (
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ raise_exception.__globals__['datetime'] }}",
    "{{ messages.__init__.__globals__ }}",
    "{{ cycler.__init__.__globals__.os }}",
    "{{ messages.append({}) }}",
    "{{ ('{0.__class__.__base__}').format('') }}",
    "{% include '/etc/passwd' %}",
)
GREEDY = (
    "{% for a in range(99999) %}{% for b in range(99999) %}{% set c = a * b %}{% endfor %}{% endfor %}",
    "{{ 'a' * 10**10 }}",
    "{{ ('%1000000000d' % 1) | length }}",
    "{% set n = namespace(s='aaaa') %}{% for i in range(64) %}{% set n.s = n.s ~ n.s %}{% endfor %}{{ n.s | length }}",
    "{{ 9 ** (9 ** 9) }}",
    "{% macro f(x) %}{{ f(x + 1) }}{% endmacro %}{{ f(0) }}",
)


@pytest.fixture(scope="module")
def worker() -> Iterator[TemplateWorker]:
    worker = TemplateWorker(seconds=1.0, memory=400 << 20)
    yield worker
    worker.close()


def test_worker_renders_what_render_renders(worker: TemplateWorker) -> None:
    template = "{{ bos }}{% for m in messages %}[{{ m.role }}] {{ m.content | tojson }}{% endfor %}"
    assert worker.render(template, MESSAGES, bos="<s>") == chat.render(template, MESSAGES, bos="<s>")


@pytest.mark.parametrize("template", PEEKING)
def test_templates_cannot_look_around(template: str, worker: TemplateWorker) -> None:
    with pytest.raises(HalflapError, match="the chat template refuses"):
        worker.render(template, MESSAGES)


@pytest.mark.parametrize("template", GREEDY)
def test_templates_cannot_take_all_time_or_memory(template: str, worker: TemplateWorker) -> None:
    with pytest.raises(HalflapError, match=r"the chat template (refuses|was stopped)"):
        worker.render(template, MESSAGES)
    assert worker.render("{{ messages[0].content }}", MESSAGES) == MESSAGES[0]["content"]


def test_what_a_template_says_is_passed_on(worker: TemplateWorker) -> None:
    with pytest.raises(HalflapError, match="roles must alternate"):
        worker.render("{{ raise_exception('roles must alternate') }}", MESSAGES)
    with pytest.raises(HalflapError, match="lacks a role"):
        worker.render("x", [{"content": "a"}])


def test_output_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat, "MOST_CHARACTERS", 100)
    with pytest.raises(HalflapError, match="more than 100 characters"):
        chat.render("{% for i in range(50) %}abc {{ i }}{% endfor %}", MESSAGES)


def test_plain_template() -> None:
    text = chat.render(chat.PLAIN, [{"role": "user", "content": "hi"}], add_generation_prompt=True)
    assert text == "User: hi\n\nAssistant:"


def test_the_current_folder_is_not_imported_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "jinja2.py").write_text("raise SystemExit('a stranger''s code ran')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry not in ("", str(tmp_path))])
    worker = TemplateWorker()
    assert worker.render("{{ messages[0].content }}", MESSAGES) == MESSAGES[0]["content"]
    worker.close()
