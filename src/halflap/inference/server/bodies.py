"""What requests may contain, as pydantic models: the one source of checks, defaults and the OpenAPI document.

Names and meanings are those of OpenAI's API. Unknown names are refused, but for those inside messages, which clients
send back with whatever other servers put there; those that only OpenAI's own service can follow (`store`, `metadata`,
`service_tier`, ...) are accepted and change nothing. null means the default.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, GetCoreSchemaHandler, model_validator
from pydantic_core import CoreSchema, PydanticCustomError

MOST_CHOICES = 128
MOST_PROMPTS = 256
MOST_STOPS = 16
MOST_TOP = 20
MOST_WORDS = 4096  # to choose one of


class FirstWrong:
    """A list or dict whose check ends at the first that is wrong: a body could have a million of them."""

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return handler(source) | {"fail_fast": True}  # pyright: ignore[reportReturnType]


FIRST = FirstWrong()
Text = Annotated[str, Field(max_length=8 << 20)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
Ids = Annotated[list[TokenId], Field(min_length=1), FIRST]
Stop = Annotated[str, Field(max_length=1024)]
Bias = Annotated[float, Field(ge=-100, le=100)]
Name = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
Schema = dict[str, Any]
Rules = Annotated[str, Field(min_length=1, max_length=1 << 18)]
Words = Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1, max_length=MOST_WORDS), FIRST]
BiasedId = Annotated[str, Field(pattern=r"^[0-9]{1,9}$")]


class Body(BaseModel):
    # Names that are not known are refused below, by the first of them: pydantic would list all.
    model_config = ConfigDict(
        extra="allow",
        strict=True,
        allow_inf_nan=False,
        frozen=True,
        json_schema_extra={"additionalProperties": False},
    )

    @model_validator(mode="after")
    def _known(self) -> Self:
        if self.__pydantic_extra__:
            name = next(iter(self.__pydantic_extra__))
            raise PydanticCustomError("extra_forbidden", "no such name", {"name": name})
        return self


class StreamOptions(Body):
    """What a stream brings beside the text."""

    include_usage: bool | None = Field(None, description="Send a last chunk with the usage of the whole request.")
    continuous_usage_stats: bool | None = Field(
        None, description="With include_usage: every chunk has the usage of its choice so far. vLLM's."
    )
    include_obfuscation: bool | None = Field(None, description="Accepted; nothing is added to chunks.")


class PlainFormat(Body):
    type: Literal["text", "json_object"]


class SchemaBody(Body):
    name: Name
    description: str | None = None
    schema_: Schema = Field(default_factory=lambda: {"type": "object"}, alias="schema")
    strict: bool | None = None


class SchemaFormat(Body):
    type: Literal["json_schema"]
    json_schema: SchemaBody


class StructuredOutputs(Body):
    """What a reply must match, as vLLM has it: one of these."""

    json_: Schema | str | None = Field(None, alias="json", description="A JSON schema, or its text.")
    regex: Rules | None = Field(None, description="A regular expression of Rust's crate regex.")
    choice: Words | None = Field(None, description="One of these texts.")
    grammar: Rules | None = Field(None, description="A grammar for Lark, or GBNF.")
    json_object: bool | None = Field(None, description="Any JSON object.")


class SamplingBody(Body):
    """What both kinds of text share."""

    model: str | None = Field(None, description="The served model's id.")
    stream: bool | None = Field(None, description="Send server-sent events while the text is written.")
    stream_options: StreamOptions | None = None
    n: int | None = Field(None, ge=1, le=MOST_CHOICES, description="Choices; 1 when not given.")
    temperature: float | None = Field(None, ge=0, le=100, description="0 takes the likeliest token; 1 when not given.")
    top_p: float | None = Field(None, ge=0, le=1, description="1 when not given.")
    top_k: int | None = Field(
        None, ge=-1, lt=2**31, description="0, the default, and -1 keep every token. Ours, not OpenAI's."
    )
    min_p: float | None = Field(None, ge=0, lt=1, description="Least share of the likeliest token's probability. Ours.")
    repetition_penalty: float | None = Field(None, gt=0, le=100, description="1 changes nothing. Ours.")
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: Annotated[dict[BiasedId, Bias], FIRST] | None = Field(
        None, description="Token id, as text, to what is added to its logit."
    )
    seed: int | None = Field(None, ge=-(2**63), lt=2**63, description="The same seed gives the same reply.")
    stop: Stop | Annotated[list[Stop], Field(max_length=MOST_STOPS), FIRST] | None = None
    response_format: Annotated[PlainFormat | SchemaFormat, Field(discriminator="type")] | None = None
    structured_outputs: StructuredOutputs | None = Field(None, description="What the reply must match. vLLM's.")
    guided_json: Schema | str | None = Field(None, description="`structured_outputs.json`; vLLM's older name.")
    guided_regex: Rules | None = Field(None, description="`structured_outputs.regex`, likewise.")
    guided_choice: Words | None = Field(None, description="`structured_outputs.choice`, likewise.")
    guided_grammar: Rules | None = Field(None, description="`structured_outputs.grammar`, likewise.")
    ignore_eos: bool | None = Field(None, description="Go on after the end token. vLLM's.")
    stop_token_ids: Annotated[list[TokenId], Field(max_length=MOST_STOPS), FIRST] | None = Field(
        None, description="Tokens that end a reply, beside the end tokens. vLLM's."
    )
    min_tokens: int | None = Field(None, ge=0, lt=2**31, description="New tokens before one may end the reply. vLLM's.")
    user: str | None = Field(None, description="Accepted; changes nothing.")


class CompletionBody(SamplingBody):
    """`POST /v1/completions`."""

    prompt: (
        Text
        | Annotated[list[Text], Field(min_length=1, max_length=MOST_PROMPTS), FIRST]
        | Ids
        | Annotated[list[Ids], Field(min_length=1, max_length=MOST_PROMPTS), FIRST]
    ) = Field(description="A text, several, token ids, or several lists of those.")
    max_tokens: int | None = Field(None, ge=0, lt=2**31, description="New tokens at most; 16 when not given.")
    logprobs: int | None = Field(None, ge=0, le=MOST_TOP, description="How many of the likeliest tokens to report.")
    echo: bool | None = Field(None, description="Begin the text with the prompt; `logprobs` then covers it, too.")
    best_of: int | None = Field(None, ge=1, le=MOST_CHOICES, description="Only the same as `n`.")
    suffix: Literal[""] | None = Field(None, description="Not supported: only null and nothing.")


class ScoreBody(Body):
    """`POST /v1/score`: how likely continuations of a context are."""

    model: str | None = Field(None, description="The served model's id.")
    context: Text | Annotated[list[TokenId], FIRST] = Field(description="A text, or token ids; may be empty.")
    continuations: Annotated[list[Text | Ids], Field(min_length=1, max_length=MOST_PROMPTS), FIRST]
    token_log_probs: bool | None = Field(None, description="Report every token's log-probability, too.")
    user: str | None = Field(None, description="Accepted; changes nothing.")
