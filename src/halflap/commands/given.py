"""What a search is given, and the plan that it makes of a candidate: the same for all methods."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from pathlib import Path

from halflap.commands import students
from halflap.commands.clock import CLOCK, Clock, clock_of
from halflap.commands.config_compress import CompressRecipe, SearchRecipe
from halflap.commands.students import Teacher
from halflap.commands.teaching import Tutor
from halflap.compress.axes import Sizes
from halflap.compress.cost_table import CostTable
from halflap.compress.costs import Budget
from halflap.compress.importance import Importance, by_contribution
from halflap.compress.library import Library, Variant, library_of
from halflap.compress.plan import PruningPlan
from halflap.compress.ranking import plan_for, plan_of_variants
from halflap.compress.search import Trial, untried
from halflap.compress.space import Candidate
from halflap.data.loader import Loader
from halflap.models.config import ModelConfig


@dataclass(frozen=True)
class Given:
    """What a search is given: `scoring` are the rows of a micro-batch, `training` those of a step.

    Its files are in `place`; what no budget changes is in `shared`, which the values of a sweep have in common.
    """

    recipe: SearchRecipe | CompressRecipe
    place: Path
    shared: Path
    teacher: Teacher
    importance: Importance
    scoring: Loader
    training: Loader
    tutor: Tutor
    times: CostTable | None = None
    most: Sizes = Sizes()
    """What no candidate exceeds in any size; None is as large as the teacher."""
    timed: bool = True
    """Whether students may be timed here beside what `times` predicts."""

    @property
    def fixed(self) -> Sizes:
        """Sizes that are not varied."""
        return self.recipe.sizes if isinstance(self.recipe, CompressRecipe) else Sizes()

    @property
    def budget(self) -> Budget:
        return students.budget_of(self.recipe.budgets, self.teacher.config, self.times)

    @functools.cached_property
    def clock(self) -> Clock | None:
        if not self.timed:
            return None
        return clock_of(self.recipe.budgets, self.times, self.tutor.teacher, self.shared / CLOCK)

    @functools.cached_property
    def library(self) -> Library:
        """Of method puzzle: what may become of each block. Raises HalflapError for sizes that no block can have.

        Windows are shares of the context asked for, but no longer than the rows that variants are scored on, in which
        a longer one would hide nothing and so seem to do no harm.
        """
        length = min(self.recipe.budgets.context, self.scoring.sequence_length)
        return library_of(self.teacher.config, self.recipe.space, length)

    def plan_for(self, trial: Trial) -> PruningPlan:
        if trial.variants:
            return self.plan_of_variants(self.library.named(trial.variants))
        sizes, teacher = with_dropped(trial.sizes, self.fixed), self.teacher
        correction, keep_kinds = self.recipe.norm_correction, keeps_kinds(self.fixed)
        return plan_for(self.importance, teacher.digest, teacher.config, sizes, correction, keep_kinds)

    def shape_of(self, candidate: Candidate) -> ModelConfig:
        return self.plan_for(untried(candidate)).student

    def plan_of_variants(self, variants: tuple[Variant, ...]) -> PruningPlan:
        """Neurons are ranked by what they add to the stream (Bercovich et al. 2024), the rest as measured."""
        teacher, importance = self.teacher, self._contributions
        plan = plan_of_variants(importance, teacher.digest, teacher.config, variants, self.recipe.norm_correction)
        return dataclasses.replace(plan, importance=self.importance.digest)

    @functools.cached_property
    def _contributions(self) -> Importance:
        return by_contribution(self.importance, self.teacher.checkpoint.read_plain)


def with_dropped(sizes: Sizes, fixed: Sizes) -> Sizes:
    """Blocks named to be dropped stay named."""
    return dataclasses.replace(sizes, num_blocks=None, drop_blocks=fixed.drop_blocks) if fixed.drop_blocks else sizes


def keeps_kinds(fixed: Sizes) -> bool:
    """Whether the best block of every kind goes last: where no number of blocks was asked for."""
    return fixed.num_blocks is None
