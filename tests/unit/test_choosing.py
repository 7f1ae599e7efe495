"""The text that candidates are chosen by: what is said where there is too little of it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from halflap.commands.students import choosing_remark, learning_remark

TEXT: Any = SimpleNamespace(rows=[60, 40], sequence_length=10)  # of 1,000 tokens


@pytest.mark.parametrize(
    ("tokens", "calibrated_on", "learnt_on", "says"),
    [
        (400, 600, 600, []),
        (1_000, 0, 0, []),
        (400, 700, 0, ["importance was measured on 700 of the 1,000 tokens of text", "scored on 100 of these"]),
        (400, 700, 900, ["measured on 700, variants learnt on 900 of the 1,000", "scored on 300 of these again"]),
        (400, 100, 9_000, ["variants learnt on 1,000 of the 1,000 tokens", "scored on 400 of these", "lower --score"]),
        (1_001, 0, 0, ["candidates were to be scored on 1,001 tokens, and there were 1,000: all were read"]),
        (1_001, 100, 0, ["there were 1,000: all were read; importance was measured on 100 of the 1,000 tokens"]),
    ],
)
def test_too_little_text_is_said(tokens: int, calibrated_on: int, learnt_on: int, says: list[str]) -> None:
    before = {"importance was measured": calibrated_on, "variants learnt": learnt_on}
    found = choosing_remark(TEXT, "candidates", "--score-tokens", tokens, before)
    assert bool(found) == bool(says) and all(words in str(found) for words in says)


def test_too_little_text_to_learn_from_is_said() -> None:
    assert learning_remark(TEXT, "variants", 1_000) is None
    assert "on 1,001 tokens, and there were 1,000" in str(learning_remark(TEXT, "variants", 1_001))
