"""`export --format gguf`: what comes back is what went out, tokenizer and lineage too; what cannot go is refused."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

gguf = pytest.importorskip("gguf", reason="gguf is not installed: pip install -e '.[gguf]'")

from halflap.checkpoints.checkpoint import Checkpoint, save_model, write_checkpoint  # noqa: E402
from halflap.checkpoints.config import lineage_step  # noqa: E402
from halflap.checkpoints.gguf_export import write_gguf  # noqa: E402
from halflap.checkpoints.gguf_import import import_gguf, open_gguf  # noqa: E402
from halflap.checkpoints.gguf_metadata import OWN_CONFIG, architecture_of, cannot_write, metadata  # noqa: E402
from halflap.checkpoints.gguf_metadata import read_config as read_keys  # noqa: E402
from halflap.checkpoints.gguf_names import stored  # noqa: E402
from halflap.checkpoints.gguf_tokenizer import tokenizer_fields  # noqa: E402
from halflap.data.tokenizer import Tokenizer, train_tokenizer  # noqa: E402
from halflap.errors import HalflapError  # noqa: E402
from halflap.models.config import AttentionConfig, Mamba2Config, MLPConfig, ModelConfig, RopeScaling  # noqa: E402
from halflap.models.model import HybridModel, initialize  # noqa: E402
from halflap.models.presets import preset  # noqa: E402

Cli = Callable[..., Any]
TEXT = ["A half-lap joint takes two pieces, 12 or 345 of them.", "Each is cut down by half; don't we know it?"] * 4
TEMPLATE = "{% for m in messages %}{{ m['content'] }}<eos>{% endfor %}"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(TEXT, 300, progress=False).with_chat_template(TEMPLATE)


def small(name: str) -> ModelConfig:
    return dataclasses.replace(preset(name), vocab_size=320, initializer_range=0.05)


def with_sizes(config: ModelConfig, **sizes: Any) -> ModelConfig:
    """The second block of the kind that has such sizes, changed."""
    kind = {"num_attention_heads": AttentionConfig, "num_heads": Mamba2Config}.get(next(iter(sizes)), MLPConfig)
    place = [i for i, block in enumerate(config.blocks) if isinstance(block, kind)][1]
    block = dataclasses.replace(config.blocks[place], **sizes)
    return dataclasses.replace(config, blocks=(*config.blocks[:place], block, *config.blocks[place + 1 :]))


def write_model(config: ModelConfig, directory: Path, dtype: str = "float32") -> Checkpoint:
    model = HybridModel(config)
    initialize(model, 0)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return save_model(model, directory, dtype=dtype, lineage=[lineage_step("pretrain", {}, tokens=7)])


UNEQUAL = {
    "nemotron-h-tiny": {"intermediate_size": 48},
    "llama-tiny": {"num_attention_heads": 4, "num_key_value_heads": 1},
}


@pytest.mark.parametrize("name", UNEQUAL)
@pytest.mark.parametrize("unequal", [False, True])
def test_what_comes_back_is_what_went_out(
    halflap: Cli, tmp_path: Path, tokenizer: Tokenizer, name: str, unequal: bool
) -> None:
    config = with_sizes(small(name), **UNEQUAL[name]) if unequal else small(name)
    source = write_model(config, tmp_path / "model")
    tokenizer.save(source.path)
    out = halflap("export", source.path, "--format", "gguf", "--out", tmp_path / "out", "--json").json
    assert out["path"] == str(tmp_path / "out" / "model.gguf") and out["max_abs_error"] == 0 and not out["padded"]
    back = halflap("import", out["path"], "--out", tmp_path / "back", "--json").json
    again = Checkpoint.open(tmp_path / "back")
    assert again.config == config and back["parameters"] == out["parameters"]
    for key, tensor in source.tensors():
        assert torch.equal(again.read(key), tensor), key
    assert [step["verb"] for step in again.lineage] == ["pretrain", "export", "import"]
    mine = Tokenizer.load(again.path)
    assert all(mine.encode(text) == tokenizer.encode(text) for text in TEXT)
    assert mine.chat_template == TEMPLATE and mine.eos_id == tokenizer.eos_id and mine.vocab_size == 300


@pytest.mark.parametrize("dtype, bound", [("float32", 0), ("bfloat16", 0.1), ("float16", 0.02)])
def test_types(halflap: Cli, tmp_path: Path, dtype: str, bound: float) -> None:
    source = write_model(small("nemotron-h-tiny"), tmp_path / "model")
    words = ["export", source.path, "--format", "gguf", "--dtype", dtype, "--out", tmp_path / "out", "--json"]
    result = halflap(*words).json
    assert result["max_abs_error"] <= bound and "there is no tokenizer" in result["remark"]
    file = open_gguf(tmp_path / "out" / "model.gguf")
    kinds = {name: entry.tensor_type.name for name, entry in file.entries.items()}
    short = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}[dtype]
    assert kinds["blocks.0.mixer.in_proj.weight"] == kinds["embedding.weight"] == short
    assert {kinds[f"blocks.0.mixer.{part}"] for part in ("conv1d.weight", "A_log", "D", "norm.weight")} == {"F32"}


def test_stored_types_are_kept(halflap: Cli, tmp_path: Path) -> None:
    source = write_model(small("llama-tiny"), tmp_path / "model", "bfloat16")
    assert (
        halflap("export", source.path, "--format", "gguf", "--out", tmp_path / "out", "--json").json["max_abs_error"]
        == 0
    )
    again = import_gguf(tmp_path / "out" / "model.gguf", tmp_path / "back")
    assert again.dtype == "bfloat16" and all(torch.equal(again.read(n), t) for n, t in source.tensors())


def test_decay_rates_are_not_rounded_to_the_type_of_their_logarithms(tmp_path: Path) -> None:
    """transformers stores A_log in bfloat16 with the rest; A = -exp(A_log) is float32 in the file whatever it is."""
    source = write_model(small("nemotron-h-tiny"), tmp_path / "plain")
    stored = write_checkpoint(
        tmp_path / "model", source.config, source.tensors(), dtype=dict.fromkeys(source.dtypes, "bfloat16")
    )
    write_gguf(tmp_path / "a.gguf", stored.config, stored.read, dtype="bfloat16", name="a", tokenizer_from=tmp_path)
    again = dict(open_gguf(tmp_path / "a.gguf").tensors())
    assert all(torch.equal(again[name].float(), tensor.float()) for name, tensor in stored.tensors())


def test_a_full_disk_under_the_arrays_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NumPy, which writes them, says how much it could write, and gives no number of the error."""
    source = write_model(small("llama-tiny"), tmp_path / "model")

    def full(*_: object) -> None:
        raise OSError("5760 requested and 4936 written")

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", full)
    with pytest.raises(HalflapError, match=r"the disk under .* is full \(5760 requested and 4936 written\)"):
        write_gguf(tmp_path / "a.gguf", source.config, source.read, dtype="float32", name="a", tokenizer_from=tmp_path)
    assert not list(tmp_path.glob("*a.gguf*"))


def test_a_file_edited_since_says_what_llama_cpp_would_read(tmp_path: Path) -> None:
    config = small("llama-tiny")
    shapes = {item.name: item.shape for item in stored(config, "llama")}
    fields = {"general.architecture": "llama", **metadata(config), OWN_CONFIG: json.dumps(config.to_json())}
    none = lambda: torch.empty(0)
    assert read_keys(fields, shapes, none) == config
    edited = {**fields, "llama.rope.freq_base": 777.0}
    rope = read_keys(edited, shapes, none).blocks[0].attention.rope  # type: ignore[union-attr]
    assert rope is not None and rope.theta == 777.0
    unreadable = {**fields, OWN_CONFIG: '{"of_a_later_version": 1}'}
    assert read_keys(unreadable, shapes, none) == dataclasses.replace(config, initializer_range=0.02)


@pytest.mark.parametrize("name", ["nemotron-h-tiny", "llama-tiny"])
@pytest.mark.parametrize("unequal", [False, True])
def test_llama_cpps_keys_alone_give_the_network(name: str, unequal: bool) -> None:
    config = with_sizes(small(name), **UNEQUAL[name]) if unequal else small(name)
    architecture = architecture_of(config)
    shapes = {item.name: item.shape for item in stored(config, architecture)}
    found = read_keys({"general.architecture": architecture, **metadata(config)}, shapes, lambda: torch.empty(0))
    assert dataclasses.replace(found, initializer_range=0.05, residual_in_fp32=config.residual_in_fp32) == config


def test_architectures() -> None:
    hybrid, llama = small("nemotron-h-tiny"), small("llama-tiny")
    mamba = dataclasses.replace(hybrid, blocks=tuple(b for b in hybrid.blocks if b.symbol == "M"))
    dropped = dataclasses.replace(llama, blocks=(*llama.blocks[:2], *llama.blocks[3:]))  # an attention fewer
    assert [architecture_of(c) for c in (hybrid, mamba, llama, dropped)] == ["nemotron_h", "mamba2", "llama", "deci"]
    assert {cannot_write(c) for c in (hybrid, mamba, llama, dropped)} == {None}
    heads = metadata(dropped)["deci.attention.head_count"]
    assert heads[0] > 0 and heads[1] == 0 and metadata(dropped)["deci.block_count"] == 4


def refused() -> dict[str, tuple[ModelConfig, str]]:
    hybrid, llama = small("nemotron-h-tiny"), small("llama-tiny")
    limited = [dataclasses.replace(b, time_step_limit=(0.0, 0.5)) if b.symbol == "M" else b for b in hybrid.blocks]
    silu = [dataclasses.replace(b, activation="silu") if b.symbol == "-" else b for b in hybrid.blocks]
    return {
        "Nemotron-4": (small("nemotron-4-tiny"), "it is a nemotron"),
        "Hymba": (small("hymba-tiny"), "it is a hymba"),
        "Mamba heads": (with_sizes(hybrid, num_heads=8), "differ in mamba_num_heads"),
        "time step": (dataclasses.replace(hybrid, blocks=tuple(limited)), "its time step is limited"),
        "activation": (dataclasses.replace(hybrid, blocks=tuple(silu)), "no squared ReLU"),
        "no Mamba": (dataclasses.replace(hybrid, blocks=tuple(b for b in hybrid.blocks if b.symbol != "M")), "lacks M"),
        "without MLP": (dataclasses.replace(llama, blocks=llama.blocks[:-1]), "no MLP follows"),
        "MLP first": (dataclasses.replace(llama, blocks=llama.blocks[1:]), "first block is no attention"),
    }


@pytest.mark.parametrize("case", refused())
def test_what_llama_cpp_cannot_run_is_refused(case: str) -> None:
    config, reason = refused()[case]
    assert reason in str(cannot_write(config))


def test_unequal_mamba_heads_are_padded(halflap: Cli, tmp_path: Path) -> None:
    config = with_sizes(small("nemotron-h-tiny"), num_heads=8)
    source = write_model(config, tmp_path / "model")
    words = ["export", source.path, "--format", "gguf", "--out", tmp_path / "out", "--json"]
    outcome = halflap(*words)
    assert outcome.status == 1 and "GGUF cannot hold this model" in outcome.err and "--pad-to-stock" in outcome.err
    result = halflap(*words, "--pad-to-stock").json
    assert (
        result["padded"] and result["max_abs_error"] < 1e-2 and "the gated norms of 1 Mamba blocks" in result["remark"]
    )


def test_rotary_scaling_of_llama_3_comes_back(halflap: Cli, tmp_path: Path) -> None:
    config = small("llama-tiny")
    blocks = tuple(
        dataclasses.replace(b, rope=dataclasses.replace(b.rope, scaling=RopeScaling(8.0))) if b.symbol == "*" else b  # type: ignore[union-attr]
        for b in config.blocks
    )
    source = write_model(dataclasses.replace(config, blocks=blocks), tmp_path / "model")
    result = halflap("export", source.path, "--format", "gguf", "--out", tmp_path / "out", "--json").json
    assert result["max_abs_error"] == 0
    assert import_gguf(tmp_path / "out" / "model.gguf", tmp_path / "back").config.blocks == blocks


# ---- tokenizers


def test_rows_beyond_the_tokenizer_get_unused_tokens(tmp_path: Path, tokenizer: Tokenizer) -> None:
    tokenizer.save(tmp_path)
    fields = tokenizer_fields(tmp_path, 320)
    assert len(fields["tokenizer.ggml.tokens"]) == 320 and fields["tokenizer.ggml.token_type"][300:] == [5] * 20
    assert fields["tokenizer.ggml.pre"] == "qwen2" and fields["tokenizer.ggml.add_bos_token"] is False
    with pytest.raises(HalflapError, match="300 tokens and the model 299 rows"):
        tokenizer_fields(tmp_path, 299)


def test_a_model_without_a_tokenizer_says_so(tmp_path: Path) -> None:
    assert tokenizer_fields(tmp_path, 320) == {"tokenizer.ggml.model": "no_vocab"}


@pytest.mark.parametrize("change", ["normalizer", "pre_tokenizer", "model"])
def test_a_tokenizer_that_llama_cpp_would_read_otherwise_is_refused(
    tmp_path: Path, tokenizer: Tokenizer, change: str
) -> None:
    data = json.loads(tokenizer.content)
    if change == "normalizer":
        data["normalizer"] = {"type": "Lowercase"}
    elif change == "pre_tokenizer":
        data["pre_tokenizer"] = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    else:
        data["model"]["ignore_merges"] = True
    dataclasses.replace(tokenizer, content=json.dumps(data)).save(tmp_path)
    with pytest.raises(HalflapError, match="not a byte-level BPE that splits text in a way"):
        tokenizer_fields(tmp_path, 320)
