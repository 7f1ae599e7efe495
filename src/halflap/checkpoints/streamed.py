"""A model of which one part is in memory at a time: the embedding, one block, or the final norm and the head.

Many passes are carried through a block together (`passes.py`) before the next one is read, so that one reading of the
weights serves them all. While a block computes, a thread reads the next one's bytes into the system's page cache, which
is no memory of the process and is given up when others need it.
"""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from halflap.checkpoints.checkpoint import Checkpoint, empty_model, place
from halflap.checkpoints.files import PIECE
from halflap.models.config import ModelConfig
from halflap.models.context import SequenceContext
from halflap.models.layout import layout, shape
from halflap.models.model import Block, HybridModel

ENTRY, EXIT = "entry", "exit"
"""The parts beside the blocks, which go by their number: embedding and meta tokens; final norm and output embedding."""

Part = int | str
Read = Callable[[Sequence[str]], Iterable[tuple[str, Tensor]]]
"""Parameters by name, one at a time, as they are stored."""


class StreamedModel:
    """A config, and weights that are read a part at a time.

    read: gives a part's parameters; ahead: told which will be asked for next. Parameters are computed with in `dtype`
    on `device` (`A_log`, `D` and `dt_bias` in float32 or wider, as in any model). scratch: the directory where passes
    keep their streams, so that a killed one goes on; without one they are in memory. shell: the model, in which one
    part at a time has weights.
    """

    def __init__(
        self,
        config: ModelConfig,
        read: Read,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        ahead: Callable[[Sequence[str]], None] | None = None,
        scratch: Path | None = None,
    ) -> None:
        self.config, self.dtype, self.device, self.scratch = config, dtype, torch.device(device), scratch
        self._read, self._ahead = read, ahead
        self._parts = part_names(config)
        self.shell = empty_model(config).requires_grad_(False).eval()

    @staticmethod
    def of(
        checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device | str = "cpu", scratch: Path | None = None
    ) -> StreamedModel:
        """The model of a checkpoint, packed matrices in their plain form."""
        read = lambda names: ((name, checkpoint.read_plain(name)) for name in names)
        return StreamedModel(checkpoint.config, read, dtype, device, partial(read_ahead, checkpoint), scratch)

    @staticmethod
    def once(config: ModelConfig, tensors: Iterable[tuple[str, Tensor]], dtype: torch.dtype) -> StreamedModel:
        """A model to be gone through once, from a stream of (our name, tensor) in the order of the layout."""
        coming, held = iter(tensors), dict[str, Tensor]()

        def read(names: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
            for name in names:
                while name not in held:
                    held.update([next(coming)])
                again = config.tie_word_embeddings and name == "embedding.weight"
                yield name, held[name] if again else held.pop(name)

        return StreamedModel(config, read, dtype)

    @property
    def head_weight(self) -> Tensor:
        """The output embedding (V, D), while the last part is resident."""
        return self.shell.head_weight

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden (..., D) to logits (..., V), while the last part is resident."""
        return self.shell.logits(hidden)

    @contextmanager
    def resident(self, part: Part) -> Iterator[HybridModel]:
        """The model with the parameters of one part, and no storage for the others; dropped when the block ends."""
        names = self._parts[part]
        with torch.autocast(torch.device(self.device).type, enabled=False):  # weights that are made are not rounded
            made = {name: place(name, tensor, self.dtype, self.device) for name, tensor in self._read(names)}
        self._fill(made)
        del made
        try:
            yield self.shell
        finally:
            dims = layout(self.config)
            self._fill({name: torch.empty(shape(dims[name]), device="meta") for name in names})

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every parameter as stored, one at a time, in the order of the layout."""
        return iter(self._read(list(layout(self.config))))  # type: ignore[arg-type]

    def context_of(self, tokens: Tensor, segments: Tensor | None = None) -> SequenceContext:
        """The context of a pass over these tokens."""
        return self.shell.context_of(tokens, segments)

    def _fill(self, tensors: dict[str, Tensor]) -> None:
        self.shell.load_state_dict(tensors, strict=False, assign=True)

    def blocks(self, start: int = 0) -> Iterator[tuple[int, Block]]:
        """(index, block) from block `start` on; a block has its weights until the next one is asked for."""
        for index in range(start, len(self.config.blocks)):
            following = index + 1 if index + 1 < len(self.config.blocks) else EXIT
            with self.resident(index) as model, self.reading_ahead(following):
                yield index, model.blocks[index]  # type: ignore[misc]

    @contextmanager
    def reading_ahead(self, part: Part) -> Iterator[None]:
        """Have a thread read the bytes of a part meanwhile."""
        if self._ahead is None:
            yield
            return
        reader = threading.Thread(target=self._ahead, args=(self._parts[part],), daemon=True)
        reader.start()
        yield
        reader.join()


AnyModel = HybridModel | StreamedModel


def part_names(config: ModelConfig) -> dict[Part, list[str]]:
    """The parameters of each part by our names, in the order of the network; a tied embedding is in two parts."""
    parts: dict[Part, list[str]] = {ENTRY: [], **{index: [] for index in range(len(config.blocks))}, EXIT: []}
    for name in layout(config):
        head, _, rest = name.partition(".")
        if head == "blocks":
            parts[int(rest.partition(".")[0])].append(name)
        else:
            parts[EXIT if head in ("norm", "head") else ENTRY].append(name)
    if config.tie_word_embeddings:
        parts[EXIT].append("embedding.weight")
    return parts


def largest_part(config: ModelConfig) -> tuple[str, int]:
    """What the largest part is called, and its parameters: what has to be in memory at once."""
    sizes = {name: math.prod(shape(dims)) for name, dims in layout(config).items()}
    parts = {part: sum(sizes[name] for name in names) for part, names in part_names(config).items()}
    part = max(parts, key=lambda part: parts[part])
    names = {ENTRY: "the embedding", EXIT: "the output embedding"}
    return names[part] if isinstance(part, str) else f"block {part}", parts[part]


def read_ahead(checkpoint: Checkpoint, names: Iterable[str]) -> None:
    """Have the system read parameters as they are stored into its page cache."""
    piece = memoryview(bytearray(PIECE))
    entries = checkpoint.entries
    with contextlib.suppress(OSError):  # whoever reads the tensor itself will say so
        for entry in (entries[name] for name in names if name in entries):
            with open(entry.file, "rb", buffering=0) as file:
                file.seek(entry.start)
                left = entry.spec.nbytes
                while left > 0 and (count := file.readinto(piece[: min(left, PIECE)])):
                    left -= count
