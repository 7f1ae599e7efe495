"""Cost tables: the fit recovers times that are sums, grows with every size, and is refused where it does not belong."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from halflap.compress.axes import Sizes, kept_after, resize
from halflap.compress.cost_model import Condition, amounts, fit, kind_of
from halflap.compress.cost_table import CostTable, Stack
from halflap.compress.costs import Budget, costs
from halflap.compress.grid import SearchSpace, choices, widening
from halflap.compress.kinds import block_sizes
from halflap.compress.library import library_of
from halflap.compress.programme import Programme, student_of
from halflap.compress.space import fitting
from halflap.errors import HalflapError
from halflap.evaluate.block_times import measure, stacks
from halflap.models.config import AttentionConfig, Mamba1Config, MLPConfig, ModelConfig
from halflap.models.count import cache_bytes, count_parameters
from halflap.models.presets import hymba, preset
from halflap.models.sharing import with_source

TINY = preset("nemotron-h-tiny")
SHARING = hymba(
    5, hidden=64, mlp=96, heads=(4, 2), state=8, window=16, meta=4, vocab=512, context=128, original_context=64
)
MAMBA1 = dataclasses.replace(TINY, blocks=(Mamba1Config(64, 8, 4), TINY.blocks[1]) * 2)
MLPS = dataclasses.replace(TINY, blocks=TINY.blocks[1:2] * 3)
MODELS = {"nemotron-h": TINY, "hymba": SHARING, "mamba1": MAMBA1}
DECODE, PREFILL = Condition("decode", 64, 2), Condition("prefill", 64, 2)
MACHINE = {"device": "cpu", "name": "a processor", "threads": 2, "dtype": "float32", "kernels": "native", "torch": "2"}
CACHE = 1 << 30


def true_seconds(config: ModelConfig, condition: Condition) -> float:
    """A device on which every amount has its price, that of the same name is the same in all kinds of block."""
    return sum((1 + len(name)) * 1e-9 * amount for (_, name), amount in amounts(config, condition).items())


def table_of(model: ModelConfig, *conditions: Condition, seconds: Any = true_seconds) -> CostTable:
    rows = {c: {s: (seconds(s.config(model), c),) for s in stacks(model, c, 4, CACHE)} for c in conditions}
    return CostTable(MACHINE, model, rows).fitted()


@pytest.fixture(scope="module")
def tables() -> dict[str, CostTable]:
    return {name: table_of(model, DECODE, PREFILL) for name, model in MODELS.items()}


def students(model: ModelConfig, count: int = 20) -> list[ModelConfig]:
    """Random ones down to half of every size."""
    draw = random.Random(0)
    space = SearchSpace(max_width_cut=0.5, max_depth_cut=0.5)
    found = []
    for _ in range(count):
        drawn = {name: draw.choice(values) for name, values in choices(model, space, with_depth=True).items()}
        sizes: dict[str, Any] = drawn
        order = tuple(range(len(model.blocks) - 1, -1, -1))
        found.append(resize(model, kept_after(model, Sizes(**sizes), order), Sizes(**sizes)))
    return found


# ---- the fit


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("condition", [DECODE, PREFILL], ids=str)
def test_times_that_are_sums_are_predicted_exactly(
    name: str, condition: Condition, tables: dict[str, CostTable]
) -> None:
    table = tables[name]
    assert table.models[condition].scale == pytest.approx(1, abs=1e-6)
    assert table.models[condition].median_error < 1e-6
    for student in students(MODELS[name]):
        assert table.seconds(student, condition) == pytest.approx(true_seconds(student, condition), rel=1e-5)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("condition", [DECODE, PREFILL], ids=str)
def test_unequal_students_of_method_puzzle_are_too(
    name: str, condition: Condition, tables: dict[str, CostTable]
) -> None:
    """Blocks windowed, linear, averaged, cut to a tenth or gone, in every place where the rules allow it."""
    model, table, draw = MODELS[name], tables[name], np.random.default_rng(0)
    library = library_of(model, length=condition.context)
    programme, sizes = Programme(library, Budget(params=1e15)), library.covers.sum(0)
    for _ in range(10):
        (choice,) = programme.choices(draw.uniform(-1, 0, len(sizes)) * sizes)
        student = student_of(model, library.variants(choice.options))
        assert table.unknown(condition, (with_source(block, 0) for block in student.blocks)) == []
        assert table.seconds(student, condition) == pytest.approx(true_seconds(student, condition), rel=1e-5)


def test_the_models_own_time_is_the_measured_one_by_kind_too() -> None:
    """A model that is slower than the sum of its stacks: its students are, too."""

    def seconds(config: ModelConfig, condition: Condition) -> float:
        return true_seconds(config, condition) * (1.25 if config == TINY else 1)

    table = table_of(TINY, DECODE, seconds=seconds)
    assert table.seconds(TINY, DECODE) == pytest.approx(seconds(TINY, DECODE))
    assert table.models[DECODE].scale == pytest.approx(1.25)
    assert sum(table.models[DECODE].seconds_by_kind(TINY, DECODE).values()) == pytest.approx(seconds(TINY, DECODE))
    assert set(table.models[DECODE].seconds_by_kind(TINY, DECODE)) == {"mamba2", "mlp", "attention", "rest"}


def test_a_device_with_two_regimes_is_predicted_between_the_measured_sizes() -> None:
    """Each block takes the longer of a fixed start and of reading its weights, as on a device with launches."""

    def seconds(config: ModelConfig, condition: Condition) -> float:
        alone = [dataclasses.replace(config, blocks=(block,)) for block in config.blocks]
        small = [max(2e-5, 1e-9 * count_parameters(one)) for one in alone]
        return sum(small) + true_seconds(config, condition)

    table = table_of(TINY, DECODE, seconds=seconds)
    off = [table.seconds(s, DECODE) / seconds(s, DECODE) - 1 for s in students(TINY)]
    assert max(map(abs, off)) < 0.1


def test_errors_are_of_times_that_were_left_out() -> None:
    conditions = [dataclasses.replace(TINY, hidden_size=hidden) for hidden in range(40, 100, 4)]
    found = [(amounts(config, DECODE), true_seconds(config, DECODE)) for config in conditions]
    exact, wrong = fit(found), fit([*found[:-1], (found[-1][0], 2 * found[-1][1])])
    assert exact.worst_error < 1e-6
    assert wrong.worst_error == pytest.approx(0.5, abs=0.02) and wrong.median_error < wrong.worst_error


@settings(max_examples=40)
@given(data=st.data())
def test_more_of_anything_never_takes_less(data: st.DataObject, tables: dict[str, CostTable]) -> None:
    name = data.draw(st.sampled_from(sorted(MODELS)))
    condition = data.draw(st.sampled_from([DECODE, PREFILL]))
    model, grid = MODELS[name], choices(MODELS[name], SearchSpace(max_width_cut=0.9), with_depth=False)
    small, large = ({}, {})
    for axis, values in grid.items():
        pair = sorted(data.draw(st.tuples(st.sampled_from(values), st.sampled_from(values))))
        small[axis], large[axis] = pair
    kept = tuple(range(len(model.blocks)))
    less, more = (tables[name].seconds(resize(model, kept, Sizes(**sizes)), condition) for sizes in (small, large))
    assert 0 < less <= more * (1 + 1e-9)


# ---- what is timed


@pytest.mark.parametrize("name", MODELS)
def test_stacks_read_as_much_as_the_model_or_several_times_the_cache(name: str) -> None:
    model = MODELS[name]
    for cache in (CACHE, 10_000):
        found = stacks(model, DECODE, 4, cache)
        whole = 4 * count_parameters(model) + cache_bytes(model, 64, 2, 32, conv_bits=32)
        assert found[-1].config(model) == model and len(set(found)) == len(found)
        kinds = set(map(kind_of, model.blocks))
        may_be = {"linear"} if kinds & {"attention", "mlp", "mlp gated"} else set()
        may_be |= {f"{kind} windowed" for kind in kinds & {"attention", "hybrid mamba1"}}
        assert {kind_of(s.block) for s in found if s.block is not None} == kinds | may_be
        for stack in found[:-1]:
            config = stack.config(model)
            reads = 4 * count_parameters(config) + cache_bytes(config, 64, 2, 32, conv_bits=32)
            assert reads >= 0.9 * min(whole, 4 * cache) or stack.copies in (2, 64)
            assert len(config.blocks) == stack.copies + (config.blocks[0] != stack.block)


def test_what_a_search_chooses_lies_within_what_is_measured() -> None:
    """Of every size the smallest that puzzle makes, and windows from half of the context down."""
    model = preset("nemotron-h-8m")
    timed = [s.block for s in stacks(model, DECODE, 4, CACHE) if s.block is not None]
    for kind in {type(block) for block in model.blocks}:
        own = [block_sizes(block) for block in timed if isinstance(block, kind)]
        made = [
            o.variant.of(model.blocks[o.blocks[0]])
            for o in library_of(model).options
            if isinstance(model.blocks[o.blocks[0]], kind) and not o.variant.dropped and not o.variant.change.linear
        ]
        for size in own[0]:
            assert min(sizes[size] for sizes in own) <= min(block_sizes(block)[size] for block in made)
    windows = {block.window for block in timed if isinstance(block, AttentionConfig)} - {None}
    assert max(windows) == 32 and min(windows) == 1  # type: ignore[type-var]


def test_each_size_is_varied_alone() -> None:
    blocks = [(s.hidden_size, s.block) for s in stacks(MLPS, DECODE, 4, CACHE)]
    found = {(hidden, block.intermediate_size) for hidden, block in blocks if isinstance(block, MLPConfig)}
    whole = MLPS.hidden_size, MLPS.blocks[0].intermediate_size  # type: ignore[union-attr]
    half = whole[0] // 2, whole[1] // 2
    assert found >= {whole, half, (whole[0], half[1]), (half[0], whole[1])}


def test_an_interrupted_measurement_goes_on_and_ends_the_same(tmp_path: Path) -> None:
    calls: list[ModelConfig] = []

    def seconds(config: ModelConfig, condition: Condition) -> float:
        calls.append(config)
        if len(calls) == 13:
            raise KeyboardInterrupt
        return true_seconds(config, condition)

    def run(name: str, machine: dict[str, Any] = MACHINE) -> CostTable:
        return measure(MLPS, [DECODE], machine, seconds, tmp_path / name, width=4, cache=CACHE, rounds=2)

    with pytest.raises(KeyboardInterrupt):
        run("costs.json")
    with pytest.raises(HalflapError, match="is not finished; run the same"):
        CostTable.load(tmp_path / "costs.json").check("costs.json", MACHINE, DECODE, MLPS)
    table = run("costs.json")
    total = len(calls) - 1
    assert total == 2 * len(table.rows[DECODE])
    calls.clear()
    calls.extend([TINY] * 100)  # past the interruption
    assert run("whole.json").to_json() == table.to_json() and len(calls) - 100 == total
    assert run("costs.json") == table and len(calls) - 100 == total, "a finished one is not measured again"
    assert run("costs.json", MACHINE | {"threads": 1}).machine["threads"] == 1 and len(calls) - 100 == 2 * total


# ---- the file


def test_a_table_is_read_back(tables: dict[str, CostTable], tmp_path: Path) -> None:
    for table in tables.values():
        table.save(tmp_path / "costs.json")
        again = CostTable.load(tmp_path / "costs.json")
        assert again == table and again.digest == table.digest
    assert Stack.from_json(json.loads(json.dumps(Stack(8, 9, None, 1).to_json()))) == Stack(8, 9, None, 1)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"machine": MACHINE | {"name": "another"}}, "was measured with processor a processor, and here it is another"),
        ({"machine": MACHINE | {"device": "cuda"}}, "was measured with device cpu, and here it is cuda"),
        ({"machine": MACHINE | {"threads": 1}}, "was measured with number of threads 2, and here it is 1"),
        ({"machine": MACHINE | {"dtype": "bfloat16"}}, "was measured with dtype float32, and here it is bfloat16"),
        ({"machine": MACHINE | {"kernels": "plain"}}, "was measured with kernels native, and here it is plain"),
        ({"condition": Condition("decode", 65, 2)}, "covers decode at context 64, batch 2; prefill"),
        ({"condition": Condition("decode", 64, 1)}, "--prompt 64 --batch 1"),
        ({"config": MAMBA1}, "has no times of mamba1 blocks"),
        ({"config": dataclasses.replace(TINY, hidden_size=104)}, "of hidden_size 96, and this one has 104"),
    ],
)
def test_a_table_of_something_else_is_refused(changes: dict[str, Any], says: str, tables: dict[str, CostTable]) -> None:
    asked: dict[str, Any] = {"machine": MACHINE, "condition": DECODE, "config": TINY}
    tables["nemotron-h"].check("costs.json", **asked)
    tables["nemotron-h"].check("costs.json", **{**asked, "machine": MACHINE | {"torch": "3"}})
    with pytest.raises(HalflapError) as error:
        tables["nemotron-h"].check("costs.json", **asked | changes)
    assert says in str(error.value) and str(error.value).startswith("the cost table 'costs.json' ")
    assert "halflap bench MODEL --blocks" in str(error.value) and "or leave --costs out" in str(error.value)


def test_what_is_no_table_is_said(tmp_path: Path) -> None:
    with pytest.raises(HalflapError, match="does not exist; make it with"):
        CostTable.load(tmp_path / "absent.json")
    for text, says in (
        ("{}", "is not a cost table"),
        ("[", "is not a cost table"),
        ('{"format": "x"}', "of format 'x'"),
    ):
        (tmp_path / "costs.json").write_text(text)
        with pytest.raises(HalflapError, match=says):
            CostTable.load(tmp_path / "costs.json")


# ---- budgets


@pytest.mark.parametrize("share", [0.5, 0.8])
@pytest.mark.parametrize("condition", [DECODE, PREFILL], ids=str)
def test_a_latency_budget_is_kept(share: float, condition: Condition, tables: dict[str, CostTable]) -> None:
    table = tables["nemotron-h"]
    limit = share * true_seconds(TINY, condition)
    budget = Budget(latency=limit, **vars(condition), table=table)
    found = fitting(TINY, budget, SearchSpace(max_width_cut=0.7), tuple(range(7)))
    for candidate in found.candidates:
        kept = kept_after(TINY, candidate.sizes, tuple(range(7)))
        seconds = true_seconds(resize(TINY, kept, candidate.sizes), condition)
        assert candidate.costs["latency"] == pytest.approx(seconds, rel=1e-5) and seconds <= limit * (1 + 1e-5)
        assert candidate.costs["throughput"] == pytest.approx(condition.tokens / seconds, rel=1e-5)
    assert found.remark is None and max(c.costs["latency"] for c in found.candidates) >= 0.95 * limit


def test_a_throughput_budget_is_the_latency_of_as_many_tokens(tables: dict[str, CostTable]) -> None:
    at: dict[str, Any] = {**vars(DECODE), "table": tables["nemotron-h"]}
    limit = 0.6 * true_seconds(TINY, DECODE)
    by_time = fitting(TINY, Budget(latency=limit, **at), SearchSpace(max_width_cut=0.7))
    by_rate = fitting(TINY, Budget(throughput=2 / limit, **at), SearchSpace(max_width_cut=0.7))
    assert by_time.candidates == by_rate.candidates
    both = Budget(latency=limit, throughput=2 / (2 * limit), params=1e9, **at)
    assert both.ceilings["latency"] == pytest.approx(limit) and set(both.ceilings) == {"latency", "params"}


def test_with_other_budgets_all_are_kept(tables: dict[str, CostTable]) -> None:
    at: dict[str, Any] = {**vars(DECODE), "table": tables["nemotron-h"]}
    whole = costs(TINY, Budget(**at))
    budget = Budget(latency=0.8 * whole["latency"], params=0.7 * whole["params"], **at)
    for candidate in fitting(TINY, budget, SearchSpace(max_width_cut=0.7)).candidates:
        assert candidate.costs["latency"] <= 0.8 * whole["latency"] * 1.000001
        assert candidate.costs["params"] <= 0.7 * whole["params"]


def test_all_of_the_teachers_own_time_leaves_it_whole(tables: dict[str, CostTable]) -> None:
    for name, table in tables.items():
        budget = Budget(latency=table.seconds(MODELS[name], DECODE), **vars(DECODE), table=table)
        assert [c.sizes for c in fitting(MODELS[name], budget).candidates] == [Sizes()]


def test_impossible_times_say_the_smallest_that_is_possible(tables: dict[str, CostTable]) -> None:
    table, space = tables["nemotron-h"], widening(TINY, SearchSpace())[-1]
    at: dict[str, Any] = {**vars(DECODE), "table": table}
    smallest: dict[str, Any] = {name: values[-1] for name, values in choices(TINY, space, False, 1).items()}
    least = table.seconds(resize(TINY, tuple(range(7)), Sizes(**smallest)), DECODE)
    with pytest.raises(HalflapError) as error:
        fitting(TINY, Budget(latency=1e-9, **at), space)
    assert f"has {1e3 * least:,.4g} ms a pass (decode at context 64, batch 2)" in str(error.value)
    assert "raise --latency" in str(error.value)
    with pytest.raises(HalflapError) as error:
        fitting(TINY, Budget(throughput=1e12, **at), space)
    assert f"has {2 / least:,.0f} tokens a second" in str(error.value) and "lower --throughput" in str(error.value)
