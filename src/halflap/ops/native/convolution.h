// Depthwise causal convolution, bias and SiLU in one pass, and its gradient: ops/conv.py in one read and one write.
//
// A task is a block of channels; inside it 16 tokens at a time slide through registers, so every input is read once.
// `reach[t]` says how many earlier tokens the tap of token t may see (fewer than W-1 after a document's border).
#pragma once
#include "parallel.h"
#include "vector.h"

namespace halflap {

template <class T>
struct Convolution {
    int64_t batch, time, channels, stride, out_stride;  // elements from one token to the next
    const T* x;
    const float* weight;  // (W, C)
    const float* bias;    // (C) or null
    const T* state;       // (B, W-1, C), the inputs before the first token, or null for zeros
    const int32_t* reach;  // (B, T) or null
    int threads;
};

constexpr int64_t CONV_ROWS = 16;

// One vector of channels of one sequence. `Whole`: all VL lanes exist, no token is before the first, no border is near.
template <class T, int W, bool Whole>
struct ConvolutionRows {
    const Convolution<T>& a;
    int64_t b, c, left;

    LANES vf get(const T* p) const { return Whole ? load(p) : load_to(p, left); }
    LANES void put(T* p, vf x) const {
        if (Whole) store(p, x);
        else store_to(p, x, left);
    }
    LANES const T* place(int64_t t) const { return a.x + (b * a.time + t) * a.stride + c; }
    LANES vf input(int64_t t) const {
        if (Whole || t >= 0) return get(place(t));
        if (a.state) return get(a.state + (b * (W - 1) + (W - 1) + t) * a.channels + c);
        return splat(0);
    }
    void weights(vf* w) const {
        for (int j = 0; j < W; j++) w[j] = load_to(a.weight + j * a.channels + c, left);
    }
    vf biases() const { return a.bias ? load_to(a.bias + c, left) : splat(0); }
    int reach(int64_t t) const { return !Whole && a.reach ? a.reach[b * a.time + t] : W - 1; }
};

// tokens t0 - (W - 1) to t1 + (W - 1) exist and belong to one document
template <class T>
bool undisturbed(const Convolution<T>& a, int64_t b, int64_t t0, int64_t t1, int64_t width) {
    if (t0 < width - 1 || t1 + width - 1 > a.time) return false;
    for (int64_t t = t0; a.reach && t < t1 + width - 1; t++)
        if (a.reach[b * a.time + t] < width - 1) return false;
    return true;
}

// out[t] = bias + sum_k w[W-1-k] x[t-k]; window[k] = x[t-k]
template <int W>
LANES vf convolve(const vf* w, const vf* window, vf bias, int reach) {
    vf y = bias;
#pragma GCC unroll 4
    for (int k = 0; k < W; k++)
        if (k <= reach) y += w[W - 1 - k] * window[k];
    return y;
}

inline int64_t channel_block(int64_t channels, int threads) {
    int64_t block = round_up((channels + threads - 1) / threads, 32);
    return block < 256 ? block : 256;
}

template <class T, int W, bool Whole>
inline void convolve_rows(const Convolution<T>& a, int64_t b, int64_t c, int64_t left, int64_t t0, int64_t t1, T* out) {
    const ConvolutionRows<T, W, Whole> rows{a, b, c, left};
    vf w[W], window[W], bias = rows.biases();
    rows.weights(w);
    for (int k = 1; k < W; k++) window[k - 1] = rows.input(t0 - k);
#pragma GCC unroll 4
    for (int64_t t = t0; t < t1; t++) {
#pragma GCC unroll 4
        for (int k = W - 1; k > 0; k--) window[k] = window[k - 1];
        window[0] = rows.input(t);
        if (Whole) __builtin_prefetch(rows.place(t + CONV_ROWS));
        rows.put(out + (b * a.time + t) * a.out_stride + c, silu<T>(convolve<W>(w, window, bias, rows.reach(t))));
    }
}

template <class T, int W>
void convolution_silu(const Convolution<T>& a, T* out) {
    const int64_t block = channel_block(a.channels, a.threads), blocks = (a.channels + block - 1) / block;
    const int64_t piece = 128, pieces = (a.time + piece - 1) / piece;
    parallel_tasks(a.batch * pieces * blocks, a.threads, [&](int64_t task) {
        const int64_t b = task / (pieces * blocks), first = task / blocks % pieces * piece, c0 = task % blocks * block;
        const int64_t end = first + piece < a.time ? first + piece : a.time, c1 = c0 + block < a.channels ? c0 + block : a.channels;
        for (int64_t t0 = first; t0 < end; t0 += CONV_ROWS) {
            const int64_t t1 = t0 + CONV_ROWS < end ? t0 + CONV_ROWS : end;
            const bool plain = undisturbed(a, b, t0, t1, W);
            for (int64_t c = c0; c < c1; c += VL) {
                if (plain && c + VL <= c1) convolve_rows<T, W, true>(a, b, c, VL, t0, t1, out);
                else convolve_rows<T, W, false>(a, b, c, c1 - c, t0, t1, out);
            }
        }
    });
}

template <class T>
struct ConvolutionGradients {
    const T* out;          // gradient of the output
    const float* partial;  // (parts, B, T, tail), added to the last `tail` channels of it: what tasks of the scan share
    int64_t parts, tail;
    T* x;                  // rows x_stride apart
    int64_t x_stride;
    float *weight, *bias;  // (W, C), (C) or null
};

// sums: W rows of the weight's gradient and one of the bias's; later: gradients before the SiLU of the W-1 next tokens
template <class T, int W, bool Whole>
inline void convolve_rows_backward(const Convolution<T>& a, const ConvolutionGradients<T>& d, int64_t b, int64_t c, int64_t left,
                                   int64_t t0, int64_t t1, float* sums, float* later, int64_t block) {
    const ConvolutionRows<T, W, Whole> rows{a, b, c, left};
    vf w[W], window[W], ahead[W], dw[W], bias = rows.biases(), db = load(sums + W * block);
    rows.weights(w);
    for (int j = 0; j < W; j++) dw[j] = load(sums + j * block);
    for (int k = 1; k < W; k++) window[k] = rows.input(t1 - k);
    for (int k = 0; k < W - 1; k++) ahead[k] = load(later + k * block);
#pragma GCC unroll 4
    for (int64_t t = t1 - 1; t >= t0; t--) {
        const int reach = rows.reach(t);
        const int64_t row = b * a.time + t, shared = c - (a.channels - d.tail);
#pragma GCC unroll 4
        for (int k = 0; k < W - 1; k++) window[k] = window[k + 1];
        window[W - 1] = rows.input(t - (W - 1));
        if (Whole) __builtin_prefetch(rows.place(t - CONV_ROWS)), __builtin_prefetch(d.out + (row - CONV_ROWS) * a.out_stride + c);
        vf y = convolve<W>(w, window, bias, reach), g = rows.get(d.out + row * a.out_stride + c);
        for (int64_t p = 0; p < d.parts; p++)
            for (int64_t l = shared < 0 ? -shared : 0; l < VL && l < left; l++)
                g[l] += d.partial[(p * a.batch * a.time + row) * d.tail + shared + l];
        vf s = sigmoid<T>(y);
        g *= s * (1.0f + y * (1.0f - s));
        db += g;
        vf dx = w[W - 1] * g;
#pragma GCC unroll 4
        for (int k = 0; k < W; k++)
            if (k <= reach) dw[W - 1 - k] += g * window[k];
#pragma GCC unroll 4
        for (int k = 1; k < W; k++)
            if (Whole || (t + k < a.time && k <= rows.reach(t + k))) dx += w[W - 1 - k] * ahead[k - 1];
#pragma GCC unroll 4
        for (int k = W - 2; k > 0; k--) ahead[k] = ahead[k - 1];
        ahead[0] = g;
        rows.put(d.x + row * d.x_stride + c, dx);
    }
    for (int j = 0; j < W; j++) store(sums + j * block, dw[j]);
    store(sums + W * block, db);
    for (int k = 0; k < W - 1; k++) store(later + k * block, ahead[k]);
}

template <class T, int W>
void convolution_silu_backward(const Convolution<T>& a, const ConvolutionGradients<T>& d) {
    const int64_t block = channel_block(a.channels, a.threads), blocks = (a.channels + block - 1) / block;
    parallel_tasks(blocks, a.threads, [&](int64_t task) {
        const int64_t c0 = task * block, c1 = c0 + block < a.channels ? c0 + block : a.channels;
        float *sums = scratch(2 * W * block), *later = sums + (W + 1) * block;
        memset(sums, 0, (W + 1) * block * sizeof(float));
        for (int64_t b = 0; b < a.batch; b++) {
            memset(later, 0, (W - 1) * block * sizeof(float));
            for (int64_t t1 = a.time; t1 > 0; t1 -= CONV_ROWS) {
                const int64_t t0 = t1 > CONV_ROWS ? t1 - CONV_ROWS : 0;
                const bool plain = undisturbed(a, b, t0, t1, W) && !d.parts;
                for (int64_t c = c0; c < c1; c += VL) {
                    if (plain && c + VL <= c1) convolve_rows_backward<T, W, true>(a, d, b, c, VL, t0, t1, sums + c - c0, later + c - c0, block);
                    else convolve_rows_backward<T, W, false>(a, d, b, c, c1 - c, t0, t1, sums + c - c0, later + c - c0, block);
                }
            }
        }
        for (int64_t c = c0; c < c1; c++) {
            for (int j = 0; j < W; j++) d.weight[j * a.channels + c] = sums[j * block + c - c0];
            if (d.bias) d.bias[c] = sums[W * block + c - c0];
        }
    });
}

}  // namespace halflap
