// One token of many sequences through Mamba-1's selective scan; lanes are states, which lie together in memory.
#pragma once
#include "selective_scan.h"

namespace halflap {
namespace selective {

struct Step {
    int64_t batch, channels, states, threads;
    Rows u, dt, B, C, gate, y;  // (B, channels or states): `time` is not used
    const float *A, *D, *dt_bias;
    float* state;  // (B, I, N), advanced in place
};

constexpr int64_t PIECE = 16;  // channels of one sequence that are one piece of work
inline int64_t step_pieces(int64_t channels) { return (channels + PIECE - 1) / PIECE; }

// of a sequence, its state (channels of the piece, N) from one place to another, which may be the same; a function of its
// own, so that it is one for all. A state in bfloat16 is rounded after every token.
template <class S>
__attribute__((noinline)) void step_piece(const Step& a, int64_t b, int64_t piece, const S* from, S* to) {
    const int64_t N = a.states, padded = round_up(N, VL), c0 = piece * PIECE, left = a.channels - c0;
    Carver carver(2 * round_up(padded, 16));
    float *B = carver.take(padded), *C = carver.take(padded), dt[PIECE], x[PIECE], out[PIECE];
    for (int64_t n = 0; n < N; n += VL) store(B + n, a.B.get(b, 0, n, N - n)), store(C + n, a.C.get(b, 0, n, N - n));
    for (int64_t i = 0; i < PIECE && i < left; i += VL) {
        vf raw = a.dt.get(b, 0, c0 + i, left - i);
        vf d = a.dt_bias ? softplus(raw + load_to(a.dt_bias + c0 + i, left - i)) : raw;
        store(dt + i, d), store(x + i, d * a.u.get(b, 0, c0 + i, left - i));
    }
    vf sums[PIECE] = {};
    for (int64_t i = 0; i < PIECE && i < left; i++) {
        const S* row = from + i * N;
        const float* rate = a.A + (c0 + i) * N;
        for (int64_t n = 0; n < N; n += VL) {
            vf kept = decay(splat(dt[i]), load_to(rate + n, N - n) * RATE_SCALE);
            vf state = load_to(row + n, N - n) * kept + x[i] * load(B + n);
            store_to(to + i * N + n, state, N - n);
            sums[i] += state * load(C + n);
        }
    }
    sums_of_16(sums, out);
    for (int64_t i = 0; i < PIECE && i < left; i += VL) {
        vf y = load(out + i);
        if (a.D) y += load_to(a.D + c0 + i, left - i) * a.u.get(b, 0, c0 + i, left - i);
        if (a.gate) y *= silu<float>(a.gate.get(b, 0, c0 + i, left - i));
        a.y.put(b, 0, c0 + i, y, left - i);
    }
}

inline void step(const Step& a) {
    const int64_t pieces = step_pieces(a.channels);
    parallel_ranges(a.batch * pieces, 1 + 16384 / (PIECE * round_up(a.states, VL)), (int)a.threads, [&](int64_t begin, int64_t end) {
        for (int64_t task = begin; task < end; task++) {
            float* state = a.state + (task / pieces * a.channels + task % pieces * PIECE) * a.states;
            step_piece(a, task / pieces, task % pieces, state, state);
        }
    });
}

}  // namespace selective
}  // namespace halflap
