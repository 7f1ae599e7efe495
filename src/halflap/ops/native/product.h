// Small matrix products on packed operands, the inner loop of the state-space scan.
//
// C (M, N) = rows of A times B (K, N). An element E is a float, or a `pair`: two bfloat16 neighbours along K in 32
// bits, multiplied and summed in float32 by one instruction where the processor has it (twice the rate of float32).
// A is read by single elements, so either orientation costs the same: A[m, k], or with `Turned` A[k, m].
#pragma once
#include "vector.h"

namespace halflap {

struct pair {
    uint32_t bits;
};
template <class E>
constexpr int PACK = 1;
template <>
constexpr int PACK<pair> = 2;

#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int MR = 8;  // rows of C held in registers, two vectors each
#else
constexpr int MR = 4;
#endif
constexpr int TILE = 16;  // every matrix dimension below is padded to a multiple of this

LANES vf multiply_add(vf c, float a, const float* b) { return c + a * load(b); }
#if defined(__AVX512BF16__)
constexpr bool HAVE_PAIRS = true;
LANES vf multiply_add(vf c, pair a, const pair* b) {
    return (vf)_mm512_dpbf16_ps((__m512)c, (__m512bh)_mm512_set1_epi32(a.bits), (__m512bh)_mm512_loadu_si512(b));
}
#else
constexpr bool HAVE_PAIRS = false;
LANES vf multiply_add(vf c, pair a, const pair* b) {
    vu w;
    memcpy(&w, b, sizeof w);
    vu v = vu{} + a.bits;
    return c + (vf)(v << 16) * (vf)(w << 16) + (vf)(v & 0xffff0000u) * (vf)(w & 0xffff0000u);
}
#endif

template <class E, bool Turned, int NV>
LANES void tile(int64_t K, const E* A, int64_t lda, const E* B, int64_t ldb, float* C, int64_t ldc, const float* keep, const float* old) {
    vf sums[MR][NV] = {};
    for (int64_t k = 0; k < K; k++) {
        const E* b = B + k * ldb;
#pragma GCC unroll 8
        for (int m = 0; m < MR; m++) {
            E a = Turned ? A[k * lda + m] : A[m * lda + k];
#pragma GCC unroll 2
            for (int v = 0; v < NV; v++) sums[m][v] = multiply_add(sums[m][v], a, b + v * VL);
        }
    }
#pragma GCC unroll 8
    for (int m = 0; m < MR; m++)
#pragma GCC unroll 2
        for (int v = 0; v < NV; v++) {
            const int64_t at = m * ldc + v * VL;
            store(C + at, keep ? keep[m] * load(old + at) + sums[m][v] : sums[m][v]);
        }
}

// C = keep[m] * old + A B (old is C unless given), or C = A B when keep is null. M is a multiple of MR, N of VL; K
// counts elements E.
template <class E, bool Turned>
void product(int64_t M, int64_t N, int64_t K, const E* A, int64_t lda, const E* B, int64_t ldb, float* C, int64_t ldc, const float* keep,
             const float* old = nullptr) {
    if (!old) old = C;
    for (int64_t n = 0; n < N;) {
        int wide = n + 2 * VL <= N;
        for (int64_t m = 0; m < M; m += MR) {
            const E* a = Turned ? A + m : A + m * lda;
            const float* s = keep ? keep + m : nullptr;
            if (wide) tile<E, Turned, 2>(K, a, lda, B + n, ldb, C + m * ldc + n, ldc, s, old + m * ldc + n);
            else tile<E, Turned, 1>(K, a, lda, B + n, ldb, C + m * ldc + n, ldc, s, old + m * ldc + n);
        }
        n += wide ? 2 * VL : VL;
    }
}

// --- packing -------------------------------------------------------------------------------------------------------

// lanes [lo | hi] as the pairs (lo, hi): two rows, neighbours along K, become one row of pairs
LANES vu join(vf lo, vf hi) {
#if defined(__AVX512BF16__)
    __m512i l = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)lo));
    __m512i h = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)hi));
    return (vu)_mm512_or_si512(l, _mm512_slli_epi32(h, 16));
#else
    return to_bf16_bits(lo) | (to_bf16_bits(hi) << 16);
#endif
}
// rows k and k+1 (k even) of a matrix whose rows run along K, at column n
LANES void store_rows(float* P, int64_t ld, int64_t k, int64_t n, vf first, vf second) {
    store(P + k * ld + n, first);
    store(P + (k + 1) * ld + n, second);
}
LANES void store_rows(pair* P, int64_t ld, int64_t k, int64_t n, vf first, vf second) {
    vu bits = join(first, second);
    memcpy(P + k / 2 * ld + n, &bits, sizeof bits);
}
// rows k and k+1 back as floats
LANES void load_rows(const float* P, int64_t ld, int64_t k, int64_t n, vf* rows) {
    rows[0] = load(P + k * ld + n);
    rows[1] = load(P + (k + 1) * ld + n);
}
LANES void load_rows(const pair* P, int64_t ld, int64_t k, int64_t n, vf* rows) {
    vu bits;
    memcpy(&bits, P + k / 2 * ld + n, sizeof bits);
    rows[0] = (vf)(bits << 16);
    rows[1] = (vf)(bits & 0xffff0000u);
}
LANES void split_rows(const pair* P, bf16* first, bf16* second) {
    vu bits;
    memcpy(&bits, P, sizeof bits);
    vh lo = low_halves(bits), hi = low_halves(bits >> 16);
    memcpy(first, &lo, sizeof lo);
    memcpy(second, &hi, sizeof hi);
}
template <class T, class E>
LANES void copy_rows(E* P, int64_t ld, int64_t k, int64_t n, const T* first, const T* second) {
    store_rows(P, ld, k, n, load(first), load(second));
}
LANES void copy_rows(pair* P, int64_t ld, int64_t k, int64_t n, const bf16* first, const bf16* second) {
    vh lo, hi;
    memcpy(&lo, first, sizeof lo);
    memcpy(&hi, second, sizeof hi);
    vu bits = widen(lo) | (widen(hi) << 16);
    memcpy(P + k / 2 * ld + n, &bits, sizeof bits);
}
// columns k..k+VL of row m of a matrix whose columns run along K
LANES void store_columns(float* P, int64_t ld, int64_t m, int64_t k, vf a) { store(P + m * ld + k, a); }
LANES void store_columns(pair* P, int64_t ld, int64_t m, int64_t k, vf a) { store((bf16*)(P + m * ld) + k, a); }

#if defined(__AVX512F__)
LANES void transpose_16(const uint32_t* from, int64_t ldf, uint32_t* to, int64_t ldt) {
    __m512i r[16], t[16];
    for (int i = 0; i < 16; i++) r[i] = _mm512_loadu_si512(from + i * ldf);
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) {
        t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
        t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
        r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
        r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
        r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
        t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
        t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
    }
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) {
        _mm512_storeu_si512(to + i * ldt, _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88));
        _mm512_storeu_si512(to + (i + 8) * ldt, _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd));
    }
}
#else
LANES void transpose_16(const uint32_t* from, int64_t ldf, uint32_t* to, int64_t ldt) {
    for (int i = 0; i < 16; i++)
        for (int j = 0; j < 16; j++) to[j * ldt + i] = from[i * ldf + j];
}
#endif

// to[c, r] = from[r, c] by 32-bit elements; both dimensions multiples of 8, loops over 16 where they fit
template <class E>
void transpose(int64_t rows, int64_t columns, const E* from, int64_t ldf, E* to, int64_t ldt) {
    const uint32_t* f = (const uint32_t*)from;
    uint32_t* t = (uint32_t*)to;
    int64_t r16 = rows / 16 * 16, c16 = columns / 16 * 16;
    for (int64_t r = 0; r < r16; r += 16)
        for (int64_t c = 0; c < c16; c += 16) transpose_16(f + r * ldf + c, ldf, t + c * ldt + r, ldt);
    for (int64_t r = 0; r < rows; r++)
        for (int64_t c = r < r16 ? c16 : 0; c < columns; c++) t[c * ldt + r] = f[r * ldf + c];
}

}  // namespace halflap
