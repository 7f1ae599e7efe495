// One token of many sequences: a Mamba-2 block between its projections, and linear maps of few rows.
//
// Both are bound by memory. A step reads and writes each state once: a task is one group of one sequence, which owns
// its slice of the convolution, its heads' states and its slice of the norm. A linear map reads its weight once and
// does the few rows' dot products while a block of the weight is in the first-level cache.
#include "parallel.h"
#include "product.h"
#include <vector>

using namespace halflap;

namespace {

struct Step {  // mirrored by ops/native/decode.py
    int64_t batch, heads, channels, groups, states, width, bf16, narrow_parameters, threads;
    float low, high, eps;
    const void* projected;  // (B, 2 I + 2 G N + H): z, x, B, C, dt
    const float *conv_weight, *conv_bias, *dt_bias, *A_log, *D, *norm_weight;  // conv_weight (C, W), turned by `prepared`; conv_bias may be null
    void* conv_state;   // (B, W-1, C), advanced in place
    float* ssm_state;   // (B, H, P, N), advanced in place
    void* out;          // (B, I)
};

// silu(conv) of channels c0 .. c0 + count of one sequence; the state loses its oldest input and gains the newest
template <class T>
void convolve_step(const Step& s, const T* x, T* state, int64_t all, int64_t c0, int64_t count, float* y) {
    const int64_t W = s.width;
    for (int64_t i = 0; i < count; i += VL) {
        const int64_t c = c0 + i, left = count - i;
        vf sum = load_to(s.conv_weight + (W - 1) * all + c, left) * load_to(x + c, left);
        if (s.conv_bias) sum += load_to(s.conv_bias + c, left);
        for (int64_t k = 0; k < W - 1; k++) sum += load_to(s.conv_weight + k * all + c, left) * load_to(state + k * all + c, left);
        store_to(y + i, silu<float>(sum), left);
    }
    for (int64_t k = 0; k + 1 < W - 1; k++) memcpy(state + k * all + c0, state + (k + 1) * all + c0, count * sizeof(T));
    if (W > 1) memcpy(state + (W - 2) * all + c0, x + c0, count * sizeof(T));
}

// S = decay S + (step x) outer B and y = S C + D x for one head
inline void head_step(float* S, const float* x, const float* B, const float* C, float step, float decay, float D, int64_t P, int64_t N, float* y) {
    for (int64_t p = 0; p < P; p++) {
        float* row = S + p * N;
        const float in = step * x[p];
        vf dot = splat(0);
        for (int64_t n = 0; n < N; n += VL) {
            vf state = decay * load_to(row + n, N - n) + in * load(B + n);
            store_to(row + n, state, N - n);
            dot += state * load(C + n);
        }
        y[p] = sum(dot) + D * x[p];
    }
}

template <class T>
void step(const Step& s) {
    const int64_t P = s.channels, N = s.states, inner = s.heads * P, bc = s.groups * N, conv = inner + 2 * bc, row = inner + conv + s.heads;
    const int64_t per_group = s.heads / s.groups, size = per_group * P, padded = round_up(N, VL);
    parallel_tasks(s.batch * s.groups, (int)s.threads, [&](int64_t task) {
        const int64_t b = task / s.groups, g = task % s.groups;
        const T *z = (const T*)s.projected + b * row, *x = z + inner, *dt = x + conv;
        T* state = (T*)s.conv_state + b * (s.width - 1) * conv;
        float* xs = scratch(2 * round_up(size, VL) + 2 * padded);
        float *ys = xs + round_up(size, VL), *B = ys + round_up(size, VL), *C = B + padded;
        memset(B, 0, 2 * padded * sizeof(float));
        convolve_step(s, x, state, conv, g * size, size, xs);
        convolve_step(s, x, state, conv, inner + g * N, N, B);
        convolve_step(s, x, state, conv, inner + bc + g * N, N, C);
        for (int64_t h = g * per_group; h < (g + 1) * per_group; h++) {
            float time = softplus(splat(widen(dt[h]) + s.dt_bias[h]))[0];
            time = time < s.low ? s.low : time > s.high ? s.high : time;
            const float decay = std::exp(-std::exp(s.A_log[h]) * time);
            const int64_t at = (h - g * per_group) * P;
            head_step(s.ssm_state + (b * s.heads + h) * P * N, xs + at, B, C, time, decay, s.D[h], P, N, ys + at);
        }
        vf squares = splat(0);
        for (int64_t c = 0; c < size; c += VL) {
            vf v = load_to(ys + c, size - c) * silu<float>(load_to(z + g * size + c, size - c));
            store_to(ys + c, v, size - c);
            squares += v * v;
        }
        const float scale = 1 / std::sqrt(sum(squares) / size + s.eps);
        for (int64_t c = 0; c < size; c += VL)
            store_to((T*)s.out + b * inner + g * size + c, load_to(ys + c, size - c) * scale * load_to(s.norm_weight + g * size + c, size - c), size - c);
    });
}

template <class T>
void widen_turned(const T* from, int64_t columns, int64_t rows, float* to) {  // (columns, rows) to (rows, columns)
    for (int64_t r = 0; r < rows; r++)
        for (int64_t c = 0; c < columns; c++) to[r * columns + c] = widen(from[c * rows + r]);
}

// The step with parameters kept in bfloat16 (bit i of narrow_parameters: the i-th of them) widened, and with the
// convolution's weight turned to (W, C)
Step prepared(const Step& s, std::vector<float>& memory) {
    Step ready = s;
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

// --- linear maps of few rows ---------------------------------------------------------------------------------------------

#if defined(__AVX512BF16__) && defined(__AVX512BW__)
constexpr int WIDE = 32;  // bfloat16 numbers of one register
LANES vf dot_step(vf c, const bf16* a, const bf16* b, int64_t left) {
    const __mmask32 lanes = left >= WIDE ? ~0u : (1u << left) - 1;
    return (vf)_mm512_dpbf16_ps((__m512)c, (__m512bh)_mm512_maskz_loadu_epi16(lanes, a), (__m512bh)_mm512_maskz_loadu_epi16(lanes, b));
}
#else
constexpr int WIDE = VL;
LANES vf dot_step(vf c, const bf16* a, const bf16* b, int64_t left) { return c + load_to(a, left) * load_to(b, left); }
#endif
LANES vf dot_step(vf c, const float* a, const float* b, int64_t left) { return c + load_to(a, left) * load_to(b, left); }

template <class T>
constexpr int LANES_OF = sizeof(T) == 2 ? WIDE : VL;  // numbers that one step of a dot product takes

// y (rows) = w (rows, K) x for one row of x. The rows of w, at most 16, are read strictly in order: the processor's
// prefetcher follows one stream in a page, and several rows at once would be several.
template <class T>
void dot_one(int64_t K, const T* x, const T* w, int64_t rows, const float* bias, T* y) {
    constexpr int step = LANES_OF<T>;
    vf parts[16];
    for (int64_t n = 0; n < 16; n++) {
        parts[n] = splat(0);
        if (n >= rows) continue;
        int64_t k = 0;
        for (; k + step <= K; k += step) parts[n] = dot_step(parts[n], x + k, w + n * K + k, step);
        if (k < K) parts[n] = dot_step(parts[n], x + k, w + n * K + k, K - k);
    }
    float totals[16];
    sums_of_16(parts, totals);
    for (int64_t n = 0; n < rows; n += VL) {
        vf total = load(totals + n);
        if (bias) total += load_to(bias + n, rows - n);
        store_to(y + n, total, rows - n);
    }
}

// rows of x in fours, step by step: (M / 4, K / step, 4, step), zeros where there is no row or number
template <class T>
void pack_fours(int64_t M, int64_t K, const T* x, T* packed) {
    constexpr int step = LANES_OF<T>;
    for (int64_t m = 0; m < M; m += 4)
        for (int64_t k = 0; k < K; k += step)
            for (int64_t r = m; r < m + 4; r++, packed += step) {
                const int64_t left = r < M ? (K - k < step ? K - k : step) : 0;
                memset(packed, 0, step * sizeof(T));
                memcpy(packed, x + r * K + k, left * sizeof(T));
            }
}

// Four rows of packed x times four of w; meanwhile the rows of w that come next are fetched, in order
template <class T>
inline void dot_fours(int64_t M, int64_t K, const T* x, const T* w, const float* bias, T* y, int64_t ldy, const char*& next, int lines) {
    constexpr int step = LANES_OF<T>;
    vf sums[16] = {};
    auto multiply = [&](int64_t k, int64_t left) __attribute__((always_inline)) {
#pragma GCC unroll 4
        for (int n = 0; n < 4; n++)
#pragma GCC unroll 4
            for (int m = 0; m < 4; m++) sums[4 * m + n] = dot_step(sums[4 * m + n], w + n * K + k, x + m * step, left);
    };
    int64_t k = 0;
    for (; k + step <= K; k += step, x += 4 * step) {
        for (int line = 0; line < lines; line++, next += 64) __builtin_prefetch(next);
        multiply(k, step);
    }
    if (k < K) multiply(k, K - k);
    float totals[16];
    sums_of_16(sums, totals);
    for (int i = 0; bias && i < 16; i++) totals[i] += bias[i % 4];
    T rounded[16];
    for (int i = 0; i < 16; i += VL) store(rounded + i, load(totals + i));
    for (int64_t m = 0; m < M; m++) memcpy(y + m * ldy, rounded + 4 * m, 4 * sizeof(T));
}

// y (M, N) = x (M, K) weight (N, K)' + bias
template <class T>
void few_rows(int64_t M, int64_t N, int64_t K, const T* x, const T* weight, const float* bias, T* y, int threads) {
    const int64_t grain = 1 + 32768 / (K * M);  // below this, waking a thread costs more than it saves
    const int64_t fours = (M + 3) / 4, padded = round_up(K, LANES_OF<T>);
    const int lines = (int)((3 + fours) / fours);  // of w for each step, such that the next 16 rows are there in time
    T* packed = nullptr;
    if (M > 2) pack_fours(M, K, x, packed = (T*)scratch(fours * 4 * padded));
    parallel_ranges(N, round_up(grain, 16), threads, [&](int64_t begin, int64_t end) {
        for (int64_t n = begin; n < end; n += 16) {
            const int64_t rows = end - n < 16 ? end - n : 16;
            const char* next = (const char*)(weight + (n + 16) * K);
            for (int64_t r = 0; r < rows; r += 4) {
                if (!packed || rows - r < 4) {
                    const int64_t count = packed ? rows - r : rows;
                    for (int64_t m = 0; m < M; m++)
                        dot_one(K, x + m * K, weight + (n + r) * K, count, bias ? bias + n + r : nullptr, y + m * N + n + r);
                    break;
                }
                for (int64_t m = 0; m < M; m += 4)
                    dot_fours(M - m < 4 ? M - m : 4, K, packed + m * padded, weight + (n + r) * K, bias ? bias + n + r : nullptr,
                              y + m * N + n + r, N, next, lines);
            }
        }
    });
}

}  // namespace

#pragma GCC visibility push(default)
extern "C" {

void halflap_mamba2_step(const Step* s) {
    static thread_local std::vector<float> memory;
    const Step ready = prepared(*s, memory);
    if (s->bf16) step<bf16>(ready);
    else step<float>(ready);
}

void halflap_few_rows(int64_t M, int64_t N, int64_t K, const void* x, const void* weight, const float* bias, void* y, int narrow, int threads) {
    if (narrow) few_rows(M, N, K, (const bf16*)x, (const bf16*)weight, bias, (bf16*)y, threads);
    else few_rows(M, N, K, (const float*)x, (const float*)weight, bias, (float*)y, threads);
}

}
