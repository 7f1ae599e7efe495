"""The recall probes: what there is, and their rows as batches to train on and to ask about.

Every probe has two forms: token ids over any vocabulary, for models trained on the probe itself (probe_ids.py), and
text, for models that read text (probe_texts.py). An item is a pure function of the probe's name, seed and index.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.random import Generator

from halflap.data.batch import Batch
from halflap.errors import HalflapError
from halflap.evaluate import probe_ids, probe_texts
from halflap.evaluate.local_tasks import unknown_task
from halflap.evaluate.probe_ids import Row
from halflap.evaluate.probe_texts import Page

ALL = "probes"
PREFIX = "probe"


@dataclass(frozen=True)
class Probe:
    """ids(rng, index, length, vocab_size); text(rng, size, index), of at least `least` parts.

    `open`: right when the greedy continuation holds the answer; else when it is the answer, token by token.
    """

    ids: Callable[[Generator, int, int, int], Row]
    text: Callable[[Generator, int, int], Page]
    least: int
    open: bool = False
    by_depth: bool = False


PROBES: dict[str, Probe] = {
    "probe_copy": Probe(probe_ids.copy, probe_texts.copy, least=8),
    "probe_mqar": Probe(probe_ids.mqar, probe_texts.mqar, least=4),
    "probe_needle": Probe(probe_ids.needle, probe_texts.needle, least=1, by_depth=True),
    "probe_phonebook": Probe(probe_ids.phonebook, probe_texts.phonebook, least=5),
    "probe_swde": Probe(probe_ids.swde, probe_texts.swde, least=0, open=True),
    "probe_squad": Probe(probe_ids.squad, probe_texts.squad, least=3, open=True),
}


def is_probe(name: str) -> bool:
    """Whether a task's name is, or was meant as, one of ours."""
    return name.startswith(PREFIX)


def probe_names(names: Sequence[str]) -> list[str]:
    """Each probe that is named, once, `probes` meaning all. Raises HalflapError for one that does not exist."""
    found: list[str] = []
    for name in names:
        if name != ALL and name not in PROBES:
            raise unknown_task(name, [ALL, *PROBES])
        found += PROBES if name == ALL else [name]
    return list(dict.fromkeys(found))


def probe_batch(name: str, seed: int, index: int, length: int, vocab_size: int, rows: int = 1) -> Batch:
    """Batch `index` of a probe in ids: rows `index * rows` and on, each of exactly `length` tokens.

    Weights are 1 where an answer is predicted, and 0 elsewhere. Use one seed to train and another to ask. Raises
    HalflapError for an unknown probe, or when it needs a larger vocabulary or longer rows.
    """
    probe = PROBES[probe_names([name])[0]]
    if seed < 0 or index < 0 or rows < 1:
        raise HalflapError(
            f"seed, index and rows are {seed}, {index} and {rows}; at least 0, 0 and 1 are allowed: correct them"
        )
    items = [
        probe.ids(generator(name, seed, i), i, length, vocab_size) for i in range(index * rows, (index + 1) * rows)
    ]
    tokens, targets, weights = (torch.from_numpy(np.stack(column)) for column in zip(*items))
    return Batch(tokens, targets, weights)


def generator(name: str, seed: int, index: int) -> Generator:
    """The source of everything random in one item."""
    return np.random.default_rng([zlib.crc32(name.encode()), seed, index])
