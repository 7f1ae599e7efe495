"""Importance of a model that does not fit in memory: the numbers of `metrics.collect` and `depth.depth_scores`, from
one reading of the weights.

With one block in memory there is no coming back to an earlier one, so a removed block is a stream of its own: at block
k the calibration text passes with hooks, then the k streams that each lack one earlier block pass too, and a new one
begins that lacks block k. The operations are those of the model in memory, in the same order within every sum, so the
scores are equal bit for bit. Streams lie on the disk between blocks (`checkpoints/shelf.py`): of T tokens for widths
and S of them for depth, hidden size D, in float32, 4 D (T + S L) bytes, twice while a block is worked on.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
from collections.abc import Sequence

import torch
from torch import Tensor

from halflap.checkpoints.shelf import STREAMS, Shelf
from halflap.checkpoints.streamed import ENTRY, EXIT, StreamedModel
from halflap.compress.check import check_scores
from halflap.compress.depth import DEPTH_METRICS, add_rows, compare_rows, scores_of, title
from halflap.compress.importance import Importance, Scoring
from halflap.compress.metrics import random_of, weight_norm_of
from halflap.compress.partial import Scratch, Sums
from halflap.compress.watch import Watch
from halflap.data.batch import Batch
from halflap.errors import HalflapError
from halflap.files import atomic_write
from halflap.models.model import Block, HybridModel
from halflap.models.streams import Stream
from halflap.progress import Progress

STREAMED_METRICS = ("activation", "weight_norm", "random")
REMOVED = "removed.pt"


def collect_streamed(
    model: StreamedModel,
    batches: Sequence[Batch],
    metric: str,
    depth_metrics: Sequence[str],
    scorings: Sequence[Scoring],
    scratch: Scratch,
    *,
    removed_on: int = 1,
    seed: int = 0,
) -> list[Importance]:
    """Width scores of every scoring on all batches, with depth scores by each metric on the first `removed_on` of them.

    batches: on the model's device. Streams lie in the scratch directory; a sweep that was killed goes on there after
    the last block that was done, to the same scores, and none stay when it is through. Metric `random` has random
    depth scores. Raises HalflapError for a metric that needs the whole model at once, and as `collect_all` does.
    """
    _check_metrics(metric, depth_metrics)
    if metric == "random":
        return [random_of(model.config, seed)]
    removes = "block_influence" not in depth_metrics
    watch = Watch(model.shell, scorings) if metric == "activation" or not removes else None
    with torch.inference_mode():
        sweep = _Sweep(model, batches if metric == "activation" else batches[:removed_on], removed_on * removes, watch)
        depth = sweep.run(scratch, depth_metrics)
        found = [] if watch is None else watch.result()
        if metric == "weight_norm":
            depth |= found[0].depth if found else {}
            found = [weight_norm_of(model.config, model.tensors())]
    for importance in found:
        check_scores(importance, model.config)
    return [dataclasses.replace(one, depth={**one.depth, **depth}) for one in found]


def _check_metrics(metric: str, depth_metrics: Sequence[str]) -> None:
    for name, value, allowed in (
        ("metric", metric, STREAMED_METRICS),
        *(("depth-metric", one, ("block_influence", *DEPTH_METRICS)) for one in depth_metrics),
    ):
        if value not in allowed:
            raise HalflapError(
                f"importance metric {value!r} needs the whole model in memory, and it is read a block at a time; "
                f"allowed are {', '.join(allowed)}: correct --{name}, or take a machine with more memory"
            )


@dataclasses.dataclass
class _Sweep:
    """Batches carried through all blocks; each of the first `removed_on` also without every one of the blocks."""

    model: StreamedModel
    batches: Sequence[Batch]
    removed_on: int
    watch: Watch | None

    def run(self, scratch: Scratch, depth_metrics: Sequence[str]) -> dict[str, Tensor]:
        """The watch filled, and depth scores by metric, if any."""
        assert scratch.directory is not None
        shelf = Shelf(scratch.directory / STREAMS, scratch.made_from)
        if shelf.done is None:
            self._enter(shelf)
        elif self.watch is not None:
            self.watch.sums.update(shelf.notes["sums"])
            self.watch.columns.update(shelf.notes["columns"])
        self._carry(shelf)
        with self.model.resident(EXIT) as whole:
            self._leave(shelf, whole)
            depth = self._compare(shelf, whole, depth_metrics) if self.removed_on else {}
        shelf.remove()
        return depth

    def _enter(self, shelf: Shelf) -> None:
        with self.model.resident(ENTRY) as whole:
            for number, batch in enumerate(self.batches):
                if self.watch is not None:
                    self.watch.begin(batch)
                    self.watch.count()
                shelf.write(_name(number), Stream(*whole.enter(batch.tokens, batch.segments)))
        self._commit(shelf)

    def _carry(self, shelf: Shelf) -> None:
        """Every stream through every block that is left."""
        blocks, all_of, start = len(self.model.config.blocks), len(self.batches), shelf.done or 0
        passes = [all_of + self.removed_on * index for index in range(blocks)]
        with Progress("read block by block", sum(passes), unit="passes") as progress:
            progress.start_at(sum(passes[:start]))
            for index, block in self.model.blocks(start):
                progress.note(block=f"{index + 1}/{blocks}")
                with self._watched(index):
                    for number in range(all_of):
                        self._pass(shelf, number, index, block)
                        progress.advance()
                for number in range(self.removed_on):
                    for removed in range(index):
                        name = _name(number, removed)
                        shelf.write(name, self._read(shelf, name, number).through(index, block))
                        progress.advance()
                if self.watch is not None and not self.watch.is_finite():
                    raise HalflapError(
                        f"activations of block {index} are NaN or infinite, so nothing can be ranked; check the "
                        "checkpoint with `halflap evaluate`"
                    )
                self._commit(shelf)

    def _pass(self, shelf: Shelf, number: int, index: int, block: Block) -> None:
        """A batch through a block, and the beginning of its stream that lacks this block."""
        if self.watch is not None:
            self.watch.begin(self.batches[number])
        before = self._read(shelf, _name(number), number)
        after = before.through(index, block)
        shelf.write(_name(number), after)
        if number < self.removed_on:
            shelf.write(_name(number, index), after.beside(before.hidden))

    def _leave(self, shelf: Shelf, whole: HybridModel) -> None:
        """What the final norm puts out, for its energies; not counted twice if this was done before."""
        if self.watch is None:
            return
        with self._watched(None):
            for number, batch in enumerate(self.batches):
                self.watch.begin(batch)
                self._final(shelf, whole, number)

    def _compare(self, shelf: Shelf, whole: HybridModel, metrics: Sequence[str]) -> dict[str, Tensor]:
        """Scores (L,) float32 of what each block's removal does to the final hidden states: mean, and rank in rows."""
        blocks, part = len(self.model.config.blocks), self.batches[: self.removed_on]
        rows = {
            metric: [torch.zeros(2, len(batch.tokens), blocks, dtype=torch.float64) for batch in part]
            for metric in metrics
        }
        file, start = shelf.directory / REMOVED, 0
        if file.exists():
            rows, start = torch.load(file, weights_only=True)
        with Progress(title(metrics), blocks, unit="blocks") as progress:
            progress.start_at(start)
            for index in range(start, blocks):
                for number, batch in enumerate(part):
                    full, without = (self._final(shelf, whole, number, one) for one in (None, index))
                    for metric in metrics:
                        compared = compare_rows(metric, whole.head_weight, full, without, batch)
                        rows[metric][number][:, :, index] = compared
                record = io.BytesIO()  # PyTorch's writer cannot say that a disk is full
                torch.save((rows, index + 1), record)
                with atomic_write(file) as out:
                    out.write(record.getvalue())
                progress.advance()
        sums: Sums = {}
        found: dict[str, Tensor] = {}
        for metric, of_batches in rows.items():
            for of_rows in of_batches:
                add_rows(sums, metric, *of_rows)
            scores = scores_of(sums, metric)
            found |= {metric: scores.mean, f"{metric}_rank": scores.rank}
        return found

    def _final(self, shelf: Shelf, whole: HybridModel, number: int, removed: int | None = None) -> Tensor:
        stream = self._read(shelf, _name(number, removed), number)
        return whole.leave(stream.hidden, stream.context)

    def _read(self, shelf: Shelf, name: str, number: int) -> Stream:
        batch = self.batches[number]
        return shelf.read(name, self.model.context_of(batch.tokens, batch.segments))

    def _watched(self, part: int | None) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if self.watch is None else self.watch.hooks([part])

    def _commit(self, shelf: Shelf) -> None:
        if self.watch is None:
            shelf.commit()
        else:
            shelf.commit({"sums": self.watch.sums, "columns": self.watch.columns})


def _name(batch: int, removed: int | None = None) -> str:
    return f"{batch}" if removed is None else f"{batch}-without-{removed}"
