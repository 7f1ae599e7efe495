"""A wrong body is refused by its first wrong element, for about the cost of reading it, however much of it is wrong."""

from __future__ import annotations

import json
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from halflap.inference.server.bodies import CompletionBody, ScoreBody
from halflap.inference.server.bodies_chat import ChatBody
from halflap.inference.server.errors import invalid

MANY = 20_000
FEW = 8  # errors, of the members of a union or the fields of one object
SAID = {"role": "user", "content": "a"}


@pytest.mark.parametrize(
    ("kind", "field", "value", "place", "said"),
    [
        (CompletionBody, "prompt", [-1] * MANY, "prompt[0]", "greater than or equal to 0"),
        (CompletionBody, "prompt", [1] * MANY + [-1] * MANY, f"prompt[{MANY}]", "is -1; allowed: greater than"),
        (CompletionBody, "prompt", ["a"] + [1] * MANY, "prompt[1]", "is 1; allowed: a valid string;"),
        (CompletionBody, "prompt", [[1], [-1] * MANY], "prompt[1][0]", "is -1; allowed: greater than"),
        (CompletionBody, "prompt", ["a"] * MANY, "prompt", "at most 256 items"),
        (CompletionBody, "prompt", [[1]] * MANY, "prompt", "at most 256 items"),
        (CompletionBody, "prompt", dict.fromkeys(map(str, range(MANY))), "prompt", "is {'0': None, '1': None, "),
        (CompletionBody, "stop", ["a"] + [1] * MANY, "stop[1]", "a valid string"),
        (CompletionBody, "stop_token_ids", [-1] * MANY, "stop_token_ids[0]", "greater than or equal to 0"),
        (CompletionBody, "guided_choice", [1] * MANY, "guided_choice[0]", "a valid string"),
        (CompletionBody, "logit_bias", {f"k{i}": [] for i in range(MANY)}, "logit_bias.k0", "pattern"),
        (ScoreBody, "continuations", ["a", [1, -1] * MANY], "continuations[1][1]", "greater than or equal to 0"),
        (ScoreBody, "context", [-1] * MANY, "context[0]", "greater than or equal to 0"),
        (ChatBody, "messages", [{}] * MANY, "messages[0].role", "missing"),
        (ChatBody, "messages", [{**SAID, "content": [1] * MANY}], "messages[0].content[0]", "an object"),
        (ChatBody, "messages", [{**SAID, "tool_calls": [{}] * MANY}], "messages[0].tool_calls[0].id", "missing"),
        (ChatBody, "tools", [{}] * MANY, "tools[0].type", "missing"),
        (ChatBody, "metadata", {f"k{i}": 1 for i in range(MANY)}, "metadata.k0", "a valid string"),
    ],
)
def test_the_first_wrong_element_is_named(kind: type[BaseModel], field: str, value: Any, place: str, said: str) -> None:
    needed: dict[Any, dict[str, Any]] = {
        CompletionBody: {"prompt": "a"},
        ScoreBody: {"context": "a", "continuations": ["b"]},
        ChatBody: {"messages": [SAID]},
    }
    error = refused(kind, needed[kind] | {field: value})
    assert error.error_count() <= FEW
    told = invalid(error)
    assert told.param == place and said in told.message and len(told.message) < 300


@pytest.mark.parametrize(
    ("field", "place"), [(None, ""), ("stream_options", "stream_options."), ("response_format", "response_format.")]
)
def test_of_many_unknown_names_the_first_is_named(field: str | None, place: str) -> None:
    extras: dict[str, Any] = {f"k{i}": 1 for i in range(MANY)}
    body = {field: extras | {"type": "text"} if field == "response_format" else extras} if field else extras
    error = refused(CompletionBody, {"prompt": "a"} | body)
    assert error.error_count() == 1
    assert invalid(error).message == f"unrecognized request argument: {place}k0; remove it"


def refused(kind: type[BaseModel], body: dict[str, Any]) -> ValidationError:
    with pytest.raises(ValidationError) as caught:
        kind.model_validate_json(json.dumps(body))
    return caught.value
