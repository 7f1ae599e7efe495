"""What goes wrong with a request, as an HTTP status and OpenAI's error object."""

from __future__ import annotations

import itertools
import reprlib
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError
from starlette.responses import JSONResponse

TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "invalid_request_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    429: "rate_limit_error",
    499: "cancelled",
    500: "server_error",
    503: "service_unavailable_error",
    504: "timeout_error",
}
MEANINGS = {
    400: "The request is wrong; the message says what.",
    401: "The API key is missing or wrong.",
    404: "There is no such model or path.",
    405: "The path has no such method.",
    408: "The body did not arrive in time.",
    413: "The body is too large.",
    415: "The body is not application/json.",
    429: "Too many requests wait; Retry-After says when to come again.",
    500: "The server failed.",
    503: "The server is stopping.",
    504: "The reply was not finished in time.",
}
_TYPE_NAMES = ("str", "int", "float", "bool", "none")  # as pydantic calls members of unions
_TELLING = {"literal_error": 0, "union_tag_invalid": 0, "union_tag_not_found": 0, "extra_forbidden": 1, "too_long": 1}


class ApiError(Exception):
    """Ends a request with a status and `{"error": {"message", "type", "param", "code"}}`."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.headers = status, message, param, code, headers

    def body(self) -> dict[str, Any]:
        about = {"message": self.message, "type": TYPES[self.status], "param": self.param, "code": self.code}
        return {"error": about}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body(), self.status, dict(self.headers or {}))


def wrong(param: str, message: str) -> ApiError:
    """A field's value cannot be followed."""
    return ApiError(400, message, param=param, code="invalid_value")


class HungUp(Exception):
    """The client has gone; there is nobody to answer."""


def invalid(error: ValidationError) -> ApiError:
    """What pydantic found, as one sentence about the field that tells most."""
    found = error.errors(include_url=False)
    # A field of several types fails once for each, at its first wrong element: a wrong word, a name or an element too
    # much, then what is deepest and furthest, say most.
    first = min(found, key=lambda e: (_TELLING.get(e["type"], 2), -len(e["loc"]), *_furthest(e["loc"])))
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body is not JSON ({_said(first)}); send one JSON object", code="invalid_json")
    place = _place(first["loc"])
    if first["type"] == "union_tag_invalid":  # of what there is in several kinds, which `type` tells
        about = first.get("ctx", {})
        message = f"{place}.type is {str(about.get('tag'))[:60]!r}; allowed: {about.get('expected_tags')}; change it"
        return ApiError(400, message, param=f"{place}.type", code="invalid_value")
    if first["type"] == "union_tag_not_found":
        return ApiError(400, f"{place}.type is missing; add it", param=f"{place}.type", code="missing_parameter")
    if first["type"] == "extra_forbidden":
        place = _place(first["loc"], first.get("ctx", {})["name"])
        message = f"unrecognized request argument: {place}; remove it"
        return ApiError(400, message, param=place, code="unknown_parameter")
    if first["type"] == "missing":
        return ApiError(400, f"{place} is missing; add it", param=place, code="missing_parameter")
    reasons = dict.fromkeys(_said(e) for e in found if _place(e["loc"]) == place)
    value = _SHORT.repr(first["input"])
    shown = value if len(value) <= 60 else value[:57] + "..."
    message = f"{place or 'the body'} is {shown}; allowed: {' or '.join(list(reasons)[:4])}; change it"
    return ApiError(400, message, param=place or None, code="invalid_value")


class _Short(reprlib.Repr):
    """The beginning of a value, which may be as large as the body."""

    def repr_dict(self, x: dict[Any, Any], level: int) -> str:
        return super().repr_dict(dict(itertools.islice(x.items(), self.maxdict + 1)), level)  # it would sort all


_SHORT = _Short()
_SHORT.maxstring = 200


def _said(error: Any) -> str:
    text = error["msg"].removeprefix("Invalid JSON: ").removeprefix("Value error, ").removeprefix("Input should be ")
    return " ".join(text.split())


def _furthest(loc: tuple[int | str, ...]) -> tuple[int, ...]:
    return tuple(-part for part in loc if isinstance(part, int))


def _untagged(loc: tuple[int | str, ...]) -> tuple[int | str, ...]:
    """Without the `type` by which pydantic calls members of unions that are told apart by it."""
    if loc[:1] == ("response_format",):
        return loc[:1] + loc[2:]
    tags = {
        place + 2 for place, part in enumerate(loc) if isinstance(part, str) and part.startswith("list[tagged-union")
    }
    return tuple(part for place, part in enumerate(loc) if place not in tags)


def _is_field(part: str) -> bool:
    return part.isidentifier() and part not in _TYPE_NAMES and not part[0].isupper()


def _place(loc: tuple[int | str, ...], name: str = "") -> str:
    """messages[0].content; what pydantic calls the members of unions, no names of fields, is left out. `name`: of a
    field that there should not be, whatever it is called."""
    text = ""
    for part in _untagged(loc):
        if isinstance(part, int):
            text += f"[{part}]"
        elif _is_field(part):
            text += f".{part}" if text else part
    return f"{text}.{name}" if text and name else text + name
