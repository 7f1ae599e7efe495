"""The exception that a user's mistake raises; its message is the sentence the command line prints."""


class HalflapError(ValueError):
    """What was wrong, the value met, what is allowed and what to do next, in one sentence."""


class RecipeError(HalflapError):
    """The command line or the recipe is wrong: exit status 2 instead of 1."""
