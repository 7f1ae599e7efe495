"""The OpenAPI document: paths, the schemas of bodies and replies, and every status."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

import halflap
from halflap.inference.server.bodies import CompletionBody, ScoreBody
from halflap.inference.server.bodies_chat import ChatBody
from halflap.inference.server.config import ServerSettings
from halflap.inference.server.errors import MEANINGS

Schema = dict[str, Any]
TEXT, NUMBER, INTEGER, BOOLEAN = {"type": "string"}, {"type": "number"}, {"type": "integer"}, {"type": "boolean"}


def _null(schema: Schema) -> Schema:
    return {"anyOf": [schema, {"type": "null"}]}


def _list(items: Schema) -> Schema:
    return {"type": "array", "items": items}


def _object(**properties: Schema) -> Schema:
    return {"type": "object", "properties": properties, "required": list(properties)}


def _ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


REASON = _null({"type": "string", "enum": ["stop", "length", "tool_calls"]})
USAGE = _object(
    prompt_tokens=INTEGER,
    completion_tokens=INTEGER,
    total_tokens=INTEGER,
    prompt_tokens_details=_object(cached_tokens=INTEGER),
)
MODEL = _object(id=TEXT, object={"const": "model"}, created=INTEGER, owned_by=TEXT, max_model_len=INTEGER)
SCORED = _object(id=INTEGER, token=TEXT, log_prob=_null(NUMBER))
REPLIES: dict[str, Schema] = {
    "Error": _object(error=_object(message=TEXT, type=TEXT, param=_null(TEXT), code=_null(TEXT))),
    "Usage": USAGE,
    "Model": MODEL,
    "Models": _object(object={"const": "list"}, data=_list(_ref("Model"))),
    "Health": _object(status={"type": "string", "enum": ["ok", "stopping", "unavailable"]}),
    "Completion": _object(
        id=TEXT,
        object={"const": "text_completion"},
        created=INTEGER,
        model=TEXT,
        choices=_list(_object(text=TEXT, index=INTEGER, logprobs=_null({"type": "object"}), finish_reason=REASON)),
        usage=_ref("Usage"),
    ),
    "ChatCompletion": _object(
        id=TEXT,
        object={"const": "chat.completion"},
        created=INTEGER,
        model=TEXT,
        choices=_list(
            _object(
                index=INTEGER,
                message=_object(role={"const": "assistant"}, content=_null(TEXT)),
                logprobs=_null({"type": "object"}),
                finish_reason=REASON,
            )
        ),
        usage=_ref("Usage"),
    ),
    "Score": _object(
        id=TEXT,
        object={"const": "halflap.score"},
        model=TEXT,
        scores=_list(
            {
                **_object(index=INTEGER, log_prob=NUMBER, tokens=INTEGER, greedy=BOOLEAN),
                "description": "token_log_probs beside, if asked for.",
            }
        ),
        usage=_ref("Usage"),
    ),
}
POSTS: dict[str, tuple[str, type[BaseModel], str, bool]] = {
    "/v1/chat/completions": ("Reply to a conversation", ChatBody, "ChatCompletion", True),
    "/v1/completions": ("Continue texts", CompletionBody, "Completion", True),
    "/v1/score": ("Log-probabilities of continuations", ScoreBody, "Score", False),
}
GETS: dict[str, tuple[str, str, bool]] = {
    "/v1/models": ("The served model, as a list", "Models", True),
    "/health": ("Whether requests are taken", "Health", False),
}


def document(settings: ServerSettings, posts: Collection[str] = POSTS) -> Schema:
    """OpenAPI 3.1 of a server with these settings that answers the paths `posts`."""
    _, defined = models_json_schema(
        [(kind, "validation") for _, kind, _, _ in POSTS.values()], ref_template="#/components/schemas/{model}"
    )
    components: Schema = {"schemas": defined["$defs"] | REPLIES}
    found: Schema = {
        "openapi": "3.1.0",
        "info": {"title": "halflap", "version": halflap.__version__, "description": f"Serves {settings.name}."},
        "paths": {**_posts(posts), **_gets()},
        "components": components,
    }
    if settings.keys:
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        for path, methods in found["paths"].items():
            for operation in methods.values() if path.startswith("/v1/") else ():
                operation["security"] = [{"key": []}]
    return found


def _posts(answered: Collection[str]) -> Schema:
    paths: Schema = {}
    for path in answered:
        summary, body, reply, streams = POSTS[path]
        content: Schema = {"application/json": {"schema": _ref(reply)}}
        if streams:
            content["text/event-stream"] = {"schema": TEXT}
        operation = {
            "summary": summary,
            "operationId": reply,
            "requestBody": {"required": True, "content": {"application/json": {"schema": _ref(body.__name__)}}},
            "responses": {"200": {"description": "The reply.", "content": content}, **_errors(*MEANINGS)},
        }
        paths[path] = {"post": operation}
    return paths


def _gets() -> Schema:
    paths: Schema = {}
    for path, (summary, reply, guarded) in GETS.items():
        answers: Schema = {"200": _answer("application/json", _ref(reply))}
        answers |= _errors(401, 405, 500, 503) if guarded else {"503": _answer("application/json", _ref(reply))}
        paths[path] = {"get": {"summary": summary, "operationId": reply, "responses": answers | _errors(405)}}
    named = {"200": _answer("application/json", _ref("Model")), **_errors(401, 404, 405, 500, 503)}
    parameter = {"name": "name", "in": "path", "required": True, "schema": TEXT}
    about = {"summary": "The model of this id", "operationId": "Model", "parameters": [parameter], "responses": named}
    paths["/v1/models/{name}"] = {"get": about}
    for path, kind in (("/metrics", "text/plain"), ("/", "text/html")):
        answers = {"200": _answer(kind, TEXT), **_errors(405)}
        paths[path] = {"get": {"summary": "Prometheus" if path != "/" else "A chat page", "responses": answers}}
    return paths


def _answer(kind: str, schema: Schema) -> Schema:
    return {"description": "The answer.", "content": {kind: {"schema": schema}}}


def _errors(*statuses: int) -> Schema:
    """499 is for logs: nobody is there to receive it."""
    content = {"application/json": {"schema": _ref("Error")}}
    return {str(s): {"description": MEANINGS[s], "content": content} for s in statuses if s in MEANINGS}
