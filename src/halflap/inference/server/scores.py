"""`/v1/score`: how likely continuations of a context are, for whoever ranks answers instead of writing them."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping
from typing import Any

from halflap.inference.requests import Piece, Request
from halflap.inference.server.asked import Asked
from halflap.inference.server.bodies import ScoreBody
from halflap.inference.server.config import ServerSettings
from halflap.inference.server.errors import ApiError
from halflap.inference.server.prompts import Prompts


def score(
    body: ScoreBody, prompts: Prompts, settings: ServerSettings, go_on: Callable[[], None]
) -> tuple[Asked, dict[int, int]]:
    """One request for all continuations of the same context, and which of them each choice is.

    Contexts differ where the first token of a text that follows takes in their end. A context is encoded as often as it
    is continued; go_on() between them may raise. Raises ApiError and HalflapError.
    """
    found: dict[tuple[int, ...], list[tuple[int, tuple[int, ...]]]] = {}
    for index, continuation in enumerate(body.continuations):
        go_on()
        ids, start = prompts.continuation(body.context, continuation, settings.max_context)
        if len(ids) > settings.max_context:
            message = (
                f"the context and continuation {index} have {len(ids)} tokens together, and the context of the model "
                f"has {settings.max_context}: shorten them"
            )
            raise ApiError(400, message, param="continuations", code="context_length_exceeded")
        found.setdefault(ids[:start], []).append((index, ids[start:]))
    requests = tuple(
        Request(context, 0, prompt_logprobs=1, n=len(group), continuations=tuple(ids for _, ids in group))
        for context, group in found.items()
    )
    most = len(body.continuations)
    order = {row * most + i: each[0] for row, group in enumerate(found.values()) for i, each in enumerate(group)}
    return Asked(requests, most, stream=False, include_usage=False), order


class ScoreReply:
    """`halflap.score`: of each continuation its log-probability in nats, and whether it is the greedy one."""

    def __init__(self, order: Mapping[int, int], model: str, each: bool) -> None:
        self._order, self._model, self._each = order, model, each
        self._scores: dict[int, dict[str, Any]] = {}

    def add(self, choice: int, piece: Piece) -> list[dict[str, Any]]:
        if piece.prompt is None:
            return []
        tokens, index = piece.prompt, self._order[choice]
        found = {
            "index": index,
            "log_prob": sum(token.log_prob or 0.0 for token in tokens),
            "tokens": len(tokens),
            "greedy": all(token.top and token.top[0].id == token.id for token in tokens),
        }
        if self._each:
            found["token_log_probs"] = [
                {"id": token.id, "token": token.text, "log_prob": token.log_prob} for token in tokens
            ]
        self._scores[index] = found
        return []

    def chunk(self, choices: list[dict[str, Any]], usage: dict[str, Any] | None = None) -> dict[str, Any]:
        raise NotImplementedError("scores are not streamed")

    def whole(self, usage: dict[str, Any]) -> dict[str, Any]:
        return {
            "id": f"score-{uuid.uuid4().hex}",
            "object": "halflap.score",
            "model": self._model,
            "scores": [self._scores[i] for i in sorted(self._scores)],
            "usage": usage,
        }
