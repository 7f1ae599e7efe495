"""What a study's YAML says: arms under identical settings, in sizes.

    study: hymba-ladder
    asks: What does each step from a Transformer to Hymba bring?
    baseline: transformer            the arm that others are compared with
    tokens: 4M                       every arm and seed reads as many, in the same order
    seeds: [0, 1, 2]
    base: {...}                      fields that arms share
    arms:
      parallel: {pattern: H-}        fields that differ; `from: other-arm` starts from another arm, `against: other-arm`
                                     is the one its step is measured from, where not the arm above it
    data: [...], eval_data: [...]    text, where the command line names none; eval_tokens: 64k of it are judged on
    speed: {prompt: [512], output: [32], batch: [1, 8]}
    fit: {learning_rate: 0.001}      fields of train/config.py
    claims: [...]                    what is expected, and
    readings: {...}                  what else is made of the results; see study_readings.py
    sizes:
      smoke: {tokens: 20k}           what another size changes, anywhere in the above

Arms are shapes that are trained from scratch (fields: models/stack.py), of

    vocab_size: 2048                 of the tokenizer trained on the text, when none is given
    parameters: 5M                   what every arm comes to within 0.5 %, by its MLPs' width; without it the baseline's
    recall: {...}                    a probe that every shape is trained on besides; see evaluate/probes.py

or, with `teacher: DIR`, what `compress` makes of a teacher (fields: study_compressions.py). A shipped study is found by
its name in `studies/`. No torch.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from halflap.amounts import parse_count
from halflap.commands.study_compressions import JUDGED_ON, Compression, read_compressions
from halflap.errors import HalflapError, RecipeError
from halflap.models.config import ModelConfig
from halflap.models.count import count_parameters
from halflap.models.stack import Stack, build, read_stack, with_parameters
from halflap.recipe import LARGEST_SEED, read_yaml, unknown_name
from halflap.train.config import Fit

SHIPPED = Path(__file__).parent / "studies"
SIZES = ("smoke", "small", "paper")
REQUIRED = ("study", "baseline", "tokens", "seeds", "arms")
OPTIONAL = ("asks", "base", "data", "eval_data", "eval_tokens", "speed", "fit", "claims", "readings", "sizes")
OF_SHAPES = ("vocab_size", "base")
"""What arms trained from scratch need besides."""
EVAL_TOKENS = 65_536


@dataclass(frozen=True)
class Recall:
    """A probe (evaluate/probes.py) that each shape is trained on from random weights, and asked about."""

    probe: str
    length: int
    """Tokens of a row."""
    vocab_size: int
    steps: int
    """Batches of `fit.batch_size` rows to train on."""
    learning_rate: float | None = None
    """Peak learning rate, where not the study's."""
    rows: int = 256
    """Fresh rows that are asked."""


@dataclass(frozen=True)
class Speed:
    """The grid on which arms are timed."""

    prompt: tuple[int, ...] = (512,)
    output: tuple[int, ...] = (32,)
    batch: tuple[int, ...] = (1,)


@dataclass(frozen=True)
class Claim:
    """That one arm has less of a measure than another, in words too."""

    says: str
    lower: str
    higher: str
    measure: str = "loss"


@dataclass(frozen=True)
class Study:
    """One size of a study, as read: of shapes (`stacks`), or of what is cut from a `teacher` (`compressions`)."""

    name: str
    size: str
    asks: str
    baseline: str
    tokens: int
    seeds: tuple[int, ...]
    against: Mapping[str, str]
    """Of each arm but the first, the one that its step is measured from."""
    fit: Fit
    data: tuple[str, ...]
    eval_data: tuple[str, ...]
    eval_tokens: int
    speed: Speed | None
    claims: tuple[Claim, ...]
    readings: Mapping[str, Mapping[str, Any]]
    vocab_size: int = 0
    parameters: int | None = None
    recall: Recall | None = None
    stacks: Mapping[str, Stack] = field(default_factory=dict)
    teacher: str | None = None
    compressions: Mapping[str, Compression] = field(default_factory=dict)

    @property
    def arms(self) -> tuple[str, ...]:
        return tuple(self.stacks or self.compressions)

    def models(self, vocab_size: int) -> dict[str, ModelConfig]:
        """The arms' shapes with the tokenizer's vocabulary, all of the same size within 1 %."""
        shapes = {name: _in(name, lambda arm=arm: build(arm, vocab_size)) for name, arm in self.stacks.items()}
        target = self.parameters or count_parameters(shapes[self.baseline])
        return {name: _in(name, lambda shape=shape: with_parameters(shape, target)) for name, shape in shapes.items()}


def _in(arm: str, make: Any) -> Any:
    try:
        return make()
    except HalflapError as error:
        raise HalflapError(f"arm {arm!r}: {error}") from None
    except (AttributeError, TypeError, ValueError) as error:
        raise RecipeError(f"arm {arm!r} has a value of the wrong kind ({error}): correct it") from error


def shipped() -> list[str]:
    return sorted(path.stem for path in SHIPPED.glob("*.yaml"))


def study_path(name: str) -> Path:
    """The file of a study: a path, or a shipped name. Raises HalflapError when it is neither."""
    path = Path(name)
    if path.is_file():
        return path
    if (SHIPPED / f"{name}.yaml").is_file():
        return SHIPPED / f"{name}.yaml"
    near = difflib.get_close_matches(name, shipped(), n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"shipped are {', '.join(shipped())}"
    raise HalflapError(f"study is {name!r}, which is neither a file nor a shipped study; {hint}")


def read_study(name: str, size: str, **given: Any) -> Study:
    """The study with what was `given` in place of its own. Raise RecipeError for a field that is unknown, missing or
    wrong, with the file's name."""
    path = study_path(name)
    try:
        return _read(path, size, given)
    except HalflapError as error:
        raise RecipeError(str(error)) from None
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise RecipeError(f"{path} has a value of the wrong kind ({error}): correct it") from error


def _read(path: Path, size: str, given: Mapping[str, Any]) -> Study:
    data = read_yaml(path, "study")
    _check_names(path, data, size)
    data = _merged(data, dict(data.get("sizes", {})).get(size, {}))
    data |= {name: value for name, value in given.items() if value}
    arms = {_name(path, arm): dict(fields or {}) for arm, fields in data["arms"].items()}
    _check_folders(path, arms)
    _name(path, data["baseline"])
    against = _against(path, {arm: fields.pop("against", None) for arm, fields in arms.items()})
    if data["baseline"] not in arms and arms:
        raise HalflapError(f"{path}: {unknown_name(str(data['baseline']), list(arms), 'baseline arm')}")
    models = _compressions(path, data, arms) if "teacher" in data else _shapes(path, data, arms)
    return Study(
        name=data["study"],
        size=size,
        asks=data.get("asks", ""),
        baseline=data["baseline"],
        tokens=_count(path, "tokens", data["tokens"]),
        seeds=_seeds(path, data["seeds"]),
        against=against,
        fit=_section(path, "fit", Fit, data.get("fit", {})),
        data=_paths(data.get("data", ())),
        eval_data=_paths(data.get("eval_data", ())),
        eval_tokens=_count(path, "eval_tokens", data.get("eval_tokens", EVAL_TOKENS)),
        speed=_speed(path, data.get("speed", {}), models.get("stacks", {})),
        claims=tuple(_section(path, "claims", Claim, claim) for claim in data.get("claims") or ()),
        readings={name: dict(fields or {}) for name, fields in (data.get("readings") or {}).items()},
        **models,
    )


def _paths(given: str | Sequence[str]) -> tuple[str, ...]:
    """One path, or a list of them."""
    return (given,) if isinstance(given, str) else tuple(given)


def place_of(directory: Path, arm: str, seed: int) -> Path:
    """The run of one arm and seed in the study's directory."""
    return directory / "arms" / _folder(arm) / f"seed-{seed}"


def _folder(arm: str) -> str:
    return arm.replace(" ", "-").replace("/", "-")


def _check_folders(path: Path, arms: Mapping[str, Any]) -> None:
    folders: dict[str, str] = {}
    for arm in arms:
        if (other := folders.setdefault(_folder(arm), arm)) != arm or _folder(arm) in ("", ".", ".."):
            reason = f"would be kept in the folder of arm {other!r}" if other != arm else "is no name of a folder"
            raise HalflapError(f"{path}: arm {arm!r} {reason}; give it another name")


def _name(path: Path, arm: Any) -> str:
    if not isinstance(arm, str):
        raise HalflapError(f"{path}: {arm!r} is no name of an arm, as YAML reads it; write it in quotes")
    return arm


def _count(path: Path, name: str, value: Any) -> int:
    count = parse_count(str(value))
    if count < 1:
        raise HalflapError(f"{path}: {name} is {value!r}; it must be at least 1: correct it")
    return count


def _seeds(path: Path, seeds: Any) -> tuple[int, ...]:
    right = isinstance(seeds, list | tuple) and all(type(seed) is int and 0 <= seed <= LARGEST_SEED for seed in seeds)
    if not right:
        raise HalflapError(
            f"{path}: seeds is {seeds!r}; it must be a list of whole numbers from 0 to 2^63 - 1: correct it"
        )
    if not seeds or len(set(seeds)) < len(seeds):
        raise HalflapError(f"{path}: seeds is {list(seeds)}; at least one, and each once: correct the list")
    return tuple(seeds)


def _speed(path: Path, given: Mapping[str, Any], stacks: Mapping[str, Stack]) -> Speed | None:
    """The grid given; else, of shapes, the usual one as far as the shortest of them reaches."""
    usual = _section(path, "speed", Speed, {key: tuple(value) for key, value in given.items()})
    for name, values in vars(usual).items():
        if not values or not all(isinstance(value, int) and value > 0 for value in values):
            raise HalflapError(f"{path}: speed.{name} is {list(values)}; it must be a list of whole numbers above 0")
    if given or not stacks:
        return usual if given else None
    shortest = min(
        stack.extra.get("max_position_embeddings", ModelConfig.max_position_embeddings) for stack in stacks.values()
    )
    return Speed(prompt=(max(1, min(*usual.prompt, shortest - max(usual.output))),))


def _shapes(path: Path, data: Mapping[str, Any], given: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    whole = _arms(path, given, data["base"])
    return {
        "vocab_size": data["vocab_size"],
        "parameters": parse_count(str(data["parameters"])) if data.get("parameters") else None,
        "recall": _section(path, "recall", Recall, data["recall"]) if data.get("recall") else None,
        "stacks": {arm: read_stack(fields, f"{path}, arm {arm!r}") for arm, fields in whole.items()},
    }


def _compressions(path: Path, data: Mapping[str, Any], given: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    shared = {"tokens": data["tokens"], "eval_tokens": data.get("eval_tokens", EVAL_TOKENS), "fit": data.get("fit", {})}
    base = data.get("base") or {}
    if JUDGED_ON in base:
        raise HalflapError(f"{path}: base has {JUDGED_ON}, on which the teacher is judged too; give it beside `arms:`")
    whole = _arms(path, given, _merged(shared, base))
    return {"teacher": data["teacher"], "compressions": read_compressions(path, whole, given)}


def _check_names(path: Path, data: Mapping[str, Any], size: str) -> None:
    own = ("teacher",) if "teacher" in data else ("vocab_size", "parameters", "recall")
    required = REQUIRED if "teacher" in data else (*REQUIRED, *OF_SHAPES)
    known = dict.fromkeys((*required, *OPTIONAL, *own))
    for name in data:
        if name not in known:
            raise HalflapError(f"{path}: {unknown_name(name, list(known), 'field of a study')}")
    if missing := [name for name in required if name not in data and name not in data.get("sizes", {}).get(size, {})]:
        raise HalflapError(f"{path} has no {missing[0]}; a study needs {', '.join(required)}: add it")
    if (sizes := data.get("sizes")) and size not in sizes:
        raise HalflapError(f"{path} has no size {size!r}; it has {', '.join(sizes)}: choose one with --size")


def _against(path: Path, named: Mapping[str, str | None]) -> dict[str, str]:
    """The arm named, else the one above; the first arm is measured from none."""
    found: dict[str, str] = {}
    names = list(named)
    for above, (name, other) in zip([None, *names], named.items()):
        if other is not None and (other not in named or other == name):
            others = [one for one in names if one != name]
            raise HalflapError(f"{path}: {unknown_name(str(other), others, f'reference for arm {name!r}')}")
        if chosen := other or above:
            found[name] = chosen
    return found


def _arms(path: Path, given: Mapping[str, Mapping[str, Any]], base: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Each arm's fields over those it starts from, over the base."""
    found: dict[str, dict[str, Any]] = {}
    for name, fields in given.items():
        own = dict(fields)
        start = own.pop("from", None)
        if start is not None and start not in found:
            raise HalflapError(
                f"{path}: arm {name!r} starts from {start!r}, which is no arm above it; those are {', '.join(found)}"
            )
        found[name] = _merged(found[start] if start else base, own)
    if not found:
        raise HalflapError(f"{path} has no arms; name at least one under `arms:`")
    return found


def _merged(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`over` laid on `under`, mappings within mappings too."""
    merged = dict(under)
    for name, value in over.items():
        below = merged.get(name)
        merged[name] = _merged(below, value) if isinstance(below, Mapping) and isinstance(value, Mapping) else value
    return merged


def _section(path: Path, name: str, kind: Any, values: Mapping[str, Any]) -> Any:
    known = kind.__dataclass_fields__
    for key in values:
        if key not in known:
            raise HalflapError(f"{path}: {unknown_name(f'{name}.{key}', [f'{name}.{k}' for k in known], 'field')}")
    try:
        return kind(**values)
    except TypeError as error:
        raise HalflapError(f"{path}: {name} is incomplete ({error}); add the missing field") from None
