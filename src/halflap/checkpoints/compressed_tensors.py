"""Two forms of compressed-tensors, read by transformers and vLLM: packed weights said in config.json.

"pack-quantized" holds whole numbers, "float-quantized" floats of 8 bits.

It knows whole linear maps only, so it can say what we store where every matrix is packed whole or left whole, and its
groups divide the inputs. The tensors themselves lie alike in both. No torch.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal

from halflap.errors import HalflapError
from halflap.models.config import ModelConfig
from halflap.models.quantization import VOCABULARY, Quantization, matrices, slices

METHOD = "compressed-tensors"
FORMATS: dict[str, Literal["int", "float"]] = {"pack-quantized": "int", "float-quantized": "float"}


def cannot_say(config: ModelConfig, quantization: Quantization) -> str | None:
    """Why this form cannot say how a model is packed, in a clause, or None."""
    for name, matrix in matrices(config, quantization).items():
        if name == "embedding.weight":
            return "its embedding is packed, which compressed-tensors does to linear maps alone"
        if matrix.kept_rows:
            return f"some rows of {name} are packed and others not, which compressed-tensors does not have"
        if matrix.number == "int" and (matrix.inputs % matrix.group_size or matrix.inputs * matrix.bits % 32):
            return f"{name} has {matrix.inputs} inputs, which groups of {matrix.group_size} do not divide"
    return None


def describe(config: ModelConfig, quantization: Quantization, names: Mapping[str, str]) -> dict[str, Any]:
    """The `quantization_config` of config.json; names: our parameter to the file's."""
    packed = matrices(config, quantization)
    linear = [name for name in dict.fromkeys(part.parameter for part in slices(config)) if name != "embedding.weight"]
    groups = {"group_0": _group(["Linear"], quantization)}
    if "head.weight" in packed and (quantization.bits, quantization.group_size) != (8, None):
        groups["group_1"] = _group([_module(names["head.weight"])], Quantization(8))
    return {
        "quant_method": METHOD,
        "format": next(name for name, number in FORMATS.items() if number == quantization.number),
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": [_module(names[name]) for name in linear if name not in packed]
        + (["lm_head"] if config.tie_word_embeddings else []),
    }


def _group(targets: list[str], form: Quantization) -> dict[str, Any]:
    weights = {
        "num_bits": form.bits,
        "type": form.number,
        "symmetric": True,
        "strategy": "group" if form.group_size else "channel",
        "group_size": form.group_size,
        "dynamic": False,
    }
    return {"targets": targets, "weights": weights, "input_activations": None, "output_activations": None}


def _module(name: str) -> str:
    return name.removesuffix(".weight")


def read(data: Mapping[str, Any], config: ModelConfig, names: Mapping[str, str]) -> Quantization:
    """The quantization that a `quantization_config` says; names: our parameter to the file's.

    Raises HalflapError for every other method, for activations of few bits, and for all that `describe` would not say.
    """
    if data.get("quant_method") != METHOD or data.get("format") not in FORMATS:
        method = "/".join(str(data.get(key)) for key in ("quant_method", "format") if data.get(key))
        raise HalflapError(
            f"config.json has a quantization_config of {method or 'an unknown method'}; of quantized weights those of "
            f"{METHOD}/{' or '.join(FORMATS)} are read: dequantize the checkpoint to bfloat16 or float32 first"
        )
    try:
        weights = data["config_groups"]["group_0"]["weights"]
        group = weights["group_size"] if weights["strategy"] == "group" else None
        ignored = re.compile("|".join(_pattern(item) for item in data.get("ignore", ())) or r"(?!)")
        kept = {part.name for part in slices(config) if ignored.fullmatch(_module(names[part.parameter]))}
        keep = tuple(sorted(kept | {VOCABULARY["embedding.weight"]}))
        found = Quantization(weights["num_bits"], group, keep, FORMATS[data["format"]])
    except (KeyError, TypeError, re.error) as error:
        raise HalflapError(
            f"the quantization_config of config.json is not understood ({error!r}): copy it again"
        ) from None
    if _meaning(data) != _meaning(describe(config, found, names)):
        raise HalflapError(
            "the quantization_config of config.json says more than symmetric packed weights of 4 or 8 bits, the same "
            "in all layers, and activations as they are: dequantize the checkpoint to bfloat16 or float32 first"
        )
    return found


def _pattern(item: str) -> str:
    return item.removeprefix("re:") if item.startswith("re:") else re.escape(item)


def _meaning(data: Mapping[str, Any]) -> list[Any]:
    """What two descriptions of the same packing have in common, in any order; defaults and names of groups left out."""
    compared = ("num_bits", "type", "symmetric", "strategy", "group_size", "dynamic", "actorder")
    return sorted(
        repr(
            (sorted(group["targets"]), [group["weights"].get(key) for key in compared], group.get("input_activations"))
        )
        for group in data["config_groups"].values()
    )
