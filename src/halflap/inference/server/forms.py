"""What a reply must match: all ways to ask for it, as one grammar, and with tools the format of calls."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from halflap.inference.requests import Grammar
from halflap.inference.server.bodies import PlainFormat, SamplingBody, SchemaFormat, StructuredOutputs
from halflap.inference.server.bodies_chat import ChatBody, NamedTool
from halflap.inference.server.errors import wrong
from halflap.inference.server.tools import WHOLE, ToolFormat, call_schema

OBJECT = Grammar("json_schema", '{"type": "object"}')


def grammar_of(body: SamplingBody) -> Grammar | None:
    """What the reply must match. Raises ApiError when a body says it in two ways, or in none that can be read."""
    found = list(_ways(body))
    if len(found) > 1:
        (first, _), (second, _) = found[:2]
        raise wrong(second, f"{first} and {second} both say what the reply must match; leave one of them out")
    return found[0][1] if found else None


def answer_form(body: ChatBody, written: ToolFormat) -> tuple[Grammar | None, ToolFormat | None]:
    """What the reply must match, and the format that calls are looked for in: as `written` where nothing enforces one.

    Raises ApiError for what cannot be had together.
    """
    functions = [tool.function.model_dump(exclude_none=True) for tool in body.tools or ()]
    choice, grammar = body.tool_choice, grammar_of(body)
    if not functions:
        if choice not in (None, "none", "auto"):
            raise wrong("tool_choice", "tool_choice asks for a call and there are no tools; give tools")
        return grammar, None
    if choice == "none":
        return grammar, None
    if choice in (None, "auto"):
        if grammar is None:
            return None, written
        return Grammar("json_schema", call_schema(functions, _schema_beside_tools(body, grammar))), WHOLE
    if isinstance(choice, NamedTool):
        wanted = choice.function.name
        functions = [function for function in functions if function["name"] == wanted]
        if not functions:
            raise wrong("tool_choice", f"tool_choice names {wanted!r}, which is not among the tools; name one of them")
    return Grammar("json_schema", call_schema(functions)), WHOLE


def _schema_beside_tools(body: ChatBody, grammar: Grammar) -> Any:
    if grammar.kind != "json_schema":
        ((name, _),) = _ways(body)
        raise wrong(
            name, f"{name} leaves no room for a call; leave the tools out, set tool_choice to none, or use JSON"
        )
    return json.loads(grammar.text)


def _ways(body: SamplingBody) -> Iterator[tuple[str, Grammar]]:
    """What a body says, each under its name."""
    form, outputs = body.response_format, body.structured_outputs or StructuredOutputs()  # pyright: ignore
    if isinstance(form, PlainFormat) and form.type == "json_object":
        yield "response_format", OBJECT
    elif isinstance(form, SchemaFormat):
        yield "response_format", Grammar("json_schema", json.dumps(form.json_schema.schema_))
    if outputs.json_object:
        yield "structured_outputs.json_object", OBJECT
    for name, schema in (("structured_outputs.json", outputs.json_), ("guided_json", body.guided_json)):
        if schema is not None:
            yield name, _json(name, schema)
    for name, regex in (("structured_outputs.regex", outputs.regex), ("guided_regex", body.guided_regex)):
        if regex is not None:
            yield name, Grammar("regex", regex)
    for name, words in (("structured_outputs.choice", outputs.choice), ("guided_choice", body.guided_choice)):
        if words is not None:
            yield name, Grammar("lark", "start: " + " | ".join(json.dumps(word) for word in words))
    for name, rules in (("structured_outputs.grammar", outputs.grammar), ("guided_grammar", body.guided_grammar)):
        if rules is not None:
            yield name, Grammar("lark", rules)


def _json(name: str, schema: Any) -> Grammar:
    """Of a schema, or of its text."""
    if isinstance(schema, str):
        try:
            schema = json.loads(schema)
        except (ValueError, RecursionError) as error:
            raise wrong(name, f"{name} is no JSON ({error}); give a schema, as an object or as its text") from None
    return Grammar("json_schema", json.dumps(schema))
