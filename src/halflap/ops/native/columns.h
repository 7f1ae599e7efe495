// Products of more than eight rows of activations where registers hold eight numbers: rows lie in lanes, so that each
// number of the weight, in all lanes, meets sixteen of them, and nothing is ever summed across lanes. Two thirds of a
// core's peak rate became nine tenths. With wider registers, which have more of them, few_rows.h has not been beaten.
#pragma once
#include "vector.h"

namespace halflap {

// the weight at w in all lanes; of bfloat16 the upper half of the 32 bits that begin one number before it
LANES vf in_all_lanes(const float* w) { return splat(*w); }
LANES vf in_all_lanes(const bf16* w) {
    float bits;
    memcpy(&bits, w - 1, sizeof bits);
    return (vf)((vu)splat(bits) & 0xffff0000u);
}

// to[c][r] = from[r][c] of eight vectors of eight
LANES void transpose_8(const vf* from, float* to, int64_t stride) {
#if defined(__AVX__) && !defined(__AVX512F__)
    __m256 pairs[8], fours[8];
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        pairs[2 * i] = _mm256_unpacklo_ps((__m256)from[2 * i], (__m256)from[2 * i + 1]);
        pairs[2 * i + 1] = _mm256_unpackhi_ps((__m256)from[2 * i], (__m256)from[2 * i + 1]);
    }
#pragma GCC unroll 2
    for (int i = 0; i < 2; i++)
#pragma GCC unroll 2
        for (int j = 0; j < 2; j++) {
            fours[4 * i + 2 * j] = _mm256_shuffle_ps(pairs[4 * i + j], pairs[4 * i + j + 2], 0x44);
            fours[4 * i + 2 * j + 1] = _mm256_shuffle_ps(pairs[4 * i + j], pairs[4 * i + j + 2], 0xee);
        }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        store(to + i * stride, (vf)_mm256_permute2f128_ps(fours[i], fours[i + 4], 0x20));
        store(to + (i + 4) * stride, (vf)_mm256_permute2f128_ps(fours[i], fours[i + 4], 0x31));
    }
#endif
}

struct Columns {
    static constexpr bool FIT = VL == 8;
    static constexpr int NR = 6, WIDE = 2 * VL, GROUP = 2 * NR;  // rows of the weight in registers, of x in lanes, at once
    int64_t M, K;
    float* x;  // panels of WIDE rows (K, WIDE), the last (K, VL) where that is wide enough; zeros for rows that are not there

    static int64_t floats(int64_t M, int64_t K) { return round_up(M, VL) * K; }

    template <class T>
    void prepare(const T* from, int64_t stride) const {
        for (int64_t m = 0; m < M; m += VL) {
            const int64_t panel = m / WIDE * WIDE, lanes = M - panel > VL ? WIDE : VL;
            float* to = x + panel * K + m - panel;
            for (int64_t k = 0; k < K; k += VL) {
                vf rows[VL];
                for (int i = 0; i < VL; i++) rows[i] = m + i < M ? load_to(from + (m + i) * stride + k, K - k) : splat(0);
                if (K - k >= VL) transpose_8(rows, to + k * lanes, lanes);
                else
                    for (int64_t j = 0; j < K - k; j++)
                        for (int i = 0; i < VL; i++) to[(k + j) * lanes + i] = rows[i][j];
            }
        }
    }

    // outputs begin .. end by their rows of w (end - begin, K)
    template <class W, class Put>
    void range(const W* w, int64_t begin, int64_t end, const Put& put) const {
        for (int64_t n = begin; n < end; n += GROUP, w += GROUP * K) {
            const int rows = (int)(end - n < GROUP ? end - n : GROUP);
            float out[GROUP * WIDE], values[GROUP];
            for (int64_t m = 0; m < M; m += WIDE) {
                const int64_t lanes = M - m > VL ? WIDE : VL;
                if (lanes == WIDE) panel<2>(rows, w, x + m * K, out, m == 0);
                else panel<1>(rows, w, x + m * K, out, m == 0);
                for (int64_t i = 0; i < lanes && m + i < M; i++) {
                    for (int r = 0; r < rows; r++) values[r] = out[r * WIDE + i];
                    put(m + i, n, values, rows);
                }
            }
        }
    }

private:
    template <int NV, class W>
    void panel(int rows, const W* w, const float* x, float* out, bool fetch) const {
        int r = 0;
        // one vector of x needs more rows to keep both multipliers busy; rows that are apart by pages displace each other
        if (NV == 1 && rows == GROUP && K * sizeof(W) % 2048) return tile<GROUP, NV>(w, x, out, fetch ? w + GROUP * K : nullptr);
        for (; r + NR <= rows; r += NR) tile<NR, NV>(w + r * K, x, out + r * WIDE, fetch ? w + (r + GROUP) * K : nullptr);
        for (; r + 2 <= rows; r += 2) tile<2, NV>(w + r * K, x, out + r * WIDE, (const W*)nullptr);
        if (r < rows) tile<1, NV>(w + r * K, x, out + r * WIDE, (const W*)nullptr);
    }
    // R rows of w times NV vectors of rows of x; meanwhile the rows of w that come next are fetched
    template <int R, int NV, class W>
    void tile(const W* w, const float* x, float* out, const W* next) const {
        vf sums[R][NV];
#pragma GCC unroll 12
        for (int r = 0; r < R; r++)
#pragma GCC unroll 2
            for (int v = 0; v < NV; v++) sums[r][v] = splat(widen(w[r * K])) * load(x + v * VL);
        auto multiply = [&](int64_t k) __attribute__((always_inline)) {
            vf b[NV];
#pragma GCC unroll 2
            for (int v = 0; v < NV; v++) b[v] = load(x + (k * NV + v) * VL);
#pragma GCC unroll 12
            for (int r = 0; r < R; r++) {
                const vf a = in_all_lanes(w + r * K + k);
#pragma GCC unroll 2
                for (int v = 0; v < NV; v++) sums[r][v] += a * b[v];
            }
        };
        int64_t k = 1;
        for (; k + 16 <= K; k += 16) {
            if (next)
#pragma GCC unroll 12
                for (int r = 0; r < R; r++) __builtin_prefetch((const char*)(next + r * K + k), 0, 2);  // not into the first cache
#pragma GCC unroll 4
            for (int j = 0; j < 16; j++) multiply(k + j);
        }
        for (; k < K; k++) multiply(k);
#pragma GCC unroll 12
        for (int r = 0; r < R; r++)
#pragma GCC unroll 2
            for (int v = 0; v < NV; v++) store(out + r * WIDE + v * VL, sums[r][v]);
    }
};

}  // namespace halflap
