// Linear maps of few rows of activations: bound by reading the weight, which is read once and in order. Many rows are
// served AT_A_TIME, for which columns.h is made.
//
// Up to ALIKE rows, each is multiplied in one order whatever is beside it: lane by lane from the first input to the
// last, lanes then summed as a tree. So a token's numbers are the same alone, in a batch and among guesses.
//
// Rows of activations are prepared once, in the type that meets the weight's (bfloat16 where the processor multiplies
// it, else float), and then serve any range of outputs. `put(m, n, values, count)` takes outputs n .. n + count of row
// m. For packed weights see packed_rows.h, which has the same three functions.
#pragma once
#include "columns.h"
#include "parallel.h"
#include "vector.h"
#include <type_traits>
#include <vector>

namespace halflap {

constexpr int64_t ALIKE = 32;       // mirrored by MOST_ROWS in program.py
constexpr int64_t AT_A_TIME = 128;  // their rows of x stay in the second and third cache while all of the weight passes

// Rows in groups of at most MOST, as even as can be: group g of `of` rows begins at row first(g).
template <int MOST>
struct Groups {
    int64_t rows;
    int64_t count() const { return (rows + MOST - 1) / MOST; }
    int64_t first(int64_t g) const { return g * (rows / count()) + (g < rows % count() ? g : rows % count()); }
    int64_t of(int64_t g) const { return rows / count() + (g < rows % count()); }
};

#if defined(__AVX512BF16__) && defined(__AVX512BW__)
template <class W>
using Operand = std::conditional_t<std::is_same_v<W, bf16>, bf16, float>;
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
struct FewRows {
    using X = Operand<W>;
    static constexpr int LINE = 64 / sizeof(W);  // numbers in a cache line
    static constexpr int step = STEP<W>, GROUP = VL == 16 ? 16 : 24;  // GROUP: rows of the weight whose outputs are put at once
    int64_t M, K, padded;
    Groups<4> fours;
    X* x;  // by groups of `fours`, each step by step: (padded / step, rows of the group, step); zeros behind

    static int64_t floats(int64_t M, int64_t K) { return in_columns(M) ? Columns::floats(M, K) : M * round_up(K, step); }
    template <class T>
    FewRows(int64_t M, int64_t K, const T* from, int64_t stride, float* memory) : FewRows(M, K, memory) {
        if (in_columns(M)) {
            Columns{M, K, (float*)x}.prepare(from, stride);
            return;
        }
        for (int64_t g = 0; g < fours.count(); g++)
            for (int64_t m = 0; m < fours.of(g); m++)
                for (int64_t k = 0; k < K; k += step)
                    for (int64_t i = k; i < k + step; i += VL) {
                        X* to = (X*)of_group(g) + k * fours.of(g) + m * step + i - k;
                        store(to, K > i ? load_to(from + (fours.first(g) + m) * stride + i, K - i) : splat(0));
                    }
    }
    FewRows(int64_t M, int64_t K, float* memory) : M(M), K(K), padded(round_up(K, step)), fours{M}, x((X*)memory) {}  // prepared before
    static bool in_columns(int64_t M) { return Columns::FIT && M > ALIKE; }
    const X* of_group(int64_t g) const { return x + fours.first(g) * padded; }

    // outputs begin .. end by their rows of w (end - begin, K)
    template <class Put>
    void range(const W* w, int64_t begin, int64_t end, const Put& put) const {
        if constexpr (std::is_same_v<X, float>) {
            if constexpr (sizeof(W) > 1)
                if (in_columns(M)) return Columns{M, K, (float*)x}.range(w, begin, end, put);
            if (sizeof(W) < 4 && M > ALIKE) return widened(w, begin, end, put);
        }
        // as many rows of the weight at once as keep all multipliers busy and their sums in registers
        const int64_t widest = fours.of(0);
        if (widest == 1) by_tiles<8>(w, begin, end, put);
        else if (VL == 16 || widest < 4) by_tiles<4>(w, begin, end, put);
        else if (sizeof(W) == 4 && M > 8) by_tiles<2>(w, begin, end, put);  // bound by arithmetic, and of 12 sums GCC spills one
        else by_tiles<3>(w, begin, end, put);
    }

private:
    template <int R, class Put>
    void by_tiles(const W* w, int64_t begin, int64_t end, const Put& put) const {
        float out[AT_A_TIME][GROUP];
        for (int64_t n = begin; n < end; n += GROUP, w += GROUP * K) {
            const int64_t rows = end - n < GROUP ? end - n : GROUP;
            for (int64_t g = 0; g < fours.count(); g++) {  // whose rows of x stay in the first cache, and those of w in the second
                int64_t r = 0;
                for (; r + R <= rows; r += R) group<R>(g, w + r * K, g == 0 ? w + (r + R) * K : nullptr, &out[fours.first(g)][r]);
                for (; r < rows; r++) group<1>(g, w + r * K, nullptr, &out[fours.first(g)][r]);
            }
            for (int64_t m = 0; m < M; m++) put(m, n, out[m], rows);
        }
    }
    template <int R>
    void group(int64_t g, const W* w, const W* next, float* out) const {
        switch (fours.of(g)) {
            case 1: return tile<1, R>(of_group(g), w, next, out);
            case 2: return tile<2, R>(of_group(g), w, next, out);
            case 3: return tile<3, R>(of_group(g), w, next, out);
            default: return tile<4, R>(of_group(g), w, next, out);
        }
    }
    // XS rows of x times R of w; meanwhile the rows of w at `next` are fetched: several at once are no stream to a prefetcher
    template <int XS, int R>
    void tile(const X* a, const W* w, const W* next, float* out) const {
        if constexpr (XS * R > 16) return;  // not asked for
        else if constexpr (XS == 1 && std::is_same_v<X, float>) one_by_one<R>(a, w, next, out);
        else {
            vf sums[16] = {};  // sums[R * row of x + row of w]
            auto multiply = [&](int64_t k, int64_t left) __attribute__((always_inline)) {
                if constexpr (std::is_same_v<X, float>) outer<XS, R>(sums, a, w + k, left);
                else
#pragma GCC unroll 8
                    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
                        for (int i = 0; i < XS; i++) sums[R * i + r] = dot_step(sums[R * i + r], a + i * step, w + r * K + k, left);
            };
            // rows that share a page are fetched in the order of their addresses
            const bool in_order = K * sizeof(W) < 4096;
            const int64_t along = in_order ? R : 1, apart = in_order ? LINE : K;
            int64_t k = 0;
            for (; k + LINE <= K; k += LINE) {
                if (next)
#pragma GCC unroll 8
                    for (int r = 0; r < R; r++) fetch(next + along * k + apart * r);
#pragma GCC unroll 4
                for (int i = 0; i < LINE; i += step, a += XS * step) multiply(k + i, step);
            }
            for (; k < K; k += step, a += XS * step) multiply(k, K - k < step ? K - k : step);
            float totals[16];
            if (XS * R <= 8) sums_of_some<8>(sums, totals);
            else sums_of_some<16>(sums, totals);
#pragma GCC unroll 4
            for (int i = 0; i < XS; i++)
#pragma GCC unroll 8
                for (int r = 0; r < R; r++) out[i * GROUP + r] = totals[R * i + r];
        }
    }
    // of a single row of x: row after row of w, which is a stream, and more of it in flight than of steps over several
    template <int R>
    void one_by_one(const float* a, const W* w, const W* next, float* out) const {
        vf sums[16] = {};
        for (int r = 0; r < R; r++, w += K, next += next ? K : 0) {
            vf dot = splat(0);
            int64_t k = 0;
            for (; k + LINE <= K; k += LINE) {
                if (next) fetch(next + k);
#pragma GCC unroll 4
                for (int i = 0; i < LINE; i += step) dot = fused(load(a + k + i), load(w + k + i), dot);
            }
            for (; k < K; k += step) dot = fused(load(a + k), load_to(w + k, K - k), dot);
            sums[r] = dot;
        }
        float totals[16];
        sums_of_some<R <= 8 ? 8 : 16>(sums, totals);
        memcpy(out, totals, R * sizeof(float));
    }
    static void fetch(const W* w) { __builtin_prefetch((const char*)w, 0, 2); }  // not into the first cache
    // one step of a tile: of rows of x and of w, the fewer stay in registers while each of the others passes
    template <int XS, int R>
    LANES void outer(vf* sums, const float* a, const W* w, int64_t left) const {
        constexpr bool X_STAYS = XS <= R;
        constexpr int STAY = X_STAYS ? XS : R, PASS = X_STAYS ? R : XS;
        auto of_x = [&](int i) __attribute__((always_inline)) { return in_register(load(a + i * step)); };
        auto of_w = [&](int r) __attribute__((always_inline)) { return in_register(load_to(w + r * K, left)); };
        vf stays[STAY];
#pragma GCC unroll 4
        for (int i = 0; i < STAY; i++) stays[i] = X_STAYS ? of_x(i) : of_w(i);
#pragma GCC unroll 8
        for (int j = 0; j < PASS; j++) {
            const vf passes = X_STAYS ? of_w(j) : of_x(j);
#pragma GCC unroll 4
            for (int i = 0; i < STAY; i++) {
                vf& sum = sums[X_STAYS ? R * i + j : R * j + i];
                sum = fused(stays[i], passes, sum);
            }
        }
    }
    // for many rows of x: some rows of w as floats, instead of the same again for every group
    template <class Put>
    void widened(const W* w, int64_t begin, int64_t end, const Put& put) const {
        constexpr int GROUP = FewRows<float>::GROUP;
        static thread_local std::vector<float> wide;
        if ((int64_t)wide.size() < GROUP * K) wide.resize(GROUP * K);
        const FewRows<float> floats(M, K, (float*)x);
        for (int64_t n = begin; n < end; n += GROUP) {
            const int64_t count = (end - n < GROUP ? end - n : GROUP) * K;
            const W* from = w + (n - begin) * K;
            for (int64_t i = 0; i < count; i += VL) store_to(wide.data() + i, load_to(from + i, count - i), count - i);
            floats.range(wide.data(), n, end - n < GROUP ? end : n + GROUP, put);
        }
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
