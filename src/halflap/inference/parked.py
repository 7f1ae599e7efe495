"""Replies that wait outside the slots: just read, or put aside when memory ran out.

What is put aside leaves the device whole and comes back bit for bit: from a GPU to the machine's memory, and from
there, which is what ran out on a CPU, to a file of the temporary folder.
"""

from __future__ import annotations

import dataclasses
import logging
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from halflap.inference.replies import Reply
from halflap.models.cache import Cache, fields, mapped, parts

LOG = logging.getLogger(__name__)


class Parked:
    """A reply and its state, a cache of one row that several replies may share. `nbytes`: what it holds in memory."""

    def __init__(self, reply: Reply, cache: Cache) -> None:
        self.reply, self.cache = reply, cache

    @property
    def nbytes(self) -> int:
        return self.cache.nbytes()

    def bring(self) -> Cache:
        """The state, back on its device."""
        return self.cache

    def drop(self) -> None:
        """It is no longer needed."""


def _written(tensors: list[Tensor]) -> Path | None:
    """A file of its own with them; None when the disk has no room."""
    with tempfile.NamedTemporaryFile(prefix="halflap-", suffix=".state", delete=False) as file:
        try:
            torch.save(tensors, file)
        except (OSError, RuntimeError):  # the writer of PyTorch's archives says it by a RuntimeError
            LOG.warning("%s could not be written; a reply put aside stays in memory", file.name)
            Path(file.name).unlink(missing_ok=True)
            return None
    return Path(file.name)


class SwappedOut(Parked):
    """The same, elsewhere."""

    def __init__(self, reply: Reply, cache: Cache) -> None:
        self._device = cache.lengths.device
        self.swapped = cache.nbytes()
        tensors = [tensor for state in parts(cache) for tensor in fields(state).values()]
        self._tensors: list[Tensor] = []
        self._file: Path | None = None
        if self._device.type == "cpu":
            self._file = _written(tensors)
        if self._file is None:
            self._tensors = [tensor.cpu() for tensor in tensors]
        hollow = [mapped(state, lambda _, tensor: tensor.new_empty(0)) for state in cache.blocks]
        super().__init__(reply, dataclasses.replace(cache, blocks=hollow))

    @property
    def nbytes(self) -> int:
        return 0

    def bring(self) -> Cache:
        tensors = self._tensors if self._file is None else torch.load(self._file, weights_only=True)
        waiting = iter(tensors)
        for state in parts(self.cache):
            for name in fields(state):
                setattr(state, name, next(waiting).to(self._device))
        return self.cache

    def drop(self) -> None:
        self._tensors = []
        if self._file is not None:
            self._file.unlink(missing_ok=True)
