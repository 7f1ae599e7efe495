// Draws from logits as ops/sampling.py says them: per row the largest of z = logit / temperature plus Gumbel noise, a
// hash of the row's key and the token's number, among tokens whose z is at least what the filters keep.
//
// A token is scored in float64 only where it may win: noise -log(-log u) is at most -log(1 - u), which the bits of 1 - u
// as a float bound from above without a logarithm. Of a row some dozens of tokens are left by that. Top-p takes one pass
// that sums weights by bins of z, and orders the bin in which the share is reached, by halves, no further than needed.
#pragma once
#include "vector.h"
#include <algorithm>
#include <functional>
#include <vector>

namespace halflap {

struct Asked {  // mirrored by sampling.py
    double temperature, top_p, min_p;
    int64_t top_k;
    uint64_t key;
};

constexpr float SLACK = 1e-3f;  // of bounds, in float
constexpr int BINS = 2048, BINS_A_UNIT = 64, BLOCK = 1024, FEW = 32;

template <class U>  // uint32_t or a vector of them
LANES U mixed(U x) {
    x = (x ^ (x >> 16)) * 0x21f0aaadu;
    x = (x ^ (x >> 15)) * 0x735a2d97u;
    return x ^ (x >> 15);
}
template <class U>
LANES U token_bits(U token, uint64_t key) {
    return mixed(mixed(token * 0x9e3779b9u + (uint32_t)key) ^ (uint32_t)(key >> 32));
}
inline double gumbel(uint32_t token, uint64_t key) {
    return -std::log(-std::log((token_bits(token, key) + 0.5) / 4294967296.0));
}
// at least the Gumbel noise of such bits: -log2 y <= 127 - (bits of y as a float) / 2^23, as log2(1 + f) >= f
LANES vf noise_bound(vu bits) {
    const vf y = __builtin_convertvector((vi)(~bits >> 8), vf);
    return (151.0f - __builtin_convertvector((vi)y, vf) * (1.0f / 8388608)) * 0.693148f;
}

LANES bool any(vi mask) {
#if defined(__AVX512F__)
    return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask) != 0;
#elif defined(__AVX__)
    return _mm256_movemask_ps((__m256)mask) != 0;
#else
    int32_t found = 0;
    for (int i = 0; i < VL; i++) found |= mask[i];
    return found != 0;
#endif
}

typedef double d4 __attribute__((vector_size(32)));
typedef int64_t l4 __attribute__((vector_size(32)));
typedef int32_t i4 __attribute__((vector_size(16)));
typedef float f4 __attribute__((vector_size(16)));

LANES d4 at_least(d4 x, double least) {
    const d4 all = {least, least, least, least};
    return x > all ? x : all;  // of a NaN, too
}
// e^x of x <= 0 to some 1e-16; e^-700 below that
LANES d4 exponential(d4 x) {
    const double rounder = 6755399441055744.0;  // 1.5 * 2^52
    x = at_least(x, -700.0);
    d4 turns = x * 1.4426950408889634 + rounder;
    const l4 power = (l4)turns << 52;
    turns -= rounder;
    x = x - turns * 6.93147180369123816490e-01;
    x = x - turns * 1.90821492927058770002e-10;
    d4 p = x * (1.0 / 479001600) + 1.0 / 39916800;
    p = p * x + 1.0 / 3628800;
    p = p * x + 1.0 / 362880;
    p = p * x + 1.0 / 40320;
    p = p * x + 1.0 / 5040;
    p = p * x + 1.0 / 720;
    p = p * x + 1.0 / 120;
    p = p * x + 1.0 / 24;
    p = p * x + 1.0 / 6;
    p = p * x + 0.5;
    p = p * x + 1.0;
    p = p * x + 1.0;
    return (d4)((l4)p + power);
}

inline float largest(int64_t size, const float* logits) {
    vf most = splat(-INFINITY);
    int64_t i = 0;
    for (; i + VL <= size; i += VL) most = maximum(load(logits + i), most);
    float found = largest(most);
    for (; i < size; i++) found = logits[i] > found ? logits[i] : found;
    return found;
}

// calls with(index) for each i with test(logits + i) set there, the last few whatever it says
template <class Test, class With>
LANES void where(int64_t size, const float* logits, const Test& test, const With& with) {
    int64_t i = 0;
    for (; i + VL <= size; i += VL) {
        const vi mask = test(i);
        if (any(mask))
            for (int lane = 0; lane < VL; lane++)
                if (mask[lane]) with(i + lane);
    }
    for (; i < size; i++) with(i);
}

// the k-th largest logit; -inf where fewer are above that
inline float kth_largest(int64_t size, const float* logits, int64_t k, std::vector<float>& held) {
    const size_t most = 2 * (size_t)k + BLOCK;
    float least = -INFINITY;
    held.clear();
    auto cut = [&] {  // to the k largest so far, of which the last is the bound for what comes
        std::nth_element(held.begin(), held.begin() + k - 1, held.end(), std::greater<float>());
        held.resize(k);
        least = held[k - 1];
    };
    where(size, logits, [&](int64_t i) { return (vi)(load(logits + i) > splat(least)); }, [&](int64_t i) {
        if (logits[i] > least) held.push_back(logits[i]);
        if (held.size() == most) cut();
    });
    if ((int64_t)held.size() >= k) cut();
    return least;
}

// the least of some z in any order that top-p keeps, where larger ones weigh `before` and `goal` is to be reached;
// weights are e^(z - top)
inline float least_of_share(std::vector<float>& z, double top, double before, double goal) {
    auto weight = [&](size_t begin, size_t end) {
        double total = 0;
        for (size_t i = begin; i < end; i++) total += std::exp(z[i] - top);
        return total;
    };
    size_t begin = 0, end = z.size();  // in descending order, the one at `begin` is kept and the one at `end` is not
    while (end - begin > FEW) {
        const size_t middle = (begin + end) / 2;
        std::nth_element(z.begin() + begin, z.begin() + middle, z.begin() + end, std::greater<float>());
        const double upper = weight(begin, middle);
        if (before + upper < goal) before += upper, begin = middle;
        else end = middle;
    }
    std::sort(z.begin() + begin, z.begin() + end, std::greater<float>());
    size_t i = begin;
    for (before += weight(i, i + 1); i + 1 < end && before < goal; i++) before += weight(i + 1, i + 2);
    return z[i];
}

// which bin z - top belongs to; the last one holds all that weighs next to nothing
LANES i4 bin_of(d4 below) {
    return __builtin_convertvector(at_least(below, -(BINS - 1.0) / BINS_A_UNIT) * -(double)BINS_A_UNIT, i4);
}

// the weight of all tokens in each bin
inline void weigh(int64_t size, const float* logits, float temperature, float top, double* sums) {
    i4 bins[BLOCK / 4];
    d4 weights[BLOCK / 4];
    f4 z[BLOCK / 4];
    std::fill(sums, sums + BINS, 0.0);
    for (int64_t i = 0; i < size; i += BLOCK) {
        const int64_t count = size - i < BLOCK ? size - i : BLOCK, fours = (count + 3) / 4;
        z[fours - 1] = f4{};
        memcpy(z, logits + i, count * sizeof(float));
        for (int64_t four = 0; four < fours; four++) {
            const d4 below = __builtin_convertvector(z[four] / temperature, d4) - (double)top;
            bins[four] = bin_of(below);
            weights[four] = exponential(below);
        }
        for (int64_t j = 0; j < count; j++) sums[((const int32_t*)bins)[j]] += ((const double*)weights)[j];
    }
}

// top-p among all tokens: the least z that it keeps
inline float nucleus(int64_t size, const float* logits, float temperature, float top, double share, std::vector<float>& held) {
    static thread_local double sums[BINS];
    weigh(size, logits, temperature, top, sums);
    double total = 0, before = 0;
    int found = 0, last = 0;
    for (int bin = 0; bin < BINS; bin++) {
        total += sums[bin];
        if (sums[bin] > 0) last = bin;
    }
    while (found < last && !(before + sums[found] >= share * total)) before += sums[found++];
    held.clear();
    const vf nearest = splat(found - 1.0f), farthest = splat(found < BINS - 1 ? found + 2.0f : INFINITY);
    where(
        size, logits,
        [&](int64_t i) {
            const vf place = (top - load(logits + i) / temperature) * (float)BINS_A_UNIT;
            return (vi)(place >= nearest) & (vi)(place <= farthest);
        },
        [&](int64_t i) {
            const float z = logits[i] / temperature;
            const double below = (double)z - top;
            if (bin_of(d4{below, below, below, below})[0] == found) held.push_back(z);
        });
    return least_of_share(held, top, before, share * total);
}

// the least z that the filters keep
inline double least_kept(int64_t size, const float* logits, const Asked& asked, float top) {
    static thread_local std::vector<float> held;
    const float temperature = (float)asked.temperature;
    double least = -INFINITY;
    if (asked.top_k > 0 && asked.top_k < size) {
        const float kth = kth_largest(size, logits, asked.top_k, held) / temperature;
        least = kth;
        if (asked.top_p < 1) {
            held.clear();
            where(size, logits, [&](int64_t i) { return (vi)(load(logits + i) / temperature >= splat(kth)); }, [&](int64_t i) {
                if (logits[i] / temperature >= kth) held.push_back(logits[i] / temperature);
            });
            double total = 0;
            for (float z : held) total += std::exp(z - (double)top);
            least = least_of_share(held, top, 0, asked.top_p * total);
        }
    } else if (asked.top_p < 1) {
        least = nucleus(size, logits, temperature, top, asked.top_p, held);
    }
    return asked.min_p > 0 ? std::max(least, top + std::log(asked.min_p)) : least;
}

inline int64_t likeliest(int64_t size, const float* logits) {
    const float top = largest(size, logits);
    for (int64_t i = 0; i < size; i++)
        if (logits[i] == top) return i;
    return 0;
}

inline int64_t draw(int64_t size, const float* logits, const Asked& asked) {
    if (asked.temperature == 0) return likeliest(size, logits);
    const float temperature = (float)asked.temperature, top = largest(size, logits) / temperature;
    if (!(top > -INFINITY)) return 0;  // nothing is allowed
    const double kept = least_kept(size, logits, asked, top);
    float least = (float)kept;
    if (least < kept) least = std::nextafterf(least, INFINITY);
    double best = -INFINITY;
    float limit = -INFINITY;  // what z - top and the noise must come to
    int64_t token = 0;
    const vu numbers = (vu)iota();
    where(
        size, logits,
        [&](int64_t i) {
            const vf z = load(logits + i) / temperature;
            const vi allowed = (vi)(z >= least);
            if (!any(allowed)) return allowed;
            return allowed & (vi)(z - top + noise_bound(token_bits((vu)(numbers + (uint32_t)i), asked.key)) > limit);
        },
        [&](int64_t i) {
            const float z = logits[i] / temperature;
            if (!(z >= least)) return;
            const double score = gumbel((uint32_t)i, asked.key) + z;
            if (score > best) best = score, token = i, limit = (float)(best - top) - SLACK;
        });
    return token;
}

}  // namespace halflap
