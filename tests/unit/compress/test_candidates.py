"""Students run from their teacher's checkpoint, and certificates: one reading for all, resumable, little in memory."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch

from halflap.checkpoints.checkpoint import Checkpoint, load_model, write_checkpoint
from halflap.checkpoints.passes import Passes, carry
from halflap.checkpoints.shelf import Held, Shelf
from halflap.checkpoints.streamed import StreamedModel, largest_part
from halflap.commands.students import build
from halflap.compress.axes import Sizes
from halflap.compress.candidates import Source
from halflap.compress.importance import Importance, score_shapes
from halflap.compress.plan import PruningPlan
from halflap.compress.prune import apply_plan
from halflap.compress.ranking import plan_for
from halflap.compress.verify import verify
from halflap.models.layout import layout
from halflap.models.model import HybridModel, initialize
from halflap.models.presets import hymba, preset
from halflap.models.streams import Stream

HYMBA = hymba(4, hidden=32, mlp=24, heads=(4, 2), state=4, window=4, meta=3, vocab=64, context=64, original_context=16)
CONFIGS = {"hymba": HYMBA, "nemotron-h-tiny": dataclasses.replace(preset("nemotron-h-tiny"), vocab_size=64)}
SIZES = {
    "hymba": [Sizes(hidden_size=24), Sizes(intermediate_size=12, num_blocks=6)],
    "nemotron-h-tiny": [Sizes(64, 200, 8, 12, 10, drop_blocks=(2,)), Sizes(hidden_size=80)],
}
INPUTS: list[Any] = [
    (rows, None) for rows in torch.randint(0, 64, (3, 2, 16), generator=torch.Generator().manual_seed(0))
]
INPUTS[1] = (INPUTS[1][0], torch.tensor([[1] * 16, [1] * 5 + [2] * 6 + [3] * 2 + [0] * 3]))


@pytest.fixture(params=CONFIGS)
def teacher(request: pytest.FixtureRequest, tmp_path: Path) -> Checkpoint:
    model = HybridModel(CONFIGS[request.param])
    initialize(model, 0)
    return write_checkpoint(tmp_path / "teacher", model.config, model.state_dict().items(), dtype="bfloat16")


def plans_of(teacher: Checkpoint) -> list[PruningPlan]:
    (name,) = (name for name, config in CONFIGS.items() if config.family == teacher.config.family)
    generator = torch.Generator().manual_seed(0)
    widths = {key: torch.rand(shape, generator=generator) for key, shape in score_shapes(teacher.config).items()}
    depth = {"kl": torch.rand(len(teacher.config.blocks), generator=generator)}
    scores = Importance("random", widths, depth)
    return [plan_for(scores, teacher.digest, teacher.config, sizes) for sizes in SIZES[name]]


@torch.inference_mode()
def streamed(teacher: Checkpoint, shelf: Shelf | Held) -> Iterator[list[torch.Tensor]]:
    """Hidden states of every plan's student, and of the teacher last."""
    source = Source(teacher, torch.float32)
    passes = [source.cut(plan, plan.digest, INPUTS) for plan in plans_of(teacher)]
    passes.append(Passes("teacher", source.whole(), INPUTS))
    carry(passes, teacher.config, shelf)
    return iter([list(one.hidden_states(shelf)) for one in passes])


@torch.inference_mode()
def in_memory(teacher: Checkpoint) -> Iterator[list[torch.Tensor]]:
    model = load_model(teacher.path)
    models = [*(build(model, plan) for plan in plans_of(teacher)), model]
    return iter([[one.hidden_states(tokens, segments=parts) for tokens, parts in INPUTS] for one in models])


def same(found: list[list[torch.Tensor]], expected: list[list[torch.Tensor]]) -> bool:
    return all(map(torch.equal, chain(*found), chain(*expected)))


def test_students_together_are_those_in_memory_bit_for_bit(teacher: Checkpoint, tmp_path: Path) -> None:
    expected = list(in_memory(teacher))
    assert not torch.equal(expected[0][0][..., :8], expected[1][0][..., :8])
    for shelf in (Held(), Shelf(tmp_path / "shelf", "")):
        found = list(streamed(teacher, shelf))
        assert same(found, expected)


def test_each_tensor_is_read_once_for_all(teacher: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    counted: Counter[str] = Counter()
    read = Checkpoint.read
    monkeypatch.setattr(Checkpoint, "read", lambda self, name: (counted.update([name]), read(self, name))[1])
    list(streamed(teacher, Held()))
    again = 1 + teacher.config.tie_word_embeddings  # the embedding is the head
    assert counted == Counter({name: again if name == "embedding.weight" else 1 for name in layout(teacher.config)})


def test_weights_are_made_alike_within_autocast() -> None:
    """Of a product of two maps, as `linear` makes it, the narrow arithmetic of a pass around it rounds nothing."""
    model = HybridModel(HYMBA)
    initialize(model, 0)

    def doubled(names: Sequence[str]) -> Iterator[tuple[str, torch.Tensor]]:
        for name in names:
            weight = model.state_dict()[name]
            yield name, weight @ (2.1 * torch.eye(weight.shape[-1])) if weight.dim() == 2 else weight

    made = StreamedModel(HYMBA, doubled, torch.float32)
    expected = dict(doubled(list(layout(HYMBA))))
    with torch.autocast("cpu", torch.bfloat16), made.resident(0) as whole:
        assert torch.is_autocast_enabled("cpu")
        found = {name: tensor for name, tensor in whole.state_dict().items() if not tensor.is_meta}
    assert found and all(torch.equal(tensor, expected[name]) for name, tensor in found.items())


class Stops:
    """Lets so many steps through a block happen, then interrupts; remembers the blocks."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.steps, self.blocks = 10**6, list[int]()
        through = Stream.through

        def step(stream: Stream, index: int, block: Any) -> Stream:
            self.steps -= 1
            if self.steps < 0:
                raise KeyboardInterrupt
            self.blocks.append(index)
            return through(stream, index, block)

        monkeypatch.setattr(Stream, "through", step)


def test_killed_passes_go_on_at_their_block(
    teacher: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = list(in_memory(teacher))
    stops = Stops(monkeypatch)
    stops.steps = 31  # of 9, or of 6 where a student lacks the block, for each
    with pytest.raises(KeyboardInterrupt):
        list(streamed(teacher, Shelf(tmp_path, "these")))
    done, stops.steps = len(stops.blocks), 10**6
    found = list(streamed(teacher, Shelf(tmp_path, "these")))
    assert same(found, expected)
    steps = len(INPUTS) * (len(teacher.config.blocks) + sum(len(plan.keep_blocks) for plan in plans_of(teacher)))
    assert (
        steps <= len(stops.blocks) < steps + 9 < steps + done
    )  # no more than the block that was under way is repeated
    assert Shelf(tmp_path, "others").done is None


def test_cutting_leaves_the_teacher_as_it_is(teacher: Checkpoint) -> None:
    """In inference mode too, where PyTorch does not tell views: what is kept lies together, and is scaled."""
    shapes = score_shapes(teacher.config)
    widths = {key: torch.arange(shape[-1], 0, -1.0).expand(shape) for key, shape in shapes.items()}
    plan = plan_for(Importance("x", widths), teacher.digest, teacher.config, Sizes(hidden_size=24))
    assert plan.keep["hidden"] == tuple(range(24)) and plan.scales
    with torch.inference_mode():
        tensors = {name: tensor + 0 for name, tensor in teacher.tensors()}
        before = {name: tensor.clone() for name, tensor in tensors.items()}
        made = dict(apply_plan(plan, tensors.items()))
        assert all(torch.equal(tensor, before[name]) for name, tensor in tensors.items())
        assert not torch.equal(made["norm.weight"], before["norm.weight"][:24])


# ---- certificates


def write_student(teacher: Checkpoint, directory: Path) -> tuple[Checkpoint, PruningPlan]:
    plan = plans_of(teacher)[0]
    types = {name: teacher.dtypes[plan.teacher_name(name)] for name in layout(plan.student)}
    return write_checkpoint(directory, plan.student, apply_plan(plan, teacher.tensors()), dtype=types), plan


def test_a_killed_certificate_goes_on_to_the_same_numbers(
    teacher: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    student, plan = write_student(teacher, tmp_path / "student")
    tokens = INPUTS[0][0]
    whole = verify(student, teacher, plan, tokens)
    assert whole["passed"]
    stops = Stops(monkeypatch)
    assert verify(student, teacher, plan, tokens, tmp_path / "scratch") == whole
    steps, stops.steps, stops.blocks = len(stops.blocks), len(stops.blocks) // 2, []
    with pytest.raises(KeyboardInterrupt):
        verify(student, teacher, plan, tokens, tmp_path / "scratch")
    stops.steps, stops.blocks = steps, []
    assert verify(student, teacher, plan, tokens, tmp_path / "scratch") == whole
    assert len(stops.blocks) < 0.7 * steps and not any((tmp_path / "scratch").iterdir())


def test_no_more_than_a_part_as_stored_and_one_made_of_it_is_in_memory(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    weigh_passes: Callable[[int], list[int]],
    live_bytes: Callable[[], int],
) -> None:
    model = HybridModel(CONFIGS["nemotron-h-tiny"])
    initialize(model, 0)
    teacher = write_checkpoint(tmp_path / "t", model.config, model.state_dict().items(), dtype="bfloat16")
    del model
    student, plan = write_student(teacher, tmp_path / "s")
    _, most = largest_part(teacher.config)
    weighed = weigh_passes(5)
    monkeypatch.setattr(f"{__name__}.INPUTS", [(INPUTS[0][0][:1, :4], None)])
    before = live_bytes()
    assert verify(student, teacher, plan, INPUTS[0][0], tmp_path / "scratch")["passed"]
    assert max(weighed) - before < 1.1 * most * (2 + 8) + 40_000  # bfloat16, and float64
    weighed.clear()
    list(streamed(teacher, Shelf(tmp_path / "shelf", "")))
    assert 1.5 * most < max(weighed) - before < 1.1 * most * (2 + 4) + 40_000
