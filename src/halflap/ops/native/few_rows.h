// Linear maps of few rows of activations: bound by reading the weight, which is read once and in order. Many rows are
// served AT_A_TIME, for which columns.h is made.
//
// Rows of activations are prepared once, in the type that meets the weight's (bfloat16 where the processor multiplies
// it, else float), and then serve any range of outputs. `put(m, n, values, count)` takes outputs n .. n + count of row
// m. For weights of 4 and 8 bits see packed_rows.h, which has the same three functions.
#pragma once
#include "columns.h"
#include "parallel.h"
#include "vector.h"
#include <vector>

namespace halflap {

constexpr int64_t AT_A_TIME = 128;  // their rows of x stay in the second and third cache while all of the weight passes

#if defined(__AVX512BF16__) && defined(__AVX512BW__)
template <class W>
using Operand = W;
template <class W>
constexpr int STEP = sizeof(W) == 2 ? 32 : VL;  // numbers that one step of a dot product takes
LANES vf dot_step(vf c, const bf16* x, const bf16* w, int64_t left) {
    const __mmask32 lanes = left >= 32 ? ~0u : (1u << left) - 1;
    return (vf)_mm512_dpbf16_ps((__m512)c, (__m512bh)_mm512_loadu_epi16(x), (__m512bh)_mm512_maskz_loadu_epi16(lanes, w));
}
#else
template <class W>
using Operand = float;
template <class W>
constexpr int STEP = VL;
#endif
template <class W>
LANES vf dot_step(vf c, const float* x, const W* w, int64_t left) {
    return c + load(x) * load_to(w, left);
}

template <class W>
struct FewRows {
    using X = Operand<W>;
    static constexpr int step = STEP<W>, NR = VL == 16 ? 4 : 3;  // rows of the weight that meet four of x in registers
    int64_t M, K, padded;
    X* x;  // (M, padded), or for more than two rows in fours, step by step: (M / 4, padded / step, 4, step); zeros behind

    static int64_t floats(int64_t M, int64_t K) { return in_columns(M) ? Columns::floats(M, K) : round_up(M, 4) * round_up(K, step); }
    template <class T>
    FewRows(int64_t M, int64_t K, const T* from, int64_t stride, float* memory) : FewRows(M, K, memory) {
        if (in_columns(M)) {
            Columns{M, K, (float*)x}.prepare(from, stride);
            return;
        }
        for (int64_t m = 0; m < (in_fours() ? round_up(M, 4) : M); m++)
            for (int64_t k = 0; k < K; k += step)
                for (int64_t i = k; i < k + step; i += VL) {
                    const int64_t left = m < M ? K - i : 0;
                    store((X*)at(m, k) + i - k, left > 0 ? load_to(from + m * stride + i, left) : splat(0));
                }
    }
    FewRows(int64_t M, int64_t K, float* memory) : M(M), K(K), padded(round_up(K, step)), x((X*)memory) {}  // prepared before
    static bool in_columns(int64_t M) { return Columns::FIT && M > 4; }
    bool in_fours() const { return M > 2; }
    int64_t hop() const { return in_fours() ? 4 * step : step; }  // from one step of a row to its next
    const X* at(int64_t m, int64_t k) const {
        return in_fours() ? x + m / 4 * 4 * padded + k * 4 + m % 4 * step : x + m * padded + k;
    }

    // outputs begin .. end by their rows of w (end - begin, K)
    template <class Put>
    void range(const W* w, int64_t begin, int64_t end, const Put& put) const {
        if constexpr (std::is_same_v<X, float>) {
            if (in_columns(M)) return Columns{M, K, (float*)x}.range(w, begin, end, put);
            if (VL == 16 && sizeof(W) == 2 && M > 4) return widened(w, begin, end, put);
        }
        const int64_t fours = (M + 3) / 4;
        // of w for each step, such that the next rows are there in time; several rows at once are no stream to a prefetcher
        const int lines = VL == 16 && in_fours() ? (int)((3 + fours) / fours) : 0;
        for (int64_t n = begin; n < end; n += 16, w += 16 * K) {
            const int64_t rows = end - n < 16 ? end - n : 16;
            const char* next = (const char*)(w + 16 * K);
            if (!in_fours())
                for (int64_t m = 0; m < M; m++) one(m, n, rows, w, put);
            else
                for (int64_t r = 0; r < rows; r += NR)
                    for (int64_t m = 0; m < M; m += 4) {
                        if (rows - r >= NR) tile<NR>(m, n + r, w + r * K, put, next, lines);
                        else for (int64_t i = r; i < rows; i++) tile<1>(m, n + i, w + i * K, put, next, 0);
                    }
        }
    }

private:
    // one row of x times at most 16 of w, strictly in order: the prefetcher follows one stream in a page
    template <class Put>
    void one(int64_t m, int64_t n, int64_t rows, const W* w, const Put& put) const {
        vf parts[16];
        for (int64_t r = 0; r < 16; r++) {
            parts[r] = splat(0);
            if (r >= rows) continue;
            const X* a = at(m, 0);
            const W* b = w + r * K;
            vf sums[4] = {};
            int64_t k = 0;
            for (; k + 4 * step <= K; k += 4 * step, a += 4 * hop())
#pragma GCC unroll 4
                for (int i = 0; i < 4; i++) sums[i] = dot_step(sums[i], a + i * hop(), b + k + i * step, step);
            for (; k < K; k += step, a += hop()) sums[0] = dot_step(sums[0], a, b + k, K - k);
            parts[r] = (sums[0] + sums[1]) + (sums[2] + sums[3]);
        }
        float totals[16];
        sums_of_16(parts, totals);
        put(m, n, totals, rows);
    }
    // for many rows of x: some rows of w as floats, instead of the same again for every four
    template <class Put>
    void widened(const W* w, int64_t begin, int64_t end, const Put& put) const {
        static thread_local std::vector<float> wide;
        if ((int64_t)wide.size() < 16 * K) wide.resize(16 * K);
        const FewRows<float> floats(M, K, (float*)x);
        for (int64_t n = begin; n < end; n += 16) {
            const int64_t count = (end - n < 16 ? end - n : 16) * K;
            const W* from = w + (n - begin) * K;
            for (int64_t i = 0; i < count; i += VL) store_to(wide.data() + i, load_to(from + i, count - i), count - i);
            floats.range(wide.data(), n, end - n < 16 ? end : n + 16, put);
        }
    }
    // four rows of x times R of w; meanwhile the rows of w that come next are fetched, in order
    template <int R, class Put>
    void tile(int64_t m, int64_t n, const W* w, const Put& put, const char*& next, int lines) const {
        vf sums[16] = {};  // sums[R * row of x + row of w]
        const X* a = at(m, 0);
        auto multiply = [&](int64_t k, int64_t left) __attribute__((always_inline)) {
#pragma GCC unroll 4
            for (int r = 0; r < R; r++)
#pragma GCC unroll 4
                for (int i = 0; i < 4; i++) sums[R * i + r] = dot_step(sums[R * i + r], a + i * step, w + r * K + k, left);
        };
        int64_t k = 0;
        for (; k + step <= K; k += step, a += 4 * step) {
            for (int line = 0; line < lines; line++, next += 64) __builtin_prefetch(next);
            multiply(k, step);
        }
        if (k < K) multiply(k, K - k);
        float totals[16];
        sums_of_16(sums, totals);
        for (int64_t i = 0; i < 4 && m + i < M; i++) put(m + i, n, totals + R * i, R);
    }
};

// y = values + bias, in the type of y
template <class T>
LANES void put_values(T* y, const float* values, const float* bias, int64_t count) {
    for (int64_t i = 0; i < count; i += VL) {
        vf v = load_to(values + i, count - i);
        if (bias) v += load_to(bias + i, count - i);
        store_to(y + i, v, count - i);
    }
}

}  // namespace halflap
