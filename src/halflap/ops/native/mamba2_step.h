// The next tokens of many sequences through a Mamba-2 block, between its projections; bound by reading and writing the
// state.
//
// A task is one group of one sequence, which owns its slice of the convolution, its heads' states and its slice of the
// norm. Several tokens are taken one after the other by the same code, so that each comes out as it would alone.
#pragma once
#include "parallel.h"
#include "vector.h"

namespace halflap {

// One token of depthwise convolutions: silu(bias + sum of weight times inputs), of `count` channels. x is the newest
// input and state (W-1, count), its rows `apart`, holds those before it; it loses the oldest and gains the newest.
// weight (W, count) has rows `all` apart.
template <class X, class S>
void convolve_step(const float* weight, int64_t all, const float* bias, int64_t W, const X* x, S* state, int64_t apart, int64_t count, float* y) {
    for (int64_t c = 0; c < count; c += VL) {
        const int64_t left = count - c;
        const vf newest = load_to(x + c, left);
        vf sum = load_to(weight + (W - 1) * all + c, left) * newest;
        if (bias) sum += load_to(bias + c, left);
        for (int64_t k = 0; k < W - 1; k++) {
            const vf older = load_to(state + k * apart + c, left);
            sum += load_to(weight + k * all + c, left) * older;
            if (k) store_to(state + (k - 1) * apart + c, older, left);
        }
        if (W > 1) store_to(state + (W - 2) * apart + c, newest, left);
        store_to(y + c, silu<float>(sum), left);
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

// to = decay from + (step x) outer B and y = (to before it is rounded) C + D x for one head; a function of its own, so
// that it is one for all
template <class S>
__attribute__((noinline)) void head_step(const S* from, S* to, const float* x, const float* B, const float* C, float step, float decay, float D, int64_t P, int64_t N, float* y) {
    for (int64_t p = 0; p < P; p++) {
        const S* row = from + p * N;
        S* next = to + p * N;
        const float in = step * x[p];
        vf dot = splat(0);
        for (int64_t n = 0; n < N; n += VL) {
            vf state = decay * load_to(row + n, N - n) + in * load(B + n);
            store_to(next + n, state, N - n);
            dot += state * load(C + n);
        }
        y[p] = sum(dot) + D * x[p];
    }
}

// out = norm_weight y silu(z) / rms(y silu(z)) over the `size` channels of one group; y is overwritten
template <class X>
void gate_and_norm(const Mamba2Step& s, int64_t size, const float* weight, const X* z, float* y, X* out) {
    vf squares = splat(0);
    for (int64_t c = 0; c < size; c += VL) {
        vf v = load_to(y + c, size - c) * silu<float>(load_to(z + c, size - c));
        store_to(y + c, v, size - c);
        squares += v * v;
    }
    const float scale = 1 / std::sqrt(sum(squares) / size + s.eps);
    for (int64_t c = 0; c < size; c += VL) store_to(out + c, load_to(y + c, size - c) * scale * load_to(weight + c, size - c), size - c);
}

// `count` tokens of group g of one sequence: projected are their rows z, x, B, C, dt, `stride` apart; conv_state (W-1, C)
// and ssm_state (H, P, N) are the sequence's own and advance in place, or with `holds` stay as they are; out are rows (I),
// `out_stride` apart. A state in bfloat16 is rounded after every token, so that more tokens at once change nothing
template <class X, class T, class S>
__attribute__((noinline)) void mamba2_group_steps(const Mamba2Step& s, int64_t g, int64_t count, const X* projected, int64_t stride, T* conv_state, S* ssm_state, bool holds, X* out, int64_t out_stride) {
    const int64_t P = s.channels, N = s.states, inner = s.inner(), bc = s.groups * N, conv = s.conv();
    const int64_t per_group = s.heads / s.groups, size = per_group * P, padded = round_up(N, VL), row = round_up(size, 16) + 2 * round_up(padded, 16);
    const int64_t tail = holds ? (s.width - 1) * (size + 2 * N) : 0, aside = holds ? P * N : 0;
    Carver carver(count * (row + round_up(size, 16)) + round_up(tail, 16) + round_up(aside, 16) + 16);
    float *convolved = carver.take(count * row), *ys = carver.take(count * round_up(size, 16));
    S* moved = (S*)carver.take(aside);
    T* held = (T*)carver.take(tail);
    memset(convolved, 0, count * row * sizeof(float));
    const struct { int64_t channel, count, to, held; } parts[] = {
        {g * size, size, 0, 0}, {inner + g * N, N, round_up(size, 16), size}, {inner + bc + g * N, N, round_up(size, 16) + round_up(padded, 16), size + N}};
    for (const auto& part : parts) {
        T* state = holds ? held + part.held : conv_state + part.channel;
        const int64_t apart = holds ? size + 2 * N : conv;
        if (holds)
            for (int64_t k = 0; k < s.width - 1; k++) memcpy(state + k * apart, conv_state + k * conv + part.channel, part.count * sizeof(T));
        for (int64_t t = 0; t < count; t++)
            convolve_step(s.conv_weight + part.channel, conv, s.conv_bias ? s.conv_bias + part.channel : nullptr, s.width,
                          projected + t * stride + inner + part.channel, state, apart, part.count, convolved + t * row + part.to);
    }
    for (int64_t h = g * per_group; h < (g + 1) * per_group; h++) {
        const int64_t at = (h - g * per_group) * P;
        const S* from = ssm_state + h * P * N;
        S* to = holds ? moved : ssm_state + h * P * N;
        for (int64_t t = 0; t < count; t++, from = to) {
            const float *x = convolved + t * row, *B = x + parts[1].to, *C = x + parts[2].to;
            float time = softplus(splat(widen(projected[t * stride + inner + conv + h]) + s.dt_bias[h]))[0];
            time = time < s.low ? s.low : time > s.high ? s.high : time;
            const float decay = std::exp(-std::exp(s.A_log[h]) * time);
            head_step(from, to, x + at, B, C, time, decay, s.D[h], P, N, ys + t * round_up(size, 16) + at);
        }
    }
    for (int64_t t = 0; t < count; t++)
        gate_and_norm(s, size, s.norm_weight + g * size, projected + t * stride + g * size, ys + t * round_up(size, 16), out + t * out_stride + g * size);
}

}  // namespace halflap
