"""Short passes: a model's blocks as one program of native code (ops/native/program.py).

decode = Decoder(model)
logits = decode(tokens, cache=cache)  # what model(tokens, cache=cache) gives, sooner

In the program a token comes to the same bits whether it is read alone, in a batch, or with others of its row, held or
not. It is made once, of the weights that the model has then; what it cannot run (many tokens a row, gradients, other
types and devices, modules that are not this package's) the model itself runs, where the company of a token shows in
its last bits. Between blocks the program keeps float32, so with bfloat16 weights it rounds less often than the model
does. On a GPU a CUDA graph can take its place (graphs.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from halflap.models.cache import BlockState, Cache, ConvSSMState, HybridState, KeyValueState
from halflap.models.compiled import compiled
from halflap.models.graphs import Graphs, chosen
from halflap.models.model import HybridModel, advance
from halflap.ops import select
from halflap.ops.native import program as native
from halflap.ops.native.program import Held, Program, State

NOTHING = State()
STATE_DTYPES = {torch.float32, torch.bfloat16}  # of SSM states


class Decoder:
    """`model(tokens, cache=cache)`; see the module. `head` is the language head of a model that was given none."""

    def __init__(self, model: HybridModel, head: nn.Module | None = None) -> None:
        self.model = model
        self._program = compiled(model, head) if select.native_is_on() else None
        self._graphs = Graphs(model) if head is None and chosen(model) else None
        self._workspace = torch.empty(0)

    def __call__(self, tokens: Tensor, cache: Cache | Sequence[Cache], lengths: Tensor | None = None) -> Tensor:
        """Logits (B, T, V) of tokens (B, T), which continue the rows of one cache or of several.

        lengths (B,), at least 1: how many right-padded tokens of each row count; nothing is said of those behind.
        """
        caches = [cache] if isinstance(cache, Cache) else cache
        if self._graphs is not None and len(caches) == 1 and self._graphs.takes(tokens, caches[0]):
            return self._graphs(tokens, caches[0])
        if self._program is not None and _runs(tokens, caches):
            return self._read(self._program, tokens, caches, lengths)
        return self.model(tokens, cache=cache, lengths=None if caches[0].held is not None else lengths)

    def is_native(self, tokens: Tensor, caches: Sequence[Cache]) -> bool:
        """Whether native code makes this pass."""
        return self._program is not None and _runs(tokens, caches)

    @property
    def depends_on_width(self) -> bool:
        """Whether a token's numbers are, by more than float32's rounding, others among several tokens than alone.

        Native code rounds nothing narrower between blocks; PyTorch's products of several rows do, each in its order.
        """
        return self._program is None and torch.finfo(self.model.dtype).bits < 32

    def _read(self, program: Program, tokens: Tensor, caches: Sequence[Cache], lengths: Tensor | None) -> Tensor:
        """So many rows at a time as the program takes: reading the weights once more for others costs little then."""
        batch, width = tokens.shape
        counts = torch.full((batch,), width) if lengths is None else lengths
        states, holds = [_states(cache, width) for cache in caches], caches[0].held is not None
        logits, made = torch.empty(batch, width, self.model.config.vocab_size), []
        for rows in _runs_of(_rows(caches, counts), width):
            part = slice(first := sum(len(run.rows) for run in made), first + len(rows))
            there = None if lengths is None else torch.arange(width) < counts[part, None]
            read = tokens[part] if there is None else tokens[part][there]
            made.append(self._run(program, read.reshape(-1), logits[part], there, rows, states, holds=holds))
        first = 0
        for cache in caches:
            own = slice(first, first := first + len(cache.lengths))
            if holds:
                cache.held = [partial(_settle, made, own)]
            else:
                advance(cache, width, None if lengths is None else lengths[own])
        return logits

    def _run(
        self, program: Program, tokens: Tensor, logits: Tensor, there: Tensor | None, rows: Tensor,
        states: Sequence[Sequence[State]], *, holds: bool,
    ) -> Held:  # fmt: skip
        """Tokens (M,), in the order of the rows, to their places `there` (B, T) in logits (B, T, V), or to all."""
        needed = len(tokens) * program.width
        if self._workspace.numel() < needed:
            self._workspace = torch.empty(needed)
        embedded = self.model.embed(tokens[None])[0]
        self._workspace[: embedded.numel()].view_as(embedded).copy_(embedded)
        out = logits.flatten(0, 1) if there is None else logits.new_empty(len(tokens), logits.shape[2])
        held = program.run(self._workspace, out, rows, states, holds=holds)
        if there is not None:
            logits[there] = out
        return held


def _runs(tokens: Tensor, caches: Sequence[Cache]) -> bool:
    if not 0 < tokens.shape[1] <= native.MOST_ROWS or not len(tokens) or tokens.device.type != "cpu":
        return False
    if torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
        return False
    return len({cache.held is None for cache in caches}) == 1 and all(
        not cache.decode_window_compat
        and cache.used
        and (cache.started or not cache.meta)
        and cache.ssm_dtypes <= STATE_DTYPES
        for cache in caches
    )


def _rows(caches: Sequence[Cache], counts: Tensor) -> Tensor:
    """The table (B, 5) of all rows, native.ROW, the tokens of one after those of the other."""
    parts = [
        torch.stack(
            [cache.meta + cache.lengths, torch.full_like(cache.lengths, number), torch.arange(len(cache.lengths))], 1
        )
        for number, cache in enumerate(caches)
    ]
    return torch.cat([torch.cat(parts), torch.stack([counts.cumsum(0) - counts, counts], 1)], 1)


def _runs_of(rows: Tensor, width: int) -> list[Tensor]:
    """Rows of at most `width` tokens in tables for runs that each count their tokens from 0."""
    parts = list(rows.split(max(1, native.MOST_ROWS // width)))
    for part in parts[1:]:
        part[:, 3] -= int(part[0, 3])
    return parts


def _settle(made: Sequence[Held], own: slice, counts: Tensor) -> None:
    """Advance the rows `own`, counted over all the runs of a pass, by the tokens that count."""
    first = 0
    for run in made:
        start, end = max(own.start, first), min(own.stop, first + len(run.rows))
        if start < end:
            run.settle(torch.arange(start - first, end - first), counts[start - own.start : end - own.start])
        first += len(run.rows)


def _states(cache: Cache, more: int) -> list[State]:
    """Two a block, its keys and values and its recurrent state, with room for so many more tokens."""
    used = cache.meta + cache.used + more
    return [state for block in cache.blocks for state in _of_block(block, used)]


def _of_block(state: BlockState | None, used: int) -> tuple[State, State]:
    if isinstance(state, KeyValueState):
        return _key_values(state, used), NOTHING
    if isinstance(state, ConvSSMState):
        return NOTHING, State.of(state.conv, state.ssm)
    if isinstance(state, HybridState):
        kept = NOTHING if state.attention is None else _key_values(state.attention, used)
        return kept, State.of(state.ssm.conv, state.ssm.ssm)
    return NOTHING, NOTHING


def _key_values(state: KeyValueState, used: int) -> State:
    state.reserve(used if state.window is None else min(used, state.meta + state.window + 1))
    return State.of(state.keys, state.values)
