"""What every server has beside the answers to requests: models, health, metrics, the document, the chat page."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from halflap.inference.server.errors import TYPES, ApiError
from halflap.inference.server.gate import Endpoint, Gate

POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; base-uri 'none'"
)


def site(
    gate: Gate,
    posts: Mapping[str, Endpoint],
    *,
    health: Callable[[], dict[str, Any]],
    metrics: Callable[[], Awaitable[bytes]],
    described: dict[str, Any],
) -> Starlette:
    """The ASGI application that answers `posts` behind the gate, and all the rest.

    health() has a `status`, which is ok or why nothing is answered; metrics() is Prometheus' text; described is the
    OpenAPI document.
    """
    page = (Path(__file__).parent / "page.html").read_text(encoding="utf-8")

    async def models(request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [_model(gate)]})

    async def model(request: Request) -> Response:
        gate.check_model(request.path_params["name"])
        return JSONResponse(_model(gate))

    async def healthy(request: Request) -> Response:
        found = health()
        return JSONResponse(found, 200 if found["status"] == "ok" else 503)

    async def measured(request: Request) -> Response:
        return Response(await metrics(), media_type="text/plain; version=0.0.4")

    async def openapi(request: Request) -> Response:
        return JSONResponse(described)

    async def chat_page(request: Request) -> Response:
        return HTMLResponse(page, headers={"Content-Security-Policy": POLICY, "X-Content-Type-Options": "nosniff"})

    guarded = [(path, "POST", answer) for path, answer in posts.items()]
    guarded += [("/v1/models", "GET", models), ("/v1/models/{name:path}", "GET", model)]
    open_to_all = [("/health", healthy), ("/metrics", measured), ("/openapi.json", openapi), ("/", chat_page)]
    routes = [Route(path, gate.guarded(path, answer), methods=[method]) for path, method, answer in guarded]
    routes += [Route(path, answer, methods=["GET"]) for path, answer in open_to_all]
    handlers: dict[Any, Callable[..., Awaitable[Response]]] = {HTTPException: _refused}
    return Starlette(routes=routes, exception_handlers=handlers, middleware=_other_pages(gate.settings.origins))


def _other_pages(origins: Sequence[str]) -> list[Middleware]:
    """What tells browsers that pages of these origins may ask."""
    if not origins:
        return []
    return [
        Middleware(
            CORSMiddleware,
            allow_origins=list(origins),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["Retry-After"],
        )
    ]


def _model(gate: Gate) -> dict[str, Any]:
    about = {"id": gate.settings.name, "object": "model", "created": gate.started, "owned_by": "halflap"}
    return about | {"max_model_len": gate.settings.max_context}


async def _refused(request: Request, error: HTTPException) -> Response:
    """Paths and methods that are not there."""
    status = error.status_code if error.status_code in TYPES else 400
    if status == 405:
        allowed = (error.headers or {}).get("Allow", "")
        message = f"{request.scope['path']} has no {request.method}; allowed are {allowed}: use one of them"
    else:
        message = f"there is no {request.scope['path'][:100]!r}; /openapi.json lists what there is"
    return ApiError(status, message, code="not_found" if status == 404 else None, headers=error.headers).response()
