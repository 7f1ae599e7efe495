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
    int64_t batch, time, channels, stride;  // stride: elements from a token's input to the next one's
    const T* x;
    const float* weight;  // (W, C)
    const float* bias;    // (C) or null
    const T* state;       // (B, W-1, C), the inputs before the first token, or null for zeros
    const int32_t* reach;  // (B, T) or null
    int threads;
};

constexpr int64_t CONV_ROWS = 16;

template <class T, int W>
struct ConvolutionRows {  // one vector of channels of one sequence
    const Convolution<T>& a;
    int64_t b, c, left;

    vf input(int64_t t) const {
        if (t >= 0) return load_to(a.x + (b * a.time + t) * a.stride + c, left);
        if (a.state) return load_to(a.state + (b * (W - 1) + (W - 1) + t) * a.channels + c, left);
        return splat(0);
    }
    void weights(vf* w) const {
        for (int j = 0; j < W; j++) w[j] = load_to(a.weight + j * a.channels + c, left);
    }
    vf biases() const { return a.bias ? load_to(a.bias + c, left) : splat(0); }
    int reach(int64_t t) const { return a.reach ? a.reach[b * a.time + t] : W - 1; }
};

// out[t] = bias + sum_k w[W-1-k] x[t-k]; window[k] = x[t-k]
template <int W>
inline vf convolve(const vf* w, const vf* window, vf bias, int reach) {
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

template <class T, int W>
void convolution_silu(const Convolution<T>& a, T* out) {  // out (B, T, C)
    int64_t block = channel_block(a.channels, a.threads), blocks = (a.channels + block - 1) / block;
    int64_t pieces = (a.time + 255) / 256;
    parallel_tasks(a.batch * pieces * blocks, a.threads, [&](int64_t task) {
        int64_t b = task / (pieces * blocks), piece = task / blocks % pieces, c0 = task % blocks * block;
        int64_t end = piece * 256 + 256 < a.time ? piece * 256 + 256 : a.time;
        int64_t c1 = c0 + block < a.channels ? c0 + block : a.channels;
        for (int64_t t0 = piece * 256; t0 < end; t0 += CONV_ROWS)
            for (int64_t c = c0; c < c1; c += VL) {
                ConvolutionRows<T, W> rows{a, b, c, c1 - c};
                vf w[W], window[W], bias = rows.biases();
                rows.weights(w);
                for (int k = 1; k < W; k++) window[k - 1] = rows.input(t0 - k);
                for (int64_t t = t0; t < t0 + CONV_ROWS && t < end; t++) {
#pragma GCC unroll 4
                    for (int k = W - 1; k > 0; k--) window[k] = window[k - 1];
                    window[0] = rows.input(t);
                    store_to(out + (b * a.time + t) * a.channels + c, silu<T>(convolve<W>(w, window, bias, rows.reach(t))), c1 - c);
                }
            }
    });
}

// From the gradient of `out` and of nothing else: gradients of x (with stride dx_stride), weight (W, C) and bias (C).
// partial (parts, B, T, tail) is added to the last `tail` channels of grad: sums that several tasks of the scan share.
template <class T, int W>
void convolution_silu_backward(const Convolution<T>& a, const T* grad, const float* partial, int64_t parts, int64_t tail,
                               T* dx, int64_t dx_stride, float* dweight, float* dbias) {
    int64_t block = channel_block(a.channels, a.threads), blocks = (a.channels + block - 1) / block;
    parallel_tasks(blocks, a.threads, [&](int64_t task) {
        int64_t c0 = task * block, c1 = c0 + block < a.channels ? c0 + block : a.channels;
        float* sums = scratch((2 * W) * block);          // W rows of dweight, then dbias
        float* later = sums + (W + 1) * block;           // W-1 rows: gradients before the SiLU of the tokens that follow
        memset(sums, 0, (W + 1) * block * sizeof(float));
        for (int64_t b = 0; b < a.batch; b++) {
            memset(later, 0, (W - 1) * block * sizeof(float));
            for (int64_t t1 = a.time; t1 > 0; t1 -= CONV_ROWS) {
                int64_t t0 = t1 > CONV_ROWS ? t1 - CONV_ROWS : 0;
                for (int64_t c = c0; c < c1; c += VL) {
                    ConvolutionRows<T, W> rows{a, b, c, c1 - c};
                    vf w[W], window[W], ahead[W], dw[W], bias = rows.biases();
                    rows.weights(w);
                    float* s = sums + (c - c0);
                    for (int j = 0; j < W; j++) dw[j] = load(s + j * block);
                    vf db = load(s + W * block);
                    for (int k = 1; k < W; k++) window[k] = rows.input(t1 - k);
                    for (int k = 0; k < W - 1; k++) ahead[k] = load(later + k * block + (c - c0));
                    for (int64_t t = t1 - 1; t >= t0; t--) {
#pragma GCC unroll 4
                        for (int k = 0; k < W - 1; k++) window[k] = window[k + 1];
                        window[W - 1] = rows.input(t - (W - 1));
                        int reach = rows.reach(t);
                        vf y = convolve<W>(w, window, bias, reach);
                        int64_t row = b * a.time + t;
                        vf g = load_to(grad + row * a.channels + c, c1 - c);
                        int64_t shared = c - (a.channels - tail);
                        for (int64_t p = 0; p < parts; p++)
                            if (shared + VL > 0)
                                for (int l = shared < 0 ? -shared : 0; l < VL && l < c1 - c; l++)
                                    g[l] += partial[(p * a.batch * a.time + row) * tail + shared + l];
                        vf sg = sigmoid<T>(y);
                        g *= sg * (1.0f + y * (1.0f - sg));
                        db += g;
#pragma GCC unroll 4
                        for (int k = 0; k < W; k++)
                            if (k <= reach) dw[W - 1 - k] += g * window[k];
                        vf d = w[W - 1] * g;
#pragma GCC unroll 4
                        for (int k = 1; k < W; k++)
                            if (t + k < a.time && k <= rows.reach(t + k)) d += w[W - 1 - k] * ahead[k - 1];
#pragma GCC unroll 4
                        for (int k = W - 2; k > 0; k--) ahead[k] = ahead[k - 1];
                        ahead[0] = g;
                        store_to(dx + row * dx_stride + c, d, c1 - c);
                    }
                    for (int j = 0; j < W; j++) store(s + j * block, dw[j]);
                    store(s + W * block, db);
                    for (int k = 0; k < W - 1; k++) store(later + k * block + (c - c0), ahead[k]);
                }
            }
        }
        for (int64_t c = c0; c < c1; c++) {
            for (int j = 0; j < W; j++) dweight[j * a.channels + c] = sums[j * block + c - c0];
            if (dbias) dbias[c] = sums[W * block + c - c0];
        }
    });
}

}  // namespace halflap
