"""Variants of a model read a block at a time: the scores of the model in memory, killed or not, in few streams."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from halflap.checkpoints import passes
from halflap.checkpoints.checkpoint import Checkpoint, load_model, write_checkpoint
from halflap.checkpoints.passes import stream_bytes
from halflap.checkpoints.shelf import Shelf
from halflap.checkpoints.streamed import StreamedModel, largest_part
from halflap.compress.grid import SearchSpace
from halflap.compress.library import WHOLE, Library, Option, library_of
from halflap.compress.local import distill_block, lessons_of, lessons_streamed
from halflap.compress.metrics import random_of
from halflap.compress.partial import Scratch
from halflap.compress.plan import PruningPlan
from halflap.compress.ranking import plan_of_variants
from halflap.compress.replace import Replacement, Scores, replacement, replacement_scores
from halflap.compress.replace_streamed import replacement_scores_streamed
from halflap.data.batch import Batch
from halflap.models.config import MLPConfig
from halflap.models.model import HybridModel, initialize
from halflap.models.presets import hymba, preset
from halflap.models.streams import Stream
from halflap.train.config import Fit

CONFIGS = {
    "nemotron_h": dataclasses.replace(preset("nemotron-h-tiny"), vocab_size=64),
    "llama": dataclasses.replace(preset("llama-tiny"), vocab_size=64),
    "hymba": hymba(6, hidden=32, mlp=24, heads=(4, 2), state=4, window=4, meta=3, vocab=64, context=64,
                   original_context=16),
}  # fmt: skip
SPACE = SearchSpace(intermediate_size=(16,), max_width_cut=0.5)
PACKED = torch.tensor([[1] * 7 + [2] * 5, [1] * 9 + [0] * 3])


def batches() -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    found = []
    for segments in (None, PACKED):
        tokens = torch.randint(0, 64, (2, 12), generator=generator)
        weights = torch.ones(2, 12) if segments is None else (segments > 0).float()
        found.append(Batch(tokens, tokens.roll(-1, 1), weights, segments))
    return found


class Case:
    """A teacher's checkpoint in bfloat16, its library, and the scores of the model in memory."""

    def __init__(self, family: str, directory: Path) -> None:
        model = HybridModel(CONFIGS[family])
        initialize(model, 0)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("proj.weight"):
                    parameter.mul_(5)
        tensors = model.state_dict().items()
        self.checkpoint: Checkpoint = write_checkpoint(directory / family, model.config, tensors, dtype="bfloat16")
        self.library: Library = library_of(model.config, SPACE)
        self.importance = random_of(model.config, 0)
        self.memory = load_model(self.checkpoint.path, "float32")
        self.known = {option.name: 0.0 for option in self.library.options if self.library.follows(option)}
        self.expected = replacement_scores(
            self.memory, batches(), self.library, lambda option: self.make(self.memory, option), self.known
        )

    def plan(self, option: Option) -> PruningPlan:
        variants = self.library.alone(option)
        return plan_of_variants(self.importance, "t" * 64, self.checkpoint.config, variants, "masked")

    def make(self, model: HybridModel, option: Option) -> Replacement:
        return replacement(model, self.plan(option), option.blocks[0])

    def streamed(self, scratch: Path, known: Scores | None = None, saved: list[Scores] | None = None) -> Scores:
        model = StreamedModel.of(self.checkpoint, torch.float32)
        return replacement_scores_streamed(
            model,
            batches(),
            self.library,
            lambda option: self.make(model.shell, option),
            Scratch(scratch, "these"),
            known or self.known,
            [].append if saved is None else saved.append,
        )

    def room_for(self, branches: int) -> int:
        """Bytes of so many branches and the trunk."""
        each = sum(
            stream_bytes(self.checkpoint.config, self.memory.context_of(b.tokens, b.segments).positions.numel(),
                         torch.float32)
            for b in batches()
        )  # fmt: skip
        return (branches + 1) * each


@pytest.fixture(scope="module", params=CONFIGS)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(request.param, tmp_path_factory.mktemp("replace"))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """Of Hymba, whose blocks read each other's keys and values, and of which few variants are left."""
    made = Case("hymba", tmp_path_factory.mktemp("tiny"))
    some = [o for o in made.library.options if o.variant == WHOLE or o.blocks[0] in (1, 2, 5, 6)]
    made.library = dataclasses.replace(made.library, options=tuple(some))
    made.expected = {name: score for name, score in made.expected.items() if name in {o.name for o in some}}
    return made


def test_scores_are_equal_bit_for_bit(case: Case, tmp_path: Path) -> None:
    """The same operations in the same order, so no tolerance: every kind of variant, meta tokens, packed rows."""
    found = case.streamed(tmp_path)
    assert found == case.expected and not any(tmp_path.iterdir())
    kinds = {"nemotron_h": "MLP Mamba query pool linear dropped", "llama": "MLP query pool linear dropped"}
    kinds["hymba"] = "MLP query window linear dropped"
    assert {kind for o in case.library.options for kind in kinds_of(o)} >= set(
        kinds[case.checkpoint.config.family].split()
    )


def kinds_of(option: Option) -> set[str]:
    sizes, change = option.variant.sizes, option.variant.change
    has = {
        "MLP": sizes.intermediate_size,
        "Mamba": sizes.mamba_num_heads,
        "query": sizes.num_attention_heads,
        "pool": change.pool > 1,
        "linear": change.linear,
        "window": change.window,
        "dropped": option.variant.dropped,
    }
    return {kind for kind, value in has.items() if value}


@pytest.mark.parametrize("branches", [1, 4])
def test_readings_are_bounded_by_bytes(
    tiny: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, branches: int
) -> None:
    """A reading serves as many variants as there is room for, and begins where the one before has left some."""
    monkeypatch.setattr(passes, "STREAMS_AT_ONCE", tiny.room_for(branches))
    most, opened, commit = [0], Counter[Any](), Shelf.commit
    resident = StreamedModel.resident

    def weigh(shelf: Shelf, notes: Any = None) -> None:
        most[0] = max(most[0], len(shelf._new_places))
        commit(shelf, notes or {})

    def count(model: StreamedModel, part: Any) -> Any:
        opened[part] += 1
        return resident(model, part)

    monkeypatch.setattr(Shelf, "commit", weigh)
    monkeypatch.setattr(StreamedModel, "resident", count)
    assert tiny.streamed(tmp_path) == tiny.expected
    assert most[0] == (branches + 1) * len(batches())
    readings = -(-len(tiny.expected) // branches)
    last = len(tiny.checkpoint.config.blocks) - 1
    assert opened["entry"] == opened[0] == 1 and opened["exit"] == opened[last] == readings > opened[3] > opened[1]


@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
def test_a_killed_scoring_goes_on_at_its_block(
    tiny: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, share: float
) -> None:
    monkeypatch.setattr(passes, "STREAMS_AT_ONCE", tiny.room_for(5))
    done, most, through = [0], [10**6], Stream.through

    def step(stream: Stream, index: int, block: Any) -> Stream:
        if done[0] == most[0]:
            raise KeyboardInterrupt
        done[0] += 1
        return through(stream, index, block)

    monkeypatch.setattr(Stream, "through", step)
    assert tiny.streamed(tmp_path) == tiny.expected
    count = done[0]
    done[0], most[0] = 0, round(share * count)
    saved: list[Scores] = []
    with pytest.raises(KeyboardInterrupt):
        tiny.streamed(tmp_path, saved=saved)
    done[0], most[0] = 0, 10**6
    known = dict(saved[-1]) if saved else {}
    assert len(known) < len(tiny.expected)
    assert list(tiny.streamed(tmp_path, known).items()) == list(tiny.expected.items())
    assert done[0] <= count - round(share * count) + 2 * 8  # the block under way: at most eight streams of two batches


def test_scores_that_are_gone_are_made_again(tiny: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Streams that have passed the blocks of what is missing are of no use then."""
    monkeypatch.setattr(passes, "STREAMS_AT_ONCE", tiny.room_for(5))

    class Killed(list[Scores]):
        def append(self, scores: Scores) -> None:
            super().append(scores)
            if len(scores) == 7:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tiny.streamed(tmp_path, saved=Killed())
    assert tiny.streamed(tmp_path) == tiny.expected
    known = {name: score for name, score in tiny.expected.items() if not name.startswith("5 ")}
    assert tiny.streamed(tmp_path, known) == tiny.expected


def test_variants_learn_the_same(tiny: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From streams on the disk, and killed at a block, what they learn from passes up to their block, bit for bit."""
    settings, meta = Fit(learning_rate=1e-3, schedule="constant", weight_decay=0.0), 3
    cut = {o.blocks[0]: o for o in tiny.library.options if o.variant.sizes.intermediate_size or o.variant.change.window}
    blocks = [i for i in cut if isinstance(tiny.memory.config.blocks[i], MLPConfig)][:2]
    text = batches()
    expected = {}
    for index in blocks:
        lessons = lessons_of(tiny.memory, text.__getitem__, index)
        expected[index] = learn(tiny.make(tiny.memory, cut[index]), index, lessons, settings, meta)
    model = StreamedModel.of(tiny.checkpoint, torch.float32)
    found: dict[int, Any] = {}
    for index, lessons in lessons_streamed(model, text, Scratch(tmp_path, ""), blocks):
        found[index] = learn(tiny.make(model.shell, cut[index]), index, lessons, settings, meta)
        break  # as if killed here
    through, seen = Stream.through, list[int]()
    monkeypatch.setattr(Stream, "through", lambda s, i, b: (seen.append(i), through(s, i, b))[1])
    for index, lessons in lessons_streamed(model, text, Scratch(tmp_path, ""), blocks[1:]):
        found[index] = learn(tiny.make(model.shell, cut[index]), index, lessons, settings, meta)
    assert min(seen) == blocks[0] and not any(tmp_path.iterdir())
    for index in blocks:
        assert found[index].keys() == expected[index].keys()
        assert all(torch.equal(tensor, expected[index][name]) for name, tensor in found[index].items())


def learn(variant: Replacement, index: int, lessons: Any, settings: Fit, meta: int) -> dict[str, torch.Tensor]:
    distill_block([variant], index, lessons, len(batches()), settings, meta)
    return variant.block.state_dict()


def test_no_more_than_a_part_and_a_variant_is_in_memory(
    tmp_path: Path, weigh_passes: Callable[[int], list[int]], live_bytes: Callable[[], int]
) -> None:
    case = Case("nemotron_h", tmp_path)
    name, most = largest_part(case.checkpoint.config)
    some = [option for option in case.library.options if option.blocks[0] < 4]
    case.library = dataclasses.replace(case.library, options=tuple(some))
    before, weighed = live_bytes(), weigh_passes(9)
    case.streamed(tmp_path / "scratch")
    assert name.startswith("block")
    assert 4 * most < max(weighed) - before < 1.1 * 2 * 4 * most + 60_000
