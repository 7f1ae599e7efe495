"""Scores of variants in the teacher's place: equal to those of whole models with one block replaced; resuming."""

from __future__ import annotations

import copy
import dataclasses
import json
from typing import Any

import pytest
import torch

from halflap.commands.students import build
from halflap.compress.grid import SearchSpace
from halflap.compress.importance import Importance
from halflap.compress.kinds import SHARED
from halflap.compress.library import WHOLE, Library, Option, library_of
from halflap.compress.metrics import collect
from halflap.compress.plan import PruningPlan
from halflap.compress.ranking import plan_of_variants
from halflap.compress.replace import Replacement, Scores, replacement, replacement_scores
from halflap.data.batch import Batch
from halflap.errors import HalflapError
from halflap.models.config import ModelConfig
from halflap.models.model import HybridModel, initialize
from halflap.models.presets import hymba, preset

TEACHER = "t" * 64
CONFIGS = {
    "nemotron_h": dataclasses.replace(preset("nemotron-h-tiny"), vocab_size=64),
    "llama": dataclasses.replace(preset("llama-tiny"), vocab_size=64),
    "hymba": hymba(6, hidden=32, mlp=24, heads=(4, 2), state=4, window=4, meta=3, vocab=64, context=64,
                   original_context=16),
}  # fmt: skip
FEW = SearchSpace(intermediate_size=(16,), max_width_cut=0.5)
SPACES = {"nemotron_h": dataclasses.replace(FEW, mamba_num_heads=(8,), mamba_head_dim=(4,))}


def batches() -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    found = []
    for segments in (None, torch.tensor([[1] * 7 + [2] * 5, [1] * 9 + [0] * 3])):
        tokens = torch.randint(0, 64, (2, 12), generator=generator)
        weights = torch.ones(2, 12) if segments is None else (segments > 0).float()
        found.append(Batch(tokens, tokens.roll(-1, 1), weights, segments))
    return found


class Case:
    """A teacher in float64 with importance, and its library."""

    def __init__(self, config: ModelConfig, correction: str = "masked") -> None:
        self.model, self.correction = HybridModel(config).double().eval(), correction
        initialize(self.model, 0)
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                if name.endswith("proj.weight"):
                    parameter.mul_(1 / (0.02 * parameter.shape[1] ** 0.5))
        self.library = library_of(config, SPACES.get(config.family, FEW), length=12)
        self.importance: Importance = collect(self.model, batches(), "activation", teacher=TEACHER)

    def plan(self, option: Option) -> PruningPlan:
        variants = self.library.alone(option)
        return plan_of_variants(self.importance, TEACHER, self.model.config, variants, self.correction)

    def make(self, option: Option) -> Replacement:
        return replacement(self.model, self.plan(option), option.blocks[0])

    def whole_model(self, option: Option) -> HybridModel:
        """The slow way: the model with the block replaced; a dropped one writes nothing, so others may read of it."""
        if not option.variant.dropped:
            return build(self.model, self.plan(option))
        model = copy.deepcopy(self.model)
        with torch.no_grad():
            for index in option.blocks:
                for name, parameter in model.blocks[index].mixer.named_parameters():
                    if name in ("out_proj.weight", "o_proj.weight", "down_proj.weight"):
                        parameter.zero_()
        return model


def slow_score(case: Case, option: Option) -> float:
    replaced, total, count = case.whole_model(option), 0.0, 0.0
    with torch.inference_mode():
        for batch in batches():
            full, other = (m(batch.tokens, segments=batch.segments).log_softmax(-1) for m in (case.model, replaced))
            kl = (full.exp() * (full - other)).sum(-1)
            total, count = total + float((kl * batch.weights).sum()), count + float(batch.weights.sum())
    return total / count


@pytest.mark.parametrize("correction", ["masked", "none", "calibrated"])
@pytest.mark.parametrize("family", CONFIGS)
def test_scores_equal_whole_models_with_one_block_replaced(family: str, correction: str) -> None:
    case = Case(CONFIGS[family], correction)
    found = replacement_scores(case.model, batches(), case.library, case.make)
    assert set(found) == {option.name for option in case.library.options if option.variant != WHOLE}
    for option in case.library.options:
        if option.variant == WHOLE:
            continue
        if case.library.follows(option):  # whoever reads keys and values sees the window of the block that made them
            assert found[option.name] == pytest.approx(0, abs=1e-12), option.name
            continue
        slow = slow_score(case, option)  # float64 but for float32 inside some norms; a part of it cancels in the KL
        assert found[option.name] == pytest.approx(slow, rel=1e-6, abs=1e-9), option.name
        assert slow > 1e-9


def test_a_lone_mamba_block_shares_its_eps_with_the_stream() -> None:
    """The plan of its replacement scales the residual stream, which the rest of the teacher does not."""
    tiny = CONFIGS["nemotron_h"]
    case = Case(dataclasses.replace(tiny, blocks=(*tiny.blocks[:2], tiny.blocks[3])))
    option = next(o for o in case.library.options if o.variant.sizes.mamba_num_heads)
    assert "embedding.weight" in case.plan(option).scales
    found = replacement_scores(case.model, batches(), case.library, case.make)
    assert found[option.name] == pytest.approx(slow_score(case, option), rel=1e-6, abs=1e-9)


def test_an_interrupted_scoring_goes_on_to_the_same_bytes() -> None:
    case = Case(CONFIGS["hymba"])
    saved: list[str] = []

    def save(scores: Scores) -> None:
        saved.append(json.dumps(scores))

    whole = replacement_scores(case.model, batches(), case.library, case.make, save=save)
    made: list[Any] = []

    def make(option: Option) -> Replacement:
        made.append(option)
        return case.make(option)

    again = replacement_scores(case.model, batches(), case.library, make, known=json.loads(saved[2]))
    assert json.dumps(again) == json.dumps(whole) == saved[-1]
    assert {o.name for o in made}.isdisjoint(json.loads(saved[2])) and made
    made.clear()
    assert replacement_scores(case.model, [*batches()], case.library, make, known=whole) == whole and not made


def test_shared_keys_and_values_are_left_alone() -> None:
    library = library_of(CONFIGS["hymba"])
    axes = {"num_key_value_heads", "mamba_head_dim"}
    assert SHARED == {"kv", "value_channel"}
    for option in library.options:
        attention = CONFIGS["hymba"].blocks[option.blocks[0]].attention
        if attention is not None and attention.key_value_source is not None:
            assert not any(getattr(option.variant.sizes, name) for name in axes)


def test_no_text_is_an_error() -> None:
    case = Case(CONFIGS["llama"])
    with pytest.raises(HalflapError, match="no text was read, so no block can be replaced"):
        replacement_scores(case.model, [], Library(case.model.config, (), 0), case.make)
