"""Settings of a fit, the recipe section `fit`: batch, learning rate, schedule, how often to save and judge.

Pure data: no torch. The learning rate is a function of tokens seen, never of steps, so a run keeps its schedule
when the batch changes. Defaults: AdamW (0.9, 0.95), decay 0.1, clip 1, warmup-stable-decay with a floor of 1 % of
the peak as in the Nemotron-H recipe; the decay shape 1 - sqrt(r) is Hägele et al. 2024's best.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from halflap.errors import HalflapError

Schedule = Literal["wsd", "cosine", "constant"]
DecayShape = Literal["linear", "cosine", "exponential", "minus_sqrt"]

# Measured on 2 cores with 10 M parameters: 2048 tokens make large matrix products, while with 8192 each activation is
# over 32 MiB, which the C allocator maps anew every time: 1.5 to 3 times slower and 2.4 times the memory.
MICRO_BATCH_TOKENS = 2048


@dataclass(frozen=True)
class Fit:
    """How a model is trained."""

    learning_rate: float = 1e-3
    """Peak learning rate."""

    min_learning_rate: float = 0.01
    """Learning rate at the end, as a fraction of the peak."""

    warmup: float = 0.02
    """Linear warm-up: below 1 a fraction of the run's tokens, from 1 on a number of tokens."""

    schedule: Schedule = "wsd"
    """After the warm-up: stay at the peak then decay (wsd), cosine to the end, or constant."""

    decay_fraction: float = 0.2
    """Share of the run's tokens in which wsd decays."""

    decay_shape: DecayShape = "minus_sqrt"
    """Form of the wsd decay."""

    batch_size: int = 32
    """Rows of one step on one rank."""

    micro_batch_size: int | None = None
    """Rows of one forward and backward pass; by default as many as make about 2048 tokens."""

    sequence_length: int = 512
    """Tokens of a row."""

    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's moment decay rates."""

    eps: float = 1e-8
    """AdamW's denominator floor."""

    weight_decay: float = 0.1
    """Decoupled weight decay of matrices; norms, biases, A_log, D and dt_bias have none."""

    clip: float = 1.0
    """Largest norm of the whole gradient; 0 switches clipping off."""

    save_every: int | None = None
    """Steps between saved training states; by default a twentieth of the run, 0 only at the end."""

    evaluate_every: int | None = None
    """Steps between held-out losses; by default a tenth of the run, 0 only at the end."""

    log_every: int = 1
    """Steps between logged rows; a row averages the steps since the last one."""

    compile: bool = False
    """Compile each block with torch.compile (needs a C++ compiler on a CPU)."""

    def __post_init__(self) -> None:
        for name in ("learning_rate", "eps"):
            _require(self, name, getattr(self, name) > 0, "greater than 0")
        for name in ("min_learning_rate", "decay_fraction"):
            _require(self, name, 0 <= getattr(self, name) <= 1, "between 0 and 1")
        for name in ("warmup", "weight_decay", "clip"):
            _require(self, name, getattr(self, name) >= 0, "at least 0")
        for name in ("batch_size", "sequence_length", "log_every"):
            _require(self, name, getattr(self, name) >= 1, "at least 1")
        for name, least in (("micro_batch_size", 1), ("save_every", 0), ("evaluate_every", 0)):
            value = getattr(self, name)
            _require(self, name, value is None or value >= least, f"at least {least}, or absent to have it derived")
        _require(self, "betas", all(0 <= beta < 1 for beta in self.betas), "two numbers from 0 to below 1")
        _require(self, "schedule", self.schedule in ("wsd", "cosine", "constant"), "wsd, cosine or constant")
        shapes = ("linear", "cosine", "exponential", "minus_sqrt")
        _require(self, "decay_shape", self.decay_shape in shapes, ", ".join(shapes))

    @property
    def micro_batch_rows(self) -> int:
        derived = max(1, MICRO_BATCH_TOKENS // self.sequence_length)
        return min(self.batch_size, self.micro_batch_size or derived)

    @property
    def tokens_per_step(self) -> int:
        """Positions of one step on one rank."""
        return self.batch_size * self.sequence_length

    def warmup_tokens(self, total: int) -> float:
        return self.warmup * total if self.warmup < 1 else self.warmup


def _require(settings: Fit, name: str, holds: bool, allowed: str) -> None:
    if not holds:
        raise HalflapError(f"fit.{name} is {getattr(settings, name)!r}; it must be {allowed}: correct --fit.{name}")
