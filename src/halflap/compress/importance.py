"""Importance: a non-negative score for every index of every axis of one teacher; higher is kept.

Scores by name: `hidden` (L, D), a row a block's norm; `blocks.i.neuron` (F,); `blocks.i.query` (K, H/K);
`blocks.i.inner`, what goes into out_proj, heads and channels together: (G, H/G, P) of Mamba-2, (I,) of Mamba-1,
(K, H/K, P) of hybrid heads; `blocks.i.state` (G, N) or, of Mamba-1, (N,). `depth` holds scores (L,) of whole blocks by
metric. `energy` holds mean squares of what a norm divides by its root mean square, by the name of its gain, in the grid
of its channels: (D,) or (G, H/G, P), say. `mean` holds means of the same, of LayerNorms, by the name of their bias:
(D,). On disk: safetensors with a JSON header. A file is one ranking; what a pass measured beside it has its own file.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from halflap.compress.kinds import block_counts
from halflap.errors import HalflapError
from halflap.files import atomic_write
from halflap.models.config import (
    AttentionConfig,
    HybridConfig,
    LinearConfig,
    Mamba1Config,
    Mamba2Config,
    MLPConfig,
    ModelConfig,
)

FORMAT = "halflap-importance-2"
HEADER = ("metric", "teacher", "calibration", "tokens", "scoring", "depth_metric", "removed")
OLDER = ("halflap-importance-1",)  # lacks scoring, depth_metric and removed, which may be empty


@dataclass(frozen=True)
class Scoring:
    """Which activations are scored and how they are summed, where the papers leave or study a choice.

    neuron    "post" the activation function (what multiplies W_down), or "pre" it
    mamba     "x" of the input projection (best in Taghibakhshi et al. 2025), "z" of it, "o", the input X of out_proj,
              or "flap", ||W_j|| std(X_j) with W_j column j of out_proj and the deviation over all tokens (An et al.
              2024): its squares, which add up to the score of a head, are FLAP's
    hybrid    "o", the mean of both branches, "flap" of the same, or "x" or "z" of the SSM beside the attention
    sequence  over the T tokens of a row, m = "mean" of |a|, "l2" sqrt(sum a^2), or "signed_mean" of a
    batch     over rows: "l2" sqrt(sum m^2), or "mean" |mean m|

    Minitron compares the aggregations and finds (mean, l2) best (Muralidharan et al. 2024).
    """

    neuron: str = "post"
    mamba: str = "x"
    hybrid: str = "o"
    sequence: str = "mean"
    batch: str = "l2"


DEFAULT_SCORING = Scoring()


@dataclass(frozen=True, eq=False)
class Importance:
    """Scores by name, and what they were measured on: digests of teacher and calibration text, tokens read.

    scoring       the `Scoring` of activations and gradients, by field
    depth_metric  which of `depth` ranks blocks; the first of `ranking.DEPTH_ORDER` when empty
    removed       blocks that iterative removal took, in that order; they go before all others
    """

    metric: str
    widths: Mapping[str, Tensor]
    depth: Mapping[str, Tensor] = field(default_factory=dict)
    energy: Mapping[str, Tensor] = field(default_factory=dict)
    mean: Mapping[str, Tensor] = field(default_factory=dict)
    teacher: str = ""
    calibration: str = ""
    tokens: int = 0
    scoring: Mapping[str, str] = field(default_factory=dict)
    depth_metric: str = ""
    removed: tuple[int, ...] = ()

    def to_bytes(self) -> bytes:
        parts = {"width": self.widths, "depth": self.depth, "energy": self.energy, "mean": self.mean}
        tensors = {f"{part}/{name}": t.contiguous() for part, named in parts.items() for name, t in named.items()}
        header = {name: getattr(self, name) for name in HEADER}
        return safetensors.torch.save(tensors, {"halflap": json.dumps({"format": FORMAT, **header})})

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.to_bytes()).hexdigest()

    def save(self, path: str | Path) -> None:
        with atomic_write(path) as file:
            file.write(self.to_bytes())

    @staticmethod
    def load(path: str | Path) -> Importance:
        try:
            with safetensors.safe_open(str(path), "pt") as file:
                header = json.loads((file.metadata() or {}).get("halflap", "{}"))
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except FileNotFoundError:
            raise HalflapError(f"importance {str(path)!r} does not exist; make it with `halflap score`") from None
        except (safetensors.SafetensorError, ValueError, OSError) as error:
            raise HalflapError(
                f"importance {str(path)!r} is damaged ({error}); make it again with `halflap score`"
            ) from error
        if header.pop("format", None) not in (FORMAT, *OLDER) or not header.keys() <= set(HEADER):
            raise HalflapError(f"{str(path)!r} is not an importance file of this version; score the teacher again")
        parts: dict[str, dict[str, Tensor]] = {"width": {}, "depth": {}, "energy": {}, "mean": {}}
        for name, tensor in tensors.items():
            part, _, key = name.partition("/")
            parts.setdefault(part, {})[key] = tensor
        header["removed"] = tuple(header.get("removed", ()))
        return Importance(widths=parts.pop("width"), **parts, **header)

    def check_teacher(self, digest: str) -> None:
        """Raise HalflapError unless the scores were measured on this teacher."""
        if digest != self.teacher:
            raise HalflapError(
                f"the importance was measured on checkpoint {self.teacher[:12]} and this one is {digest[:12]}; "
                "score this checkpoint first"
            )


def score_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all width scores."""
    shapes: dict[str, tuple[int, ...]] = {"hidden": (len(config.blocks), config.hidden_size)}
    for index, block in enumerate(config.blocks):
        count = block_counts(block)
        for score, axes in SCORES[type(block)].items():
            shapes[f"blocks.{index}.{score}"] = tuple(count[axis] for axis in axes)
        if isinstance(block.ssm, Mamba2Config):  # every group has states of its own
            shapes[f"blocks.{index}.state"] = (block.ssm.num_groups, block.ssm.state_size)
    return shapes


# Scores of a block, and the axes they are on.
SCORES: dict[type, dict[str, tuple[str, ...]]] = {
    MLPConfig: {"neuron": ("neuron",)},
    LinearConfig: {},
    AttentionConfig: {"query": ("kv", "query")},
    Mamba1Config: {"inner": ("inner",), "state": ("state",)},
    Mamba2Config: {"inner": ("group", "head", "channel"), "state": ("group", "state")},
    HybridConfig: {"inner": ("kv", "query", "value_channel"), "state": ("state",)},
}


def by_contribution(importance: Importance, read: Callable[[str], Tensor]) -> Importance:
    """With each neuron's activation times the norm of its column of down_proj: the size of what it adds to the stream.

    `read` gives a parameter of the teacher by name. Scores that are no activations stay as they are.
    """
    widths = dict(importance.widths)
    for name, scores in importance.widths.items():
        if importance.metric == "activation" and name.endswith(".neuron"):
            weight = read(name.replace(".neuron", ".mixer.down_proj.weight"))
            norms = torch.linalg.vector_norm(weight.float(), dim=0)
            widths[name] = scores * norms.to(scores.device, scores.dtype)
    return dataclasses.replace(importance, widths=widths)
