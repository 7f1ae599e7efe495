"""The training loop: every method trains here, an `Objective` says with which loss.

A step is `batches(step)`, cut into micro-batches; the sum of their losses is divided once, by the exact count of
the whole step over all micro-batches and ranks. The learning rate follows the tokens seen. State is saved now and
then, on Ctrl-C and on SIGTERM, and a fit that finds state in its directory goes on from it bit for bit.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from halflap.errors import HalflapError
from halflap.parallel import mesh
from halflap.progress import Progress
from halflap.train import resume
from halflap.train.config import Fit
from halflap.train.interrupts import Interrupts
from halflap.train.losses import Objective, add_over_ranks, mean_loss
from halflap.train.numerics import keep_freed_memory, not_finite, peak_memory, precision, resolve_dtype
from halflap.train.objectives.language import NextToken
from halflap.train.optim import learning_rate, make_optimizer, set_learning_rate, trained_parameters
from halflap.train.phases import Plan

HeldOut = Callable[[nn.Module], Mapping[str, float]] | Sequence[Any]
Log = Callable[[dict[str, Any]], None]
SAVE_SECONDS = 600  # what a machine that dies may lose of a long training, where its steps would be saved less often
RECENT_STEPS = 20  # the returned loss is the mean of this many last steps


def fit(
    model: nn.Module,
    objective: Objective,
    batches: Callable[[int], Any],
    settings: Fit,
    *,
    tokens: int,
    directory: str | Path | None = None,
    log: Log | None = None,
    held_out: HeldOut | None = None,
    device: str | torch.device = "cpu",
    dtype: str = "float32",
    seed: int = 0,
    progress: bool = True,
    plan: Plan | None = None,
    until: int | None = None,
) -> dict[str, Any]:
    """Train `model` in place until at least `tokens` tokens with weight were seen on all ranks together.

    batches(step) gives this rank's rows of a step and must depend on the step alone. dtype "bfloat16" computes
    under autocast and keeps weights and optimiser in float32; "auto" takes it where the device multiplies it fast.
    directory holds the saved states; a fit that finds some there goes on from the newest. held_out is a list of
    batches (judged by next-token loss) or a function of the model; its numbers are logged as `held_out_<name>`. A plan
    of phases has the learning rate of every step and ends the run after its last; the settings' schedule is not used.
    `until` stops after so many tokens; a fit of the same `tokens` on the same directory goes on to the same end.
    Returns loss (mean of the last steps), tokens, tokens_per_second, steps, and the last held-out numbers. Raises
    HalflapError when a loss or gradient is not finite, and KeyboardInterrupt after saving.
    """
    alone = Trainee(model, objective, directory, log)
    return fit_together(
        [alone], batches, settings, tokens=tokens, held_out=held_out, device=device, dtype=dtype, seed=seed,
        progress=progress, plan=plan, until=until,
    )[0]  # fmt: skip


class Trainee(NamedTuple):
    """A model that `fit_together` trains: by which objective, where its states are kept, who is told."""

    model: nn.Module
    objective: Objective
    directory: str | Path | None = None
    log: Log | None = None


def fit_together(
    trainees: Sequence[Trainee],
    batches: Callable[[int], Any],
    settings: Fit,
    *,
    tokens: int,
    held_out: HeldOut | None = None,
    device: str | torch.device = "cpu",
    dtype: str = "float32",
    seed: int = 0,
    progress: bool = True,
    plan: Plan | None = None,
    until: int | None = None,
) -> list[dict[str, Any]]:
    """Train several models at once, each on every batch as `fit` alone would; all are in memory together.

    A micro-batch is one object for all of them, so what an objective remembers of it serves all (`Distillation`).
    """
    keep_freed_memory()
    numeric, place = resolve_dtype(dtype, device), torch.device(device)
    states = [_State(_ready(one.model, place), one, settings, tokens, place, numeric, plan, until) for one in trainees]
    for state in states:
        _start(state, seed)
    steps = plan.steps if plan else max(1, math.ceil(tokens / (settings.tokens_per_step * mesh.world_size())))
    save_every = max(1, steps // 20) if settings.save_every is None else settings.save_every
    evaluate_every = max(1, steps // 10) if settings.evaluate_every is None else settings.evaluate_every
    whole = len(states) * (until or tokens)
    shown = Progress("train", whole, unit="tokens") if progress and mesh.is_main() else None
    save_seconds = SAVE_SECONDS if save_every and mesh.world_size() == 1 else math.inf  # clocks of ranks differ
    saved = time.monotonic()
    with Interrupts() as interrupts, shown or contextlib.nullcontext():
        if shown is not None:
            shown.start_at(sum(state.tokens for state in states))
        try:
            while going := [state for state in states if not state.done]:
                step = min(state.step for state in going)
                parts = _parts(batches(step), settings, place if len(states) > 1 else None)
                for state in going:
                    if state.step > step:  # after an interruption between two of them
                        continue
                    row = _step(state, parts, interrupts)
                    if shown is not None:
                        shown.note(loss=f"{row['loss']:.4f}", lr=f"{row['lr']:.2e}")
                        shown.advance(row["seen"])
                    _log_window(state, row)
                    if held_out is not None and _due(state, evaluate_every) and not state.done:
                        _judge(state, held_out)
                    if _due(state, save_every):
                        _save(state)
                if time.monotonic() - saved > save_seconds:
                    for state in going:
                        _save(state)
                    saved = time.monotonic()
            for state in states:
                _save(state)
        except KeyboardInterrupt:
            for state in states:
                if not state.updating:
                    _save(state)
            raise
    for state in states:
        state.model.eval()
        if held_out is not None:
            _judge(state, held_out)
    return [_result(state) for state in states]


def _ready(model: nn.Module, device: torch.device) -> nn.Module:
    if (quantization := getattr(model, "quantization", None)) is not None:
        raise HalflapError(
            f"the model holds {quantization.name} weights, which cannot be trained: take the checkpoint that they were "
            "made from, or write plain ones with `halflap export --quantize off`"
        )
    return model.to(device).train()


def _parts(batch: Any, settings: Fit, device: torch.device | None) -> list[Any]:
    """A step's micro-batches; already on the device when several models are to see the same objects."""
    rows = settings.micro_batch_rows
    parts = [batch.rows(start, start + rows) for start in range(0, len(batch.tokens), rows)]
    return parts if device is None else [part.to(device) for part in parts]


@dataclass
class _State:
    """What a running fit knows; the last group is saved."""

    model: nn.Module
    trainee: Trainee
    settings: Fit
    total: int
    device: torch.device
    dtype: torch.dtype
    plan: Plan | None = None
    until: int | None = None
    parameters: dict[str, nn.Parameter] = field(init=False)
    optimizer: torch.optim.Optimizer = field(init=False)
    updating: bool = False
    random: bytes = b""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    recent: list[float] = field(default_factory=list)
    window: dict[str, list[float]] = field(default_factory=dict)
    judged: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.parameters = trained_parameters(self.model)
        for name, parameter in self.parameters.items():
            if parameter.dtype not in (torch.float32, torch.float64):
                raise HalflapError(
                    f"{name} is {parameter.dtype}; weights being trained must be float32 (bfloat16 is the dtype of "
                    "the arithmetic): load the model with dtype float32"
                )
        self.optimizer = make_optimizer(self.parameters, self.settings)

    @property
    def objective(self) -> Objective:
        return self.trainee.objective

    @property
    def place(self) -> Path | None:
        return None if self.trainee.directory is None else Path(self.trainee.directory)

    @property
    def done(self) -> bool:
        return self.tokens >= (self.until or self.total) or (self.plan is not None and self.step >= self.plan.steps)


SAVED = ("tokens", "seconds", "recent", "window", "judged")


def _start(state: _State, seed: int) -> None:
    torch.manual_seed(seed + mesh.rank())
    found = resume.restore(state.place, state.parameters, state.optimizer) if state.place is not None else None
    if found is not None:
        state.step, counters = found
        for name in SAVED:
            setattr(state, name, counters[name])
        _log(state, {"resumed_at": state.step, "tokens": state.tokens})
    state.random = resume.random_state()
    if state.settings.compile:
        for block in getattr(state.model, "blocks", [state.model]):
            block.compile()


def _step(state: _State, parts: Sequence[Any], interrupts: Interrupts) -> dict[str, Any]:
    """One update; raises KeyboardInterrupt between micro-batches with the model as it was before the step."""
    started = time.perf_counter()
    seen = sum(float((part.weights > 0).sum()) for part in parts)
    counted = [sum(map(state.objective.count, parts)), seen, float(interrupts.requested)]
    count, seen, stop = mesh.all_reduce_sum(
        torch.tensor(counted, dtype=torch.float64, device=mesh.wire(state.device))
    ).tolist()
    if stop:
        raise KeyboardInterrupt
    if not count > 0:
        raise HalflapError(
            f"step {state.step + 1} has nothing to learn from: the weights of all its targets are 0; check the data"
        )
    totals = _backward(state, parts, count, interrupts)
    loss, norm = totals["loss"][0] / count, _clip(state)
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise HalflapError(not_finite(state.step + 1, loss, state.parameters))
    plan = state.plan
    rate = plan.learning_rate(state.step) if plan else learning_rate(state.settings, state.tokens + seen, state.total)
    set_learning_rate(state.optimizer, rate)
    state.updating = True
    state.optimizer.step()
    state.optimizer.zero_grad(set_to_none=True)
    state.step, state.tokens = state.step + 1, state.tokens + int(seen)
    state.random, state.updating = resume.random_state(), False
    seconds = time.perf_counter() - started
    state.seconds += seconds
    state.recent = [*state.recent[1 - RECENT_STEPS :], loss]
    return {"loss": loss, "lr": rate, "norm": norm, "seen": int(seen), "seconds": seconds, "totals": totals}


def _backward(state: _State, parts: Sequence[Any], count: float, interrupts: Interrupts) -> dict[str, list[float]]:
    """Accumulate the step's gradient; return loss and metrics as [sum, count] over all ranks."""
    totals: dict[str, list[Any]] = {"loss": [0.0, count / mesh.world_size()]}
    for part in parts:
        with precision(state.device, state.dtype):
            terms = state.objective.loss(state.model, part.to(state.device))
        (terms.sum / count).backward()
        for name, (total, number) in {"loss": (terms.sum.detach(), 0.0), **terms.metrics}.items():
            held = totals.setdefault(name, [0.0, 0.0])
            held[0], held[1] = held[0] + total, held[1] + number
        if interrupts.requested and mesh.world_size() == 1:
            state.optimizer.zero_grad(set_to_none=True)
            raise KeyboardInterrupt
    return add_over_ranks(totals, state.device)


def _clip(state: _State) -> float:
    """Sum the gradient over ranks, shorten it to `clip`, return its norm before."""
    if mesh.world_size() > 1:
        for parameter in state.parameters.values():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        mesh.all_reduce_sum_many(p.grad for p in state.parameters.values() if p.grad is not None)
    gradients = [p.grad for p in state.parameters.values() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients, foreach=True)
    if 0 < state.settings.clip < float(norm) < math.inf:
        parameters = state.parameters.values()
        torch.nn.utils.clip_grads_with_norm_(parameters, state.settings.clip, norm, foreach=True)
    return float(norm)


def _log_window(state: _State, row: dict[str, Any]) -> None:
    """Add a step to the window of unlogged steps; log their means when it is full or the run ends."""
    for name, (total, number) in {
        **row["totals"],
        "step_seconds": (row["seconds"], 1),
        "seen": (row["seen"], 1),
    }.items():
        held = state.window.setdefault(name, [0.0, 0.0])
        state.window[name] = [held[0] + total, held[1] + number]
    if not _due(state, state.settings.log_every) and not state.done:
        return
    window, state.window = state.window, {}
    (seconds, _), (seen, _) = window.pop("step_seconds"), window.pop("seen")
    means = {name: total / number if number else math.nan for name, (total, number) in window.items()}
    _log(
        state,
        {
            "step": state.step,
            "tokens": state.tokens,
            **means,
            "lr": row["lr"],
            "grad_norm": row["norm"],
            "tokens_per_second": seen / seconds,
            "seconds": state.seconds,
            "peak_memory_bytes": peak_memory(state.device),
        },
    )


def _log(state: _State, row: dict[str, Any]) -> None:
    if state.trainee.log is not None and mesh.is_main():
        state.trainee.log(row)


def _judge(state: _State, held_out: HeldOut) -> None:
    training = state.model.training
    state.model.eval()
    if callable(held_out):
        numbers = held_out(state.model)
    else:
        numbers = mean_loss(state.model, NextToken(), held_out, state.device, state.dtype)
    state.model.train(training)
    named = {f"held_out_{name}": value for name, value in numbers.items()}
    state.judged = {"step": state.step, **named}
    _log(state, {"step": state.step, "tokens": state.tokens, **named})


def _due(state: _State, every: int) -> bool:
    return every > 0 and state.step % every == 0


def _save(state: _State) -> None:
    if state.place is None:
        return
    generators = resume.random_state()
    resume.set_random_state(state.random)  # as after the last whole step, whatever an abandoned one has drawn
    counters = {name: getattr(state, name) for name in SAVED}
    resume.save(state.place, state.step, state.parameters, state.optimizer, counters)
    resume.set_random_state(generators)


def _result(state: _State) -> dict[str, Any]:
    numbers = {name: value for name, value in state.judged.items() if name != "step"}
    return {
        "loss": sum(state.recent) / max(len(state.recent), 1),
        "tokens": state.tokens,
        "tokens_per_second": state.tokens / state.seconds if state.seconds else 0.0,
        "steps": state.step,
        **numbers,
    }
