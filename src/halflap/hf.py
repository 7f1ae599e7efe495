"""Use with transformers, TRL and PEFT: after `import halflap.hf` the Auto classes open every checkpoint of halflap.

    import halflap.hf
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained("DIR")        # students with unequal blocks included
    tokenizer = AutoTokenizer.from_pretrained("DIR")

Checkpoints that a stock class can express open as that class, with or without this import; to run one on halflap's
own blocks and kernels, use `halflap.hf.HalflapForCausalLM.from_pretrained("DIR")`. No code of a checkpoint ever runs.
"""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from halflap.checkpoints.config import FAMILIES, OWN_MODEL_TYPE
from halflap.huggingface.cache import HalflapCache
from halflap.huggingface.configuration import HalflapConfig
from halflap.huggingface.model import HalflapForCausalLM, HalflapModel

__all__ = ["HalflapCache", "HalflapConfig", "HalflapForCausalLM", "HalflapModel"]


def _register(model_type: str, config: type[HalflapConfig], model: type[HalflapForCausalLM]) -> None:
    AutoConfig.register(model_type, config, exist_ok=True)
    AutoModelForCausalLM.register(config, model, exist_ok=True)
    AutoTokenizer.register(config, fast_tokenizer_class=PreTrainedTokenizerFast, exist_ok=True)


def _classes_of(model_type: str, architecture: str) -> tuple[type[HalflapConfig], type[HalflapForCausalLM]]:
    """Classes of a family that transformers does not have; they differ from ours by name only."""
    named: dict[str, Any] = {"__module__": __name__, "model_type": model_type}
    config = type(architecture.replace("ForCausalLM", "Config"), (HalflapConfig,), named)
    model = type(architecture, (HalflapForCausalLM,), {"__module__": __name__, "config_class": config})
    globals().update({config.__name__: config, architecture: model})
    return config, model


_register(OWN_MODEL_TYPE, HalflapConfig, HalflapForCausalLM)
for _name in FAMILIES:
    if _name not in CONFIG_MAPPING:
        _register(_name, *_classes_of(_name, FAMILIES[_name].architecture))
