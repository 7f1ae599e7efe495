"""The exception that a user's mistake raises; its message is the sentence the command line prints."""

from __future__ import annotations

from typing import Any


class HalflapError(ValueError):
    """What was wrong, the value met, what is allowed and what to do next, in one sentence."""


class RecipeError(HalflapError):
    """The command line or the recipe is wrong: exit status 2 instead of 1."""


class CheckFailed(HalflapError):
    """What was checked does not hold; `result` holds the findings, which --json prints all the same."""

    def __init__(self, message: str, result: dict[str, Any]) -> None:
        super().__init__(message)
        self.result = result
