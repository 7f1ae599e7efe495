"""Recipes: one frozen dataclass a verb, built the same way from flags, a YAML file and Python keywords.

This module holds what all recipes share: the common fields, the annotated types of their fields, the names a field
has in YAML and Python (`fit.learning_rate`), and the file form. The recipes stand in commands/config.py and
config_compress.py; cli.py builds them. A recipe's *settings* are a flat mapping from dotted name to plain value (None,
bool, int, float, str or a list of those). No torch.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
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
Count = Annotated[Amount, _amount("count")]
Bytes = Annotated[Amount, _amount("bytes")]
Duration = Annotated[Amount, _amount("seconds")]
FASTEST = 100.0  # of the teacher's throughput, as a share
Rate = Annotated[Amount, _amount("count", FASTEST)]
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

NOT_CONTENT = ("out", "json", "quiet", "overwrite", "stream", "top_k_in", "workers", "ray", "ray_cpus")
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
            within = [value for _, value in pairs]
    if node is not None and node.id == "sequence":
        within = node.value
    return next((found for value in within if (found := _repeated_name(value))), None)


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


def content_of(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that make the run what it is."""
    return {name: value for name, value in settings.items() if name not in NOT_CONTENT}


def digest_of(verb: str, settings: Mapping[str, Any], inputs: Mapping[str, Any]) -> str:
    """Ten hexadecimal digits that name a verb's content settings and the digests of what it reads."""
    content = json.dumps([verb, content_of(settings), inputs], sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(content.encode()).hexdigest()[:10]
