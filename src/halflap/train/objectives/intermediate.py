"""Make a student's inner states those of its teacher: what the embedding gives, what blocks give, the x of an SSM.

A pair is one state of the student and one of the teacher; its loss is the mean squared difference of a token's channels
or 1 - their cosine (Puzzle's), summed over tokens with weight and over pairs. Where widths differ, a linear map from
the student's to the teacher's, one for all states of a kind and width, is learned beside the student and thrown away
after (Muralidharan et al. 2024). A teacher's state is dropped as soon as the student's has met it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from halflap.data.batch import Batch
from halflap.errors import HalflapError
from halflap.models.config import Mamba1Config, ModelConfig
from halflap.models.layout import dim_size, layout
from halflap.models.meta import at_text

State = Literal["embedding", "blocks", "mamba_x"]
Distance = Literal["mse", "cosine"]


class Place(NamedTuple):
    """Where a state is read: of which kind, and in which block (0 for the embedding)."""

    kind: State
    block: int


class Pair(NamedTuple):
    student: Place
    teacher: Place


def proportional_map(students: int, teachers: int) -> tuple[int, ...]:
    """The teacher's block for each of the student's: as far through the model, the last for the last."""
    return tuple((index + 1) * teachers // students - 1 for index in range(students))


def pair_states(
    student: ModelConfig,
    teacher: ModelConfig,
    states: Sequence[State],
    block_map: Sequence[int],
    blocks: Sequence[int] = (),
) -> tuple[Pair, ...]:
    """The pairs of the chosen kinds of states; blocks: of the student, all when empty.

    Raises HalflapError on a map or a block that does not exist, and when a kind of state has no pair.
    """
    _check_blocks(len(student.blocks), len(teacher.blocks), block_map, blocks)
    in_order = sorted(set(blocks)) or range(len(student.blocks))  # as a pass meets them
    chosen = [(index, block_map[index]) for index in in_order]
    found = {
        "embedding": [(0, 0)],
        "blocks": chosen,
        "mamba_x": [
            (own, other)
            for own, other in chosen
            if student.blocks[own].ssm is not None and type(student.blocks[own].ssm) is type(teacher.blocks[other].ssm)
        ],
    }
    for kind in states:
        if not found[kind]:
            raise HalflapError(
                f"intermediate state {kind!r} has no pair: none of the student's chosen blocks and the teacher's that "
                "they map to both have an SSM of the same kind; leave it out or correct the blocks"
            )
    return tuple(Pair(Place(kind, own), Place(kind, other)) for kind in states for own, other in found[kind])


class InnerStates(nn.Module):
    """The pairs' loss, and the maps it learns.

    kept_hidden: the teacher's channels that the student's residual stream was cut to, where their map then starts;
    other maps start random, by the seed. Parameters are float32. stream_scale: how many times the teacher's residual
    stream the student's is (`correct_norms` scales it where norms share an eps), taken out before states meet.
    """

    def __init__(
        self,
        student: ModelConfig,
        teacher: ModelConfig,
        pairs: Sequence[Pair],
        distance: Distance = "mse",
        kept_hidden: Sequence[int] | None = None,
        stream_scale: float = 1.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.pairs, self.distance, self.stream_scale = tuple(pairs), distance, stream_scale
        self.widths = [(_width(student, own), _width(teacher, other)) for own, other in self.pairs]
        self.projections = nn.ModuleDict()
        generator = torch.Generator().manual_seed(seed)
        for pair, (own, other) in zip(self.pairs, self.widths, strict=True):
            name = _projection_name(pair.student.kind, own, other)
            if own == other or name in self.projections:
                continue
            projection = nn.Linear(own, other, bias=False)
            with torch.no_grad():
                if pair.student.kind != "mamba_x" and kept_hidden is not None:
                    projection.weight.zero_()[list(kept_hidden), range(own)] = 1.0
                else:
                    projection.weight.copy_(torch.randn(other, own, generator=generator) * own**-0.5)
            self.projections[name] = projection

    @contextlib.contextmanager
    def of_teacher(self, teacher: Any, batch: Batch) -> Iterator[dict[Place, Tensor]]:
        """While it lasts, a pass of the teacher fills the dictionary with its states (B, T, channels)."""
        known: dict[Place, Tensor] = {}
        with _watched(teacher, [pair.teacher for pair in self.pairs], batch, known.__setitem__):
            yield known

    @contextlib.contextmanager
    def of_student(self, student: Any, batch: Batch, known: dict[Place, Tensor]) -> Iterator[list[Tensor]]:
        """While it lasts, a pass of the student fills the list with the sums (wide scalars) of the pairs."""
        sums: list[Tensor] = []
        numbers = {pair.student: number for number, pair in enumerate(self.pairs)}
        last = {pair.teacher: number for number, pair in enumerate(self.pairs)}

        def meet(place: Place, state: Tensor) -> None:
            number = numbers[place]
            teachers = self.pairs[number].teacher
            target = known.pop(teachers) if last[teachers] == number else known[teachers]
            own, other = self.widths[number]
            if place.kind != "mamba_x" and self.stream_scale != 1:
                state = state / self.stream_scale
            if own != other:
                state = self.projections[_projection_name(place.kind, own, other)](state)
            sums.append((DISTANCES[self.distance](_wide(state), _wide(target)) * batch.weights).sum())

        with _watched(student, list(numbers), batch, meet):
            yield sums


class WithProjections(nn.Module):
    """A student and what it learns beside: trained and saved together, while only the student is exported."""

    def __init__(self, student: Any, inner: InnerStates) -> None:
        super().__init__()
        self.student, self.inner = student, inner

    @property
    def config(self) -> ModelConfig:
        return self.student.config

    @property
    def blocks(self) -> nn.ModuleList:
        return self.student.blocks

    @property
    def head_weight(self) -> Tensor:
        return self.student.head_weight

    def hidden_states(self, tokens: Tensor, *, segments: Tensor | None = None) -> Tensor:
        """As `HybridModel.hidden_states` without a cache."""
        return self.student.hidden_states(tokens, segments=segments)


def _mse(state: Tensor, target: Tensor) -> Tensor:
    return (state - target).square().mean(-1)


def _cosine(state: Tensor, target: Tensor) -> Tensor:
    return 1 - F.cosine_similarity(state, target, dim=-1)


DISTANCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"mse": _mse, "cosine": _cosine}


@contextlib.contextmanager
def _watched(
    model: Any, places: Sequence[Place], batch: Batch, take: Callable[[Place, Tensor], None]
) -> Iterator[None]:
    """While it lasts, every pass hands the states at these places, at the text's tokens alone, to `take`."""
    rows = {place: _x_rows(model.config, place.block) for place in places if place.kind == "mamba_x"}

    def hook(place: Place) -> Callable[[nn.Module, Any, Tensor], None]:
        def read(module: nn.Module, arguments: Any, output: Tensor) -> None:
            state = output[..., rows[place]] if place in rows else output
            take(place, at_text(state, batch.tokens, batch.segments, model.config.num_meta_tokens))

        return read

    modules = {
        "embedding": lambda index: model.embedding,
        "blocks": lambda index: model.blocks[index],
        "mamba_x": lambda index: model.blocks[index].mixer.in_proj,
    }
    handles = [modules[place.kind](place.block).register_forward_hook(hook(place)) for place in dict.fromkeys(places)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _x_rows(config: ModelConfig, index: int) -> slice:
    """Rows of the block's input projection that give the SSM's x; the SSM's rows are its last."""
    ssm = config.blocks[index].ssm
    assert ssm is not None
    total = dim_size(layout(config)[f"blocks.{index}.mixer.in_proj.weight"][0])
    if isinstance(ssm, Mamba1Config):  # x z
        start = total - 2 * ssm.inner_size
    else:  # z x B C dt
        start = total - ssm.num_heads - ssm.conv_size
    return slice(start, start + ssm.inner_size)


def _width(config: ModelConfig, place: Place) -> int:
    if place.kind != "mamba_x":
        return config.hidden_size
    ssm = config.blocks[place.block].ssm
    assert ssm is not None
    return ssm.inner_size


def _projection_name(kind: State, own: int, other: int) -> str:
    return f"{'mamba_x' if kind == 'mamba_x' else 'hidden'}_{own}_{other}"


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _check_blocks(students: int, teachers: int, block_map: Sequence[int], blocks: Sequence[int]) -> None:
    if len(block_map) != students or not all(0 <= block < teachers for block in block_map):
        raise HalflapError(
            f"the block map is {list(block_map)}; it must name one of the teacher's blocks 0 to {teachers - 1} for "
            f"each of the student's {students}: correct --block-map"
        )
    for block in blocks:
        if not 0 <= block < students:
            raise HalflapError(
                f"intermediate block {block} does not exist; the student has blocks 0 to {students - 1}: correct "
                "--intermediate-blocks"
            )
