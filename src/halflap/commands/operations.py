"""Floating-point operations of the verbs, from recipes and shapes alone; students are counted as their teacher.

A forward pass is what `models/count.py` says; a backward pass costs two. All are upper bounds: text may end earlier.
"""

from __future__ import annotations

from typing import Any

from halflap.commands import elastic
from halflap.commands.config_compress import CompressRecipe, ScoreRecipe, SearchRecipe
from halflap.commands.scoring import DEPTH_SHARE
from halflap.commands.searching import FIRST_LOOK_SHARE
from halflap.commands.sections import REMOVING, LossSettings, ScoreSettings, SearchSettings
from halflap.commands.students import has_ceiling
from halflap.compress.axes import depth_units
from halflap.compress.grid import SearchSpace
from halflap.compress.library import WHOLE, library_of
from halflap.compress.search import stages
from halflap.models.config import ModelConfig
from halflap.models.count import flops_per_token

TRAINING = 3
"""Forward passes that a token costs a model which is trained on it."""
TRAINED = ("pretrain", "distill")
SCORED = {"activation": 1, "taylor": TRAINING}
"""Forward passes that a calibration token costs, by metric; others read no text."""


def of(verb: str, recipe: Any, main: ModelConfig, teacher: ModelConfig | None, tokens: int, length: int) -> int:
    """Of a whole run; tokens and length: those that it trains on or reads, in rows of that length."""
    if isinstance(recipe, ScoreRecipe):
        return score(recipe.settings, main, tokens, length)
    if isinstance(recipe, SearchRecipe):
        values = max(1, len(recipe.sweep) - 1)
        return search(recipe.settings, recipe.space, main, length, values)
    if isinstance(recipe, CompressRecipe):
        return compress(recipe, main, length)
    total = tokens * flops_per_token(main, length, "prefill") * (TRAINING if verb in TRAINED else 1)
    if verb == "distill":
        total += tokens * taught(recipe.loss_settings) * flops_per_token(teacher or main, length, "prefill")
    return total


def taught(loss: LossSettings) -> int:
    """Forward passes of the teacher that a token of training costs."""
    return 0 if loss.loss == "next_token" else 1


def score(settings: ScoreSettings, config: ModelConfig, tokens: int, length: int) -> int:
    """Of importance: a pass for widths and, where that does not rank blocks too, passes without each of them."""
    if settings.metric == "random":
        return 0
    each, part = flops_per_token(config, length, "prefill"), tokens // DEPTH_SHARE
    total = tokens * each * SCORED.get(settings.metric, 0)
    if settings.depth_metric is not None and settings.depth_metric not in REMOVING:
        with_widths = {"block_influence": "activation", "taylor": "taylor"}[settings.depth_metric]
        return total + (0 if settings.metric == with_widths else part * each * SCORED[with_widths])
    blocks, leave = len(config.blocks), len(depth_units(config)[0])
    for gone in range(0, settings.depth_iterative or leave, leave):
        left = (blocks - gone) / blocks  # of the work of a pass, about
        total += part * round(left * (2 * each + (blocks - gone) * _rest_of_pass(config, length)))
    return total


def _rest_of_pass(config: ModelConfig, length: int) -> int:
    """Of a token, from a block to the end: half of the blocks on average, and the head."""
    head = 2 * config.hidden_size * config.vocab_size
    return head + (flops_per_token(config, length, "prefill") - head) // 2


def search(settings: SearchSettings, space: SearchSpace, config: ModelConfig, length: int, values: int = 1) -> int:
    """Of choosing a student for each of so many values of a budget, which share the scores of method puzzle."""
    each = flops_per_token(config, length, "prefill")
    with_teacher = settings.method == "minipuzzle"
    total = (settings.shortlist + with_teacher) * settings.score_tokens * each
    if settings.method != "puzzle" and settings.first_look > settings.shortlist:
        few = settings.score_tokens // FIRST_LOOK_SHARE
        total += (settings.first_look + with_teacher) * few * each
    if settings.shortlist_tokens:
        rounds = stages(
            min(settings.refined, settings.shortlist), settings.shortlist_tokens, settings.rounds == "halving"
        )
        seen = 0
        for one in rounds:
            total += one.candidates * ((one.tokens - seen) * TRAINING + settings.score_tokens) * each
            seen = one.tokens
        total += seen * each  # the teacher reads each batch once for all
    return values * total + (_variants(settings, space, config, length) if settings.method == "puzzle" else 0)


def _variants(settings: SearchSettings, space: SearchSpace, config: ModelConfig, length: int) -> int:
    """Of method puzzle: each variant in the teacher's place and, where they learn first, that."""
    tried = [option for option in library_of(config, space).options if option.variant != WHOLE]
    half, head = _rest_of_pass(config, length), 2 * config.hidden_size * config.vocab_size
    block = (flops_per_token(config, length, "prefill") - head) // len(config.blocks)
    learning = sum(not option.variant.dropped for option in tried) * TRAINING * block + len(config.blocks) * half
    return settings.replacement_tokens * len(tried) * half + settings.block_tokens * learning


def compress(recipe: CompressRecipe, config: ModelConfig, length: int) -> int:
    """Of importance, search, distillation, controls and judgements, in all steps; and of correcting the teacher."""
    loss, steps = recipe.loss_settings, recipe.loss_settings.steps
    each = flops_per_token(config, length, "prefill")
    sizes = 1 if recipe.elastic is None else len(elastic.budgets_of(recipe)[1])
    measured = steps - (recipe.importance is not None)
    total = measured * score(recipe.score_settings, config, recipe.calibration_tokens, length)
    if has_ceiling(recipe.budgets) or recipe.elastic is not None:
        total += steps * search(recipe.settings, recipe.space, config, length, sizes)
    learning = TRAINING + taught(loss)
    last = recipe.tokens - recipe.tokens // steps * (steps - 1)
    passes = recipe.tokens * learning + TRAINING * loss.teacher_correction
    passes += last * sum(TRAINING if name == "scratch" else learning for name in recipe.controls)
    judged = steps * 3 + 2 * (sizes - 1) + sum(1 if name == "scratch" else 2 for name in recipe.controls)
    return total + (passes + judged * recipe.eval_tokens) * each
