"""Tool calls are found in any split of a model's text, and nothing of the rest is lost."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from halflap.inference.server.tools import HERMES, NEMOTRON, WHOLE, ToolCall, ToolFormat, ToolParser, format_of

CALL = '{"name": "add", "arguments": {"a": 1}}'


def parse(form: ToolFormat, pieces: list[str], **limits: int) -> tuple[str, list[tuple[str, object]]]:
    parser = ToolParser(form, {"add", "sub"}, **limits)
    parts = [part for piece in pieces for part in parser.push(piece)] + list(parser.finish())
    calls = [(part.name, json.loads(part.arguments)) for part in parts if isinstance(part, ToolCall)]
    return "".join(part for part in parts if isinstance(part, str)), calls


CASES = [
    (HERMES, f"well <tool_call>\n{CALL}\n</tool_call>", "well ", 1),
    (HERMES, f"<tool_call>{CALL}</tool_call>\n<tool_call>{CALL}</tool_call>\n", "", 2),
    (HERMES, f"<tool_call>{CALL}", "", 1),
    (HERMES, "a < b <tool", "a < b <tool", 0),
    (HERMES, "<tool_call>not json</tool_call> x", "<tool_call>not json</tool_call> x", 0),
    (HERMES, '<tool_call>{"name": "rm"}</tool_call>', '<tool_call>{"name": "rm"}</tool_call>', 0),
    (NEMOTRON, f"<TOOLCALL>[{CALL}, {CALL}]</TOOLCALL>", "", 2),
    (HERMES, '<tool_call>{"name": ["add"]}</tool_call>', '<tool_call>{"name": ["add"]}</tool_call>', 0),
    (WHOLE, '{"name": "add", "arguments": {"a": NaN}}', '{"name": "add", "arguments": {"a": NaN}}', 0),
    (WHOLE, '{"name": "add", "arguments": {"a": "\\ud83d"}}', '{"name": "add", "arguments": {"a": "\\ud83d"}}', 0),
    (WHOLE, '{"name": "add", "arguments": [1]}', '{"name": "add", "arguments": [1]}', 0),
    (WHOLE, '{"name": "sub", "parameters": {}}', "", 1),
    (WHOLE, f"{CALL}\n{CALL}; {CALL}", "", 3),
    (WHOLE, f"{CALL} and", f"{CALL} and", 0),
    (WHOLE, ' {"answer": 3}', ' {"answer": 3}', 0),
    (WHOLE, 'so {"name": "add"}', 'so {"name": "add"}', 0),
    (WHOLE, '{"name": "add", "arguments": "{\\"a\\": 1}"}', "", 1),
]


@pytest.mark.parametrize(("form", "text", "said", "calls"), CASES)
@settings(max_examples=15)
@given(data=st.data())
def test_any_split(form: ToolFormat, text: str, said: str, calls: int, data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    found, called = parse(form, pieces)
    assert found == said and len(called) == calls


def test_only_as_many_calls_as_wanted() -> None:
    text = f"<tool_call>{CALL}</tool_call><tool_call>{CALL}</tool_call>"
    assert parse(HERMES, [text], most=1) == ("", [("add", {"a": 1})])


def test_formats_of_templates() -> None:
    assert format_of("... <TOOLCALL>[...") is NEMOTRON
    assert format_of("... <tool_call>\n{...") is HERMES
    assert format_of("<|python_tag|>") is WHOLE
    assert format_of("{{ messages }}") is HERMES
