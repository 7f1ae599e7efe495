"""Block-local distillation (Puzzle, section 3.2): each variant learns what its block adds, on the teacher's own input.

    loss = MSE(o_teacher, o_variant) / MSE(o_teacher, 0)          o: what the mixer adds to the residual stream

The means are over the tokens of documents: padding and meta tokens are left out. Blocks do not know of one another, so
each is trained by itself and its variants side by side on the same stream. What was learnt stands in a file a variant,
named by what the plan makes of the block, so that every plan finds the blocks that it shares with the library.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from halflap.checkpoints.shelf import STREAMS, Shelf
from halflap.checkpoints.streamed import ENTRY, StreamedModel
from halflap.compress.axes import block_of
from halflap.compress.branches import TRUNK, Sweep
from halflap.compress.partial import Scratch
from halflap.compress.plan import PruningPlan
from halflap.compress.prune import scale
from halflap.compress.replace import Replacement
from halflap.data.batch import Batch
from halflap.files import atomic_write
from halflap.models.context import SequenceContext
from halflap.models.layout import layout
from halflap.models.meta import at_text
from halflap.models.model import Block, HybridModel
from halflap.progress import Progress
from halflap.train.config import Fit
from halflap.train.optim import learning_rate, make_optimizer, set_learning_rate

FORMAT = "halflap-trained-block-1"


class Lesson(NamedTuple):
    """What a block is given on a batch, the stream (B, T, D) and the pass's context, and what it adds (B, T, D)."""

    batch: Batch
    stream: Tensor
    context: SequenceContext
    added: Tensor


Lessons = Callable[[int], Lesson]
"""By the number of the step."""


def distill_block(
    variants: Sequence[Replacement], index: int, lessons: Lessons, steps: int, settings: Fit, meta: int
) -> list[float]:
    """Train variants of block `index` in place, a batch a step; their losses on the last batch, 1 is nothing learnt.

    meta: tokens before every document.
    """
    parameters = [dict(variant.block.named_parameters()) for variant in variants]
    optimizers = [make_optimizer(own, settings) for own in parameters]
    losses = [1.0] * len(variants)
    with Progress(f"distil variants of block {index}", steps, unit="steps") as progress:
        for step in range(steps):
            batch, stream, context, added = lessons(step)
            scale_of = _of_text(added, batch, meta).square().mean().clamp(min=torch.finfo(added.dtype).tiny)
            for place, (variant, optimizer) in enumerate(zip(variants, optimizers, strict=True)):
                missed = variant(stream, context) - stream - added
                loss = _of_text(missed, batch, meta).square().mean() / scale_of
                loss.backward()
                if settings.clip:
                    nn.utils.clip_grad_norm_(parameters[place].values(), settings.clip)
                set_learning_rate(optimizer, learning_rate(settings, step + 1, steps))
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                losses[place] = float(loss.detach())
            progress.note(loss=f"{sum(losses) / len(losses):.3g}")
            progress.advance()
    return losses


def _of_text(states: Tensor, batch: Batch, meta: int) -> Tensor:
    """Rows (N, D) of the tokens of documents, of states (B, L, D) with `meta` meta tokens before each document."""
    text = at_text(states, batch.tokens, batch.segments, meta)
    return text.flatten(0, 1) if batch.segments is None else text[batch.segments > 0]


class _Reached(Exception):
    """The stream has come to the block; carries it and the pass's context."""


def lessons_of(model: HybridModel, batches: Callable[[int], Batch], index: int) -> Lessons:
    """Of a block of a model in memory: every step is a pass up to it."""

    def stop(block: nn.Module, arguments: tuple[Any, ...]) -> None:
        raise _Reached(*arguments[:2])

    @torch.no_grad()
    def lesson(step: int) -> Lesson:
        batch = batches(step).to(model.head_weight.device)
        handle = model.blocks[index].register_forward_pre_hook(stop)
        try:
            model.hidden_states(batch.tokens, segments=batch.segments)
        except _Reached as reached:
            stream, context = reached.args
        finally:
            handle.remove()
        return Lesson(batch, stream, context, model.blocks[index](stream, context) - stream)

    return lesson


def lessons_streamed(
    model: StreamedModel, batches: Sequence[Batch], scratch: Scratch, blocks: Sequence[int]
) -> Iterator[tuple[int, Lessons]]:
    """The same of these blocks, ascending, of a model that is read a block at a time, each while it is in memory.

    batches: of all steps. Their streams, 4 D bytes a token and twice while they pass a block, lie in the scratch
    directory; a killed call, given the blocks that are left, goes on after the last block that was passed.
    """
    assert scratch.directory is not None
    shelf = Shelf(scratch.directory / STREAMS, scratch.made_from)
    if shelf.done is not None and shelf.done > blocks[0]:
        shelf.remove()
        shelf = Shelf(shelf.directory, shelf.made_from)
    sweep = Sweep(model, [batch.to(model.device) for batch in batches], shelf, 0)
    if shelf.done is None:
        with torch.no_grad(), model.resident(ENTRY):
            sweep.enter()
        shelf.commit()
    for index, block in model.blocks(shelf.done or 0):
        if index in blocks:
            yield index, partial(_streamed_lesson, sweep, block)
        if index == blocks[-1]:
            break
        with torch.no_grad():
            sweep.advance(index, block)
        shelf.commit()
    shelf.remove()


@torch.no_grad()
def _streamed_lesson(sweep: Sweep, block: Block, step: int) -> Lesson:
    stream = sweep.read(TRUNK, step)
    added = block(stream.hidden, stream.context) - stream.hidden
    return Lesson(sweep.batches[step], stream.hidden, stream.context, added)


# ---- files


def block_file(directory: Path, plan: PruningPlan, index: int) -> Path:
    """Where the trained form of what a plan makes of block `index` stands."""
    made = {
        "teacher": plan.teacher,
        "keep": {name: kept for name, kept in sorted(plan.keep.items()) if block_of(name) == index},
        "change": dataclasses.asdict(plan.changes[index]) if index in plan.changes else None,
        "norm_correction": plan.norm_correction,
    }
    key = hashlib.sha256(json.dumps(made, sort_keys=True).encode()).hexdigest()
    return directory / f"{index:03d}-{key[:16]}.safetensors"


def save_block(directory: Path, plan: PruningPlan, index: int, trained: Replacement) -> None:
    """Write a trained block and the factors that its plan gave its parameters."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in trained.block.state_dict().items()}
    header = {"format": FORMAT, "scales": {name: plan.factors(index, name) for name in tensors}}
    with atomic_write(block_file(directory, plan, index)) as file:
        file.write(safetensors.torch.save(tensors, {"halflap": json.dumps(header)}))


def trained_block(directory: Path, plan: PruningPlan, index: int) -> dict[str, Tensor]:
    """Parameters of a trained block by their names inside it, with the factors of this plan; empty when none is there.

    The plan of a whole student may scale the residual stream otherwise than that of one block (`correction.py`).
    """
    file = block_file(directory, plan, index)
    if not file.exists():
        return {}
    with safetensors.safe_open(str(file), "pt") as stored:
        before = json.loads(stored.metadata()["halflap"])["scales"]
        tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
    dims, at = layout(plan.student), plan.keep_blocks.index(index)
    for name, tensor in tensors.items():
        old, new = tuple(before[name]), plan.factors(index, name)
        if old != new:
            count = max(len(old), len(new))
            pairs = zip(old * (count // len(old)), new * (count // len(new)), strict=True)
            factors = tuple(after / previous for previous, after in pairs)
            tensors[name] = scale(tensor, factors, dims[f"blocks.{at}.{name}"][0])
    return tensors


def with_trained(
    directory: Path, plan: PruningPlan, tensors: Iterable[tuple[str, Tensor]]
) -> Iterator[tuple[str, Tensor]]:
    """The parameters of a plan's student in the order of its layout, those of trained blocks as they have learnt."""
    at, found = None, dict[str, Tensor]()
    for name, tensor in tensors:
        if (own := block_of(name)) != at:
            at, found = own, {} if own is None else trained_at(directory, plan, own)
        yield name, found.get(name, tensor)


def trained_at(directory: Path, plan: PruningPlan, at: int) -> dict[str, Tensor]:
    """Parameters of block `at` of a plan's student by the student's names, empty where it was not trained."""
    own = trained_block(directory, plan, plan.keep_blocks[at])
    return {f"blocks.{at}.{name}": tensor for name, tensor in own.items()}


def trained_tensors(directory: Path, plan: PruningPlan) -> dict[str, Tensor]:
    """Parameters of all trained blocks of a plan's student, by the student's names."""
    found: dict[str, Tensor] = {}
    for at in range(len(plan.keep_blocks)):
        found |= trained_at(directory, plan, at)
    return found
