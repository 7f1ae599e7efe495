// Packed weights: products of few rows of activations, and rows of weights written out.
//
// Weights are whole numbers of 4 or 8 bits in 32-bit words, the first input in the lowest bits; PER of them lie in a
// word. A vector of VL words is a block of VL * PER inputs; shifted by s * BITS, lane i holds input PER * i + s. So no
// weight is moved between lanes: the activations are put in that order once for all rows of the weight. A lane's PER
// inputs share a scale. The offset that makes the numbers unsigned is taken out through the sum of a lane's activations.
#include "parallel.h"
#include "vector.h"
#include <vector>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

using namespace halflap;

namespace {

struct Weights {  // mirrored by ops/native/quantized.py
    int64_t rows, inputs, group, narrow_scales;
    const uint32_t* words;  // (rows, ceil(inputs / PER))
    const void* scales;     // (rows, ceil(inputs / group)), float or bfloat16
};

constexpr int AT_ONCE = 4;  // rows of activations that one reading of a block serves

template <int BITS>
struct Form {
    static constexpr int PER = 32 / BITS, BLOCK = VL * PER;
    static constexpr float OFFSET = 1 << (BITS - 1);

    LANES static vu load_words(const uint32_t* p, int64_t left) {
        vu words = {};
        if (left >= VL) memcpy(&words, p, sizeof words);
        else memcpy(&words, p, left * sizeof(uint32_t));
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
        return __builtin_convertvector((vi)(words >> shifts & ((1u << BITS) - 1)), vf);
    }
    LANES static vf number(vu words, int s) {
        return __builtin_convertvector((vi)(words >> (s * BITS) & ((1u << BITS) - 1)), vf);
    }
};

// Each lane's scale in a block of BITS: groups are powers of two, or one for all inputs.
template <int BITS>
struct Spread {
    int64_t blocks_of_a_group = 0, groups_of_a_block = 0;  // whichever is at least 1; neither where one group holds all
    vi lane_group;                                         // a lane's group within the block
    Spread(int64_t inputs, int64_t group) {
        const int64_t lanes = group * BITS / 32;
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

// activations (M, K) as (M, blocks, PER, VL) and the sums of each lane's (M, blocks, VL), zeros behind the last
template <int BITS, class T>
void arrange(int64_t M, int64_t K, int64_t blocks, const T* x, float* ordered, float* sums) {
    constexpr int PER = Form<BITS>::PER;
    memset(ordered, 0, M * blocks * PER * VL * sizeof(float));
    for (int64_t m = 0; m < M; m++)
        for (int64_t k = 0; k < K; k++) {
            const int64_t block = k / (VL * PER), lane = k / PER % VL, s = k % PER;
            ordered[((m * blocks + block) * PER + s) * VL + lane] = widen(x[m * K + k]);
        }
    for (int64_t b = 0; b < M * blocks; b++) {
        vf sum = splat(0);
        for (int s = 0; s < PER; s++) sum += load(ordered + (b * PER + s) * VL);
        store(sums + b * VL, sum);
    }
}

// one row of weights times ROWS rows of activations
template <int BITS, int ROWS>
inline void multiply(const uint32_t* words, const float* scales, const Spread<BITS>& spread, int64_t K, int64_t blocks, const float* x, const float* sums, float* y) {
    using F = Form<BITS>;
    const int64_t count = (K + F::PER - 1) / F::PER;
    const int shift = spread.shift();
    vf totals[ROWS] = {};
    for (int64_t b = 0; b < blocks; b++) {
        const vu w = F::load_words(words + b * VL, count - b * VL);
        vf parts[ROWS];
#pragma GCC unroll 4
        for (int m = 0; m < ROWS; m++) parts[m] = splat(0);
#pragma GCC unroll 8
        for (int s = 0; s < F::PER; s++) {
            const vf number = F::number(w, s);
#pragma GCC unroll 4
            for (int m = 0; m < ROWS; m++) parts[m] += number * load(x + ((m * blocks + b) * F::PER + s) * VL);
        }
        const vf scale = spread.of(scales, b, shift);
#pragma GCC unroll 4
        for (int m = 0; m < ROWS; m++) {
            parts[m] -= F::OFFSET * load(sums + (m * blocks + b) * VL);
            totals[m] += parts[m] * scale;
        }
    }
    for (int m = 0; m < ROWS; m++) y[m] = sum(totals[m]);
}

// the scales of a row as floats
void widen_scales(const Weights& w, int64_t row, int64_t groups, float* to) {
    if (!w.narrow_scales) memcpy(to, (const float*)w.scales + row * groups, groups * sizeof(float));
    else
        for (int64_t g = 0; g < groups; g += VL) store_to(to + g, load_to((const bf16*)w.scales + row * groups + g, groups - g), groups - g);
}

// y (M, rows) = x (M, K) weights'
template <int BITS, class T>
void few_rows(const Weights& w, int64_t M, const T* x, T* y, int threads) {
    using F = Form<BITS>;
    const int64_t K = w.inputs, blocks = (K + F::BLOCK - 1) / F::BLOCK, per_row = (K + F::PER - 1) / F::PER;
    const int64_t groups = (K + w.group - 1) / w.group;
    const Spread<BITS> spread(K, w.group);
    float* ordered = scratch(M * blocks * VL * (F::PER + 1) + 16);
    float* sums = ordered + M * blocks * VL * F::PER;
    arrange<BITS>(M, K, blocks, x, ordered, sums);
    const int64_t grain = 1 + 65536 / (K * (M < AT_ONCE ? 1 : M / AT_ONCE));
    parallel_ranges(w.rows, grain, threads, [&](int64_t begin, int64_t end) {
        std::vector<float> memory(groups + F::PER * VL);  // scratch holds the activations
        float *scales = memory.data(), out[AT_ONCE];
        for (int64_t n = begin; n < end; n++) {
            widen_scales(w, n, groups, scales);
            const uint32_t* words = w.words + n * per_row;
            for (int64_t m = 0; m < M; m += AT_ONCE) {
                const float *xs = ordered + m * blocks * F::PER * VL, *ss = sums + m * blocks * VL;
                const int64_t rows = M - m < AT_ONCE ? M - m : AT_ONCE;
                switch (rows) {
                    case 1: multiply<BITS, 1>(words, scales, spread, K, blocks, xs, ss, out); break;
                    case 2: multiply<BITS, 2>(words, scales, spread, K, blocks, xs, ss, out); break;
                    case 3: multiply<BITS, 3>(words, scales, spread, K, blocks, xs, ss, out); break;
                    default: multiply<BITS, 4>(words, scales, spread, K, blocks, xs, ss, out);
                }
                for (int64_t r = 0; r < rows; r++) store_some(y + (m + r) * w.rows + n, splat(out[r]), 1);
            }
        }
    });
}

// rows begin .. end of the weights as T, (end - begin, K)
template <int BITS, class T>
void write_out(const Weights& w, int64_t begin, int64_t end, T* to, int threads) {
    using F = Form<BITS>;
    const int64_t K = w.inputs, per_row = (K + F::PER - 1) / F::PER, groups = (K + w.group - 1) / w.group;
    parallel_ranges(end - begin, 1 + 65536 / K, threads, [&](int64_t first, int64_t last) {
        std::vector<float> scales(groups);
        for (int64_t n = first; n < last; n++) {
            widen_scales(w, begin + n, groups, scales.data());
            const uint32_t* words = w.words + (begin + n) * per_row;
            for (int64_t g = 0; g < groups; g++) {
                const int64_t stop = (g + 1) * w.group < K ? (g + 1) * w.group : K;
                for (int64_t k = g * w.group; k < stop; k += VL) {
                    const int64_t left = stop - k;
                    store_to(to + n * K + k, (F::in_order(words, k, left) - F::OFFSET) * scales[g], left);
                }
            }
        }
    });
}

template <class T>
void few_rows(int bits, const Weights& w, int64_t M, const void* x, void* y, int threads) {
    if (bits == 4) few_rows<4>(w, M, (const T*)x, (T*)y, threads);
    else few_rows<8>(w, M, (const T*)x, (T*)y, threads);
}

template <class T>
void write_out(int bits, const Weights& w, int64_t begin, int64_t end, void* to, int threads) {
    if (bits == 4) write_out<4>(w, begin, end, (T*)to, threads);
    else write_out<8>(w, begin, end, (T*)to, threads);
}

}  // namespace

#pragma GCC visibility push(default)
extern "C" {

void halflap_packed_few_rows(const Weights* w, int64_t bits, int64_t M, const void* x, void* y, int narrow, int threads) {
    if (narrow) few_rows<bf16>((int)bits, *w, M, x, y, threads);
    else few_rows<float>((int)bits, *w, M, x, y, threads);
}

void halflap_packed_write_out(const Weights* w, int64_t bits, int64_t begin, int64_t end, void* to, int narrow, int threads) {
    if (narrow) write_out<bf16>((int)bits, *w, begin, end, to, threads);
    else write_out<float>((int)bits, *w, begin, end, to, threads);
}

}
