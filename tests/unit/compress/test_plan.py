"""Plans: what cannot be written down, what a file must agree with, what slicing refuses."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from halflap.checkpoints.config import FAMILIES
from halflap.compress.axes import DEPTH_UNITS, Sizes, check_sizes, depth_units
from halflap.compress.compose import compose
from halflap.compress.plan import PruningPlan
from halflap.compress.prune import apply_plan
from halflap.errors import HalflapError
from halflap.models.config import AttentionConfig, Mamba2Config, MLPConfig, ModelConfig
from halflap.models.layout import layout, shape
from halflap.models.presets import preset

CONFIG = ModelConfig(
    "nemotron_h",
    13,
    8,
    (Mamba2Config(8, 4, 2, 6), MLPConfig(12), AttentionConfig(8, 2, 4), MLPConfig(12)),
)


def plan(keep: Any = None, blocks: Any = None, config: ModelConfig = CONFIG, **more: Any) -> PruningPlan:
    return PruningPlan("teacher", config, blocks, keep or {}, **more)


@pytest.mark.parametrize(
    ("keep", "says"),
    [
        ({"blocks.0.head": ((0, 1), (0,))}, "equally long"),
        ({"blocks.0.head": (0, 1, 2, 3)}, "equally long"),
        ({"blocks.0.head": ((0, 1),)}, "one for each kept index of blocks.0.group"),
        ({"blocks.0.group": (0,), "blocks.0.head": ((0,), (1,))}, "must have 1 equally long"),
        ({"blocks.0.head": ((0, 4), (0, 1))}, "allowed are 0 to 3"),
        ({"hidden": (0, 0)}, "twice"),
        ({"hidden": ((0, 1),)}, "index (0, 1)"),
        ({"hidden": ()}, "not empty"),
        ({"hidden": (0, 8)}, "index 8"),
        ({"hidden": (0, True)}, "index True"),
        ({"blocks.2.head_dim": (0, 1)}, "never cut"),
        ({"vocab": (0, 1)}, "never cut"),
        ({"blocks.7.head": ((0,), (0,))}, "does not have"),
    ],
)
def test_illegal_indices_cannot_be_written_down(keep: Any, says: str) -> None:
    with pytest.raises(HalflapError) as error:
        plan(keep)
    assert says in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("blocks", [(), (1, 0), (0, 0), (0, 4), (-1,)])
def test_illegal_blocks_cannot_be_written_down(blocks: Any) -> None:
    with pytest.raises(HalflapError, match="different, ascending"):
        plan(blocks=blocks)


def test_an_axis_of_a_dropped_block_cannot_be_cut() -> None:
    with pytest.raises(HalflapError, match="a block that it drops"):
        plan({"blocks.0.channel": (0,)}, blocks=(1, 2))


@pytest.mark.parametrize("name", ["llama-tiny", "nemotron-4-tiny"])
def test_a_plan_takes_layers_apart_and_named_blocks_go_by_layers(name: str) -> None:
    config = preset(name)
    assert plan(blocks=(0, 1, 6, 7), config=config).student.pattern() == "*-*-"
    apart = plan(blocks=(0, 1, 2), config=config)
    assert apart.student.pattern() == "*-*" and PruningPlan.from_json(apart.to_json()) == apart
    with pytest.raises(HalflapError, match=r"drop_blocks splits blocks 0, 1, .* drop all of them or none"):
        check_sizes(config, Sizes(drop_blocks=(1,)))
    assert depth_units(config)[0] == (0, 1)
    assert depth_units(apart.student) == ((0,), (1,), (2,)), "of what no stock class opens any block may be named"
    check_sizes(apart.student, Sizes(drop_blocks=(1,), num_blocks=2))


def test_layers_of_hymba_go_whole() -> None:
    config = preset("hymba-tiny")
    with pytest.raises(HalflapError, match="a part of blocks 2, 3, which are one layer of a hymba model; keep all"):
        plan(blocks=(0, 1, 2), config=config)


def test_depth_units_are_those_of_the_families() -> None:
    assert {name: family.depth_unit for name, family in FAMILIES.items() if family.depth_unit > 1} == DEPTH_UNITS


def test_the_student_follows_from_the_indices() -> None:
    made = plan(
        {
            "hidden": (0, 1, 2, 5, 6),
            "blocks.0.head": ((0, 2), (1, 3)),
            "blocks.0.channel": (3, 1, 0),
            "blocks.0.state": ((0, 1), (4, 5)),
            "blocks.2.kv": (1,),
            "blocks.2.query": ((0, 3, 2),),
            "blocks.3.neuron": tuple(range(12)),
        },
        blocks=(0, 2, 3),
        norm_correction="none",
    )
    assert made.student.hidden_size == 5
    assert made.student.blocks == (Mamba2Config(4, 3, 2, 2), AttentionConfig(3, 1, 4), MLPConfig(12))
    assert "blocks.3.neuron" not in made.keep  # kept whole


def test_equal_cuts_are_equal_plans() -> None:
    whole = {"hidden": tuple(range(8)), "blocks.0.head": ((0, 1, 2, 3),) * 2}
    assert plan(whole).digest == plan().digest != plan({"hidden": tuple(range(7))}).digest


def test_a_plan_survives_its_file(tmp_path: Path) -> None:
    shares = dict.fromkeys([*(f"blocks.{i}.norm.weight" for i in range(4)), "norm.weight"], (0.25,))
    made = plan({"hidden": (1, 2, 3)}, norm_correction="calibrated", dropped=shares, importance="score")
    made.save(tmp_path / "plan.json")
    assert PruningPlan.load(tmp_path / "plan.json") == made
    assert made.scales["norm.weight"] == pytest.approx(((8 * 0.75 / 3) ** 0.5,))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda d: d["student"].update(hidden_size=4), "does not describe its student"),
        (lambda d: d["scales"].clear(), "does not describe its student"),
        (lambda d: d["keep"].update(hidden=[0, 1]), "does not describe its student"),
        (lambda d: d.pop("keep"), "incomplete or damaged"),
        (lambda d: d.update(format="other"), "not a pruning plan"),
        (lambda d: d.update(keep=[1]), "incomplete or damaged"),
    ],
)
def test_a_changed_file_is_refused(tmp_path: Path, change: Any, says: str) -> None:
    data = plan({"hidden": (1, 2, 3)}).to_json()
    change(data)
    (tmp_path / "plan.json").write_text(json.dumps(data))
    with pytest.raises(HalflapError) as error:
        PruningPlan.load(tmp_path / "plan.json")
    assert says in str(error.value)


@pytest.mark.parametrize("text", ["", "{", "[1]", "3"])
def test_what_is_no_plan_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(HalflapError, match=r"give a"):
        PruningPlan.load(tmp_path / "plan.json")
    with pytest.raises(HalflapError, match="does not exist"):
        PruningPlan.load(tmp_path / "absent.json")


def test_another_teacher_is_refused() -> None:
    config = plan().teacher_config
    plan().check_teacher("teacher", config)
    with pytest.raises(HalflapError, match="made for teacher"):
        plan().check_teacher("other", config)
    for other, says in (
        (dataclasses.replace(config, norm_eps=1e-3), "that norm_eps is 1e-05, and this checkpoint's is 0.001"),
        (dataclasses.replace(config, blocks=config.blocks[:-1]), f"the number of blocks is {len(config.blocks)}"),
    ):
        with pytest.raises(HalflapError, match=says):
            plan().check_teacher("teacher", other)


def test_calibrated_needs_measurements() -> None:
    with pytest.raises(HalflapError, match="needs the measured energy"):
        plan({"hidden": (1, 2)}, norm_correction="calibrated")
    with pytest.raises(HalflapError, match="allowed are none, masked, calibrated"):
        plan(norm_correction="some")


def test_a_plan_for_another_student_does_not_compose() -> None:
    with pytest.raises(HalflapError, match="first one's student"):
        compose(plan(), plan({"hidden": (0, 1)}))


def test_calibrated_shares_compose() -> None:
    """1 - f and 1 - g multiply; groups that go take their share along."""
    gain = "blocks.0.mixer.norm.weight"
    first = plan({"blocks.0.channel": (0, 1, 2)}, norm_correction="calibrated", dropped={gain: (0.5, 0.2)})
    second = PruningPlan(
        "student",
        first.student,
        None,
        {"blocks.0.group": (1,), "blocks.0.head": ((0, 1),)},
        "calibrated",
        {gain: (0.5,)},
    )
    both = compose(second, first)
    assert both.dropped[gain] == pytest.approx((1 - 0.8 * 0.5,))
    assert both.scales[gain] == pytest.approx((first.scales[gain][1] * second.scales[gain][0],))


# ---- slicing


def tensors(config: ModelConfig = CONFIG) -> dict[str, torch.Tensor]:
    return {name: torch.randn(shape(dims)) for name, dims in layout(config).items()}


def test_unexpected_and_missing_tensors_are_refused() -> None:
    made = plan({"hidden": (0, 1)})
    given = tensors()
    with pytest.raises(HalflapError, match="not a parameter"):
        list(apply_plan(made, [("blocks.0.mixer.gate.weight", torch.zeros(3))]))
    with pytest.raises(HalflapError, match="teacher has"):
        list(apply_plan(made, [("norm.weight", torch.zeros(9))]))
    with pytest.raises(HalflapError, match="ended before"):
        list(apply_plan(made, list(given.items())[:-1]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_results_are_contiguous_copies_in_their_own_dtype(dtype: torch.dtype) -> None:
    made = plan({"hidden": (0, 1, 2), "blocks.1.neuron": (4, 5, 6)}, blocks=(0, 1, 2))
    given = {name: tensor.to(dtype) for name, tensor in tensors().items()}
    for name, tensor in apply_plan(made, given.items()):
        assert tensor.dtype == dtype and tensor.is_contiguous()
        assert tensor.untyped_storage().nbytes() == tensor.nbytes, f"{name} holds on to the teacher's storage"


def test_factors_are_rounded_once() -> None:
    made = plan({"hidden": (0, 1, 2)})
    given = {name: tensor.bfloat16() for name, tensor in tensors().items()}
    expected = (given["norm.weight"][:3].double() * (8 / 3) ** 0.5).bfloat16()
    assert torch.equal(dict(apply_plan(made, given.items()))["norm.weight"], expected)


def test_selection_is_the_naive_one() -> None:
    made = plan({"blocks.0.head": ((3, 0), (1, 2)), "hidden": (5, 2)}, norm_correction="none")
    given = tensors()
    student = dict(apply_plan(made, given.items()))
    heads = [3, 0, 5, 6]
    inner = [4 * head + channel for head in heads for channel in range(4)]
    rows = [*inner, *(32 + i for i in inner), *range(64, 88), *(88 + head for head in heads)]
    assert torch.equal(
        student["blocks.0.mixer.in_proj.weight"], given["blocks.0.mixer.in_proj.weight"][rows][:, [5, 2]]
    )
    assert torch.equal(student["blocks.0.mixer.A_log"], given["blocks.0.mixer.A_log"][heads])
    conv = [*inner, *range(32, 56)]
    assert torch.equal(student["blocks.0.mixer.conv1d.weight"], given["blocks.0.mixer.conv1d.weight"][conv])
    assert torch.equal(
        student["blocks.0.mixer.out_proj.weight"], given["blocks.0.mixer.out_proj.weight"][[5, 2]][:, inner]
    )


# ---- sizes


@pytest.mark.parametrize(
    ("sizes", "says"),
    [
        (Sizes(mamba_num_heads=5), "choose 4"),
        (Sizes(num_attention_heads=3), "choose 4"),
        (Sizes(hidden_size=9), "the teacher has 8"),
        (Sizes(intermediate_size=0), "choose 1 to 12"),
        (Sizes(num_key_value_heads=1, num_attention_heads=8), "1 key/value heads leave 4"),
        (Sizes(num_key_value_heads=1), None),
        (Sizes(drop_blocks=(9,)), "blocks are 0 to 3"),
        (Sizes(drop_blocks=(0, 1, 2, 3)), "at least one must stay"),
        (Sizes(drop_blocks=(0,), num_blocks=2), "give one of the two"),
    ],
)
def test_impossible_sizes_say_what_is_possible(sizes: Sizes, says: str | None) -> None:
    if says is None:
        check_sizes(CONFIG, sizes)
        return
    with pytest.raises(HalflapError) as error:
        check_sizes(CONFIG, sizes)
    assert says in str(error.value)


def test_sizes_of_axes_a_family_lacks_are_refused() -> None:
    with pytest.raises(HalflapError, match="has no such axis"):
        check_sizes(preset("llama-tiny"), Sizes(mamba_num_heads=4))
    with pytest.raises(HalflapError, match="choose a multiple"):
        check_sizes(preset("llama-tiny"), Sizes(num_blocks=3))
