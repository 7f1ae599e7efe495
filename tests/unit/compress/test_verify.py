"""Certificates: every axis of every family, stored dtypes, and what must not pass."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import pytest
import torch

from halflap.checkpoints.checkpoint import Checkpoint, load_model, save_model, write_checkpoint
from halflap.checkpoints.config import lineage_step, not_stock_because
from halflap.compress import candidates
from halflap.compress import verify as verify_module
from halflap.compress.axes import Sizes
from halflap.compress.importance import Importance
from halflap.compress.metrics import collect
from halflap.compress.plan import PruningPlan
from halflap.compress.prune import apply_plan
from halflap.compress.ranking import plan_by_block, plan_for
from halflap.compress.verify import verify
from halflap.data.batch import Batch
from halflap.errors import CheckFailed, HalflapError
from halflap.models.count import count_parameters
from halflap.models.model import HybridModel, initialize
from halflap.models.presets import preset

SIZES = {
    "nemotron-h-tiny": Sizes(64, 200, 8, 12, 10, 4, drop_blocks=(6,)),
    "llama-tiny": Sizes(hidden_size=64, intermediate_size=100, num_attention_heads=4, num_blocks=6),
    "nemotron-4-tiny": Sizes(64, 200, num_attention_heads=2, num_key_value_heads=1, num_blocks=6),
}
CONFIGS = {name: dataclasses.replace(preset(name), vocab_size=64) for name in SIZES}
TOKENS = torch.randint(0, 64, (2, 24), generator=torch.Generator().manual_seed(0))


def make_teacher(directory: Path, name: str, dtype: str = "float32") -> Checkpoint:
    model = HybridModel(CONFIGS[name])
    initialize(model, 0)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        for key, parameter in model.named_parameters():
            if key.endswith("proj.weight"):
                parameter.mul_(5)
            elif key.endswith(("norm.weight", "norm.bias")):
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return save_model(model, directory, dtype=dtype)


def make_student(teacher: Checkpoint, directory: Path, plan: PruningPlan) -> Checkpoint:
    return write_checkpoint(
        directory, plan.student, apply_plan(plan, teacher.tensors()), dtype=dict(student_types(teacher, plan))
    )


def student_types(teacher: Checkpoint, plan: PruningPlan) -> Any:
    for name, dtype in teacher.dtypes.items():
        if (student := plan.student_name(name)) is not None:
            yield student, dtype


def make_importance(teacher: Checkpoint) -> Importance:
    batch = Batch(TOKENS, TOKENS, torch.ones(TOKENS.shape))
    return collect(load_model(teacher.path), [batch], teacher=teacher.digest)


def make_plan(teacher: Checkpoint, name: str, correction: str = "masked", sizes: Sizes | None = None) -> PruningPlan:
    return plan_for(make_importance(teacher), teacher.digest, teacher.config, sizes or SIZES[name], correction)


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("correction", ["masked", "none", "calibrated"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_axis_of_every_family_passes(tmp_path: Path, name: str, correction: str, dtype: str) -> None:
    teacher = make_teacher(tmp_path / "teacher", name, dtype)
    plan = make_plan(teacher, name, correction)
    student = make_student(teacher, tmp_path / "student", plan)
    certificate = verify(student, teacher, plan, TOKENS)
    assert certificate["passed"], certificate
    given = {"num_blocks" if key == "drop_blocks" else key for key, value in vars(SIZES[name]).items() if value}
    assert {axis["axis"] for axis in certificate["axes"]} == given
    for axis in certificate["axes"]:
        assert axis["passed"] and 0 < axis["kept"] < axis["total"]
        assert axis["max_abs_error"] < 1e-9 * axis["logit_scale"]
    assert certificate["exact_max_abs_error"] < 1e-9 * certificate["logit_scale"]
    assert certificate["max_abs_error"] < (1e-4 if dtype == "float32" else 0.05) * certificate["logit_scale"]
    assert (certificate["teacher"], certificate["student"]) == (teacher.digest, student.digest)


@pytest.mark.parametrize("name", ["llama-tiny", "nemotron-4-tiny"])
@pytest.mark.parametrize("correction", ["masked", "none", "calibrated"])
def test_layers_that_lack_a_part_pass_and_open_again(tmp_path: Path, name: str, correction: str) -> None:
    """An MLP of one and the attention of another gone, the rest cut; the stock class opens what is left in pairs."""
    teacher = make_teacher(tmp_path / "teacher", name)
    sizes = dataclasses.replace(SIZES[name], num_blocks=None)
    for kept, pattern, stock in (((0, 2, 3, 5, 6), "**--*", False), ((0, 3, 4, 5), "*-*-", True)):
        plan = plan_by_block(
            *(make_importance(teacher), teacher.digest, teacher.config, dict.fromkeys(kept, sizes), correction),
            hidden_size=sizes.hidden_size,
        )
        student = make_student(teacher, tmp_path / pattern, plan)
        certificate = verify(student, teacher, plan, TOKENS)
        assert certificate["passed"] and plan.student.pattern() == pattern, certificate
        assert (not_stock_because(student.config) is None) == stock
        again, tensors = load_model(tmp_path / pattern), dict(student.tensors())
        model = HybridModel(plan.student).eval()
        model.load_state_dict(tensors)
        assert again.config == plan.student and torch.equal(again(TOKENS), model(TOKENS))


def test_kept_and_total_count_indices_of_all_blocks(tmp_path: Path) -> None:
    teacher = make_teacher(tmp_path / "teacher", "nemotron-h-tiny")
    plan = make_plan(teacher, "nemotron-h-tiny")
    rows = {
        axis["axis"]: axis
        for axis in verify(make_student(teacher, tmp_path / "s", plan), teacher, plan, TOKENS)["axes"]
    }
    mamba = sum(block.kind == "mamba2" for block in plan.student.blocks)
    assert (rows["mamba_num_heads"]["kept"], rows["mamba_num_heads"]["total"]) == (8 * mamba, 12 * mamba)
    assert (rows["hidden_size"]["kept"], rows["hidden_size"]["total"]) == (64, 96)
    assert (rows["num_blocks"]["kept"], rows["num_blocks"]["total"]) == (6, 7)


def test_a_trained_student_is_told_apart(tmp_path: Path) -> None:
    teacher = make_teacher(tmp_path / "teacher", "nemotron-h-tiny")
    plan = make_plan(teacher, "nemotron-h-tiny")
    tensors = dict(apply_plan(plan, teacher.tensors()))
    tensors["norm.weight"] = tensors["norm.weight"].clone()
    tensors["norm.weight"][3] += 1e-6
    student = write_checkpoint(tmp_path / "student", plan.student, tensors.items())
    with pytest.raises(HalflapError, match="trained or changed after pruning"):
        verify(student, teacher, plan, TOKENS)


def test_an_edited_plan_is_told_from_training(tmp_path: Path) -> None:
    """Its student has the same shape and other weights, so only the lineage tells the two apart."""
    teacher = make_teacher(tmp_path / "teacher", "nemotron-h-tiny")
    plan = make_plan(teacher, "nemotron-h-tiny", sizes=Sizes(hidden_size=64))
    lineage = [lineage_step("prune", {"teacher": teacher.digest, "plan": plan.digest}), lineage_step("distill", {})]
    tensors = apply_plan(plan, teacher.tensors())
    student = write_checkpoint(tmp_path / "student", plan.student, tensors, lineage=lineage)
    assert verify(student, teacher, plan, TOKENS)["passed"]
    other = next(index for index in range(96) if index not in plan.keep["hidden"])
    edited = dataclasses.replace(plan, keep={"hidden": tuple(sorted((*plan.keep["hidden"][1:], other)))})
    with pytest.raises(CheckFailed, match="the plan was edited since") as refused:
        verify(student, teacher, edited, TOKENS)
    assert refused.value.result["made_by"] == plan.digest


def test_strangers_are_refused(tmp_path: Path) -> None:
    teacher = make_teacher(tmp_path / "teacher", "nemotron-h-tiny")
    plan = make_plan(teacher, "nemotron-h-tiny")
    student = make_student(teacher, tmp_path / "student", plan)
    with pytest.raises(HalflapError, match="made for teacher"):
        verify(student, student, plan, TOKENS)
    other = make_plan(teacher, "nemotron-h-tiny", sizes=Sizes(hidden_size=80))
    with pytest.raises(HalflapError, match="its plan makes"):
        verify(student, teacher, other, TOKENS)


@pytest.mark.parametrize("factor", [1.0, 2.0])
def test_a_wrong_gain_does_not_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, factor: float) -> None:
    """With the application of plans broken everywhere, so that the tensors still agree, the logits do not."""
    teacher = make_teacher(tmp_path / "teacher", "nemotron-h-tiny")
    plan = make_plan(teacher, "nemotron-h-tiny")

    def broken(plan: PruningPlan, tensors: Any, *how: Any) -> Any:
        for name, tensor in apply_plan(plan, tensors, *how):
            yield name, tensor * factor if name == "blocks.0.mixer.norm.weight" else tensor

    for module in (verify_module, candidates):
        monkeypatch.setattr(module, "apply_plan", broken)
    student = write_checkpoint(tmp_path / "student", plan.student, broken(plan, teacher.tensors()))
    certificate = verify(student, teacher, plan, TOKENS)
    assert certificate["passed"] == (factor == 1.0)
    assert all(axis["passed"] == (factor == 1.0 or axis["axis"] == "num_blocks") for axis in certificate["axes"][:1])


def test_larger_models_are_compared_in_float32(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify_module, "WIDE_LIMIT", 0)
    teacher = make_teacher(tmp_path / "teacher", "llama-tiny")
    plan = make_plan(teacher, "llama-tiny")
    certificate = verify(make_student(teacher, tmp_path / "student", plan), teacher, plan, TOKENS)
    assert certificate["passed"] and certificate["arithmetic"] == "float32"


def test_a_student_reloads_with_the_same_logits(tmp_path: Path) -> None:
    """Property 16: saved and loaded is bitwise the same."""
    teacher = make_teacher(tmp_path / "teacher", "nemotron-h-tiny")
    plan = make_plan(teacher, "nemotron-h-tiny")
    model = HybridModel(plan.student).eval()
    model.load_state_dict(dict(apply_plan(plan, teacher.tensors())))
    make_student(teacher, tmp_path / "student", plan)
    loaded = load_model(tmp_path / "student")
    with torch.no_grad():
        assert torch.equal(model(TOKENS), loaded(TOKENS))
    assert count_parameters(plan.student) == sum(p.numel() for p in loaded.parameters())


def test_equal_cuts_open_in_the_stock_class(tmp_path: Path) -> None:
    """The masked correction leaves one eps, so the stock config can say it."""
    sizes = dataclasses.replace(SIZES["nemotron-h-tiny"], drop_blocks=())
    teacher = make_teacher(tmp_path / "teacher", "nemotron-h-tiny")
    plan = make_plan(teacher, "nemotron-h-tiny", sizes=sizes)
    student = make_student(teacher, tmp_path / "student", plan)
    assert student.config == plan.student
    from halflap.checkpoints.config import FAMILIES

    assert FAMILIES["nemotron_h"].cannot_write(plan.student) is None
    assert functools.reduce(lambda a, b: a and b, (s > 0 for f in plan.scales.values() for s in f))


def test_a_teacher_that_is_no_number_is_named(tmp_path: Path) -> None:
    """A cut takes NaN over bit for bit, so nobody changed the student."""
    teacher = make_teacher(tmp_path / "sound", "llama-tiny")
    broken = load_model(teacher.path)
    with torch.no_grad():
        broken.blocks[2].mixer.q_proj.weight[0, 0] = torch.nan
    teacher = save_model(broken, tmp_path / "broken")
    plan = PruningPlan(teacher.digest, teacher.config, keep_blocks=tuple(range(6)))
    student = make_student(teacher, tmp_path / "student", plan)
    with pytest.raises(HalflapError, match=r"no finite numbers \(as those of tensor blocks.2.mixer.q_proj.weight"):
        verify(student, teacher, plan, TOKENS)
