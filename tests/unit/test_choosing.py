"""The text that candidates are chosen by: what is said where there is too little of it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from halflap.commands.students import choosing_remark

TEXT: Any = SimpleNamespace(rows=[60, 40], sequence_length=10)  # of 1,000 tokens


@pytest.mark.parametrize(
    ("tokens", "calibrated_on", "says"),
    [
        (400, 600, None),
        (1_000, 0, None),
        (400, 700, "importance was measured on 700 of the 1,000 tokens of text, so that candidates are scored on"),
        (1_001, 100, "candidates were to be scored on 1,001 tokens, and there were 1,000: all were read"),
    ],
)  # fmt: skip
def test_too_little_text_is_said(tokens: int, calibrated_on: int, says: str | None) -> None:
    found = choosing_remark(TEXT, tokens, calibrated_on)
    assert found == says if says is None else found is not None and found.startswith(says)
