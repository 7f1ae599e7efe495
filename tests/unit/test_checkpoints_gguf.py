"""GGUF in: files written here as llama.cpp's converter writes them come back as the model they were made from."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch

gguf = pytest.importorskip("gguf")

from halflap.checkpoints.checkpoint import load_model  # noqa: E402
from halflap.checkpoints.gguf_import import import_gguf  # noqa: E402
from halflap.checkpoints.gguf_names import names  # noqa: E402
from halflap.checkpoints.llama import LLAMA  # noqa: E402
from halflap.checkpoints.names import expand  # noqa: E402
from halflap.checkpoints.nemotron_h import NEMOTRON_H  # noqa: E402
from halflap.data.tokenizer import Tokenizer  # noqa: E402
from halflap.errors import HalflapError  # noqa: E402
from halflap.models.config import AttentionConfig, Mamba2Config, MLPConfig, ModelConfig, RopeScaling  # noqa: E402
from halflap.models.layout import layout, shape  # noqa: E402
from halflap.models.presets import preset  # noqa: E402
from halflap.models.rope import inverse_frequencies  # noqa: E402

F32, F16, BF16, Q8 = (getattr(gguf.GGMLQuantizationType, name) for name in ("F32", "F16", "BF16", "Q8_0"))
BYTES = [chr(b) for b in (*range(33, 127), *range(161, 173), *range(174, 256), *range(256, 324))]
SPECIAL = ["<|end|>", "<|start|>", "<tool>"]
WORDS = ["he", "ll", "hell", "hello", "Ġhello", "ĠĠ"]
MERGES = ["h e", "l l", "he ll", "hell o", "Ġ hello", "Ġ Ġ"]


def small(name: str) -> ModelConfig:
    return dataclasses.replace(preset(name), vocab_size=len(SPECIAL + BYTES + WORDS), pad_token_id=None)


def weights(config: ModelConfig, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.randn(shape(d), generator=generator) * 0.1 for n, d in layout(config).items()}


def vocabulary(writer, pre: str = "smollm", model: str = "gpt2", **flags) -> None:
    writer.add_tokenizer_model(model)
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(SPECIAL + BYTES + WORDS)
    writer.add_token_types([3, 3, 4] + [1] * len(BYTES + WORDS))
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(0)
    writer.add_chat_template("{{ messages[0].content }}")
    if "add_bos" in flags:
        writer.add_add_bos_token(flags["add_bos"])


def permute(w: torch.Tensor, heads: int) -> torch.Tensor:
    """The converter's reordering of q and k: halves of a head become interleaved pairs."""
    return w.reshape(heads, 2, w.shape[0] // heads // 2, *w.shape[1:]).transpose(1, 2).reshape(w.shape)


def convert(name: str, w: torch.Tensor, config: ModelConfig) -> np.ndarray:
    """What llama.cpp's converter does to one tensor of ours."""
    block = config.blocks[int(name.split(".")[1])] if name.startswith("blocks.") else None
    if name.endswith(".A_log"):
        w = -torch.exp(w)[:, None]
    elif name.endswith(".D"):
        w = w[:, None]
    elif name.endswith("conv1d.weight"):
        w = w.squeeze(1)
    elif name.endswith("mixer.norm.weight") and isinstance(block, Mamba2Config):
        w = w.reshape(block.num_groups, -1)
    elif config.family == "llama" and isinstance(block, AttentionConfig):
        if ".q_proj." in name:
            w = permute(w, block.num_attention_heads)
        elif ".k_proj." in name:
            w = permute(w, block.num_key_value_heads)
    return w.contiguous().numpy()


def write(path, config: ModelConfig, tensors, *, kind=F32, extra=(), **options) -> None:
    writer = gguf.GGUFWriter(path, options.pop("arch", config.family))
    attention = next(b for b in config.blocks if isinstance(b, AttentionConfig))
    mlp = next(b for b in config.blocks if isinstance(b, MLPConfig))
    writer.add_embedding_length(config.hidden_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_head_count(attention.num_attention_heads)
    writer.add_license("apache-2.0")
    if config.family == "llama":
        writer.add_block_count(len(config.blocks) // 2)
        writer.add_head_count_kv(attention.num_key_value_heads)
        writer.add_feed_forward_length(mlp.intermediate_size)
        assert attention.rope is not None
        writer.add_rope_freq_base(attention.rope.theta)
        writer.add_rope_dimension_count(attention.head_dim)
    else:
        mamba = next(b for b in config.blocks if isinstance(b, Mamba2Config))
        writer.add_block_count(len(config.blocks))
        writer.add_head_count_kv([2 if b is attention else 0 for b in config.blocks])
        writer.add_feed_forward_length([mlp.intermediate_size if b.symbol == "-" else 0 for b in config.blocks])
        writer.add_key_length(attention.head_dim)
        writer.add_ssm_conv_kernel(mamba.conv_kernel)
        writer.add_ssm_state_size(mamba.state_size)
        writer.add_ssm_group_count(mamba.num_groups)
        writer.add_ssm_inner_size(mamba.inner_size)
        writer.add_ssm_time_step_rank(mamba.num_heads)
    vocabulary(writer, **options)
    for ours, theirs in names(config, config.family).items():
        data = convert(ours, tensors[ours], config)
        matrix = data.ndim == 2 and theirs.endswith("weight") and "norm" not in theirs and "conv" not in theirs
        if matrix and kind is not F32 and (kind is not Q8 or data.shape[1] % 32 == 0):
            writer.add_tensor(theirs, gguf.quants.quantize(data, kind), raw_dtype=kind)
        else:
            writer.add_tensor(theirs, data)
    for name, data in extra:
        writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("name", ["nemotron-h-tiny", "llama-tiny"])
@pytest.mark.parametrize("tied", [False, True])
def test_the_model_comes_back(tmp_path, name, tied):
    config = dataclasses.replace(small(name), tie_word_embeddings=tied)
    tensors = weights(config)
    write(tmp_path / "m.gguf", config, tensors)
    checkpoint = import_gguf(tmp_path / "m.gguf", tmp_path / "out")
    assert dataclasses.replace(checkpoint.config, bos_token_id=1, eos_token_id=2) == config
    for key, value in checkpoint.tensors():
        if key.endswith("A_log"):  # exp and log of float32
            torch.testing.assert_close(value, tensors[key], rtol=1e-5, atol=1e-6)
        else:
            assert torch.equal(value, tensors[key]), key
    assert checkpoint.lineage[0]["verb"] == "import" and list(checkpoint.lineage[0]["inputs"]) == ["m.gguf"]
    assert "license: apache-2.0" in (tmp_path / "out" / "README.md").read_text()
    assert load_model(tmp_path / "out")(torch.zeros(1, 3, dtype=torch.int64)).isfinite().all()


@pytest.mark.parametrize("kind, stored", [(BF16, "bfloat16"), (F16, "float32"), (Q8, "float32")])
def test_stored_types_are_undone(tmp_path, kind, stored):
    config = small("llama-tiny")
    tensors = weights(config)
    write(tmp_path / "m.gguf", config, tensors, kind=kind)
    checkpoint = import_gguf(tmp_path / "m.gguf", tmp_path / "out")
    assert checkpoint.dtype == stored
    for key, value in checkpoint.tensors():
        torch.testing.assert_close(value.float(), tensors[key], rtol=1e-2, atol=2e-3)
    assert import_gguf(tmp_path / "m.gguf", tmp_path / "out", "bfloat16").dtype == "bfloat16"


def test_names_are_those_of_the_gguf_package():
    """Every name of our tables, as the package's own map spells the Hugging Face name of the same parameter."""
    for family, arch, layer in [(LLAMA, gguf.MODEL_ARCH.LLAMA, 2), (NEMOTRON_H, gguf.MODEL_ARCH.NEMOTRON_H, 1)]:
        config = small("llama-tiny" if layer == 2 else "nemotron-h-tiny")
        table = gguf.get_tensor_name_map(arch, len(config.blocks) // layer)
        stock = expand(config, family.rows)
        for ours, theirs in names(config, family.name).items():
            name = stock[ours].replace(".dt_bias", ".dt_proj.bias")  # the converter renames this one first
            found = table.get_name(name, try_suffixes=(".weight", ".bias"))
            assert found == theirs, ours


def test_llama_3_scaling_is_recognised_by_its_divisors(tmp_path):
    config = small("llama-tiny")
    attention = config.blocks[0]
    assert isinstance(attention, AttentionConfig) and attention.rope is not None
    scaled = dataclasses.replace(attention.rope, theta=5e5, scaling=RopeScaling(8.0))
    plain = dataclasses.replace(scaled, scaling=None)
    blocks = tuple(dataclasses.replace(b, rope=scaled) if b is attention else b for b in config.blocks)
    config = dataclasses.replace(config, blocks=blocks)
    divisors = (inverse_frequencies(plain, 16) / inverse_frequencies(scaled, 16)).float().numpy()
    write(tmp_path / "m.gguf", config, weights(config), extra=[("rope_freqs.weight", divisors)])
    found = import_gguf(tmp_path / "m.gguf", tmp_path / "out").config
    assert found.blocks == config.blocks
    write(tmp_path / "m.gguf", config, weights(config), extra=[("rope_freqs.weight", divisors * 1.5)])
    with pytest.raises(HalflapError, match="rotary divisors"):
        import_gguf(tmp_path / "m.gguf", tmp_path / "out")


# ---- the tokenizer


def imported(tmp_path, **options) -> Tokenizer:
    config = small("llama-tiny")
    write(tmp_path / "m.gguf", config, weights(config), **options)
    import_gguf(tmp_path / "m.gguf", tmp_path / "out")
    return Tokenizer.load(tmp_path / "out")


def test_the_tokenizer_is_rebuilt(tmp_path):
    tokenizer = imported(tmp_path)
    number = {token: i for i, token in enumerate(SPECIAL + BYTES + WORDS)}
    assert tokenizer.encode("hello hello") == [number["hello"], number["Ġhello"]]
    assert tokenizer.encode("<|start|>he<tool>") == [1, number["he"], 2]
    assert tokenizer.encode("  42") == [number["ĠĠ"], number["4"], number["2"]]  # digits one by one, spaces before them
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.prefix_ids) == (1, 0, ())
    for text in ("hello 日本 🎉\n\n\tx", "<|start|>a<|end|>"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode([1, number["he"], 0], skip_special_tokens=True) == "he"
    assert tokenizer.chat_template == "{{ messages[0].content }}"
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text()) == {
        "bos_token_id": 1,
        "eos_token_id": 0,
    }


@pytest.mark.parametrize(
    "pre, flags, prefix",
    [("llama-bpe", {}, (1,)), ("llama-bpe", {"add_bos": False}, ()), ("qwen2", {"add_bos": True}, (1,))],
)
def test_a_beginning_token_is_added_where_the_file_says_so(tmp_path, pre, flags, prefix):
    assert imported(tmp_path, pre=pre, **flags).prefix_ids == prefix


@pytest.mark.parametrize(
    "options, complaint",
    [({"pre": "mystery"}, "splits text as 'mystery'"), ({"model": "llama"}, "of kind 'llama'; only byte-level BPE")],
)
def test_a_tokenizer_that_cannot_be_rebuilt_is_refused_and_another_can_be_given(tmp_path, options, complaint):
    with pytest.raises(HalflapError, match=complaint):
        imported(tmp_path, **options)
    assert not (tmp_path / "out").exists()
    other = tmp_path / "other"
    other.mkdir()
    (other / "tokenizer.json").write_text("mine")
    import_gguf(tmp_path / "m.gguf", tmp_path / "out", tokenizer_from=other)
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "mine"


# ---- bad input


@pytest.mark.parametrize("keep", [0, 3, 100, 5000, -100])
def test_a_truncated_file_is_named(tmp_path, keep):
    config = small("llama-tiny")
    write(tmp_path / "m.gguf", config, weights(config))
    data = (tmp_path / "m.gguf").read_bytes()
    (tmp_path / "m.gguf").write_bytes(data[:keep])
    with pytest.raises(HalflapError, match=r"m\.gguf is truncated or not a GGUF file"):
        import_gguf(tmp_path / "m.gguf", tmp_path / "out")


def test_other_architectures_and_missing_files_are_named(tmp_path):
    config = small("llama-tiny")
    write(tmp_path / "m.gguf", config, weights(config), arch="gemma3")
    with pytest.raises(HalflapError, match="architecture 'gemma3'; allowed are llama, deci, nemotron_h, mamba2"):
        import_gguf(tmp_path / "m.gguf", tmp_path / "out")
    with pytest.raises(HalflapError, match="does not exist"):
        import_gguf(tmp_path / "none.gguf", tmp_path / "out")


def test_tensors_that_do_not_fit_are_listed(tmp_path):
    config = small("nemotron-h-tiny")
    tensors = weights(config)
    tensors["blocks.0.mixer.D"] = torch.zeros(11)
    write(tmp_path / "m.gguf", config, tensors, extra=[("blk.0.odd.weight", np.zeros(4, np.float32))])
    with pytest.raises(HalflapError, match=r"1 unknown \(blk\.0\.odd\.weight\); 1 wrongly shaped \(blk\.0\.ssm_d is"):
        import_gguf(tmp_path / "m.gguf", tmp_path / "out")
