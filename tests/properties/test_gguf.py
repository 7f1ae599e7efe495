"""Export to GGUF and import again is the identity, whatever the widths, for every parameter bit for bit."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("gguf", reason="gguf is not installed: pip install -e '.[gguf]'")

from halflap.checkpoints.gguf_export import write_gguf
from halflap.checkpoints.gguf_import import open_gguf
from halflap.checkpoints.gguf_metadata import cannot_write
from halflap.models.config import (
    AttentionConfig,
    BlockConfig,
    Mamba2Config,
    MLPConfig,
    ModelConfig,
    RopeConfig,
)
from halflap.models.layout import layout, shape


@st.composite
def llamas(draw: st.DrawFn) -> ModelConfig:
    """Layers of differing heads and widths, some without attention."""
    head_dim, bias = draw(st.sampled_from([2, 4])), draw(st.booleans())
    rope = RopeConfig(theta=draw(st.sampled_from([1e4, 5e5])))
    blocks: list[BlockConfig] = []
    for layer in range(draw(st.integers(1, 3))):
        shared = draw(st.integers(1, 3))
        if layer == 0 or draw(st.booleans()):
            blocks.append(AttentionConfig(shared * draw(st.integers(1, 3)), shared, head_dim, rope, bias))
        blocks.append(MLPConfig(draw(st.integers(1, 9)), "silu", gated=True, bias=bias))
    return whole(draw, "llama", blocks)


@st.composite
def nemotron_hs(draw: st.DrawFn) -> ModelConfig:
    """Any order of blocks, or Mamba-2 alone; heads and widths of attention and MLP differ."""
    groups = draw(st.integers(1, 3))
    mamba = Mamba2Config(groups * draw(st.integers(1, 3)), draw(st.integers(1, 4)), groups, draw(st.integers(1, 4)))
    blocks: list[BlockConfig] = []
    for symbol in draw(st.permutations("M*" + draw(st.text("M*-", max_size=3))) | st.just(["M"])):
        shared = draw(st.integers(1, 3))
        blocks.append(
            {
                "M": mamba,
                "*": AttentionConfig(shared * draw(st.integers(1, 3)), shared, 4),
                "-": MLPConfig(draw(st.integers(1, 9)), bias=draw(st.booleans())),
            }[symbol]
        )
    return whole(draw, "nemotron_h", blocks)


def whole(draw: st.DrawFn, family: str, blocks: list[BlockConfig]) -> ModelConfig:
    return ModelConfig(
        family=family,
        vocab_size=draw(st.integers(3, 9)),
        hidden_size=draw(st.integers(1, 9)),
        blocks=tuple(blocks),
        tie_word_embeddings=draw(st.booleans()),
        bos_token_id=draw(st.sampled_from([None, 1])),
        eos_token_id=draw(st.sampled_from([None, 2])),
    )


@settings(max_examples=25)
@given(config=st.one_of(llamas(), nemotron_hs()), seed=st.integers(0, 2**31))
def test_export_and_import_is_the_identity(config: ModelConfig, seed: int) -> None:
    assert cannot_write(config) is None
    generator = torch.Generator().manual_seed(seed)
    tensors = {name: torch.randn(shape(dims), generator=generator) for name, dims in layout(config).items()}
    with tempfile.TemporaryDirectory() as place:
        file = Path(place) / "model.gguf"
        write_gguf(file, config, tensors.__getitem__, dtype="float32", name="x", tokenizer_from=Path(place))
        opened = open_gguf(file)
        assert opened.config == config
        back = dict(opened.tensors())
    assert list(back) == list(tensors)
    for name, tensor in tensors.items():
        assert torch.equal(back[name], tensor), name
