"""Streams kept on the disk between two blocks, so that they need not fit in memory and an interrupted sweep goes on.

A directory holds one generation, a file named by the number of blocks its streams have passed: the streams one after
another, then notes and what lies where. The next one is written beside it, flushed, and appears under its name at once;
then the old one goes. What was read or written lately is in the system's page cache, so on a machine with memory to
spare no disk is waited for but at the end of a block.
"""

from __future__ import annotations

import io
import os
import pickle
import shutil
from pathlib import Path
from typing import IO, Any

import torch

from halflap.checkpoints.files import full_disk_named
from halflap.errors import HalflapError
from halflap.files import sync
from halflap.models.config import ModelConfig
from halflap.models.context import SequenceContext
from halflap.models.streams import Stream

Place = tuple[int, int]
"""First byte of a record, and how many it has."""


class Shelf:
    """The streams in a directory. `done` is how many blocks they have passed, None when there are none yet.

    `notes` are tensors and numbers that belong to this generation, as they were given to `commit`.
    """

    def __init__(self, directory: Path, config: ModelConfig, made_from: str) -> None:
        """Goes on with the newest whole generation; what a killed process left unfinished is deleted.

        made_from: what the streams are of; a directory of anything else is emptied.
        """
        self.directory, self.config, self.made_from = directory, config, made_from
        directory.mkdir(parents=True, exist_ok=True)
        self._next = directory / "next"
        self._next.unlink(missing_ok=True)
        self._new: IO[bytes] | None = None
        self._new_places: dict[str, Place] = {}
        self._places: dict[str, Place] = {}
        self.notes: dict[str, Any] = {}
        *old, self.done = sorted(int(p.suffix[1:]) for p in directory.glob("after.*")) or [None]
        for done in old:
            self._file(done).unlink()
        if self.done is not None:
            end = self._file(self.done).stat().st_size
            start = int.from_bytes(self._bytes((end - 8, 8)), "little")
            last = self._load((start, end - 8 - start))
            self._places, self.notes = last["places"], last["notes"]
            if last["made_from"] != made_from:
                self.remove()
                directory.mkdir()
                self.done, self._places, self.notes = None, {}, {}

    def read(self, key: str, context: SequenceContext) -> Stream:
        """A stream on the device it was on, with the context of its tokens (`HybridModel.context_of`)."""
        return Stream.from_state(self._load(self._places[key]), context, self.config)

    def write(self, key: str, stream: Stream) -> None:
        """Put a stream in the next generation."""
        self._new_places[key] = self._append(stream.state())

    def commit(self, notes: dict[str, Any]) -> None:
        """Make what was written since the last commit the generation that counts."""
        start, _ = self._append({"made_from": self.made_from, "places": self._new_places, "notes": notes})
        before, after = self.done, 0 if self.done is None else self.done + 1
        assert self._new is not None
        with full_disk_named(self.directory):
            self._new.write(start.to_bytes(8, "little"))
            self._new.close()
            sync(self._next)
            os.replace(self._next, self._file(after))
            sync(self.directory)
        self.done, self.notes, self._places = after, notes, self._new_places
        self._new, self._new_places = None, {}
        if before is not None:
            self._file(before).unlink()

    def remove(self) -> None:
        """Delete all of it."""
        shutil.rmtree(self.directory)

    def _file(self, done: int | None) -> Path:
        return self.directory / f"after.{done}"

    def _append(self, value: dict[str, Any]) -> Place:
        record = io.BytesIO()
        torch.save(value, record)
        with full_disk_named(self.directory):
            if self._new is None:
                self._new = open(self._next, "wb")  # noqa: SIM115  (until `commit`)
            start = self._new.tell()
            return start, self._new.write(record.getbuffer())

    def _load(self, place: Place) -> dict[str, Any]:
        try:
            return torch.load(io.BytesIO(self._bytes(place)), weights_only=True)
        except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
            raise HalflapError(
                f"{self._file(self.done)} is damaged; delete {str(self.directory)!r} to measure anew"
            ) from error

    def _bytes(self, place: Place) -> bytes:
        with open(self._file(self.done), "rb") as file:
            file.seek(place[0])
            return file.read(place[1])
