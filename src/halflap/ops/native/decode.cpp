// One token of many sequences (mamba2_step.h) and linear maps of few rows (few_rows.h).
#include "few_rows.h"
#include "mamba2_step.h"
#include "parallel.h"
#include <vector>

using namespace halflap;

namespace {

struct Call {  // mirrored by ops/native/decode.py
    int64_t batch, heads, channels, groups, states, width, bf16, narrow_parameters, threads;
    float low, high, eps;
    const void* projected;  // (B, 2 I + 2 G N + H): z, x, B, C, dt
    const float *conv_weight, *conv_bias, *dt_bias, *A_log, *D, *norm_weight;  // conv_weight (C, W), turned by `prepared`
    void* conv_state;   // (B, W-1, C), advanced in place
    float* ssm_state;   // (B, H, P, N), advanced in place
    void* out;          // (B, I)
};

template <class T>
void widen_turned(const T* from, int64_t columns, int64_t rows, float* to) {  // (columns, rows) to (rows, columns)
    for (int64_t r = 0; r < rows; r++)
        for (int64_t c = 0; c < columns; c++) to[r * columns + c] = widen(from[c * rows + r]);
}

// The step with parameters kept in bfloat16 (bit i of narrow_parameters: the i-th of them) widened, and with the
// convolution's weight turned to (W, C)
Mamba2Step prepared(const Call& s, std::vector<float>& memory) {
    Mamba2Step ready{s.heads, s.channels, s.groups, s.states, s.width, s.low, s.high, s.eps,
                     s.conv_weight, s.conv_bias, s.dt_bias, s.A_log, s.D, s.norm_weight};
    const int64_t inner = s.heads * s.channels, conv = inner + 2 * s.groups * s.states;
    const float** fields[] = {&ready.conv_weight, &ready.conv_bias, &ready.dt_bias, &ready.A_log, &ready.D, &ready.norm_weight};
    const int64_t sizes[] = {conv * s.width, conv, s.heads, s.heads, s.heads, inner};
    memory.resize(conv * (s.width + 1) + 3 * s.heads + inner);
    float* next = memory.data();
    for (int i = 0; i < 6; i++) {
        const bool narrow = s.narrow_parameters >> i & 1;
        if (!*fields[i] || (i > 0 && !narrow)) continue;
        const int64_t rows = i == 0 ? s.width : 1;
        if (narrow) widen_turned((const bf16*)*fields[i], sizes[i] / rows, rows, next);
        else widen_turned(*fields[i], sizes[i] / rows, rows, next);
        *fields[i] = next;
        next += sizes[i];
    }
    return ready;
}

template <class T>
void step(const Call& c, const Mamba2Step& s) {
    parallel_tasks(c.batch * s.groups, (int)c.threads, [&](int64_t task) {
        const int64_t b = task / s.groups;
        mamba2_group_steps(s, task % s.groups, 1, (const T*)c.projected + b * s.row(), s.row(), (T*)c.conv_state + b * (s.width - 1) * s.conv(),
                           c.ssm_state + b * s.inner() * s.states, false, (T*)c.out + b * s.inner(), s.inner());
    });
}

// y (M, N) = x (M, K) weight (N, K)' + bias
template <class T>
void some_rows(int64_t M, int64_t N, int64_t K, const T* x, const T* weight, const float* bias, T* y, int threads) {
    const int64_t grain = 1 + 32768 / (K * M);  // below this, waking a thread costs more than it saves
    const FewRows<T> rows(M, K, x, K, scratch(FewRows<T>::floats(M, K)));
    parallel_ranges(N, round_up(grain, 16), threads, [&](int64_t begin, int64_t end) {
        rows.range(weight + begin * K, begin, end, [&](int64_t m, int64_t n, const float* values, int64_t count) {
            put_values(y + m * N + n, values, bias ? bias + n : nullptr, count);
        });
    });
}

template <class T>
void few_rows(int64_t M, int64_t N, int64_t K, const T* x, const T* weight, const float* bias, T* y, int threads) {
    for (int64_t m = 0; m < M; m += AT_A_TIME)
        some_rows(M - m < AT_A_TIME ? M - m : AT_A_TIME, N, K, x + m * K, weight, bias, y + m * N, threads);
}

}  // namespace

#pragma GCC visibility push(default)
extern "C" {

// whether any number of rows is served well
int halflap_many_rows() { return Columns::FIT; }

void halflap_mamba2_step(const Call* c) {
    static thread_local std::vector<float> memory;
    const Mamba2Step ready = prepared(*c, memory);
    if (c->bf16) step<bf16>(*c, ready);
    else step<float>(*c, ready);
}

void halflap_few_rows(int64_t M, int64_t N, int64_t K, const void* x, const void* weight, const float* bias, void* y, int narrow, int threads) {
    if (narrow) few_rows(M, N, K, (const bf16*)x, (const bf16*)weight, bias, (bf16*)y, threads);
    else few_rows(M, N, K, (const float*)x, (const float*)weight, bias, (float*)y, threads);
}

}
