"""What may become of each block: every kind of variant for the carried teacher, windows and whom they bind."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from halflap.checkpoints.config import read_config
from halflap.compress.axes import readers_of
from halflap.compress.costs import Budget
from halflap.compress.grid import SearchSpace, choices
from halflap.compress.library import WHOLE, Library, Option, library_of
from halflap.compress.programme import Programme, student_of
from halflap.errors import HalflapError
from halflap.models.config import AttentionConfig, MLPConfig, ModelConfig
from halflap.models.presets import hymba, preset

TEACHER = read_config(Path(__file__).parents[3] / "demo" / "teacher")
HYMBA = hymba(6, hidden=32, mlp=24, heads=(4, 2), state=4, window=16, meta=3, vocab=40, context=64, original_context=16)
AT = {"context": 1024, "weight_bits": 8, "cache_bits": 8}


def names(library: Library, symbol: str) -> set[str]:
    """Of the variants of the first block with this symbol."""
    first = library.teacher.pattern().index(symbol)
    return {option.variant.name for option in library.options if first in option.blocks}


def test_every_kind_of_variant_is_in_the_library_of_the_carried_teacher() -> None:
    library = library_of(TEACHER, length=512)
    assert names(library, "M") >= {
        *("whole", "mamba_num_heads 12", "mamba_head_dim 24", "mamba_head_dim 16"),
        *("mamba_num_heads 8, mamba_head_dim 16", "dropped"),
    }
    assert names(library, "-") >= {"whole", "intermediate_size 384", "intermediate_size 80", "linear", "dropped"}
    assert names(library, "*") >= {
        *("whole", "num_attention_heads 4", "key/value heads averaged by 2", "linear", "dropped"),
        *("window 256", "window 128", "window 64"),
    }


@pytest.mark.parametrize("teacher", [preset("llama-tiny"), preset("nemotron-4-tiny"), HYMBA], ids=lambda t: t.family)
def test_each_block_may_go_by_itself_but_those_of_a_hymbas_layer(teacher: ModelConfig) -> None:
    step = 2 if teacher.family == "hymba" else 1
    units = [tuple(range(start, start + step)) for start in range(0, len(teacher.blocks), step)]
    assert [option.blocks for option in library_of(teacher).options if option.variant.dropped] == units


def test_an_eight_billions_variants_are_some_hundreds() -> None:
    """Each takes half a pass over the text to be scored."""
    assert 500 < len(library_of(preset("nemotron-h-8b")).options) < 600


def test_listed_windows_are_combined_and_tried_alone() -> None:
    library = library_of(TEACHER, SearchSpace(window=(96, 48), num_attention_heads=(4,)))
    found = names(library, "*")
    assert {name for name in found if name.startswith("window")} == {"window 96", "window 48"}
    assert "num_attention_heads 4, window 48" in found
    shorter = library_of(HYMBA, SearchSpace(window=(32, 8)))
    assert {o.variant.change.window for o in shorter.options if o.blocks == (0,)} == {None, 32, 8}
    assert {o.variant.change.window for o in shorter.options if o.blocks == (2,)} == {None, 8}, "windows only shrink"


def test_what_saves_nothing_is_not_tried() -> None:
    library = library_of(TEACHER, length=512)
    for limits, windows in (({"params": 1}, False), ({"memory": 1}, True), ({"params": 1, "flops": 1}, True)):
        left = library.saving(Budget(**limits, **AT))  # type: ignore[arg-type]
        assert any(option.variant.change.window for option in left.options) == windows
        assert {o.name for o in library.options if o.variant.dropped or o.variant == WHOLE} <= {
            o.name for o in left.options
        }
    short = library.saving(Budget(memory=1, context=32))
    assert not any(option.variant.change.window for option in short.options), "it hides nothing of such a context"


def test_lists_of_both_kinds_of_heads_go_together_with_what_a_block_has() -> None:
    """Of 8 query and 4 key/value heads: 6 are no multiple of 4, and of 2 they are."""
    config = ModelConfig("llama", 64, 32, (AttentionConfig(8, 4, 4), MLPConfig(64, "silu", gated=True)) * 2)
    space = SearchSpace(num_attention_heads=(6, 4), num_key_value_heads=(2,))
    found = [o.name for o in library_of(config, space).options if o.blocks == (0,) and "num_" in o.name]
    assert sorted(found) == ["0 num_attention_heads 4", "0 num_key_value_heads 2"]


def test_windows_of_a_group_are_one() -> None:
    """What shares keys and values: a window of all, scored where they are made; a reader's own saves no memory."""
    library = library_of(HYMBA).saving(Budget(memory=1, **AT))  # type: ignore[arg-type]
    (source, (reader,)), *_ = readers_of(HYMBA).items()
    narrow = {
        index: next(o for o in library.options if o.blocks == (index,) and o.variant.change.window == 8)
        for index in (source, reader)
    }
    assert library.alone(narrow[reader]) == library.alone(narrow[source])
    assert library.follows(narrow[reader]) and not library.follows(narrow[source])
    assert not any(library.follows(o) for o in library.options if not o.variant.change.window)
    for index, other in ((source, reader), (reader, source)):
        scores = np.array([-2.0 if o == narrow[index] else float(o.variant.dropped) for o in library.options])
        variants = library.variants(Programme(library, Budget(params=1e15)).choices(scores)[0].options)
        assert variants[index] == variants[other] == narrow[index].variant
        assert student_of(HYMBA, variants).blocks[other].attention.window == 8  # type: ignore[union-attr]
    wanted = (narrow[source], next(o for o in library.options if reader in o.blocks and o.variant.dropped))
    gone = np.array([-1.0 if option in wanted else 0.0 for option in library.options])
    variants = library.variants(Programme(library, Budget(params=1e15)).choices(gone)[0].options)
    assert variants[reader].dropped and variants[source] == narrow[source].variant


def test_an_option_alone_changes_its_blocks_only() -> None:
    library = library_of(TEACHER)
    for option in library.options:
        changed = [index for index, variant in enumerate(library.alone(option)) if variant != WHOLE]
        assert changed == ([] if option.variant == WHOLE else list(option.blocks))
    assert Option((0,), WHOLE).name == "0 whole"


def test_windows_that_mean_nothing_are_refused() -> None:
    mlps = dataclasses.replace(TEACHER, blocks=TEACHER.blocks[:2])
    for teacher, window in ((mlps, 8), (TEACHER, 0)):
        with pytest.raises(HalflapError, match=f"space.window has {window}; .* a window at least 1 token: correct it"):
            library_of(teacher, SearchSpace(window=(window,)))
    with pytest.raises(HalflapError, match=r"space.window was given, .* search with --method puzzle"):
        choices(TEACHER, SearchSpace(window=(8,)), False)


def test_what_stays_far_below_every_ceiling_is_said() -> None:
    budget = Budget(params=1000, memory=4000, **AT)  # type: ignore[arg-type]
    assert budget.short({"params": 950, "memory": 1}) is None
    assert (
        budget.short({"params": 900, "memory": 3700}) == "3,700 bytes of memory where 4,000 bytes of memory are allowed"
    )
