"""PEFT: adapters on every linear map are applied in training, prefill and decode, and merge without a trace."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, Trainer

import halflap
from halflap.errors import HalflapError
from halflap.hf import HalflapCache, HalflapForCausalLM
from halflap.models.linear import Linear

peft = pytest.importorskip("peft", reason="peft is not installed: pip install -e '.[interop]'")


def lora(model: Any, targets: Any = "all-linear", **fields: Any) -> Any:
    torch.manual_seed(0)
    options: dict[str, Any] = {"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM", "init_lora_weights": False}
    return peft.get_peft_model(model, peft.LoraConfig(target_modules=targets, **options | fields))


def linear_names(model: Any) -> set[str]:
    """Every linear map of the network by its full name."""
    return {name for name, module in model.named_modules() if isinstance(module, Linear) and name != "lm_head"}


def tokens(time: int = 21) -> torch.Tensor:
    return torch.randint(3, 300, (2, time), generator=torch.Generator().manual_seed(1))


def passes(model: Any) -> dict[str, torch.Tensor]:
    """Logits of the three ways through a model: a training pass, prefill in pieces, and steps from a cache."""
    with torch.enable_grad():
        found = {"training": model(tokens(), use_cache=False).logits.detach()}
    with torch.no_grad():
        cache = HalflapCache()
        found["prefill"] = torch.cat([model(part, past_key_values=cache).logits for part in tokens().split(8, 1)], 1)
        cache = HalflapCache()
        found["decode"] = torch.cat([model(step, past_key_values=cache).logits for step in tokens().split(1, 1)], 1)
    return found


def close(one: torch.Tensor, other: torch.Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-4, atol=2e-4)


def test_all_linear_means_every_linear(model: Any) -> None:
    names = linear_names(model)
    adapted = lora(model)
    found = {n.removeprefix("base_model.model.") for n, m in adapted.named_modules() if hasattr(m, "lora_A")}
    kinds = {name.rpartition(".")[2] for name in found}
    assert found == names
    if any(block.kind == "mamba2" for block in model.config.model_config().blocks):
        assert {"in_proj", "out_proj"} <= kinds


@pytest.mark.parametrize("dora", [False, True])
def test_adapters_are_applied_on_every_way_and_merge_exactly(model: Any, tmp_path: Path, dora: bool) -> None:
    before = passes(model)
    adapted = lora(model, use_dora=dora).eval()
    found = passes(adapted)
    assert not torch.allclose(found["training"], before["training"], atol=0.1)
    close(found["prefill"], found["training"])
    close(found["decode"], found["training"])
    with adapted.disable_adapter():
        close(passes(adapted)["decode"], before["decode"])
    merged = adapted.merge_and_unload()
    assert isinstance(merged, HalflapForCausalLM) and linear_names(merged) == linear_names(model)
    for logits in passes(merged).values():
        close(logits, found["training"])
    merged.save_pretrained(tmp_path)
    with torch.no_grad():
        close(halflap.load(tmp_path)(tokens()), found["training"])
    text = halflap.generate(tmp_path, tokens().tolist(), max_new_tokens=8, ignore_eos=True)
    merged.generation_config.eos_token_id = None
    assert merged.generate(tokens(), max_new_tokens=8)[:, 21:].tolist() == [row.tokens for row in text]


def test_an_equal_width_checkpoint_takes_adapters_and_stays_a_stock_one(stock_dir: Path, tmp_path: Path) -> None:
    """PEFT refuses out_proj on stock Mamba classes; trained on ours and merged, the stock class opens the result."""
    adapted = lora(HalflapForCausalLM.from_pretrained(stock_dir)).eval()
    expected = passes(adapted)["decode"]
    adapted.save_pretrained(tmp_path / "adapters")
    again = peft.PeftModel.from_pretrained(HalflapForCausalLM.from_pretrained(stock_dir), tmp_path / "adapters")
    close(passes(again)["training"], expected)
    adapted.merge_and_unload().save_pretrained(tmp_path / "merged")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert type(stock) is type(AutoModelForCausalLM.from_pretrained(stock_dir))
    with torch.no_grad():
        torch.testing.assert_close(stock(tokens(), use_cache=False).logits, expected, rtol=1e-3, atol=2e-3)


def test_one_linear_alone_is_applied(model: Any) -> None:
    """Each kind of map by itself, once: one that is passed over cannot hide behind the others."""
    adapted = lora(model).eval()
    layers = {n.rpartition(".")[2]: m for n, m in reversed([*adapted.named_modules()]) if hasattr(m, "lora_B")}
    every = [module.lora_B["default"].weight for module in adapted.modules() if hasattr(module, "lora_B")]
    kept = {name: layer.lora_B["default"].weight.detach().clone() for name, layer in layers.items()}
    for weight in every:
        weight.data.zero_()
    plain = passes(adapted)
    for name, layer in layers.items():
        layer.lora_B["default"].weight.data.copy_(kept[name])
        for way, logits in passes(adapted).items():
            assert not torch.allclose(logits, plain[way], atol=1e-4), (way, name)
        layer.lora_B["default"].weight.data.zero_()


def test_gradients_reach_adapters_as_they_reach_the_weights(model: Any) -> None:
    """With y = W x + s B A x, the gradient of B is s (dL/dW) A^T: what full training would see, projected."""
    full = copy.deepcopy(model).train()
    full(tokens(), labels=tokens()).loss.backward()
    adapted = lora(model, init_lora_weights=True).train()  # B starts at zero: the same function
    adapted(tokens(), labels=tokens()).loss.backward()
    weights = dict(full.named_parameters())
    for name, module in adapted.named_modules():
        if hasattr(module, "lora_A"):
            gradient = weights[name.removeprefix("base_model.model.") + ".weight"].grad
            expected = 2.0 * gradient @ module.lora_A["default"].weight.T  # s = alpha / r
            close(module.lora_B["default"].weight.grad, expected)


def test_adapters_alone_are_saved_and_opened_on_their_base(model: Any, model_dir: Path, tmp_path: Path) -> None:
    adapted = lora(model).eval()
    adapted.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("model*.safetensors"))
    expected = passes(adapted)["training"]
    opened = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path)
    close(passes(opened)["decode"], expected)
    through_auto = AutoModelForCausalLM.from_pretrained(tmp_path)
    close(passes(through_auto)["decode"], expected)
    base = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_dir), tmp_path)
    close(passes(base)["prefill"], expected)


def test_generate_with_adapters_attached(model: Any) -> None:
    model.generation_config.eos_token_id = None
    adapted = lora(model).eval()
    attached = adapted.generate(input_ids=tokens(), max_new_tokens=8, num_beams=2)
    assert attached.equal(adapted.merge_and_unload().generate(tokens(), max_new_tokens=8, num_beams=2))


def test_trainer_trains_the_adapters_alone(model: Any, tmp_path: Path) -> None:
    from .test_train import arguments, examples, weights

    adapted = lora(model, init_lora_weights=True)
    before = weights(adapted)
    fields = {"max_steps": 3, "optim": "adamw_torch", "learning_rate": 1e-2, "gradient_checkpointing": True}
    trainer = Trainer(adapted, arguments(tmp_path, **fields), train_dataset=examples())
    trainer.train()
    moved = {name for name, weight in weights(adapted).items() if not weight.equal(before[name])}
    assert moved == {name for name in before if "lora_B" in name} | {n for n in moved if "lora_A" in n}


def test_head_and_embedding_as_modules_to_save(model: Any, tmp_path: Path) -> None:
    adapted = lora(model, modules_to_save=["lm_head", "embedding"]).eval()
    for name, parameter in adapted.named_parameters():
        if "modules_to_save" in name:
            parameter.data.mul_(1.1)
    expected = passes(adapted)["decode"]
    merged = adapted.merge_and_unload()
    close(passes(merged)["training"], expected)
    merged.save_pretrained(tmp_path)
    with torch.no_grad():
        close(halflap.load(tmp_path)(tokens()), expected)


def test_an_adapter_that_would_be_passed_over_is_refused(model: Any) -> None:
    if not any(isinstance(module, nn.Conv1d) for module in model.modules()):
        pytest.skip("no convolution")
    channels = next(module.groups for module in model.modules() if isinstance(module, nn.Conv1d))  # PEFT wants r so
    with pytest.raises(HalflapError, match=r"conv1d carries an adapter that the kernels would pass over"):
        lora(model, ["conv1d", "in_proj"], r=channels)(tokens())


def test_attached_adapters_are_not_saved_as_a_checkpoint(model: Any, tmp_path: Path) -> None:
    adapted = lora(model)
    with pytest.raises(HalflapError, match=r"merge_and_unload\(\) first"):
        adapted.base_model.model.save_pretrained(tmp_path)
