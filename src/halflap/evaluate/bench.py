"""How fast a model reads and writes, and what memory it takes, over a grid of prompt, output and batch sizes.

A cell is run once to warm up and to see its peak memory, then `repeats` times against the clock. The prompt is read as
`generate` reads it; then every step feeds each row its likeliest token. Every number is a median with its
interquartile range beside it as `..._spread`.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from halflap.errors import HalflapError
from halflap.evaluate.memory import PeakMemory
from halflap.inference.generate import prefill, require_positions
from halflap.models.cache import Cache
from halflap.models.decoder import Decoder
from halflap.models.model import HybridModel
from halflap.progress import Progress


class Cell(NamedTuple):
    prompt: int
    output: int
    batch: int


class Pass(NamedTuple):
    """Seconds of one pass: the prompt, the prompt and the first token, each further token; the cache at its end."""

    prefill: float
    first_token: float
    steps: list[float]
    cache: Cache


def bench(
    model: HybridModel,
    prompts: Sequence[int],
    outputs: Sequence[int],
    batches: Sequence[int],
    *,
    repeats: int = 3,
    seed: int = 0,
    log: Callable[[dict[str, Any]], None] | None = None,
) -> list[dict[str, Any]]:
    """One row for each prompt length, output length and batch size (tokens, tokens, sequences); random tokens.

    Rates are of the whole batch, in tokens a second; `decode_step_ms` and `time_to_first_token_ms` in milliseconds;
    `peak_memory_bytes` of the CUDA device, else of the process; `cache_bytes` of the tokens held at the end.
    `log` gets each row when it is done. Raises HalflapError for sizes below 1 or beyond the model's positions.
    """
    _check(repeats=(repeats,))
    cells = _cells(model, prompts, outputs, batches)
    rows = []
    with Progress("bench", len(cells) * (repeats + 1), unit="passes") as progress:
        for cell in cells:
            rows.append(_row(model.dtype, cell, _samples(model, cell, repeats, seed, progress)))
            if log is not None:
                log(rows[-1])
    return rows


def bench_in_turns(
    models: Mapping[str, Callable[[], HybridModel]],
    prompts: Sequence[int],
    outputs: Sequence[int],
    batches: Sequence[int],
    *,
    rounds: int = 5,
    repeats: int = 1,
    seed: int = 0,
) -> dict[str, list[dict[str, Any]]]:
    """The rows of `bench` for each of several models, by name.

    In every round each is opened by its function and takes `repeats` timed passes of a cell, so that a machine that is
    slow for a minute is slow for all. Raises HalflapError as `bench` does.
    """
    _check(rounds=(rounds,), repeats=(repeats,))
    taken: dict[str, dict[Cell, dict[str, list[float]]]] = {name: {} for name in models}
    dtypes: dict[str, torch.dtype] = {}
    passes = rounds * len(models) * len(prompts) * len(outputs) * len(batches) * (repeats + 1)
    with Progress("bench", passes, unit="passes") as progress:
        for name, opened in [*models.items()] * rounds:
            model = opened()
            dtypes[name] = model.dtype
            for cell in _cells(model, prompts, outputs, batches):
                kept = taken[name].setdefault(cell, {})
                for measure, values in _samples(model, cell, repeats, seed, progress).items():
                    kept.setdefault(measure, []).extend(values)
    return {name: [_row(dtypes[name], *one) for one in of_model.items()] for name, of_model in taken.items()}


def _check(**given: Sequence[int]) -> None:
    for name, values in given.items():
        if not values or min(values) < 1:
            raise HalflapError(f"{name} is {', '.join(map(str, values)) or 'empty'}; it must be at least 1: correct it")


def _cells(model: HybridModel, prompts: Sequence[int], outputs: Sequence[int], batches: Sequence[int]) -> list[Cell]:
    _check(prompt=prompts, output=outputs, batch=batches)
    require_positions(model.config, max(prompts) + max(outputs), "the longest prompt and output need")
    return [Cell(*sizes) for sizes in itertools.product(prompts, outputs, batches)]


def _samples(model: HybridModel, cell: Cell, repeats: int, seed: int, progress: Progress) -> dict[str, list[float]]:
    """Of each measure, what each timed pass took; what a pass holds is seen at the one that warms up."""
    prompt, output, batch = cell
    progress.note(prompt=prompt, output=output, batch=batch)
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, model.config.vocab_size, (batch, prompt), generator=generator).tolist()
    with PeakMemory(model.device) as peak:
        warm = _timed_pass(model, tokens, output)
    cached = warm.cache.nbytes(tokens_only=True)
    del warm
    progress.advance()
    passes = []
    for _ in range(repeats):
        passes.append(_timed_pass(model, tokens, output)._replace(cache=None))  # type: ignore[arg-type]
        progress.advance()
    return {
        "prefill_tokens_per_second": [batch * prompt / p.prefill for p in passes],
        "decode_tokens_per_second": [batch * output / sum(p.steps) for p in passes],
        "time_to_first_token_ms": [1e3 * p.first_token for p in passes],
        "decode_step_ms": [1e3 * float(np.median(p.steps)) for p in passes],
        "peak_memory_bytes": [peak.bytes],
        "cache_bytes": [cached],
    }


def _row(dtype: torch.dtype, cell: Cell, samples: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    row: dict[str, Any] = {**cell._asdict(), "dtype": str(dtype).removeprefix("torch.")}
    for name, values in samples.items():
        whole = name.endswith("_bytes")
        low, middle, high = np.percentile(values, [25, 50, 75]).tolist()
        row[name], row[f"{name}_spread"] = (int(middle), int(high - low)) if whole else (middle, high - low)
    return row


@torch.inference_mode()
def _timed_pass(model: HybridModel, tokens: list[list[int]], output: int) -> Pass:
    """Read the prompts, then write `output` tokens a row one step at a time."""
    device, decode = model.device, Decoder(model)
    started = now(device)
    cache, logits = prefill(model, tokens, ahead=output)
    read = now(device)
    chosen = logits.argmax(-1)
    times = [now(device)]
    for _ in range(output):
        chosen = decode(chosen[:, None], cache=cache)[:, -1].argmax(-1)
        times.append(now(device))
    steps = [after - before for before, after in itertools.pairwise(times)]
    return Pass(read - started, times[0] - started, steps, cache)


def now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
