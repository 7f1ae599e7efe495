"""Seconds of a pass as a sum over blocks: what a block's time is made of, and the fit of that to measured times.

A block's seconds are non-negative multiples of its natural amounts (weights, keys and values, SSM states, elements of
activations, and one for being there at all), fitted for each kind of block by non-negative least squares on relative
errors. So costs add over blocks and grow with every size, which the search relies on. At one phase, context and batch a
weight's bytes and its operations are proportional, and one amount stands for both. Pure data: no torch.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from halflap.models.config import BlockConfig, HybridConfig, Mamba2Config, MLPConfig, ModelConfig
from halflap.models.count import Phase, tokens_seen
from halflap.models.layout import mixer_layout, shape

if TYPE_CHECKING:
    import numpy as np  # and scipy, loaded by the functions that fit: recipes read this module, and help comes at once

REST = "rest"
"""The label of what a pass costs beside its blocks."""
Amounts = dict[tuple[str, str], float]
"""Label of a kind of block (or REST) and name of the amount, to how much of it a pass has."""


@dataclass(frozen=True, order=True)
class Condition:
    """What a time is of: a step of `batch` sequences of `context` tokens (decode), or reading as many (prefill)."""

    phase: Phase
    context: int
    batch: int

    @property
    def tokens(self) -> int:
        """Tokens that a pass reads."""
        return self.batch if self.phase == "decode" else self.batch * self.context

    def __str__(self) -> str:
        return f"{self.phase} at context {self.context}, batch {self.batch}"


@dataclass(frozen=True)
class CostModel:
    """Seconds for one of each amount, by label and name; the errors are relative, of times that were left out.

    scale: measured over summed time of the whole model; it multiplies every prediction, so that the model's own is the
    measured one.
    """

    coefficients: Mapping[str, Mapping[str, float]]
    median_error: float
    worst_error: float
    scale: float = 1.0

    def seconds(self, config: ModelConfig, condition: Condition) -> float:
        """The predicted time of a pass; every kind of block of `config` must be known."""
        return sum(self.seconds_by_kind(config, condition).values())

    def seconds_by_kind(self, config: ModelConfig, condition: Condition) -> dict[str, float]:
        """The same by kind of block, and what is beside the blocks as REST."""
        found: dict[str, float] = {}
        for (label, name), amount in amounts(config, condition).items():
            found[label] = found.get(label, 0.0) + self.scale * self.coefficients[label][name] * amount
        return found


def kind_of(block: BlockConfig) -> str:
    """A label shared by the blocks that run alike, whatever their sizes: `mamba2`, `hybrid mamba1 windowed`."""
    words = [block.kind]
    if isinstance(block, HybridConfig):
        words.append(block.ssm.kind)
    if isinstance(block, MLPConfig) and block.gated:
        words.append("gated")
    if (attention := block.attention) is not None:
        words += ["windowed"] if attention.window is not None else []
        words += ["reader"] if attention.key_value_source is not None else []
    return " ".join(words)


def amounts(config: ModelConfig, condition: Condition) -> Amounts:
    """All that a pass has to do, block by block and beside the blocks; the head reads one token a sequence."""
    total: Amounts = {}
    for block, count in Counter(config.blocks).items():
        label = kind_of(block)
        for name, amount in _block_amounts(block, config, condition).items():
            total[label, name] = total.get((label, name), 0.0) + count * amount
    total[REST, "pass"] = 1
    total[REST, "hidden"] = condition.tokens * config.hidden_size
    total[REST, "head"] = condition.batch * config.hidden_size * config.vocab_size
    return total


def _block_amounts(block: BlockConfig, config: ModelConfig, condition: Condition) -> dict[str, float]:
    tokens, hidden = condition.tokens, config.hidden_size
    found = {
        "block": 1.0,
        "hidden": tokens * hidden,
        "weights": sum(math.prod(shape(dims)) for dims in mixer_layout(block, 0, hidden).values()),
    }
    if isinstance(block, MLPConfig):
        found["neurons"] = tokens * block.intermediate_size
    if (attention := block.attention) is not None:
        meta, channels = config.num_meta_tokens, attention.head_dim + attention.value_dim
        held = tokens_seen(attention, condition.context, "decode") + meta
        seen = tokens_seen(attention, condition.context, condition.phase) + meta
        found["keys_and_values"] = condition.batch * attention.num_key_value_heads * channels * held
        found["scores"] = tokens * attention.num_attention_heads * channels * seen
        found["queries"] = tokens * attention.num_attention_heads * channels
    if (ssm := block.ssm) is not None:
        found["channels"] = tokens * ssm.inner_size
        found["states"] = tokens * ssm.inner_size * ssm.state_size
        if isinstance(ssm, Mamba2Config):
            found["heads"] = tokens * ssm.num_heads
            found["groups"] = tokens * ssm.num_groups * ssm.state_size
    return found


def fit(measured: Sequence[tuple[Amounts, float]]) -> CostModel:
    """Coefficients for measured passes (amounts, seconds), and their error where each pass in turn is left out."""
    import numpy as np

    names = sorted({name for found, _ in measured for name in found})
    matrix = np.array([[found.get(name, 0.0) for name in names] for found, _ in measured], dtype=float)
    seconds = np.array([taken for _, taken in measured])
    solved = _solve(matrix, seconds)
    errors = []
    for left_out in range(len(measured)):
        others = np.arange(len(measured)) != left_out
        predicted = matrix[left_out] @ _solve(matrix[others], seconds[others])
        errors.append(abs(predicted / seconds[left_out] - 1))
    coefficients: dict[str, dict[str, float]] = {}
    for (label, name), value in zip(names, solved.tolist(), strict=True):
        coefficients.setdefault(label, {})[name] = value
    return CostModel(coefficients, float(np.median(errors)), float(max(errors)))


def _solve(matrix: np.ndarray, seconds: np.ndarray) -> np.ndarray:
    """The non-negative x for which matrix @ x is nearest to `seconds`, in the sum of squared relative errors."""
    import numpy as np
    from scipy.optimize import nnls

    relative = matrix / seconds[:, None]
    size = np.maximum(np.abs(relative).max(0), np.finfo(float).tiny)
    return nnls(relative / size, np.ones(len(seconds)), maxiter=100 * matrix.shape[1])[0] / size
