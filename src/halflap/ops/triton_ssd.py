# pyright: reportMissingImports=false, reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
# pyright: reportIndexIssue=false, reportOperatorIssue=false
"""Mamba-2's scan over a sequence in four Triton kernels (Dao & Gu 2024, section 6): `ops.ssd.ssd_chunked` on a GPU.

totals    time steps, and the logarithms of the decay from the start of a chunk of Q tokens to each of them
states    what the tokens of each chunk leave behind at its end (P, N)
pass      the states before each chunk, one chunk after another, in the place of those
outputs   what a tile of tokens reads from the state before its chunk and from the chunk's tokens up to itself

Logarithms are summed in float64 and kept as two float32 numbers, `total` and what it lacks, `rest`: the difference of
two of them is then as exact as the sum of the terms between, without float64 in the kernels that read them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from halflap.models.config import Mamba2Config
from halflap.ops.triton_common import block, precision, tiles, time_step

CHUNK = 128  # tokens between two states that are kept; any number gives the same function
TILE, TILE_BYTES = 64, 256 * 64  # tokens of a product; of their B in a tile, so that shared memory suffices
MOST_STATES = 256  # of a channel; a tile of outputs holds all


@triton.jit
def _totals(
    projected, dt_bias, A_log, lengths, step, total, rest, time, width, heads, low, high,
    CHUNK: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    q = tl.arange(0, CHUNK)
    h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    chunk, row = tl.program_id(0), tl.program_id(2).to(tl.int64)
    t, in_heads = chunk * CHUNK + q, h < heads
    inside = (t < time)[:, None] & in_heads[None, :]
    # the time steps are the last columns
    raw = tl.load(projected + (row * time + t[:, None]) * width + width - heads + h[None, :], mask=inside, other=0.0)
    raw = raw.to(tl.float32) + tl.load(dt_bias + h, mask=in_heads, other=0.0).to(tl.float32)[None, :]
    if lengths is not None:
        inside = inside & (t < tl.load(lengths + row))[:, None]
    taken = tl.where(inside, time_step(raw, low, high), 0.0)  # 0: neither read into the state nor a decay of it
    A = tl.exp(tl.load(A_log + h, mask=in_heads, other=0.0).to(tl.float32))
    summed = tl.cumsum((-taken * A[None, :]).to(tl.float64), axis=0)
    near = summed.to(tl.float32)
    place = (row * heads + h[None, :]) * (tl.num_programs(0) * CHUNK) + t[:, None]
    kept = (t >= 0)[:, None] & in_heads[None, :]
    tl.store(step + place, taken, mask=kept)
    tl.store(total + place, near, mask=kept)
    tl.store(rest + place, (summed - near.to(tl.float64)).to(tl.float32), mask=kept)


@triton.jit
def _states(
    mixed, step, total, rest, runs, states, time, chunks, heads, channels, groups, size,
    CHUNK: tl.constexpr, TILE: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    row, chunk = (tl.program_id(0) // chunks).to(tl.int64), tl.program_id(0) % chunks
    head, tiles_n = tl.program_id(1), tl.cdiv(size, BLOCK_N)
    p = tl.program_id(2) // tiles_n * BLOCK_P + tl.arange(0, BLOCK_P)
    n = tl.program_id(2) % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    in_head, in_state = p < channels, n < size
    inner, width = heads * channels, heads * channels + 2 * groups * size
    B = mixed + inner + head // (heads // groups) * size
    decays = ((row * heads + head) * chunks + chunk) * CHUNK
    end, end_rest = tl.load(total + decays + CHUNK - 1), tl.load(rest + decays + CHUNK - 1)
    added = tl.zeros((BLOCK_P, BLOCK_N), tl.float32)
    for start in range(0, CHUNK, TILE):
        q = start + tl.arange(0, TILE)
        t = chunk * CHUNK + q
        in_time, token = t < time, (row * time + t) * width
        span = (end - tl.load(total + decays + q)) + (end_rest - tl.load(rest + decays + q))
        weight = tl.load(step + decays + q) * tl.exp(span)
        if runs is not None:
            last = tl.load(runs + row * time + tl.minimum(chunk * CHUNK + CHUNK, time) - 1)
            weight = tl.where(tl.load(runs + row * time + t, mask=in_time, other=-1) == last, weight, 0.0)
        place = mixed + token[None, :] + head * channels + p[:, None]
        x = tl.load(place, mask=in_head[:, None] & in_time[None, :], other=0.0)
        read = tl.load(B + token[:, None] + n[None, :], mask=in_time[:, None] & in_state[None, :], other=0.0)
        weighed = (x.to(tl.float32) * weight[None, :]).to(read.dtype)
        added = tl.dot(weighed, read, added, input_precision=PRECISION)
    place = states + (((row * chunks + chunk) * heads + head) * channels + p[:, None]) * size + n[None, :]
    tl.store(place, added, mask=in_head[:, None] & in_state[None, :])


@triton.jit
def _pass(states, total, runs, initial, final, time, chunks, heads, size, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    row, head = (tl.program_id(0) // heads).to(tl.int64), tl.program_id(0) % heads
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)  # of P N numbers
    inside, own = at < size, (row * heads + head) * size + at
    if initial is None:
        state = tl.zeros((BLOCK,), tl.float32)
    else:
        state = tl.load(initial + own, mask=inside, other=0.0).to(tl.float32)
    if runs is not None:
        before = tl.load(runs + row * time)
    for chunk in range(chunks):
        place = states + ((row * chunks + chunk) * heads + head) * size + at
        added = tl.load(place, mask=inside, other=0.0)
        tl.debug_barrier()  # read by all threads before any of them overwrites it
        tl.store(place, state, mask=inside)
        through = tl.exp(tl.load(total + ((row * heads + head) * chunks + chunk) * CHUNK + CHUNK - 1))
        if runs is not None:
            last = tl.load(runs + row * time + tl.minimum(chunk * CHUNK + CHUNK, time) - 1)
            through = tl.where(last == before, through, 0.0)
            before = last
        state = state * through + added
    tl.store(final + own, state, mask=inside)


@triton.jit
def _outputs(
    mixed, step, total, rest, runs, states, D, y, time, chunks, heads, channels, groups, size,
    CHUNK: tl.constexpr, TILE: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    row, chunk = (tl.program_id(0) // chunks).to(tl.int64), tl.program_id(0) % chunks
    head, tiles_q = tl.program_id(1), CHUNK // TILE
    tile = tl.program_id(2) % tiles_q
    q = tile * TILE + tl.arange(0, TILE)
    p = tl.program_id(2) // tiles_q * BLOCK_P + tl.arange(0, BLOCK_P)
    n = tl.arange(0, BLOCK_N)
    t, in_head, in_state = chunk * CHUNK + q, p < channels, n < size
    in_time = t < time
    inner, width = heads * channels, heads * channels + 2 * groups * size
    X, B = mixed + head * channels, mixed + inner + head // (heads // groups) * size
    decays = ((row * heads + head) * chunks + chunk) * CHUNK
    own_total, own_rest = tl.load(total + decays + q), tl.load(rest + decays + q)
    token = (row * time + t) * width
    place = B + groups * size + token[:, None] + n[None, :]
    C = tl.load(place, mask=in_time[:, None] & in_state[None, :], other=0.0)
    from_start = tl.exp(own_total)
    if runs is not None:
        own_run = tl.load(runs + row * time + t, mask=in_time, other=-1)
        before = tl.load(runs + row * time + tl.maximum(chunk * CHUNK - 1, 0))
        from_start = tl.where(own_run == before, from_start, 0.0)
    place = states + (((row * chunks + chunk) * heads + head) * channels + p[None, :]) * size + n[:, None]
    carried = tl.load(place, mask=in_state[:, None] & in_head[None, :], other=0.0).to(C.dtype)
    out = tl.dot(C, carried, input_precision=PRECISION) * from_start[:, None]
    for start in range(0, tile * TILE + TILE, TILE):
        k = start + tl.arange(0, TILE)
        s = chunk * CHUNK + k
        there, source = s < time, (row * time + s) * width
        read = tl.load(B + source[None, :] + n[:, None], mask=in_state[:, None] & there[None, :], other=0.0)
        scores = tl.dot(C, read, input_precision=PRECISION)
        seen = q[:, None] >= k[None, :]
        if runs is not None:
            seen = seen & (own_run[:, None] == tl.load(runs + row * time + s, mask=there, other=-1)[None, :])
        span = own_total[:, None] - tl.load(total + decays + k)[None, :]
        span += own_rest[:, None] - tl.load(rest + decays + k)[None, :]
        scores *= tl.exp(tl.where(seen, span, float("-inf"))) * tl.load(step + decays + k)[None, :]
        x = tl.load(X + source[:, None] + p[None, :], mask=there[:, None] & in_head[None, :], other=0.0)
        out = tl.dot(scores.to(x.dtype), x, out, input_precision=PRECISION)
    inside = in_time[:, None] & in_head[None, :]
    x = tl.load(X + token[:, None] + p[None, :], mask=inside, other=0.0).to(tl.float32)
    out += tl.load(D + head).to(tl.float32) * x
    place = y + (row * time + t[:, None]) * inner + head * channels + p[None, :]
    tl.store(place, out.to(y.dtype.element_ty), mask=inside)


def scan(
    projected: Tensor,
    mixed: Tensor,
    dt_bias: Tensor,
    A_log: Tensor,
    D: Tensor,
    config: Mamba2Config,
    *,
    initial_state: Tensor | None = None,
    runs: Tensor | None = None,
    lengths: Tensor | None = None,
    chunk: int = CHUNK,
    tile: int | None = None,
) -> tuple[Tensor, Tensor]:
    """y (B, T, H P) in the dtype of `mixed` and the final state (B, H, P, N) in float32.

    projected (B, T, 2I + 2GN + H) has the raw time steps in its last columns, mixed (B, T, I + 2GN) is [x | B | C]
    after convolution and SiLU; both dense. The rest as in `ops.mamba2.mamba2_mix`. `chunk` and `tile` are powers of two
    from 16 on, a tile no longer than a chunk.
    """
    c, device = config, mixed.device
    (batch, time), heads, channels, size = mixed.shape[:2], c.num_heads, c.head_dim, c.state_size
    chunks, float32 = tiles(time, chunk), torch.float32
    step, total, rest = torch.empty(3, batch, heads, chunks * chunk, dtype=float32, device=device)
    states = torch.empty(batch, chunks, heads, channels, size, dtype=float32, device=device)
    final = torch.empty(batch, heads, channels, size, dtype=float32, device=device)
    y = torch.empty(batch, time, c.inner_size, dtype=mixed.dtype, device=device)
    initial, numbers, counted = (None if a is None else a.contiguous() for a in (initial_state, runs, lengths))

    some_heads = block(heads, most=8)
    _totals[(chunks, tiles(heads, some_heads), batch)](
        projected, dt_bias, A_log, counted, step, total, rest, time, projected.shape[2], heads, *c.time_step_limit,
        CHUNK=chunk, BLOCK_H=some_heads,
    )  # fmt: skip
    sizes = (time, chunks, heads, channels, c.num_groups, size)
    block_p, part_n, whole_n = block(channels, 16, 64), block(size, 16, 64), block(size, 16)
    tile = tile or max(16, min(TILE, TILE_BYTES // (whole_n * mixed.itemsize)))
    how = {"CHUNK": chunk, "TILE": tile, "BLOCK_P": block_p, "PRECISION": precision(), "num_stages": 2}
    _states[(batch * chunks, heads, tiles(channels, block_p) * tiles(size, part_n))](
        mixed, step, total, rest, numbers, states, *sizes, BLOCK_N=part_n, **how
    )
    span = block(channels * size, most=1024)
    _pass[(batch * heads, tiles(channels * size, span))](
        states, total, numbers, initial, final, time, chunks, heads, channels * size, CHUNK=chunk, BLOCK=span
    )
    _outputs[(batch * chunks, heads, tiles(channels, block_p) * (chunk // tile))](
        mixed, step, total, rest, numbers, states, D, y, *sizes, BLOCK_N=whole_n, **how
    )
    return y, final
