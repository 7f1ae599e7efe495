"""Mamba-1's selective scan (Gu & Dao 2023, algorithm 2): the reference, the chunked form and the step.

Per channel i and state n, with decay a_t = exp(dt_t[i] A[i, n]):
    S_t[i, n] = a_t S_{t-1}[i, n] + dt_t[i] u_t[i] B_t[n]        y_t[i] = sum over n of S_t[i, n] C_t[n] + D[i] u_t[i]
`selective_recurrence` is this line and the truth. Every channel and state decays at its own rate, so there is no
matrix form as in ssd.py: `selective_scan` walks chunks and runs all tokens of a chunk side by side. Decays are
multiplied up, never divided nor summed as logarithms, so nothing overflows; its gradient computes each chunk again,
so states of all tokens are never held at once. Legend: B batch, T time, I channels, N state size, Q tokens in a chunk.

`runs (B, T)` numbers the documents of a row (`ssd.segment_runs`): the state is zero at the start of each but the
first, which goes on from `state`. A token past its row's `lengths` leaves the state alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

CHUNK = 128  # tokens whose states (B, Q, I, N) are held at once


def selective_recurrence(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    *,
    state: Tensor | None = None,
    runs: Tensor | None = None,
    lengths: Tensor | None = None,
    dt_bias: Tensor | None = None,
    gate: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`selective_scan` one token at a time; slow and obvious."""
    batch, time, channels = u.shape
    state = u.new_zeros(batch, channels, A.shape[1]) if state is None else state
    outputs = []
    for t in range(time):
        before = state
        if runs is not None and t > 0:
            state = state * (runs[:, t] == runs[:, t - 1])[:, None, None]
        at = None if gate is None else gate[:, t]
        y, state = selective_step(u[:, t], dt[:, t], A, B[:, t], C[:, t], D, state, dt_bias=dt_bias, gate=at)
        if lengths is not None:
            state = torch.where((t < lengths)[:, None, None], state, before)
        outputs.append(y)
    return torch.stack(outputs, 1), state


def selective_step(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    state: Tensor,
    *,
    dt_bias: Tensor | None = None,
    gate: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Advance one token: u, dt (B, I), A (I, N), B and C (B, N), D (I,), state (B, I, N); y (B, I) and the state.

    y has u's dtype; the state is computed in float32 or wider and keeps its dtype. dt_bias and gate as in
    `selective_scan`. The fast form advances `state` in place.
    """
    wide = torch.promote_types(u.dtype, torch.float32)
    x, step = u.to(wide), _time_step(dt, dt_bias, wide)
    decay = torch.exp(step[..., None] * A.to(wide))
    new = torch.addcmul(state.to(wide) * decay, (step * x)[..., None], B.to(wide)[:, None, :])
    y = torch.matmul(new, C.to(wide)[..., None])[..., 0]
    return _finish(y, x, D, gate).to(u.dtype), new.to(state.dtype)


def selective_scan(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    *,
    state: Tensor | None = None,
    runs: Tensor | None = None,
    lengths: Tensor | None = None,
    dt_bias: Tensor | None = None,
    gate: Tensor | None = None,
    chunk_size: int = CHUNK,
) -> tuple[Tensor, Tensor]:
    """Scan u and dt (B, T, I) with A (I, N) negative, B and C (B, T, N), D (I,); y (B, T, I) and the final state.

    dt are time steps >= 0; with dt_bias (I,) they are softplus(dt + dt_bias) instead. With gate (B, T, I), y is
    multiplied by silu(gate). state (B, I, N) continues earlier tokens; of row b only the first lengths[b] tokens
    enter the state, and the final state (B, I, N) is that after them. y has u's dtype; states and sums are float32,
    or wider where u is.
    """
    wide = torch.promote_types(u.dtype, torch.float32)
    with torch.autocast(u.device.type, enabled=False):
        x, step = u.to(wide), _time_step(dt, dt_bias, wide)
        starts = None if runs is None else F.pad(runs[:, 1:] != runs[:, :-1], (1, 0))
        if lengths is not None:
            valid = torch.arange(u.shape[1], device=u.device) < lengths[:, None]
            step = step * valid[..., None]
            starts = None if starts is None else starts & valid
        before = x.new_zeros(u.shape[0], *A.shape) if state is None else state.to(wide)
        args = (x, step, A.to(wide), B.to(wide), C.to(wide), before, starts, chunk_size)
        y, final = _Chunked.apply(*args)
        return _finish(y, x, D, gate).to(u.dtype), final


def _time_step(dt: Tensor, dt_bias: Tensor | None, wide: torch.dtype) -> Tensor:
    return dt.to(wide) if dt_bias is None else F.softplus(dt.to(wide) + dt_bias.to(wide))


def _finish(y: Tensor, x: Tensor, D: Tensor | None, gate: Tensor | None) -> Tensor:
    if D is not None:
        y = torch.addcmul(y, D.to(x.dtype), x)
    return y if gate is None else y * F.silu(gate.to(x.dtype))


def _decays(dt: Tensor, A: Tensor, starts: Tensor | None) -> Tensor:
    """exp(dt A) (B, Q, I, N), and 0 where a document begins."""
    decay = torch.exp(dt[..., None] * A)
    return decay if starts is None else decay.masked_fill_(starts[..., None, None], 0)


def _linear_scan(decay: Tensor, x: Tensor) -> Tensor:
    """S_t = decay_t S_{t-1} + x_t from S = 0, for all t, in place of x (B, Q, I, N); decay is used up.

    Pieces of about sqrt(Q) tokens run side by side from zero; each then takes on the end of the piece before.
    """
    batch, time = x.shape[:2]
    piece = max(1, round(time**0.5))
    while time % piece:
        piece -= 1
    pieces = time // piece
    d, s = (a.view(batch, pieces, piece, *a.shape[2:]) for a in (decay, x))
    for q in range(1, piece):
        s[:, :, q].addcmul_(d[:, :, q], s[:, :, q - 1])
        d[:, :, q].mul_(d[:, :, q - 1])
    for p in range(1, pieces):
        s[:, p].addcmul_(d[:, p], s[:, p - 1, -1:])
    return x


def _states(x: Tensor, dt: Tensor, B: Tensor, decay: Tensor, before: Tensor) -> Tensor:
    """The states (B, Q, I, N) after each token of a chunk that starts from `before`; decay is used up."""
    inputs = (dt * x)[..., None] * B[:, :, None, :]
    inputs[:, 0].addcmul_(decay[:, 0], before)
    return _linear_scan(decay, inputs)


class _Chunked(torch.autograd.Function):
    """The scan without D, all in one dtype; keeps the states before each chunk for the gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        before: Tensor,
        starts: Tensor | None,
        chunk_size: int,
    ) -> tuple[Tensor, Tensor]:
        y, state, kept = torch.empty_like(x), before, []
        for at in _chunks(x.shape[1], chunk_size):
            kept.append(state)
            decay = _decays(dt[:, at], A, None if starts is None else starts[:, at])
            states = _states(x[:, at], dt[:, at], B[:, at], decay, state)
            torch.matmul(states, C[:, at, :, None], out=y[:, at, :, None])
            state = states[:, -1].clone()
        ctx.chunk_size = chunk_size
        keeps = kept if any(ctx.needs_input_grad) else []
        ctx.save_for_backward(x, dt, A, B, C, starts, *keeps)
        ctx.set_materialize_grads(False)
        return y, state if kept else before.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, dfinal: Tensor | None) -> tuple[Tensor | None, ...]:
        x, dt, A, B, C, starts, *kept = ctx.saved_tensors
        dy = torch.zeros_like(x) if dy is None else dy
        carried = x.new_zeros(x.shape[0], *A.shape) if dfinal is None else dfinal
        dx, ddt, dB, dC, dA = (torch.zeros_like(a) for a in (x, dt, B, C, A))
        for at, before in reversed(list(zip(_chunks(x.shape[1], ctx.chunk_size), kept, strict=True))):
            decay = _decays(dt[:, at], A, None if starts is None else starts[:, at])
            states = _states(x[:, at], dt[:, at], B[:, at], decay.clone(), before)
            dC[:, at] = torch.matmul(dy[:, at, None, :], states)[:, :, 0]
            up = _state_gradients(dy[:, at], C[:, at], decay, carried)
            # what decays: the states one token earlier
            decayed = torch.cat([before[:, None], states[:, :-1]], 1).mul_(decay)
            carried = up[:, 0] * decay[:, 0]
            dB[:, at] = torch.matmul((dt * x)[:, at, None, :], up)[:, :, 0]
            inner = torch.matmul(up, B[:, at, :, None])[..., 0]  # the gradient of dt x
            pull = decayed.mul_(up)  # the gradient of dt A
            dx[:, at] = inner * dt[:, at]
            ddt[:, at] = inner * x[:, at] + (pull * A).sum(-1)
            dA += (pull * dt[:, at, :, None]).sum((0, 1))
        return dx, ddt, dA, dB, dC, carried, None, None


def _state_gradients(dy: Tensor, C: Tensor, decay: Tensor, carried: Tensor) -> Tensor:
    """dS_t = dy_t C_t + decay_{t+1} dS_{t+1} (B, Q, I, N), where `carried` is the last term after the last token."""
    flipped = (dy[..., None] * C[:, :, None, :]).flip(1)
    flipped[:, 0] += carried
    following = torch.cat([torch.ones_like(decay[:, :1]), decay[:, 1:].flip(1)], 1)
    return _linear_scan(following, flipped).flip(1)


def _chunks(time: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, time)) for start in range(0, time, size)]
