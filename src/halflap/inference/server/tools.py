"""Tool calls in a model's text: the format that its chat template teaches, and a parser that reads it while it comes.

Three formats: `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, one element a call (Hermes, Qwen);
`<TOOLCALL>[{...}, ...]</TOOLCALL>`, a list (Nemotron); and a reply that is JSON as a whole (Llama, which says
`parameters`), which is also what a grammar enforces where a call is required, or an answer is JSON too.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple


class ToolFormat(NamedTuple):
    """The marks around calls; none: the reply as a whole is the call."""

    opening: str = ""
    closing: str = ""


HERMES = ToolFormat("<tool_call>", "</tool_call>")
NEMOTRON = ToolFormat("<TOOLCALL>", "</TOOLCALL>")
WHOLE = ToolFormat()
INSTRUCTIONS = """You may call functions. They are, one a line:
{tools}
To call one, write <tool_call>{{"name": NAME, "arguments": OBJECT}}</tool_call>, once for each call."""
"""For templates that do not speak of tools."""


@dataclass(frozen=True)
class ToolCall:
    """A call that the model asks for; `arguments` is the JSON of an object."""

    name: str
    arguments: str
    id: str = field(default_factory=lambda: f"call_{uuid.uuid4().hex[:24]}")


def format_of(template: str) -> ToolFormat:
    """The format that a chat template writes calls in."""
    if NEMOTRON.opening in template:
        return NEMOTRON
    if HERMES.opening in template:
        return HERMES
    return WHOLE if "python_tag" in template or '"parameters"' in template else HERMES


ANSWER = "answer."  # no function is called so


def call_schema(tools: Sequence[Mapping[str, Any]], answer: Mapping[str, Any] | None = None) -> str:
    """The JSON schema of a call to one of the functions, `{"name", "parameters"}` each; or of an answer by its own."""
    places = [f"#/$defs/{tool['name']}" for tool in tools]
    calls = [
        {
            "type": "object",
            "properties": {"name": {"const": tool["name"]}, "arguments": {"$ref": place}},
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for tool, place in zip(tools, places, strict=True)
    ]
    parameters = [_moved(tool.get("parameters") or {"type": "object"}, place) for tool, place in zip(tools, places)]
    schemas = {tool["name"]: schema for tool, schema in zip(tools, parameters)}
    if answer is not None:
        calls.append({"$ref": f"#/$defs/{ANSWER}"})
        schemas[ANSWER] = _moved(answer, f"#/$defs/{ANSWER}")
    return json.dumps((calls[0] if len(calls) == 1 else {"anyOf": calls}) | {"$defs": schemas})


def _moved(schema: Any, place: str) -> Any:
    """A schema whose references into itself hold where it is part of another, at `place`."""
    if isinstance(schema, list):
        return [_moved(part, place) for part in schema]
    if not isinstance(schema, dict):
        return schema
    moved = {key: _moved(part, place) for key, part in schema.items()}
    reference = schema.get("$ref")
    if isinstance(reference, str) and reference.startswith("#"):
        moved["$ref"] = place + reference[1:]
    return moved


class ToolParser:
    """Splits the text of one reply into what is said and what is called: `push(piece)`, then `finish()`."""

    def __init__(self, form: ToolFormat, names: Collection[str], *, most: int | None = None) -> None:
        self._form, self._names, self._most = form, names, most
        self._waiting = ""
        self._inside = False
        self.calls = 0

    def push(self, text: str) -> Iterator[str | ToolCall]:
        self._waiting += text
        return self._whole() if self._form is WHOLE else self._marked()

    def finish(self) -> Iterator[str | ToolCall]:
        """The rest: a call whose end is missing counts if it is whole JSON."""
        text, self._waiting = self._waiting, ""
        mark = self._form.opening if self._inside else ""
        if self._form is WHOLE or self._inside:
            yield from self._read(text, mark + text)
        else:
            yield from self._said(text)

    def _whole(self) -> Iterator[str]:
        """Text that cannot be JSON passes at once, the rest waits for the end."""
        if self._waiting.strip() and self._waiting.lstrip()[0] not in "{[":
            text, self._waiting = self._waiting, ""
            yield from self._said(text)
            self._form = ToolFormat("\0", "\0")  # whatever comes is text

    def _marked(self) -> Iterator[str | ToolCall]:
        while True:
            mark = self._form.closing if self._inside else self._form.opening
            place = self._waiting.find(mark)
            if place < 0:
                break
            text, self._waiting = self._waiting[:place], self._waiting[place + len(mark) :]
            if self._inside:
                yield from self._read(text, self._form.opening + text + mark)
            else:
                yield from self._said(text)
            self._inside = not self._inside
        if not self._inside:
            held = _beginning(self._waiting, self._form.opening)
            text, self._waiting = self._waiting[: len(self._waiting) - held], self._waiting[len(self._waiting) - held :]
            yield from self._said(text)

    def _said(self, text: str) -> list[str]:
        return [text] if text and not (self.calls and not text.strip()) else []

    def _read(self, text: str, whole: str) -> Sequence[str | ToolCall]:
        """The calls in `text`, or `whole`, with its marks, as something said."""
        found = parse_calls(text, self._names)
        if not found:
            return self._said(whole)
        if self._most is not None:
            found = found[: self._most - self.calls]
        self.calls += len(found)
        return found


def parse_calls(text: str, names: Collection[str]) -> list[ToolCall]:
    """The calls that a text of JSON asks for, one object, a list or several; none unless all are of known functions."""
    calls = []
    for item in _values(text):
        name = item.get("name") if isinstance(item, dict) else None
        if not isinstance(name, str) or name not in names:
            return []
        arguments = item.get("arguments", item.get("parameters", {}))
        if isinstance(arguments, str):  # some models write the JSON as text
            calls.append(ToolCall(name, arguments))
        elif isinstance(arguments, dict):
            try:
                written = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
                written.encode()
                calls.append(ToolCall(name, written))
            except (ValueError, RecursionError):  # NaN, half a surrogate pair, or nested too deep
                return []
        else:
            return []
    return calls


def _values(text: str) -> list[Any]:
    """The JSON values that a text consists of, those of lists one by one; none when there is anything else."""
    found, rest = [], text.strip()
    while rest:
        try:
            value, end = json.JSONDecoder().raw_decode(rest)
        except (ValueError, RecursionError):
            return []
        found += value if isinstance(value, list) else [value]
        rest = rest[end:].lstrip(" \n\t;,")
    return found


def _beginning(text: str, mark: str) -> int:
    """Length of the longest end of `text` that begins `mark`."""
    return next((k for k in range(min(len(mark) - 1, len(text)), 0, -1) if text.endswith(mark[:k])), 0)
