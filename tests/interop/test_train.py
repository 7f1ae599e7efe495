"""Losses and transformers' Trainer: padding, packing, accumulated gradients, recomputation, resuming."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import halflap
from halflap.hf import HalflapForCausalLM
from halflap.ops.vocabulary_loss import cross_entropy_sum

DOCUMENTS = ([5, 9, 31, 7, 120, 44, 3], [17, 4, 66], [200, 201, 77, 8, 8, 8, 90, 150, 33], [299, 40, 12, 13])


def examples(side: str = "right") -> list[dict[str, torch.Tensor]]:
    """One padded row a document, its labels, and -100 on padding and on each first half."""
    rows = []
    for document in DOCUMENTS:
        pad = 10 - len(document)
        labels = [-100 if i < len(document) // 2 else token for i, token in enumerate(document)]
        columns = {"input_ids": ([0] * pad, document), "attention_mask": ([0] * pad, [1] * len(document))}
        columns["labels"] = ([-100] * pad, labels)
        rows.append({k: torch.tensor(p + v if side == "left" else v + p) for k, (p, v) in columns.items()})
    return rows


def batch(side: str = "right") -> dict[str, torch.Tensor]:
    rows = examples(side)
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def gradients(model: Any) -> dict[str, torch.Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def backward(model: Any, inputs: dict[str, torch.Tensor], **fields: Any) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss = model.train()(**inputs, **fields).loss
    loss.backward()
    return float(loss), gradients(model)


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], tolerance: float = 1e-5) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], rtol=1e-3, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


def arguments(directory: Path, **fields: Any) -> TrainingArguments:
    defaults: dict[str, Any] = {
        **{"output_dir": str(directory), "use_cpu": True, "report_to": "none", "disable_tqdm": True, "seed": 1},
        **{"optim": "sgd", "learning_rate": 0.5, "lr_scheduler_type": "constant", "logging_steps": 1},
        **{"per_device_train_batch_size": 4, "max_steps": 1, "max_grad_norm": 0.0, "save_strategy": "no"},
    }
    return TrainingArguments(**defaults | fields)


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_loss_is_the_mean_over_what_is_labelled(model: Any, model_dir: Path, side: str) -> None:
    ours = halflap.load(model_dir)
    total, count = 0.0, 0
    for document in DOCUMENTS:
        start = max(1, len(document) // 2)
        tokens = torch.tensor([document])
        hidden = ours.hidden_states(tokens).detach()[0, start - 1 : -1]
        total += float(cross_entropy_sum(hidden, ours.head_weight.detach(), tokens[0, start:], torch.ones(len(hidden))))
        count += len(hidden)
    loss, _ = backward(model, batch(side))
    assert loss == pytest.approx(total / count, rel=1e-5)
    assert backward(model, batch(side), num_items_in_batch=2 * count)[0] == pytest.approx(total / count / 2, rel=1e-5)


def test_padding_of_either_side_gives_the_same_gradients(model: Any) -> None:
    assert_same(backward(model, batch("left"))[1], backward(model, batch("right"))[1])


@pytest.mark.parametrize("name", ["position_ids", "seq_idx"])
def test_packed_documents_do_not_see_each_other(model: Any, name: str) -> None:
    separate = backward(model, batch())
    row = {
        key: torch.cat([e[key][e["attention_mask"] == 1] for e in examples()])[None] for key in ("input_ids", "labels")
    }
    starts = torch.tensor([0, *(len(d) for d in DOCUMENTS[:-1])]).cumsum(0)
    row["labels"][0, starts] = -100
    numbers = [range(len(d)) if name == "position_ids" else [i] * len(d) for i, d in enumerate(DOCUMENTS)]
    row[name] = torch.tensor([number for document in numbers for number in document])[None]
    packed = backward(model, row)
    assert packed[0] == pytest.approx(separate[0], rel=1e-5)
    assert_same(packed[1], separate[1])
    with torch.no_grad():  # evaluation of packed rows needs no word about caches
        assert float(model.eval()(**row).loss) == pytest.approx(separate[0], rel=1e-5)


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputation_gives_the_same_gradients(model: Any, reentrant: bool) -> None:
    plain = backward(model, batch())
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    calls: list[int] = []
    hook = model.model.network.blocks[1].register_forward_pre_hook(lambda *_: calls.append(1))
    again = backward(model, batch())
    hook.remove()
    assert len(calls) == 2 and again[0] == pytest.approx(plain[0])
    assert_same(again[1], plain[1])
    model.gradient_checkpointing_disable()
    assert backward(model, batch())[0] == pytest.approx(plain[0])


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputation_of_packed_rows(model: Any, reentrant: bool) -> None:
    row = {
        "input_ids": torch.tensor([[5, 9, 31, 7, 17, 4, 66, 12]]),
        "position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]]),
    }
    row["labels"] = row["input_ids"]
    plain = backward(model, row)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert_same(backward(model, row)[1], plain[1])


def test_accumulated_gradients_are_those_of_the_whole_batch(model: Any, tmp_path: Path) -> None:
    ends = []
    for size in (4, 2, 1):
        trained = copy.deepcopy(model)
        fields = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 4 // size}
        trainer = Trainer(trained, arguments(tmp_path, **fields), train_dataset=examples())
        ends.append((trainer.train().training_loss, weights(trained)))
    for loss, end in ends[1:]:
        assert loss == pytest.approx(ends[0][0], rel=1e-4)
        assert_same(end, ends[0][1])
    assert any(not a.equal(b) for a, b in zip(weights(model).values(), ends[0][1].values()))


def learn_and_resume(directory: Path, place: Path) -> None:
    def run(steps: int, resume: bool = False) -> Trainer:
        model = HalflapForCausalLM.from_pretrained(directory)
        fields = {"max_steps": steps, "save_strategy": "steps", "save_steps": 2, "optim": "adamw_torch"}
        fields |= {"learning_rate": 3e-3, "per_device_train_batch_size": 2}
        trainer = Trainer(model, arguments(place / "run", **fields), train_dataset=examples())
        trainer.train(resume_from_checkpoint=str(place / "run" / "checkpoint-2") if resume else None)
        return trainer

    whole = run(6)
    losses = [row["loss"] for row in whole.state.log_history if "loss" in row]
    assert losses[-1] < 0.9 * losses[0]
    assert_same(weights(run(6, resume=True).model), weights(whole.model))
    whole.save_model(str(place / "end"))
    tokens = batch()["input_ids"]
    with torch.no_grad():
        ours = halflap.load(place / "end")(tokens)
        torch.testing.assert_close(ours, whole.model(tokens).logits, rtol=1e-4, atol=1e-4)


def test_trainer_learns_saves_resumes_and_halflap_opens_it(model_dir: Path, tmp_path: Path) -> None:
    learn_and_resume(model_dir, tmp_path)


def test_trainer_resumes_under_the_names_of_a_stock_class(stock_dir: Path, tmp_path: Path) -> None:
    learn_and_resume(stock_dir, tmp_path)
    AutoModelForCausalLM.from_pretrained(tmp_path / "end")  # without our classes too


def test_the_best_checkpoint_is_loaded_back(model: Any, tmp_path: Path) -> None:
    fields = {"max_steps": 4, "eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
    fields |= {"load_best_model_at_end": True, "learning_rate": 1.0, "per_device_train_batch_size": 2}
    trainer = Trainer(model, arguments(tmp_path, **fields), train_dataset=examples(), eval_dataset=examples())
    trainer.train()
    best = AutoModelForCausalLM.from_pretrained(trainer.state.best_model_checkpoint)
    assert_same(weights(best), weights(trainer.model), 0)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(trainer.state.best_metric, rel=1e-5)


def test_tied_embeddings_train_and_resume(model_dir: Path, tmp_path: Path) -> None:
    from halflap.hf import HalflapConfig

    config = dataclasses.replace(halflap.load(model_dir).config, tie_word_embeddings=True)
    torch.manual_seed(0)
    model = HalflapForCausalLM(HalflapConfig.of(config))
    fields = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2}
    Trainer(model, arguments(tmp_path, **fields), train_dataset=examples()).train()
    torch.manual_seed(5)
    other = HalflapForCausalLM(HalflapConfig.of(config))
    trainer = Trainer(other, arguments(tmp_path, **fields), train_dataset=examples())
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert other.lm_head.weight is other.get_input_embeddings().weight
    assert_same(weights(other), weights(model))


def test_bfloat16_training(model: Any, tmp_path: Path) -> None:
    trainer = Trainer(model, arguments(tmp_path, bf16=True, max_steps=2), train_dataset=examples())
    assert trainer.train().training_loss > 0
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert F.cross_entropy(model(torch.tensor([[5, 9]])).logits[0, :1], torch.tensor([9])).isfinite()
