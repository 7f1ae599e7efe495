"""Importance of a model that does not fit in memory: the numbers of `metrics.collect` and `depth.depth_scores`, from
one reading of the weights, and one more for each block that goes where they go one by one.

At block k the calibration text passes with hooks, then the k streams that each lack one earlier block pass too, and a
new one begins that lacks block k (`branches.py`). The scores are equal to those of the model in memory bit for bit.
Streams lie on the disk between blocks (`checkpoints/shelf.py`): of T tokens for widths and S of them for depth, hidden
size D, in float32, 4 D (T + S L) bytes, twice while a block is worked on.
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
from halflap.compress.branches import TRUNK, Branch, Sweep
from halflap.compress.check import check_scores
from halflap.compress.depth import DEPTH_METRICS, DepthScores, add_rows, compare_rows, named, scores_of, title
from halflap.compress.importance import Importance, Scoring
from halflap.compress.metrics import random_of, weight_norm_of
from halflap.compress.partial import Scratch, Sums, once
from halflap.compress.plan import Row
from halflap.compress.watch import Watch
from halflap.data.batch import Batch
from halflap.errors import HalflapError
from halflap.files import atomic_write
from halflap.models.model import HybridModel
from halflap.progress import Progress

STREAMED_METRICS = ("activation", "weight_norm", "random")
REMOVED = "removed.pt"
FULL = "full"
"""The streams of the model with all blocks, where the trunk lacks some."""


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
    check_metrics(metric, depth_metrics)
    if metric == "random":
        return [random_of(model.config, seed)]
    if not batches:
        raise HalflapError("no calibration text was read, so nothing can be scored; give at least one document")
    influence = "block_influence" in depth_metrics
    watch = Watch(model.shell, scorings) if metric == "activation" or influence else None
    text, depth = batches if metric == "activation" else batches[:removed_on], dict[str, Tensor]()
    with torch.inference_mode():
        if text:
            sums = _Scores(model, text, 0 if influence else removed_on, watch).run(scratch, depth_metrics)
            scored = () if influence or not removed_on else depth_metrics
            depth = named({name: scores_of(sums, name) for name in scored})
        found = [] if watch is None else watch.result()
        if metric == "weight_norm":
            depth |= found[0].depth if found else {}
            found = [weight_norm_of(model.config, model.tensors())]
    for importance in found:
        check_scores(importance, model.config)
    return [dataclasses.replace(one, depth={**one.depth, **depth}) for one in found]


def depth_scores_streamed(
    model: StreamedModel, batches: Sequence[Batch], metric: str, gone: Row, scratch: Scratch
) -> DepthScores:
    """`depth.depth_scores` from one reading of the weights; its sums stay in the scratch directory."""

    def make() -> Sums:
        with torch.inference_mode():
            return _Scores(model, batches, len(batches), None, gone).run(scratch, (metric,))

    return scores_of(once(f"depth-{metric}-{len(gone)}", scratch, make), metric, gone)


def check_metrics(metric: str, depth_metrics: Sequence[str]) -> None:
    """Raise HalflapError for a metric that needs the whole model at once."""
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
class _Scores:
    """Batches carried through all blocks that are not gone; each of the first `removed_on` also without every block."""

    model: StreamedModel
    batches: Sequence[Batch]
    removed_on: int
    watch: Watch | None
    gone: Row = ()

    @property
    def left(self) -> Row:
        return tuple(index for index in range(len(self.model.config.blocks)) if index not in self.gone)

    def run(self, scratch: Scratch, depth_metrics: Sequence[str]) -> Sums:
        """The watch filled, and the sums of depth scores, if any (`depth.add_rows`)."""
        assert scratch.directory is not None
        made_from = f"{scratch.made_from} without {self.gone}" if self.gone else scratch.made_from
        shelf = Shelf(scratch.directory / STREAMS, made_from)
        sweep = Sweep(self.model, self.batches, shelf, self.removed_on)
        if shelf.done is None:
            self._enter(sweep)
        elif self.watch is not None:
            self.watch.sums.update(shelf.notes["sums"])
            self.watch.columns.update(shelf.notes["columns"])
        self._carry(sweep)
        with self.model.resident(EXIT) as whole:
            self._leave(sweep, whole)
            sums = self._compare(sweep, whole, depth_metrics) if self.removed_on else {}
        shelf.remove()
        return sums

    def _enter(self, sweep: Sweep) -> None:
        with self.model.resident(ENTRY):
            if self.watch is not None:
                for batch in self.batches:
                    self.watch.begin(batch)
                    self.watch.count()
            for trunk in self._trunks():
                sweep.enter(trunk)
        self._commit(sweep)

    def _trunks(self) -> tuple[str, ...]:
        return (TRUNK, FULL) if self.gone else (TRUNK,)

    def _carry(self, sweep: Sweep) -> None:
        """Every stream through every block that is left."""
        blocks, all_of, start = len(self.model.config.blocks), len(self.batches), sweep.shelf.done or 0
        branches = [Branch(f"without-{index}", (index,)) for index in self.left] if self.removed_on else []
        trunks = [(index not in self.gone) + bool(self.gone) for index in range(blocks)]
        passes = [
            trunks[i] * all_of + self.removed_on * sum(b.runs_at(i) and i not in self.gone for b in branches)
            for i in range(blocks)
        ]
        what = f"read block by block, {len(self.gone)} gone" if self.gone else "read block by block"
        with Progress(what, sum(passes), unit="passes") as progress:
            progress.start_at(sum(passes[:start]))
            sweep.passed = progress.advance
            for index, block in self.model.blocks(start):
                progress.note(block=f"{index + 1}/{blocks}")
                if self.gone:
                    sweep.advance(index, block, trunk=FULL)
                if index in self.gone:
                    for name in (TRUNK, *(branch.name for branch in branches if branch.runs_at(index))):
                        sweep.keep(name)
                else:
                    with self._watched(index):
                        sweep.advance(index, block, branches, self._begin)
                    sweep.follow(index, block, branches)
                if self.watch is not None and not self.watch.is_finite():
                    raise HalflapError(
                        f"activations of block {index} are NaN or infinite, so nothing can be ranked; check the "
                        "checkpoint with `halflap evaluate`"
                    )
                self._commit(sweep)

    def _leave(self, sweep: Sweep, whole: HybridModel) -> None:
        """What the final norm puts out, for its energies; not counted twice if this was done before."""
        if self.watch is None:
            return
        with self._watched(None):
            for number, batch in enumerate(self.batches):
                self.watch.begin(batch)
                sweep.final(whole, TRUNK, number)

    def _compare(self, sweep: Sweep, whole: HybridModel, metrics: Sequence[str]) -> Sums:
        """Sums of what each block's removal does to the final hidden states."""
        blocks, part = len(self.model.config.blocks), self.batches[: self.removed_on]
        rows = {
            metric: [torch.zeros(2, len(batch.tokens), blocks, dtype=torch.float64) for batch in part]
            for metric in metrics
        }
        file, start = sweep.shelf.directory / REMOVED, 0
        if file.exists():
            rows, start = torch.load(file, weights_only=True)
        with Progress(title(metrics, self.gone), len(self.left), unit="blocks") as progress:
            progress.start_at(start)
            for done, index in enumerate(self.left[start:], start + 1):
                for number, batch in enumerate(part):
                    names = self._trunks()[-1], f"without-{index}"
                    full, without = (sweep.final(whole, name, number) for name in names)
                    for metric in metrics:
                        compared = compare_rows(metric, whole.head_weight, full, without, batch)
                        rows[metric][number][:, :, index] = compared
                record = io.BytesIO()  # PyTorch's writer cannot say that a disk is full
                torch.save((rows, done), record)
                with atomic_write(file) as out:
                    out.write(record.getvalue())
                progress.advance()
        sums: Sums = {}
        for metric, of_batches in rows.items():
            for of_rows in of_batches:
                add_rows(sums, metric, *of_rows)
        return sums

    def _begin(self, batch: Batch) -> None:
        if self.watch is not None:
            self.watch.begin(batch)

    def _watched(self, part: int | None) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if self.watch is None else self.watch.hooks([part])

    def _commit(self, sweep: Sweep) -> None:
        if self.watch is None:
            sweep.shelf.commit()
        else:
            sweep.shelf.commit({"sums": self.watch.sums, "columns": self.watch.columns})
