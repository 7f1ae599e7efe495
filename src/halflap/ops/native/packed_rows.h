// Linear maps of few rows of activations by packed weights; as few_rows.h.
//
// Weights are whole numbers of 4 or 8 bits in 32-bit words, the first input in the lowest bits; PER of them lie in a
// word. A vector of VL words is a block of VL * PER inputs; shifted by s * BITS, lane i holds input PER * i + s. So no
// weight is moved between lanes: the activations are put in that order once for all rows of the weight. A lane's PER
// inputs share a scale. The offset that makes the numbers unsigned is taken out through the sum of a lane's activations,
// with which sums begin. Up to ALIKE rows of activations are multiplied in one order, as in few_rows.h.
// Floats of 8 bits lie like whole numbers of 8 bits; shifted into the place of a float's sign, exponent and mantissa,
// they are 2^120 times too small, the subnormal ones too. (Not the one that means NaN, which no weight is.)
// For more rows of activations than that the weights become floats first, a dozen rows of them at a time.
#pragma once
#include "few_rows.h"

namespace halflap {

struct Weights {  // mirrored by ops/native/quantized.py
    int64_t rows, inputs, group, narrow_scales;
    const uint32_t* words;  // (rows, ceil(inputs / PER))
    const void* scales;     // (rows, ceil(inputs / group)), float or bfloat16
};

constexpr int DOZEN = Columns::GROUP;  // rows of weights that are floats at a time: as many as a group of columns.h

constexpr int E4M3 = 43;  // a FORMAT; the others are the bits of a whole number

template <int FORMAT>
struct Form {
    static constexpr bool FLOATS = FORMAT == E4M3;
    static constexpr int BITS = FLOATS ? 8 : FORMAT, PER = 32 / BITS, BLOCK = VL * PER;
    static constexpr float OFFSET = FLOATS ? 0 : 1 << (BITS - 1);
    // the part of a number's unit that activations cannot take without leaving float's range, and sums therefore do
    static constexpr float SUM_UNIT = FLOATS ? 0x1p60f : 1;

    static vu load_some_words(const uint32_t* p, int64_t left) {
        vu words = {};
        memcpy(&words, p, left * sizeof(uint32_t));
        return words;
    }
    LANES static vu load_words(const uint32_t* p, int64_t left) {
        if (left < VL) return load_some_words(p, left);
        vu words;
        memcpy(&words, p, sizeof words);
        return words;
    }
    // numbers k .. k + VL of a row, of which `left` are there; k is a multiple of VL
    LANES static vf in_order(const uint32_t* row, int64_t k, int64_t left) {
        constexpr int WORDS = VL > PER ? VL / PER : 1;
        vu words, shifts;
        uint32_t own[WORDS] = {};
        const int64_t there = (left + PER - 1) / PER;
        if (there >= WORDS) memcpy(own, row + k / PER, sizeof own);
        else memcpy(own, row + k / PER, there * sizeof(uint32_t));
        for (int i = 0; i < VL; i++) words[i] = own[i / PER % WORDS];
        for (int i = 0; i < VL; i++) shifts[i] = (i % PER) * BITS;
        if (VL < PER) shifts += (uint32_t)(k % PER) * BITS;
        words = words >> shifts & ((1u << BITS) - 1);
        return FLOATS ? SUM_UNIT * (unit(0) * as_float(words << 24)) : __builtin_convertvector((vi)words, vf);
    }
    // of a float of 8 bits in the highest ones
    LANES static vf as_float(vu words) { return (vf)((vu)((vi)words >> 4) & 0x87f00000u); }
    // a lane's number s where it lies in the word, so without a shift but for the last, which would have a sign: unit(s) of it is 1
    LANES static vf number(vu words, int s) {
        if constexpr (FLOATS) return as_float(words << (24 - s * BITS));
        const vu own = s == PER - 1 ? words >> (s * BITS) : words & (((1u << BITS) - 1) << (s * BITS));
        return __builtin_convertvector((vi)own, vf);
    }
    LANES static float unit(int s) { return FLOATS ? 0x1p60f : s == PER - 1 ? 1.0f : 1.0f / (1u << (s * BITS)); }
};

// Each lane's scale in a block: groups are powers of two, or one for all inputs.
template <int FORMAT>
struct Spread {
    int64_t blocks_of_a_group = 0, groups_of_a_block = 0;  // whichever is at least 1; neither where one group holds all
    vi lane_group;                                         // a lane's group within the block
    Spread(int64_t inputs, int64_t group) {
        const int64_t lanes = group / Form<FORMAT>::PER;
        for (int i = 0; i < VL; i++) lane_group[i] = lanes ? (int32_t)(i / lanes) : 0;
        if (group >= inputs) return;
        if (lanes >= VL) blocks_of_a_group = lanes / VL;
        else groups_of_a_block = VL / lanes;
    }
    // of the block after `block` others; lanes behind the last input get whatever lies behind the last scale
    LANES vf of(const float* scales, int64_t block, int shift) const {
        if (groups_of_a_block) return permute(load(scales + block * groups_of_a_block), lane_group);
        return splat(blocks_of_a_group ? scales[block >> shift] : scales[0]);
    }
    int shift() const {
        int bits = 0;
        while (blocks_of_a_group >> (bits + 1)) bits++;
        return bits;
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

// words that come 2 KB later, of other rows most of the time, as rows lie behind one another; not into the first cache
LANES void fetch_ahead(const uint32_t* words) { __builtin_prefetch(words + 512, 0, 2); }

// one row of weights times ROWS rows of activations; a function of its own, whose loop has all registers
template <int FORMAT, int ROWS>
__attribute__((noinline)) void multiply(const uint32_t* words, const float* scales, const Spread<FORMAT>& spread, int64_t K, int64_t blocks, const float* x, const float* begun, float* y) {
    using F = Form<FORMAT>;
    const int64_t count = (K + F::PER - 1) / F::PER;
    const int shift = spread.shift();
    vf totals[ROWS] = {};
    for (int64_t b = 0; b < blocks; b++) {
        const vu w = F::load_words(words + b * VL, count - b * VL);
        fetch_ahead(words + b * VL);
        vf parts[ROWS];
#pragma GCC unroll 4
        for (int m = 0; m < ROWS; m++) parts[m] = load(begun + (m * blocks + b) * VL);
#pragma GCC unroll 8
        for (int s = 0; s < F::PER; s++) {
            const vf number = F::number(w, s);
#pragma GCC unroll 4
            for (int m = 0; m < ROWS; m++) parts[m] = fused(number, load(x + ((m * blocks + b) * F::PER + s) * VL), parts[m]);
        }
        const vf scale = F::SUM_UNIT * spread.of(scales, b, shift);
#pragma GCC unroll 4
        for (int m = 0; m < ROWS; m++) totals[m] = fused(parts[m], scale, totals[m]);
    }
    for (int m = 0; m < ROWS; m++) y[m] = sum(totals[m]);
}

// The same for two rows of weights whose numbers (blocks, PER, VL) and scales (blocks, VL) are floats already, row by row
// behind one another: for so many activations that taking numbers from words for each four of them would cost more.
template <int FORMAT, int ROWS>
__attribute__((noinline)) void multiply_two(const float* numbers, const float* scales, int64_t blocks, const float* x, const float* begun, float (*y)[4]) {
    using F = Form<FORMAT>;
    vf totals[2][ROWS] = {};
    for (int64_t b = 0; b < blocks; b++) {
        vf parts[2][ROWS];
#pragma GCC unroll 4
        for (int m = 0; m < ROWS; m++) parts[0][m] = parts[1][m] = load(begun + (m * blocks + b) * VL);
#pragma GCC unroll 8
        for (int s = 0; s < F::PER; s++) {
            const vf first = in_register(load(numbers + (b * F::PER + s) * VL)), second = in_register(load(numbers + ((blocks + b) * F::PER + s) * VL));
#pragma GCC unroll 4
            for (int m = 0; m < ROWS; m++) {
                const vf term = in_register(load(x + ((m * blocks + b) * F::PER + s) * VL));
                parts[0][m] = fused(first, term, parts[0][m]), parts[1][m] = fused(second, term, parts[1][m]);
            }
        }
#pragma GCC unroll 2
        for (int r = 0; r < 2; r++)
#pragma GCC unroll 4
            for (int m = 0; m < ROWS; m++) totals[r][m] = fused(parts[r][m], load(scales + (r * blocks + b) * VL), totals[r][m]);
    }
    for (int r = 0; r < 2; r++)
        for (int m = 0; m < ROWS; m++) y[r][m] = sum(totals[r][m]);
}

// the scales of a row as floats
inline void widen_scales(const Weights& w, int64_t row, int64_t groups, float* to) {
    if (!w.narrow_scales) memcpy(to, (const float*)w.scales + row * groups, groups * sizeof(float));
    else
        for (int64_t g = 0; g < groups; g += VL) store_to(to + g, load_to((const bf16*)w.scales + row * groups + g, groups - g), groups - g);
}

template <int FORMAT>
struct PackedRows {
    using F = Form<FORMAT>;
    int64_t M, K, blocks;
    float *ordered, *rest;  // activations (M, blocks, PER, VL), number s in units; the sums of each lane's times -OFFSET (M, blocks, VL), or what FewRows has

    static int64_t blocks_of(int64_t K) { return (K + F::BLOCK - 1) / F::BLOCK; }
    static bool as_floats(int64_t M) { return M > ALIKE; }
    // of a row of activations; where the weights become floats a cache line more, since rows apart by pages displace each other
    static int64_t width(int64_t M, int64_t K) { return blocks_of(K) * F::BLOCK + (as_floats(M) ? 16 : 0); }
    static int64_t floats(int64_t M, int64_t K) {
        return M * width(M, K) + (as_floats(M) ? FewRows<float>::floats(M, width(M, K)) : M * blocks_of(K) * VL) + 16;
    }
    template <class T>
    PackedRows(int64_t M, int64_t K, const T* from, int64_t stride, float* memory)
        : PackedRows(M, K, memory) {
        const int64_t width = PackedRows::width(M, K);
        memset(ordered, 0, M * width * sizeof(float));
        for (int64_t m = 0; m < M; m++)
            for (int64_t k = 0; k < K; k++) {
                const int64_t block = k / F::BLOCK, lane = k / F::PER % VL, s = k % F::PER;
                ordered[m * width + (block * F::PER + s) * VL + lane] = widen(from[m * stride + k]);
            }
        if (as_floats(M)) {
            FewRows<float>(M, width, ordered, width, rest);
            return;
        }
        for (int64_t b = 0; b < M * blocks; b++) {
            vf sum = splat(0);
            for (int s = 0; s < F::PER; s++) {
                float* own = ordered + (b * F::PER + s) * VL;
                sum += load(own);
                store(own, F::unit(s) * load(own));
            }
            store(rest + b * VL, F::OFFSET ? -F::OFFSET * sum : splat(0));
        }
    }

    PackedRows(int64_t M, int64_t K, float* memory)  // prepared before
        : M(M), K(K), blocks(blocks_of(K)), ordered(memory), rest(memory + M * width(M, K)) {}

    // outputs begin .. end; scales: room for those of a row
    static int64_t scale_floats(const Weights& w) { return (w.inputs + w.group - 1) / w.group + F::PER * VL; }
    template <class Put>
    void range(const Weights& w, int64_t begin, int64_t end, float* scales, const Put& put) const {
        const int64_t per_row = (K + F::PER - 1) / F::PER, groups = (K + w.group - 1) / w.group;
        const Spread<FORMAT> spread(K, w.group);
        if (as_floats(M)) {
            static thread_local std::vector<float> wide;
            const int64_t width = PackedRows::width(M, K);
            wide.resize(DOZEN * width);
            const FewRows<float> rows(M, width, rest);
            for (int64_t n = begin; n < end; n += DOZEN) {
                const int64_t count = end - n < DOZEN ? end - n : DOZEN;
                for (int64_t r = 0; r < count; r++) {
                    widen_scales(w, n + r, groups, scales);
                    write_in_order(w.words + (n + r) * per_row, scales, spread, wide.data() + r * width);
                }
                rows.range(wide.data(), n, n + count, put);
            }
            return;
        }
        const Fours fours{M};
        float out[ALIKE][PAIRS * 2];
        for (int64_t n = begin; n < end; n += PAIRS * 2) {
            const int64_t count = end - n < PAIRS * 2 ? end - n : PAIRS * 2, paired = M > 6 ? count / 2 * 2 : 0;
            if (paired) in_pairs(fours, w, n, paired, scales, spread, out);
            for (int64_t r = paired; r < count; r++) {
                widen_scales(w, n + r, groups, scales);
                for (int64_t g = 0; g < fours.count(); g++) {
                    float y[4];
                    multiply_group(fours, g, w.words + (n + r) * per_row, scales, spread, y);
                    for (int64_t i = 0; i < fours.of(g); i++) out[fours.first(g) + i][r] = y[i];
                }
            }
            for (int64_t m = 0; m < M; m++) put(m, n, out[m], count);
        }
    }

private:
    static constexpr int64_t PAIRS = 8;  // of rows of weights that are floats in the second cache while activations pass

    // outputs n .. n + count, an even number, of all rows of activations
    void in_pairs(const Fours& fours, const Weights& w, int64_t n, int64_t count, float* scales, const Spread<FORMAT>& spread, float (*out)[PAIRS * 2]) const {
        static thread_local std::vector<float> memory;
        const int64_t per_row = (K + F::PER - 1) / F::PER, groups = (K + w.group - 1) / w.group, width = blocks * F::BLOCK;
        if ((int64_t)memory.size() < 2 * PAIRS * (width + blocks * VL)) memory.resize(2 * PAIRS * (width + blocks * VL));
        float *numbers = memory.data(), *wide = numbers + 2 * PAIRS * width;
        const int shift = spread.shift();
        for (int64_t r = 0; r < count; r++) {
            widen_scales(w, n + r, groups, scales);
            const uint32_t* words = w.words + (n + r) * per_row;
            for (int64_t b = 0; b < blocks; b++) {
                const vu own = F::load_words(words + b * VL, per_row - b * VL);
                fetch_ahead(words + b * VL);
#pragma GCC unroll 8
                for (int s = 0; s < F::PER; s++) store(numbers + r * width + (b * F::PER + s) * VL, F::number(own, s));
                store(wide + (r * blocks + b) * VL, F::SUM_UNIT * spread.of(scales, b, shift));
            }
        }
        for (int64_t g = 0; g < fours.count(); g++)
            for (int64_t r = 0; r < count; r += 2) {
                float y[2][4];
                const float *x = ordered + fours.first(g) * width, *begun = rest + fours.first(g) * blocks * VL, *own = wide + r * blocks * VL;
                if (fours.of(g) == 4) multiply_two<FORMAT, 4>(numbers + r * width, own, blocks, x, begun, y);
                else multiply_two<FORMAT, 3>(numbers + r * width, own, blocks, x, begun, y);  // of more than six, never fewer
                for (int64_t i = 0; i < fours.of(g); i++) out[fours.first(g) + i][r] = y[0][i], out[fours.first(g) + i][r + 1] = y[1][i];
            }
    }
    // a row of weights times a group of rows of activations
    void multiply_group(const Fours& fours, int64_t g, const uint32_t* words, const float* scales, const Spread<FORMAT>& spread, float* y) const {
        const float *x = ordered + fours.first(g) * blocks * F::BLOCK, *begun = rest + fours.first(g) * blocks * VL;
        switch (fours.of(g)) {
            case 1: return multiply<FORMAT, 1>(words, scales, spread, K, blocks, x, begun, y);
            case 2: return multiply<FORMAT, 2>(words, scales, spread, K, blocks, x, begun, y);
            case 3: return multiply<FORMAT, 3>(words, scales, spread, K, blocks, x, begun, y);
            default: return multiply<FORMAT, 4>(words, scales, spread, K, blocks, x, begun, y);
        }
    }
    // a row of weights as floats, in the order of the activations; zeros behind the last input
    __attribute__((noinline)) void write_in_order(const uint32_t* words, const float* scales, const Spread<FORMAT>& spread, float* to) const {
        const int64_t count = (K + F::PER - 1) / F::PER;
        const int shift = spread.shift();
        for (int64_t b = 0; b < blocks; b++) {
            const vu w = F::load_words(words + b * VL, count - b * VL);
            const vf scale = spread.of(scales, b, shift);
#pragma GCC unroll 8
            for (int s = 0; s < F::PER; s++, to += VL) {
                const vf weight = (F::SUM_UNIT * (F::unit(s) * F::number(w, s)) - F::OFFSET) * scale;
                const vi input = (int32_t)(b * F::BLOCK + s) + F::PER * iota();
                store(to, b + 1 < blocks ? weight : select(input < (int32_t)K, weight, splat(0)));
            }
        }
        memset(to, 0, 16 * sizeof(float));
    }
};

}  // namespace halflap
