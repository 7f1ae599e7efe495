"""Nemotron-4 under the names of Megatron and NeMo: a directory of safetensors with `model_config.yaml` beside them.

One matrix holds queries, keys and values, its rows grouped by key/value head: that head's queries, its key, its value,
each `head_dim` rows. Norms bear the name of the matrix that reads them, and their weight is the distance from one here
too, so it is copied. `model_config.yaml` is NeMo's; a Hugging Face `config.json` of a Nemotron does as well.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from halflap.checkpoints import files
from halflap.checkpoints.checkpoint import float_dtype
from halflap.checkpoints.config import read_config, read_lineage
from halflap.checkpoints.family import Json, pick, read_float
from halflap.checkpoints.files import CODES, DTYPES, Entry, TensorSpec
from halflap.checkpoints.names import complaint
from halflap.checkpoints.nemotron import NEMOTRON
from halflap.errors import HalflapError
from halflap.files import atomic_write
from halflap.models.config import AttentionConfig, MLPConfig, ModelConfig, RopeConfig
from halflap.models.layout import layout, shape

CONFIG = "model_config.yaml"
LAYER = "decoder.layers.{i}."

# Their name in a layer, ours in its attention block (0) or MLP block (1); q, k and v are one tensor there.
ROWS: tuple[tuple[str, int, tuple[str, ...]], ...] = (
    ("self_attention.linear_qkv.layer_norm_weight", 0, ("norm.weight",)),
    ("self_attention.linear_qkv.layer_norm_bias", 0, ("norm.bias",)),
    *(
        (f"self_attention.linear_qkv.{kind}", 0, tuple(f"mixer.{part}_proj.{kind}" for part in "qkv"))
        for kind in ("weight", "bias")
    ),
    *((f"self_attention.linear_proj.{kind}", 0, (f"mixer.o_proj.{kind}",)) for kind in ("weight", "bias")),
    ("mlp.linear_fc1.layer_norm_weight", 1, ("norm.weight",)),
    ("mlp.linear_fc1.layer_norm_bias", 1, ("norm.bias",)),
    *((f"mlp.linear_fc1.{kind}", 1, (f"mixer.up_proj.{kind}",)) for kind in ("weight", "bias")),
    *((f"mlp.linear_fc2.{kind}", 1, (f"mixer.down_proj.{kind}",)) for kind in ("weight", "bias")),
)
ENDS: dict[str, tuple[str, ...]] = {
    "decoder.final_layernorm.weight": ("norm.weight",),
    "decoder.final_layernorm.bias": ("norm.bias",),
    "output_layer.weight": ("head.weight",),
}

PREFIX = re.compile(r"^(?:module\.|model\.)+")
UNFUSED = {  # where the norm is a module of its own (Megatron without Transformer Engine)
    "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
    "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
}
SHARDED = ("*.distcp", "weights/*.distcp", "mp_rank_*", "tp_rank_*", "iter_*")
CARRIES_NOTHING = re.compile(r"_extra_state$|rotary_pos_emb\.inv_freq$")


def tensor_names(config: ModelConfig) -> dict[str, tuple[str, ...]]:
    """Every tensor's name there, and ours of what it holds, in the order of the network."""
    ours = layout(config)
    table: dict[str, tuple[str, ...]] = {"embedding.word_embeddings.weight": ("embedding.weight",)}
    for layer in range(len(config.blocks) // 2):
        for theirs, offset, parts in ROWS:
            held = tuple(f"blocks.{2 * layer + offset}.{part}" for part in parts)
            table[LAYER.format(i=layer) + theirs] = held
    return {theirs: held for theirs, held in (table | ENDS).items() if held[0] in ours}


def shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Of every tensor there; fused rows add up."""
    ours = {name: shape(dims) for name, dims in layout(config).items()}
    return {
        theirs: (sum(ours[name][0] for name in held), *ours[held[0]][1:])
        for theirs, held in tensor_names(config).items()
    }


def split_qkv(fused: Tensor, block: AttentionConfig) -> tuple[Tensor, Tensor, Tensor]:
    """Queries (H * head_dim, ...), keys and values (K * head_dim, ...) of a fused weight or bias."""
    queries = block.queries_per_key_value_head
    grouped = fused.unflatten(0, (block.num_key_value_heads, queries + 2, block.head_dim))
    parts = grouped[:, :queries], grouped[:, queries], grouped[:, queries + 1]
    return tuple(part.reshape(-1, *fused.shape[1:]) for part in parts)  # type: ignore[return-value]


def join_qkv(query: Tensor, key: Tensor, value: Tensor, block: AttentionConfig) -> Tensor:
    """The inverse of `split_qkv`."""
    heads = block.num_key_value_heads, -1, block.head_dim
    return torch.cat([part.unflatten(0, heads) for part in (query, key, value)], 1).flatten(0, 2)


# ---- reading


@dataclass(frozen=True)
class MegatronCheckpoint:
    """An opened directory: its config and where each tensor is, by Megatron's names."""

    path: Path
    config: ModelConfig
    entries: Mapping[str, Entry]

    @property
    def dtypes(self) -> dict[str, str]:
        """Our name to the stored type."""
        return {
            ours: str(DTYPES[self.entries[theirs].spec.code]).removeprefix("torch.")
            for theirs, held in tensor_names(self.config).items()
            for ours in held
        }

    @property
    def lineage(self) -> list[dict[str, Any]]:
        """How it came to be, as far as halflap wrote it down."""
        return read_lineage(self.path)

    @cached_property
    def digest(self) -> str:
        """Names the content: 64 hexadecimal digits."""
        total = sha256(json.dumps(self.config.to_json(), sort_keys=True).encode())
        for name, entry in self.entries.items():
            total.update(name.encode() + files.digest_entry(entry))
        return total.hexdigest()

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor as stored under our names, one of theirs in memory at a time."""
        for theirs, held in tensor_names(self.config).items():
            stored = files.read_tensor(self.entries[theirs])
            parts = (stored,) if len(held) == 1 else split_qkv(stored, _attention(self.config, held[0]))
            yield from zip(held, parts, strict=True)


def is_megatron(directory: Path) -> bool:
    """Whether the tensors of a directory bear Megatron's names; HalflapError for its own sharded formats."""
    sharded = [path.name for pattern in SHARDED for path in directory.glob(pattern)]
    if sharded:
        raise HalflapError(
            f"{directory} is a sharded checkpoint of Megatron ({sorted(sharded)[0]}), which only Megatron reads; write "
            "its tensors there, merged to tensor- and pipeline-parallel size 1, as safetensors under the same names"
        )
    if not any(directory.glob("*.safetensors")):
        return False
    return any(_respell(name) == "embedding.word_embeddings.weight" for name in files.open_tensors(directory))


def open_megatron(directory: Path, settings: Json | None) -> MegatronCheckpoint:
    """Open a directory whose `model_config.yaml` says `settings`; None takes its `config.json`.

    Raises HalflapError for what the model has and Nemotron-4 has not, and for tensors that do not fit.
    """
    stored = {
        _respell(name): entry
        for name, entry in files.open_tensors(directory).items()
        if not CARRIES_NOTHING.search(name)
    }
    if settings is None:
        config = read_config(directory)
        if config.family != NEMOTRON.name:
            raise HalflapError(
                f"{directory / 'config.json'} is of family {config.family!r} and tensors of Megatron's names are read "
                f"for {NEMOTRON.name!r} alone: convert them with the tool that belongs to the model"
            )
    else:
        config = config_of(settings, stored)
    expected = shapes(config)
    _refuse_shards(directory, expected, stored)
    missing = [name for name in expected if name not in stored]
    unknown = [name for name in stored if name not in expected]
    wrong = [
        f"{name} is {stored[name].spec.shape}, expected {expected[name]}"
        for name in expected
        if name in stored and stored[name].spec.shape != expected[name]
    ]
    if missing or unknown or wrong:
        raise HalflapError(complaint(str(directory), missing, unknown, wrong))
    return MegatronCheckpoint(directory, config, {name: stored[name] for name in expected})


def _respell(name: str) -> str:
    name = PREFIX.sub("", name)
    for theirs, ours in UNFUSED.items():
        name = name.replace(theirs, ours)
    return name


def _refuse_shards(directory: Path, expected: Mapping[str, tuple[int, ...]], stored: Mapping[str, Entry]) -> None:
    """One tensor-parallel rank's part has the right names and a fraction of the rows."""
    name = LAYER.format(i=0) + "self_attention.linear_qkv.weight"
    if name not in stored or name not in expected:
        return
    rows, whole = stored[name].spec.shape[0], expected[name][0]
    if 0 < rows < whole and whole % rows == 0:
        raise HalflapError(
            f"{name} in {directory} has {rows} of {whole} rows, so these are the tensors of one of {whole // rows} "
            "tensor-parallel ranks; halflap does not shard tensors: merge the ranks to size 1 first"
        )


def _attention(config: ModelConfig, name: str) -> AttentionConfig:
    block = config.blocks[int(name.split(".")[1])]
    assert isinstance(block, AttentionConfig)
    return block


ALLOWED: dict[str, tuple[Any, ...]] = {
    "normalization": ("layernorm1p", "LayerNorm"),
    "layernorm_zero_centered_gamma": (True,),
    "apply_layernorm_1p": (True,),
    "activation": ("squared-relu", "squared_relu"),
    "position_embedding_type": ("rope",),
    "gated_linear_unit": (False,),
    "rotary_interleaved": (False,),
    "qk_layernorm": (False,),
    "num_moe_experts": (0,),
    "seq_len_interpolation_factor": (1,),
    "apply_query_key_layer_scaling": (False,),
    "window_size": (),
}


def config_of(settings: Json, stored: Mapping[str, Entry]) -> ModelConfig:
    """The model of NeMo's settings (either generation's keys); the vocabulary's size is that of the stored embedding.

    Keys about training are ignored. Raises HalflapError for a missing size and for what Nemotron-4 has not.
    """
    settings = settings["config"] if isinstance(settings.get("config"), Mapping) else settings
    for key, allowed in ALLOWED.items():
        if settings.get(key) is not None and settings[key] not in allowed:
            raise HalflapError(
                f"{CONFIG} has {key}={settings[key]!r}, which Nemotron-4 has not; allowed is "
                f"{' or '.join(map(repr, allowed)) or 'null'}: convert this model with the tool that belongs to it"
            )
    zero_centred = settings.get("layernorm_zero_centered_gamma") or settings.get("apply_layernorm_1p")
    if settings.get("normalization") == "LayerNorm" and not zero_centred:
        raise HalflapError(
            f"{CONFIG} has normalization='LayerNorm' without layernorm_zero_centered_gamma=true, so its norm weights "
            "are whole gains; Nemotron-4 stores them less one: convert this model with the tool that belongs to it"
        )
    needed = ("num_layers", "hidden_size", "num_attention_heads")
    sizes = [pick(settings, None, key) for key in needed]
    fraction = pick(settings, None, "rotary_percent", "rotary_percentage")
    if lacking := [k for k, v in zip((*needed, "rotary_percent"), (*sizes, fraction), strict=True) if v is None]:
        raise HalflapError(f"{CONFIG} has no {lacking[0]}: add it, or a config.json of the Hugging Face kind instead")
    embedding = stored.get("embedding.word_embeddings.weight")
    layers, hidden, heads = sizes
    if not all(type(n) is int and n > 0 for n in sizes):
        raise HalflapError(
            f"{CONFIG} has num_layers={layers!r}, hidden_size={hidden!r}, num_attention_heads={heads!r}; each must be "
            "a whole number of at least 1: correct it"
        )
    head_dim = pick(settings, None, "kv_channels")
    attention = AttentionConfig(
        num_attention_heads=heads,
        num_key_value_heads=pick(settings, heads, "num_query_groups"),
        head_dim=hidden // heads if head_dim is None else head_dim,
        rope=RopeConfig(read_float(pick(settings, 10000.0, "rotary_base")), read_float(fraction)),
        bias=_qkv_has_bias(stored),
    )
    mlp = MLPConfig(
        pick(settings, 4 * hidden, "ffn_hidden_size"), bias=LAYER.format(i=0) + "mlp.linear_fc1.bias" in stored
    )
    return ModelConfig(
        family=NEMOTRON.name,
        vocab_size=pick(settings, 256000, "vocab_size") if embedding is None else embedding.spec.shape[0],
        hidden_size=hidden,
        blocks=(attention, mlp) * layers,
        norm="layer1p",
        norm_eps=read_float(pick(settings, 1e-5, "layernorm_epsilon")),
        tie_word_embeddings="output_layer.weight" not in stored,
        max_position_embeddings=pick(settings, 4096, "max_position_embeddings", "seq_length", "encoder_seq_length"),
        initializer_range=read_float(pick(settings, 0.0134, "init_method_std")),
        bos_token_id=settings.get("bos_token_id", 2),
        eos_token_id=settings.get("eos_token_id", 3),
        pad_token_id=settings.get("pad_token_id"),
    )


def _qkv_has_bias(stored: Mapping[str, Entry]) -> bool:
    return LAYER.format(i=0) + "self_attention.linear_qkv.bias" in stored


# ---- writing


def cannot_write(config: ModelConfig) -> str | None:
    """Why Megatron's names cannot hold this model, or None."""
    if config.family != NEMOTRON.name:
        return f"it is a {config.family} and this form is written for {NEMOTRON.name} alone"
    if reason := NEMOTRON.cannot_write(config):
        return reason
    attention, mlp = config.blocks[:2]
    assert isinstance(attention, AttentionConfig) and isinstance(mlp, MLPConfig) and attention.rope is not None
    if attention.rope.scaling is not None:
        return "its rotary embedding is scaled"
    if mlp.activation != "relu2":
        return f"its activation is {mlp.activation}"
    return None


def settings_of(config: ModelConfig) -> dict[str, Any]:
    """`model_config.yaml` of a model, which `config_of` reads; only when `cannot_write` is None."""
    attention, mlp = config.blocks[:2]
    assert isinstance(attention, AttentionConfig) and isinstance(mlp, MLPConfig) and attention.rope is not None
    stored = config.to_json()
    return {
        "num_layers": len(config.blocks) // 2,
        "hidden_size": config.hidden_size,
        "ffn_hidden_size": mlp.intermediate_size,
        "num_attention_heads": attention.num_attention_heads,
        "num_query_groups": attention.num_key_value_heads,
        "kv_channels": attention.head_dim,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_position_embeddings,
        "normalization": "layernorm1p",
        "layernorm_epsilon": config.norm_eps,
        "activation": "squared-relu",
        "position_embedding_type": "rope",
        "rotary_percentage": attention.rope.fraction,
        "rotary_base": attention.rope.theta,
        "share_embeddings_and_output_weights": config.tie_word_embeddings,
        "bias": mlp.bias,
        "add_qkv_bias": attention.bias,
        "init_method_std": config.initializer_range,
        **{key: stored[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")},
    }


def write_megatron(
    directory: Path, config: ModelConfig, tensors: Iterable[tuple[str, Tensor]], dtypes: Mapping[str, str]
) -> None:
    """Write a stream of (our name, tensor) in the order of the layout; dtypes: our name to type, e.g. "bfloat16"."""
    expected = shapes(config)
    specs = {
        theirs: TensorSpec(CODES[float_dtype(dtypes[held[0]])], expected[theirs])
        for theirs, held in tensor_names(config).items()
    }
    files.write_shards(directory, specs, _fused(config, tensors))
    with atomic_write(directory / CONFIG, "w") as file:
        file.write("".join(f"{key}: {_scalar(value)}\n" for key, value in settings_of(config).items()))


def _scalar(value: Any) -> str:
    """A value as JSON and YAML 1.1 both read it: there a float needs its point."""
    return re.sub(r"^(-?\d+)e", r"\1.0e", json.dumps(value))


def _fused(config: ModelConfig, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Theirs from ours; queries and keys wait for the values."""
    place = {ours: (theirs, held) for theirs, held in tensor_names(config).items() for ours in held}
    waiting: dict[str, Tensor] = {}
    for name, tensor in tensors:
        theirs, held = place[name]
        if len(held) == 1:
            yield theirs, tensor
            continue
        waiting[name] = tensor
        if all(part in waiting for part in held):
            query, key, value = (waiting.pop(part) for part in held)
            yield theirs, join_qkv(query, key, value, _attention(config, name))
