"""`serve`: a model behind OpenAI's HTTP API until it is told to stop."""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path
from typing import Any

from halflap.commands.config import ServeRecipe
from halflap.commands.engines import Opened, open_engine
from halflap.errors import RecipeError
from halflap.inference.server.config import ServerSettings
from halflap.inference.server.prompts import Prompts
from halflap.inference.server.run import listen
from halflap.inference.server.run import run as run_server
from halflap.inference.server.service import Service
from halflap.run import Run


def serve(recipe: ServeRecipe, run: Run) -> dict[str, Any]:
    """Listen until SIGTERM or Ctrl-C; returns what was served."""
    keys = _keys(recipe.listening.api_key)
    listener = listen(recipe.listening.host, recipe.listening.port)
    with listener:
        opened = open_engine(recipe.model, recipe.decoding, recipe.common)
        try:
            return _serve(recipe, opened, listener, keys)
        finally:
            opened.engine.close()


def _serve(recipe: ServeRecipe, opened: Opened, listener: socket.socket, keys: tuple[str, ...]) -> dict[str, Any]:
    listening = recipe.listening
    name = listening.served_model_name or _name(recipe.model)
    prompts = Prompts(opened.tokenizer, opened.config)
    settings = ServerSettings(
        name,
        opened.max_context,
        requests=recipe.decoding.max_batch + listening.queue,
        body_bytes=int(listening.max_body.value),
        seconds=listening.max_time.value,
        grace=listening.grace.value,
        keys=keys,
    )
    host, port = listener.getsockname()[:2]
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}"

    def ready() -> None:
        if not prompts.has_template:
            _say("the tokenizer has no chat template; conversations are written as plain turns of User and Assistant")
        _say(f"{name} is at {url} (chat page /, API /v1, documentation /openapi.json); Ctrl-C stops it")

    service = Service(opened.engine, prompts, settings)
    try:
        run_server(service, listener, ready=ready)
    finally:
        prompts.close()
    stats = opened.engine.stats()
    kept = ("requests", "prompt_tokens", "new_tokens")
    return {"url": url, "model": name, **{what: stats[what] for what in kept if what in stats}}


def _keys(given: tuple[str, ...]) -> tuple[str, ...]:
    keys = given or tuple(key for key in [os.environ.get("HALFLAP_API_KEY", "")] if key)
    if any(not key.strip() for key in keys):
        raise RecipeError("api_key is empty; give a key of at least one character, or leave it out to let anybody ask")
    return keys


def _say(sentence: str) -> None:
    print(f"halflap: {sentence}", file=sys.stderr, flush=True)


def _name(model: str) -> str:
    """The directory's name; of a run, the run's, not that of its `checkpoint/`."""
    path = Path(model).resolve()
    return path.parent.name if path.name == "checkpoint" else path.name
