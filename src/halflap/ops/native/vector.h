// Vectors of float as wide as the processor's registers, bfloat16 storage, and the elementwise functions that the
// kernels share. GCC and Clang vector extensions carry the code to any processor; AVX-512 has its own lines where it
// is faster. No fast-math: sums and comparisons with infinities mean what they say.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#if defined(__AVX__)
#include <immintrin.h>
#endif

// GCC keeps these out of line when they grow, and a call spills every register of the loop around it
#define LANES inline __attribute__((always_inline))

namespace halflap {

#if defined(__AVX512F__)
constexpr int VL = 16;
#elif defined(__AVX__)
constexpr int VL = 8;
#else
constexpr int VL = 4;
#endif

typedef float vf __attribute__((vector_size(VL * 4)));
typedef double vd __attribute__((vector_size(VL * 8)));
typedef int32_t vi __attribute__((vector_size(VL * 4)));
typedef uint32_t vu __attribute__((vector_size(VL * 4)));
typedef uint16_t vh __attribute__((vector_size(VL * 2)));

struct bf16 {
    uint16_t bits;
};

constexpr int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// not vf{} + x, which is an addition: -0 would become 0
#if defined(__AVX512F__)
LANES vf splat(float x) { return (vf)_mm512_set1_ps(x); }
#elif defined(__AVX__)
LANES vf splat(float x) { return (vf)_mm256_set1_ps(x); }
#else
LANES vf splat(float x) {
    vf r;
    for (int i = 0; i < VL; i++) r[i] = x;
    return r;
}
#endif
LANES vi iota() {
    vi r;
    for (int i = 0; i < VL; i++) r[i] = i;
    return r;
}
LANES vf select(vi mask, vf a, vf b) { return mask ? a : b; }
// GCC 12 makes two instructions of what AVX-512 does in one: comparisons with a choice, and 16 to 32 bits and back
#if defined(__AVX512F__)
LANES vf maximum(vf a, vf b) { return (vf)_mm512_max_ps((__m512)a, (__m512)b); }
LANES vf minimum(vf a, vf b) { return (vf)_mm512_min_ps((__m512)a, (__m512)b); }
LANES vu widen(vh a) { return (vu)_mm512_cvtepu16_epi32((__m256i)a); }
LANES vh low_halves(vu a) { return (vh)_mm512_cvtepi32_epi16((__m512i)a); }
#else
LANES vf maximum(vf a, vf b) { return a > b ? a : b; }
LANES vf minimum(vf a, vf b) { return a < b ? a : b; }
#if defined(__AVX2__)
LANES vu widen(vh a) { return (vu)_mm256_cvtepu16_epi32((__m128i)a); }  // one instruction, where GCC 12 makes four
#else
LANES vu widen(vh a) { return __builtin_convertvector(a, vu); }
#endif
LANES vh low_halves(vu a) { return __builtin_convertvector(a & 0xffffu, vh); }
#endif

LANES float sum(vf a) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps((__m512)a);
#elif defined(__AVX__)
    __m128 s = _mm_add_ps(_mm256_castps256_ps128((__m256)a), _mm256_extractf128_ps((__m256)a, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
#else
    float s = 0;
    for (int i = 0; i < VL; i++) s += a[i];
    return s;
#endif
}

LANES float largest(vf a) {
#if defined(__AVX512F__)
    return _mm512_reduce_max_ps((__m512)a);
#else
    float s = a[0];
    for (int i = 1; i < VL; i++) s = a[i] > s ? a[i] : s;
    return s;
#endif
}
LANES double sum(vd a) {
    double s = 0;
    for (int i = 0; i < VL; i++) s += a[i];
    return s;
}
LANES vd load(const double* p) {
    vd r;
    memcpy(&r, p, sizeof r);
    return r;
}
LANES void store(double* p, vd a) { memcpy(p, &a, sizeof a); }

// bfloat16: round to nearest even; a NaN stays one
LANES vu to_bf16_bits(vf a) {
    vu bits = (vu)a;
    vu rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return (a == a) ? rounded : ((bits >> 16) | 0x40);
}
LANES float widen(float x) { return x; }
LANES float widen(bf16 x) {
    uint32_t bits = (uint32_t)x.bits << 16;
    float f;
    memcpy(&f, &bits, 4);
    return f;
}

LANES vf load(const float* p) {
    vf r;
    memcpy(&r, p, sizeof r);
    return r;
}
LANES vf load(const bf16* p) {
    vh h;
    memcpy(&h, p, sizeof h);
    return (vf)(widen(h) << 16);
}
LANES void store(float* p, vf a) { memcpy(p, &a, sizeof a); }
LANES void store(bf16* p, vf a) {
#if defined(__AVX512BF16__)
    __m256bh h = _mm512_cvtneps_pbh((__m512)a);
    memcpy(p, &h, sizeof h);
#else
    vh h = low_halves(to_bf16_bits(a));
    memcpy(p, &h, sizeof h);
#endif
}

// the first n < VL lanes, zeros behind
template <class T>
LANES vf load_some(const T* p, int n) {
    T lanes[VL] = {};
    memcpy(lanes, p, n * sizeof(T));
    return load(lanes);
}
template <class T>
LANES void store_some(T* p, vf a, int n) {
    T lanes[VL];
    store(lanes, a);
    memcpy(p, lanes, n * sizeof(T));
}
template <class T>
LANES vf load_to(const T* p, int64_t left) {
    return left >= VL ? load(p) : load_some(p, (int)left);
}
template <class T>
LANES void store_to(T* p, vf a, int64_t left) {
    if (left >= VL) store(p, a);
    else store_some(p, a, (int)left);
}

#if defined(__AVX__) && !defined(__AVX512F__)
LANES vf sums_of_8(const vf* v) {
    __m256 a[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) a[i] = _mm256_hadd_ps((__m256)v[2 * i], (__m256)v[2 * i + 1]);
    const __m256 b = _mm256_hadd_ps(a[0], a[1]), c = _mm256_hadd_ps(a[2], a[3]);
    return (vf)_mm256_add_ps(_mm256_permute2f128_ps(b, c, 0x20), _mm256_permute2f128_ps(b, c, 0x31));
}
#endif
// the sums of 16 vectors
LANES void sums_of_16(const vf* v, float* totals) {
#if defined(__AVX512F__)
    __m512 a[8], b[4];
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) {
        __m512 x = (__m512)v[2 * i], y = (__m512)v[2 * i + 1];
        a[i] = _mm512_add_ps(_mm512_unpacklo_ps(x, y), _mm512_unpackhi_ps(x, y));
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        __m512d x = _mm512_castps_pd(a[2 * i]), y = _mm512_castps_pd(a[2 * i + 1]);
        b[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(x, y)), _mm512_castpd_ps(_mm512_unpackhi_pd(x, y)));
    }
    // each 128-bit lane of b[i] holds a quarter of the sums of v[4 i .. 4 i + 3]
    __m512 c = _mm512_add_ps(_mm512_shuffle_f32x4(b[0], b[1], 0x88), _mm512_shuffle_f32x4(b[0], b[1], 0xdd));
    __m512 d = _mm512_add_ps(_mm512_shuffle_f32x4(b[2], b[3], 0x88), _mm512_shuffle_f32x4(b[2], b[3], 0xdd));
    _mm512_storeu_ps(totals, _mm512_add_ps(_mm512_shuffle_f32x4(c, d, 0x88), _mm512_shuffle_f32x4(c, d, 0xdd)));
#elif defined(__AVX__)
    store(totals, sums_of_8(v)), store(totals + 8, sums_of_8(v + 8));
#else
    for (int i = 0; i < 16; i++) totals[i] = sum(v[i]);
#endif
}

// of 8 or 16, each as `sums_of_16` would
template <int COUNT>
LANES void sums_of_some(const vf* v, float* totals) {
#if defined(__AVX__) && !defined(__AVX512F__)
    if (COUNT == 8) return store(totals, sums_of_8(v));
#endif
    sums_of_16(v, totals);
}

// a b + c, rounded once where the processor can; for sums that are to be the same in several places, as a compiler
// fuses a sum or not by what is around it
LANES vf fused(vf a, vf b, vf c) {
#if defined(__AVX512F__)
    return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
    return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
    return a * b + c;
#endif
}

// kept in a register: GCC would read it again for every use, and reading, not multiplying, would bound a loop
LANES vf in_register(vf a) {
#if defined(__x86_64__)
    asm("" : "+x"(a));
#endif
    return a;
}

// e^x to 1.2e-7 relative; 0 below -87.3 and e^88 above 88, so neither subnormal nor infinite
LANES vf exponential(vf x) {
    const vf rounder = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to a whole number
    vi tiny = x < -87.3f;
    vf y = minimum(maximum(x, splat(-87.3f)), splat(88.0f));
    vf turns = y * 1.44269504088896341f + rounder;
    vi power = (vi)turns << 23;
    turns -= rounder;
    y = y - turns * 0.693359375f;
    y = y + turns * 2.12194440e-4f;
    vf p = splat(1.9875691500e-4f);
    p = p * y + 1.3981999507e-3f;
    p = p * y + 8.3334519073e-3f;
    p = p * y + 4.1665795894e-2f;
    p = p * y + 1.6666665459e-1f;
    p = p * y + 5.0000001201e-1f;
    p = p * y * y + y + 1.0f;
    return select(tiny, splat(0.0f), (vf)((vi)p + power));
}
// log(1 + e^x) = max(x, 0) + log1p(e), e = e^-|x|; log1p(e) = 2 atanh(e / (2 + e)), a series that keeps small values exact
LANES vf softplus(vf x) {
    vf e = exponential(minimum(x, -x));
    vf s = e / (2.0f + e), t = s * s, p = splat(1.0f / 17);
    for (int odd = 15; odd > 0; odd -= 2) p = p * t + 1.0f / odd;
    return maximum(x, splat(0)) + 2.0f * s * p;
}
LANES vf sigmoid_float(vf x) { return 1.0f / (1.0f + exponential(-x)); }

// e^x and 1 / (1 + e^-x) to 1e-5 and 1e-4 relative, a fraction of bfloat16's spacing (4e-3): for values stored in it
#if defined(__AVX512F__)
LANES vf exponential_bf16(vf x) {
    __m512 t = _mm512_mul_ps((__m512)maximum(x, splat(-200.0f)), _mm512_set1_ps(1.44269504f));
    __m512 whole = _mm512_roundscale_ps(t, 0);
    vf f = (vf)_mm512_sub_ps(t, whole);
    vf p = splat(9.6181291e-3f) * f + 5.5504109e-2f;
    p = p * f + 2.4022651e-1f;
    p = p * f + 6.9314718e-1f;
    p = p * f + 1.0f;
    return (vf)_mm512_scalef_ps((__m512)p, whole);
}
LANES vf sigmoid_bf16(vf x) {
    return (vf)_mm512_rcp14_ps(_mm512_add_ps((__m512)exponential_bf16(minimum(-x, splat(87.0f))), _mm512_set1_ps(1.0f)));
}
#else
LANES vf exponential_bf16(vf x) { return exponential(x); }
LANES vf sigmoid_bf16(vf x) { return sigmoid_float(x); }
#endif
template <class T>
LANES vf sigmoid(vf x) {
    return sizeof(T) == 2 ? sigmoid_bf16(x) : sigmoid_float(x);
}
template <class T>
LANES vf silu(vf x) {
    return x * sigmoid<T>(x);
}

}  // namespace halflap
