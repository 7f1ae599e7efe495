"""Which families there are, and a checkpoint's config read and written; no torch, so `inspect` is quick.

A directory of ours has `halflap.json` (always) and `config.json`: of the stock class where that can express the model,
else of model type `halflap` with the model under the same name, for `halflap.hf`. Both are read and must agree. A
foreign Hugging Face directory has `config.json` alone.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from halflap.checkpoints import compressed_tensors
from halflap.checkpoints.family import Family
from halflap.checkpoints.hymba import HYMBA
from halflap.checkpoints.llama import LLAMA
from halflap.checkpoints.names import expand
from halflap.checkpoints.nemotron import NEMOTRON
from halflap.checkpoints.nemotron_h import NEMOTRON_H
from halflap.errors import HalflapError
from halflap.files import atomic_write, write_json
from halflap.models.config import ModelConfig
from halflap.models.quantization import Quantization

FAMILIES: dict[str, Family] = {"nemotron_h": NEMOTRON_H, "llama": LLAMA, "nemotron": NEMOTRON, "hymba": HYMBA}
OWN_MODEL_TYPE, OWN_ARCHITECTURE = "halflap", "HalflapForCausalLM"
FORMAT = 1
QUANTIZATION = "quantization_config"  # of config.json
GENERATION = "generation_config.json"
Lineage = Sequence[Mapping[str, Any]]


def family_of(config: ModelConfig) -> Family:
    """Raise HalflapError when the config's family is not known."""
    if config.family not in FAMILIES:
        raise HalflapError(
            f"family {config.family!r} is not known; allowed are {', '.join(FAMILIES)}: correct the config"
        )
    return FAMILIES[config.family]


def find_directory(path: str | Path) -> Path:
    """The directory that holds config and weights: `path` itself, or its `checkpoint/` when it is a run directory."""
    path = Path(path)
    if not path.exists():
        raise HalflapError(f"{path} does not exist: give a checkpoint directory or a run directory")
    if path.is_file():
        hint = "import it first with `halflap import`" if path.suffix == ".gguf" else "give the directory it lies in"
        raise HalflapError(f"{path} is a file and a checkpoint is a directory: {hint}")
    for candidate in (path, path / "checkpoint"):
        if any((candidate / name).exists() for name in ("config.json", "halflap.json")):
            return candidate
    raise HalflapError(
        f"{path} has no config.json: give a Hugging Face directory or a run directory that has written its checkpoint/"
    )


def read_config(path: str | Path) -> ModelConfig:
    """The model of a checkpoint or run directory; weights are not touched.

    Raises HalflapError for what halflap cannot run, for broken JSON, and when halflap.json and config.json disagree.
    """
    directory = find_directory(path)
    own = _read_own(directory)
    stock = _read_stock(directory)
    config = own if own is not None else stock
    if config is None:
        raise HalflapError(
            f"{directory / 'config.json'} has model_type {OWN_MODEL_TYPE!r} but no model in it, and there is "
            "no halflap.json beside it: copy it too"
        )
    if own is not None and stock is not None and own != stock:
        raise HalflapError(
            f"halflap.json and config.json in {directory} disagree on {_difference(own, stock)}: correct one, or "
            "delete halflap.json if config.json is right"
        )
    return config


def uses_own_names(directory: Path) -> bool:
    """Whether the tensors in `directory` carry our names, because no stock class can express the model."""
    file = directory / "config.json"
    return not file.exists() or read_json(file).get("model_type") == OWN_MODEL_TYPE


def _read_own(directory: Path) -> ModelConfig | None:
    file = directory / "halflap.json"
    if not file.exists():
        return None
    data = read_json(file)
    if data.get("format") != FORMAT or not isinstance(data.get("config"), Mapping):
        raise HalflapError(
            f"{file} has format {data.get('format')!r} and this halflap reads {FORMAT}: "
            "use the halflap version that wrote it"
        )
    with _telling(file):
        config = ModelConfig.from_json(data["config"])
    family_of(config)
    return config


def _read_stock(directory: Path) -> ModelConfig | None:
    """The model of config.json; None when that is absent, or of our own model type and says no more."""
    file = directory / "config.json"
    if not file.exists():
        return None
    data = read_json(file)
    kind = data.get("model_type")
    if kind == OWN_MODEL_TYPE:
        with _telling(file):
            own = data.get(OWN_MODEL_TYPE)
            return ModelConfig.from_json(own) if isinstance(own, Mapping) else None
    if kind not in FAMILIES:
        raise HalflapError(
            f"{file} has model_type {kind!r}; allowed are {', '.join((*FAMILIES, OWN_MODEL_TYPE))}: "
            "use a checkpoint of one of these families"
        )
    if (data.get(QUANTIZATION) or {}).get("quant_method") == compressed_tensors.METHOD:
        data = {key: value for key, value in data.items() if key != QUANTIZATION}  # `read_quantization`'s
    with _telling(file):
        return FAMILIES[kind].read_config(data)


@contextlib.contextmanager
def _telling(file: Path) -> Iterator[None]:
    """Errors say which file they are about."""
    try:
        yield
    except HalflapError as error:
        raise HalflapError(f"{file}: {error}") from None
    except (TypeError, ValueError, AttributeError, KeyError) as error:
        raise HalflapError(
            f"{file} has a value of a kind that its key cannot have ({error}): correct it, or copy the file again"
        ) from None


def _difference(a: ModelConfig, b: ModelConfig) -> str:
    """The first field in which two configs differ, with both values."""
    one, other = a.to_json(), b.to_json()
    for key in one | other:
        value: Any = one.get(key)
        if key == "blocks":
            if len(value) != len(other[key]):
                return f"the number of blocks ({len(value)} and {len(other[key])})"
            for index, (x, y) in enumerate(zip(value, other[key])):
                for name in x | y:
                    if x.get(name) != y.get(name):
                        return f"{name} of block {index} ({x.get(name)!r} and {y.get(name)!r})"
        elif value != other.get(key):
            return f"{key} ({value!r} and {other.get(key)!r})"
    return "nothing that can be named"


def not_stock_because(config: ModelConfig, quantization: Quantization | None = None) -> str | None:
    """Why no stock class opens a checkpoint of the model, packed like this; None where one does."""
    reason = family_of(config).cannot_write(config)
    if reason is None and quantization is not None:
        reason = compressed_tensors.cannot_say(config, quantization)
    return reason


def file_names(config: ModelConfig, *, own: bool) -> dict[str, str]:
    """Our name of every parameter to the file's: the family's, or ours where no stock class opens the file."""
    return expand(config, () if own else family_of(config).rows)


def read_quantization(directory: Path, config: ModelConfig) -> Quantization | None:
    """How the weights in a directory are packed; None for plain ones. Raises HalflapError for a way not known."""
    own, stock = directory / "halflap.json", directory / "config.json"
    if own.exists():
        found = read_json(own).get("quantization")
        return None if found is None else Quantization.from_json(found)
    said = read_json(stock).get(QUANTIZATION) if stock.exists() else None
    return compressed_tensors.read(said, config, file_names(config, own=False)) if said else None


def end_ids(config: ModelConfig) -> tuple[int, ...]:
    """Ids that end a text, as the config has them: none, one or several."""
    ids = config.eos_token_id
    return ids if isinstance(ids, tuple) else () if ids is None else (ids,)


def read_ends(directory: Path, config: ModelConfig) -> tuple[int, ...]:
    """Ids that end a text: the config's, then those of generation_config.json beside them, where transformers stops.

    Raises HalflapError for a generation_config.json whose eos_token_id is no token id.
    """
    file = directory / GENERATION
    said = read_json(file).get("eos_token_id") if file.exists() else None
    listed = [] if said is None else said if isinstance(said, list) else [said]
    if wrong := [one for one in listed if type(one) is not int]:
        raise HalflapError(f"{file} has eos_token_id {wrong[0]!r}; a token id is a whole number or null: correct it")
    return tuple(dict.fromkeys((*end_ids(config), *listed)))


def write_config(
    directory: Path, config: ModelConfig, dtype: str, version: str, quantization: Quantization | None = None
) -> None:
    """Write `config.json` and `halflap.json`; dtype is the torch name that loaders are told, e.g. "bfloat16"."""
    family = family_of(config)
    reason = not_stock_because(config, quantization)
    if reason is None:
        data = {"architectures": [family.architecture], "model_type": family.name, "torch_dtype": dtype}
        data |= family.write_config(config)
        if quantization is not None:
            data[QUANTIZATION] = compressed_tensors.describe(config, quantization, file_names(config, own=False))
    else:
        data = {
            "architectures": [OWN_ARCHITECTURE],
            "model_type": OWN_MODEL_TYPE,
            "torch_dtype": dtype,
            "vocab_size": config.vocab_size,
            "hidden_size": config.hidden_size,
            "num_hidden_layers": len(config.blocks),
            "tie_word_embeddings": config.tie_word_embeddings,
            OWN_MODEL_TYPE: config.to_json(),
        }
    own = {"format": FORMAT, "halflap": version, "not_stock_because": reason, "config": config.to_json()}
    if quantization is not None:
        own["quantization"] = quantization.to_json()
    write_json(directory / "halflap.json", own)
    with atomic_write(directory / "config.json", "w") as file:  # not write_json: a time step limit may be Infinity here
        file.write(json.dumps(data, indent=2) + "\n")


def read_lineage(directory: Path) -> list[dict[str, Any]]:
    """How a checkpoint came to be, oldest step first; empty for a foreign one."""
    file = directory / "lineage.json"
    if not file.exists():
        return []
    steps = read_json(file).get("steps")
    if not isinstance(steps, list):
        raise HalflapError(f"{file} has no list of steps: delete it, or copy it again")
    return steps


def lineage_step(verb: str, inputs: Mapping[str, str], **numbers: Any) -> dict[str, Any]:
    """One step: the verb, what it read as name to digest, and its numbers."""
    return {"verb": verb, "inputs": dict(inputs), **numbers}


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object; HalflapError names the file when it is none."""
    try:
        data = json.loads(file.read_text("utf-8"))
    except (ValueError, OSError) as error:
        raise HalflapError(f"{file} cannot be read as JSON ({error}): copy or download it again") from None
    if not isinstance(data, dict):
        raise HalflapError(f"{file} holds a {type(data).__name__} and an object is needed: copy or download it again")
    return data
