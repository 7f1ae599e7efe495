"""The training loop: exact accumulation, resume bit for bit, interruption, refusal of what is not finite."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from halflap.data.batch import Batch
from halflap.errors import HalflapError
from halflap.models.config import AttentionConfig, Mamba2Config, MLPConfig, ModelConfig
from halflap.models.model import HybridModel, initialize
from halflap.models.patterns import parse_pattern
from halflap.train import resume
from halflap.train.config import Fit
from halflap.train.fit import fit
from halflap.train.losses import LossTerms
from halflap.train.objectives.language import NextToken

ROWS, LENGTH, VOCAB = 4, 16, 31
BLOCKS = {"M": Mamba2Config(4, 4, 2, 4, chunk_size=8), "*": AttentionConfig(2, 1, 4), "-": MLPConfig(16)}
CONFIG = ModelConfig("nemotron_h", VOCAB, 8, parse_pattern("M-*", BLOCKS))
SETTINGS = Fit(batch_size=ROWS, micro_batch_size=2, sequence_length=LENGTH, learning_rate=3e-3, save_every=3)
STEP = ROWS * LENGTH


def make_model(seed: int = 0, dtype: torch.dtype = torch.float32) -> HybridModel:
    model = HybridModel(CONFIG)
    initialize(model, seed)
    return model.to(dtype)


def batches(step: int) -> Batch:
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(VOCAB, (ROWS, LENGTH), generator=generator)
    return Batch(tokens, (tokens * 3 + 1) % VOCAB, torch.ones(ROWS, LENGTH), torch.ones(ROWS, LENGTH, dtype=torch.long))


def run(model: HybridModel, steps: int, directory: Path | None = None, **more: Any) -> dict[str, Any]:
    options = {"progress": False, "settings": SETTINGS, "batches": batches} | more
    given_settings, given_batches = options.pop("settings"), options.pop("batches")
    return fit(model, NextToken(), given_batches, given_settings, tokens=steps * STEP, directory=directory, **options)


def weights(model: HybridModel) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def stop_at(step: int, error: type[BaseException] = KeyboardInterrupt) -> Callable[[int], Batch]:
    def interrupted(index: int) -> Batch:
        if index == step:
            raise error
        return batches(index)

    return interrupted


def test_learns_and_reports() -> None:
    rows: list[dict[str, Any]] = []
    result = run(make_model(), 60, log=rows.append, held_out=[batches(1000)])
    assert result["steps"] == 60 and result["tokens"] == 60 * STEP
    assert result["loss"] < 2.8 < rows[0]["loss"] and result["held_out_loss"] < 2.8
    steps = [row for row in rows if "lr" in row]
    assert [row["step"] for row in steps] == list(range(1, 61))
    for name in ("loss", "lr", "grad_norm", "tokens", "tokens_per_second", "seconds", "peak_memory_bytes"):
        assert all(row[name] > 0 for row in steps)
    assert sum("held_out_loss" in row for row in rows) == 10


def test_log_window_averages_steps() -> None:
    each: list[dict[str, Any]] = []
    grouped: list[dict[str, Any]] = []
    run(make_model(), 7, log=each.append)
    run(make_model(), 7, log=grouped.append, settings=dataclasses.replace(SETTINGS, log_every=3))
    assert [row["step"] for row in grouped] == [3, 6, 7]
    assert grouped[0]["loss"] == pytest.approx(sum(row["loss"] for row in each[:3]) / 3, rel=1e-12)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_resume_is_bit_exact(dtype: str, tmp_path: Path) -> None:
    straight, resumed = make_model(), make_model()
    expected = run(straight, 10, dtype=dtype)
    with pytest.raises(KeyboardInterrupt):
        run(resumed, 10, tmp_path, batches=stop_at(5), dtype=dtype)
    assert [path.name for path in resume.states(tmp_path)] == ["step-00000003", "step-00000005"]
    fresh, rows = make_model(seed=9), []
    result = run(fresh, 10, tmp_path, dtype=dtype, log=rows.append)
    assert same(weights(straight), weights(fresh))
    assert rows[0]["resumed_at"] == 5 and rows[1]["step"] == 6
    timed = ("tokens_per_second",)
    assert {k: v for k, v in result.items() if k not in timed} == {k: v for k, v in expected.items() if k not in timed}


def test_kill_while_saving_loses_only_the_unsaved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    straight = make_model()
    run(straight, 10)
    real, calls = resume.save_file, []

    def dies(tensors: Any, path: Path) -> None:
        calls.append(path)
        if len(calls) == 4:  # the optimiser of the second save
            os._exit(9)
        real(tensors, path)

    if (child := os.fork()) == 0:
        monkeypatch.setattr(resume, "save_file", dies)
        run(make_model(), 10, tmp_path)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert [path.name for path in resume.states(tmp_path)] == ["step-00000003"]
    assert list(tmp_path.glob(".*.tmp"))
    resumed = make_model(seed=1)
    run(resumed, 10, tmp_path)
    assert same(weights(straight), weights(resumed))
    assert not list(tmp_path.glob(".*.tmp"))


def test_full_disk_is_one_sentence_and_keeps_the_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(make_model(), 10, tmp_path, batches=stop_at(4))

    def full(tensors: Any, path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(resume, "save_file", full)
    with pytest.raises(HalflapError, match="No space left"):
        run(make_model(), 10, tmp_path)
    assert [path.name for path in resume.states(tmp_path)] == ["step-00000003", "step-00000004"]
    assert not list(tmp_path.glob(".*"))


def test_damaged_state_falls_back_to_the_one_before(tmp_path: Path) -> None:
    straight, resumed = make_model(), make_model(seed=4)
    run(straight, 10)
    with pytest.raises(KeyboardInterrupt):
        run(make_model(), 10, tmp_path, batches=stop_at(5))
    newest = resume.states(tmp_path)[-1] / "model.safetensors"
    newest.write_bytes(newest.read_bytes()[:-100])
    with pytest.warns(UserWarning, match="going back"), pytest.raises(KeyboardInterrupt):
        run(resumed, 10, tmp_path, batches=stop_at(5))
    assert [path.name for path in resume.states(tmp_path)] == ["step-00000003", "step-00000005"]
    run(resumed, 10, tmp_path)
    assert same(weights(straight), weights(resumed))


def test_state_of_another_model_is_refused(tmp_path: Path) -> None:
    run(make_model(), 2, tmp_path)
    other = HybridModel(dataclasses.replace(CONFIG, vocab_size=VOCAB + 1))
    with pytest.raises(HalflapError, match="of another model"):
        run(other, 2, tmp_path)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_abandons_the_step_and_saves(number: int, tmp_path: Path) -> None:
    class Interrupted(NextToken):
        calls = 0

        def loss(self, model: Any, batch: Batch) -> LossTerms:
            self.calls += 1
            if self.calls == 7:  # the first micro-batch of the fourth step
                torch.rand(3)
                os.kill(os.getpid(), number)
            return super().loss(model, batch)

    straight, model = make_model(), make_model()
    run(straight, 10)
    handler = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt):
        fit(model, Interrupted(), batches, SETTINGS, tokens=10 * STEP, directory=tmp_path, progress=False)
    assert signal.getsignal(number) == handler
    assert resume.states(tmp_path)[-1].name == "step-00000003"
    run(model, 10, tmp_path)
    assert same(weights(straight), weights(model))


def test_finished_fit_is_found_finished(tmp_path: Path) -> None:
    first = run(make_model(), 4, tmp_path, held_out=[batches(9)])
    again = run(make_model(seed=3), 4, tmp_path, held_out=[batches(9)], batches=stop_at(0, AssertionError))
    assert again == first


@settings(max_examples=12)
@given(rows=st.integers(1, 6), micro=st.integers(1, 6), drop=st.integers(0, 40), seed=st.integers(0, 5))
def test_any_split_gives_the_same_gradient(rows: int, micro: int, drop: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(VOCAB, (rows, LENGTH), generator=generator)
    mask = torch.ones(rows * LENGTH)
    mask[torch.randperm(rows * LENGTH - 1, generator=generator)[:drop]] = 0
    batch = Batch(tokens, tokens.roll(-1, 1), mask.view(rows, LENGTH))
    results = []
    for size in (rows, micro):
        model = make_model(dtype=torch.float64)
        # A plain gradient step in disguise: AdamW with a huge eps moves by lr * gradient / eps, without decay.
        plain = {"learning_rate": 1.0, "schedule": "constant", "warmup": 0, "eps": 1e6, "weight_decay": 0, "clip": 0}
        options = Fit(batch_size=rows, micro_batch_size=size, sequence_length=LENGTH, **plain)
        fit(model, NextToken(), lambda step: batch, options, tokens=1, progress=False)
        results.append(weights(model))
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, rtol=1e-11, atol=1e-13)


def test_not_finite_stops_and_names_the_parameter(tmp_path: Path) -> None:
    class Bad(NextToken):
        def loss(self, model: Any, batch: Batch) -> LossTerms:
            terms = super().loss(model, batch)
            if torch.equal(batch.tokens, batches(4).tokens[:2]):
                return LossTerms(terms.sum + model.blocks[1].mixer.up_proj.weight.sum() * float("inf"))
            return terms

    with pytest.raises(HalflapError, match=r"step 5 .*gradient of blocks\.1\.mixer\.up_proj\.weight.*learning-rate"):
        fit(make_model(), Bad(), batches, SETTINGS, tokens=10 * STEP, directory=tmp_path, progress=False)
    assert [path.name for path in resume.states(tmp_path)] == ["step-00000003"]


def test_batch_without_targets_is_refused() -> None:
    empty = dataclasses.replace(batches(0), weights=torch.zeros(ROWS, LENGTH))
    with pytest.raises(HalflapError, match="nothing to learn from"):
        run(make_model(), 1, batches=lambda step: empty)


def test_half_precision_weights_are_refused() -> None:
    with pytest.raises(HalflapError, match="must be float32"):
        run(make_model(dtype=torch.bfloat16), 1)


def test_held_out_function(tmp_path: Path) -> None:
    seen: list[bool] = []

    def judge(model: torch.nn.Module) -> dict[str, float]:
        seen.append(model.training)
        return {"loss": 1.5, "bits_per_byte": 0.5}

    result = run(make_model(), 4, held_out=judge, settings=dataclasses.replace(SETTINGS, evaluate_every=2))
    assert result["held_out_loss"] == 1.5 and result["held_out_bits_per_byte"] == 0.5
    assert seen == [False, False]


def test_state_is_readable_json(tmp_path: Path) -> None:
    run(make_model(), 3, tmp_path)
    state = json.loads((resume.states(tmp_path)[-1] / "state.json").read_text())
    assert state["step"] == 3 and state["counters"]["tokens"] == 3 * STEP
