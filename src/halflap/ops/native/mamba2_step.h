// One token of many sequences through a Mamba-2 block, between its projections; bound by reading and writing the state.
//
// A task is one group of one sequence, which owns its slice of the convolution, its heads' states and its slice of the
// norm.
#pragma once
#include "parallel.h"
#include "vector.h"

namespace halflap {

// One token of depthwise convolutions: silu(bias + sum of weight times inputs), of channels c0 .. c0 + count of `all`.
// x is the newest input and state (W-1, all) holds those before it; it loses the oldest and gains the newest.
template <class X, class S>
void convolve_step(const float* weight, const float* bias, int64_t W, const X* x, S* state, int64_t all, int64_t c0, int64_t count, float* y) {
    for (int64_t i = 0; i < count; i += VL) {
        const int64_t c = c0 + i, left = count - i;
        const vf newest = load_to(x + c, left);
        vf sum = load_to(weight + (W - 1) * all + c, left) * newest;  // weight (W, all)
        if (bias) sum += load_to(bias + c, left);
        for (int64_t k = 0; k < W - 1; k++) {
            const vf older = load_to(state + k * all + c, left);
            sum += load_to(weight + k * all + c, left) * older;
            if (k) store_to(state + (k - 1) * all + c, older, left);
        }
        if (W > 1) store_to(state + (W - 2) * all + c, newest, left);
        store_to(y + i, silu<float>(sum), left);
    }
}

struct Mamba2Step {
    int64_t heads, channels, groups, states, width;
    float low, high, eps;  // low, high: limits of the time step
    const float *conv_weight, *conv_bias, *dt_bias, *A_log, *D, *norm_weight;  // conv_weight (W, C); conv_bias may be null

    int64_t inner() const { return heads * channels; }
    int64_t conv() const { return inner() + 2 * groups * states; }
    int64_t row() const { return inner() + conv() + heads; }
};

// S = decay S + (step x) outer B and y = S C + D x for one head
inline void head_step(float* S, const float* x, const float* B, const float* C, float step, float decay, float D, int64_t P, int64_t N, float* y) {
    for (int64_t p = 0; p < P; p++) {
        float* row = S + p * N;
        const float in = step * x[p];
        vf dot = splat(0);
        for (int64_t n = 0; n < N; n += VL) {
            vf state = decay * load_to(row + n, N - n) + in * load(B + n);
            store_to(row + n, state, N - n);
            dot += state * load(C + n);
        }
        y[p] = sum(dot) + D * x[p];
    }
}

// Group g of one sequence: projected is its row z, x, B, C, dt; conv_state (W-1, C) and ssm_state (H, P, N) are its own
// and advance in place; out is its row (I)
template <class X, class S>
void mamba2_group_step(const Mamba2Step& s, int64_t g, const X* projected, S* conv_state, float* ssm_state, X* out) {
    const int64_t P = s.channels, N = s.states, inner = s.inner(), bc = s.groups * N, conv = s.conv();
    const int64_t per_group = s.heads / s.groups, size = per_group * P, padded = round_up(N, VL);
    const X *z = projected, *x = z + inner, *dt = x + conv;
    Carver carver(2 * round_up(size, 16) + 2 * round_up(padded, 16));
    float *xs = carver.take(size), *ys = carver.take(size), *B = carver.take(padded), *C = carver.take(padded);
    memset(B, 0, padded * sizeof(float)), memset(C, 0, padded * sizeof(float));
    auto convolve = [&](int64_t c0, int64_t count, float* y) {
        convolve_step(s.conv_weight, s.conv_bias, s.width, x, conv_state, conv, c0, count, y);
    };
    convolve(g * size, size, xs);
    convolve(inner + g * N, N, B);
    convolve(inner + bc + g * N, N, C);
    for (int64_t h = g * per_group; h < (g + 1) * per_group; h++) {
        float time = softplus(splat(widen(dt[h]) + s.dt_bias[h]))[0];
        time = time < s.low ? s.low : time > s.high ? s.high : time;
        const float decay = std::exp(-std::exp(s.A_log[h]) * time);
        const int64_t at = (h - g * per_group) * P;
        head_step(ssm_state + h * P * N, xs + at, B, C, time, decay, s.D[h], P, N, ys + at);
    }
    vf squares = splat(0);
    for (int64_t c = 0; c < size; c += VL) {
        vf v = load_to(ys + c, size - c) * silu<float>(load_to(z + g * size + c, size - c));
        store_to(ys + c, v, size - c);
        squares += v * v;
    }
    const float scale = 1 / std::sqrt(sum(squares) / size + s.eps);
    for (int64_t c = 0; c < size; c += VL) {
        const int64_t at = g * size + c, left = size - c;
        store_to(out + at, load_to(ys + c, left) * scale * load_to(s.norm_weight + at, left), left);
    }
}

}  // namespace halflap
