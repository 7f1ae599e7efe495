"""What `import halflap` offers: models in and out, text from them, and every verb as a function.

A verb goes through the same recipe as on the command line, so a wrong name or value raises the same sentence.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from halflap.binding import bind
from halflap.errors import HalflapError, RecipeError
from halflap.recipe import unknown_name

if TYPE_CHECKING:
    from halflap.data.tokenizer import Tokenizer
    from halflap.inference.generate import Completion, Prompt
    from halflap.models.model import HybridModel


def load(path: str | Path, dtype: str = "float32", device: str = "cpu") -> HybridModel:
    """The model of a Hugging Face or run directory in evaluation mode: tokens (B, T) int64 to logits (B, T, V) float32.

    `dtype="auto"` keeps the stored type. `.config` is its ModelConfig, `.tokenizer` its tokenizer or None.
    Raises HalflapError for what is wrong with the directory.
    """
    from halflap.checkpoints.checkpoint import load_model
    from halflap.checkpoints.config import find_directory
    from halflap.commands.device import choose_device
    from halflap.data.tokenizer import Tokenizer

    directory = find_directory(path)
    model: Any = load_model(directory, dtype, choose_device(str(device)))
    model.tokenizer = Tokenizer.load(directory) if (directory / "tokenizer.json").is_file() else None
    return model


def save(model: HybridModel, directory: str | Path) -> Path:
    """Write a model, with its `.tokenizer` when it has one, as a Hugging Face directory; returns the directory."""
    from halflap.checkpoints.checkpoint import save_model

    save_model(model, directory)
    if (tokenizer := getattr(model, "tokenizer", None)) is not None:
        tokenizer.save(directory)
    return Path(directory)


def tokenizer(path: str | Path | None = None, **fields: Any) -> Tokenizer | dict[str, Any]:
    """Open the tokenizer of a checkpoint or run directory, or train one from `data=[...]`, as the verb does."""
    if path is None:
        return verb("tokenizer")(**fields)
    if fields:
        raise HalflapError(
            f"tokenizer(DIR) opens one and takes no {next(iter(fields))!r}; leave out the directory to train one"
        )
    from halflap.data.tokenizer import Tokenizer

    return Tokenizer.load(path)


def generate(
    model: HybridModel | str | Path, prompts: Sequence[Prompt] | None = None, **fields: Any
) -> list[Completion] | dict[str, Any]:
    """Continue prompts (text or token ids, of any lengths) as one batch; greedy unless a temperature is given.

    Each result has `.text`, `.tokens` (only the new ones) and `.finish_reason`. Keywords are those of
    inference.generate.generate. `generate("DIR", prompt=[...])`, as the verb, returns what `--json` prints.
    """
    if prompts is None and isinstance(model, str | Path):
        return verb("generate")(str(model), **fields)
    from halflap.inference.generate import generate as continue_prompts

    allowed = [*inspect.signature(continue_prompts).parameters][2:]
    for name in fields:
        if name not in allowed:
            raise RecipeError(unknown_name(name, allowed, "keyword of generate"))
    return continue_prompts(load(model) if isinstance(model, str | Path) else model, prompts or [], **fields)


def verb(name: str) -> Callable[..., dict[str, Any]]:
    """A verb of the command line as a function of its fields."""

    def call(*positional: Any, **fields: Any) -> dict[str, Any]:
        return _call(name, positional, fields)

    call.__name__ = call.__qualname__ = name
    call.__doc__ = f"The verb `halflap {name}`: its flags are the keywords, `--json`'s object is the result."
    return call


def _call(name: str, positional: tuple[Any, ...], fields: dict[str, Any]) -> dict[str, Any]:
    from halflap.cli import VERBS, execute, say, unexpected

    recipe = VERBS[name].recipe
    unnamed = [field.name for field in dataclasses.fields(recipe) if not field.kw_only]
    if len(positional) > len(unnamed):
        raise RecipeError(f"{name} takes {len(unnamed)} unnamed value and got {len(positional)}; name the others")
    if twice := set(unnamed[: len(positional)]) & set(fields):
        raise RecipeError(f"{name} got {twice.pop()} both unnamed and by name; keep one of the two")
    call = bind({name: recipe}, [name], dict(zip(unnamed, positional)) | fields)
    assert call is not None  # help was not asked for
    for remark in call.remarks:
        say(remark)
    try:
        return execute(call)
    except HalflapError:
        raise
    except Exception as error:
        raise HalflapError(unexpected(error)) from error
