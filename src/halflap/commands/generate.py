"""`generate`: text from a model on the command line, shown on a terminal while it is written."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

from halflap.checkpoints.checkpoint import load_model
from halflap.checkpoints.config import find_directory, read_config, read_quantization
from halflap.commands.config import GenerateRecipe
from halflap.commands.device import check_memory, choose_device, choose_dtype
from halflap.data.tokenizer import Tokenizer
from halflap.errors import RecipeError
from halflap.inference.generate import generate as continue_prompts
from halflap.run import Run


def generate(recipe: GenerateRecipe, run: Run) -> dict[str, Any]:
    """Continue one prompt or several; with one, `text`, `tokens` and `finish_reason` are its own, else lists."""
    prompts = recipe.prompt or _standard_input()
    schema = None if recipe.json_schema is None else _schema(recipe.json_schema)
    directory = find_directory(recipe.model)
    tokenizer = Tokenizer.load(directory)
    device = choose_device(recipe.common.device)
    dtype, config = choose_dtype(recipe.common.dtype, device), read_config(directory)
    check_memory(config, dtype, device, quantization=read_quantization(directory, config))
    model = load_model(directory, dtype, device)
    terminal = _terminal() if len(prompts) == 1 and run.directory is None and not recipe.common.json else None
    try:
        completions = continue_prompts(
            model,
            prompts,
            recipe.max_new_tokens,
            **dataclasses.asdict(recipe.sampling),
            seed=recipe.common.seed,
            stop=recipe.stop,
            ignore_eos=recipe.ignore_eos,
            json_schema=schema,
            regex=recipe.regex,
            tokenizer=tokenizer,
            stream=None if terminal is None else _writer(terminal),
        )
    finally:
        if terminal is not None:
            print(file=terminal, flush=True)
    results = [{"text": c.text, "tokens": c.tokens, "finish_reason": c.finish_reason} for c in completions]
    if len(results) > 1:
        return {name: [result[name] for result in results] for name in ("text", "tokens", "finish_reason")}
    return results[0] if terminal is None else results[0] | {"shown": True}


def _terminal() -> TextIO | None:
    """Standard output where it is a terminal; while a verb works, `sys.stdout` is not it."""
    real = sys.__stdout__
    return real if real is not None and real.isatty() and sys.stdout is not real else None


def _writer(terminal: TextIO) -> Callable[[int, str], None]:
    def write(_row: int, piece: str) -> None:
        print(piece, end="", file=terminal, flush=True)

    return write


def _schema(given: str) -> str:
    """What was given where it is JSON, else what its file holds."""
    if given.lstrip()[:1] == "{" or given.strip() in ("true", "false"):
        return given
    try:
        return Path(given).read_text("utf-8")
    except (OSError, ValueError) as error:
        raise RecipeError(
            f"json_schema {given!r:.80} is neither a schema nor a file that can be read ({error}); "
            'give the path of one, or the schema, as {"type": "object"}'
        ) from None


def _standard_input() -> tuple[str, ...]:
    text = "" if sys.stdin is None or sys.stdin.isatty() else sys.stdin.read()
    if not text.strip():
        raise RecipeError("no prompt was given; write --prompt TEXT, or send it on standard input")
    return (text.removesuffix("\n"),)  # the line end that `echo` adds is not meant
