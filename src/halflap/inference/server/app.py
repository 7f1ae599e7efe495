"""The endpoints, each a body checked, asked of the engine, and shown as a reply."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from halflap.inference.server import asked, scores
from halflap.inference.server.bodies import CompletionBody, ScoreBody
from halflap.inference.server.bodies_chat import ChatBody
from halflap.inference.server.errors import TYPES, ApiError
from halflap.inference.server.objects import ChatReply, CompletionReply
from halflap.inference.server.openapi import document
from halflap.inference.server.scores import ScoreReply
from halflap.inference.server.service import Service

POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; base-uri 'none'"
)


def application(service: Service) -> Starlette:
    """The ASGI application of a service."""
    name = service.settings.name
    page = (Path(__file__).parent / "page.html").read_text(encoding="utf-8")
    described = document(service.settings)

    async def completions(request: Request) -> Response:
        wanted = await service.prepared(asked.completion, await service.body(request, CompletionBody))
        return await service.answer(request, wanted, CompletionReply(wanted, name))

    async def chat(request: Request) -> Response:
        wanted = await service.prepared(asked.chat, await service.body(request, ChatBody))
        return await service.answer(request, wanted, ChatReply(wanted, name))

    async def score(request: Request) -> Response:
        body = await service.body(request, ScoreBody)
        wanted, starts = await service.prepared(scores.score, body)
        return await service.answer(request, wanted, ScoreReply(starts, name, bool(body.token_log_probs)))

    async def models(request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [_model(service)]})

    async def model(request: Request) -> Response:
        service.check_model(request.path_params["name"])
        return JSONResponse(_model(service))

    async def health(request: Request) -> Response:
        if service.stopping:
            return JSONResponse({"status": "stopping"}, 503)
        return JSONResponse({"status": "ok"})

    async def metrics(request: Request) -> Response:
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")

    async def openapi(request: Request) -> Response:
        return JSONResponse(described)

    async def chat_page(request: Request) -> Response:
        return HTMLResponse(page, headers={"Content-Security-Policy": POLICY, "X-Content-Type-Options": "nosniff"})

    guarded = [
        ("/v1/chat/completions", "POST", chat),
        ("/v1/completions", "POST", completions),
        ("/v1/score", "POST", score),
        ("/v1/models", "GET", models),
        ("/v1/models/{name:path}", "GET", model),
    ]
    open_to_all = [("/health", health), ("/metrics", metrics), ("/openapi.json", openapi), ("/", chat_page)]
    routes = [Route(path, service.guarded(path, answer), methods=[method]) for path, method, answer in guarded]
    routes += [Route(path, answer, methods=["GET"]) for path, answer in open_to_all]
    handlers: dict[Any, Callable[..., Awaitable[Response]]] = {HTTPException: _refused}
    return Starlette(routes=routes, exception_handlers=handlers)


def _model(service: Service) -> dict[str, Any]:
    about = {"id": service.settings.name, "object": "model", "created": service.started, "owned_by": "halflap"}
    return about | {"max_model_len": service.settings.max_context}


async def _refused(request: Request, error: HTTPException) -> Response:
    """Paths and methods that are not there."""
    status = error.status_code if error.status_code in TYPES else 400
    if status == 405:
        allowed = (error.headers or {}).get("Allow", "")
        message = f"{request.url.path} has no {request.method}; allowed are {allowed}: use one of them"
    else:
        message = f"there is no {request.url.path[:100]!r}; /openapi.json lists what there is"
    return ApiError(status, message, code="not_found" if status == 404 else None, headers=error.headers).response()
