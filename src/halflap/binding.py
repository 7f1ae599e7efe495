"""Recipes from flags, a YAML file or Python keywords, and what is wrong with them in one sentence.

cyclopts splits the command line by the recipe's dataclass; what the command line leaves out is filled from the file
of `--config` or from the keywords of a Python call, then converted by the same code. No torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from difflib import get_close_matches
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_origin

from cyclopts import App, Parameter
from cyclopts import exceptions as problem
from cyclopts.token import Token

import halflap
from halflap.amounts import Amount
from halflap.errors import HalflapError, RecipeError
from halflap.recipe import COMMON, SWITCH, flat, leaves, normalise, read_yaml, unknown_name

LAYERS = "num_layers"
"""The alias whose number depends on the model."""


@flat(COMMON)
@dataclass(frozen=True, kw_only=True)
class Control:
    """Flags of the command line alone."""

    config: str | None = None
    """YAML recipe with defaults for the flags."""
    show: Annotated[bool, SWITCH] = False
    """Print the resolved recipe as YAML and stop."""
    dry_run: Annotated[bool, SWITCH] = False
    """Print what the run would cost and stop."""
    traceback: Annotated[bool, SWITCH] = False
    """Show where an error arose."""


class Call(NamedTuple):
    """A verb with its recipe, the flags of the command line alone, and remarks for the user."""

    verb: str
    recipe: Any
    control: Control
    remarks: tuple[str, ...]


def bind(
    recipes: Mapping[str, type], tokens: Sequence[str], given: Mapping[str, Any] | None = None, source: str = ""
) -> Call | None:
    """Build the recipe that `tokens`, then `given` (or the file of --config), then the defaults describe.

    `source` names `given` in errors. Returns None when help or the version was asked for (and has been printed).
    Raises RecipeError on whatever is wrong.
    """
    remarks: list[str] = []

    def fill(app: App, commands: tuple[str, ...], arguments: Any) -> None:
        if commands:
            _fill(commands[0], recipes[commands[0]], arguments, given, source, remarks)

    try:
        app = _app(_HelpApp if {"--help", "-h"} & set(tokens) else App, recipes, fill)
        outcome = app(tokens, exit_on_error=False, print_error=False, result_action="return_value")
    except problem.CycloptsError as error:
        verb = next((token for token in tokens if token in recipes), "")
        raise RecipeError(_sentence(error, verb, list(recipes))) from error
    except HalflapError as error:  # a section's own check of its values
        raise RecipeError(str(error)) from error
    if not isinstance(outcome, tuple):
        return None
    verb, recipe, control = outcome
    return Call(verb, recipe, control, tuple(remarks))


class _HelpApp(App):
    """Help asks three times for a verb's arguments, which are dear to collect; nothing changes them in between."""

    def assemble_argument_collection(self, **_: Any) -> Any:
        if "collected" not in self.__dict__:
            self.__dict__["collected"] = super().assemble_argument_collection(parse_docstring=True)
        return self.__dict__["collected"]


def _app(kind: type[App], recipes: Mapping[str, type], fill: Callable[..., None]) -> App:
    app = kind(
        name="halflap",
        help=(halflap.__doc__ or "").partition("\n")[0],
        version=halflap.__version__,
        default_parameter=Parameter(
            consume_multiple=True, negative_iterable=(), show_env_var=False, show_default=_shown_default
        ),
        config=(fill,),
        help_format="plaintext",
    )
    for place, (verb, recipe) in enumerate(recipes.items()):
        app.command(_command(verb, recipe), name=verb, help=recipe.__doc__, sort_key=place)
    return app


def _shown_default(value: Any) -> str | None:
    """A default as it would be typed; what says nothing (false, an empty list) is left out."""
    if value is None or value is False or value == ():
        return None
    if isinstance(value, tuple):
        return " ".join(str(item) for item in value)
    return str(Amount(value)) if type(value) is int else str(value)


def _command(verb: str, recipe_class: type) -> Callable[..., tuple[str, Any, Control]]:
    # Defaults are objects, not None: cyclopts asks pydantic to check them as soon as anybody has loaded it.
    def command(recipe: Any, *, control: Any = Control()) -> tuple[str, Any, Control]:
        return verb, recipe, control

    required = any(field.default is MISSING for field in fields(recipe_class))
    command.__defaults__ = None if required else (recipe_class(),)
    command.__annotations__ = {"recipe": Annotated[recipe_class, Parameter(name="*")], "control": Control}
    return command


def _fill(
    verb: str, recipe: type, arguments: Any, given: Mapping[str, Any] | None, source: str, remarks: list[str]
) -> None:
    """Give every argument that the command line left out its value from the recipe file or the Python call."""
    by_path = {argument.keys: argument for argument in arguments}
    if given is None:
        tokens = next(argument.tokens for argument in arguments if "--config" in argument.names)
        if not tokens:
            return
        source = tokens[-1].value
        given = read_yaml(source)
    given = dict(given)
    if (named := given.pop("verb", verb)) != verb:
        raise RecipeError(f"{source}: this recipe is for `halflap {named}`; give it to that verb, not to {verb}")
    known = leaves(recipe)
    if isinstance(given.get(LAYERS), int) and "model" in known:
        named = [token.value for token in by_path[known["model"].path].tokens] or [given.get("model")]
        given[LAYERS] *= _blocks_of_a_layer(named[0])
    settings, said = normalise(recipe, given, source)
    remarks += said
    for name, value in settings.items():
        argument = by_path[known[name].path]
        if not argument.tokens:
            for token in _tokens(f"{source}: {name}" if source else name, value):
                argument.append(token)


def _blocks_of_a_layer(model: Any) -> int:
    """How many of our blocks other tools count as one layer of the model that is named: two of Llama's."""
    from halflap.checkpoints.config import read_config
    from halflap.compress.axes import depth_units

    try:
        return len(depth_units(read_config(model))[0])
    except (HalflapError, OSError, TypeError):
        return 1  # what is wrong with the model is said where it is opened


def _tokens(keyword: str, value: Any) -> list[Token]:
    """A plain value as if it had been typed; what cannot be typed (None, true, an empty list) goes as it is."""
    if value is None or isinstance(value, bool) or value == []:
        whole = tuple(value) if isinstance(value, list) else value
        return [Token(keyword=keyword, source="recipe", implicit_value=whole)]
    items = value if isinstance(value, list) else [value]
    return [Token(keyword=keyword, source="recipe", index=i, value=str(item)) for i, item in enumerate(items)]


def _sentence(error: problem.CycloptsError, verb: str, verbs: list[str]) -> str:
    """cyclopts' error as one sentence: what, the value met, what is allowed, what to do next."""
    see = f"see `halflap {verb} --help`".replace("  ", " ")
    match error:
        case problem.UnknownCommandError(unused_tokens=[word, *_]):
            return unknown_name(word, verbs, "verb")
        case problem.UnknownOptionError():
            flag = error.token.keyword or error.token.value
            flags = [name for argument in error.argument_collection for name in argument.names if name.startswith("--")]
            near = get_close_matches(flag.split("=")[0], flags, n=1, cutoff=0.5)
            return f"{flag!r} is not a flag of {verb}; {f'did you mean {near[0]!r}?' if near else see}"
        case problem.UnusedCliTokensError(unused_tokens=[word, *_]):
            return f"{word!r} does not belong to any flag of {verb}; write `--flag {word}`, or {see}"
        case problem.RepeatArgumentError():
            return f"{error.token.keyword} is given twice; keep one of the two"
        case problem.CoercionError() if isinstance(error.__cause__, HalflapError):
            cause, argument = str(error.__cause__), error.argument
            leaf = argument.names[0] if argument and not argument.children else ""
            name = (error.token and error.token.keyword) or leaf
            return f"{name}: {cause}" if name else cause
        case problem.CoercionError() if error.argument is not None:
            return _wrong_value(error, see)
        case problem.MissingArgumentError() if error.argument is not None:
            name = error.argument.names[0]
            if error.argument.field_info.is_positional and not error.argument.tokens:
                word = name.lstrip("-").upper()
                return f"{verb} needs {word}; write `halflap {verb} {word}`, or {see}"
            name = error.keyword or name
            return f"{name} has too few values; write {name}=VALUE where one begins with -, or {see}"
    said = " ".join(str(error).split()).rstrip(".")
    return f"{said}; {see}"


def _wrong_value(error: problem.CoercionError, see: str) -> str:
    name = (error.token and error.token.keyword) or (error.argument.name if error.argument else "a value")
    value = error.token.value if error.token else ""
    choices = _choices(error.target_type)
    near = get_close_matches(value, choices, n=1, cutoff=0.5)
    advice = f"did you mean {near[0]!r}?" if near else see
    allowed = f"allowed are {', '.join(choices)}" if choices else f"{_kind(error.target_type)} is allowed"
    return f"{name} is {value!r}; {allowed}: {advice}"


def _choices(hint: Any) -> list[str]:
    if get_origin(hint) is Literal:
        return [str(choice) for choice in get_args(hint)]
    return [choice for part in get_args(hint) for choice in _choices(part)]


def _kind(hint: Any) -> str:
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    parts = [hint, *get_args(hint)]
    return next((names[part] for part in parts if part in names), "another value")
