// One token of many sequences against the keys and values they keep; bound by reading those.
//
// A task is one key head of one sequence and the query heads that share it, so keys and values are read once. Rotary
// angles are float32, as in models/rope.py.
#pragma once
#include "parallel.h"
#include "vector.h"

namespace halflap {

struct AttentionStep {
    int64_t heads, key_heads, size, value_size, rotary, window, meta;  // rotary: turned channels; window: -1 for none
    float scale;
    const float* speed;  // (rotary / 2) radians a token

    // a position's place among what is kept, and how many places have something once it is written
    int64_t slot(int64_t position) const {
        return window < 0 || position < meta ? position : meta + (position - meta) % (window + 1);
    }
    int64_t kept(int64_t position) const {
        return window < 0 || position < meta + window ? position + 1 : meta + window + 1;
    }
};

inline void rotate(const AttentionStep& a, int64_t position, const float* x, float* to) {
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

// Query heads of one key head, (heads / key_heads, size) at q, at `position`; keys (slots, size) and values (slots,
// value_size) of that head. key and value of this token are written there first, unless null: another block has then.
template <class T>
void attend_step(const AttentionStep& a, int64_t position, const float* q, const float* key, const float* value, T* keys, T* values, float* out) {
    constexpr int64_t BLOCK = 64;
    const int64_t shared = a.heads / a.key_heads, D = round_up(a.size, VL), Dv = round_up(a.value_size, VL);
    Carver carver(shared * (D + Dv + BLOCK + 2) + D + 128 * 6);
    float *Q = carver.take(shared * D), *O = carver.take(shared * Dv), *S = carver.take(shared * BLOCK), *turned = carver.take(D);
    float *top = carver.take(shared), *total = carver.take(shared);
    memset(Q, 0, shared * D * sizeof(float)), memset(O, 0, shared * Dv * sizeof(float));
    for (int64_t h = 0; h < shared; h++) {
        rotate(a, position, q + h * a.size, Q + h * D);
        for (int64_t d = 0; d < a.size; d++) Q[h * D + d] *= a.scale;
        top[h] = -INFINITY, total[h] = 0;
    }
    if (key) {
        rotate(a, position, key, turned);
        put_row(keys + a.slot(position) * a.size, turned, a.size);
        put_row(values + a.slot(position) * a.value_size, value, a.value_size);
    }
    for (int64_t j0 = 0, kept = a.kept(position); j0 < kept; j0 += BLOCK) {
        const int64_t count = kept - j0 < BLOCK ? kept - j0 : BLOCK;
        for (int64_t j = 0; j < count; j += 16)
            for (int64_t h = 0; h < shared; h++) {
                vf parts[16];
                for (int64_t r = 0; r < 16; r++) {
                    parts[r] = splat(0);
                    if (j + r >= count) continue;
                    const T* k = keys + (j0 + j + r) * a.size;
                    for (int64_t d = 0; d < a.size; d += VL) parts[r] += load(Q + h * D + d) * load_to(k + d, a.size - d);
                }
                sums_of_16(parts, S + h * BLOCK + j);
            }
        for (int64_t h = 0; h < shared; h++) {
            float* s = S + h * BLOCK;
            float now = top[h], sum = 0;
            for (int64_t j = 0; j < count; j++) now = s[j] > now ? s[j] : now;
            const float keep = std::exp(top[h] - now);
            for (int64_t j = 0; j < count; j += VL) store(s + j, exponential(load(s + j) - now));
            for (int64_t j = 0; j < count; j++) sum += s[j];
            total[h] = total[h] * keep + sum, top[h] = now;
            for (int64_t d = 0; d < Dv; d += VL) store(O + h * Dv + d, load(O + h * Dv + d) * keep);
        }
        for (int64_t j = 0; j < count; j++) {
            const T* v = values + (j0 + j) * a.value_size;
            for (int64_t d = 0; d < a.value_size; d += VL) {
                const vf x = load_to(v + d, a.value_size - d);
                for (int64_t h = 0; h < shared; h++) store(O + h * Dv + d, load(O + h * Dv + d) + S[h * BLOCK + j] * x);
            }
        }
    }
    for (int64_t h = 0; h < shared; h++)
        for (int64_t d = 0; d < a.value_size; d += VL)
            store_to(out + h * a.value_size + d, load(O + h * Dv + d) / total[h], a.value_size - d);
}

}  // namespace halflap
