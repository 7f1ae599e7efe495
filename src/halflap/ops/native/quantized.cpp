// Packed weights (packed_rows.h): products of few rows of activations, and rows of weights written out.
#include "few_rows.h"
#include "packed_rows.h"
#include <vector>

using namespace halflap;

namespace {

// y (M, rows) = x (M, K) weights'
template <int FORMAT, class T>
void some_rows(const Weights& w, int64_t M, const T* x, T* y, int threads) {
    const int64_t K = w.inputs, grain = 1 + 65536 / (K * Groups<4>{M}.count());
    const PackedRows<FORMAT> rows(M, K, x, K, scratch(PackedRows<FORMAT>::floats(M, K)));
    parallel_ranges(w.rows, grain, threads, [&](int64_t begin, int64_t end) {
        std::vector<float> scales(rows.scale_floats(w));  // scratch holds the activations
        rows.range(w, begin, end, scales.data(), [&](int64_t m, int64_t n, const float* values, int64_t count) {
            put_values(y + m * w.rows + n, values, nullptr, count);
        });
    });
}

template <int FORMAT, class T>
void few_rows(const Weights& w, int64_t M, const T* x, T* y, int threads) {
    for (int64_t m = 0; m < M; m += AT_A_TIME)
        some_rows<FORMAT>(w, M - m < AT_A_TIME ? M - m : AT_A_TIME, x + m * w.inputs, y + m * w.rows, threads);
}

// rows begin .. end of the weights as T, (end - begin, K)
template <int FORMAT, class T>
void write_out(const Weights& w, int64_t begin, int64_t end, T* to, int threads) {
    const int64_t K = w.inputs, groups = (K + w.group - 1) / w.group;
    parallel_ranges(end - begin, 1 + 65536 / K, threads, [&](int64_t first, int64_t last) {
        std::vector<float> scales(groups);
        for (int64_t n = first; n < last; n++) {
            widen_scales(w, (begin + n) * groups, groups, scales.data());
            write_row<FORMAT>(w, begin + n, scales.data(), to + n * K);
        }
    });
}

template <class T>
void few_rows(int format, const Weights& w, int64_t M, const void* x, void* y, int threads) {
    if (format == 4) few_rows<4>(w, M, (const T*)x, (T*)y, threads);
    else if (format == 8) few_rows<8>(w, M, (const T*)x, (T*)y, threads);
    else few_rows<E4M3>(w, M, (const T*)x, (T*)y, threads);
}

template <class T>
void write_out(int format, const Weights& w, int64_t begin, int64_t end, void* to, int threads) {
    if (format == 4) write_out<4>(w, begin, end, (T*)to, threads);
    else if (format == 8) write_out<8>(w, begin, end, (T*)to, threads);
    else write_out<E4M3>(w, begin, end, (T*)to, threads);
}

}  // namespace

#pragma GCC visibility push(default)
extern "C" {

void halflap_packed_few_rows(const Weights* w, int64_t format, int64_t M, const void* x, void* y, int narrow, int threads) {
    if (narrow) few_rows<bf16>((int)format, *w, M, x, y, threads);
    else few_rows<float>((int)format, *w, M, x, y, threads);
}

void halflap_packed_write_out(const Weights* w, int64_t format, int64_t begin, int64_t end, void* to, int narrow, int threads) {
    if (narrow) write_out<bf16>((int)format, *w, begin, end, to, threads);
    else write_out<float>((int)format, *w, begin, end, to, threads);
}

}
