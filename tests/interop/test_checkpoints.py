"""Directories: opened through the Auto classes, saved, opened by halflap again, with the same bits."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import halflap
from halflap.errors import HalflapError
from halflap.hf import HalflapConfig, HalflapForCausalLM


def equal_bits(one: Any, other: Any) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(a[name].dtype == b[name].dtype and a[name].equal(b[name]) for name in a)


@torch.no_grad()
def logits(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    output = model.eval()(tokens)
    return output if isinstance(output, torch.Tensor) else output.logits


def some_tokens(batch: int = 2, time: int = 19) -> torch.Tensor:
    return torch.randint(3, 300, (batch, time), generator=torch.Generator().manual_seed(0))


def test_an_unequal_student_opens_through_the_auto_classes(model_dir: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    assert isinstance(model, HalflapForCausalLM) and not model.training
    assert AutoConfig.from_pretrained(model_dir).model_config() == halflap.load(model_dir).config
    torch.testing.assert_close(logits(model, some_tokens()), logits(halflap.load(model_dir), some_tokens()))
    model.save_pretrained(tmp_path)
    assert equal_bits(halflap.load(tmp_path), halflap.load(model_dir))
    assert halflap.load(tmp_path).config == halflap.load(model_dir).config
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "halflap"


def test_an_equal_one_opens_as_the_stock_class_and_on_our_blocks(stock_dir: Path, tmp_path: Path) -> None:
    stock = AutoModelForCausalLM.from_pretrained(stock_dir)
    ours = HalflapForCausalLM.from_pretrained(stock_dir)
    assert [type(stock).__name__] == stock.config.architectures
    assert (
        type(stock).__module__.startswith("transformers.") or "Hymba" in type(stock).__name__
    )  # who has no such class
    torch.testing.assert_close(logits(ours, some_tokens()), logits(stock, some_tokens()), rtol=1e-4, atol=1e-4)
    ours.save_pretrained(tmp_path)
    assert equal_bits(halflap.load(tmp_path), halflap.load(stock_dir))
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again) is type(stock) and equal_bits(again, stock)


def test_the_tokenizer_opens_too(model_dir: Path) -> None:
    tokenizer, ours = AutoTokenizer.from_pretrained(model_dir), halflap.tokenizer(model_dir)
    text = "A half-lap joint — of two pieces."
    assert tokenizer(text, add_special_tokens=False).input_ids == ours.encode(text)
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (ours.eos_id, ours.pad_id)


def test_stored_types_are_kept(model_dir: Path, tmp_path: Path) -> None:
    narrow = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.bfloat16)
    narrow.save_pretrained(tmp_path)
    reopened = AutoModelForCausalLM.from_pretrained(tmp_path)
    ours = halflap.load(tmp_path, dtype="auto")
    assert reopened.dtype == torch.bfloat16 and equal_bits(reopened, narrow)
    assert equal_bits(ours, halflap.load(model_dir, dtype="bfloat16"))
    for name, parameter in reopened.named_parameters():
        wide = name.endswith((".A_log", ".D", ".dt_bias"))
        assert parameter.dtype == (torch.float32 if wide else torch.bfloat16), name


@pytest.mark.parametrize("tied", [True, False])
def test_tied_embeddings_are_one_tensor_and_stay_so(model_dir: Path, tmp_path: Path, tied: bool) -> None:
    config = dataclasses.replace(halflap.load(model_dir).config, tie_word_embeddings=tied)
    model = AutoModelForCausalLM.from_config(HalflapConfig.of(config))
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
    with torch.no_grad():
        model.get_input_embeddings().weight[5] += 1
    model.save_pretrained(tmp_path)
    ours, reopened = halflap.load(tmp_path), AutoModelForCausalLM.from_pretrained(tmp_path)
    assert ours.config.tie_word_embeddings == tied and ("head.weight" in ours.state_dict()) == (not tied)
    torch.testing.assert_close(logits(reopened, some_tokens()), logits(ours, some_tokens()))
    untied = AutoModelForCausalLM.from_pretrained(tmp_path, tie_word_embeddings=False)
    assert untied.lm_head.weight is not untied.get_input_embeddings().weight
    torch.testing.assert_close(logits(untied, some_tokens()), logits(ours, some_tokens()))


def test_a_broken_tie_is_not_saved_silently(model_dir: Path, tmp_path: Path) -> None:
    config = dataclasses.replace(halflap.load(model_dir).config, tie_word_embeddings=True)
    model = AutoModelForCausalLM.from_config(HalflapConfig.of(config))
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach() * 1.5)
    with pytest.raises(HalflapError, match="tie_word_embeddings = False to save both"):
        model.save_pretrained(tmp_path)
    model.config.tie_word_embeddings = False
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(halflap.load(tmp_path), some_tokens()), logits(model, some_tokens()))


def test_the_vocabulary_can_be_resized(model: Any, tmp_path: Path) -> None:
    before = logits(model, some_tokens())
    model.resize_token_embeddings(333)
    assert (model.config.vocab_size, model.lm_head.weight.shape[0]) == (333, 333)
    torch.testing.assert_close(logits(model, some_tokens())[..., :320], before)
    model.save_pretrained(tmp_path)
    assert halflap.load(tmp_path).config.vocab_size == 333
    torch.testing.assert_close(logits(halflap.load(tmp_path), some_tokens()), logits(model, some_tokens()))


def test_a_fresh_model_is_initialised_as_ours_are(model_dir: Path) -> None:
    config = AutoConfig.from_pretrained(model_dir)
    torch.manual_seed(0)
    one = AutoModelForCausalLM.from_config(config)
    torch.manual_seed(0)
    assert equal_bits(one, AutoModelForCausalLM.from_config(config))
    assert not equal_bits(one, AutoModelForCausalLM.from_config(config))
    for name, parameter in one.named_parameters():
        assert parameter.isfinite().all()
        if name.endswith("A_log"):
            assert (parameter.exp() >= 1 - 1e-5).all() and parameter.std() > 0


def test_changed_special_tokens_are_saved(model: Any, tmp_path: Path) -> None:
    model.config.pad_token_id = 7
    model.config.eos_token_id = [2, 9]
    model.save_pretrained(tmp_path)
    config = halflap.load(tmp_path).config
    assert (config.pad_token_id, config.eos_token_id) == (7, (2, 9))


def test_shards(model: Any, model_dir: Path, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path, max_shard_size="200KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    assert equal_bits(AutoModelForCausalLM.from_pretrained(tmp_path), model)


def test_a_config_alone_can_be_saved_and_copied(model_dir: Path, tmp_path: Path) -> None:
    config = AutoConfig.from_pretrained(model_dir)
    assert HalflapConfig.from_dict(config.to_dict()).model_config() == config.model_config()
    config.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).model_config() == config.model_config()
    assert (tmp_path / "halflap.json").exists()
    (tmp_path / "halflap.json").unlink()
    assert AutoConfig.from_pretrained(tmp_path).model_config() == config.model_config()


def test_an_older_config_json_is_completed_by_its_halflap_json(model_dir: Path, tmp_path: Path) -> None:
    for file in model_dir.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    older = json.loads((model_dir / "config.json").read_text())
    del older["halflap"]
    (tmp_path / "config.json").write_text(json.dumps(older))
    assert equal_bits(AutoModelForCausalLM.from_pretrained(tmp_path), AutoModelForCausalLM.from_pretrained(model_dir))


def test_wrong_directories_say_so(model_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(HalflapError, match="has no blocks"):
        HalflapForCausalLM(HalflapConfig())
    for file in model_dir.iterdir():
        if not file.name.endswith(".safetensors"):
            (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(HalflapError, match=r"no .*safetensors|safetensors"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_lineage_goes_on(model: Any, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    steps = json.loads((tmp_path / "lineage.json").read_text())["steps"]
    assert steps[-1]["verb"] == "transformers" and len(next(iter(steps[-1]["inputs"].values()))) == 64


def test_a_family_that_transformers_lacks_is_ours_by_name(model_dir: Path, tmp_path: Path) -> None:
    config = halflap.load(model_dir).config
    if config.family != "hymba":
        pytest.skip("transformers has this family")
    from halflap.models.presets import preset

    model = halflap.hf.HymbaForCausalLM(halflap.hf.HymbaConfig.of(preset("hymba-tiny")))
    model.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    assert (stored["model_type"], stored["architectures"]) == ("hymba", ["HymbaForCausalLM"])
    released = stored | {"auto_map": {"AutoConfig": "x.Config", "AutoModelForCausalLM": "x.Model"}}
    (tmp_path / "config.json").write_text(json.dumps(released))
    for trusted in (None, True, False):  # code that comes with a checkpoint never runs
        opened = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=trusted)
        assert type(opened) is halflap.hf.HymbaForCausalLM and equal_bits(opened, model)


def test_without_halflap_a_stock_checkpoint_opens(stock_dir: Path) -> None:
    if json.loads((stock_dir / "config.json").read_text())["model_type"] == "hymba":
        pytest.skip("transformers has no class for it")
    code = (
        "import sys; from transformers import AutoModelForCausalLM\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(stock_dir)!r})\n"
        "assert 'halflap' not in sys.modules; print(type(model).__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == type(AutoModelForCausalLM.from_pretrained(stock_dir)).__name__
