"""Recipes of the verbs that make a model smaller: score, search, prune, verify, distill, and compress, which is all.

As in config.py: a field's docstring is its help, only the first argument is positional, no torch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from halflap.commands.sections import (
    Budgets,
    CompressSettings,
    DistillSettings,
    NormCorrection,
    ScoreSettings,
    SearchSettings,
    Text,
)
from halflap.compress.axes import Sizes
from halflap.compress.grid import SearchSpace
from halflap.errors import RecipeError
from halflap.recipe import SIZES, SPACE, SWITCH, TRAINING, Common, File, Files, Model, Positive, section
from halflap.train.config import Fit


@dataclass(frozen=True, kw_only=True)
class ScoreRecipe:
    """Measure the importance of every axis on calibration text."""

    model: Model = field(kw_only=False)
    """The teacher: Hugging Face directory or run directory."""
    text: Text = Text()
    tokens: Positive = 262_144
    """Calibration tokens to read."""
    settings: ScoreSettings = ScoreSettings()
    sequence_length: Positive = 512
    """Tokens of a calibration row."""
    batch_size: Positive = 4
    """Rows at once."""
    stream: Annotated[bool, SWITCH] = False
    """Read the weights a block at a time, as is done anyway when they do not fit in free memory; same numbers."""
    common: Common = Common()


@dataclass(frozen=True, kw_only=True)
class SearchRecipe:
    """Find the best sizes under budgets."""

    model: Model = field(kw_only=False)
    """The teacher: Hugging Face directory or run directory."""
    importance: File | None = None
    """File that `score` wrote."""
    text: Text = Text()
    budgets: Budgets = Budgets()
    sweep: tuple[str, ...] = ()
    """A budget and several values of it, each searched on its own: params 40% 50% 60%."""
    settings: SearchSettings = SearchSettings()
    space: Annotated[SearchSpace, section(SPACE)] = SearchSpace()
    norm_correction: NormCorrection = "masked"
    """What replaces the cut channels in the mean of the norms."""
    stream: Annotated[bool, SWITCH] = False
    """Read the weights a block at a time, as is done anyway when they do not fit in free memory; same numbers."""
    fit: Annotated[Fit, section(TRAINING)] = Fit()
    common: Common = Common()


@dataclass(frozen=True, kw_only=True)
class PruneRecipe:
    """Write the student."""

    model: Model = field(kw_only=False)
    """The teacher: Hugging Face directory or run directory."""
    importance: File | None = None
    """File that `score` wrote; not needed with --plan."""
    plan: File | None = None
    """Pruning plan or search result to follow instead of budgets or sizes."""
    from_elastic: Annotated[bool, SWITCH] = False
    """MODEL is what `compress --elastic` made: its own order says what is kept, and no importance is needed."""
    budgets: Budgets = Budgets()
    sizes: Annotated[Sizes, section(SIZES)] = Sizes()
    space: Annotated[SearchSpace, section(SPACE)] = SearchSpace()
    norm_correction: NormCorrection = "masked"
    """What replaces the cut channels in the mean of the norms."""
    common: Common = Common()


@dataclass(frozen=True, kw_only=True)
class VerifyRecipe:
    """Check that a pruned student is exactly its masked teacher."""

    student: Model = field(kw_only=False)
    """Checkpoint or run directory with a pruning plan."""
    teacher: Model | None = None
    """The teacher it was cut from; found through the lineage when it has not moved."""
    tokens: Positive = 256
    """Tokens compared."""
    common: Common = Common()


@dataclass(frozen=True, kw_only=True)
class DistillRecipe:
    """Train a student on its teacher's outputs."""

    student: Model = field(kw_only=False)
    """Checkpoint or run directory of the student."""
    teacher: Model | None = None
    """Checkpoint or run directory of the teacher; found through the lineage when it has not moved."""
    text: Text = Text()
    tokens: Positive = 10_000_000
    """Tokens to train on."""
    loss_settings: DistillSettings = DistillSettings()
    eval_data: Files = ()
    """Held-out text for the loss curve."""
    fit: Annotated[Fit, section(TRAINING)] = Fit()
    common: Common = Common()


@dataclass(frozen=True, kw_only=True)
class CompressRecipe:
    """Score, search, prune, verify, distill, evaluate and report in one run."""

    model: Model = field(kw_only=False)
    """The teacher: Hugging Face directory or run directory."""
    text: Text = Text()
    tokens: Positive = 10_000_000
    """Tokens the student is distilled on."""
    calibration_tokens: Positive = 262_144
    """Tokens read to measure importance."""
    eval_data: Files = ()
    """Text to judge on; without it the last 5 % of the documents, by a hash of their text, are kept back."""
    eval_tokens: Positive = 131_072
    """Tokens to judge on at most."""
    eval_context: Positive | None = None
    """Tokens of a window that is judged; by default the model's context, at most 2048."""
    importance: File | None = None
    """File that `score` wrote, to save measuring it again."""
    budgets: Budgets = Budgets()
    elastic: tuple[str, ...] | None = None
    """One checkpoint of many sizes, cut from it by `prune --from-elastic`; with the budgets of those that are distilled
    together beside the whole: 75% 50% of the parameters when none is given, or memory 75% 50%."""
    sizes: Annotated[Sizes, section(SIZES)] = Sizes()
    settings: SearchSettings = SearchSettings()
    space: Annotated[SearchSpace, section(SPACE)] = SearchSpace()
    score_settings: ScoreSettings = ScoreSettings()
    norm_correction: NormCorrection = "masked"
    """What replaces the cut channels in the mean of the norms."""
    loss_settings: CompressSettings = CompressSettings()
    controls: tuple[Literal["scratch", "group_blind", "random"], ...] = ()
    """Arms to train beside the student: the same shape from scratch, a group-blind cut, a random ranking."""
    fit: Annotated[Fit, section(TRAINING)] = Fit()
    common: Common = Common()

    def __post_init__(self) -> None:
        if self.settings.method == "puzzle" and self.sizes != Sizes():
            raise RecipeError(
                "sizes were given with method puzzle, which finds sizes for each block; leave them out, or list what "
                "may be tried with --space.intermediate-size and its like"
            )
