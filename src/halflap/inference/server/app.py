"""The endpoints, each a body checked, asked of the engine, and shown as a reply."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response

from halflap.inference.server import asked, scores
from halflap.inference.server.asked import Asked
from halflap.inference.server.bodies import CompletionBody, ScoreBody
from halflap.inference.server.bodies_chat import ChatBody
from halflap.inference.server.objects import ChatReply, CompletionReply, Replies
from halflap.inference.server.openapi import document
from halflap.inference.server.scores import ScoreReply
from halflap.inference.server.service import Prepare, Service
from halflap.inference.server.site import site


def application(service: Service) -> Starlette:
    """The ASGI application of a service."""
    name, spell = service.settings.name, service.prompts.tokenizer.token_bytes

    def writing(make: Callable[..., Asked], reply: type[CompletionReply | ChatReply], body: Any) -> Prepare:
        def prepare(go_on: Callable[[], None]) -> tuple[Asked, Replies]:
            wanted = make(body, service.prompts, service.settings)
            return wanted, reply(wanted, name, spell)

        return prepare

    async def completions(request: Request) -> Response:
        body = await service.body(request, CompletionBody)
        return await service.answer(request, asked.choices(body), writing(asked.completion, CompletionReply, body))

    async def chat(request: Request) -> Response:
        body = await service.body(request, ChatBody)
        return await service.answer(request, body.n or 1, writing(asked.chat, ChatReply, body))

    async def score(request: Request) -> Response:
        body = await service.body(request, ScoreBody)

        def prepare(go_on: Callable[[], None]) -> tuple[Asked, Replies]:
            wanted, order = scores.score(body, service.prompts, service.settings, go_on)
            return wanted, ScoreReply(order, name, bool(body.token_log_probs))

        return await service.answer(request, len(body.continuations), prepare)

    def health() -> dict[str, Any]:
        return {"status": "stopping" if service.stopping else "ok"}

    async def metrics() -> bytes:
        return service.metrics.text()

    posts = {"/v1/chat/completions": chat, "/v1/completions": completions, "/v1/score": score}
    return site(service, posts, health=health, metrics=metrics, described=document(service.settings))
