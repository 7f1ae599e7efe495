"""Mamba-2's state-space recurrence (Dao & Gu 2024, section 6): the reference, the chunked form and the step.

Per head h of group g, with decay a_t = exp(dt_t A):
    S_t = a_t S_{t-1} + dt_t x_t (outer) B_t        state (P, N)
    y_t = S_t C_t + D x_t
`ssd_recurrence` is these two lines and the truth; `ssd_chunked` computes the same by matrix products inside chunks
and a carry between them, for any chunk size. Legend: B T H P G N as everywhere, Q tokens in a chunk, R heads a group.

Segments are documents packed into a row: the state is zero at the start of each. `runs (B, T)` numbers maximal
stretches of equal segment, so equal numbers mean the same document. A token with dt = 0 leaves the state alone,
which is how right padding passes through.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def segment_runs(segments: Tensor) -> Tensor:
    """Number the maximal stretches of equal segment in each row, from 0: (B, T) integers to (B, T) int64."""
    borders = segments[:, 1:] != segments[:, :-1]
    return F.pad(borders.to(torch.int64).cumsum(1), (1, 0))


def ssd_recurrence(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    *,
    initial_state: Tensor | None = None,
    runs: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Run the recurrence one token at a time; slow and obvious, in the dtype of `x`.

    x (B, T, H, P); dt (B, T, H), positive; A (H,), negative; B and C (B, T, G, N); D (H,); initial_state (B, H, P, N);
    runs (B, T). Returns y (B, T, H, P) and the state after the last token (B, H, P, N).
    """
    batch, time, heads, channels = x.shape
    size = B.shape[3]
    state = x.new_zeros(batch, heads, channels, size) if initial_state is None else initial_state.to(x.dtype)
    outputs = []
    for t in range(time):
        if runs is not None and t > 0:
            state = state * (runs[:, t] == runs[:, t - 1])[:, None, None, None]
        y, state = ssd_step(x[:, t], dt[:, t], A, B[:, t], C[:, t], D, state)
        outputs.append(y)
    return torch.stack(outputs, 1), state


def ssd_step(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Advance one token: x (B, H, P), dt (B, H), B and C (B, G, N), state (B, H, P, N); y (B, H, P) and the state."""
    batch, heads, channels = x.shape
    groups, size = B.shape[1:]
    grouped = state.view(batch, groups, heads // groups, channels, size)
    decay = torch.exp(dt * A).view(batch, groups, -1, 1, 1)
    inputs = (dt[..., None] * x).view(batch, groups, -1, channels, 1)
    grouped = torch.addcmul(grouped * decay, inputs, B[:, :, None, None, :])
    y = torch.matmul(grouped, C[:, :, None, :, None]).view(batch, heads, channels)
    if D is not None:
        y = y + D[:, None] * x
    return y, grouped.view(batch, heads, channels, size)


def ssd_chunked(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    *,
    chunk_size: int = 128,
    initial_state: Tensor | None = None,
    runs: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The same function as `ssd_recurrence`, by matrix products (section 6); cost O(T (Q (N + P) + N P)) a head.

    Exact for every chunk size. The carry between chunks and all sums are in the dtype of `x` (float32 or wider).
    """
    batch, time, heads, channels = x.shape
    groups, size = B.shape[2:]
    per_group = heads // groups
    chunk = min(chunk_size, time)
    pad = -time % chunk
    if pad:  # dt = 0 on the padding: it neither reads into nor decays the state
        x, dt, B, C = (F.pad(a, (0, 0) * (a.dim() - 2) + (0, pad)) for a in (x, dt, B, C))
        runs = None if runs is None else F.pad(runs[:, None].float(), (0, pad), mode="replicate")[:, 0].to(runs.dtype)
    chunks = (time + pad) // chunk
    # (B, chunks, G, Q, ...): one matrix product serves all heads of a group where B or C is shared
    xs = x.view(batch, chunks, chunk, groups, per_group, channels)
    inputs = xs * dt.view(batch, chunks, chunk, groups, per_group, 1)
    Bs = B.view(batch, chunks, chunk, groups, size).transpose(2, 3)
    Cs = C.view(batch, chunks, chunk, groups, size).transpose(2, 3)
    log_decay = (dt * A).view(batch, chunks, chunk, heads).transpose(2, 3)  # (B, chunks, H, Q)
    # float64 sums make the difference of two of them as exact as summing the terms between
    total = log_decay.double().cumsum(-1)
    causal = torch.ones(chunk, chunk, dtype=torch.bool, device=x.device).tril()
    same = causal if runs is None else _same_run(runs.view(batch, chunks, chunk)) & causal
    spans = (total[..., :, None] - total[..., None, :]).to(x.dtype).masked_fill(~same, -torch.inf)

    scores = torch.matmul(Cs, Bs.transpose(-1, -2))  # (B, chunks, G, Q, Q)
    weights = torch.exp(spans).view(batch, chunks, groups, per_group, chunk, chunk) * scores[:, :, :, None]
    within = torch.matmul(weights, inputs.permute(0, 1, 3, 4, 2, 5))  # (B, chunks, G, R, Q, P)

    to_end, from_start, through = _chunk_decays(total, runs, chunks, chunk, x.dtype)
    decayed = inputs * to_end.transpose(2, 3).reshape(batch, chunks, chunk, groups, per_group, 1)
    decayed = decayed.permute(0, 1, 3, 4, 5, 2).reshape(batch, chunks, groups, per_group * channels, chunk)
    added = torch.matmul(decayed, Bs).view(batch, chunks, heads, channels, size)
    carried, final = _carry(added, through, initial_state)

    carried = carried.view(batch, chunks, groups, per_group * channels, size)
    past = torch.matmul(Cs, carried.transpose(-1, -2)).view(batch, chunks, groups, chunk, per_group, channels)
    past = past.permute(0, 1, 2, 4, 3, 5) * from_start.view(batch, chunks, groups, per_group, chunk, 1)
    y = (within + past).permute(0, 1, 4, 2, 3, 5).reshape(batch, time + pad, heads, channels)[:, :time]
    if D is not None:
        y = y + D[:, None] * x[:, :time]
    return y, final


def _same_run(runs: Tensor) -> Tensor:
    """Pairs of tokens of one chunk in the same run: (B, chunks, 1, Q, Q)."""
    return (runs[..., :, None] == runs[..., None, :])[:, :, None]


def _chunk_decays(
    total: Tensor, runs: Tensor | None, chunks: int, chunk: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Decay from each token to its chunk's end, from its start (B, chunks, H, Q), and across it (B, chunks, H)."""
    to_end = torch.exp((total[..., -1:] - total).to(dtype))
    from_start = torch.exp(total.to(dtype))
    through = torch.exp(total[..., -1].to(dtype))
    if runs is None:
        return to_end, from_start, through
    runs = runs.view(runs.shape[0], chunks, 1, chunk)
    last = runs[..., -1:]
    before = torch.cat([runs[:, :1, :, :1], last[:, :-1]], 1)  # the run that the carried state belongs to
    return to_end * (runs == last), from_start * (runs == before), through * (last == before)[..., 0]


def _carry(added: Tensor, through: Tensor, initial_state: Tensor | None) -> tuple[Tensor, Tensor]:
    """The state before each chunk (B, chunks, H, P, N) and after the last (B, H, P, N)."""
    state = torch.zeros_like(added[:, 0]) if initial_state is None else initial_state.to(added.dtype)
    before = []
    for c in range(added.shape[1]):
        before.append(state)
        state = torch.addcmul(added[:, c], state, through[:, c, :, None, None])
    return torch.stack(before, 1), state
