"""A student as a slice of weights that are being trained: what it learns, its teacher's parameters learn."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.func import functional_call

from halflap.checkpoints.checkpoint import empty_model
from halflap.compress.plan import PruningPlan
from halflap.compress.prune import apply_plan
from halflap.models.model import HybridModel


class Slice:
    """The student of a plan as a function of the teacher's parameters, through which gradients flow.

    It is, bit for bit, what `apply_plan` writes, factors of norms included; holds no weights of its own.
    """

    def __init__(self, plan: PruningPlan) -> None:
        self.plan = plan
        self._shape = _HiddenStates(empty_model(plan.student))

    def __call__(self, teacher: HybridModel) -> Sliced:
        """The student of the teacher's parameters as they are now."""
        return Sliced(self._shape, dict(apply_plan(self.plan, teacher.named_parameters())))


class Sliced:
    """A student made of given tensors, as far as training and judging ask for one."""

    def __init__(self, shape: _HiddenStates, tensors: dict[str, Tensor]) -> None:
        self._shape, self.tensors = shape, tensors

    def hidden_states(self, tokens: Tensor, *, segments: Tensor | None = None) -> Tensor:
        """As `HybridModel.hidden_states`: (B, T, D)."""
        named = {f"model.{name}": tensor for name, tensor in self.tensors.items()}
        return functional_call(self._shape, named, (tokens, segments), strict=True)

    @property
    def head_weight(self) -> Tensor:
        """The output embedding (V, D)."""
        return self.tensors.get("head.weight", self.tensors["embedding.weight"])


class _HiddenStates(nn.Module):
    """Calls what `functional_call` cannot: a method other than `forward`."""

    def __init__(self, model: HybridModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, segments: Tensor | None) -> Any:
        return self.model.hidden_states(tokens, segments=segments)
