// Mamba-1's selective scan (ops/selective_scan.py), forward and backward, with time step, skip and gate in the same pass.
//
// Lanes are channels: each of a vector's channels has its own decay exp(dt A[n]), so a token costs an exponential and a
// few multiply-adds a state, and nothing is summed across lanes but the gradients of B and C. A task is SLICE channels
// of one sequence; it walks chunks of Q tokens, inside a chunk vectors of channels, inside those blocks of NB states,
// whose recurrence stays in registers. Forward keeps the states before each chunk; backward walks the chunks in reverse
// and computes the states of one chunk, vector and block again, in the first two caches. Slices do not depend on the
// threads, so neither does any sum.
#pragma once
#include "parallel.h"
#include "vector.h"

namespace halflap {
namespace selective {

constexpr int64_t Q = 32, NB = 8, SLICE = 64;
constexpr int64_t VECTORS = SLICE / VL;

// A (B, T, channels or states) operand in either storage; channels are neighbours. Mirrored by selective_scan.py.
struct Rows {
    void* data;
    int64_t batch, time, narrow;  // elements from a row or token to the next; whether bfloat16

    LANES vf get(int64_t b, int64_t t, int64_t c, int64_t left) const {
        const int64_t at = b * batch + t * time + c;
        return narrow ? load_to((const bf16*)data + at, left) : load_to((const float*)data + at, left);
    }
    LANES void put(int64_t b, int64_t t, int64_t c, vf x, int64_t left) const {
        const int64_t at = b * batch + t * time + c;
        if (narrow) store_to((bf16*)data + at, x, left);
        else store_to((float*)data + at, x, left);
    }
    LANES void fetch(int64_t b, int64_t t, int64_t c) const {
        __builtin_prefetch((const char*)data + (b * batch + t * time + c) * (narrow ? 2 : 4));
    }
    operator bool() const { return data != nullptr; }
};

struct Scan {
    int64_t batch, time, channels, states, threads;
    Rows u, dt, B, C, gate, y;  // gate may be none
    const float *A, *D, *dt_bias;  // A (I, N) negative; D (I) or null; dt_bias (I), or null where dt is a time step
    const float* initial;          // (B, I, N) or null
    float* final;                  // (B, I, N)
    const int64_t *runs, *lengths;  // (B, T), (B), or null
    float* kept;                   // (B, chunks, vectors of channels, N padded, VL) states before each chunk, or null

    int64_t padded() const { return round_up(states, NB); }
    int64_t chunks() const { return (time + Q - 1) / Q; }
    int64_t slices() const { return (channels + SLICE - 1) / SLICE; }
    int64_t vectors() const { return (channels + VL - 1) / VL; }
    int64_t kept_floats() const { return batch * chunks() * vectors() * padded() * VL; }
    float* kept_state(int64_t b, int64_t chunk, int64_t c) const { return kept + ((b * chunks() + chunk) * vectors() + c / VL) * padded() * VL; }
};

struct Gradients {
    Rows dy, du, ddt, dgate;
    const float* dfinal;                              // (B, I, N) or null
    float *dA, *dB, *dC, *dD, *ddt_bias, *dinitial;   // (B, I, N), (B, T, N), (B, T, N), (B, I), (B, I), (B, I, N) or null
    float* partial;                                   // (slices, B, T, 2 padded N): dB and dC by blocks of states
};

// e^(x rate): the rate comes as `scaled_rate` makes it. 6.8e-8 relative; exactly 1 for x = 0 and 0 below 2^-126
#if defined(__AVX512F__)
constexpr float RATE_SCALE = 1.44269504088896341f;
LANES vf decay(vf x, vf rate) {
    const __m512 rounder = _mm512_set1_ps(12582912.0f);  // 1.5 * 2^23: adding it rounds to a whole number
    __m512 turns = _mm512_fmadd_ps((__m512)x, (__m512)rate, rounder);
    __mmask16 there = _mm512_cmp_ps_mask(turns, _mm512_set1_ps(12582912.0f - 126), _CMP_NLT_UQ);  // a NaN is there
    __m512 whole = _mm512_sub_ps(turns, rounder);
    vf f = (vf)_mm512_fmsub_ps((__m512)x, (__m512)rate, whole);
    vf p = splat(1.3202982e-3f) * f + 9.6749520e-3f;
    p = p * f + 5.5510474e-2f;
    p = p * f + 2.4022166e-1f;
    p = p * f + 6.9314660e-1f;
    p = p * f + 1.0f;
    return (vf)_mm512_maskz_scalef_ps(there, (__m512)p, whole);
}
#else
constexpr float RATE_SCALE = 1.0f;
LANES vf decay(vf x, vf rate) { return exponential(x * rate); }
#endif

// rows of states (channels c.., N apart) to vectors of channels by state, zeros where there is none; and back
inline void load_states(const float* from, int64_t left, int64_t states, int64_t padded, float* to) {
    memset(to, 0, padded * VL * sizeof(float));
    for (int64_t i = 0; i < VL && i < left; i++)
        for (int64_t n = 0; n < states; n++) to[n * VL + i] = from[i * states + n];
}
inline void store_states(const float* from, int64_t left, int64_t states, float* to, float factor = 1) {
    for (int64_t i = 0; i < VL && i < left; i++)
        for (int64_t n = 0; n < states; n++) to[i * states + n] = factor * from[n * VL + i];
}

// Tokens [first, last) of a chunk that run without a document's start between them; `fresh` when they begin one
struct Stretch {
    int64_t first, last;
    bool fresh;
};

// What forward and backward share: one slice of one sequence
struct Task {
    const Scan& a;
    const int64_t b, c0, padded, valid;  // tokens that enter the state
    float *rates, *Bs, *Cs, *dt, *x, *y;
    Stretch stretches[Q];
    int64_t count = 0, t0 = 0, length = 0;

    static int64_t floats(const Scan& a) { return VECTORS * a.padded() * VL + 2 * Q * (a.padded() + VL) + 3 * Q * VL + 128; }

    Task(const Scan& a, int64_t b, int64_t slice, Carver& c)
        : a(a), b(b), c0(slice * SLICE), padded(a.padded()), valid(a.lengths ? a.lengths[b] : a.time), rates(c.take(VECTORS * padded * VL)),
          Bs(c.take(Q * (padded + VL))), Cs(c.take(Q * (padded + VL))), dt(c.take(Q * VL)), x(c.take(Q * VL)), y(c.take(Q * VL)) {
        for (int64_t v = 0; v < vectors(); v++) {
            float* r = rates + v * padded * VL;
            load_states(a.A + (c0 + v * VL) * a.states, left(v), a.states, padded, r);
            for (int64_t i = 0; i < padded * VL; i++) r[i] *= RATE_SCALE;
        }
    }
    int64_t vectors() const { return left(0) < SLICE ? (left(0) + VL - 1) / VL : VECTORS; }
    int64_t left(int64_t v) const { return a.channels - c0 - v * VL; }
    vf bias(int64_t v) const { return a.dt_bias ? load_to(a.dt_bias + c0 + v * VL, left(v)) : splat(0); }
    vf skip(int64_t v) const { return a.D ? load_to(a.D + c0 + v * VL, left(v)) : splat(0); }

    void begin(int64_t chunk) {
        t0 = chunk * Q;
        length = a.time - t0 < Q ? a.time - t0 : Q;
        for (int64_t t = 0; t < length; t++)
            for (int64_t n = 0; n < padded; n += VL) {
                store(Bs + t * padded + n, n < a.states ? a.B.get(b, t0 + t, n, a.states - n) : splat(0));
                store(Cs + t * padded + n, n < a.states ? a.C.get(b, t0 + t, n, a.states - n) : splat(0));
            }
        const int64_t* runs = a.runs ? a.runs + b * a.time + t0 : nullptr;
        count = 0;
        for (int64_t t = 0; t < length; t++) {
            const bool fresh = runs && t0 + t > 0 && t0 + t < valid && runs[t] != runs[t - 1];
            if (t == 0 || fresh) stretches[count++] = {t, t, fresh};
            stretches[count - 1].last = t + 1;
        }
    }
    // the time step of a token that enters the state, 0 of one that does not
    LANES vf step(int64_t t, int64_t v, vf bias) const {
        vf raw = a.dt.get(b, t0 + t, c0 + v * VL, left(v)) + bias;
        return t0 + t < valid ? (a.dt_bias ? softplus(raw) : raw) : splat(0);
    }
};

struct Forward : Task {
    float* states;
    Forward(const Scan& a, int64_t b, int64_t slice, Carver& c) : Task(a, b, slice, c), states(c.take(VECTORS * padded * VL)) {}
    static int64_t floats(const Scan& a) { return Task::floats(a) + VECTORS * a.padded() * VL + 16; }

    void read(int64_t v) {
        const int64_t c = c0 + v * VL;
        const vf shift = bias(v), D = skip(v);
        for (int64_t t = 0; t < length; t++) {
            a.u.fetch(b, t0 + t, c + VL), a.dt.fetch(b, t0 + t, c + VL);
            vf u = a.u.get(b, t0 + t, c, left(v)), d = step(t, v, shift);
            store(dt + t * VL, d), store(x + t * VL, d * u), store(y + t * VL, D * u);
        }
    }
    // NB states of one vector of channels through a stretch
    void advance(const Stretch& s, const float* rate, int64_t n, float* S) {
        vf state[NB];
        for (int j = 0; j < NB; j++) state[j] = s.fresh ? splat(0) : load(S + j * VL);
        for (int64_t t = s.first; t < s.last; t++) {
            const vf d = load(dt + t * VL), in = load(x + t * VL);
            const float *B = Bs + t * padded + n, *C = Cs + t * padded + n;
            vf even = load(y + t * VL), odd = splat(0);
#pragma GCC unroll 8
            for (int j = 0; j < NB; j++) {
                state[j] = state[j] * decay(d, load(rate + j * VL)) + in * B[j];
                (j % 2 ? odd : even) += state[j] * C[j];
            }
            store(y + t * VL, even + odd);
        }
        for (int j = 0; j < NB; j++) store(S + j * VL, state[j]);
    }
    void write(int64_t v) {
        const int64_t c = c0 + v * VL;
        for (int64_t t = 0; t < length; t++) {
            vf out = load(y + t * VL);
            if (a.gate) out *= silu<float>(a.gate.get(b, t0 + t, c, left(v)));
            a.y.put(b, t0 + t, c, out, left(v));
        }
    }
    void run() {
        for (int64_t v = 0; v < vectors(); v++) {
            float* S = states + v * padded * VL;
            if (a.initial) load_states(a.initial + (b * a.channels + c0 + v * VL) * a.states, left(v), a.states, padded, S);
            else memset(S, 0, padded * VL * sizeof(float));
        }
        for (int64_t chunk = 0; chunk < a.chunks(); chunk++) {
            begin(chunk);
            for (int64_t v = 0; v < vectors(); v++) {
                float *S = states + v * padded * VL, *rate = rates + v * padded * VL;
                if (a.kept) memcpy(a.kept_state(b, chunk, c0 + v * VL), S, padded * VL * sizeof(float));
                read(v);
                for (int64_t n = 0; n < padded; n += NB)
                    for (int64_t i = 0; i < count; i++) advance(stretches[i], rate + n * VL, n, S + n * VL);
                write(v);
            }
        }
        for (int64_t v = 0; v < vectors(); v++)
            store_states(states + v * padded * VL, left(v), a.states, a.final + (b * a.channels + c0 + v * VL) * a.states);
    }
};

struct Backward : Task {
    const Gradients& g;
    float *dstates, *dA, *sums;              // by vector of channels; sums (Q, 2 padded): of dB and dC over the slice's channels
    float *decays, *states;                  // (Q, NB, VL) and (Q + 1, NB, VL), the state before the chunk first
    float *u, *dy, *inner, *ddt, *dD, *dbias;  // (Q, VL) and (VECTORS, VL)
    static constexpr int64_t ROW = NB * VL;

    static int64_t floats(const Scan& a) {
        return Task::floats(a) + 2 * VECTORS * a.padded() * VL + 2 * Q * a.padded() + (2 * Q + 1) * ROW + 4 * Q * VL + 2 * VECTORS * VL + 256;
    }
    Backward(const Scan& a, const Gradients& g, int64_t b, int64_t slice, Carver& c)
        : Task(a, b, slice, c), g(g), dstates(c.take(VECTORS * padded * VL)), dA(c.take(VECTORS * padded * VL)), sums(c.take(2 * Q * padded)),
          decays(c.take(Q * ROW)), states(c.take((Q + 1) * ROW)), u(c.take(Q * VL)), dy(c.take(Q * VL)), inner(c.take(Q * VL)),
          ddt(c.take(Q * VL)), dD(c.take(VECTORS * VL)), dbias(c.take(VECTORS * VL)) {}

    void read(int64_t v) {
        const int64_t c = c0 + v * VL;
        const vf shift = bias(v), D = skip(v);
        for (int64_t t = 0; t < length; t++) {
            a.u.fetch(b, t0 + t, c + VL), a.dt.fetch(b, t0 + t, c + VL), g.dy.fetch(b, t0 + t, c + VL);
            vf in = a.u.get(b, t0 + t, c, left(v)), d = step(t, v, shift), up = g.dy.get(b, t0 + t, c, left(v));
            if (a.gate) up *= silu<float>(a.gate.get(b, t0 + t, c, left(v)));
            store(u + t * VL, in), store(dt + t * VL, d), store(x + t * VL, d * in), store(y + t * VL, D * in);
            store(dy + t * VL, up), store(inner + t * VL, splat(0)), store(ddt + t * VL, splat(0));
        }
    }
    // the states and decays of NB states through a stretch, and y where the gate's gradient wants it
    void advance(const Stretch& s, const float* rate, int64_t n) {
        vf state[NB];
        for (int j = 0; j < NB; j++) state[j] = s.fresh ? splat(0) : load(states + s.first * ROW + j * VL);
        for (int64_t t = s.first; t < s.last; t++) {
            const vf d = load(dt + t * VL), in = load(x + t * VL);
            const float *B = Bs + t * padded + n, *C = Cs + t * padded + n;
            vf out = splat(0);
#pragma GCC unroll 8
            for (int j = 0; j < NB; j++) {
                vf left = decay(d, load(rate + j * VL));
                state[j] = state[j] * left + in * B[j];
                out += state[j] * C[j];
                store(decays + t * ROW + j * VL, left);
                store(states + (t + 1) * ROW + j * VL, state[j]);
            }
            if (a.gate) store(y + t * VL, load(y + t * VL) + out);
        }
    }
    // dS_t = dy_t C_t + decay_{t+1} dS_{t+1}, against time, and what hangs on it
    void retreat(const Stretch& s, const float* rate, int64_t n, float* dS, float* dA) {
        vf ds[NB], da[NB];
        for (int j = 0; j < NB; j++) ds[j] = load(dS + j * VL), da[j] = load(dA + j * VL);
        for (int64_t t = s.last - 1; t >= s.first; t--) {
            const vf d = load(dt + t * VL), in = load(x + t * VL), up = load(dy + t * VL);
            const float *B = Bs + t * padded + n, *C = Cs + t * padded + n, *S = states + t * ROW;
            const bool starts = s.fresh && t == s.first;  // nothing came before
            vf into = splat(0), pull = splat(0), lanes[2 * NB];
#pragma GCC unroll 8
            for (int j = 0; j < NB; j++) {
                ds[j] += up * C[j];
                lanes[j] = ds[j] * in;
                lanes[NB + j] = up * load(S + ROW + j * VL);
                into += ds[j] * B[j];
                ds[j] *= starts ? splat(0) : load(decays + t * ROW + j * VL);
                vf of_exponent = starts ? splat(0) : ds[j] * load(S + j * VL);
                pull += of_exponent * load(rate + j * VL);
                da[j] += of_exponent * d;
            }
            store(inner + t * VL, load(inner + t * VL) + into);
            store(ddt + t * VL, load(ddt + t * VL) + pull);
            float totals[2 * NB];
            sums_of_16(lanes, totals);
            float* sum = sums + t * 2 * padded + 2 * n;
            for (int64_t i = 0; i < 2 * NB; i += VL) store(sum + i, load(sum + i) + load(totals + i));
        }
        for (int j = 0; j < NB; j++) store(dS + j * VL, ds[j]), store(dA + j * VL, da[j]);
    }
    void write(int64_t v) {
        const int64_t c = c0 + v * VL;
        const vf shift = bias(v), D = skip(v);
        vf of_D = load(dD + v * VL), of_bias = load(dbias + v * VL);
        for (int64_t t = 0; t < length; t++) {
            const vf in = load(u + t * VL), into = load(inner + t * VL), up = load(dy + t * VL);
            vf step = load(ddt + t * VL) * (1 / RATE_SCALE) + into * in;
            if (t0 + t >= valid) step = splat(0);
            else if (a.dt_bias) step *= sigmoid_float(a.dt.get(b, t0 + t, c, left(v)) + shift);
            g.du.put(b, t0 + t, c, into * load(dt + t * VL) + D * up, left(v));
            g.ddt.put(b, t0 + t, c, step, left(v));
            of_bias += step;
            of_D += up * in;
            if (a.gate) {
                vf z = a.gate.get(b, t0 + t, c, left(v)), s = sigmoid_float(z);
                g.dgate.put(b, t0 + t, c, g.dy.get(b, t0 + t, c, left(v)) * load(y + t * VL) * s * (1.0f + z * (1.0f - s)), left(v));
            }
        }
        store(dD + v * VL, of_D), store(dbias + v * VL, of_bias);
    }
    void block(int64_t chunk, int64_t v, int64_t n) {
        const float* rate = rates + (v * padded + n) * VL;
        memcpy(states, a.kept_state(b, chunk, c0 + v * VL) + n * VL, ROW * sizeof(float));
        for (int64_t i = 0; i < count; i++) advance(stretches[i], rate, n);
        for (int64_t i = count - 1; i >= 0; i--) retreat(stretches[i], rate, n, dstates + (v * padded + n) * VL, dA + (v * padded + n) * VL);
    }
    void run() {
        memset(dA, 0, VECTORS * padded * VL * sizeof(float)), memset(dstates, 0, VECTORS * padded * VL * sizeof(float));
        memset(dD, 0, VECTORS * VL * sizeof(float)), memset(dbias, 0, VECTORS * VL * sizeof(float));
        const int64_t at = b * a.channels + c0, slice = c0 / SLICE;
        for (int64_t v = 0; g.dfinal && v < vectors(); v++)
            load_states(g.dfinal + (at + v * VL) * a.states, left(v), a.states, padded, dstates + v * padded * VL);
        for (int64_t chunk = a.chunks() - 1; chunk >= 0; chunk--) {
            begin(chunk);
            memset(sums, 0, 2 * Q * padded * sizeof(float));
            for (int64_t v = 0; v < vectors(); v++) {
                read(v);
                for (int64_t n = 0; n < padded; n += NB) block(chunk, v, n);
                write(v);
            }
            memcpy(g.partial + ((slice * a.batch + b) * a.time + t0) * 2 * padded, sums, length * 2 * padded * sizeof(float));
        }
        for (int64_t v = 0; v < vectors(); v++) {
            store_states(dA + v * padded * VL, left(v), a.states, g.dA + (at + v * VL) * a.states);
            if (g.dinitial) store_states(dstates + v * padded * VL, left(v), a.states, g.dinitial + (at + v * VL) * a.states);
            store_to(g.dD + at + v * VL, load(dD + v * VL), left(v));
            store_to(g.ddt_bias + at + v * VL, load(dbias + v * VL), left(v));
        }
    }
};

inline void forward(const Scan& a) {
    parallel_tasks(a.batch * a.slices(), (int)a.threads, [&](int64_t task) {
        Carver c(Forward::floats(a));
        Forward(a, task / a.slices(), task % a.slices(), c).run();
    });
}

// dB and dC (B T, N) from the slices' sums, in the order of the slices
inline void add_slices(const Scan& a, const Gradients& g) {
    const int64_t rows = a.batch * a.time, padded = a.padded();
    parallel_ranges(rows, 64, (int)a.threads, [&](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; r++)
            for (int64_t n = 0; n < a.states; n++) {
                float dB = 0, dC = 0;
                const float* from = g.partial + r * 2 * padded + n / NB * 2 * NB + n % NB;
                for (int64_t slice = 0; slice < a.slices(); slice++, from += rows * 2 * padded) dB += from[0], dC += from[NB];
                g.dB[r * a.states + n] = dB, g.dC[r * a.states + n] = dC;
            }
    });
}

inline void backward(const Scan& a, const Gradients& g) {
    parallel_tasks(a.batch * a.slices(), (int)a.threads, [&](int64_t task) {
        Carver c(Backward::floats(a));
        Backward(a, g, task / a.slices(), task % a.slices(), c).run();
    });
    add_slices(a, g);
}

}  // namespace selective
}  // namespace halflap
