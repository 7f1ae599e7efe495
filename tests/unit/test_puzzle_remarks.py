"""What method puzzle says of its result: of the student that was chosen, and of the text it was chosen by."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from halflap.commands import puzzle
from halflap.commands.sections import SearchSettings
from halflap.compress.axes import Sizes
from halflap.compress.costs import Budget
from halflap.compress.library import library_of
from halflap.compress.search import SearchResult, Trial
from halflap.models.presets import preset

TINY = preset("nemotron-h-tiny")
WHOLE, CUT = ("whole",) * len(TINY.blocks), ("whole", "linear", *["whole"] * (len(TINY.blocks) - 2))


def said(*trials: Trial, **settings: Any) -> str | None:
    """Of trials in the order of their ranking, with 1,000 tokens of text."""
    given: Any = SimpleNamespace(
        budget=Budget(params=1000),
        recipe=SimpleNamespace(settings=SearchSettings(shortlist=len(trials), replacement_tokens=100, **settings)),
        scoring=SimpleNamespace(rows=[100], sequence_length=10),
        importance=SimpleNamespace(tokens=0),
        library=library_of(TINY),
    )
    return puzzle.remark(given, SearchResult({}, 9, trials))


def trial(params: float, variants: tuple[str, ...]) -> Trial:
    return Trial(Sizes(), {"params": params}, 0.0, 2.0, variants=variants)


def test_the_student_that_was_chosen_counts_not_the_first_that_was_proposed() -> None:
    near, far, whole = trial(990, CUT), trial(700, CUT), trial(1000, WHOLE)
    assert said(near, far) is None and said(near, whole) is None
    assert "below the budget: it has 700 parameters where 1,000" in str(said(far, near))
    assert said(whole, near) == "the teacher itself is within the budget: nothing is cut"


@pytest.mark.parametrize(
    ("block_tokens", "says"),
    [
        (900, None),
        (950, "variants learnt on 950 of the 1,000 tokens of text, so that variants are scored on 50 of these again"),
        (5_000, "variants were to learn on 5,000 tokens, and there were 1,000, which were read more than once"),
    ],
)
def test_variants_that_learn_on_what_they_are_scored_on_are_said_to(block_tokens: int, says: str | None) -> None:
    found = said(trial(990, CUT), block_tokens=block_tokens)
    assert found == says if says is None else says in str(found)
