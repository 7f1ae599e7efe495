"""`generate`: text from a model on the command line."""

from __future__ import annotations

import sys
from typing import Any

from halflap.checkpoints.checkpoint import load_model
from halflap.checkpoints.config import find_directory
from halflap.commands.config import GenerateRecipe
from halflap.commands.device import choose_device
from halflap.data.tokenizer import Tokenizer
from halflap.errors import RecipeError
from halflap.inference.generate import generate as continue_prompts
from halflap.run import Run


def generate(recipe: GenerateRecipe, run: Run) -> dict[str, Any]:
    """Continue one prompt or several; with one, `text`, `tokens` and `finish_reason` are its own, else lists."""
    prompts = recipe.prompt or _standard_input()
    directory = find_directory(recipe.model)
    tokenizer = Tokenizer.load(directory)
    model = load_model(directory, recipe.common.dtype, choose_device(recipe.common.device))
    completions = continue_prompts(
        model,
        prompts,
        recipe.max_new_tokens,
        temperature=recipe.temperature,
        top_k=recipe.top_k,
        top_p=recipe.top_p,
        ignore_eos=recipe.ignore_eos,
        seed=recipe.common.seed,
        tokenizer=tokenizer,
    )
    results = [{"text": c.text, "tokens": c.tokens, "finish_reason": c.finish_reason} for c in completions]
    if len(results) == 1:
        return results[0]
    return {name: [result[name] for result in results] for name in ("text", "tokens", "finish_reason")}


def _standard_input() -> tuple[str, ...]:
    text = "" if sys.stdin is None or sys.stdin.isatty() else sys.stdin.read()
    if not text.strip():
        raise RecipeError("no prompt was given; write --prompt TEXT, or send it on standard input")
    return (text,)
