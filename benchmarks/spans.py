"""Where a training step's time goes: seconds of each part, forward and backward.

A part's inputs and outputs pass through identities that look at the clock. Autograd runs a part's backward between
those of its outputs and of its inputs, without others in between, so the same pair measures both directions. Parts do
not contain each other; what lies between them (residual sums, rotations, copies, embedding) is the rest.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

import training_step
from halflap.models.norm import LayerNorm1P, RMSNorm
from halflap.ops import select

# Parts by a module's own name, which norms have none of, and by the name of an operation.
PRODUCTS = {
    **dict.fromkeys(("in_proj", "out_proj", "q_proj", "k_proj", "v_proj", "o_proj"), "mixer_products"),
    **dict.fromkeys(("x_proj", "dt_proj"), "time_step_products"),
    **dict.fromkeys(("up_proj", "gate_proj", "down_proj"), "mlp_products"),
}
OPS = {"selective_scan": "scan", "conv_silu": "convolution", "attention": "attention", "swiglu": "mlp_activation"}

Seconds = dict[str, dict[str, float]]  # part to forward and backward


class _Mark(torch.autograd.Function):
    """The tensors as they are; `passed()` is called when their gradients come back."""

    @staticmethod
    def forward(ctx: Any, passed: Callable[[], None], *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.passed = passed
        ctx.set_materialize_grads(False)
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        ctx.passed()
        return None, *gradients


def _marked(values: list[Any], passed: Callable[[], None]) -> list[Any]:
    places = [i for i, value in enumerate(values) if isinstance(value, Tensor) and value.requires_grad]
    for place, tensor in zip(places, _Mark.apply(passed, *(values[i] for i in places)) if places else ()):
        values[place] = tensor
    return values


def _timed(function: Callable[..., Any], part: str, found: Seconds) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        began = [0.0]

        def leave() -> None:
            found[part]["backward"] += time.perf_counter() - began[0]

        values = _marked([*args, *kwargs.values()], leave)
        start = time.perf_counter()
        output = function(*values[: len(args)], **dict(zip(kwargs, values[len(args) :])))
        found[part]["forward"] += time.perf_counter() - start
        outputs = list(output) if isinstance(output, tuple) else [output]
        outputs = _marked(outputs, lambda: began.__setitem__(0, time.perf_counter()))
        return tuple(outputs) if isinstance(output, tuple) else outputs[0]

    return run


@contextmanager
def measured(model: nn.Module) -> Iterator[Seconds]:
    """Within it, steps of `training_step.our_step` add to the seconds of each part."""
    found: Seconds = defaultdict(lambda: {"forward": 0.0, "backward": 0.0})
    with ExitStack() as stack:
        for name, module in model.named_modules():
            part = "norms" if isinstance(module, RMSNorm | LayerNorm1P) else PRODUCTS.get(name.rsplit(".")[-1])
            if part is not None:
                _replace(stack, module, "forward", _timed(module.forward, part, found))
        for name, part in OPS.items():
            _replace(stack, select, name, _timed(getattr(select, name), part, found))
        loss = _timed(training_step.cross_entropy_sum, "head_and_loss", found)
        _replace(stack, training_step, "cross_entropy_sum", loss)
        clock: list[float] = []
        hooks = (
            register_optimizer_step_pre_hook(lambda *_: clock.append(time.perf_counter())),
            register_optimizer_step_post_hook(lambda *_: _add(found["optimizer"], time.perf_counter() - clock.pop())),
        )
        for hook in hooks:
            stack.callback(hook.remove)
        yield found


def _add(seconds: dict[str, float], taken: float) -> None:
    seconds["forward"] += taken


def _replace(stack: ExitStack, owner: Any, name: str, value: Any) -> None:
    """Until the stack closes."""
    before = vars(owner).get(name)
    setattr(owner, name, value)
    stack.callback(lambda: delattr(owner, name) if before is None else setattr(owner, name, before))
