"""TRL: SFTTrainer and DPOTrainer, whole models and adapters, padded and packed."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

import halflap

trl = pytest.importorskip("trl", reason="trl is not installed: pip install -e '.[interop]'")
peft = pytest.importorskip("peft", reason="peft is not installed: pip install -e '.[interop]'")
datasets = pytest.importorskip("datasets", reason="datasets is not installed: pip install -e '.[interop]'")

TEXT = [
    "A half-lap joint takes two different pieces.",
    "Each piece is cut down by half.",
    "Attention looks back at every word; a state remembers what it was told.",
    "The quick brown fox.",
]
PAIRS = [
    {"prompt": "The joint takes", "chosen": " two pieces.", "rejected": " a fox."},
    {"prompt": "A state remembers what it", "chosen": " was told.", "rejected": " jumps over."},
    {"prompt": "Each", "chosen": " piece is cut down by half.", "rejected": " word."},
    {"prompt": "The quick", "chosen": " brown fox.", "rejected": " thickness, again and again."},
]
QUIET: dict[str, Any] = {
    **{"use_cpu": True, "bf16": False, "report_to": "none", "disable_tqdm": True, "save_strategy": "no", "seed": 1},
    **{"per_device_train_batch_size": 2, "logging_steps": 1, "lr_scheduler_type": "constant", "learning_rate": 3e-3},
}


def lora() -> Any:
    return peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")


def logged(trainer: Any, name: str) -> list[float]:
    return [float(row[name]) for row in trainer.state.log_history if name in row]


def sft(model: Any, directory: Path, tokenizer: Any, **fields: Any) -> Any:
    peft_config = fields.pop("peft_config", None)
    settings = trl.SFTConfig(output_dir=str(directory), max_length=64, **QUIET | {"max_steps": 6} | fields)
    data = datasets.Dataset.from_dict({"text": TEXT})
    return trl.SFTTrainer(
        model, settings, train_dataset=data, eval_dataset=data, processing_class=tokenizer, peft_config=peft_config
    )


def text_loss(directory: Path) -> float:
    """Of the four texts with their end token, each alone, by our own model."""
    model, tokenizer = halflap.load(directory), halflap.tokenizer(directory)
    total, count = 0.0, 0
    for text in TEXT:
        tokens = torch.tensor([[*tokenizer.encode(text), tokenizer.eos_id]])
        with torch.no_grad():
            total += float(F.cross_entropy(model(tokens)[0, :-1], tokens[0, 1:], reduction="sum"))
        count += tokens.shape[1] - 1
    return total / count


@pytest.mark.parametrize("packing", [False, True])
def test_sft_of_a_whole_model(model: Any, model_dir: Path, tmp_path: Path, packing: bool) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    trainer = sft(model, tmp_path, tokenizer, packing=packing, gradient_checkpointing=True)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(text_loss(model_dir), rel=1e-4)  # packed ones apart too
    trainer.train()
    losses = logged(trainer, "loss")
    assert losses[-1] < 0.8 * losses[0]
    trainer.save_model(str(tmp_path / "end"))
    assert text_loss(tmp_path / "end") == pytest.approx(trainer.evaluate()["eval_loss"], rel=1e-4)


def test_sft_of_adapters_from_a_path(model_dir: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    trainer = sft(str(model_dir), tmp_path, tokenizer, peft_config=lora(), gradient_checkpointing=True, max_steps=8)
    trainer.train()
    losses = logged(trainer, "loss")
    assert losses[-1] < 0.9 * losses[0]
    loss = trainer.evaluate()["eval_loss"]
    trainer.save_model(str(tmp_path / "adapters"))
    merged = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapters").merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    tokenizer.save_pretrained(tmp_path / "merged")
    assert text_loss(tmp_path / "merged") == pytest.approx(loss, rel=1e-3)


def test_sft_on_the_answer_alone(model: Any, model_dir: Path, tmp_path: Path) -> None:
    data = datasets.Dataset.from_list([{"prompt": p["prompt"], "completion": p["chosen"]} for p in PAIRS])
    settings = trl.SFTConfig(output_dir=str(tmp_path), **QUIET, max_steps=4)
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    trainer = trl.SFTTrainer(model, settings, train_dataset=data, processing_class=tokenizer)
    trainer.train()
    losses = logged(trainer, "loss")
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("adapters", [False, True])
def test_dpo(model: Any, model_dir: Path, tmp_path: Path, adapters: bool) -> None:
    settings = trl.DPOConfig(output_dir=str(tmp_path), **QUIET, max_steps=8, beta=0.1, gradient_checkpointing=True)
    trainer = trl.DPOTrainer(
        model,
        args=settings,
        train_dataset=datasets.Dataset.from_list(PAIRS),
        processing_class=AutoTokenizer.from_pretrained(model_dir),
        peft_config=lora() if adapters else None,
    )
    trainer.train()
    losses, margins = logged(trainer, "loss"), logged(trainer, "rewards/margins")
    assert losses[0] == pytest.approx(math.log(2), abs=1e-4)  # model and reference are one at the start
    assert losses[-1] < 0.6 and margins[-1] > 0
    if adapters:
        trainer.model.merge_and_unload().save_pretrained(tmp_path / "end")
    else:
        trainer.save_model(str(tmp_path / "end"))
    assert isinstance(AutoModelForCausalLM.from_pretrained(tmp_path / "end"), type(model))
    assert halflap.generate(tmp_path / "end", [[5, 9]], max_new_tokens=3)[0].tokens
