"""Pruning where norms are LayerNorms (Nemotron-4), against a slow reference that masks activations (float64).

What carries nothing there is the mean of the kept channels, not zero: `compress/correction.py` says why. Each equality
has a control that the classic mistake breaks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from halflap.compress.compose import compose
from halflap.compress.masked import masked_teacher
from halflap.compress.metrics import collect
from halflap.compress.plan import PruningPlan
from halflap.compress.prune import apply_plan
from halflap.compress.ranking import dropped_energy
from halflap.data.batch import Batch
from halflap.errors import HalflapError
from halflap.models.config import AttentionConfig, MLPConfig, ModelConfig, RopeConfig
from halflap.models.model import HybridModel, initialize
from halflap.models.rope import inverse_frequencies, rotary_tables, rotate

EQUAL, DIFFERENT = 1e-10, 1e-1
TEACHER = "t" * 64
PAIR = AttentionConfig(8, 2, 8, rope=RopeConfig(fraction=0.5)), MLPConfig(10)
CONFIG = ModelConfig("nemotron", 29, 12, PAIR * 3, norm="layer1p")
HIDDEN = (0, 1, 3, 4, 6, 7, 8, 10, 11)
TOKENS = torch.randint(0, 29, (2, 11), generator=torch.Generator().manual_seed(1))


def make_model(config: ModelConfig = CONFIG, seed: int = 0) -> HybridModel:
    """Weights of order one everywhere, and a residual stream whose mean is not zero."""
    model = HybridModel(config).double().eval()
    initialize(model, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            if name.endswith("proj.weight"):
                parameter.copy_((noise + 0.3) / parameter.shape[1] ** 0.5)
            else:
                parameter.copy_(0.3 * noise if "norm" in name else noise + 0.5)
    return model


def cut(model: HybridModel, plan: PruningPlan) -> HybridModel:
    student = HybridModel(plan.student).double().eval()
    student.load_state_dict(dict(apply_plan(plan, model.state_dict().items())), strict=True)
    return student


def plan_of(correction: str = "masked", blocks: Any = None, config: ModelConfig = CONFIG, **keep: Any) -> PruningPlan:
    """keep: axis names with `__` for `.`."""
    tables = {name.replace("__", "."): table for name, table in keep.items()}
    return PruningPlan(TEACHER, config, blocks, tables, correction)


@torch.no_grad()
def distance(one: HybridModel | Tensor, other: HybridModel | Tensor) -> float:
    a, b = (model if isinstance(model, Tensor) else model(TOKENS) for model in (one, other))
    return float((a - b).abs().max())


@dataclass
class Masks:
    """What stays: hidden channels, neurons and query heads by block; `zero` puts cut channels to zero instead."""

    hidden: Tensor = field(default_factory=lambda: torch.ones(12, dtype=torch.bool))
    neurons: Mapping[int, Tensor] = field(default_factory=dict)
    queries: Mapping[int, Tensor] = field(default_factory=dict)
    skipped: tuple[int, ...] = ()
    kept_mean: bool = False
    zero: bool = False
    gain: float = 1.0
    shift: Mapping[str, float] = field(default_factory=dict)


def norm(x: Tensor, module: Any, masks: Masks, name: str) -> Tensor:
    keep = masks.hidden
    x = torch.where(keep, x, 0.0 if masks.zero else x[..., keep].mean(-1, keepdim=True))
    read = x[..., keep] if masks.kept_mean else x
    mean = read.mean(-1, keepdim=True)
    deviation = ((read - mean).square().mean(-1, keepdim=True) + module.eps).sqrt()
    gain = 1 + module.weight
    out = (x - mean) / deviation * gain * masks.gain + module.bias + gain * masks.shift.get(name, 0.0)
    return out * keep


@torch.no_grad()
def reference(model: HybridModel, masks: Masks) -> Tensor:
    h = model.embedding.weight[TOKENS]
    for index, block in enumerate(model.blocks):
        if index not in masks.skipped:
            u = norm(h, block.norm, masks, f"blocks.{index}.norm.bias")
            mixer: Any = block.mixer
            h = h + (attention(mixer, u, index, masks) if index % 2 == 0 else mlp(mixer, u, index, masks))
    return norm(h, model.norm, masks, "norm.bias") @ model.head_weight.T


def attention(mixer: Any, u: Tensor, index: int, masks: Masks) -> Tensor:
    c: AttentionConfig = mixer.config
    q, k, v = (
        (u @ proj.weight.T).unflatten(-1, (-1, c.head_dim)).transpose(1, 2)
        for proj in (mixer.q_proj, mixer.k_proj, mixer.v_proj)
    )
    positions = torch.arange(u.shape[1])[None]
    assert c.rope is not None
    tables = rotary_tables(positions, inverse_frequencies(c.rope, c.head_dim), u.dtype)
    q, k = rotate(q, *tables), rotate(k, *tables)
    k, v = (t.repeat_interleave(c.queries_per_key_value_head, 1) for t in (k, v))
    scores = q @ k.transpose(-1, -2) / c.head_dim**0.5
    scores = scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1).bool(), float("-inf"))
    y = (scores.softmax(-1) @ v) * masks.queries.get(index, torch.ones(c.num_attention_heads))[:, None, None]
    return y.transpose(1, 2).flatten(2) @ mixer.o_proj.weight.T


def mlp(mixer: Any, u: Tensor, index: int, masks: Masks) -> Tensor:
    return (F.relu(u @ mixer.up_proj.weight.T).square() * masks.neurons.get(index, 1)) @ mixer.down_proj.weight.T


def row_mask(size: int, kept: Any) -> Tensor:
    mask = torch.zeros(size, dtype=torch.bool)
    mask[list(kept)] = True
    return mask


@pytest.fixture(scope="module")
def model() -> HybridModel:
    return make_model()


def test_reference_is_the_model(model: HybridModel) -> None:
    assert distance(model, reference(model, Masks())) < EQUAL
    assert model(TOKENS).abs().max() > 1


@pytest.mark.parametrize("correction", ["none", "masked", "calibrated"])
def test_identity_is_bit_exact(model: HybridModel, correction: str) -> None:
    plan = plan_of(correction)
    assert plan.student == CONFIG
    for (name, before), (other, after) in zip(
        model.state_dict().items(), apply_plan(plan, model.state_dict().items()), strict=True
    ):
        assert name == other and torch.equal(before, after)


@pytest.mark.parametrize(
    "keep",
    [
        {"hidden": tuple(reversed(range(12)))},
        {"blocks__1__neuron": (9, 0, 8, 1, 7, 2, 6, 3, 5, 4)},
        {"blocks__2__query": ((3, 2, 1, 0), (1, 0, 2, 3))},
        {"blocks__2__kv": (1, 0)},
    ],
    ids=lambda keep: next(iter(keep)),
)
def test_reordering_leaves_logits_equal(model: HybridModel, keep: dict[str, Any]) -> None:
    assert distance(model, cut(model, plan_of(**keep))) < EQUAL


CUTS: dict[str, tuple[dict[str, Any], Masks]] = {
    "hidden": ({"hidden": HIDDEN}, Masks(row_mask(12, HIDDEN))),
    "neurons": ({"blocks__3__neuron": (1, 2, 7)}, Masks(neurons={3: row_mask(10, (1, 2, 7))})),
    "queries": ({"blocks__2__query": ((0, 3), (1, 2))}, Masks(queries={2: row_mask(8, (0, 3, 5, 6))})),
    "key/value heads": ({"blocks__2__kv": (1,)}, Masks(queries={2: row_mask(8, (4, 5, 6, 7))})),
    "layers": ({"blocks": (0, 1, 4, 5)}, Masks(skipped=(2, 3))),
    "everything": (
        {
            "hidden": HIDDEN,
            "blocks__0__kv": (1,),
            "blocks__4__query": ((0, 3), (1, 2)),
            "blocks__1__neuron": (1, 2, 7),
            "blocks": (0, 1, 4, 5),
        },
        Masks(
            row_mask(12, HIDDEN),
            neurons={1: row_mask(10, (1, 2, 7))},
            queries={0: row_mask(8, (4, 5, 6, 7)), 4: row_mask(8, (0, 3, 5, 6))},
            skipped=(2, 3),
        ),
    ),
}


@pytest.mark.parametrize("name", CUTS)
@pytest.mark.parametrize("correction", ["masked", "none"])
def test_cutting_equals_masking(model: HybridModel, name: str, correction: str) -> None:
    keep, masks = CUTS[name]
    masks = dataclasses.replace(masks, kept_mean=correction == "none")
    plan = plan_of(correction, **keep)
    expected = reference(model, masks)
    assert distance(cut(model, plan), expected) < EQUAL
    assert distance(masked_teacher(model, plan), expected) < EQUAL


@pytest.mark.parametrize("correction", ["masked", "none"])
@pytest.mark.parametrize("change", ["kept_mean", "zero"])
def test_another_mean_differs(model: HybridModel, correction: str, change: str) -> None:
    """Over the wrong channels; and zeros in the cut channels, which no LayerNorm over the kept ones can equal."""
    right = Masks(row_mask(12, HIDDEN), kept_mean=correction == "none")
    wrong = dataclasses.replace(right, **{change: not getattr(right, change)})
    if change == "zero":
        wrong = dataclasses.replace(wrong, kept_mean=False)
    assert distance(cut(model, plan_of(correction, hidden=HIDDEN)), reference(model, wrong)) > DIFFERENT


def test_eps_matters_for_the_exactness_of_the_masked_correction() -> None:
    config = dataclasses.replace(CONFIG, norm_eps=0.5)
    model, plan = make_model(config), plan_of(config=config, hidden=HIDDEN)
    assert plan.student.norm_eps == pytest.approx(0.5 * 12 / 9)
    student, expected = cut(model, plan), reference(model, Masks(row_mask(12, HIDDEN)))
    assert distance(student, expected) < EQUAL
    for module in (student.norm, *(block.norm for block in student.blocks)):
        module.eps = 0.5  # type: ignore[union-attr]
    assert distance(student, expected) > DIFFERENT / 2


@torch.no_grad()
def test_where_zero_lies_matters_neither_to_the_teacher_nor_to_its_student(model: HybridModel) -> None:
    """Something added to all channels by the embedding or a block; with zeros for cut channels it would matter."""
    moved = make_model()
    generator = torch.Generator().manual_seed(5)
    moved.embedding.weight += torch.randn(29, 1, generator=generator)
    for block in moved.blocks:
        output: Any = block.mixer.o_proj if isinstance(block.mixer.config, AttentionConfig) else block.mixer.down_proj
        output.weight += torch.randn(1, output.weight.shape[1], generator=generator)
    plan = plan_of(hidden=HIDDEN)
    assert distance(model, moved) < EQUAL
    assert distance(cut(model, plan), cut(moved, plan)) < EQUAL
    zeros = Masks(row_mask(12, HIDDEN), zero=True)
    assert distance(reference(model, zeros), reference(moved, zeros)) > DIFFERENT


@torch.no_grad()
def test_channels_at_the_mean_are_free_only_with_the_correction() -> None:
    model = make_model()
    gone = ~row_mask(12, HIDDEN)
    writers = [model.embedding.weight.T]
    writers += [getattr(b.mixer, "o_proj" if i % 2 == 0 else "down_proj").weight for i, b in enumerate(model.blocks)]
    for rows in writers:
        rows[gone] = rows[~gone].mean(0)
    for module in (model.norm, *(block.norm for block in model.blocks)):
        module.bias[gone] = 0  # type: ignore[index]
    assert distance(model, cut(model, plan_of("masked", hidden=HIDDEN))) < EQUAL
    assert distance(model, cut(model, plan_of("none", hidden=HIDDEN))) > DIFFERENT


# ---- calibrated


def calibrated(model: HybridModel, hidden: tuple[int, ...] = HIDDEN) -> PruningPlan:
    scores = collect(model, [Batch(TOKENS, TOKENS, torch.ones(TOKENS.shape))])
    keep = {"hidden": hidden}
    blocks = tuple(range(len(model.blocks)))
    dropped = dropped_energy(scores, model.config, blocks, keep)
    return PruningPlan(TEACHER, model.config, None, keep, "calibrated", dropped)


def test_calibrated_gain_and_bias_restore_deviation_and_mean(model: HybridModel) -> None:
    """On the calibration text the first norm of the student puts out what the teacher's does, on average."""
    plan = calibrated(model)
    student = cut(model, plan)
    assert plan.student.norm_eps == CONFIG.norm_eps
    kept = list(HIDDEN)
    with torch.no_grad():
        stream = model.embedding.weight[TOKENS]
        teacher_norm: Any = model.blocks[0].norm
        student_norm: Any = student.blocks[0].norm
        gain = 1 + teacher_norm.weight[kept]
        before = (teacher_norm(stream)[..., kept] - teacher_norm.bias[kept]) / gain
        after = (student_norm(stream[..., kept]) - teacher_norm.bias[kept]) / gain
    assert float(after.mean()) == pytest.approx(float(before.mean()), abs=1e-6)
    assert abs(float(before.mean())) > 0.01  # the bias had something to do
    share = plan.dropped["blocks.0.norm.weight"][0]
    assert plan.scales["blocks.0.norm.weight"][0] == pytest.approx((12 * (1 - share) / 9) ** 0.5)
    varied = (before - before.mean()).square().mean()
    assert float((after - after.mean()).square().mean()) == pytest.approx(float(varied), rel=1e-4)


def test_calibrated_students_equal_their_masked_teacher(model: HybridModel) -> None:
    plan = calibrated(model)
    assert distance(cut(model, plan), masked_teacher(model, plan)) < EQUAL
    assert PruningPlan.from_json(plan.to_json()) == plan


def test_a_calibrated_plan_needs_energy_and_mean() -> None:
    energy = dict.fromkeys(("norm.weight", *(f"blocks.{i}.norm.weight" for i in range(6))), (0.1,))
    with pytest.raises(
        HalflapError, match=r"measured mean of the channels that the LayerNorm of blocks\.0\.norm\.bias"
    ):
        PruningPlan(TEACHER, CONFIG, None, {"hidden": HIDDEN}, "calibrated", energy)


def test_a_bias_cannot_come_before_its_gain(model: HybridModel) -> None:
    state = dict(reversed(list(model.state_dict().items())))
    with pytest.raises(HalflapError, match=r"norm\.bias came before the gain"):
        dict(apply_plan(calibrated(model), state.items()))


@pytest.mark.parametrize("correction", ["none", "masked", "calibrated"])
def test_composed_plans_equal_plans_in_sequence(model: HybridModel, correction: str) -> None:
    first = calibrated(model) if correction == "calibrated" else plan_of(correction, hidden=HIDDEN)
    middle = cut(model, first)
    again = calibrated(middle, (0, 2, 3, 5, 6, 8)).dropped if correction == "calibrated" else {}
    second = PruningPlan(TEACHER, first.student, None, {"hidden": (0, 2, 3, 5, 6, 8)}, correction, again)
    assert distance(cut(middle, second), cut(model, compose(second, first))) < EQUAL
