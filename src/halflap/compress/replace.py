"""What each variant of each block does to the teacher in that block's place (Puzzle, section 3.3).

The score of an option is the mean over tokens of KL(p_teacher || p_replaced), the teacher with that option alone.
Blocks before it are not run again: the stream is carried forward once and every replacement continues from there, so
that J options a block cost about J L / 2 passes over the tokens they are scored on. What reads the keys and values of a
dropped block still reads them, as in `depth.py`: its score is what its own output is worth.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from halflap.compress.axes import droppable_units
from halflap.compress.depth import finish, full_pass
from halflap.compress.library import WHOLE, Library, Option
from halflap.compress.plan import PruningPlan
from halflap.compress.prune import cut_block
from halflap.data.batch import Batch
from halflap.errors import HalflapError
from halflap.models.config import BlockConfig
from halflap.models.model import Block, HybridModel
from halflap.models.sharing import with_source
from halflap.ops.vocabulary_loss import kl_divergence_sum
from halflap.progress import Progress

Scores = Mapping[str, float]
"""By the name of the option; whole blocks are not in it, they do nothing."""


class Replacement(nn.Module):
    """A block of a student in its teacher: x (B, T, D) to (B, T, D).

    A plan may scale the whole residual stream, which leaves logits as they are (`correction.py`): x is scaled for the
    block and its output back.
    """

    def __init__(self, plan: PruningPlan, index: int) -> None:
        super().__init__()
        at = plan.keep_blocks.index(index)
        self.factor = plan.scales.get("embedding.weight", (1.0,))[0]
        self.block = Block(_among_all(plan, at, index), plan.student, index)

    def forward(self, x: Tensor, context: Any) -> Tensor:
        return self.block(x, context) if self.factor == 1 else self.block(x * self.factor, context) / self.factor


def _among_all(plan: PruningPlan, at: int, index: int) -> BlockConfig:
    """The student's block as it stands among all of the teacher's blocks: with the source that it has there."""
    attention = plan.teacher_config.blocks[index].attention
    return with_source(plan.student.blocks[at], None if attention is None else attention.key_value_source)


def replacement(
    model: HybridModel, plan: PruningPlan, index: int, trained: Mapping[str, Tensor] | None = None
) -> Replacement:
    """Block `index` of a plan's student, cut from the teacher's weights or, where it was trained, with those.

    Of the teacher no other block need be in memory.
    """
    with torch.device("meta"):
        made = Replacement(plan, index)
    tensors = trained or cut_block(plan, index, model.state_dict().items())
    made.block.load_state_dict({name: tensor.clone() for name, tensor in tensors.items()}, strict=True, assign=True)
    return made.to(next(model.blocks[index].parameters()).device).eval()


def replacement_scores(
    model: HybridModel,
    batches: Iterable[Batch],
    library: Library,
    make: Callable[[Option], Replacement],
    known: Scores | None = None,
    save: Callable[[Scores], None] = lambda scores: None,
) -> Scores:
    """Scores of all options but the whole blocks, in nats a token.

    `known` are taken as they are; `save` is called with all so far after each run of blocks that leave together, so
    that an interrupted call, given them as `known`, ends as if it had not been.
    """
    batches = list(batches)
    count = count_targets(batches)
    scores = dict(known or {})
    todo = [option for option in library.options if option.variant != WHOLE]
    if not (left := [option for option in todo if option.name not in scores]):
        return scores
    with torch.inference_mode(), Progress("replace blocks", len(todo), unit="variants") as progress:
        progress.start_at(len(todo) - len(left))
        passes = _Passes(model, batches)
        for unit in droppable_units(model.config):
            entry = passes.streams
            for index in unit:
                for option in _missing(todo, (index,), scores):
                    scores[option.name] = passes.score(make(option), passes.streams, index + 1) / count
                    progress.advance()
                passes.advance(index)  # after its replacements, which leave keys and values of their own
            for option in _missing(todo, unit, scores, dropped=True):
                scores[option.name] = passes.score(None, entry, unit[-1] + 1) / count
                progress.advance()
            save(scores)
    return scores


def count_targets(batches: Iterable[Batch]) -> float:
    """What the sums of the batches' tokens are divided by. Raises HalflapError without text."""
    count = sum(float(batch.weights.sum()) for batch in batches)
    if not count:
        raise HalflapError("no text was read, so no block can be replaced; give at least one document")
    return count


def _missing(options: Sequence[Option], blocks: tuple[int, ...], scores: Scores, dropped: bool = False) -> list[Option]:
    return [o for o in options if o.blocks == blocks and o.variant.dropped == dropped and o.name not in scores]


class _Passes:
    """The teacher's streams of all batches, carried from block to block, and its final states."""

    def __init__(self, model: HybridModel, batches: list[Batch]) -> None:
        self.model, self.batches = model, batches
        passes = [full_pass(model, batch) for batch in batches]
        self.full = [full for full, _, _ in passes]
        self.streams = [stream for _, stream, _ in passes]
        self.contexts = [context for _, _, context in passes]

    def advance(self, index: int) -> None:
        block = self.model.blocks[index]
        self.streams = [block(stream, c) for stream, c in zip(self.streams, self.contexts, strict=True)]

    def score(self, block: nn.Module | None, streams: Sequence[Tensor], following: int) -> float:
        """Sum over tokens of the divergence when `block`, or nothing, takes the streams to block `following`."""
        total = 0.0
        for place, (stream, batch) in enumerate(zip(streams, self.batches, strict=True)):
            context = self.contexts[place]
            out = stream if block is None else block(stream, context)
            final = finish(self.model, out, context, tuple(range(following)))
            total += divergence(self.model.head_weight, self.full[place], final, batch)
        return total


def divergence(head: Tensor, full: Tensor, replaced: Tensor, batch: Batch) -> float:
    """Sum over the tokens that have a target of KL(p_full || p_replaced), from final hidden states (B, T, D)."""
    used = batch.weights > 0
    return float(kl_divergence_sum(replaced[used], head, full[used], head, batch.weights[used]))
