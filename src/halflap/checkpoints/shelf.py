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
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import torch

from halflap.errors import HalflapError
from halflap.files import full_disk_named, sync
from halflap.models.context import SequenceContext
from halflap.models.streams import Stream

Place = tuple[int, int]
"""First byte of a record, and how many it has."""
STREAMS = "streams"
NO_NOTES: Mapping[str, Any] = {}


class Shelf:
    """The streams in a directory. `done` is how many blocks they have passed, None when there are none yet.

    `notes` are tensors and numbers that belong to this generation, as they were given to `commit`.
    """

    def __init__(self, directory: Path, made_from: str) -> None:
        """Goes on with the newest whole generation; what a killed process left unfinished is deleted.

        made_from: what the streams are of; a directory of anything else is emptied.
        """
        self.directory, self.made_from = directory, made_from
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
        return Stream.from_state(self._load(self._places[key]), context)

    def write(self, key: str, stream: Stream) -> None:
        """Put a stream in the next generation."""
        record = io.BytesIO()
        torch.save(stream.state(), record)
        self._new_places[key] = self._append(record.getbuffer())

    def keep(self, key: str) -> None:
        """Have a stream in the next generation as it is in this one."""
        self._new_places[key] = self._append(self._bytes(self._places[key]))

    def commit(self, notes: Mapping[str, Any] = NO_NOTES) -> None:
        """Make what was written since the last commit the generation that counts."""
        record = io.BytesIO()
        torch.save({"made_from": self.made_from, "places": self._new_places, "notes": dict(notes)}, record)
        start, _ = self._append(record.getbuffer())
        before, after = self.done, 0 if self.done is None else self.done + 1
        assert self._new is not None
        with full_disk_named(self.directory, by_numpy=True):
            self._new.write(start.to_bytes(8, "little"))
            self._new.close()
            sync(self._next)
            os.replace(self._next, self._file(after))
            sync(self.directory)
        self.done, self.notes, self._places = after, dict(notes), self._new_places
        self._new, self._new_places = None, {}
        if before is not None:
            self._file(before).unlink()

    def remove(self) -> None:
        """Delete all of it."""
        shutil.rmtree(self.directory)

    def _file(self, done: int | None) -> Path:
        return self.directory / f"after.{done}"

    def _append(self, record: bytes | memoryview) -> Place:
        with full_disk_named(self.directory, by_numpy=True):
            if self._new is None:
                self._new = open(self._next, "wb")  # noqa: SIM115  (until `commit`)
            start = self._new.tell()
            return start, self._new.write(record)

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


class Held:
    """Streams in memory instead, where nobody has a directory for them: nothing outlives the process."""

    def __init__(self) -> None:
        self.done: int | None = None
        self._streams: dict[str, Stream] = {}

    def read(self, key: str, context: SequenceContext) -> Stream:
        """A stream, once; its own context is the one that counts."""
        del context
        return self._streams.pop(key)

    def write(self, key: str, stream: Stream) -> None:
        self._streams[key] = stream

    def keep(self, key: str) -> None:
        """It stays."""

    def commit(self) -> None:
        self.done = 0 if self.done is None else self.done + 1

    def remove(self) -> None:
        self._streams.clear()


def shelf_in(directory: Path | None, made_from: str) -> Shelf | Held:
    """A shelf in `streams/` of a directory, or in memory."""
    return Held() if directory is None else Shelf(directory / STREAMS, made_from)
