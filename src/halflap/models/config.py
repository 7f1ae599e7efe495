"""The model as data: a tuple of small frozen block configs and one model config.

A block is `x + mixer(norm(x))`. Its config says which mixer and how wide, so blocks may differ in every width
and any order is allowed; the pattern string (`M` Mamba-2, `S` Mamba-1, `*` attention, `H` attention and SSM side by
side, `-` MLP, `L` linear) is a view for people. Names follow the Hugging Face config fields where one exists. Pure
data: no torch.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeVar

from halflap.errors import HalflapError
from halflap.models.sharing import check_key_value_sources

T = TypeVar("T")
Activation = Literal["relu2", "silu"]
ACTIVATIONS: tuple[str, ...] = ("relu2", "silu")
Norm = Literal["rms", "layer1p"]
NORMS: tuple[str, ...] = ("rms", "layer1p")


def _require_positive(owner: object, *fields: str) -> None:
    for field in fields:
        value = getattr(owner, field)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise HalflapError(
                f"{type(owner).__name__}.{field} is {value!r}; it must be a whole number of at least 1: "
                "correct the config"
            )


@dataclass(frozen=True)
class RopeScaling:
    """Frequency rescaling of Llama 3.1: wavelengths above the original context are slowed by `factor`."""

    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


@dataclass(frozen=True)
class NTKScaling:
    """A larger theta for a longer context, at every length (Hymba's fixed "ntk").

    theta becomes theta stretch^(r / (r - 2)), stretch = factor L / L0 - factor + 1, with r rotated channels, L and L0
    the new and the original context. HalflapError where that base is not above 0: no theta is real then.
    """

    original_max_position_embeddings: int
    max_position_embeddings: int
    factor: float = 2.0

    def __post_init__(self) -> None:
        _require_positive(self, "original_max_position_embeddings", "max_position_embeddings")
        if self.stretch <= 0:
            old, new = self.original_max_position_embeddings, self.max_position_embeddings
            raise HalflapError(
                f"the rotary embedding cannot be stretched (NTK, factor {self.factor:g}) from a context of {old} "
                f"tokens to one of {new}: give a context above {old * (1 - 1 / self.factor):g}, or no rope scaling"
            )

    @property
    def stretch(self) -> float:
        return 1 + self.factor * (self.max_position_embeddings / self.original_max_position_embeddings - 1)


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding of the first `fraction` of each head's channels."""

    theta: float = 10000.0
    fraction: float = 1.0
    scaling: RopeScaling | NTKScaling | None = None


@dataclass(frozen=True)
class AttentionConfig:
    """Causal grouped-query attention; `num_attention_heads * head_dim` need not equal the hidden size.

    value_head_dim: channels of a value head where not head_dim. window: a query sees itself, the `window` tokens before
    it and every meta token; None sees all. key_value_source: the earlier block whose keys (already rotated) and values
    this one reads; it then has none of its own, neither weights nor cache.
    """

    symbol: ClassVar[str] = "*"
    kind: ClassVar[str] = "attention"
    ssm: ClassVar[None] = None

    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rope: RopeConfig | None = None
    bias: bool = False
    value_head_dim: int | None = None
    window: int | None = None
    key_value_source: int | None = None

    def __post_init__(self) -> None:
        _require_positive(self, "num_attention_heads", "num_key_value_heads", "head_dim")
        _require_positive(self, *(f for f in ("value_head_dim", "window") if getattr(self, f) is not None))
        if self.value_head_dim == self.head_dim:  # one way to say it, so that equal blocks are equal
            object.__setattr__(self, "value_head_dim", None)
        if self.num_attention_heads % self.num_key_value_heads:
            raise HalflapError(
                f"num_attention_heads={self.num_attention_heads} is not divisible by "
                f"num_key_value_heads={self.num_key_value_heads}; every key/value head must serve equally many query "
                "heads: choose a multiple"
            )
        if self.rope is not None and (round(self.head_dim * self.rope.fraction) % 2 or self.rope.fraction > 1):
            raise HalflapError(
                f"the rotary part of head_dim={self.head_dim} at fraction {self.rope.fraction} is "
                f"{self.head_dim * self.rope.fraction:g} channels; it must be an even number of at most head_dim: "
                "correct the config"
            )

    @property
    def queries_per_key_value_head(self) -> int:
        return self.num_attention_heads // self.num_key_value_heads

    @property
    def value_dim(self) -> int:
        return self.head_dim if self.value_head_dim is None else self.value_head_dim

    @property
    def attention(self) -> AttentionConfig:
        return self


@dataclass(frozen=True)
class Mamba2Config:
    """Mamba-2 (Dao & Gu 2024): heads in groups, each group sharing B and C and one RMS normalisation."""

    symbol: ClassVar[str] = "M"
    kind: ClassVar[str] = "mamba2"
    attention: ClassVar[None] = None

    num_heads: int
    head_dim: int
    num_groups: int
    state_size: int
    conv_kernel: int = 4
    chunk_size: int = 128
    conv_bias: bool = True
    time_step_limit: tuple[float, float] = (0.0, math.inf)
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        _require_positive(self, "num_heads", "head_dim", "num_groups", "state_size", "conv_kernel", "chunk_size")
        if self.num_heads % self.num_groups:
            raise HalflapError(
                f"mamba_num_heads={self.num_heads} is not divisible by n_groups={self.num_groups}; heads of one group "
                "share B and C, so every group needs equally many: choose a multiple"
            )

    @property
    def inner_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def conv_size(self) -> int:
        return self.inner_size + 2 * self.num_groups * self.state_size

    @property
    def heads_per_group(self) -> int:
        return self.num_heads // self.num_groups

    @property
    def ssm(self) -> Mamba2Config:
        return self


@dataclass(frozen=True)
class Mamba1Config:
    """Mamba-1 (Gu & Dao 2023): every channel is a head of its own, all share B and C.

    dt_rank: width of the bottleneck that time steps come from. inner_norms: RMS norms on it, on B and on C (as Jamba).
    """

    symbol: ClassVar[str] = "S"
    kind: ClassVar[str] = "mamba1"
    attention: ClassVar[None] = None

    inner_size: int
    state_size: int
    dt_rank: int
    conv_kernel: int = 4
    conv_bias: bool = True
    inner_norms: bool = True
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        _require_positive(self, "inner_size", "state_size", "dt_rank", "conv_kernel")

    @property
    def ssm(self) -> Mamba1Config:
        return self


@dataclass(frozen=True)
class HybridConfig:
    """Attention and SSM heads side by side on one projection (Hymba): the mean of both, each normalised, goes out.

    Output channel i of the attention is averaged with channel i of the SSM, so both are equally wide; a Mamba-2 has a
    group for each key/value head and a head for each query head.
    """

    symbol: ClassVar[str] = "H"
    kind: ClassVar[str] = "hybrid"

    attention: AttentionConfig
    ssm: Mamba1Config | Mamba2Config
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        a = self.attention
        if a.num_attention_heads * a.value_dim != self.ssm.inner_size:
            raise HalflapError(
                f"the {a.num_attention_heads} attention heads of a hybrid block give {a.value_dim} channels each and "
                f"its SSM {self.ssm.inner_size} in all; the two are averaged, so inner_size must be "
                "num_attention_heads * value_head_dim: choose sizes that divide"
            )
        if a.bias:
            raise HalflapError("the attention of a hybrid block has bias=True; its projection has none: set it False")
        if isinstance(self.ssm, Mamba2Config):
            theirs = self.ssm.num_groups, self.ssm.num_heads, self.ssm.head_dim
            if theirs != (a.num_key_value_heads, a.num_attention_heads, a.value_dim):
                raise HalflapError(
                    f"the Mamba-2 of a hybrid block has {theirs[0]} groups of in all {theirs[1]} heads of {theirs[2]} "
                    f"channels; it needs a group for each of the {a.num_key_value_heads} key/value heads and a head of "
                    f"{a.value_dim} channels for each of the {a.num_attention_heads} query heads: correct the config"
                )


@dataclass(frozen=True)
class MLPConfig:
    """Two-matrix (`gated=False`) or gated three-matrix feed-forward network."""

    symbol: ClassVar[str] = "-"
    kind: ClassVar[str] = "mlp"
    attention: ClassVar[None] = None
    ssm: ClassVar[None] = None

    intermediate_size: int
    activation: Activation = "relu2"
    gated: bool = False
    bias: bool = False

    def __post_init__(self) -> None:
        _require_positive(self, "intermediate_size")
        if self.activation not in ACTIVATIONS:
            raise HalflapError(
                f"MLP activation {self.activation!r} is not known; allowed are {', '.join(ACTIVATIONS)}: "
                "correct the config"
            )


@dataclass(frozen=True)
class LinearConfig:
    """One linear map of the hidden size to itself: what is left of attention or an MLP without what lies between."""

    symbol: ClassVar[str] = "L"
    kind: ClassVar[str] = "linear"
    attention: ClassVar[None] = None
    ssm: ClassVar[None] = None

    bias: bool = False


BlockConfig = AttentionConfig | Mamba2Config | MLPConfig | Mamba1Config | HybridConfig | LinearConfig
BLOCK_KINDS: dict[str, type[BlockConfig]] = {
    kind.kind: kind for kind in (AttentionConfig, Mamba2Config, MLPConfig, Mamba1Config, HybridConfig, LinearConfig)
}


@dataclass(frozen=True)
class ModelConfig:
    """Everything that fixes the network's shape and arithmetic, and nothing about where or how it runs.

    norm is that of every block and the final one: RMSNorm, or LayerNorm1P with gain 1 + weight and a bias.
    num_meta_tokens learned vectors stand before every document; max_position_embeddings does not count them.
    """

    family: str
    vocab_size: int
    hidden_size: int
    blocks: tuple[BlockConfig, ...]
    norm_eps: float = 1e-5
    tie_word_embeddings: bool = False
    residual_in_fp32: bool = False
    max_position_embeddings: int = 8192
    initializer_range: float = 0.02
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | None = None
    norm: Norm = "rms"
    num_meta_tokens: int = 0

    def __post_init__(self) -> None:
        _require_positive(self, "vocab_size", "hidden_size", "max_position_embeddings")
        if self.norm not in NORMS:
            raise HalflapError(f"norm {self.norm!r} is not known; allowed are {', '.join(NORMS)}: correct the config")
        if not self.blocks:
            raise HalflapError(
                "the model has no blocks; at least one of M (Mamba-2), * (attention), - (MLP) is needed: give a pattern"
            )
        if not 0 <= self.num_meta_tokens < self.max_position_embeddings:
            raise HalflapError(
                f"num_meta_tokens is {self.num_meta_tokens}; it must be at least 0 and less than the context of "
                f"{self.max_position_embeddings} (max_position_embeddings): correct the config"
            )
        check_key_value_sources(self.blocks)

    def pattern(self) -> str:
        """One symbol a block, e.g. `M-M*-`."""
        return "".join(block.symbol for block in self.blocks)

    def to_json(self) -> dict[str, Any]:
        """A JSON object that `from_json` reads back to an equal config; infinities become strings."""
        data = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "blocks"}
        data["eos_token_id"] = list(self.eos_token_id) if isinstance(self.eos_token_id, tuple) else self.eos_token_id
        data["blocks"] = [block_to_json(block) for block in self.blocks]
        return _without_defaults(data, LATER)

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> ModelConfig:
        """Raise HalflapError on an unknown key, an unknown kind of block or an inconsistent size."""
        values = dict(data)
        values["blocks"] = tuple(block_from_json(block) for block in values.get("blocks", ()))
        if isinstance(values.get("eos_token_id"), list):
            values["eos_token_id"] = tuple(values["eos_token_id"])
        return _construct(ModelConfig, values)


# Fields that came later are not said at their default, so that digests of older checkpoints stay as they are.
LATER = {"norm": "rms", "num_meta_tokens": 0, "value_head_dim": None, "window": None, "key_value_source": None}


def _without_defaults(data: dict[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in data.items() if name not in defaults or value != defaults[name]}


def _construct(kind: type[T], values: Mapping[str, Any]) -> T:
    known = {f.name for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    if unknown := sorted(set(values) - known):
        raise HalflapError(
            f"{kind.__name__} has no field {unknown[0]!r}; it has {', '.join(sorted(known))}: correct the config"
        )
    for field in dataclasses.fields(kind):  # type: ignore[arg-type]
        if field.name in values:
            _require_whole(kind, field, values[field.name])
        elif field.default is dataclasses.MISSING:
            raise HalflapError(f"{kind.__name__} has no {field.name}: give the missing field")
    return kind(**values)


def _require_whole(kind: type, field: dataclasses.Field[Any], value: Any) -> None:
    if field.type not in ("int", "int | None") or (value is None and field.type == "int | None"):
        return
    if isinstance(value, bool) or not isinstance(value, int):
        raise HalflapError(f"{kind.__name__}.{field.name} is {value!r}; it must be a whole number: correct the config")


def block_to_json(block: BlockConfig) -> dict[str, Any]:
    data = _without_defaults({"kind": block.kind, **dataclasses.asdict(block)}, LATER)
    if isinstance(block, HybridConfig):
        data |= {"attention": block_to_json(block.attention), "ssm": block_to_json(block.ssm)}
    if isinstance(block, Mamba2Config):
        data["time_step_limit"] = [str(x) if math.isinf(x) else x for x in block.time_step_limit]
    return data


def block_from_json(data: Mapping[str, Any]) -> BlockConfig:
    values = dict(data)
    kind = values.pop("kind", None)
    if kind not in BLOCK_KINDS:
        raise HalflapError(
            f"block kind {kind!r} is not known; allowed are {', '.join(BLOCK_KINDS)}: correct the config"
        )
    for part in ("attention", "ssm"):
        if isinstance(values.get(part), Mapping):
            values[part] = block_from_json(values[part])
    if "time_step_limit" in values:
        low, high = values["time_step_limit"]
        values["time_step_limit"] = (float(low), float(high))
    if isinstance(values.get("rope"), Mapping):
        rope = dict(values["rope"])
        if isinstance(rope.get("scaling"), Mapping):
            kind_of_scaling = NTKScaling if "max_position_embeddings" in rope["scaling"] else RopeScaling
            rope["scaling"] = _construct(kind_of_scaling, rope["scaling"])
        values["rope"] = _construct(RopeConfig, rope)
    return _construct(BLOCK_KINDS[kind], values)
