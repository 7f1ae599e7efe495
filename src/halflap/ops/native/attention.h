// Causal grouped-query attention by blocks (Dao 2023), forward and backward, without a T x T matrix or a mask tensor.
//
// Query i sits at position offset + i and sees keys `start[i]` .. offset + i: documents packed in a row differ in their
// start. With a window it sees, of those, only the last `window` + 1 and the first `meta` of its document. Values may be
// wider or narrower than keys. Blocks of 64 queries meet blocks of 64 keys; blocks that nothing sees are skipped. With
// bfloat16 inputs the products take bfloat16 operands; scores, softmax and sums are float32.
#pragma once
#include "parallel.h"
#include "product.h"
#include "scan.h"

namespace halflap {

constexpr int64_t BLOCK = 64;
constexpr float HIDDEN = -1e30f;

struct Strides {
    int64_t batch, head, time;
};

template <class T>
struct Attention {
    int64_t batch, time, keys, heads, key_heads, size, value_size, offset, window, meta;  // window -1: none
    Strides of_q, of_k, of_v, of_out;
    const T *q, *k, *v;
    const int64_t* start;  // (B, T) or null
    T* out;
    float* lse;  // (B, H, T), log of the softmax's denominator
    float scale;
    int threads;

    int64_t padded() const { return round_up(size, TILE); }
    int64_t value_padded() const { return round_up(value_size, TILE); }
    int64_t blocks() const { return (keys + BLOCK - 1) / BLOCK; }
    int64_t first_seen(int64_t b, int64_t i) const { return start ? start[b * time + i] : 0; }
    const T* at(const T* base, const Strides& s, int64_t b, int64_t h, int64_t t) const { return base + b * s.batch + h * s.head + t * s.time; }

    // whether a query of rows q0 .. q0 + n sees a key of the block at j0 through its window or as meta token
    bool window_meets(int64_t b, int64_t q0, int64_t n, int64_t j0) const {
        if (window < 0) return true;
        for (int64_t i = q0; i < q0 + n; i++) {
            const int64_t last = offset + i, first = first_seen(b, i), oldest = last - window > first ? last - window : first;
            if (j0 <= last && j0 + BLOCK > oldest) return true;
            if (j0 <= last && j0 < first + meta && j0 + BLOCK > first && meta > 0) return true;
        }
        return false;
    }
    // whether every one of them sees all of the block, given that they do without a window
    bool window_covers(int64_t b, int64_t q0, int64_t n, int64_t j0) const {
        return window < 0 || offset + q0 + n - 1 - j0 <= window || j0 + BLOCK <= first_seen(b, q0) + meta;
    }
    // whether any query may see a key of the block, for keys that come before this pass
    bool reached(int64_t j0) const { return window < 0 || j0 + BLOCK > offset - window || (meta > 0 && (start || j0 < meta)); }
};

// The keys that a query sees, counted from the first key of a block: first <= key <= last, and with a window of them
// only those from `oldest` on and those before `meta_end`
struct Seen {
    int32_t first, last, oldest, meta_end;
    bool windowed;

    template <class T>
    Seen(const Attention<T>& a, int64_t b, int64_t i, int64_t j0)
        : first((int32_t)(a.first_seen(b, i) - j0)), last((int32_t)(a.offset + i - j0)), oldest((int32_t)(last - a.window)),
          meta_end((int32_t)(first + a.meta)), windowed(a.window >= 0) {}
    LANES vi of(vi key) const {
        vi seen = (key <= last) & (key >= first);
        return windowed ? seen & ((key >= oldest) | (key < meta_end)) : seen;
    }
};

// All key blocks of one head in three forms: turned for scores (d x keys), rows along keys, and turned values
template <class T, class E>
struct KeyBlocks {
    static constexpr int64_t Be = BLOCK / PACK<E>;
    int64_t padded, each;
    E *turned, *rows;  // (blocks, padded / PACK, BLOCK), (blocks, BLOCK / PACK, padded)

    KeyBlocks(Carver& c, int64_t blocks, int64_t padded, bool want_turned, bool want_rows)
        : padded(padded), each(BLOCK * padded / PACK<E>), turned(want_turned ? c.take<E>(blocks * each) : nullptr),
          rows(want_rows ? c.take<E>(blocks * each) : nullptr) {}
    static int64_t floats(int64_t blocks, int64_t padded, int forms) { return forms * blocks * (BLOCK * padded / PACK<E> + 16) + 64; }

    void fill(const T* from, int64_t stride, int64_t keys, int64_t size, int64_t first, int64_t last, E* temporary) {
        for (int64_t block = first; block < last; block++) {
            const int64_t n = keys - block * BLOCK < BLOCK ? keys - block * BLOCK : BLOCK;
            const T* x = from + block * BLOCK * stride;
            if (rows) pack_rows(x, stride, n, size, BLOCK, rows + block * each, padded);
            if (!turned) continue;
            pack_columns(x, stride, n, size, BLOCK, temporary, padded / PACK<E>);
            transpose(BLOCK, padded / PACK<E>, temporary, padded / PACK<E>, turned + block * each, BLOCK);
        }
    }
};

template <class T>
LANES vf exponential_for(vf x) {
    return sizeof(T) == 2 ? exponential_bf16(x) : exponential(x);
}

// One head's queries q0 .. q0 + n against its keys
template <class T, class E>
void attend_block(const Attention<T>& a, const KeyBlocks<T, E>& K, const KeyBlocks<T, E>& V, int64_t b, int64_t h, int64_t q0, Carver& c) {
    const int64_t D = a.value_padded(), De = a.padded() / PACK<E>, n = a.time - q0 < BLOCK ? a.time - q0 : BLOCK, q = round_up(n, MR);
    E *Q = c.take<E>(BLOCK * De), *P = c.take<E>(BLOCK * BLOCK / PACK<E>);
    float *S = c.take(BLOCK * BLOCK), *O = c.take(BLOCK * D), top[BLOCK], total[BLOCK], keep[BLOCK];
    pack_columns(a.at(a.q, a.of_q, b, h, q0), a.of_q.time, n, a.size, q, Q, De);
    for (int64_t i = 0; i < BLOCK; i++) top[i] = HIDDEN, total[i] = 0;
    memset(O, 0, BLOCK * D * sizeof(float));
    for (int64_t block = a.first_seen(b, q0) / BLOCK; block * BLOCK <= a.offset + q0 + n - 1; block++) {
        const int64_t j0 = block * BLOCK;
        if (!a.window_meets(b, q0, n, j0)) continue;
        product<E, false>(q, BLOCK, De, Q, De, K.turned + block * K.each, BLOCK, S, BLOCK, nullptr);
        const bool whole = j0 + BLOCK - 1 <= a.offset + q0 && j0 >= a.first_seen(b, q0 + n - 1) && a.window_covers(b, q0, n, j0);
        for (int64_t i = 0; i < q; i++) {
            const Seen seen(a, b, q0 + (i < n ? i : n - 1), j0);
            float* s = S + i * BLOCK;
            vf high = splat(HIDDEN);
            for (int64_t j = 0; j < BLOCK; j += VL) {
                vf x = load(s + j) * a.scale;
                vi key = iota() + (int32_t)j;
                if (!whole) x = select(seen.of(key), x, splat(HIDDEN));
                store(s + j, x);
                high = maximum(high, x);
            }
            const float now = std::fmax(top[i], largest(high));
            keep[i] = std::exp(top[i] - now);
            top[i] = now;
            vf sums = splat(0);
            for (int64_t j = 0; j < BLOCK; j += VL) {
                vf x = load(s + j), p = exponential_for<T>(x - now);
                if (!whole) p = select(x > HIDDEN, p, splat(0));  // a row may see none of this block
                sums += p;
                store_columns(P, BLOCK / PACK<E>, i, j, p);
            }
            total[i] = std::fma(total[i], keep[i], sum(sums));
        }
        product<E, false>(q, D, BLOCK / PACK<E>, P, BLOCK / PACK<E>, V.rows + block * V.each, D, O, D, keep);
    }
    for (int64_t i = 0; i < n; i++) {
        T* out = a.out + b * a.of_out.batch + h * a.of_out.head + (q0 + i) * a.of_out.time;
        for (int64_t d = 0; d < a.value_size; d += VL) store_to(out + d, load(O + i * D + d) / total[i], a.value_size - d);
        if (a.lse) a.lse[(b * a.heads + h) * a.time + q0 + i] = top[i] + std::log(total[i]);
    }
}

template <class T, class E>
void attend(const Attention<T>& a) {
    const int64_t D = a.padded(), Dv = a.value_padded(), blocks = a.blocks(), per_key = a.heads / a.key_heads;
    const int64_t query_blocks = (a.time + BLOCK - 1) / BLOCK;
    const int64_t keys = KeyBlocks<T, E>::floats(blocks, D, 1) + KeyBlocks<T, E>::floats(blocks, Dv, 1);
    float* shared = (float*)aligned_alloc(64, round_up(a.batch * a.key_heads * keys * 4, 64));
    auto of = [&](int64_t pair, bool values) {
        Carver c(shared + pair * keys, keys);
        KeyBlocks<T, E> K(c, blocks, D, true, false), V(c, blocks, Dv, false, true);
        return values ? V : K;
    };
    parallel_tasks(a.batch * a.key_heads * blocks, a.threads, [&](int64_t task) {
        const int64_t pair = task / blocks, block = task % blocks, b = pair / a.key_heads, h = pair % a.key_heads;
        if (!a.reached(block * BLOCK)) return;
        E* temporary = (E*)scratch(BLOCK * D);
        of(pair, false).fill(a.at(a.k, a.of_k, b, h, 0), a.of_k.time, a.keys, a.size, block, block + 1, temporary);
        of(pair, true).fill(a.at(a.v, a.of_v, b, h, 0), a.of_v.time, a.keys, a.value_size, block, block + 1, temporary);
    });
    parallel_tasks(a.batch * a.heads * query_blocks, a.threads, [&](int64_t task) {  // the longest rows first
        const int64_t block = query_blocks - 1 - task / (a.batch * a.heads), row = task % (a.batch * a.heads), b = row / a.heads, h = row % a.heads;
        const int64_t pair = b * a.key_heads + h / per_key;
        Carver c(BLOCK * (D + Dv) + 2 * BLOCK * BLOCK + 128);
        attend_block<T, E>(a, of(pair, false), of(pair, true), b, h, block * BLOCK, c);
    });
    free(shared);
}

template <class T>
struct AttentionGradients {
    const T* dout;
    Strides of_dout, of_dq, of_dk, of_dv;
    T *dq, *dk, *dv;
    float* partial;  // (B, H, keys, padded size and padded value size): gradients of keys and values by query head
};

// One query head against its keys: dQ written, dK and dV to `partial`
template <class T, class E>
void attend_backward(const Attention<T>& a, const AttentionGradients<T>& g, int64_t b, int64_t h) {
    const int64_t D = a.padded(), De = D / PACK<E>, Dv = a.value_padded(), Dve = Dv / PACK<E>, blocks = a.blocks(), kh = h / (a.heads / a.key_heads);
    constexpr int64_t Be = BLOCK / PACK<E>;
    const int64_t packed = KeyBlocks<T, E>::floats(blocks + 2, D, 2) + KeyBlocks<T, E>::floats(blocks + 2, Dv, 2);
    Carver c(packed + blocks * BLOCK * (D + 2) + 5 * BLOCK * BLOCK + 2 * BLOCK * (D + Dv) + 1024);
    KeyBlocks<T, E> Qr(c, blocks, D, false, true), dOr(c, blocks, Dv, false, true), K(c, 1, D, true, true), V(c, 1, Dv, true, false);
    E *Qc = c.take<E>(blocks * BLOCK * De), *dOc = c.take<E>(blocks * BLOCK * Dve), *temporary = c.take<E>(BLOCK * (De > Dve ? De : Dve));
    float *dQ = c.take(blocks * BLOCK * D), *lse = c.take(blocks * BLOCK), *dot = c.take(blocks * BLOCK);
    float *S = c.take(BLOCK * BLOCK), *dP = c.take(BLOCK * BLOCK), *lastK = c.take(BLOCK * D), *lastV = c.take(BLOCK * Dv);
    E *Pr = c.take<E>(Be * BLOCK), *dSr = c.take<E>(Be * BLOCK), *dSc = c.take<E>(BLOCK * Be);
    const T *q = a.at(a.q, a.of_q, b, h, 0), *dout = a.at(g.dout, g.of_dout, b, h, 0), *out = a.out + b * a.of_out.batch + h * a.of_out.head;
    Qr.fill(q, a.of_q.time, a.time, a.size, 0, blocks, temporary);
    dOr.fill(dout, g.of_dout.time, a.time, a.value_size, 0, blocks, temporary);
    pack_columns(q, a.of_q.time, a.time, a.size, blocks * BLOCK, Qc, De);
    pack_columns(dout, g.of_dout.time, a.time, a.value_size, blocks * BLOCK, dOc, Dve);
    memset(dQ, 0, blocks * BLOCK * D * sizeof(float));
    for (int64_t i = 0; i < blocks * BLOCK; i++) {
        vf s = splat(0);
        for (int64_t d = 0; i < a.time && d < a.value_size; d += VL)
            s += load_to(dout + i * g.of_dout.time + d, a.value_size - d) * load_to(out + i * a.of_out.time + d, a.value_size - d);
        dot[i] = sum(s);
        lse[i] = i < a.time ? a.lse[(b * a.heads + h) * a.time + i] : 0;
    }
    float ones[BLOCK];
    for (float& one : ones) one = 1;
    for (int64_t block = 0; block < blocks; block++) {
        const int64_t j0 = block * BLOCK, n = a.keys - j0 < BLOCK ? a.keys - j0 : BLOCK;
        K.fill(a.at(a.k, a.of_k, b, kh, j0), a.of_k.time, n, a.size, 0, 1, temporary);
        V.fill(a.at(a.v, a.of_v, b, kh, j0), a.of_v.time, n, a.value_size, 0, 1, temporary);
        float *dK = g.partial + (b * a.heads + h) * a.keys * (D + Dv) + j0 * D, *dV = dK + (a.keys - j0) * D + j0 * Dv;
        float *sumK = n == BLOCK ? dK : lastK, *sumV = n == BLOCK ? dV : lastV;  // the last block may be short
        const float* keep = nullptr;
        for (int64_t other = block; other < blocks; other++) {
            const int64_t q0 = other * BLOCK, rows = a.time - q0 < BLOCK ? a.time - q0 : BLOCK;
            if (j0 + BLOCK <= a.first_seen(b, q0)) break;  // every later query's document starts after this block
            if (!a.window_meets(b, q0, rows, j0)) continue;
            const bool whole = j0 + BLOCK - 1 <= q0 && j0 >= a.first_seen(b, q0 + rows - 1) && rows == BLOCK && a.window_covers(b, q0, rows, j0);
            product<E, false>(BLOCK, BLOCK, De, Qc + q0 * De, De, K.turned, BLOCK, S, BLOCK, nullptr);
            product<E, false>(BLOCK, BLOCK, Dve, dOc + q0 * Dve, Dve, V.turned, BLOCK, dP, BLOCK, nullptr);
            for (int64_t i = 0; i < BLOCK; i += 2)
                for (int64_t j = 0; j < BLOCK; j += VL) {
                    vf p[2], ds[2];
                    for (int r = 0; r < 2; r++) {
                        const int64_t row = q0 + i + r;
                        p[r] = exponential_for<T>(load(S + (i + r) * BLOCK + j) * a.scale - lse[row]);
                        if (!whole) p[r] = row < a.time ? select(Seen(a, b, row, j0).of(iota() + (int32_t)j), p[r], splat(0)) : splat(0);
                        ds[r] = p[r] * (load(dP + (i + r) * BLOCK + j) - dot[row]) * a.scale;
                        store_columns(dSc, Be, i + r, j, ds[r]);
                    }
                    store_rows(Pr, BLOCK, i, j, p[0], p[1]);
                    store_rows(dSr, BLOCK, i, j, ds[0], ds[1]);
                }
            product<E, true>(BLOCK, Dv, Be, Pr, BLOCK, dOr.rows + other * dOr.each, Dv, sumV, Dv, keep);
            product<E, true>(BLOCK, D, Be, dSr, BLOCK, Qr.rows + other * Qr.each, D, sumK, D, keep);
            product<E, false>(BLOCK, D, Be, dSc, Be, K.rows, D, dQ + q0 * D, D, ones);
            keep = ones;
        }
        if (n < BLOCK) memcpy(dK, sumK, n * D * sizeof(float)), memcpy(dV, sumV, n * Dv * sizeof(float));
    }
    for (int64_t i = 0; i < a.time; i++)
        for (int64_t d = 0; d < a.size; d += VL)
            store_to(g.dq + b * g.of_dq.batch + h * g.of_dq.head + i * g.of_dq.time + d, load(dQ + i * D + d), a.size - d);
}

template <class T, class E>
void attention_backward(const Attention<T>& a, const AttentionGradients<T>& g) {
    const int64_t D = a.padded(), Dv = a.value_padded(), per_key = a.heads / a.key_heads;
    parallel_tasks(a.batch * a.heads, a.threads, [&](int64_t task) { attend_backward<T, E>(a, g, task / a.heads, task % a.heads); });
    parallel_tasks(a.batch * a.key_heads, a.threads, [&](int64_t task) {
        const int64_t b = task / a.key_heads, h = task % a.key_heads;
        auto add = [&](int64_t of, int64_t width, int64_t size, const Strides& to, T* sums) {
            for (int64_t t = 0; t < a.keys; t++)
                for (int64_t d = 0; d < size; d += VL) {
                    vf total = splat(0);
                    for (int64_t r = 0; r < per_key; r++)
                        total += load(g.partial + (b * a.heads + h * per_key + r) * a.keys * (D + Dv) + of + t * width + d);
                    store_to(sums + b * to.batch + h * to.head + t * to.time + d, total, size - d);
                }
        };
        add(0, D, a.size, g.of_dk, g.dk);
        add(a.keys * D, Dv, a.value_size, g.of_dv, g.dv);
    });
}

}  // namespace halflap
