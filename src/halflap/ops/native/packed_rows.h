// Linear maps of few rows of activations by packed weights; as few_rows.h.
//
// Whole numbers meet activations as whole numbers (whole_rows.h). Floats of 8 bits are read as weights of any other type are.
#pragma once
#include "few_rows.h"
#include "whole_rows.h"

namespace halflap {

constexpr int E4M3 = 43;  // a FORMAT, floats of 8 bits; the others are the bits of a whole number

struct e4m3 {
    uint8_t bits;
};

LANES vu load_bytes(const void* p) {
#if defined(__AVX512F__)
    return (vu)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p));
#elif defined(__AVX2__)
    return (vu)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p));
#else
    vu bytes;
    for (int i = 0; i < VL; i++) bytes[i] = ((const uint8_t*)p)[i];
    return bytes;
#endif
}
// in the place of a float's sign, exponent and mantissa they are 2^120 times too small, subnormal ones too; no weight is NaN
LANES vf load(const e4m3* p) { return 0x1p120f * (vf)((vu)((vi)(load_bytes(p) << 24) >> 4) & 0x87f00000u); }

// numbers k .. k + VL of a row of weights, of which `left` are there; k is a multiple of VL
template <int FORMAT>
LANES vf numbers(const uint32_t* row, int64_t k, int64_t left) {
    if constexpr (FORMAT == E4M3) return load_to((const e4m3*)row + k, left);
    else if constexpr (FORMAT == 8) {
        const uint8_t* own = (const uint8_t*)row + k;
        uint8_t some[VL] = {};
        if (left < VL) memcpy(some, own, left), own = some;
        return __builtin_convertvector((vi)load_bytes(own), vf) - 128;
    } else {
        const vf first = (vf)((vu){} + row[k / 8]), second = VL > 8 && left > 8 ? (vf)((vu){} + row[k / 8 + 1]) : first;
        const vu words = (vu)select(iota() < 8, first, second);
        return __builtin_convertvector((vi)(words >> (vu)((iota() + (int32_t)(k % 8)) % 8 * 4) & 15), vf) - 8;
    }
}

// row n of the weights as T; scales: those of the row
template <int FORMAT, class T>
void write_row(const Weights& w, int64_t n, const float* scales, T* to) {
    constexpr int PER = FORMAT == 4 ? 8 : 4;
    const uint32_t* row = w.words + n * ((w.inputs + PER - 1) / PER);
    for (int64_t k = 0, g = 0; k < w.inputs; g++) {
        const int64_t stop = w.inputs - k > w.group ? k + w.group : w.inputs;
        for (; k < stop; k += VL) store_to(to + k, numbers<FORMAT>(row, k, stop - k) * scales[g], stop - k);
        k = stop;
    }
}

template <int FORMAT>
struct PackedRows : WholeRows<FORMAT> {
    using WholeRows<FORMAT>::WholeRows;
};
// of floats of 8 bits, a row of which has one scale
template <>
struct PackedRows<E4M3> : FewRows<e4m3> {
    using FewRows<e4m3>::FewRows;
    static int64_t scale_floats(const Weights&) { return GROUP; }
    template <class Put>
    void range(const Weights& w, int64_t begin, int64_t end, float* scales, const Put& put) const {
        FewRows<e4m3>::range((const e4m3*)w.words + begin * K, begin, end, [&](int64_t m, int64_t n, const float* values, int64_t count) {
            float scaled[GROUP];
            widen_scales(w, n, count, scales);
            for (int64_t i = 0; i < count; i++) scaled[i] = values[i] * scales[i];
            put(m, n, scaled, count);
        });
    }
};

}  // namespace halflap
