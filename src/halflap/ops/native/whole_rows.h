// Linear maps of few rows of activations by packed whole numbers of 4 or 8 bits, in whole numbers: processors multiply
// twice as many of 16 bits at a time as floats, and taking packed ones apart costs half of what making floats of them does.
//
// Activations are rounded once for all rows of the weight, to 16 bits of the largest in a block: an error of 2^-16 of that
// one at most. All sums within a block are exact. Its inputs lie in a vector of VL words, PER to a word, the first in the
// lowest bits: lane i holds in its halves inputs PER * i + s and PER * i + s + PARTS, for each s of PARTS. So no weight is
// moved between lanes: the activations are put in that order. A lane's PER inputs share a scale.
#pragma once
#include "few_rows.h"

namespace halflap {

struct Weights {  // mirrored by ops/native/quantized.py
    int64_t rows, inputs, group, narrow_scales;
    const uint32_t* words;  // (rows, ceil(inputs / PER))
    const void* scales;     // (rows, ceil(inputs / group)), float or bfloat16
};

// `count` scales from the one at `first`, as floats
inline void widen_scales(const Weights& w, int64_t first, int64_t count, float* to) {
    if (!w.narrow_scales) memcpy(to, (const float*)w.scales + first, count * sizeof(float));
    else
        for (int64_t i = 0; i < count; i += VL) store_to(to + i, load_to((const bf16*)w.scales + first + i, count - i), count - i);
}

typedef int16_t vs __attribute__((vector_size(VL * 4)));

LANES vi load_whole(const int32_t* p) {
    vi r;
    memcpy(&r, p, sizeof r);
    return r;
}
// c + the product of the lower halves of a and b + that of the upper ones, whole numbers of 16 bits with a sign
LANES vi add_products(vi c, vi a, vi b) {
#if defined(__AVX512VNNI__)
    return (vi)_mm512_dpwssd_epi32((__m512i)c, (__m512i)a, (__m512i)b);
#elif defined(__AVX512BW__)
    return c + (vi)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif defined(__AVXVNNI__) && !defined(__AVX512F__)
    return (vi)_mm256_dpwssd_avx_epi32((__m256i)c, (__m256i)a, (__m256i)b);
#elif defined(__AVX2__) && !defined(__AVX512F__)
    return c + (vi)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#else
    return c + ((vi)((vu)a << 16) >> 16) * ((vi)((vu)b << 16) >> 16) + (a >> 16) * (b >> 16);
#endif
}

// Each lane's scale in a block, where a row has several: its groups are powers of two.
template <int BITS>
struct Spread {
    int64_t groups_of_a_block = 0;  // or at most one, and then
    int shift = 0;                  // 2^shift blocks have the same
    vi lane_group = {};             // a lane's group within the block
    explicit Spread(int64_t group) {
        const int64_t lanes = group * BITS / 32;
        for (int i = 0; i < VL; i++) lane_group[i] = (int32_t)(i / lanes);
        if (lanes < VL) groups_of_a_block = VL / lanes;
        while (VL << (shift + 1) <= lanes) shift++;
    }
    // lanes behind the last input get whatever lies behind the last scale
    LANES vf of(const float* scales, int64_t block) const {
        return groups_of_a_block ? permute(load(scales + block * groups_of_a_block), lane_group) : splat(scales[block >> shift]);
    }
    LANES static vf permute(vf a, vi lanes) {
#if defined(__AVX512F__)
        return (vf)_mm512_permutexvar_ps((__m512i)lanes, (__m512)a);
#elif defined(__AVX2__)
        return (vf)_mm256_permutevar8x32_ps((__m256)a, (__m256i)lanes);
#else
        vf r;
        for (int i = 0; i < VL; i++) r[i] = a[lanes[i]];
        return r;
#endif
    }
};

template <int BITS>
struct WholeRows {
    static constexpr int PER = 32 / BITS, PARTS = PER / 2, BLOCK = VL * PER, STEPS = 32767;
    static constexpr int BESIDE = 8, AT_ONCE = 16;  // rows of activations whose sums fit in registers; of weights, put at once
    static constexpr int64_t SIZE = PARTS * VL;
    int64_t M, K, blocks;
    Groups<BESIDE> groups;
    int32_t* x;    // by `groups`, each (blocks, rows of the group, PARTS, VL)
    float* units;  // of the rounding; by `groups`, each (blocks, rows of the group)

    static int64_t blocks_of(int64_t K) { return (K + BLOCK - 1) / BLOCK; }
    static int64_t floats(int64_t M, int64_t K) { return M * blocks_of(K) * (SIZE + 1); }
    static int64_t scale_floats(const Weights& w) { return AT_ONCE * ((w.inputs + w.group - 1) / w.group) + VL; }

    WholeRows(int64_t M, int64_t K, float* memory) : M(M), K(K), blocks(blocks_of(K)), groups{M}, x((int32_t*)memory), units(memory + M * blocks * SIZE) {}  // prepared before
    template <class T>
    WholeRows(int64_t M, int64_t K, const T* from, int64_t stride, float* memory) : WholeRows(M, K, memory) {
        for (int64_t g = 0; g < groups.count(); g++)
            for (int64_t i = 0; i < groups.of(g); i++)
                for (int64_t b = 0; b < blocks; b++) {
                    const int64_t place = groups.first(g) * blocks + b * groups.of(g) + i;
                    units[place] = prepare(from + (groups.first(g) + i) * stride + b * BLOCK, K - b * BLOCK, x + place * SIZE);
                }
    }

    // outputs begin .. end; scales: room for those of AT_ONCE rows
    template <class Put>
    void range(const Weights& w, int64_t begin, int64_t end, float* scales, const Put& put) const {
        const int64_t per_row = (K + PER - 1) / PER, scales_a_row = (K + w.group - 1) / w.group;
        float out[AT_A_TIME][AT_ONCE];
        for (int64_t n = begin; n < end; n += AT_ONCE) {
            const int64_t count = end - n < AT_ONCE ? end - n : AT_ONCE;
            widen_scales(w, n * scales_a_row, count * scales_a_row, scales);
            for (int64_t g = 0; g < groups.count(); g++)
                if (scales_a_row > 1) multiply_group<true>(g, count, w.words + n * per_row, per_row, scales, scales_a_row, w.group, out + groups.first(g));
                else multiply_group<false>(g, count, w.words + n * per_row, per_row, scales, 1, BLOCK, out + groups.first(g));
            for (int64_t m = 0; m < M; m++) put(m, n, out[m], count);
        }
    }

private:
    // a block of a row of activations, of which `left` are there; returns the unit
    template <class T>
    static float prepare(const T* from, int64_t left, int32_t* to) {
        vf values[PER], sizes = splat(0), lost = splat(0);
        for (int i = 0; i < PER; i++) {
            values[i] = left > i * VL ? load_to(from + i * VL, left - i * VL) : splat(0);
            sizes = maximum(sizes, maximum(values[i], -values[i]));
            lost += values[i] - values[i];  // NaN where one is not finite
        }
        const float most = largest(sizes), unit = most > 1e-30f ? most / STEPS : 0, per_unit = unit ? STEPS / most : 0;
        int32_t whole[BLOCK];
        for (int i = 0; i < PER; i++) {
            const vi rounded = (vi)(values[i] * per_unit + 12582912.0f) - 0x4b400000;  // 1.5 * 2^23: adding it rounds to a whole number
            memcpy(whole + i * VL, &rounded, sizeof rounded);
        }
        for (int s = 0; s < PARTS; s++)
            for (int i = 0; i < VL; i++) to[s * VL + i] = (int32_t)((whole[PER * i + s] & 0xffff) | (uint32_t)whole[PER * i + s + PARTS] << 16);
        return unit + sum(lost);
    }

    template <bool GROUPED, class... Given>
    void multiply_group(int64_t g, Given... given) const {
        const int32_t* a = x + groups.first(g) * blocks * SIZE;
        const float* u = units + groups.first(g) * blocks;
        switch (groups.of(g)) {
            case 1: return multiply<1, GROUPED>(a, u, blocks, given...);
            case 2: return multiply<2, GROUPED>(a, u, blocks, given...);
            case 3: return multiply<3, GROUPED>(a, u, blocks, given...);
            case 4: return multiply<4, GROUPED>(a, u, blocks, given...);
            case 5: return multiply<5, GROUPED>(a, u, blocks, given...);
            case 6: return multiply<6, GROUPED>(a, u, blocks, given...);
            case 7: return multiply<7, GROUPED>(a, u, blocks, given...);
            default: return multiply<8, GROUPED>(a, u, blocks, given...);
        }
    }
    // `count` rows of weights times XS of activations; a function of its own, whose loop has all registers
    template <int XS, bool GROUPED>
    __attribute__((noinline)) static void multiply(const int32_t* x, const float* units, int64_t blocks, int64_t count, const uint32_t* words, int64_t per_row, const float* scales, int64_t scales_a_row, int64_t group, float (*out)[AT_ONCE]) {
        constexpr int64_t NEAR = 20480 / (XS * SIZE * sizeof(int32_t));  // blocks of activations that stay in the first cache while the rows pass
        const Spread<BITS> spread(group);
        vf sums[XS][AT_ONCE] = {};
        for (int64_t begin = 0; begin < blocks; begin += NEAR)
            for (int64_t r = 0; r < count; r++) {
                const int64_t end = blocks - begin < NEAR ? blocks : begin + NEAR;
                vf own[XS];
                for (int i = 0; i < XS; i++) own[i] = sums[i][r];
                for (int64_t b = begin; b < end; b++) {
                    const vu w = load_words(words + r * per_row + b * VL, per_row - b * VL);
                    fetch_ahead(words + r * per_row + b * VL);
                    vi numbers[PARTS];
#pragma GCC unroll 4
                    for (int s = 0; s < PARTS; s++) numbers[s] = part(w, s);
                    const vf scale = GROUPED ? spread.of(scales + r * scales_a_row, b) : splat(1);
                    const int32_t* a = x + b * XS * SIZE;
#pragma GCC unroll 8
                    for (int i = 0; i < XS; i++, a += SIZE) {
                        vi sum = {};
#pragma GCC unroll 4
                        for (int s = 0; s < PARTS; s++) sum = add_products(sum, numbers[s], load_whole(a + s * VL));
                        const vf unit = splat(units[b * XS + i]);
                        own[i] = fused(__builtin_convertvector(sum, vf), GROUPED ? unit * scale : unit, own[i]);
                    }
                }
                for (int i = 0; i < XS; i++) sums[i][r] = own[i];
            }
        for (int i = 0; i < XS && !GROUPED; i++)
            for (int64_t r = 0; r < count; r++) sums[i][r] *= scales[r];
        for (int i = 0; i < XS; i++) sums_of_16(sums[i], out[i]);
    }
    // numbers s and s + PARTS of each word; without their offset, which is their highest bit turned, by a shift with the sign
    LANES static vi part(vu words, int s) {
        const vs turned = (vs)(words ^ (BITS == 4 ? 0x88888888u : 0x80808080u));
        return (vi)(turned << (16 - BITS * (s + 1)) >> (16 - BITS));
    }
    LANES static vu load_words(const uint32_t* p, int64_t left) {
        vu words = {};
        if (left >= VL) memcpy(&words, p, sizeof words);
        else memcpy(&words, p, left * sizeof(uint32_t));
        return words;
    }
    // words that come 2 KB later, of other rows most of the time, as rows lie behind one another; not into the first cache
    LANES static void fetch_ahead(const uint32_t* words) { __builtin_prefetch(words + 512, 0, 2); }
};

}  // namespace halflap
