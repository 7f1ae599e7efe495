"""Sums of a pass over batches, kept in a file now and then, so that a killed pass goes on to the same bytes.

A pass adds to named tensors, batch after batch. Sums are kept as they are, so what is read back and gone on with equals
what would have been.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from halflap.data.batch import Batch
from halflap.files import atomic_write
from halflap.progress import Progress

SECONDS_BETWEEN_SAVES = 30.0

Sums = dict[str, Tensor]


class Scratch(NamedTuple):
    """Where sums are kept (None: nowhere), and what they are of: files made from anything else are not gone on with."""

    directory: Path | None = None
    made_from: str = ""


NOWHERE = Scratch()


def resumable(
    batches: Sequence[Batch], sums: Sums, name: str, scratch: Scratch, progress: Progress, device: torch.device
) -> Iterator[Batch]:
    """The batches that are not in the sums yet, after filling these from the file `name` of an earlier pass.

    What the caller has added by the time it asks for the next batch is what the file gets.
    """
    done = _read(sums, name, scratch, device)
    progress.start_at(done * (progress.total or 0) / max(1, len(batches)))
    saved = time.monotonic()
    for index in range(done, len(batches)):
        yield batches[index]
        if index + 1 == len(batches) or time.monotonic() - saved >= SECONDS_BETWEEN_SAVES:
            _write(sums, name, scratch, index + 1)
            saved = time.monotonic()


def once(name: str, scratch: Scratch, make: Callable[[], Sums]) -> Sums:
    """What `make` gives, or what it gave to an earlier process, from the file `name`."""
    sums: Sums = {}
    if not _read(sums, name, scratch, torch.device("cpu")):
        sums = make()
        _write(sums, name, scratch, 1)
    return sums


def _write(sums: Sums, name: str, scratch: Scratch, done: int) -> None:
    if scratch.directory is None:
        return
    header = {"done": json.dumps(done), "made_from": scratch.made_from}
    with atomic_write(scratch.directory / f"{name}.safetensors") as file:
        file.write(safetensors.torch.save({key: value.contiguous() for key, value in sums.items()}, header))


def _read(sums: Sums, name: str, scratch: Scratch, device: torch.device) -> int:
    """How many batches the sums in the file have; 0 without one of the same making."""
    path = None if scratch.directory is None else scratch.directory / f"{name}.safetensors"
    if path is None or not path.exists():
        return 0
    try:
        with safetensors.safe_open(str(path), "pt", device=str(device)) as file:
            header = file.metadata() or {}
            if header.get("made_from") != scratch.made_from:
                return 0
            sums |= {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            return int(header["done"])
    except (safetensors.SafetensorError, KeyError, ValueError):
        return 0  # it is measured again
