"""Budgets of `compress` before importance is measured: none is refused that some order of blocks could meet."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from halflap.amounts import Amount
from halflap.commands.config_compress import CompressRecipe
from halflap.commands.given import Given
from halflap.commands.searching import check, check_unmeasured
from halflap.commands.sections import Budgets
from halflap.compress.grid import SearchSpace
from halflap.compress.importance import Importance
from halflap.errors import HalflapError
from halflap.models.config import AttentionConfig, Mamba2Config, MLPConfig, ModelConfig

MAMBA, ATTENTION = Mamba2Config(4, 4, 2, 8), AttentionConfig(4, 2, 4)
BLOCKS = (MAMBA, MLPConfig(40), MAMBA, ATTENTION, MLPConfig(8), MAMBA, MLPConfig(24), ATTENTION)
CONFIG = ModelConfig("nemotron_h", 29, 16, BLOCKS)
SPACE = SearchSpace(hidden_size=(16, 12), intermediate_size=(40, 10), mamba_num_heads=(4,), max_depth_cut=0.5)
NAMES = ("params", "memory", "flops")


def asked(shares: dict[str, float], scores: tuple[float, ...] = ()) -> Given:
    budgets: dict[str, Any] = {name: Amount(share, "count", share=True) for name, share in shares.items()}
    recipe = CompressRecipe("teacher", budgets=Budgets(**budgets, context=64), space=SPACE)
    teacher: Any = SimpleNamespace(config=CONFIG)
    nothing: Any = None
    importance = Importance("random", {}, {"kl": torch.tensor(scores)} if scores else {})
    return Given(recipe, Path(), Path(), teacher, importance, nothing, nothing, nothing)


@given(
    shares=st.dictionaries(st.sampled_from(NAMES), st.floats(0.2, 0.95), min_size=1),
    scores=st.lists(st.floats(0, 1, width=32), min_size=len(BLOCKS), max_size=len(BLOCKS)),
)
@settings(max_examples=60)
def test_what_importance_can_meet_is_not_refused_before(shares: dict[str, float], scores: list[float]) -> None:
    try:
        check(asked(shares, tuple(scores)))
    except HalflapError:
        return
    check_unmeasured(asked(shares))


@pytest.mark.parametrize("name", NAMES)
def test_what_no_order_of_blocks_meets_is_refused(name: str) -> None:
    with pytest.raises(HalflapError, match="cannot be met"):
        check_unmeasured(asked({name: 0.1, "params": 0.9} if name != "params" else {name: 0.1}))
