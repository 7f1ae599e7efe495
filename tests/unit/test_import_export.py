"""`import` and `export` through the command line, and zero padding to the one width of the stock classes."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from halflap.checkpoints.checkpoint import Checkpoint, load_model, save_model, write_checkpoint
from halflap.checkpoints.config import family_of
from halflap.checkpoints.padding import padded_config, padded_reader
from halflap.errors import HalflapError
from halflap.models.config import AttentionConfig, Mamba2Config, MLPConfig, ModelConfig
from halflap.models.model import HybridModel, initialize
from halflap.models.presets import preset

Cli = Callable[..., Any]


@pytest.fixture(autouse=True)
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def uneven(config: ModelConfig) -> ModelConfig:
    """Every second block of a kind narrower, as unequal pruning leaves it."""
    narrower: dict[type, Callable[[Any], Any]] = {
        AttentionConfig: lambda b: dataclasses.replace(b, num_attention_heads=b.num_key_value_heads),
        Mamba2Config: lambda b: dataclasses.replace(
            b, num_heads=b.num_heads - b.num_groups, head_dim=b.head_dim - 3, state_size=b.state_size - 5
        ),
        MLPConfig: lambda b: dataclasses.replace(b, intermediate_size=b.intermediate_size - 7),
    }
    met: dict[type, int] = {}
    blocks = []
    for block in config.blocks:
        met[type(block)] = met.get(type(block), 0) + 1
        blocks.append(narrower[type(block)](block) if met[type(block)] % 2 == 0 else block)
    return dataclasses.replace(config, blocks=tuple(blocks))


@pytest.fixture
def uneven_checkpoint(tiny_config: ModelConfig, tmp_path: Path) -> Path:
    model = HybridModel(uneven(tiny_config))
    initialize(model, seed=3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            elif "in_proj" in name:  # at initialisation a gated norm's input is as small as its eps
                parameter.mul_(8)
    save_model(model, tmp_path / "uneven")
    return tmp_path / "uneven"


def test_padding_changes_no_logit_in_float64(tiny_config: ModelConfig, uneven_checkpoint: Path) -> None:
    small = load_model(uneven_checkpoint).double()
    padded = padded_config(small.config)
    assert family_of(small.config).cannot_write(small.config) is not None
    assert family_of(padded).cannot_write(padded) is None
    # With the eps of each padded norm scaled alike, the equality is exact up to rounding.
    exact = dataclasses.replace(padded, blocks=tuple(map(scaled_eps, small.config.blocks, padded.blocks)))
    large = HybridModel(exact).double().eval()
    read = padded_reader(small.config, padded, small.state_dict().__getitem__)
    large.load_state_dict({name: read(name) for name in large.state_dict()})
    tokens = torch.randint(tiny_config.vocab_size, (2, 33), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        torch.testing.assert_close(large(tokens), small(tokens), atol=1e-6, rtol=1e-6)  # logits are float32


def scaled_eps(before: Any, after: Any) -> Any:
    if not isinstance(before, Mamba2Config):
        return after
    return dataclasses.replace(after, norm_eps=before.norm_eps * before.inner_size / after.inner_size)


def test_export_pads_only_when_asked_and_measures_the_difference(halflap: Cli, uneven_checkpoint: Path) -> None:
    refused = halflap("export", uneven_checkpoint, "--out", "stock")
    assert refused.status == 1 and "--pad-to-stock" in refused.err
    result = halflap("export", uneven_checkpoint, "--out", "stock", "--pad-to-stock", "--json").json
    assert result["format"] == "hf" and result["path"] == "stock" and result["padded"]
    assert result["max_abs_error"] < 2e-3  # what the common eps makes of it
    assert json.loads(Path("stock/config.json").read_text())["model_type"] in ("nemotron_h", "llama", "nemotron")


def test_packing_does_not_ask_for_a_stock_class(halflap: Cli, uneven_checkpoint: Path) -> None:
    """An unequal student is packed as it is, copied, and written plain again; stock forms still refuse it."""
    packed = halflap("export", uneven_checkpoint, "--quantize", "int8", "--out", "eight", "--json").json
    assert not packed["padded"] and "halflap runs it" in packed["remark"]
    assert halflap("export", "eight", "--out", "copy", "--json").json["max_abs_error"] == 0
    plain = halflap("export", "eight", "--quantize", "off", "--out", "plain", "--json").json
    assert plain["max_abs_error"] == 0 and load_model("plain").config == load_model(uneven_checkpoint).config
    assert "--pad-to-stock" in halflap("export", "plain", "--out", "stock").err


def changed(config: ModelConfig, kind: type, **sizes: Any) -> ModelConfig:
    """The second block of a kind with other sizes."""
    place = [i for i, block in enumerate(config.blocks) if isinstance(block, kind)][1]
    block = dataclasses.replace(config.blocks[place], **sizes)
    return dataclasses.replace(config, blocks=(*config.blocks[:place], block, *config.blocks[place + 1 :]))


EXACT: dict[str, tuple[str, type, dict[str, int]]] = {
    "MLP": ("nemotron-h-tiny", MLPConfig, {"intermediate_size": 101}),
    "query heads": ("llama-tiny", AttentionConfig, {"num_attention_heads": 2}),
    "key/value heads": ("llama-tiny", AttentionConfig, {"num_attention_heads": 3, "num_key_value_heads": 1}),
    "all heads": ("nemotron-4-tiny", AttentionConfig, {"num_attention_heads": 4, "num_key_value_heads": 1}),
    "states": ("nemotron-h-tiny", Mamba2Config, {"state_size": 11}),
    "groups": ("nemotron-h-tiny", Mamba2Config, {"num_groups": 3, "num_heads": 9}),
}


@pytest.mark.parametrize("case", EXACT)
def test_what_pads_exactly_has_equal_logits(halflap: Cli, tmp_path: Path, case: str) -> None:
    name, kind, sizes = EXACT[case]
    model = HybridModel(changed(dataclasses.replace(preset(name), vocab_size=256), kind, **sizes))
    initialize(model, seed=1)
    save_model(model, tmp_path / "model")
    result = halflap("export", tmp_path / "model", "--out", "stock", "--pad-to-stock", "--json").json
    assert result["padded"] and result["remark"] is None and result["max_abs_error"] < 1e-5
    assert json.loads(Path("stock/config.json").read_text())["model_type"] == model.config.family


@pytest.mark.parametrize("name", ["llama-tiny", "nemotron-4-tiny"])
@pytest.mark.parametrize(
    ("gone", "zeros", "pattern"),
    [
        ((1, 4), (1, 4), "*-*-*-*-"),
        ((0,), (0,), "*-*-*-*-"),
        ((7,), (7,), "*-*-*-*-"),
        ((0, 3, 5, 6), (0, 3), "*-*-*-"),  # what is left of the last two layers is one
    ],
)
def test_layers_without_a_part_are_padded_whole(
    halflap: Cli, tmp_path: Path, name: str, gone: tuple[int, ...], zeros: tuple[int, ...], pattern: str
) -> None:
    """With a block of zeros; what is further on keeps the type it is stored in."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    whole = uneven(dataclasses.replace(preset(name), vocab_size=256))
    blocks = tuple(block for index, block in enumerate(whole.blocks) if index not in gone)
    model = HybridModel(dataclasses.replace(whole, blocks=blocks))
    initialize(model, seed=1)
    dtypes = {key: "float32" if "norm" in key else "bfloat16" for key in model.state_dict()}
    write_checkpoint(tmp_path / "model", model.config, model.state_dict().items(), dtype=dtypes)
    assert "--pad-to-stock" in halflap("export", tmp_path / "model", "--out", "stock").err
    result = halflap("export", tmp_path / "model", "--out", "stock", "--pad-to-stock", "--json").json
    assert result["padded"] and result["remark"] is None and result["max_abs_error"] < 1e-5
    padded = Checkpoint.open("stock")
    assert padded.config.pattern() == pattern
    added = tuple(f"blocks.{index}." for index in zeros)
    assert all(not tensor.any() for key, tensor in padded.tensors() if key.startswith(added))
    kinds = {key: kind for key, kind in padded.dtypes.items() if not key.startswith(added)}
    assert all(kind == ("float32" if "norm" in key else "bfloat16") for key, kind in kinds.items())
    tokens, opened = torch.arange(17)[None], transformers.AutoModelForCausalLM.from_pretrained
    with torch.inference_mode():
        logits = opened("stock", dtype=torch.float32).eval()(tokens).logits
        torch.testing.assert_close(
            logits, load_model(tmp_path / "model", dtype="float32")(tokens), atol=1e-5, rtol=1e-4
        )
    form = "gguf" if name == "llama-tiny" else "megatron"
    words = ("export", tmp_path / "model", "--format", form, "--pad-to-stock", "--out", form, "--json")
    assert halflap(*words).json["max_abs_error"] < 1e-5


def test_heads_are_padded_to_a_number_that_divides_the_hidden_size() -> None:
    config = changed(dataclasses.replace(preset("llama-tiny"), hidden_size=80), AttentionConfig, num_attention_heads=2)
    padded = padded_config(config)  # six heads of sixteen channels do not divide 80
    assert family_of(padded).cannot_write(padded) is None and padded.blocks[0].attention is not None
    assert (padded.blocks[0].attention.num_attention_heads, padded.blocks[0].attention.num_key_value_heads) == (8, 2)


def test_a_form_says_what_it_refuses(halflap: Cli, tmp_path: Path) -> None:
    for name, help in (("llama-tiny", False), ("nemotron-4-tiny", True)):
        model = HybridModel(changed(dataclasses.replace(preset(name), vocab_size=256), MLPConfig, intermediate_size=64))
        initialize(model, seed=1)
        save_model(model, tmp_path / name)
        outcome = halflap("export", tmp_path / name, "--format", "megatron", "--out", f"out-{name}")
        assert outcome.status == 1 and "Megatron's form cannot hold this model, because" in outcome.err
        assert ("--pad-to-stock" in outcome.err) == help
    words = ["export", tmp_path / name, "--format", "megatron", "--pad-to-stock", "--out", "padded", "--json"]
    assert halflap(*words).json["max_abs_error"] < 1e-5


def test_an_exported_checkpoint_opens_in_stock_transformers(halflap: Cli, uneven_checkpoint: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    halflap("export", uneven_checkpoint, "--out", "stock", "--pad-to-stock")
    stock = transformers.AutoModelForCausalLM.from_pretrained("stock", dtype=torch.float32).eval()
    tokens = torch.arange(17)[None]
    with torch.inference_mode():
        torch.testing.assert_close(stock(tokens).logits, load_model("stock")(tokens), atol=1e-5, rtol=1e-4)


def test_what_zeros_cannot_make_equal_is_refused_by_name(tiny_config: ModelConfig) -> None:
    blocks = list(tiny_config.blocks)
    index, mlp = next((i, block) for i, block in enumerate(blocks) if isinstance(block, MLPConfig))
    blocks[index] = dataclasses.replace(mlp, activation="relu2" if mlp.gated else "silu")
    with pytest.raises(HalflapError, match="mlp blocks differ in activation"):
        padded_config(dataclasses.replace(tiny_config, blocks=tuple(blocks)))


def test_export_of_an_even_model_is_exact(halflap: Cli, tiny_checkpoint: Path) -> None:
    result = halflap("export", tiny_checkpoint, "--out", "stock", "--json").json
    assert result["max_abs_error"] == 0 and not result["padded"]


def test_import_makes_a_hugging_face_directory_that_is_a_run(halflap: Cli, tiny_checkpoint: Path) -> None:
    result = halflap("import", tiny_checkpoint, "--out", "mine", "--json").json
    first, second = Checkpoint.open(tiny_checkpoint), Checkpoint.open("mine")
    assert result["tensors"] == len(second.entries) and result["path"] == "mine"
    assert result["parameters"] == sum(tensor.numel() for _, tensor in second.tensors())
    assert second.digest == first.digest
    for (name, tensor), (other, copy) in zip(first.tensors(), second.tensors()):
        assert name == other and torch.equal(tensor, copy)
    assert {"recipe.yaml", "inputs.json", "status.json", "config.json", "halflap.json"} <= {
        file.name for file in Path("mine").iterdir()
    }
    assert "this run is finished" in halflap("import", tiny_checkpoint, "--out", "mine").err
    assert halflap("inspect", "mine", "--json").json["parameters"] == result["parameters"]


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("pytorch_model.bin", "convert pickled weights (.bin, .pt) to safetensors first"),
        ("broken.gguf", "broken.gguf"),
        ("empty", "has no config.json"),
    ],
)
def test_what_cannot_be_imported_is_said(name: str, sentence: str, halflap: Cli) -> None:
    Path("empty").mkdir()
    Path("pytorch_model.bin").write_bytes(b"x")
    Path("broken.gguf").write_bytes(b"GGUF")
    outcome = halflap("import", name, "--out", "mine")
    assert outcome.status == 1 and sentence in outcome.err and outcome.err.count("\n") == 1
    assert not Path("mine/status.json").exists()


def test_importing_over_the_source_is_refused(halflap: Cli, tiny_checkpoint: Path) -> None:
    shutil.copytree(tiny_checkpoint, "source")
    before = Checkpoint.open("source").digest
    for extra in ([], ["--overwrite"]):
        outcome = halflap("import", "source", "--out", "source", *extra)
        assert outcome.status == 1 and "holds the input source" in outcome.err
    assert Checkpoint.open("source").digest == before


def test_load_and_save_round_trip_from_python(tiny_checkpoint: Path) -> None:
    import halflap

    model = halflap.load(tiny_checkpoint)
    assert not model.training and model.tokenizer is None
    halflap.save(model, "copy")
    tokens = torch.arange(9)[None]
    with torch.inference_mode():
        logits = model(tokens)
        assert logits.dtype == torch.float32 and logits.shape == (1, 9, model.config.vocab_size)
        assert torch.equal(logits, halflap.load("copy", dtype="auto")(tokens))
    assert Checkpoint.open("copy").digest == Checkpoint.open(tiny_checkpoint).digest
    out = halflap.generate(model, [[1, 17, 4], [5]], max_new_tokens=3, ignore_eos=True)
    assert [len(row.tokens) for row in out] == [3, 3] and out[0].finish_reason == "length"


def test_what_python_gets_wrong_is_one_sentence(tiny_checkpoint: Path) -> None:
    import halflap

    for device in ("tpu", "cuda:0", "cuda") if not torch.cuda.is_available() else ("tpu",):
        with pytest.raises(halflap.HalflapError, match="device"):
            halflap.load(tiny_checkpoint, device=device)
    with pytest.raises(halflap.HalflapError, match="did you mean 'temperature'"):
        halflap.generate(halflap.load(tiny_checkpoint), [[1]], temprature=1.0)
    for name, value in (("temperature", "hot"), ("max_new_tokens", 2.5), ("top_k", "3"), ("seed", None)):
        with pytest.raises(halflap.HalflapError, match=f"{name} is {value!r}"):
            halflap.generate(tiny_checkpoint, [[1]], **{name: value})


def test_a_checkpoint_tells_stock_classes_where_text_ends(tiny_checkpoint: Path) -> None:
    import halflap

    model = halflap.load(tiny_checkpoint)
    stored = json.loads((tiny_checkpoint / "generation_config.json").read_text())
    assert stored["eos_token_id"] == model.config.eos_token_id
    Path("mine").mkdir()
    Path("mine/generation_config.json").write_text('{"eos_token_id": 9}')
    halflap.save(model, "mine")
    assert json.loads(Path("mine/generation_config.json").read_text()) == {"eos_token_id": 9}


def test_dry_run_tells_the_cost_and_runs_nothing(halflap: Cli, tiny_checkpoint: Path) -> None:
    Path("text.txt").write_text("some text")
    words = ["distill", tiny_checkpoint, "--teacher", tiny_checkpoint, "--data", "text.txt", "--tokens", "1M"]
    result = halflap(*words, "--out", "x", "--dry-run", "--json").json
    assert result["tokens"] == 1_000_000 and result["flops"] > 0 and result["memory_bytes"] > 0
    assert not Path("x").exists()
    assert "flops" in halflap(*words, "--dry-run").out
    assert halflap("distill", "nowhere", "--dry-run").status == 1


@pytest.mark.parametrize("extra", ["eval", "gguf", "cluster", "data", "serve"])
def test_doctor_knows_every_package_of_an_extra(extra: str, halflap: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    pyproject = Path(__file__).parents[2] / "pyproject.toml"
    wanted = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]["optional-dependencies"][extra]
    packages = {re.split("[>=<[]", package)[0].replace("-", "_") for package in wanted}
    monkeypatch.setattr("halflap.commands.doctor.find_spec", lambda _: None)
    missing = halflap("doctor", "--json").json["missing"]
    said = {line.partition(",")[0] for line in missing if line.endswith(f"pip install 'halflap[{extra}]'")}
    assert said == packages


def test_doctor_tells_versions_kernels_and_device(halflap: Cli) -> None:
    result = halflap("doctor", "--json").json
    assert set(result) == {"versions", "kernels", "device", "missing"}
    assert result["device"]["cores"] >= 1
    assert "torch" in halflap("doctor").out
