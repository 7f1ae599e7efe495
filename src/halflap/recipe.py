"""Recipes: one frozen dataclass a verb, built the same way from flags, a YAML file and Python keywords.

This module holds what all recipes share: the common fields, the annotated types of their fields, the names a field
has in YAML and Python (`fit.learning_rate`), and the file form. The recipes stand in commands/config.py and
config_compress.py; cli.py builds them. A recipe's *settings* are a flat mapping from dotted name to plain value (None,
bool, int, float, str or a list of those). No torch.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from cyclopts import Group, Parameter

from halflap.amounts import Amount, Unit, parse_amount, parse_count
from halflap.errors import RecipeError

INPUT, SHAPE, STUDY = "halflap input", "halflap shape", "halflap study"
"""Mark an annotated field whose value names files that the run reads; a shape may also be the name of a preset, a study
that of a shipped one."""


def _amount(unit: Unit, largest_share: float = 1.0) -> Parameter:
    def convert(_: type, tokens: Any) -> Amount:
        return parse_amount(tokens[0].value, unit, largest_share=largest_share)

    return Parameter(converter=convert, n_tokens=1, accepts_keys=False)


def _count(_: type, tokens: Any) -> int:
    return parse_count(tokens[0].value)


def _positive(_: type, tokens: Any) -> int:
    value = parse_count(tokens[0].value)
    if value < 1:
        raise RecipeError(f"{value} is too small; at least 1 is allowed")
    return value


def _seed(_: type, tokens: Any) -> int:
    text = tokens[0].value
    if not text.isascii() or not text.isdigit() or int(text) > LARGEST_SEED:
        raise RecipeError(f"{text!r} is no seed; it is a whole number from 0 to 2^63 - 1")
    return int(text)


def _positives(_: type, tokens: Any) -> tuple[int, ...]:
    return tuple(_positive(int, [token]) for token in tokens)


HEADINGS = (
    TEXT := "Text",
    BUDGETS := "Budgets (ceilings, all kept; 50% is a share of the teacher's)",
    SIZES := "Sizes of the student",
    SEARCH := "Search",
    SPACE := "Search space",
    IMPORTANCE := "Importance",
    DISTILLATION := "Distillation",
    TRAINING := "Training",
    SAMPLING := "Sampling",
    SERVING := "Serving",
    VLLM := "vLLM (--engine vllm)",
    COMMON := "Common to all verbs",
)
"""Headings of the help in their order, after the fields of no section."""


def section(heading: str) -> Parameter:
    """A section whose fields are `--name.field`, under a heading of their own in the help."""
    return Parameter(group=Group(heading, sort_key=HEADINGS.index(heading)))


def flat(heading: str) -> Parameter:
    """A section whose fields are flags without its name."""
    return Parameter(name="*", group=Group(heading, sort_key=HEADINGS.index(heading)))


SWITCH = Parameter(negative=())
ANY_TEXT = Parameter(allow_leading_hyphen=True)
Count = Annotated[Amount, _amount("count")]
Bytes = Annotated[Amount, _amount("bytes")]
Duration = Annotated[Amount, _amount("seconds")]
FASTEST = 100.0  # of the teacher's throughput, as a share
Rate = Annotated[Amount, _amount("rate", FASTEST)]
Tokens = Annotated[int, Parameter(converter=_count, n_tokens=1)]
LARGEST_SEED = 2**63 - 1
Seed = Annotated[int, Parameter(converter=_seed, n_tokens=1)]
Positive = Annotated[int, Parameter(converter=_positive, n_tokens=1)]
Positives = Annotated[tuple[int, ...], Parameter(converter=_positives)]
File = Annotated[str, INPUT]
Files = Annotated[tuple[str, ...], INPUT]
Model = Annotated[str, INPUT]
Shape = Annotated[str, INPUT, SHAPE]
StudyName = Annotated[str, INPUT, STUDY]


@flat(COMMON)
@dataclass(frozen=True, kw_only=True)
class Common:
    """What every verb takes."""

    out: str | None = None
    """Directory of the run; runs/VERB-DIGEST when not given."""
    seed: Seed = 0
    """Seed of everything random."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Arithmetic."""
    json: Annotated[bool, SWITCH] = False
    """Print one JSON object on standard output and everything else on standard error."""
    quiet: Annotated[bool, SWITCH] = False
    """No progress."""
    overwrite: Annotated[bool, SWITCH] = False
    """Start again in a directory that holds another run."""


PATHS = "paths"
"""In YAML a list with fields beside it is nested: `data: {paths: [a], field: b}` is `--data a --data.field b`."""

SECRETS = ("api_key",)
"""Names whose values are neither kept nor shown."""

NOT_CONTENT = ("out", "json", "quiet", "overwrite", "stream", "top_k_in", "workers", "ray", "ray_cpus", *SECRETS)
"""Names that change where a run goes or how it talks, and not what it is."""

# What NVIDIA's tools call it, and what we call it; the scale turns a bare number into an amount with its unit.
ALIASES: dict[str, tuple[str, str]] = {
    "prune_target_params": ("params", ""),
    "target_params": ("params", ""),
    "target_memory": ("memory", ""),
    "prune_target_memory_mb": ("memory", "MB"),
    "target_memory_mb": ("memory", "MB"),
    "target_latency_seconds": ("latency", "s"),
    "target_throughput": ("throughput", ""),
    "num_layers": ("sizes.num_blocks", ""),
    "ffn_hidden_size": ("sizes.intermediate_size", ""),
    "mamba_state_dim": ("sizes.ssm_state_size", ""),
    "num_query_groups": ("sizes.num_key_value_heads", ""),
    "hidden_size": ("sizes.hidden_size", ""),
    "mamba_num_heads": ("sizes.mamba_num_heads", ""),
    "mamba_head_dim": ("sizes.mamba_head_dim", ""),
    "num_attention_heads": ("sizes.num_attention_heads", ""),
}


@dataclass(frozen=True)
class Leaf:
    """One settable field of a recipe: its dotted name, the attributes that lead to it, and its type."""

    name: str
    path: tuple[str, ...]
    hint: Any
    default: Any

    @property
    def is_list(self) -> bool:
        return any(get_origin(part) is tuple for part in _parts(self.hint))

    def is_marked(self, mark: str) -> bool:
        return any(mark in getattr(part, "__metadata__", ()) for part in _parts(self.hint))


def _parts(hint: Any) -> Iterator[Any]:
    """The hint, and what its unions and annotations are made of; not the items of a tuple."""
    yield hint
    if get_origin(hint) is Annotated:
        yield from _parts(get_args(hint)[0])
    elif get_origin(hint) is not tuple and get_origin(hint) is not Literal:
        for part in get_args(hint):
            yield from _parts(part)


def leaves(kind: type, path: tuple[str, ...] = (), prefix: str = "") -> dict[str, Leaf]:
    """Every settable field of a recipe class by its dotted name, in the order they are written."""
    found: dict[str, Leaf] = {}
    hints = get_type_hints(kind, include_extras=True)
    for field in dataclasses.fields(kind):
        hint = hints[field.name]
        base = get_args(hint)[0] if get_origin(hint) is Annotated else hint
        if isinstance(base, type) and dataclasses.is_dataclass(base) and base is not Amount:
            within = prefix if "*" in _names(hint, base) else f"{prefix}{field.name}."
            found |= leaves(base, (*path, field.name), within)
            continue
        named = _names(hint, None)
        name = named[0].lstrip("-").replace("-", "_") if named else f"{prefix}{field.name}"
        found[name] = Leaf(name, (*path, field.name), hint, field.default)
    return found


def _names(hint: Any, base: type | None) -> list[str]:
    """Names that the annotation or the section's class gives instead of the field's own; `*` is none."""
    own = [part for part in getattr(hint, "__metadata__", ()) if isinstance(part, Parameter)]
    parameters = own + list(getattr(getattr(base, "__cyclopts__", None), "parameters", ()))
    return [str(name) for parameter in parameters for name in parameter.name or ()]


def settings_of(recipe: Any) -> dict[str, Any]:
    """The recipe as a flat mapping of plain values; `normalise` and the builder give an equal recipe back."""
    settings = {}
    for leaf in leaves(type(recipe)).values():
        value = recipe
        for attribute in leaf.path:
            value = getattr(value, attribute)
        settings[leaf.name] = plain(value)
    return settings


def plain(value: Any) -> Any:
    """None, bool, int, float, str, or a list of those."""
    if isinstance(value, tuple | list):
        return [plain(item) for item in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return str(value)


def inputs_of(recipe: Any) -> dict[str, list[str]]:
    """What the recipe names as input, by dotted field name, without the fields left empty."""
    settings = settings_of(recipe)
    named = {leaf.name: settings[leaf.name] for leaf in leaves(type(recipe)).values() if leaf.is_marked(INPUT)}
    return {name: value if isinstance(value, list) else [value] for name, value in named.items() if value}


def normalise(kind: type, given: Mapping[str, Any], source: str) -> tuple[dict[str, Any], list[str]]:
    """Nested or dotted names, with dashes or underscores, to the dotted names of `kind`, and remarks for the user.

    Raises RecipeError on an unknown name (with the nearest one), a name met twice, or a value of the wrong form.
    """
    known = leaves(kind)
    where = f"{source}: " if source else ""
    settings: dict[str, Any] = {}
    remarks: list[str] = []
    for written, value in _flatten(given, known):
        name = _known_name(written, known)
        if name is None and (ours := _alias(written, known)) is not None:
            unit = ALIASES[written][1]
            value = f"{value}{unit}" if isinstance(value, int | float) else value
            remarks.append(f"{where}{written} is called {ours} here; read as {ours}: {plain(value)}")
            name = ours
            value = [value] if known[ours].is_list and not isinstance(value, list | tuple) else value
        if name is None:
            raise RecipeError(f"{where}{unknown_name(written, list(known), 'field')}")
        if name in settings:
            raise RecipeError(f"{where}{name} is given twice; keep one of the two")
        nested = isinstance(value, list | tuple) and any(isinstance(item, Mapping | list | tuple) for item in value)
        if isinstance(value, Mapping) or nested or (isinstance(value, list | tuple) and not known[name].is_list):
            wanted = "a plain list" if known[name].is_list else "a single value"
            raise RecipeError(f"{where}{name} is {plain_text(value)}; {wanted} is allowed: write {name}: VALUE")
        settings[name] = plain(value)
    return settings, remarks


def _flatten(given: Mapping[str, Any], known: Mapping[str, Leaf], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in given.items():
        name = f"{prefix}{str(key).replace('-', '_')}"
        if dataclasses.is_dataclass(value) and not isinstance(value, type | Amount):
            value = settings_of(value)
        within = any(leaf.startswith(f"{name}.") for leaf in known)
        if isinstance(value, Mapping) and within:
            yield from _flatten(value, known, f"{name}.")
        elif value is None and within and name not in known:
            continue  # a section left empty in YAML
        else:
            yield name, value


def _alias(written: str, known: Mapping[str, Leaf]) -> str | None:
    """What another tool's name is called here; a size is of the space, as its only value, where no sizes are given."""
    ours, _ = ALIASES.get(written, ("", ""))
    return next((name for name in (ours, ours.replace("sizes.", "space.")) if name in known), None)


def _known_name(written: str, known: Mapping[str, Leaf]) -> str | None:
    """Python keywords cannot hold a dot, so `fit_learning_rate` is `fit.learning_rate` too."""
    written = written.removesuffix(f".{PATHS}")
    return next((name for name in known if written in (name, name.replace(".", "_"))), None)


def unknown_name(written: str, allowed: list[str], what: str) -> str:
    """One sentence about a name that does not exist, with the nearest that does."""
    near = difflib.get_close_matches(written, allowed, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else f"allowed are {', '.join(sorted(allowed))}"
    return f"{written!r} is not a {what} that exists; {hint}"


def plain_text(value: Any) -> str:
    """A value as short JSON, for a sentence."""
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."


def read_yaml(path: str | Path, what: str = "recipe") -> dict[str, Any]:
    """The mapping in a YAML file. Raises RecipeError when it is missing, not YAML, or not a mapping."""
    import yaml

    try:
        text = Path(path).read_text(encoding="utf-8")
        if repeated := _repeated_name(yaml.compose(text, yaml.SafeLoader)):
            name, *lines = repeated
            raise RecipeError(
                f"the {what} {str(path)!r} says {name!r} twice, at lines {lines[0]} and {lines[1]}; keep one"
            )
        content = yaml.safe_load(text)
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        raise RecipeError(f"the {what} {str(path)!r} is not a file; give the path of a YAML file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        where = f" at line {mark.line + 1}" if (mark := getattr(error, "problem_mark", None)) else ""
        raise RecipeError(f"the {what} {str(path)!r} is not YAML{where}; correct the file") from None
    if not isinstance(content, dict):
        raise RecipeError(
            f"the {what} {str(path)!r} holds {plain_text(content)}; it must be a mapping of names to values: "
            "write one `name: value` a line"
        )
    return content


def _repeated_name(root: Any) -> tuple[str, int, int] | None:
    """The first name that a mapping of a YAML document gives twice, of which YAML keeps the last, and the lines."""
    waiting, known = [root], {id(None)}  # aliases lead to the same node again
    while waiting:
        node = waiting.pop()
        if id(node) in known or node.id == "scalar":
            continue
        known.add(id(node))
        if node.id == "sequence":
            waiting += node.value
            continue
        lines: dict[tuple[str, str], int] = {}
        for key, value in node.value:
            waiting.append(value)
            if key.id == "scalar" and key.tag != "tag:yaml.org,2002:merge":
                name, line = (key.tag, key.value), key.start_mark.line + 1
                if name in lines:
                    return key.value, lines[name], line
                lines[name] = line
    return None


def to_yaml(verb: str, settings: Mapping[str, Any]) -> str:
    """Settings as YAML, sections nested; `read_yaml` and `normalise` give them back."""
    import yaml

    tree: dict[str, Any] = {"verb": verb}
    for name, value in settings.items():
        head, _, tail = name.partition(".")
        has_fields = any(other.startswith(f"{name}.") for other in settings)
        if tail or has_fields:
            tree.setdefault(head, {})[tail or PATHS] = value
        else:
            tree[name] = value

    class Dumper(yaml.SafeDumper):
        """Sections a line a field, lists on one line."""

        def represent_list(self, data: Any) -> Any:
            return self.represent_sequence("tag:yaml.org,2002:seq", data, flow_style=True)

    Dumper.add_representer(list, Dumper.represent_list)
    return yaml.dump(tree, Dumper=Dumper, sort_keys=False, allow_unicode=True, default_flow_style=False, width=110)


def from_tree(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The settings that `to_yaml` nested, by their dotted names again."""
    settings: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            settings |= from_tree(value, f"{prefix}{name}.")
        else:
            settings[f"{prefix}{name}".removesuffix(f".{PATHS}")] = value
    return settings


def without_secrets(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name not in SECRETS}


def content_of(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that make the run what it is."""
    return {name: value for name, value in settings.items() if name not in NOT_CONTENT}


def digest_of(verb: str, settings: Mapping[str, Any], inputs: Mapping[str, Any]) -> str:
    """Ten hexadecimal digits that name a verb's content settings and the digests of what it reads."""
    content = json.dumps([verb, content_of(settings), inputs], sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(content.encode()).hexdigest()[:10]
