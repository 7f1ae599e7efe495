// The next tokens of many sequences against the keys and values they keep; bound by reading those.
//
// A task is one key head of one token and the query heads that share it, so keys and values are read once, or where
// there are fewer of those than threads, a part of its positions. What is read next is asked for before it is needed.
// How positions are divided into parts depends on their number alone, so that sums are the same whoever makes them.
// Rotary angles are float32, as in models/rope.py.
#pragma once
#include "parallel.h"
#include "vector.h"
#include <type_traits>

namespace halflap {

constexpr int64_t PART = 256, MOST_PARTS = 32;  // PART: positions for which it is worth going over the sums once more

struct AttentionStep {
    int64_t heads, key_heads, size, value_size, rotary, window, meta;  // rotary: turned channels; window: -1 for none
    float scale;
    const float* speed;  // (rotary / 2) radians a token

    int64_t shared() const { return heads / key_heads; }

    // a position's place among what is kept, and how many places have something once it is written
    int64_t slot(int64_t position) const {
        return window < 0 || position < meta ? position : meta + (position - meta) % (window + 1);
    }
    int64_t kept(int64_t position) const {
        return window < 0 || position < meta + window ? position + 1 : meta + window + 1;
    }

    // into how many parts what is kept is divided, and where each begins
    static int64_t parts(int64_t kept) { return kept < 2 * PART ? 1 : kept < MOST_PARTS * PART ? kept / PART : MOST_PARTS; }
    static int64_t begin(int64_t kept, int64_t part) {
        const int64_t all = parts(kept);
        return part == all ? kept : kept * part / all / 16 * 16;
    }
};

// a function of its own, as one of several copies might round otherwise
__attribute__((noinline)) inline void rotate(const AttentionStep& a, int64_t position, const float* x, float* to) {
    const int64_t half = a.rotary / 2;
    for (int64_t i = 0; i < half; i++) {
        const float angle = (float)position * a.speed[i], c = std::cos(angle), s = std::sin(angle);
        to[i] = x[i] * c - x[i + half] * s;
        to[i + half] = x[i + half] * c + x[i] * s;
    }
    memcpy(to + a.rotary, x + a.rotary, (a.size - a.rotary) * sizeof(float));
}

template <class T>
void put_row(T* to, const float* from, int64_t count) {
    for (int64_t i = 0; i < count; i += VL) store_to(to + i, load_to(from + i, count - i), count - i);
}

constexpr int64_t BLOCK = 64;  // positions whose scores are held at once
constexpr int AHEAD = 8;       // positions whose keys are asked for before they are read; of values it is all 16

// near: into the first cache
LANES void fetch(const void* from, int64_t bytes, bool near) {
    for (int64_t i = 0; i < bytes; i += 64)
        if (near) __builtin_prefetch((const char*)from + i, 0, 3);
        else __builtin_prefetch((const char*)from + i, 0, 2);
}

// Scores S (H, BLOCK) of 16 positions' keys, of which `count` are there, for H queries, `stride` floats apart. Unless
// null, `values` of the same positions will be wanted.
template <int H, class T>
__attribute__((noinline)) void scores_of_16(const float* queries, int64_t stride, const T* keys, int64_t size, int64_t count, const T* values, int64_t value_size, float* S) {
    constexpr int ROWS = H == 1 ? 4 : 2;
    vf parts[H][16];
#pragma GCC unroll 1
    for (int r = 0; r < 16; r += ROWS) {
        if (values) {
            fetch(keys + (r + AHEAD) * size, ROWS * size * sizeof(T), true);
            if (r < count) fetch(values + r * value_size, ROWS * value_size * sizeof(T), false);
        }
        const T* k[ROWS];
        vf sums[H][ROWS];
#pragma GCC unroll 4
        for (int i = 0; i < ROWS; i++) {
            k[i] = keys + (r + i < count ? r + i : count - 1) * size;
#pragma GCC unroll 4
            for (int h = 0; h < H; h++) sums[h][i] = splat(0);
        }
        auto multiply = [&](int64_t d, int64_t left) __attribute__((always_inline)) {
            vf x[ROWS];
#pragma GCC unroll 4
            for (int i = 0; i < ROWS; i++) x[i] = load_to(k[i] + d, left);
#pragma GCC unroll 4
            for (int h = 0; h < H; h++) {
                const vf q = load(queries + h * stride + d);
#pragma GCC unroll 4
                for (int i = 0; i < ROWS; i++) sums[h][i] += q * x[i];
            }
        };
        int64_t d = 0;
#pragma GCC unroll 2
        for (; d + VL <= size; d += VL) multiply(d, VL);
        if (d < size) multiply(d, size - d);
#pragma GCC unroll 4
        for (int h = 0; h < H; h++)
#pragma GCC unroll 4
            for (int i = 0; i < ROWS; i++) parts[h][r + i] = sums[h][i];
    }
    for (int h = 0; h < H; h++) sums_of_16(parts[h], S + h * BLOCK);
}

// C vectors of H sums O (H, stride) = keep O + S (H, BLOCK) values; of the last vector only `left` numbers are there
template <int H, int C, class T>
__attribute__((noinline)) void add_columns(const T* values, int64_t row, int64_t count, int64_t left, const float* S, const float* keep, float* O, int64_t stride) {
    vf sums[H][C];
#pragma GCC unroll 4
    for (int h = 0; h < H; h++)
#pragma GCC unroll 8
        for (int c = 0; c < C; c++) sums[h][c] = load(O + h * stride + c * VL) * keep[h];
    auto add = [&](int64_t j, int64_t there) __attribute__((always_inline)) {
        vf x[C];
#pragma GCC unroll 8
        for (int c = 0; c < C; c++) x[c] = load_to(values + j * row + c * VL, there);
#pragma GCC unroll 4
        for (int h = 0; h < H; h++) {
            const vf s = splat(S[h * BLOCK + j]);
#pragma GCC unroll 8
            for (int c = 0; c < C; c++) sums[h][c] += s * x[c];
        }
    };
    if (left >= VL)
        for (int64_t j = 0; j < count; j++) add(j, VL);
    else
        for (int64_t j = 0; j < count; j++) add(j, left);
#pragma GCC unroll 4
    for (int h = 0; h < H; h++)
#pragma GCC unroll 8
        for (int c = 0; c < C; c++) store(O + h * stride + c * VL, sums[h][c]);
}

template <int H, class T>
void add_values(const T* values, int64_t size, int64_t count, const float* S, const float* keep, float* O, int64_t stride) {
    constexpr int C = 8 / H;
    int64_t d = 0;
    for (; d + C * VL <= size; d += C * VL) add_columns<H, C>(values + d, size, count, VL, S, keep, O + d, stride);
    for (; d < size; d += VL) add_columns<H, 1>(values + d, size, count, size - d, S, keep, O + d, stride);
}

// Scores s (BLOCK) of `count` positions become weights, zero behind; `top` and `total` as in Attended. Returns what
// sums so far are to be multiplied by.
inline float weigh(float* s, int64_t count, float& top, float& total) {
    for (int64_t j = count; j < BLOCK; j++) s[j] = -INFINITY;
    vf most = load(s), sums = splat(0);
    for (int64_t j = VL; j < BLOCK; j += VL) most = maximum(most, load(s + j));
    const float now = std::fmax(top, largest(most)), keep = std::exp(top - now);
    for (int64_t j = 0; j < BLOCK; j += VL) {
        const vf w = exponential(load(s + j) - now);
        store(s + j, w), sums += w;
    }
    total = total * keep + sum(sums), top = now;
    return keep;
}

// act(h, H): heads h .. h + H of `shared`, as many at once as there are
template <class Act>
LANES void by_heads(int64_t shared, const Act& act) {
    int64_t h = 0;
    for (; h + 4 <= shared; h += 4) act(h, std::integral_constant<int, 4>());
    for (; h + 2 <= shared; h += 2) act(h, std::integral_constant<int, 2>());
    if (h < shared) act(h, std::integral_constant<int, 1>());
}

// What some of the positions give the query heads of one key head: sums O (shared, Dv) of values times weights, the
// weights' total, and the largest score, which is taken from all scores before they become weights.
struct Attended {
    int64_t shared, Dv;
    float *O, *top, *total;

    static int64_t floats(const AttentionStep& a) { return a.shared() * (round_up(a.value_size, VL) + 2) + 3 * 16; }
    Attended(const AttentionStep& a, float* memory) : shared(a.shared()), Dv(round_up(a.value_size, VL)) {
        Carver carver(memory, floats(a));
        O = carver.take(shared * Dv), top = carver.take(shared), total = carver.take(shared);
    }

    void clear() {
        memset(O, 0, shared * Dv * sizeof(float));
        for (int64_t h = 0; h < shared; h++) top[h] = -INFINITY, total[h] = 0;
    }
    void add(const Attended& other) {
        for (int64_t h = 0; h < shared; h++) {
            if (other.total[h] == 0) continue;
            const float now = std::fmax(top[h], other.top[h]), own = std::exp(top[h] - now), theirs = std::exp(other.top[h] - now);
            for (int64_t d = 0; d < Dv; d += VL) store(O + h * Dv + d, load(O + h * Dv + d) * own + load(other.O + h * Dv + d) * theirs);
            total[h] = total[h] * own + other.total[h] * theirs, top[h] = now;
        }
    }
    void put(const AttentionStep& a, float* out) const {
        for (int64_t h = 0; h < shared; h++)
            for (int64_t d = 0; d < a.value_size; d += VL)
                store_to(out + h * a.value_size + d, load(O + h * Dv + d) / total[h], a.value_size - d);
    }
};

// Queries Q (shared, D) against places begin .. end; S (shared, BLOCK) and keep (shared) are room for it
template <class T>
__attribute__((noinline)) void attend_part(const AttentionStep& a, int64_t begin, int64_t end, const float* Q, int64_t D, float* S, float* keep, const T* keys, const T* values, Attended to) {
    const int64_t shared = to.shared;
    to.clear();
    for (int64_t j0 = begin; j0 < end; j0 += BLOCK) {
        const int64_t count = end - j0 < BLOCK ? end - j0 : BLOCK;
        const T *k = keys + j0 * a.size, *v = values + j0 * a.value_size;
        for (int64_t j = 0; j < count; j += 16) {
            const int64_t here = count - j < 16 ? count - j : 16;
            by_heads(shared, [&](int64_t h, auto heads) {
                const T* wanted = h == 0 ? v + j * a.value_size : nullptr;
                scores_of_16<decltype(heads)::value>(Q + h * D, D, k + j * a.size, a.size, here, wanted, a.value_size, S + h * BLOCK + j);
            });
        }
        for (int64_t h = 0; h < shared; h++) keep[h] = weigh(S + h * BLOCK, count, to.top[h], to.total[h]);
        by_heads(shared, [&](int64_t h, auto heads) {
            add_values<decltype(heads)::value>(v, a.value_size, count, S + h * BLOCK, keep + h, to.O + h * to.Dv, to.Dv);
        });
    }
}

// The key and value of one key head to a place of keys (slots, size) and values (slots, value_size)
template <class T>
void keep_step(const AttentionStep& a, int64_t position, const float* key, const float* value, T* keys, T* values) {
    Carver carver(round_up(a.size, 16));
    float* turned = carver.take(a.size);
    rotate(a, position, key, turned);
    put_row(keys, turned, a.size);
    put_row(values, value, a.value_size);
}

// Query heads of one key head, (shared, size) at q, of the token at `position`, against parts first .. last of what is
// kept in keys (slots, size) and values (slots, value_size) of that head; to(part) is where what one gives goes, and
// then(part) is called when it is there.
template <class T, class To, class Then>
void attend_step(const AttentionStep& a, int64_t position, int64_t first, int64_t last, const float* q, const T* keys, const T* values, const To& to, const Then& then) {
    const int64_t shared = a.shared(), D = round_up(a.size, VL), kept = a.kept(position);
    Carver carver(shared * (D + BLOCK + 1) + 16 * 3);
    float *Q = carver.take(shared * D), *S = carver.take(shared * BLOCK), *keep = carver.take(shared);
    memset(Q, 0, shared * D * sizeof(float));
    for (int64_t h = 0; h < shared; h++) {
        rotate(a, position, q + h * a.size, Q + h * D);
        for (int64_t d = 0; d < a.size; d++) Q[h * D + d] *= a.scale;
    }
    for (int64_t part = first; part < last; part++) {
        attend_part(a, a.begin(kept, part), a.begin(kept, part + 1), Q, D, S, keep, keys, values, to(part));
        then(part);
    }
}

}  // namespace halflap
