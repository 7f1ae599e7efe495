"""Gains, eps and biases of norms that lose channels. Pure data: no torch.

Let `total` channels shrink to `kept`, and let the dropped ones carry the share f of the energy (the sum of squares).

    none         the gain as it is: the mean is then over the kept channels (Minitron)
    masked       gain * sqrt(total / kept), eps * total / kept: equals the teacher whose dropped channels are zero, for
                 mean_total(x^2) + eps = kept / total * (mean_kept(x^2) + eps * total / kept)
    calibrated   gain * sqrt(total (1 - f) / kept), f measured: restores the teacher's normaliser on average

LayerNorms read x - mean(x), so one number added to all channels changes nothing: where a channel's zero lies cannot be
told from what the teacher does, and a channel carries nothing when it equals the mean of the others. `masked` therefore
equals the teacher whose dropped channels are at the mean m of the kept ones: then mean_total = m and var_total = kept /
total * var_kept, and gain and eps as above make the stock LayerNorm over the kept channels exactly it. Zeros instead
would give mean_total = r m and var_total = r var_kept + r (1 - r) m^2 with r = kept / total. That depends on m, which a
LayerNorm over the kept channels cannot see, so no gain, bias and eps, nor any other weights, make a student of it.
`calibrated` has the mean too: it adds gain * t to the bias, t the measured mean over the kept channels of the teacher's
(x - mean) / sqrt(var + eps), since the student subtracts the mean of the kept channels where the teacher subtracts
that of all; f then counts the energy of the kept channels around t.

Stock Nemotron-H classes have one eps for all norms, and `masked` changes that of the residual and the gated norms by
different factors. RMSNorm of s x with eps equals RMSNorm of x with eps / s^2, so a residual stream scaled by s (the
embedding and every output projection times s) gives the residual norms the gated norms' eps without changing a logit.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from halflap.errors import HalflapError
from halflap.models.config import Mamba2Config, ModelConfig
from halflap.models.layout import layout

NORM_CORRECTIONS: tuple[str, ...] = ("none", "masked", "calibrated")

Scales = Mapping[str, tuple[float, ...]]
"""Factors of a parameter by the teacher's name: one, or one for each equal part of its first dimension."""

Dropped = Mapping[str, tuple[float, ...]]
"""What a norm loses: share of the energy by the teacher's name of its gain, one or one for each kept group; of a
LayerNorm also the mean t, by the name of its bias."""


class CutNorm(NamedTuple):
    """A norm by the teacher's names of its gain and its bias, if any; channels are those of one group."""

    name: str
    total: int
    kept: int
    groups: int
    bias: str | None = None


def norms(teacher: ModelConfig, shape: ModelConfig, keep_blocks: tuple[int, ...]) -> Iterator[CutNorm]:
    """Every norm of the student; `shape` is the teacher's config with the student's widths."""
    biased = teacher.norm == "layer1p"

    def residual(prefix: str) -> CutNorm:
        bias = f"{prefix}norm.bias" if biased else None
        return CutNorm(f"{prefix}norm.weight", teacher.hidden_size, shape.hidden_size, 1, bias)

    for index, block in zip(keep_blocks, shape.blocks, strict=True):
        yield residual(f"blocks.{index}.")
        own = teacher.blocks[index]
        if isinstance(block, Mamba2Config) and isinstance(own, Mamba2Config):
            total, kept = (c.heads_per_group * c.head_dim for c in (own, block))
            yield CutNorm(f"blocks.{index}.mixer.norm.weight", total, kept, block.num_groups)
    yield residual("")


def correct_norms(
    teacher: ModelConfig, shape: ModelConfig, keep_blocks: tuple[int, ...], correction: str, dropped: Dropped | None
) -> tuple[ModelConfig, dict[str, tuple[float, ...]]]:
    """The student's config and the factors of its parameters. Raises HalflapError on an unknown correction or when
    `calibrated` lacks a measured share."""
    if correction not in NORM_CORRECTIONS:
        raise HalflapError(
            f"norm correction {correction!r} is not known; allowed are {', '.join(NORM_CORRECTIONS)}: "
            "correct --norm-correction"
        )
    cut = [norm for norm in norms(teacher, shape, keep_blocks) if norm.kept != norm.total]
    if correction == "none":
        return shape, {}
    if correction == "calibrated":
        return shape, {norm.name: _calibrated(norm, dropped or {}) for norm in cut}
    scales = {norm.name: (math.sqrt(norm.total / norm.kept),) for norm in cut}
    return _share_eps(teacher, _masked_eps(teacher, shape, keep_blocks), keep_blocks, scales)


def _calibrated(norm: CutNorm, dropped: Dropped) -> tuple[float, ...]:
    shares = dropped.get(norm.name)
    if shares is None or len(shares) != norm.groups or not all(0 <= share < 1 for share in shares):
        raise HalflapError(
            f"norm correction 'calibrated' needs the measured energy of the channels that {norm.name} loses, and found "
            f"{shares}; use importance that `score` measured with metric 'activation', or --norm-correction masked"
        )
    if norm.bias is not None and len(dropped.get(norm.bias, ())) != 1:
        raise HalflapError(
            f"norm correction 'calibrated' needs the measured mean of the channels that the LayerNorm of {norm.bias} "
            "keeps; use importance that `score` measured with metric 'activation', or --norm-correction masked"
        )
    return tuple(calibrated_gain(norm.total, norm.kept, share) for share in shares)


def calibrated_gain(total: int, kept: int, share: float) -> float:
    """Factor of the gain of a norm that loses this share of the energy."""
    return math.sqrt(total * (1 - share) / kept)


def _masked_eps(teacher: ModelConfig, shape: ModelConfig, keep_blocks: tuple[int, ...]) -> ModelConfig:
    ratio = {norm.name: norm.total / norm.kept for norm in norms(teacher, shape, keep_blocks)}
    blocks = tuple(
        dataclasses.replace(block, norm_eps=block.norm_eps * ratio[f"blocks.{index}.mixer.norm.weight"])
        if isinstance(block, Mamba2Config)
        else block
        for index, block in zip(keep_blocks, shape.blocks, strict=True)
    )
    return dataclasses.replace(shape, blocks=blocks, norm_eps=teacher.norm_eps * ratio["norm.weight"])


def _gated_eps(config: ModelConfig) -> set[float]:
    return {block.norm_eps for block in config.blocks if isinstance(block, Mamba2Config)}


def _share_eps(
    teacher: ModelConfig, student: ModelConfig, keep_blocks: tuple[int, ...], scales: dict[str, tuple[float, ...]]
) -> tuple[ModelConfig, dict[str, tuple[float, ...]]]:
    """Scale the residual stream when the teacher had one eps and the student could; see the module's docstring."""
    gated = _gated_eps(student)
    if _gated_eps(teacher) != {teacher.norm_eps} or len(gated) != 1 or gated == {student.norm_eps}:
        return student, scales
    if student.tie_word_embeddings:  # the scaled embedding would be the language head too
        return student, scales
    eps = gated.pop()
    factor = (math.sqrt(eps / student.norm_eps),)
    prefixes = ("embedding.", *(f"blocks.{index}.mixer." for index in keep_blocks))
    for name in _writers_of_the_residual_stream(teacher):
        if name.startswith(prefixes):
            scales[name] = factor
    return dataclasses.replace(student, norm_eps=eps), scales


def _writers_of_the_residual_stream(teacher: ModelConfig) -> Iterator[str]:
    """The embedding, and the weights and biases of every mixer's output projection."""
    yield "embedding.weight"
    for name, dims in layout(teacher).items():
        if ".mixer." in name and [axis.name for span in dims[0] for axis in span] == ["hidden"]:
            yield name
