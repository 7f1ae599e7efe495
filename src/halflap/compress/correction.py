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

Nothing else need be changed where an eps is one norm's own. Where it serves several that lose different shares, and
in the stock classes all of them, inputs are scaled instead: RMSNorm of s x with eps equals RMSNorm of x with eps / s^2.
No weight scales what a gated group norm or the branch norms of a hybrid block read, so theirs is the eps to have. A
residual stream scaled by s (embedding, meta tokens and every output projection; where the embedding is the language
head too, the final gain by 1 / s) has it without changing a logit, and so have Mamba-1's norms of time step, B and C
with their rows of `x_proj` scaled. There B and C are scaled even where no eps is shared, since time steps lose nothing.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from halflap.errors import HalflapError
from halflap.models.config import BlockConfig, HybridConfig, Mamba1Config, Mamba2Config, ModelConfig
from halflap.models.layout import Layout, dim_size, layout, mixer_layout

NORM_CORRECTIONS: tuple[str, ...] = ("none", "masked", "calibrated")

Scales = Mapping[str, tuple[float, ...]]
"""Factors of a parameter by the teacher's name: one; or one for each span of its first dimension where that has
several, else one for each equal part of it."""

Dropped = Mapping[str, tuple[float, ...]]
"""What a norm loses: share of the energy by the teacher's name of its gain, one or one for each kept group; of a
LayerNorm also the mean t, by the name of its bias."""


# Norms whose mean is over one group; a group is an index of the first axis of their channels.
GATED = ("norm.weight", "ssm.norm.weight")


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
        ours, theirs = (mixer_layout(b, index, 1) for b in (teacher.blocks[index], block))
        for name in ours:
            if name.endswith("norm.weight"):
                kept, groups = _channels(theirs, name)
                yield CutNorm(f"blocks.{index}.mixer.{name}", _channels(ours, name)[0], kept, groups)
    yield residual("")


def _channels(mixer: Layout, name: str) -> tuple[int, int]:
    """Channels of one group of a mixer's norm, and how many groups it has."""
    dim = mixer[name][0]
    groups = dim[0][0].size if name in GATED else 1
    return dim_size(dim) // groups, groups


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
    student, stream = _share_eps(teacher, _masked_eps(teacher, shape, keep_blocks), keep_blocks)
    if "norm.weight" in stream:  # the final gain, which may be corrected already
        stream["norm.weight"] = (scales.get("norm.weight", (1.0,))[0] * stream["norm.weight"][0],)
    return student, scales | stream | _bottleneck_scales(teacher, student, keep_blocks)


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
    """Each eps times total / kept of the norms that it serves; of Mamba-1's own, whose inputs are scaled, as it is."""
    ratio = {norm.name: norm.total / norm.kept for norm in norms(teacher, shape, keep_blocks)}

    def raised(block: Any, norm: str) -> Any:
        return dataclasses.replace(block, norm_eps=block.norm_eps * ratio[norm])

    blocks = []
    for index, block in zip(keep_blocks, shape.blocks, strict=True):
        mixer = f"blocks.{index}.mixer."
        if isinstance(block, Mamba2Config):
            block = raised(block, f"{mixer}norm.weight")
        elif isinstance(block, HybridConfig):
            ssm = raised(block.ssm, f"{mixer}ssm.norm.weight") if isinstance(block.ssm, Mamba2Config) else block.ssm
            block = dataclasses.replace(raised(block, f"{mixer}attention_norm.weight"), ssm=ssm)
        blocks.append(block)
    return dataclasses.replace(shape, blocks=tuple(blocks), norm_eps=teacher.norm_eps * ratio["norm.weight"])


def _fixed_eps(config: ModelConfig) -> set[float]:
    """Of norms whose inputs no weight scales: gated group norms, and the branch norms of hybrid blocks."""
    hybrid = {block.norm_eps for block in config.blocks if isinstance(block, HybridConfig)}
    return hybrid | {block.ssm.norm_eps for block in config.blocks if isinstance(block.ssm, Mamba2Config)}


def _share_eps(
    teacher: ModelConfig, student: ModelConfig, keep_blocks: tuple[int, ...]
) -> tuple[ModelConfig, dict[str, tuple[float, ...]]]:
    """The student with one eps and the factors of its residual stream, where the teacher had one and it can have one.

    Mamba-1's norms get that eps too, and what they read is left to `_bottleneck_scales`.
    """
    fixed = _fixed_eps(student)
    one = _fixed_eps(teacher) | {b.ssm.norm_eps for b in teacher.blocks if isinstance(b.ssm, Mamba1Config)}
    if one != {teacher.norm_eps} or len(fixed) != 1 or (student.norm != "rms" and student.tie_word_embeddings):
        return student, {}
    eps = fixed.pop()
    shared = dataclasses.replace(student, norm_eps=eps, blocks=tuple(_with_eps(b, eps) for b in student.blocks))
    if eps == student.norm_eps:
        return shared, {}
    factor = math.sqrt(eps / student.norm_eps)
    prefixes = ("embedding.", "meta_tokens", *(f"blocks.{index}.mixer." for index in keep_blocks))
    scales = {name: (factor,) for name in _writers_of_the_residual_stream(teacher) if name.startswith(prefixes)}
    if student.tie_word_embeddings:
        scales["norm.weight"] = (1 / factor,)
    return shared, scales


def _with_eps(block: BlockConfig, eps: float) -> BlockConfig:
    """The block with this eps in a Mamba-1 of it."""
    if isinstance(block, Mamba1Config):
        return dataclasses.replace(block, norm_eps=eps)
    if isinstance(block, HybridConfig) and isinstance(block.ssm, Mamba1Config):
        return dataclasses.replace(block, ssm=dataclasses.replace(block.ssm, norm_eps=eps))
    return block


def _bottleneck_scales(
    teacher: ModelConfig, student: ModelConfig, keep_blocks: tuple[int, ...]
) -> dict[str, tuple[float, ...]]:
    """Factors of the rows of time step, B and C of each `x_proj`, whose norms have the eps of the student."""
    scales = {}
    for index, block in zip(keep_blocks, student.blocks, strict=True):
        own, ssm = teacher.blocks[index].ssm, block.ssm
        if not (isinstance(own, Mamba1Config) and isinstance(ssm, Mamba1Config) and ssm.inner_norms):
            continue
        raised = 1.0 if ssm.norm_eps == own.norm_eps else ssm.norm_eps / own.norm_eps
        states = math.sqrt(raised * ssm.state_size / own.state_size)
        if (factors := (math.sqrt(raised), states, states)) != (1.0, 1.0, 1.0):
            inside = "ssm.x_proj.weight" if isinstance(block, HybridConfig) else "x_proj.weight"
            scales[f"blocks.{index}.mixer.{inside}"] = factors
    return scales


def _writers_of_the_residual_stream(teacher: ModelConfig) -> Iterator[str]:
    """The embedding, the meta tokens, and the weights and biases of every mixer's output projection."""
    yield "embedding.weight"
    if teacher.num_meta_tokens:
        yield "meta_tokens"
    for name, dims in layout(teacher).items():
        if ".mixer." in name and [axis.name for span in dims[0] for axis in span] == ["hidden"]:
            yield name
