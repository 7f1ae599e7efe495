"""Whole checkpoints: streamed, loaded, written, named by digest; and every tensor has its place."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from halflap.checkpoints import nemotron_h
from halflap.checkpoints.checkpoint import Checkpoint, load_model, save_model, write_checkpoint
from halflap.checkpoints.config import file_names, lineage_step
from halflap.errors import HalflapError
from halflap.models.config import AttentionConfig, Mamba2Config, MLPConfig, ModelConfig, RopeConfig
from halflap.models.layout import layout, shape
from halflap.models.model import HybridModel
from halflap.models.presets import preset

NAMES = ["nemotron-h-tiny", "llama-tiny"]


def random_tensors(config: ModelConfig, seed: int = 0, dtype=torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape(dims), generator=generator).to(dtype) for name, dims in layout(config).items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a)


def on_disk(directory) -> dict[str, torch.Tensor]:
    """By the names in the files, read by the reference library."""
    found = {}
    for file in directory.glob("*.safetensors"):
        found |= safetensors.torch.load_file(file)
    return found


def put(directory, tensors) -> None:
    safetensors.torch.save_file(tensors, directory / "model.safetensors")


@st.composite
def configs(draw) -> ModelConfig:
    """Any block list of either family, stock or not."""
    size = st.integers(1, 4)
    llama = draw(st.booleans())
    norm_eps = draw(st.sampled_from([1e-5, 1e-6]))

    def block():
        kind = draw(st.sampled_from("*-" if llama else "M*-"))
        if kind == "M":
            groups = draw(size)
            return Mamba2Config(groups * draw(size), draw(size), groups, draw(size), draw(size), norm_eps=norm_eps)
        if kind == "*":
            kv = draw(size)
            return AttentionConfig(kv * draw(size), kv, 2 * draw(size), RopeConfig() if llama else None)
        return MLPConfig(draw(size), "silu" if llama else "relu2", gated=llama)

    blocks = tuple(block() for _ in range(draw(size)))
    if draw(st.booleans()):
        blocks = blocks * 2
    return ModelConfig(
        family="llama" if llama else "nemotron_h",
        vocab_size=draw(st.integers(3, 9)),
        hidden_size=draw(st.integers(1, 9)),
        blocks=blocks,
        norm_eps=norm_eps,
        tie_word_embeddings=draw(st.booleans()),
    )


@settings(max_examples=25)
@given(config=configs(), limit=st.sampled_from([200, 10**9]), mixed=st.booleans(), seed=st.integers(0, 9))
def test_what_goes_in_comes_out_bit_by_bit(tmp_path_factory, config, limit, mixed, seed):
    """Stream in, stream out, load, save: names, types and bits, for stock and other shapes of both families."""
    tensors = random_tensors(config, seed)
    if mixed:
        tensors = {n: t.to([torch.float32, torch.bfloat16][i % 2]) for i, (n, t) in enumerate(tensors.items())}
    types = {name: str(t.dtype).removeprefix("torch.") for name, t in tensors.items()}
    one, two, three = (tmp_path_factory.mktemp(n) for n in ("one", "two", "three"))
    written = write_checkpoint(one, config, tensors.items(), dtype=types, max_shard_bytes=limit)
    assert written.config == config and written.dtypes == types
    assert same(dict(written.tensors()), tensors)

    again = write_checkpoint(two, config, Checkpoint.open(one).tensors(), dtype=written.dtypes)
    assert same(on_disk(one), on_disk(two)) and again.digest == written.digest

    model = load_model(one, "float32")
    assert not model.training and model.config == config
    assert same(dict(model.state_dict()), {n: t.float() for n, t in tensors.items()})
    saved = save_model(model, three, dtype="float32")
    assert same(dict(saved.tensors()), {n: t.float() for n, t in tensors.items()})


@pytest.mark.parametrize("name", NAMES)
def test_stock_names_are_on_the_disk(tmp_path, name):
    write_checkpoint(tmp_path, preset(name), random_tensors(preset(name)).items())
    names = on_disk(tmp_path).keys()
    if name == "llama-tiny":
        assert len(names) == 4 * 9 + 3
        assert {"model.embed_tokens.weight", "model.layers.3.mlp.gate_proj.weight", "model.norm.weight"} <= names
        assert "model.layers.3.post_attention_layernorm.weight" in names
    else:
        assert len(names) == 3 * 9 + 5 + 3 * 3 + 3
        assert {"backbone.embeddings.weight", "backbone.layers.0.mixer.A_log", "backbone.norm_f.weight"} <= names
        assert "lm_head.weight" in names


def test_the_8b_has_311_tensors():
    assert len(layout(preset("nemotron-h-8b"))) == 311


@pytest.mark.parametrize("prefix", ["backbone.", "model."])
def test_both_prefixes_are_read_and_what_carries_nothing_is_ignored(tmp_path, prefix):
    config = preset("nemotron-h-tiny")
    tensors = random_tensors(config)
    write_checkpoint(tmp_path, config, tensors.items())
    files = {name.replace("backbone.", prefix): t for name, t in on_disk(tmp_path).items()}
    files |= {"mtp.layers.0.norm.weight": torch.zeros(3), f"{prefix}layers.3.rotary_emb.inv_freq": torch.zeros(3)}
    put(tmp_path, files)
    assert same(dict(Checkpoint.open(tmp_path).tensors()), tensors)


def test_a_llama_may_carry_its_rotary_table_and_a_tied_head(tmp_path):
    config = dataclasses.replace(preset("llama-tiny"), tie_word_embeddings=True)
    tensors = random_tensors(config)
    write_checkpoint(tmp_path, config, tensors.items())
    extra = {
        "lm_head.weight": tensors["embedding.weight"].clone(),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8),
    }
    put(tmp_path, on_disk(tmp_path) | extra)
    assert same(dict(Checkpoint.open(tmp_path).tensors()), tensors)


def test_a_tied_head_that_differs_from_the_embedding_is_refused(tmp_path):
    config = dataclasses.replace(preset("nemotron-4-tiny"), tie_word_embeddings=True)
    tensors = random_tensors(config)
    write_checkpoint(tmp_path, config, tensors.items())
    put(tmp_path, on_disk(tmp_path) | {"lm_head.weight": tensors["embedding.weight"] + 1})
    with pytest.raises(HalflapError, match=r"lm_head\.weight that differs from its embedding"):
        Checkpoint.open(tmp_path)


def test_a_nemotron_h_with_a_head_of_its_own_is_not_tied(tmp_path):
    """transformers' class writes both whatever the config says of tying."""
    config = dataclasses.replace(preset("nemotron-h-tiny"), tie_word_embeddings=True)
    tensors = random_tensors(config)
    names = file_names(config, own=False)
    stock = {names[name]: tensor for name, tensor in tensors.items()}
    (tmp_path / "config.json").write_text(json.dumps(nemotron_h.write_config(config) | {"model_type": "nemotron_h"}))
    put(tmp_path, stock | {"lm_head.weight": tensors["embedding.weight"].clone()})
    assert same(dict(Checkpoint.open(tmp_path).tensors()), tensors)
    put(tmp_path, stock | {"lm_head.weight": tensors["embedding.weight"] + 1})
    with pytest.raises(HalflapError, match="set that to false"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize("name", NAMES)
def test_one_error_lists_missing_unknown_and_wrongly_shaped_tensors(tmp_path, name):
    config = preset(name)
    write_checkpoint(tmp_path, config, random_tensors(config).items())
    files = on_disk(tmp_path)
    norm = "model.norm.weight" if name == "llama-tiny" else "backbone.norm_f.weight"
    del files["lm_head.weight"]
    files |= {"extra.weight": torch.zeros(2), norm: torch.zeros(95)}
    put(tmp_path, files)
    with pytest.raises(HalflapError) as caught:
        Checkpoint.open(tmp_path)
    message = str(caught.value)
    for part in ("1 missing (lm_head.weight)", "1 unknown (extra.weight)", f"1 wrongly shaped ({norm} is (95,), exp"):
        assert part in message
    assert "(96,)" in message and str(tmp_path) in message and "\n" not in message


def test_long_lists_are_cut(tmp_path):
    config = preset("llama-tiny")
    write_checkpoint(tmp_path, config, random_tensors(config).items())
    put(tmp_path, {"a": torch.zeros(1)})
    with pytest.raises(HalflapError, match=r"39 missing \(.*, \.\.\.\); 1 unknown \(a\)"):
        Checkpoint.open(tmp_path)


def test_the_same_tensor_under_both_prefixes_is_refused(tmp_path):
    config = preset("nemotron-h-tiny")
    write_checkpoint(tmp_path, config, random_tensors(config).items())
    put(tmp_path, on_disk(tmp_path) | {"model.norm_f.weight": torch.zeros(96)})
    with pytest.raises(HalflapError, match=r"1 unknown \((model|backbone)\.norm_f\.weight\)"):
        Checkpoint.open(tmp_path)


def test_quantized_tensors_are_refused(tmp_path):
    config = preset("llama-tiny")
    write_checkpoint(tmp_path, config, random_tensors(config).items())
    put(tmp_path, on_disk(tmp_path) | {"lm_head.weight": torch.zeros(512, 96, dtype=torch.float8_e4m3fn)})
    with pytest.raises(HalflapError, match=r"head\.weight .* is F8_E4M3, a quantized type"):
        Checkpoint.open(tmp_path)


# ---- types


def test_states_of_the_ssm_stay_float32_in_a_bfloat16_model(tmp_path):
    config = preset("nemotron-h-tiny")
    write_checkpoint(tmp_path, config, random_tensors(config, dtype=torch.bfloat16).items(), dtype="bfloat16")
    assert Checkpoint.open(tmp_path).dtype == "bfloat16"
    for dtype, wide in [("auto", torch.float32), ("bfloat16", torch.float32), ("float64", torch.float64)]:
        model = load_model(tmp_path, dtype)
        for name, parameter in model.named_parameters():
            states = name.endswith((".A_log", ".D", ".dt_bias"))
            expected = wide if states else torch.float64 if dtype == "float64" else torch.bfloat16
            assert parameter.dtype == expected, name
    logits = load_model(tmp_path, "auto")(torch.zeros(1, 5, dtype=torch.int64))
    assert logits.dtype == torch.float32 and logits.isfinite().all()


def test_auto_takes_the_type_of_the_stream_and_a_type_per_tensor_is_kept(tmp_path):
    config = preset("nemotron-h-tiny")
    tensors = random_tensors(config, dtype=torch.bfloat16)
    written = write_checkpoint(tmp_path / "auto", config, tensors.items())
    assert written.dtypes["blocks.0.mixer.in_proj.weight"] == "bfloat16"
    assert written.dtypes["blocks.0.mixer.A_log"] == "float32"
    kept = write_checkpoint(tmp_path / "kept", config, tensors.items(), dtype=dict.fromkeys(tensors, "bfloat16"))
    assert set(kept.dtypes.values()) == {"bfloat16"}
    assert json.loads((tmp_path / "kept" / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_an_unknown_type_is_refused(tmp_path):
    config = preset("llama-tiny")
    with pytest.raises(HalflapError, match="'float8' is not known; allowed are float32, bfloat16"):
        write_checkpoint(tmp_path, config, [], dtype="float8")
    with pytest.raises(HalflapError, match=r"no dtype is given for tensor embedding\.weight"):
        write_checkpoint(tmp_path, config, [], dtype={})


def test_a_loaded_model_can_be_trained(tmp_path):
    config = preset("nemotron-h-tiny")
    write_checkpoint(tmp_path, config, [(n, t * 0.1) for n, t in random_tensors(config).items()])
    model = load_model(tmp_path).train()
    model(torch.zeros(1, 4, dtype=torch.int64)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


# ---- digest


def test_the_digest_names_content_not_spelling(tmp_path):
    config = preset("nemotron-h-tiny")
    tensors = random_tensors(config)
    one = write_checkpoint(tmp_path / "one", config, tensors.items())
    sharded = write_checkpoint(tmp_path / "sharded", config, reversed(tensors.items()), max_shard_bytes=100_000)
    assert len(list((tmp_path / "sharded").glob("model-*"))) > 3
    put_in = tmp_path / "foreign"
    put_in.mkdir()
    (put_in / "config.json").write_text((tmp_path / "one" / "config.json").read_text())
    put(put_in, {name.replace("backbone.", "model."): t for name, t in on_disk(tmp_path / "one").items()})
    assert one.digest == sharded.digest == Checkpoint.open(put_in).digest
    assert len(one.digest) == 64


def test_any_other_content_has_another_digest(tmp_path):
    config = preset("nemotron-h-tiny")
    tensors = random_tensors(config)
    one = write_checkpoint(tmp_path / "one", config, tensors.items())
    for number, name in enumerate(tensors):
        changed = tensors | {name: tensors[name].clone()}
        changed[name].view(-1)[-1] += 1
        assert write_checkpoint(tmp_path / "two", config, changed.items()).digest != one.digest, number
    other = dataclasses.replace(config, norm_eps=1e-6)
    assert write_checkpoint(tmp_path / "three", other, tensors.items()).digest != one.digest
    cast = write_checkpoint(tmp_path / "four", config, tensors.items(), dtype="float64")
    assert cast.digest != one.digest


# ---- what travels along


def test_tokenizer_lineage_and_other_files_travel_along(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        (source / name).write_text(name)
    (source / "notes.txt").write_text("stays")
    steps = [lineage_step("pretrain", {"corpus": "ab" * 32}, tokens=1000, loss=3.5)]
    config = preset("llama-tiny")
    checkpoint = write_checkpoint(
        tmp_path / "out",
        config,
        random_tensors(config).items(),
        tokenizer_from=source,
        lineage=steps,
        extra_files={"pruning_plan.json": "{}\n", "raw.bin.txt": b"\x00"},
    )
    assert checkpoint.lineage == steps
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "chat_template.jinja"
    assert not (tmp_path / "out" / "notes.txt").exists()
    assert (tmp_path / "out" / "pruning_plan.json").read_text() == "{}\n"
    card = (tmp_path / "out" / "README.md").read_text()
    assert "license: unknown" in card and "492,384" in card and "pretrain: tokens 1000, loss 3.5" in card
    rewritten = write_checkpoint(
        tmp_path / "out",
        config,
        checkpoint.tensors(),
        tokenizer_from=tmp_path / "out",
        lineage=checkpoint.lineage,
        license="apache-2.0",
    )
    assert rewritten.digest == checkpoint.digest and "license: apache-2.0" in (rewritten.path / "README.md").read_text()


def test_a_run_directory_is_opened_by_its_checkpoint(tmp_path):
    config = preset("llama-tiny")
    write_checkpoint(tmp_path / "checkpoint", config, random_tensors(config).items())
    (tmp_path / "checkpoint" / "tokenizer.json").write_text("t")
    write_checkpoint(tmp_path / "copy", config, random_tensors(config).items(), tokenizer_from=tmp_path)
    assert (tmp_path / "copy" / "tokenizer.json").read_text() == "t"
    with pytest.raises(HalflapError, match="is no directory"):
        write_checkpoint(tmp_path / "copy", config, random_tensors(config).items(), tokenizer_from=tmp_path / "nowhere")
    assert Checkpoint.open(tmp_path).path == tmp_path / "checkpoint"
    assert Checkpoint.open(tmp_path).family == "llama" and Checkpoint.open(tmp_path).depth_unit == 2
    with pytest.raises(HalflapError, match="no parameter 'x'"):
        Checkpoint.open(tmp_path).read("x")


def test_a_stream_that_does_not_fit_leaves_the_old_checkpoint(tmp_path):
    config = preset("llama-tiny")
    old = write_checkpoint(tmp_path, config, random_tensors(config).items())
    before = old.digest
    wider = dataclasses.replace(config, hidden_size=192)
    with pytest.raises(
        HalflapError, match=r"embed_tokens.weight has shape \(512, 96\) and the config says \(512, 192\)"
    ):
        write_checkpoint(tmp_path, wider, random_tensors(config).items())
    assert Checkpoint.open(tmp_path).digest == before


def test_a_student_with_unequal_widths_is_written_in_our_names(tmp_path):
    tiny = preset("nemotron-h-tiny")
    mamba = dataclasses.replace(tiny.blocks[0], num_heads=8, time_step_limit=(0.0, math.inf))
    config = dataclasses.replace(tiny, blocks=(mamba, *tiny.blocks[1:]))
    tensors = random_tensors(config)
    checkpoint = write_checkpoint(tmp_path, config, tensors.items())
    assert on_disk(tmp_path).keys() == tensors.keys()
    model = HybridModel(config)
    model.load_state_dict({name: t * 0.1 for name, t in tensors.items()})
    again = load_model(save_model(model, tmp_path).path)
    tokens = torch.arange(12)[None]
    with torch.no_grad():
        assert torch.equal(model.eval()(tokens), again(tokens))
    assert checkpoint.config == again.config
