// The chunked state-space scan of ops/ssd.py on one processor core per task; everything of a chunk stays in its cache.
//
// A task is a slice of one group's heads in one sequence; it walks the chunks in order. Nothing of size Q x Q leaves
// the chunk. States are kept turned, (N, P), and in float32; so are decays and all sums. With bfloat16 inputs the
// products take bfloat16 operands (E = pair), the practice of the published GPU kernels.
// Legend: Q chunk, N state size, P head channels, H heads, G groups; `lower` q is a chunk's length padded to TILE.
#pragma once
#include "parallel.h"
#include "product.h"
#include <type_traits>

namespace halflap {

constexpr int64_t Q = 64;

template <class T>
struct Scan {
    int64_t batch, time, heads, groups, P, N, stride, y_stride;  // elements between tokens of x, B, C, and of y
    const T *x, *B, *C;
    const float *dt, *A, *D;       // dt (B, T, H) after softplus; A, D (H)
    const int64_t* runs;           // (B, T) or null
    const float* initial;          // (B, H, P, N) or null
    float* final;                  // (B, H, P, N) or null
    T* y;                          // rows of H P, y_stride apart
    float* states;                 // states before each chunk as operands of products, for the gradient; or null
    int threads;
};

template <class T>
using Element = std::conditional_t<sizeof(T) == 2 && HAVE_PAIRS, pair, float>;  // of products of numbers stored as T

// floats of a kept state, and the place of head h's state before a chunk
template <class T>
int64_t kept_size(const Scan<T>& a) {
    return round_up(a.N, TILE) / PACK<Element<T>> * round_up(a.P, TILE);
}
template <class T>
Element<T>* kept_state(const Scan<T>& a, int64_t b, int64_t h, int64_t chunk) {
    const int64_t chunks = (a.time + Q - 1) / Q;
    return (Element<T>*)a.states + ((b * a.heads + h) * chunks + chunk) * kept_size(a);
}

// Slices of a group's heads such that all threads find equal work
inline int64_t head_slices(int64_t batch, int64_t groups, int64_t per_group, int64_t threads) {
    int64_t tasks = batch * groups;
    for (int64_t slices = 1; slices < per_group; slices++)
        if (tasks * slices % threads == 0 || tasks * slices >= 4 * threads) return slices;
    return per_group;
}

// Sums of log decay from the chunk's start, in two floats each: the difference of two sums is as exact as a sum of the
// terms between them.
struct Decays {
    float high[Q], low[Q];
    float from_start[Q], to_end[Q], dt[Q];
    float through;
    double total[Q];
};

// which earlier tokens of a chunk (and whether the carried state) belong to token i's document
struct Borders {
    int32_t first[Q];  // the first token of i's run inside the chunk
    bool any;
    bool from_before[Q], to_end[Q];
    bool through;
};

inline Borders find_borders(const int64_t* runs, int64_t t0, int64_t length, int64_t q) {
    Borders r;
    r.any = runs != nullptr;
    r.through = true;
    for (int64_t i = 0; i < length; i++) {
        r.first[i] = !runs || i == 0 || runs[t0 + i] == runs[t0 + i - 1] ? (i == 0 ? 0 : r.first[i - 1]) : (int32_t)i;
        r.from_before[i] = !runs || runs[t0 + i] == runs[t0 > 0 ? t0 - 1 : 0];
        r.to_end[i] = !runs || runs[t0 + i] == runs[t0 + length - 1];
    }
    r.through = r.from_before[length - 1];
    for (int64_t i = length; i < q; i++) r.first[i] = (int32_t)i;
    return r;
}

// decays of head h over tokens t0.. of sequence b; padding tokens (length <= i < q) have dt 0 and decay nothing
template <class T>
void find_decays(const Scan<T>& a, int64_t b, int64_t h, int64_t t0, int64_t length, int64_t q, const Borders& borders, Decays& d) {
    double total = 0;
    for (int64_t i = 0; i < q; i++) {
        d.dt[i] = i < length ? a.dt[(b * a.time + t0 + i) * a.heads + h] : 0;
        total += (double)(d.dt[i] * a.A[h]);
        d.total[i] = total;
        d.high[i] = (float)total;
        d.low[i] = (float)(total - d.high[i]);
    }
    for (int64_t i = 0; i < q; i += VL) {
        vf start = load(d.high + i) + load(d.low + i);
        store(d.from_start + i, exponential(start));
        vf end = ((float)total - load(d.high + i)) + ((float)(total - (float)total) - load(d.low + i));
        store(d.to_end + i, exponential(end));
    }
    d.through = borders.through ? d.from_start[q - 1] : 0;
    for (int64_t i = 0; i < q; i++) {
        if (i >= length || !borders.from_before[i]) d.from_start[i] = 0;
        if (i >= length || !borders.to_end[i]) d.to_end[i] = 0;
    }
}

// decay from token j..j+VL to token i, zero where j comes after i or in another document
LANES vf decay_between(const Decays& d, const Borders& borders, int64_t i, int64_t j) {
    vf span = (d.high[i] - load(d.high + j)) + (d.low[i] - load(d.low + j));
    vi column = iota() + (int32_t)j;
    vi seen = column <= (int32_t)i;
    if (borders.any) seen = seen & (column >= borders.first[i]);
    return select(seen, exponential(span), splat(0));
}

// token rows (length x width, stride apart) to a padded matrix whose columns run along K; rows and columns padded by 0
template <class T, class E>
void pack_columns(const T* from, int64_t stride, int64_t length, int64_t width, int64_t q, E* to, int64_t ld) {
    for (int64_t i = 0; i < q; i++) {
        if constexpr (sizeof(T) * PACK<E> == sizeof(E)) {  // the same numbers: copied
            char* row = (char*)(to + i * ld);
            int64_t bytes = i < length ? width * sizeof(T) : 0;
            memcpy(row, from + i * stride, bytes);
            memset(row + bytes, 0, ld * sizeof(E) - bytes);
        } else {
            for (int64_t k = 0; k < ld * PACK<E>; k += VL)
                store_columns(to, ld, i, k, i < length && k < width ? load_to(from + i * stride + k, width - k) : splat(0));
        }
    }
}
// the same to a matrix whose rows run along K
template <class T, class E>
void pack_rows(const T* from, int64_t stride, int64_t length, int64_t width, int64_t q, E* to, int64_t ld) {
    for (int64_t i = 0; i < q; i += 2) {
        const T *first = from + i * stride, *second = first + stride;
        int64_t n = 0;
        if (i + 1 < length)
            for (; n + VL <= width; n += VL) copy_rows(to, ld, i, n, first + n, second + n);
        for (; n < ld; n += VL)
            store_rows(to, ld, i, n, i < length && n < width ? load_to(first + n, width - n) : splat(0),
                       i + 1 < length && n < width ? load_to(second + n, width - n) : splat(0));
    }
}
// rows scaled by scale[i], rows along K
template <class T, class E>
void pack_scaled_rows(const T* from, int64_t stride, int64_t length, int64_t width, int64_t q, const float* scale, E* to, int64_t ld) {
    for (int64_t i = 0; i < q; i += 2) {
        const T *first = from + i * stride, *second = first + stride;
        int64_t n = 0;
        if (i + 1 < length)
            for (; n + VL <= width; n += VL) store_rows(to, ld, i, n, load(first + n) * scale[i], load(second + n) * scale[i + 1]);
        for (; n < ld; n += VL)
            store_rows(to, ld, i, n, i < length && n < width ? load_to(first + n, width - n) * scale[i] : splat(0),
                       i + 1 < length && n < width ? load_to(second + n, width - n) * scale[i + 1] : splat(0));
    }
}
template <class T, class E>
void pack_scaled_columns(const T* from, int64_t stride, int64_t length, int64_t width, int64_t q, const float* scale, E* to, int64_t ld) {
    for (int64_t i = 0; i < q; i++) {
        int64_t k = 0;
        if (i < length)
            for (; k + VL <= width; k += VL) store_columns(to, ld, i, k, load(from + i * stride + k) * scale[i]);
        for (; k < ld * PACK<E>; k += VL)
            store_columns(to, ld, i, k, i < length && k < width ? load_to(from + i * stride + k, width - k) * scale[i] : splat(0));
    }
}
// a float matrix (rows along K) to the same in elements E
template <class E>
void pack_float_rows(const float* from, int64_t rows, int64_t columns, int64_t ldf, E* to, int64_t ld) {
    for (int64_t k = 0; k < rows; k += 2)
        for (int64_t n = 0; n < columns; n += VL) store_rows(to, ld, k, n, load(from + k * ldf + n), load(from + (k + 1) * ldf + n));
}

// C = keep C + A B where row m of A reaches only to column m: the lower triangle of A (q, q), columns along K
template <class E>
void lower_product(int64_t q, int64_t N, const E* A, int64_t lda, const E* B, int64_t ldb, float* C, int64_t ldc, const float* keep) {
    for (int64_t m = 0; m < q; m += MR)
        product<E, false>(MR, N, (m + MR) / PACK<E>, A + m * lda, lda, B, ldb, C + m * ldc, ldc, keep ? keep + m : nullptr);
}
// C = A B where only C's lower triangle is wanted
template <class E>
void lower_of_product(int64_t q, int64_t K, const E* A, int64_t lda, const E* B, int64_t ldb, float* C, int64_t ldc) {
    for (int64_t m = 0; m < q; m += MR) product<E, false>(MR, round_up(m + MR, TILE), K, A + m * lda, lda, B, ldb, C + m * ldc, ldc, nullptr);
}


inline void load_state(const float* from, int64_t P, int64_t N, float* to, int64_t ld) {  // (P, N) to (N, P)
    for (int64_t p = 0; p < P; p++)
        for (int64_t n = 0; n < N; n++) to[n * ld + p] = from[p * N + n];
}
inline void store_state(const float* from, int64_t ld, int64_t P, int64_t N, float* to) {
    for (int64_t p = 0; p < P; p++)
        for (int64_t n = 0; n < N; n++) to[p * N + n] = from[n * ld + p];
}

// M = decays * S, lower triangle; columns run along K
template <class E>
void decayed_scores(const Decays& d, const Borders& borders, int64_t q, const float* S, E* M, int64_t ld) {
    for (int64_t i = 0; i < q; i++)  // the last tile of a row is read to its end
        for (int64_t j = 0; j < round_up(i + 1, MR); j += VL) store_columns(M, ld, i, j, decay_between(d, borders, i, j) * load(S + i * Q + j));
}

template <class T, class E = Element<T>>
void scan_task(const Scan<T>& a, int64_t b, int64_t g, int64_t h0, int64_t h1) {
    const int64_t Np = round_up(a.N, TILE), Pp = round_up(a.P, TILE), Ne = Np / PACK<E>, Qe = Q / PACK<E>;
    Carver carve((h1 - h0 + 1) * Np * Pp + 4 * Q * Np + 2 * Q * Q + 2 * Q * Pp + Np + 256);
    float* states = carve.take((h1 - h0) * Np * Pp);
    E* H = carve.take<E>(Ne * Pp);
    E* Cc = carve.take<E>(Q * Ne);
    E* Bc = carve.take<E>(Q * Ne);
    E* Bt = carve.take<E>(Ne * Q);
    E* Br = carve.take<E>(Qe * Np);
    float* S = carve.take(Q * Q);
    E* M = carve.take<E>(Q * Qe);
    E* X = carve.take<E>(Qe * Pp);
    float* Y = carve.take(Q * Pp);
    float* keep = carve.take(Np);
    Decays d;
    bool started = a.initial != nullptr;
    memset(states, 0, (h1 - h0) * Np * Pp * sizeof(float));
    for (int64_t h = h0; started && h < h1; h++)
        load_state(a.initial + (b * a.heads + h) * a.P * a.N, a.P, a.N, states + (h - h0) * Np * Pp, Pp);
    for (int64_t t0 = 0; t0 < a.time; t0 += Q) {
        const int64_t length = a.time - t0 < Q ? a.time - t0 : Q, q = round_up(length, TILE), row = b * a.time + t0;
        const Borders borders = find_borders(a.runs ? a.runs + b * a.time : nullptr, t0, length, q);
        pack_columns(a.C + row * a.stride + g * a.N, a.stride, length, a.N, q, Cc, Ne);
        pack_columns(a.B + row * a.stride + g * a.N, a.stride, length, a.N, q, Bc, Ne);
        pack_rows(a.B + row * a.stride + g * a.N, a.stride, length, a.N, q, Br, Np);
        transpose(q, Ne, Bc, Ne, Bt, Q);
        lower_of_product(q, Ne, Cc, Ne, Bt, Q, S, Q);
        for (int64_t h = h0; h < h1; h++) {
            float* state = states + (h - h0) * Np * Pp;
            const T* x = a.x + row * a.stride + h * a.P;
            T* y = a.y + row * a.y_stride + h * a.P;
            find_decays(a, b, h, t0, length, q, borders, d);
            if (started) {
                E* before = a.states ? kept_state(a, b, h, t0 / Q) : H;
                pack_float_rows(state, Np, Pp, Pp, before, Pp);
                product<E, false>(q, Pp, Ne, Cc, Ne, before, Pp, Y, Pp, nullptr);
            }
            decayed_scores(d, borders, q, S, M, Qe);
            pack_scaled_rows(x, a.stride, length, a.P, q, d.dt, X, Pp);
            lower_product(q, Pp, M, Qe, X, Pp, Y, Pp, started ? d.from_start : nullptr);
            for (int64_t i = 0; i < length; i++)
                for (int64_t p = 0; p < a.P; p += VL)
                    store_to(y + i * a.y_stride + p, load(Y + i * Pp + p) + a.D[h] * load_to(x + i * a.stride + p, a.P - p), a.P - p);
            if (t0 + Q >= a.time && !a.final) continue;
            for (int64_t i = 0; i < q; i++) d.dt[i] *= d.to_end[i];
            pack_scaled_rows(x, a.stride, length, a.P, q, d.dt, X, Pp);
            for (int64_t n = 0; n < Np; n++) keep[n] = d.through;
            product<E, true>(Np, Pp, q / PACK<E>, Br, Np, X, Pp, state, Pp, started ? keep : nullptr);
        }
        started = true;
    }
    for (int64_t h = h0; a.final && h < h1; h++)
        store_state(states + (h - h0) * Np * Pp, Pp, a.P, a.N, a.final + (b * a.heads + h) * a.P * a.N);
}

template <class T>
void scan(const Scan<T>& a) {
    const int64_t per_group = a.heads / a.groups, slices = head_slices(a.batch, a.groups, per_group, a.threads);
    parallel_tasks(a.batch * a.groups * slices, a.threads, [&](int64_t task) {
        int64_t b = task / (a.groups * slices), g = task / slices % a.groups, s = task % slices;
        int64_t h0 = g * per_group + per_group * s / slices, h1 = g * per_group + per_group * (s + 1) / slices;
        scan_task(a, b, g, h0, h1);
    });
}

}  // namespace halflap
