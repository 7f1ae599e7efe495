"""How fast a model reads and writes, and what memory it takes, over a grid of prompt, output and batch sizes.

A cell is run once to warm up and to see its peak memory, then `repeats` times against the clock. The prompt is read as
`generate` reads it; then every step feeds each row its likeliest token. Every number is a median with its
interquartile range beside it as `..._spread`.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
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
    for name, values in (("prompt", prompts), ("output", outputs), ("batch", batches), ("repeats", (repeats,))):
        if not values or min(values) < 1:
            raise HalflapError(f"{name} is {', '.join(map(str, values)) or 'empty'}; it must be at least 1: correct it")
    require_positions(model.config, max(prompts) + max(outputs), "the longest prompt and output need")
    cells = list(itertools.product(prompts, outputs, batches))
    rows = []
    with Progress("bench", len(cells) * (repeats + 1), unit="passes") as progress:
        for prompt, output, batch in cells:
            progress.note(prompt=prompt, output=output, batch=batch)
            generator = torch.Generator().manual_seed(seed)
            tokens = torch.randint(0, model.config.vocab_size, (batch, prompt), generator=generator).tolist()
            rows.append(_cell(model, tokens, output, repeats, progress))
            if log is not None:
                log(rows[-1])
    return rows


def _cell(model: HybridModel, tokens: list[list[int]], output: int, repeats: int, progress: Progress) -> dict[str, Any]:
    with PeakMemory(model.device) as peak:
        warm = _timed_pass(model, tokens, output)
    cached = warm.cache.nbytes(tokens_only=True)
    del warm
    progress.advance()
    passes = []
    for _ in range(repeats):
        passes.append(_timed_pass(model, tokens, output)._replace(cache=None))  # type: ignore[arg-type]
        progress.advance()
    batch, prompt = len(tokens), len(tokens[0])
    samples = {
        "prefill_tokens_per_second": [batch * prompt / p.prefill for p in passes],
        "decode_tokens_per_second": [batch * output / sum(p.steps) for p in passes],
        "time_to_first_token_ms": [1e3 * p.first_token for p in passes],
        "decode_step_ms": [1e3 * float(np.median(p.steps)) for p in passes],
        "peak_memory_bytes": [peak.bytes],
        "cache_bytes": [cached],
    }
    dtype = str(model.dtype).removeprefix("torch.")
    row: dict[str, Any] = {"prompt": prompt, "output": output, "batch": batch, "dtype": dtype}
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
