"""GGUF files of Llama and Nemotron-H, dequantized to a checkpoint directory.

llama.cpp's converter changes some tensors on the way in, undone here: it interleaves the halves of each rotary head of
q and k (Llama only; Nemotron-H has no rotary embedding), stores A = -exp(A_log), drops the middle dimension of the
convolution, gives A and D a trailing one, and cuts the gated norm's gain into groups. A tied head is left out of the
file. Reading goes through the `gguf` package; one tensor is in memory at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from halflap.checkpoints.checkpoint import Checkpoint, write_checkpoint
from halflap.checkpoints.config import lineage_step
from halflap.checkpoints.gguf_tokenizer import tokenizer_files
from halflap.checkpoints.names import NameRow, expand, match_tensors
from halflap.errors import HalflapError
from halflap.files import digest_file
from halflap.models.config import (
    AttentionConfig,
    Mamba2Config,
    MLPConfig,
    ModelConfig,
    RopeConfig,
    RopeScaling,
    parse_pattern,
)
from halflap.models.rope import inverse_frequencies

Fields = Mapping[str, Any]
Fix = Callable[[Tensor], Tensor]


def import_gguf(
    file: str | Path, out: str | Path, dtype: str = "auto", *, tokenizer_from: str | Path | None = None
) -> Checkpoint:
    """Write the model and tokenizer of a GGUF file as a checkpoint directory.

    dtype: "auto" is bfloat16 when the matrices are stored so, else float32 (a dequantized value has no shorter exact
    form). tokenizer_from replaces the tokenizer inside the file. Raises HalflapError for a broken file, another
    architecture, and a tokenizer that cannot be rebuilt.
    """
    file = Path(file)
    reader = _open(file)
    fields: Fields = {name: field.contents() for name, field in reader.fields.items()}
    stored = {tensor.name: tensor for tensor in reader.tensors}
    architecture = fields.get("general.architecture")
    if architecture not in READERS:
        raise HalflapError(
            f"{file} holds a model of architecture {architecture!r}; allowed are {', '.join(READERS)}: "
            "use a GGUF of one of these"
        )
    read_config, rows, fixes = READERS[architecture]
    config = read_config(fields, stored)
    fix = fixes(config)
    names = expand(config, rows)
    found = match_tensors(str(file), config, names, _shapes(stored, fix), ignored=(r"^rope_freqs\.weight$",))
    files = {} if tokenizer_from is not None else tokenizer_files(fields)
    matrices = {tensor.tensor_type.name for tensor in stored.values() if len(tensor.shape) > 1}
    if dtype == "auto":
        dtype = "bfloat16" if matrices <= {"BF16", "F32"} and "BF16" in matrices else "float32"
    return write_checkpoint(
        out,
        config,
        _tensors(stored, found, fix),
        dtype=dtype,
        tokenizer_from=tokenizer_from,
        lineage=[lineage_step("import", {file.name: digest_file(file)}, stored_as=", ".join(sorted(matrices)))],
        extra_files=files,
        license=fields.get("general.license"),
    )


def _open(file: Path) -> Any:
    try:
        import gguf
    except ImportError:
        raise HalflapError(
            "reading a GGUF file needs the package gguf: install it with `pip install 'halflap[gguf]'`"
        ) from None
    if not file.exists():
        raise HalflapError(f"{file} does not exist: give a GGUF file")
    try:
        return gguf.GGUFReader(file)
    except Exception as error:  # the package raises whatever its parsing runs into
        raise HalflapError(f"{file} is truncated or not a GGUF file ({error}): copy or download it again") from None


def _shape(tensor: Any) -> tuple[int, ...]:
    """GGUF lists dimensions fastest first; ours are slowest first."""
    return tuple(int(n) for n in reversed(tensor.shape))


def _shapes(stored: Mapping[str, Any], fix: Callable[[str], Fix | None]) -> dict[str, tuple[int, ...]]:
    """Shapes after the converter's changes are undone."""
    shapes = {}
    for name, tensor in stored.items():
        change = fix(name)
        shapes[name] = _shape(tensor)
        if change is not None and len(shapes[name]) in (1, 2):
            shapes[name] = tuple(change(torch.empty(shapes[name], device="meta")).shape)
    return shapes


def _tensors(
    stored: Mapping[str, Any], found: Mapping[str, str], fix: Callable[[str], Fix | None]
) -> Iterator[tuple[str, Tensor]]:
    from gguf.quants import dequantize

    for ours, name in found.items():
        item = stored[name]
        values = dequantize(item.data.view(np.ndarray), item.tensor_type)  # a memory map's own class is slow to slice
        tensor = torch.from_numpy(values if values.flags.writeable else values.copy()).reshape(_shape(item))
        change = fix(name)
        yield ours, tensor if change is None else change(tensor)


def _ids(fields: Fields) -> dict[str, Any]:
    keys = {"bos_token_id": "bos_token_id", "eos_token_id": "eos_token_id", "pad_token_id": "padding_token_id"}
    return {ours: fields.get(f"tokenizer.ggml.{key}") for ours, key in keys.items()}


def _largest(value: Any) -> int:
    """A number that llama.cpp stores once or a layer at a time, with 0 where it has no meaning."""
    return max(int(n) for n in value) if isinstance(value, (list, tuple)) else int(value)


def _common(fields: Fields, stored: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    return {
        "vocab_size": _shape(stored["token_embd.weight"])[0],
        "hidden_size": int(fields[f"{prefix}.embedding_length"]),
        "norm_eps": _epsilon(fields[f"{prefix}.attention.layer_norm_rms_epsilon"]),
        "tie_word_embeddings": "output.weight" not in stored,
        "max_position_embeddings": int(fields[f"{prefix}.context_length"]),
        **_ids(fields),
    }


def _epsilon(value: float) -> float:
    """Undo the rounding to float32: 9.999999747378752e-06 was written as 1e-05."""
    return float(f"{value:.6g}")


def read_llama(fields: Fields, stored: Mapping[str, Any]) -> ModelConfig:
    """The config of a Llama GGUF; raises HalflapError for experts and for rotary scalings other than Llama 3.1's."""
    if fields.get("llama.expert_count"):
        raise HalflapError(
            f"the GGUF holds a mixture of {fields['llama.expert_count']} experts, which halflap does not support: "
            "use a dense model"
        )
    _require(fields, stored, "llama", "embedding_length", "block_count", "attention.head_count", "feed_forward_length")
    heads = _largest(fields["llama.attention.head_count"])
    width = int(fields["llama.embedding_length"]) // heads
    head_dim = int(fields.get("llama.attention.key_length", fields.get("llama.rope.dimension_count", width)))
    if (rotary := int(fields.get("llama.rope.dimension_count", head_dim))) != head_dim:
        raise HalflapError(
            f"the GGUF rotates {rotary} of {head_dim} head channels, which Hugging Face's Llama cannot: "
            "use another model"
        )
    attention = AttentionConfig(
        num_attention_heads=heads,
        num_key_value_heads=_largest(fields.get("llama.attention.head_count_kv", heads)),
        head_dim=head_dim,
        rope=_rope(fields, stored, head_dim),
        bias="blk.0.attn_q.bias" in stored,
    )
    mlp = MLPConfig(
        intermediate_size=_largest(fields["llama.feed_forward_length"]),
        activation="silu",
        gated=True,
        bias="blk.0.ffn_up.bias" in stored,
    )
    blocks = (attention, mlp) * int(fields["llama.block_count"])
    return ModelConfig(family="llama", blocks=blocks, **_common(fields, stored, "llama"))


def _rope(fields: Fields, stored: Mapping[str, Any], head_dim: int) -> RopeConfig:
    """Rotary settings; Llama 3.1's scaling is stored only as a table of frequency divisors, and recognised by it."""
    theta = float(fields.get("llama.rope.freq_base", 10000.0))
    kind = fields.get("llama.rope.scaling.type", "none")
    if kind != "none":
        raise HalflapError(
            f"the GGUF scales its rotary embedding ({kind}), which halflap does not support: use another model"
        )
    if "rope_freqs.weight" not in stored:
        return RopeConfig(theta=theta)
    divisors = torch.tensor(stored["rope_freqs.weight"].data.copy()).double()
    scaled = RopeConfig(theta=theta, scaling=RopeScaling(factor=round(divisors.max().item(), 4)))
    expected = inverse_frequencies(RopeConfig(theta=theta), head_dim) / inverse_frequencies(scaled, head_dim)
    if divisors.shape != expected.shape or not torch.allclose(divisors, expected, rtol=1e-5):
        raise HalflapError("the GGUF's rotary divisors are not those of Llama 3.1's scaling: use another model")
    return scaled


def read_nemotron_h(fields: Fields, stored: Mapping[str, Any]) -> ModelConfig:
    """The config of a Nemotron-H GGUF; which block is what is read off the tensors it has."""
    name = "nemotron_h"
    _require(fields, stored, name, "embedding_length", "block_count", "ssm.inner_size", "ssm.time_step_rank")
    heads = int(fields["nemotron_h.ssm.time_step_rank"])
    symbols = {"ssm_in.weight": "M", "attn_q.weight": "*", "ffn_up.weight": "-"}
    count = int(fields["nemotron_h.block_count"])
    pattern = "".join(
        next((symbol for key, symbol in symbols.items() if f"blk.{i}.{key}" in stored), "?") for i in range(count)
    )
    common = _common(fields, stored, name)
    blocks = {
        "M": Mamba2Config(
            num_heads=heads,
            head_dim=int(fields["nemotron_h.ssm.inner_size"]) // heads,
            num_groups=int(fields["nemotron_h.ssm.group_count"]),
            state_size=int(fields["nemotron_h.ssm.state_size"]),
            conv_kernel=int(fields["nemotron_h.ssm.conv_kernel"]),
            norm_eps=common["norm_eps"],
        ),
        "*": AttentionConfig(
            num_attention_heads=_largest(fields["nemotron_h.attention.head_count"]),
            num_key_value_heads=_largest(fields["nemotron_h.attention.head_count_kv"]) or 1,
            head_dim=int(fields["nemotron_h.attention.key_length"]),
        ),
        "-": MLPConfig(_largest(fields["nemotron_h.feed_forward_length"]) or 1),
    }
    return ModelConfig(family=name, blocks=parse_pattern(pattern, blocks), **common)


def _require(fields: Fields, stored: Mapping[str, Any], prefix: str, *keys: str) -> None:
    needed = [f"{prefix}.{key}" for key in (*keys, "context_length", "attention.layer_norm_rms_epsilon")]
    missing = [key for key in needed if key not in fields] + [t for t in ("token_embd.weight",) if t not in stored]
    if missing:
        raise HalflapError(f"the GGUF lacks {', '.join(missing)}: copy or download it again, or use another conversion")


def _unpermute(heads: int) -> Fix:
    """Rows of each head from interleaved pairs back to two halves."""
    return lambda w: w.reshape(heads, w.shape[0] // heads // 2, 2, *w.shape[1:]).transpose(1, 2).reshape(w.shape)


def _llama_fixes(config: ModelConfig) -> Callable[[str], Fix | None]:
    attention = config.blocks[0]
    assert isinstance(attention, AttentionConfig)
    heads = {"attn_q": attention.num_attention_heads, "attn_k": attention.num_key_value_heads}

    def fix(name: str) -> Fix | None:
        part = name.split(".")[-2] if "." in name else ""
        return _unpermute(heads[part]) if part in heads else None

    return fix


NEMOTRON_H_FIXES: dict[str, Fix] = {
    "ssm_a": lambda a: torch.log(-a).reshape(-1),
    "ssm_d": lambda d: d.reshape(-1),
    "ssm_conv1d.weight": lambda w: w[:, None],
    "ssm_norm.weight": lambda w: w.reshape(-1),
}


def _nemotron_h_fixes(config: ModelConfig) -> Callable[[str], Fix | None]:
    return lambda name: NEMOTRON_H_FIXES.get(name.split(".", 2)[-1])


ATTENTION = {"attn_q": "q_proj", "attn_k": "k_proj", "attn_v": "v_proj", "attn_output": "o_proj"}
MLP = {"ffn_gate": "gate_proj", "ffn_up": "up_proj", "ffn_down": "down_proj"}
MAMBA = {
    "ssm_in.weight": "in_proj.weight",
    "ssm_conv1d.weight": "conv1d.weight",
    "ssm_conv1d.bias": "conv1d.bias",
    "ssm_dt.bias": "dt_bias",
    "ssm_a": "A_log",
    "ssm_d": "D",
    "ssm_norm.weight": "norm.weight",
    "ssm_out.weight": "out_proj.weight",
}
ENDS = (
    NameRow("token_embd.weight", "embedding.weight"),
    NameRow("output_norm.weight", "norm.weight"),
    NameRow("output.weight", "head.weight"),
)


def _mixer_rows(table: Mapping[str, str], stride: int, offset: int) -> tuple[NameRow, ...]:
    return tuple(NameRow(f"blk.{{i}}.{a}", f"blocks.{{i}}.mixer.{b}", stride, offset) for a, b in table.items())


def _with_biases(table: Mapping[str, str]) -> dict[str, str]:
    return {f"{a}.{kind}": f"{b}.{kind}" for a, b in table.items() for kind in ("weight", "bias")}


LLAMA_ROWS = (
    *ENDS,
    NameRow("blk.{i}.attn_norm.weight", "blocks.{i}.norm.weight", 2, 0),
    NameRow("blk.{i}.ffn_norm.weight", "blocks.{i}.norm.weight", 2, 1),
    *_mixer_rows(_with_biases(ATTENTION), 2, 0),
    *_mixer_rows(_with_biases(MLP), 2, 1),
)
NEMOTRON_H_ROWS = (
    *ENDS,
    NameRow("blk.{i}.attn_norm.weight", "blocks.{i}.norm.weight"),
    *_mixer_rows(MAMBA | _with_biases(ATTENTION) | _with_biases(MLP), 1, 0),
)
READERS: dict[str, tuple[Callable[[Fields, Mapping[str, Any]], ModelConfig], tuple[NameRow, ...], Callable]] = {
    "llama": (read_llama, LLAMA_ROWS, _llama_fixes),
    "nemotron_h": (read_nemotron_h, NEMOTRON_H_ROWS, _nemotron_h_fixes),
}
