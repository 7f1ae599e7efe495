"""HalflapConfig: a ModelConfig behind the fields that transformers, TRL and PEFT read and write.

`halflap` holds the whole ModelConfig as JSON. The fields of `FREE` stand beside it, because others change them
(resizing the vocabulary, aligning special tokens), and win over it; the other mirrored fields are for reading.
On disk there is one writer, `checkpoints.config.write_config`, so that what is saved here is a checkpoint of ours.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from halflap import __version__
from halflap.checkpoints.config import FAMILIES, OWN_MODEL_TYPE, find_directory, read_config, read_json, write_config
from halflap.errors import HalflapError
from halflap.models.config import ModelConfig

FREE = (
    *("vocab_size", "tie_word_embeddings", "max_position_embeddings", "initializer_range"),
    *("bos_token_id", "eos_token_id", "pad_token_id"),
)


class HalflapConfig(PreTrainedConfig):
    """Any model of halflap: `HalflapConfig.of(model_config)`, `.from_pretrained(DIR)`, `.model_config()` back."""

    model_type = OWN_MODEL_TYPE
    auto_map = {}  # noqa: RUF012 - no code comes with a checkpoint; TRL reads this
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012 - Trainer appends to it

    halflap: dict[str, Any] | None = None
    use_cache: bool = True
    vocab_size: int | None = None
    hidden_size: int | None = None
    num_hidden_layers: int | None = None
    tie_word_embeddings: bool | None = None
    max_position_embeddings: int | None = None
    initializer_range: float | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.halflap is not None:
            config = ModelConfig.from_json(self.halflap)
            for name in FREE:
                if getattr(self, name) is None:
                    setattr(self, name, self.halflap.get(name))
            self.hidden_size, self.num_hidden_layers = config.hidden_size, len(config.blocks)
        super().__post_init__(**kwargs)

    @classmethod
    def of(cls, config: ModelConfig, **fields: Any) -> HalflapConfig:
        """The config of a model of ours."""
        return cls(halflap=config.to_json(), **fields)

    def model_config(self) -> ModelConfig:
        """Ours, with what was changed here. Raises HalflapError when this config describes no model."""
        if self.halflap is None:
            raise HalflapError(
                f"this {type(self).__name__} has no blocks: open one with from_pretrained(DIR), or make it with "
                f"{type(self).__name__}.of(model_config)"
            )
        eos = self.eos_token_id
        changed = {name: getattr(self, name) for name in FREE}
        changed["eos_token_id"] = tuple(eos) if isinstance(eos, list | tuple) else eos
        return dataclasses.replace(ModelConfig.from_json(self.halflap), **changed)

    def to_dict(self) -> dict[str, Any]:
        output = super().to_dict()
        if self.halflap is not None:
            output["halflap"] = self.model_config().to_json()
        return output

    def save_pretrained(self, save_directory: Any, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Write config.json and halflap.json; config.json is the stock class's where that can express the model."""
        if push_to_hub:
            raise HalflapError("push_to_hub=True is not supported here; save first, then call .push_to_hub(REPOSITORY)")
        directory = Path(save_directory)
        directory.mkdir(parents=True, exist_ok=True)
        dtype = str(self.dtype or "float32").removeprefix("torch.")
        write_config(directory, self.model_config(), dtype, __version__)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """From a config.json: our own, a family's, or an older one of ours, which its halflap.json completes."""
        fields = dict(config_dict)
        place = Path(kwargs.get("name_or_path") or fields.get("name_or_path") or "")
        if "halflap" not in fields and cls.model_type in FAMILIES:
            found = FAMILIES[cls.model_type].read_config(fields)
            kept = ("architectures", "dtype", "torch_dtype")
            fields = {name: fields[name] for name in kept if name in fields} | {"halflap": found.to_json()}
        elif "halflap" not in fields and (place / "halflap.json").is_file():
            fields["halflap"] = read_config(place).to_json()
        return super().from_dict(fields, **kwargs)

    @classmethod
    def get_config_dict(
        cls, pretrained_model_name_or_path: Any, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Of every directory that halflap reads, stock ones and run directories included; the hub as the base class."""
        if not Path(pretrained_model_name_or_path).is_dir():
            return super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        directory = find_directory(pretrained_model_name_or_path)
        found: dict[str, Any] = {"model_type": cls.model_type, "halflap": read_config(directory).to_json()}
        file = directory / "config.json"
        stored = read_json(file) if file.exists() else {}
        return found | {"dtype": stored.get("dtype") or stored.get("torch_dtype")}, kwargs
