"""What a chat request may contain: messages and tools."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, model_validator

from halflap.inference.server.bodies import FIRST, MOST_TOP, Body, Name, SamplingBody, Schema, Text

MOST_MESSAGES = 10_000
MOST_TOOLS = 128


class SentBack(Body):
    """What clients send back as they got it, here or elsewhere: names that are not known change nothing."""

    model_config = ConfigDict(extra="ignore", json_schema_extra=None)


class TextPart(SentBack):
    type: Literal["text"]
    text: Text


class RefusalPart(SentBack):
    type: Literal["refusal"]
    refusal: Text

    @property
    def text(self) -> str:
        return self.refusal


Part = Annotated[TextPart | RefusalPart, Field(discriminator="type")]


class CalledFunction(SentBack):
    name: Name
    arguments: str = Field(description="JSON of an object.")


class ToolCallBody(SentBack):
    id: str
    type: Literal["function"]
    function: CalledFunction

    def plain(self) -> dict[str, Any]:
        """As templates know it: the arguments are an object."""
        function = {"name": self.function.name, "arguments": _object(self.function.arguments)}
        return {"id": self.id, "type": self.type, "function": function}


class MessageBody(SentBack):
    """One turn."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | Annotated[list[Part], FIRST] | None = None
    name: str | None = None
    tool_calls: Annotated[list[ToolCallBody], FIRST] | None = None
    tool_call_id: str | None = None
    audio: None = None  # it and the next would be missed
    function_call: None = None

    @model_validator(mode="after")
    def _says_something(self) -> MessageBody:
        if self.content is None and self.role != "assistant":
            raise ValueError(f"a message of {self.role} has a content, which may be empty")
        return self

    def plain(self) -> dict[str, Any]:
        """The message as templates know it: content is text, the arguments of calls are objects."""
        content = self.content if self.content is not None else ""
        if not isinstance(content, str):
            content = "".join(part.text for part in content)
        found: dict[str, Any] = {"role": "system" if self.role == "developer" else self.role, "content": content}
        found |= {name: value for name in ("name", "tool_call_id") if (value := getattr(self, name)) is not None}
        if self.tool_calls:
            found["tool_calls"] = [call.plain() for call in self.tool_calls]
        return found


def _object(arguments: str) -> Any:
    try:
        return json.loads(arguments)
    except (ValueError, RecursionError):
        return arguments


class FunctionBody(Body):
    name: Name
    description: str | None = None
    parameters: Schema | None = None
    strict: bool | None = None


class ToolBody(Body):
    type: Literal["function"]
    function: FunctionBody


class NamedFunction(Body):
    name: Name


class NamedTool(Body):
    type: Literal["function"]
    function: NamedFunction


class ChatBody(SamplingBody):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[MessageBody], Field(min_length=1, max_length=MOST_MESSAGES), FIRST]
    max_tokens: int | None = Field(None, ge=1, lt=2**31, description="The older name of max_completion_tokens.")
    max_completion_tokens: int | None = Field(None, ge=1, lt=2**31, description="All that fit when not given.")
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MOST_TOP)
    tools: Annotated[list[ToolBody], Field(max_length=MOST_TOOLS), FIRST] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = Field(None, description="false keeps the first call only.")
    store: bool | None = Field(None, description="Accepted; changes nothing.")
    metadata: Annotated[dict[str, str], FIRST] | None = Field(None, description="Accepted; changes nothing.")
    service_tier: Literal["auto", "default", "flex", "priority", "scale"] | None = Field(
        None, description="Accepted; changes nothing."
    )
    safety_identifier: str | None = Field(None, description="Accepted; changes nothing.")
    prompt_cache_key: str | None = Field(None, description="Accepted; changes nothing.")
