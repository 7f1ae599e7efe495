// Packed weights (packed_rows.h): products of few rows of activations, and rows of weights written out.
#include "few_rows.h"
#include "packed_rows.h"
#include <vector>

using namespace halflap;

namespace {

// y (M, rows) = x (M, K) weights'
template <int BITS, class T>
void some_rows(const Weights& w, int64_t M, const T* x, T* y, int threads) {
    const int64_t K = w.inputs, grain = 1 + 65536 / (K * (M < AT_ONCE ? 1 : M / AT_ONCE));
    const PackedRows<BITS> rows(M, K, x, K, scratch(PackedRows<BITS>::floats(M, K)));
    parallel_ranges(w.rows, grain, threads, [&](int64_t begin, int64_t end) {
        std::vector<float> scales(rows.scale_floats(w));  // scratch holds the activations
        rows.range(w, begin, end, scales.data(), [&](int64_t m, int64_t n, const float* values, int64_t count) {
            put_values(y + m * w.rows + n, values, nullptr, count);
        });
    });
}

template <int BITS, class T>
void few_rows(const Weights& w, int64_t M, const T* x, T* y, int threads) {
    for (int64_t m = 0; m < M; m += AT_A_TIME)
        some_rows<BITS>(w, M - m < AT_A_TIME ? M - m : AT_A_TIME, x + m * w.inputs, y + m * w.rows, threads);
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
