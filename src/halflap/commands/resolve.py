"""What the words on a command line name: models, presets, files; and that they exist, before any work begins."""

from __future__ import annotations

import dataclasses
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from halflap.checkpoints.config import FAMILIES, read_config
from halflap.commands.study_file import study_path
from halflap.errors import HalflapError
from halflap.models.config import ModelConfig
from halflap.models.presets import PRESETS, preset
from halflap.recipe import INPUT, SHAPE, STUDY, inputs_of, leaves, read_yaml, unknown_name
from halflap.train.config import Fit
from halflap.train.phases import Plan, read_plan

SHAPE_FILES = (".yaml", ".yml", ".json")


def check_inputs(recipe: Any) -> None:
    """Raise HalflapError when a file or folder that the recipe names does not exist."""
    for name, values in inputs_of(recipe).items():
        leaf = leaves(type(recipe))[name]
        assert leaf.is_marked(INPUT)
        for value in values:
            if not value:
                raise HalflapError(f"{name} names an empty path; a shell variable may be unset: give a file or folder")
            if leaf.is_marked(STUDY):
                study_path(value)
                continue
            if Path(value).exists() or (leaf.is_marked(SHAPE) and value in PRESETS):
                continue
            if value in PRESETS:
                raise HalflapError(
                    f"{name} is {value!r}, a preset: a shape without weights; give a Hugging Face or run directory"
                )
            raise HalflapError(_missing(name, value, leaf.is_marked(SHAPE)))


def shape_of(name: str | Path) -> ModelConfig:
    """The model that a checkpoint or run directory, a YAML file or a preset's name describes; reads no weights.

    A YAML file holds a preset with changes (`preset: nemotron-h-55m` and fields of ModelConfig such as `vocab_size`),
    the keys of a family's Hugging Face config under `model_type`, or a whole `ModelConfig` with its `blocks`.
    """
    path = Path(name)
    if path.is_file() and path.suffix in SHAPE_FILES:
        return _read_shape(path)
    return read_config(path) if path.exists() else preset(str(name))


def plan_of(phases: str | None, settings: Fit, sources: int, world: int = 1) -> Plan | None:
    """The plan in the YAML of phases, for so many paths of text and ranks; None when there is no such file."""
    if phases is None:
        return None
    return read_plan(read_yaml(phases, "plan of phases"), settings.sequence_length, settings.batch_size, sources, world)


def _read_shape(path: Path) -> ModelConfig:
    data = read_yaml(path, "shape")
    if base := data.pop("preset", None):
        allowed = {field.name for field in dataclasses.fields(ModelConfig)} - {"blocks", "family"}
        for key in data:
            if key not in allowed:
                raise HalflapError(f"{path}: {unknown_name(key, sorted(allowed), 'field to change in a preset')}")
        return dataclasses.replace(preset(base), **data)
    if "blocks" in data:
        return ModelConfig.from_json(data)
    family = data.pop("model_type", None)
    if family not in FAMILIES:
        raise HalflapError(
            f"{path}: model_type is {family!r}; allowed are {', '.join(FAMILIES)}: add it, or start from a `preset:`"
        )
    return FAMILIES[family].read_config(data)


def _missing(name: str, value: str, may_be_preset: bool) -> str:
    path = Path(value)
    siblings = [str(path.parent / other.name) for other in path.parent.iterdir()] if path.parent.is_dir() else []
    near = get_close_matches(value, siblings + (list(PRESETS) if may_be_preset else []), n=1, cutoff=0.6)
    what = "neither a path nor a preset" if may_be_preset else "a path that does not exist"
    presets = "`halflap inspect --list` shows the presets" if may_be_preset else "correct it"
    return f"{name} is {value!r}, {what}; {f'did you mean {near[0]!r}?' if near else presets}"
