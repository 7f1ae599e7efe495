"""What cannot be had, or means something else than it did, is said before anything is made of it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from halflap.commands import scoring, searching, sweep
from halflap.compress.axes import Sizes, check_sizes
from halflap.compress.costs import Budget, costs
from halflap.compress.grid import SearchSpace, choices_by_type
from halflap.compress.importance import Importance, by_contribution
from halflap.compress.metrics import random_of
from halflap.compress.plan import PLAN, PruningPlan, plan_file
from halflap.compress.ranking import plan_for
from halflap.compress.space import fitting
from halflap.errors import HalflapError
from halflap.models.presets import preset

TINY = preset("nemotron-h-tiny")


def plan(**sizes: Any) -> PruningPlan:
    return plan_for(random_of(TINY, 0), "a" * 64, TINY, Sizes(**sizes), "masked")


def test_budgets_that_fail_only_together_say_what_each_could_be() -> None:
    """Blocks that cost memory and blocks that cost parameters are others, and only so many may go."""
    teacher = preset("nemotron-h-56b")
    at: dict[str, Any] = {"context": 1_000_000, "weight_bits": 4, "cache_bits": 8}
    whole = costs(teacher, Budget(**at))
    limits = {"params": 0.44 * whole["params"], "memory": 0.45 * whole["memory"]}
    order = tuple(reversed(range(len(teacher.blocks))))
    space = SearchSpace(max_width_cut=0.25, max_depth_cut=0.5, num_attention_heads=(64,), num_key_value_heads=(8,))
    with pytest.raises(HalflapError, match="cannot be met together") as refused:
        fitting(teacher, Budget(**at, **limits), space, order, choices_by_type)
    assert str(refused.value).count("with the others kept, the smallest has") == 2
    for name, limit in limits.items():
        assert fitting(teacher, Budget(**at, **{name: limit}), space, order, choices_by_type).candidates


def test_query_heads_that_fewer_key_value_heads_do_not_leave() -> None:
    for heads in (4, 6):  # 6 are the teacher's
        with pytest.raises(HalflapError, match=f"num_attention_heads is {heads}, and 1 key/value heads leave 3"):
            check_sizes(TINY, Sizes(num_attention_heads=heads, num_key_value_heads=1))
    check_sizes(TINY, Sizes(num_attention_heads=3, num_key_value_heads=1))
    check_sizes(TINY, Sizes(num_key_value_heads=1))


def test_a_search_keeps_the_query_heads_that_are_asked_for() -> None:
    """Under a budget that only fewer key/value heads can meet, which leave fewer query heads."""
    teacher: Any = SimpleNamespace(config=TINY)
    budget, space = Budget(memory=8e5, context=4096), SearchSpace(max_width_cut=0.5, max_depth_cut=0)
    found = searching.candidates(teacher, random_of(TINY, 0), budget, Sizes(), space).candidates
    assert all(candidate.sizes.num_key_value_heads == 1 for candidate in found)
    with pytest.raises(HalflapError, match="cannot be met"):
        searching.candidates(teacher, random_of(TINY, 0), budget, Sizes(num_attention_heads=6), space)


def test_plans_that_were_edited_by_hand() -> None:
    data = json.loads(json.dumps(plan(hidden_size=64).to_json()))
    for change, complaint in (
        ({"changes": {"3": {"pool": 0}}}, "cannot have 0 key/value heads averaged"),
        ({"changes": {"a": {}}}, "incomplete or damaged"),
        ({"teacher": None}, "incomplete or damaged"),
    ):
        with pytest.raises(HalflapError, match=complaint):
            PruningPlan.from_json(data | change)


def test_a_directory_stands_for_the_plan_in_it(tmp_path: Path) -> None:
    made = plan(hidden_size=64)
    (tmp_path / "pruned").mkdir()
    made.save(tmp_path / "pruned" / PLAN)
    assert PruningPlan.load(tmp_path) == made and plan_file(tmp_path) == tmp_path / "pruned" / PLAN
    with pytest.raises(HalflapError, match="does not exist"):
        PruningPlan.load(tmp_path / "elsewhere")


def test_a_search_without_the_blocks_that_it_trained(tmp_path: Path) -> None:
    file = tmp_path / "search.json"
    for tokens in (0, 256):
        file.write_text(json.dumps({"made_from": {"settings": {"block_tokens": tokens}}}))
        if tokens:
            with pytest.raises(HalflapError, match="trained are not beside it, in blocks/"):
                sweep.blocks_beside(file)
        else:
            assert sweep.blocks_beside(file) is None
    (tmp_path / "blocks").mkdir()
    assert sweep.blocks_beside(file) == tmp_path


def test_text_that_was_shorter_than_asked_for() -> None:
    class Rows:
        rows, sequence_length = (3,), 100

    for read, asked, said in ((300, 300, False), (250, 300, True), (250, 200, False), (190, 200, False)):
        found = dataclasses.replace(random_of(TINY, 0), tokens=read)
        assert bool(scoring.shortage(found, Rows(), asked)) is said  # type: ignore[arg-type]


def test_neurons_count_by_what_they_add_to_the_stream() -> None:
    scores = {"hidden": torch.ones(1, 4), "blocks.0.neuron": torch.tensor([1.0, 2.0, 3.0])}
    weight = torch.tensor([[3.0, 0.0, 1.0], [4.0, 1.0, 0.0]])
    found = by_contribution(Importance("activation", scores), {"blocks.0.mixer.down_proj.weight": weight}.__getitem__)
    assert found.widths["blocks.0.neuron"].tolist() == [5.0, 2.0, 3.0] and found.widths["hidden"] is scores["hidden"]
    untouched = by_contribution(Importance("weight_norm", scores), {}.__getitem__)
    assert untouched.widths["blocks.0.neuron"].tolist() == [1.0, 2.0, 3.0]
