"""Choosing a variant for every block: the programme against brute force, its limits, rules and words."""

from __future__ import annotations

import ctypes
import dataclasses
import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from halflap.compress import programme
from halflap.compress.axes import Sizes
from halflap.compress.costs import Budget, costs
from halflap.compress.grid import SearchSpace
from halflap.compress.kinds import Change
from halflap.compress.library import DROPPED, WHOLE, Library, Option, Variant, library_of, summary
from halflap.compress.programme import Programme, student_of
from halflap.errors import HalflapError
from halflap.models.config import AttentionConfig, BlockConfig, HybridConfig, Mamba2Config, MLPConfig, ModelConfig
from halflap.models.count import count_parameters
from halflap.models.presets import hymba, preset

BLOCKS: tuple[BlockConfig, ...] = (
    MLPConfig(24),
    MLPConfig(16, "silu", gated=True),
    AttentionConfig(4, 2, 8),
    AttentionConfig(4, 2, 8, window=6),
    Mamba2Config(4, 8, 2, 4, chunk_size=4),
)
NAMES = ("params", "non_embedding_params", "memory", "flops")
TINY = preset("nemotron-h-tiny")
HYMBA = hymba(6, hidden=32, mlp=24, heads=(4, 2), state=4, window=4, meta=3, vocab=40, context=64, original_context=16)


def model(*blocks: BlockConfig) -> ModelConfig:
    return ModelConfig("nemotron_h", 40, 16, blocks)


def layers(readers: tuple[bool, ...]) -> ModelConfig:
    """A Hymba of windowed layers, of which some read the keys and values of the first; a layer is two blocks."""
    shape = hymba(2, hidden=32, mlp=24, heads=(4, 2), state=4, window=8, meta=3, vocab=40, original_context=None)
    hybrid, mlp = shape.blocks[0], shape.blocks[1]
    assert isinstance(hybrid, HybridConfig)

    def windowed(source: int | None) -> HybridConfig:
        attention = dataclasses.replace(hybrid.attention, window=8, key_value_source=source)
        return dataclasses.replace(hybrid, attention=attention)

    blocks = [windowed(0 if reads and place else None) for place, reads in enumerate(readers)]
    return dataclasses.replace(shape, blocks=tuple(block for hybrid in blocks for block in (hybrid, mlp)))


def all_choices(library: Library) -> list[tuple[int, ...]]:
    """Every choice that covers each block once and breaks no rule, the slow way."""
    by_block = [[c for c, o in enumerate(library.options) if i in o.blocks] for i in range(len(library.teacher.blocks))]
    found = set()
    for columns in itertools.product(*by_block):
        chosen = np.zeros(len(library.options))
        chosen[list(set(columns))] = 1
        if (library.covers @ chosen == 1).all() and all(r.weights @ chosen <= r.at_most for r in library.rules()):
            found.add(tuple(sorted(set(columns))))
    return sorted(found)


def budget_of(ceilings: dict[str, float], weight_bits: int = 8) -> Budget:
    settings: dict[str, Any] = {"context": 50, "weight_bits": weight_bits, "cache_bits": 8}
    return Budget(**settings, **ceilings)


@st.composite
def cases(draw: st.DrawFn) -> tuple[Library, Budget, np.ndarray]:
    """Up to 6 blocks of 3 variants, one of which may be to go, under 1 to 3 budgets somewhere within what there is.

    Of a Hymba two blocks go together, or none, and what reads keys and values goes, or is windowed, with their source.
    Of a Llama's layers each block goes by itself.
    """
    family = draw(st.sampled_from(["nemotron_h", "llama", "hymba"]))
    if family == "nemotron_h":
        teacher = model(*draw(st.lists(st.sampled_from(BLOCKS), min_size=1, max_size=6)))
    elif family == "llama":
        pair = (AttentionConfig(4, 2, 8), MLPConfig(16, "silu", gated=True))
        teacher = dataclasses.replace(model(*pair * draw(st.integers(1, 3))), family="llama")
    else:
        teacher = layers(draw(st.tuples(*[st.booleans()] * draw(st.integers(1, 3)))))
    whole = library_of(teacher, SearchSpace(max_depth_cut=draw(st.sampled_from([0.0, 0.5, 0.8]))), 16)
    options: list[Option] = []
    for index in range(len(teacher.blocks)):
        others = [o for o in whole.options if o.blocks == (index,) and o.variant != WHOLE]
        picked = draw(st.lists(st.sampled_from(others), max_size=2, unique=True))
        options += [Option((index,), WHOLE), *picked]
    options += [o for o in whole.options if len(o.blocks) > 1 and draw(st.booleans())]
    library = Library(whole.teacher, tuple(options), whole.max_dropped)
    scores = draw(st.lists(st.integers(1, 10**6), min_size=len(options), max_size=len(options)))
    score = np.array([0.0 if o.variant == WHOLE else s / 1e6 for o, s in zip(options, scores, strict=True)])
    names = draw(st.lists(st.sampled_from(NAMES), min_size=1, max_size=3, unique=True))
    choice = draw(st.sampled_from(all_choices(library)))
    counted = costs(student_of(whole.teacher, library.variants(choice)), budget_of({}))
    slack = draw(st.sampled_from([0.98, 1.0, 1.02, 1.2]))  # of 1.0 some choice meets all exactly
    return library, budget_of({name: counted[name] * slack for name in names}), score


def brute_force(library: Library, budget: Budget, scores: np.ndarray) -> float | None:
    def fits(choice: tuple[int, ...]) -> bool:
        counted = costs(student_of(library.teacher, library.variants(choice)), budget)
        return all(counted[name] <= limit for name, limit in budget.ceilings.items())

    return min((scores[list(c)].sum() for c in all_choices(library) if fits(c)), default=None)


@settings(max_examples=40)
@given(cases())
def test_the_programme_equals_brute_force(case: tuple[Library, Budget, np.ndarray]) -> None:
    library, budget, scores = case
    best = brute_force(library, budget, scores)
    if best is None:
        with pytest.raises(HalflapError, match="cannot be met"):
            Programme(library, budget).choices(scores)
        return
    (choice,) = Programme(library, budget).choices(scores)
    assert choice.score == pytest.approx(best, abs=1e-9 * max(1.0, scores.max()))
    counted = costs(student_of(library.teacher, library.variants(choice.options)), budget)
    assert counted == choice.costs and all(counted[name] <= limit for name, limit in budget.ceilings.items())


@settings(max_examples=20)
@given(cases(), st.sampled_from([0.0, 0.1, 0.5]))
def test_no_choice_is_better_than_the_gap_says(case: tuple[Library, Budget, np.ndarray], gap: float) -> None:
    """Of a search that is too large to be finished, which here every one is.

    The solver also stops 1e-6 from the best where the largest score is 1000, which the smallest sums feel.
    """
    library, budget, scores = case
    best = brute_force(library, budget, scores)
    if best is None:
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(programme, "NODES", 0)
        (choice,) = Programme(library, budget).choices(scores, gap=gap)
    assert choice.score * (1 - choice.gap) <= best + 1e-9 and choice.gap <= gap + 1e-2


@settings(max_examples=20)
@given(cases(), st.floats(0.6, 0.99))
def test_tightening_a_limit_never_improves(case: tuple[Library, Budget, np.ndarray], share: float) -> None:
    library, budget, scores = case
    try:
        loose = Programme(library, budget).choices(scores)[0].score
        name, limit = next(iter(budget.ceilings.items()))
        tight = Programme(library, dataclasses.replace(budget, **{name: share * limit})).choices(scores)
    except HalflapError:
        return  # nothing fits
    assert tight[0].score >= loose - 1e-9


@pytest.mark.parametrize("teacher", [TINY, preset("llama-tiny"), HYMBA], ids=lambda t: t.family)
def test_all_whole_is_best_without_limits(teacher: ModelConfig) -> None:
    library = library_of(teacher)
    scores = np.array([0.0 if o.variant == WHOLE else 0.1 for o in library.options])
    (choice,) = Programme(library, Budget(params=1e15, memory=1e15, flops=1e18)).choices(scores)
    assert set(library.variants(choice.options)) == {WHOLE} and choice.score == 0


@pytest.mark.parametrize("teacher", [TINY, preset("llama-tiny"), HYMBA], ids=lambda t: t.family)
def test_costs_of_options_add_up(teacher: ModelConfig) -> None:
    """To the last byte at bits that divide no byte."""
    library, budget, rng = library_of(teacher), budget_of({}, weight_bits=5), np.random.default_rng(0)
    programme = Programme(library, Budget(params=1e15))
    for _ in range(5):
        scores = [1.0 if option.variant.dropped else rng.uniform(-1, 0) for option in library.options]
        chosen = list(programme.choices(np.array(scores))[0].options)
        exact = costs(student_of(teacher, library.variants(chosen)), budget)
        for name in NAMES:
            added, rest = library.costs(name, budget)
            assert exact[name] == pytest.approx(added[chosen].sum() + rest, abs=3)  # two roundings up to whole bytes


def test_what_the_solver_prints_stays_out_of_standard_output(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    library = ctypes.CDLL(None)
    whole = programme.milp

    def talking(*given: Any, **fields: Any) -> Any:
        library.puts(b"a line of HiGHS")
        return whole(*given, **fields)

    monkeypatch.setattr(programme, "milp", talking)
    teacher = preset("nemotron-h-tiny")
    library.puts(b"before")
    Programme(library_of(teacher), Budget(params=0.9 * count_parameters(teacher)))
    library.puts(b"after")
    library.fflush(None)
    assert capfd.readouterr().out == "before\nafter\n"


@pytest.mark.parametrize("overlap", [0.6, 1.0])
def test_candidates_differ(overlap: float) -> None:
    library = library_of(TINY)
    scores = np.array([0.0 if o.variant == WHOLE else 0.1 + c / 1000 for c, o in enumerate(library.options)])
    found = Programme(library, Budget(params=0.7 * costs(TINY, Budget())["params"])).choices(scores, 4, overlap)
    assert len(found) == 4 and [c.score for c in found] == sorted(c.score for c in found)
    for one, other in itertools.combinations(found, 2):
        pairs = zip(library.variants(one.options), library.variants(other.options), strict=True)
        assert sum(a == b for a, b in pairs) <= min(overlap * len(TINY.blocks), len(TINY.blocks) - 1)


def test_what_reads_keys_and_values_goes_with_them() -> None:
    """And a layer of a Hymba is two blocks; whatever the scores say."""
    library = library_of(HYMBA, SearchSpace(max_depth_cut=0.8))
    for seed in range(8):
        scores = np.random.default_rng(seed).uniform(-1, 0, len(library.options))
        (choice,) = Programme(library, Budget(params=1e15)).choices(scores)
        variants = library.variants(choice.options)
        student_of(HYMBA, variants)  # raises where a source is missing
        assert all((a == DROPPED) == (b == DROPPED) for a, b in zip(variants[::2], variants[1::2], strict=True))
        assert any(v != DROPPED for v in variants)


@pytest.mark.parametrize("teacher", [TINY, preset("llama-tiny")], ids=lambda t: t.family)
def test_one_block_of_each_kind_stays(teacher: ModelConfig) -> None:
    library = library_of(teacher, SearchSpace(max_depth_cut=0.9))
    scores = np.array([-1.0 if o.variant == DROPPED else 0.0 for o in library.options])
    (choice,) = Programme(library, Budget(params=1e15)).choices(scores)
    student, kinds = student_of(teacher, library.variants(choice.options)), {type(b) for b in teacher.blocks}
    assert {type(b) for b in student.blocks} == kinds and len(student.blocks) == len(kinds)


def test_lists_are_combined_and_of_automatic_sizes_heads_and_channels() -> None:
    teacher = model(Mamba2Config(8, 8, 2, 4), AttentionConfig(8, 4, 8, window=8))
    automatic = [o.variant.name for o in library_of(teacher).options if o.blocks == (0,)]
    assert automatic == [
        "whole",
        *(f"mamba_num_heads {heads}" for heads in (6, 4)),
        *(f"mamba_head_dim {channels}" for channels in (6, 4)),
        *(f"mamba_num_heads {heads}, mamba_head_dim {channels}" for heads in (6, 4) for channels in (6, 4)),
        "dropped",
    ]
    names = [
        o.variant.name for o in library_of(teacher, SearchSpace(mamba_num_heads=(4, 6), mamba_head_dim=(4,))).options
    ]
    assert names[:6] == [
        "whole",
        "mamba_head_dim 4" if names[1] == "mamba_head_dim 4" else "mamba_num_heads 8, mamba_head_dim 4",
        "mamba_num_heads 6",
        "mamba_num_heads 6, mamba_head_dim 4",
        "mamba_num_heads 4",
        "mamba_num_heads 4, mamba_head_dim 4",
    ]
    assert names[7:] == [
        "whole",
        "key/value heads averaged by 2",
        "key/value heads averaged by 4",
        "num_attention_heads 4",
        "window 4",
        "window 2",
        "window 1",
        "linear",
        "dropped",
    ]


def test_a_summary_shows_the_pattern_and_counts_by_kind() -> None:
    names = ["whole", "intermediate_size 8", "dropped", "intermediate_size 8"]
    assert summary("M-*-", names) == "M~.~  M 1 whole; - 2 intermediate_size 8; * 1 dropped"


def test_impossible_budgets_say_what_is_possible() -> None:
    library = library_of(TINY)
    scores = np.zeros(len(library.options))
    with pytest.raises(HalflapError, match=r"budget of 1,000 parameters cannot be met: the smallest .* has [\d,]+ "):
        Programme(library, Budget(params=1000)).choices(scores)
    try:
        Programme(library, Budget(params=1000)).choices(scores)
    except HalflapError as error:
        smallest = int(str(error).split("library has ")[1].split(" ")[0].replace(",", ""))
    (choice,) = Programme(library, Budget(params=smallest)).choices(scores)
    assert choice.costs["params"] == smallest
    with pytest.raises(HalflapError, match="no budget was given"):
        Programme(library, Budget())


def test_budgets_that_cannot_be_met_together_say_so() -> None:
    """One variant saves parameters, the other memory, and nothing saves both."""
    teacher = model(AttentionConfig(4, 4, 8))
    few = Variant(Sizes(num_attention_heads=4, num_key_value_heads=4), Change(pool=4))
    narrow = Variant(Sizes(num_key_value_heads=2))
    library = Library(teacher, (Option((0,), few), Option((0,), narrow)), 0)
    at = {"context": 1000, "weight_bits": 8}
    one, other = (costs(student_of(teacher, [v]), Budget(**at)) for v in (few, narrow))  # type: ignore[arg-type]
    assert one["memory"] < other["memory"] and one["params"] > other["params"]
    both = Budget(params=other["params"], memory=one["memory"], **at)  # type: ignore[arg-type]
    words = rf"cannot be met together: with the others kept, the smallest has {one['params']:,} parameters; with"
    with pytest.raises(HalflapError, match=words):
        Programme(library, both)


@pytest.mark.parametrize(
    ("space", "words"),
    [
        (SearchSpace(hidden_size=(32,)), "space.hidden_size was given; method puzzle chooses block by block"),
        (SearchSpace(mamba_intermediate_size=(8,)), "has no such axis; its blocks have intermediate_size"),
    ],
)
def test_spaces_that_mean_nothing_here_are_refused(space: SearchSpace, words: str) -> None:
    with pytest.raises(HalflapError, match=words):
        library_of(TINY, space)


def test_changes_are_checked() -> None:
    with pytest.raises(HalflapError, match="cannot have 3 of its 2 key/value heads averaged"):
        Change(pool=3).check(AttentionConfig(4, 2, 8), 5, False, 2)
    with pytest.raises(HalflapError, match=r"block 5 cannot have a window of 9: .* can only shrink"):
        Change(window=9).check(AttentionConfig(4, 2, 8, window=8), 5, False, 2)
