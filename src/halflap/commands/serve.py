"""`serve`: a model behind OpenAI's HTTP API until it is told to stop."""

from __future__ import annotations

import os
import socket
import sys
import tempfile
from pathlib import Path
from typing import Any

from halflap.commands.config import ServeRecipe
from halflap.commands.engines import Opened, open_engine
from halflap.commands.fleet import fleet, name_of
from halflap.errors import RecipeError
from halflap.inference.server.config import ServerSettings
from halflap.inference.server.prompts import Prompts
from halflap.inference.server.run import address_of, listen, listen_unix
from halflap.inference.server.run import run as run_server
from halflap.inference.server.service import Service
from halflap.run import Run


def serve(recipe: ServeRecipe, run: Run) -> dict[str, Any]:
    """Listen until SIGTERM or Ctrl-C; returns what was served."""
    listening = recipe.listening
    keys = _keys(listening.api_key)
    listener = listen_unix(listening.uds) if listening.uds else listen(listening.host, listening.port)
    with listener:
        try:
            if listening.engine != "halflap" or listening.replicas > 1:
                return _serve_together(recipe, listener, keys)
            opened = open_engine(recipe.model, recipe.decoding, recipe.common)
            try:
                return _serve(recipe, opened, listener, keys)
            finally:
                opened.engine.close()
        finally:
            if listening.uds:
                Path(listening.uds).unlink(missing_ok=True)


def _serve(recipe: ServeRecipe, opened: Opened, listener: socket.socket, keys: tuple[str, ...]) -> dict[str, Any]:
    """One engine, in this process."""
    prompts = Prompts(opened.tokenizer, opened.config)
    settings = _settings(recipe, opened.max_context, keys)
    url = address_of(listener)

    def ready() -> None:
        if opened.remark:
            _say(opened.remark)
        _say(f"replies may hold {opened.memory / 2**30:.1f} GiB of decode state (--cache-memory); past it they wait")
        if not prompts.has_template:
            _say("the tokenizer has no chat template; conversations are written as plain turns of User and Assistant")
        _say_ready(settings.name, url)

    service = Service(opened.engine, prompts, settings)
    try:
        run_server(service, listener, ready=ready)
    finally:
        prompts.close()
    stats = opened.engine.stats()
    kept = ("requests", "prompt_tokens", "new_tokens")
    return {"url": url, "model": settings.name, **{what: stats[what] for what in kept if what in stats}}


def _serve_together(recipe: ServeRecipe, listener: socket.socket, keys: tuple[str, ...]) -> dict[str, Any]:
    """Engines in processes of their own, behind a front in this one."""
    from halflap.inference.front.relay import Front
    from halflap.inference.front.replica import Replica
    from halflap.inference.front.run import run as run_front

    url = address_of(listener)
    with tempfile.TemporaryDirectory(prefix="halflap-") as folder:  # nobody else may look inside
        ships = fleet(recipe, Path(folder))
        settings = _settings(recipe, ships.max_context, keys)
        replicas = [Replica(number, launch) for number, launch in enumerate(ships.launches)]
        front = Front(replicas, settings, ships.posts, ships.amend)
        _say(f"{len(replicas)} {'replicas are' if len(replicas) > 1 else 'replica is'} started")
        run_front(front, listener, ready=lambda: _say_ready(settings.name, url), say=_say)
    served = sum(replica.served for replica in replicas)
    return {"url": url, "model": settings.name, "replicas": len(replicas), "requests": served}


def _settings(recipe: ServeRecipe, max_context: int, keys: tuple[str, ...]) -> ServerSettings:
    listening = recipe.listening
    return ServerSettings(
        name_of(recipe),
        max_context,
        choices=listening.replicas * recipe.decoding.max_batch + listening.queue,
        body_bytes=int(listening.max_body.value),
        seconds=listening.max_time.value,
        grace=listening.grace.value,
        keys=keys,
        origins=listening.allow_origin,
    )


def _keys(given: tuple[str, ...]) -> tuple[str, ...]:
    keys = given or tuple(key for key in [os.environ.get("HALFLAP_API_KEY", "")] if key)
    if any(not key.strip() for key in keys):
        raise RecipeError("api_key is empty; give a key of at least one character, or leave it out to let anybody ask")
    return keys


def _say_ready(name: str, url: str) -> None:
    _say(f"{name} is at {url} (chat page /, API /v1, documentation /openapi.json); Ctrl-C stops it")


def _say(sentence: str) -> None:
    print(f"halflap: {sentence}", file=sys.stderr, flush=True)
