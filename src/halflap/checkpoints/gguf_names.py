"""Tensors of a GGUF file, both ways: what each parameter is called there and how llama.cpp wants it stored.

Architectures: `llama` (pairs of attention and MLP, all alike), `deci` (the same with other widths, or no attention, in
a layer), `nemotron_h` (a layer for each block), `mamba2` (Mamba-2 blocks alone). Changes are those of llama.cpp's
converter: the halves of each rotary head of q and k become interleaved pairs, A_log becomes A = -exp(A_log), the
convolution loses its middle dimension, A and D gain a trailing one, the gated norm's gain is cut into groups. A tied
head is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from halflap.models.config import AttentionConfig, BlockConfig, Mamba2Config, ModelConfig
from halflap.models.layout import layout, shape

ENDS = {"embedding.weight": "token_embd.weight", "norm.weight": "output_norm.weight", "head.weight": "output.weight"}
PARTS = {
    "q_proj": "attn_q",
    "k_proj": "attn_k",
    "v_proj": "attn_v",
    "o_proj": "attn_output",
    "gate_proj": "ffn_gate",
    "up_proj": "ffn_up",
    "down_proj": "ffn_down",
    "in_proj": "ssm_in",
    "conv1d": "ssm_conv1d",
    "norm": "ssm_norm",
    "out_proj": "ssm_out",
}
LOOSE = {"A_log": "ssm_a", "D": "ssm_d", "dt_bias": "ssm_dt.bias"}
PAIRED = ("llama", "deci")
ROPE_FREQUENCIES = "rope_freqs.weight"


def layers(config: ModelConfig, architecture: str) -> list[int]:
    """The file's layer of each block: an MLP of a Llama goes with the attention before it, if there is one."""
    if architecture not in PAIRED:
        return list(range(len(config.blocks)))
    found, layer = [], -1
    for index, block in enumerate(config.blocks):
        if block.symbol == "*" or index == 0 or config.blocks[index - 1].symbol != "*":
            layer += 1
        found.append(layer)
    return found


def names(config: ModelConfig, architecture: str) -> dict[str, str]:
    """Our name to the file's for every parameter, in the order of the layout."""
    places = layers(config, architecture)
    return {name: ENDS.get(name) or _block_name(name, config, architecture, places) for name in layout(config)}


def _block_name(name: str, config: ModelConfig, architecture: str, places: list[int]) -> str:
    _, index, *rest = name.split(".")
    start = f"blk.{places[int(index)]}."
    if rest[0] == "norm":
        second = architecture in PAIRED and config.blocks[int(index)].symbol == "-"
        return f"{start}{'ffn_norm' if second else 'attn_norm'}.{rest[1]}"
    if rest[1] in LOOSE:
        return start + LOOSE[rest[1]]
    return f"{start}{PARTS[rest[1]]}.{rest[2]}"


class Change(NamedTuple):
    """How a tensor of ours is stored, and back; `back` takes a tensor of either number of dimensions."""

    there: Callable[[Tensor], Tensor]
    back: Callable[[Tensor], Tensor]


def _flat(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1)


COLUMN = Change(lambda w: w[:, None], _flat)
NEGATED_EXPONENTIAL = Change(  # float32, as it is stored, whatever A_log is
    lambda w: -torch.exp(w.double()).float()[:, None], lambda a: torch.log(-a.double()).float().reshape(-1)
)
WITHOUT_MIDDLE = Change(lambda w: w.squeeze(1), lambda w: w.reshape(w.shape[0], 1, -1))
SAME = Change(lambda w: w, lambda w: w)


def _pairs(heads: int) -> Change:
    """Rows of each head from two halves to interleaved pairs."""

    def turn(w: Tensor, first: int, second: int) -> Tensor:
        return w.reshape(heads, first, second, *w.shape[1:]).transpose(1, 2).reshape(w.shape)

    def there(w: Tensor) -> Tensor:
        return turn(w, 2, w.shape[0] // heads // 2)

    def back(w: Tensor) -> Tensor:
        return turn(w, w.shape[0] // heads // 2, 2)

    return Change(there, back)


def change(config: ModelConfig, name: str) -> Change:
    """What is done to the parameter `name` of ours."""
    if not name.startswith("blocks."):
        return SAME
    _, index, *rest = name.split(".")
    return _mixer_change(config.blocks[int(index)], rest[1:]) if rest[0] == "mixer" else SAME


def _mixer_change(block: BlockConfig, rest: list[str]) -> Change:
    if isinstance(block, AttentionConfig) and block.rope is not None and rest[0] in ("q_proj", "k_proj"):
        return _pairs(block.num_attention_heads if rest[0] == "q_proj" else block.num_key_value_heads)
    if not isinstance(block, Mamba2Config):
        return SAME
    groups = block.num_groups
    return {
        "A_log": NEGATED_EXPONENTIAL,
        "D": COLUMN,
        "conv1d.weight": WITHOUT_MIDDLE,
        "norm.weight": Change(lambda w: w.reshape(groups, -1), _flat),
    }.get(".".join(rest), SAME)


class Stored(NamedTuple):
    """A parameter in the file: its name and shape there, whether it takes the file's type (others are float32)."""

    ours: str
    name: str
    shape: tuple[int, ...]
    is_matrix: bool


def stored(config: ModelConfig, architecture: str) -> Iterator[Stored]:
    """Every parameter in the order of the layout; llama.cpp wants all but the matrices in float32."""
    dims = layout(config)
    for ours, name in names(config, architecture).items():
        flat = shape(dims[ours])
        there = change(config, ours).there(torch.empty(flat, device="meta"))
        matrix = len(flat) == 2
        yield Stored(ours, name, tuple(there.shape), matrix)
