// The gradient of scan.h. Between passes the inputs and the states before each chunk are kept; the rest is computed
// again. The chunks are walked in reverse, carrying dH, the gradient of the state.
// With L the decays between tokens, M = L * S, X = dt x, f and e the decays from the start and to the end of a chunk:
//     dX = M' dY + e B dH            dS = L * (dY X') summed over heads
//     dC = dS B + f dY H'            dB = dS' C + e X dH'            dH <- through dH + C' (f dY)
// A decay's gradient is taken pair by pair (row and column sums of S * L * dY X'), never as a difference of outputs,
// so that what must cancel does cancel.
#pragma once
#include "scan.h"

namespace halflap {

template <class T>
struct ScanGradients {
    const T* dy;           // rows of H P, as far apart as y's
    const float* dfinal;   // (B, H, P, N) or null
    T *dx, *dB, *dC;       // rows dstride apart
    int64_t dstride;
    float* partial;        // (slices - 1, B, T, 2 G N): dB and dC of the slices after the first
    float* ddt;            // (B, T, H)
    float *dA, *dD;        // (B, H) each
    float* dinitial;       // (B, H, P, N) or null
};

template <class T, class E = Element<T>>
struct BackwardTask {
    const Scan<T>& a;
    const ScanGradients<T>& out;
    const int64_t b, g, h0, h1, slice;
    const int64_t Np, Pp, Ne, Pe, heads, chunks;
    static constexpr int64_t Qe = Q / PACK<E>;
    float* dstates;                              // dH (heads, Np, Pp)
    E *Cc, *Bc, *Bt, *Br, *Cr;                   // C and B of the chunk, columns or rows along K, and B turned
    E *Xc, *Xt, *eX, *dYc, *dYr, *fYc, *fYr, *M, *Hr, *Ht, *Hc;
    float *S, *dS, *dM, *dX, *U, *dCs, *dBs, *keep;
    E *dSc, *dSr;

    static int64_t floats(int64_t Np, int64_t Pp, int64_t heads) {
        return (heads + 3) * Np * Pp + 8 * Q * Np + 8 * Q * Pp + 6 * Q * Q + Np + 2048;
    }

    BackwardTask(const Scan<T>& a, const ScanGradients<T>& out, int64_t b, int64_t g, int64_t h0, int64_t h1, int64_t slice)
        : a(a), out(out), b(b), g(g), h0(h0), h1(h1), slice(slice), Np(round_up(a.N, TILE)), Pp(round_up(a.P, TILE)),
          Ne(Np / PACK<E>), Pe(Pp / PACK<E>), heads(h1 - h0), chunks((a.time + Q - 1) / Q) {
        Carver c(floats(Np, Pp, heads));
        dstates = c.take(heads * Np * Pp);
        Cc = c.take<E>(Q * Ne), Bc = c.take<E>(Q * Ne), Bt = c.take<E>(Ne * Q), Br = c.take<E>(Qe * Np), Cr = c.take<E>(Qe * Np);
        Xc = c.take<E>(Q * Pe), Xt = c.take<E>(Pe * Q), eX = c.take<E>(Q * Pe), dYc = c.take<E>(Q * Pe), dYr = c.take<E>(Qe * Pp);
        fYc = c.take<E>(Q * Pe), fYr = c.take<E>(Qe * Pp), M = c.take<E>(Qe * Q);
        Hr = c.take<E>(Ne * Pp), Hc = c.take<E>(Np * Pe), Ht = c.take<E>(Pe * Np);
        S = c.take(Q * Q), dS = c.take(Q * Q), dM = c.take(Q * Q), dSc = c.take<E>(Q * Qe), dSr = c.take<E>(Qe * Q);
        dX = c.take(Q * Pp), U = c.take(Q * Np), dCs = c.take(Q * Np), dBs = c.take(Q * Np), keep = c.take(Np + Q);
    }

    int64_t length(int64_t chunk) const { return a.time - chunk * Q < Q ? a.time - chunk * Q : Q; }
    bool started(int64_t chunk) const { return chunk > 0 || a.initial; }
    const T* x(int64_t h, int64_t chunk) const { return a.x + (b * a.time + chunk * Q) * a.stride + h * a.P; }
    float* dstate(int64_t h) const { return dstates + (h - h0) * Np * Pp; }
    Borders borders(int64_t chunk) const {
        return find_borders(a.runs ? a.runs + b * a.time : nullptr, chunk * Q, length(chunk), round_up(length(chunk), TILE));
    }

    // M = L * S with rows along K, dS += L * dM, and the decays' gradient: dcs[i] += row sums, dcs[j] -= column sums
    void scores_backward(const Decays& d, const Borders& border, int64_t q, double* dcs) {
        for (int64_t i = 0; i < q; i += 2) {
            vd rows[2] = {};
            for (int64_t j = 0; j < round_up(i + 2, MR); j += VL) {
                vf m[2];
                vd columns = load(dcs + j);
                for (int r = 0; r < 2; r++) {
                    vf L = decay_between(d, border, i + r, j), s = load(S + (i + r) * Q + j);
                    vf up = L * load(dM + (i + r) * Q + j);
                    vf pairs = select(iota() + (int32_t)j < (int32_t)(i + r), up * s, splat(0));  // a token's own has no decay
                    store(dS + (i + r) * Q + j, load(dS + (i + r) * Q + j) + up);
                    m[r] = L * s;
                    rows[r] += __builtin_convertvector(pairs, vd);
                    columns -= __builtin_convertvector(pairs, vd);
                }
                store_rows(M, Q, i, j, m[0], m[1]);
                store(dcs + j, columns);
            }
            dcs[i] += sum(rows[0]);
            dcs[i + 1] += sum(rows[1]);
        }
    }

    void head(int64_t h, int64_t chunk, const Borders& border, bool carried, double& dA, double& dD) {
        const int64_t n = length(chunk), q = round_up(n, TILE), row = b * a.time + chunk * Q, width = a.y_stride;
        const T *xs = x(h, chunk), *dy = out.dy + row * width + h * a.P;
        Decays d;
        find_decays(a, b, h, chunk * Q, n, q, border, d);
        double dcs[Q + VL] = {}, at_end = 0;
        float end[Q];
        for (int64_t i = 0; i < q; i++) end[i] = d.dt[i] * d.to_end[i];
        pack_scaled_columns(xs, a.stride, n, a.P, q, d.dt, Xc, Pe);
        transpose(q, Pe, Xc, Pe, Xt, Q);
        pack_columns(dy, width, n, a.P, q, dYc, Pe);
        pack_rows(dy, width, n, a.P, q, dYr, Pp);
        lower_of_product(q, Pe, dYc, Pe, Xt, Q, dM, Q);
        scores_backward(d, border, q, dcs);
        if (carried) {  // the state after this chunk matters
            pack_scaled_columns(xs, a.stride, n, a.P, q, end, eX, Pe);
            pack_float_rows(dstate(h), Np, Pp, Pp, Hr, Pp);
            product<E, false>(q, Pp, Ne, Bc, Ne, Hr, Pp, dX, Pp, nullptr);
            for (int64_t i = 0; i + 1 < n; i++) {  // the last token is the end: no decay between
                vf dot = splat(0);
                for (int64_t p = 0; p < a.P; p += VL) dot += load_to(xs + i * a.stride + p, a.P - p) * load(dX + i * Pp + p);
                const float pull = sum(dot) * end[i];
                dcs[i] -= pull;
                at_end += pull;
            }
            turn_state(dstate(h));
            product<E, false>(q, Np, Pe, eX, Pe, Ht, Np, dBs, Np, ones());
        }
        for (int64_t m = 0; m < q; m += MR)  // only tokens from m on look at tokens m..m+MR
            product<E, true>(MR, Pp, (q - m) / PACK<E>, M + m / PACK<E> * Q + m, Q, dYr + m / PACK<E> * Pp, Pp, dX + m * Pp, Pp, carried ? d.to_end + m : nullptr);
        const bool past = started(chunk);
        if (past || out.dinitial) {
            pack_scaled_rows(dy, width, n, a.P, q, d.from_start, fYr, Pp);
            if (past) from_the_past(h, chunk, d, q, n, dy, width, dcs);
            if (past && carried) {
                at_end += d.through * inner_product(kept_state(a, b, h, chunk), dstate(h));
            }
            for (int64_t k = 0; k < Np; k++) keep[k] = d.through;
            product<E, true>(Np, Pp, q / PACK<E>, Cr, Np, fYr, Pp, dstate(h), Pp, carried ? keep : nullptr);
        }
        dcs[n - 1] += at_end;
        double later = 0;
        for (int64_t i = n - 1; i >= 0; i--) {
            later += dcs[i];
            vf dot = splat(0), skip = splat(0);
            for (int64_t p = 0; p < a.P; p += VL) {
                vf u = load_to(xs + i * a.stride + p, a.P - p), up = load_to(dy + i * width + p, a.P - p), dx = load(dX + i * Pp + p);
                dot += u * dx;
                skip += u * up;
                store_to(out.dx + (row + i) * out.dstride + h * a.P + p, d.dt[i] * dx + a.D[h] * up, a.P - p);
            }
            out.ddt[(row + i) * a.heads + h] = sum(dot) + a.A[h] * (float)later;
            dA += d.dt[i] * later;
            dD += sum(skip);
        }
    }

    const float* ones() {
        for (int64_t k = 0; k < Np || k < Q; k++) keep[k] = 1;
        return keep;
    }
    // Ht (P, N), rows along K, from a float state (N, P)
    void turn_state(const float* H) {
        for (int64_t k = 0; k < Np; k++)
            for (int64_t p = 0; p < Pp; p += VL) store_columns(Hc, Pe, k, p, load(H + k * Pp + p));
        transpose(Np, Pe, Hc, Pe, Ht, Np);
    }
    // the same from a kept state, whose rows run along K
    void turn_kept(const E* H) {
        if constexpr (PACK<E> == 1) memcpy(Hc, H, Np * Pp * sizeof(E));  // from far away: in order first, then turned
        else
            for (int64_t k = 0; k < Np; k += 2)
                for (int64_t p = 0; p < Pp; p += VL) split_rows(H + k / 2 * Pp + p, (bf16*)(Hc + k * Pe) + p, (bf16*)(Hc + (k + 1) * Pe) + p);
        transpose(Np, Pe, Hc, Pe, Ht, Np);
    }
    // sum of the products of a kept state and a float one
    float inner_product(const E* H, const float* dH) const {
        vf first = splat(0), second = splat(0);
        for (int64_t k = 0; k < Np; k += 2)
            for (int64_t p = 0; p < Pp; p += VL) {
                vf rows[2];
                load_rows(H, Pp, k, p, rows);
                first += rows[0] * load(dH + k * Pp + p);
                second += rows[1] * load(dH + (k + 1) * Pp + p);
            }
        return sum(first + second);
    }
    // dC += f dY H', and the gradient of f
    void from_the_past(int64_t h, int64_t chunk, const Decays& d, int64_t q, int64_t n, const T* dy, int64_t width, double* dcs) {
        pack_scaled_columns(dy, width, n, a.P, q, d.from_start, fYc, Pe);
        turn_kept(kept_state(a, b, h, chunk));
        product<E, false>(q, Np, Pe, fYc, Pe, Ht, Np, U, Np, nullptr);
        const T* C = a.C + (b * a.time + chunk * Q) * a.stride + g * a.N;
        for (int64_t i = 0; i < n; i++) {
            vf dot = splat(0);
            for (int64_t k = 0; k < a.N; k += VL) {
                vf u = load(U + i * Np + k);
                dot += u * load_to(C + i * a.stride + k, a.N - k);
                store(dCs + i * Np + k, load(dCs + i * Np + k) + u);
            }
            dcs[i] += sum(dot);
        }
    }

    void write(const float* from, int64_t n, T* to, float* part, int64_t row) {  // one group's dB or dC
        for (int64_t i = 0; i < n; i++)
            for (int64_t k = 0; k < a.N; k += VL) {
                if (slice == 0) store_to(to + (row + i) * out.dstride + g * a.N + k, load(from + i * Np + k), a.N - k);
                else store_to(part + ((slice - 1) * a.batch * a.time + row + i) * 2 * a.groups * a.N + g * a.N + k, load(from + i * Np + k), a.N - k);
            }
    }

    void run() {
        bool carried = out.dfinal != nullptr;
        memset(dstates, 0, heads * Np * Pp * sizeof(float));
        for (int64_t h = h0; carried && h < h1; h++)
            load_state(out.dfinal + (b * a.heads + h) * a.P * a.N, a.P, a.N, dstate(h), Pp);
        double dA[heads], dD[heads];
        for (int64_t h = 0; h < heads; h++) dA[h] = dD[h] = 0;
        for (int64_t chunk = chunks - 1; chunk >= 0; chunk--) {
            const int64_t n = length(chunk), q = round_up(n, TILE), row = b * a.time + chunk * Q;
            const T *B = a.B + row * a.stride + g * a.N, *C = a.C + row * a.stride + g * a.N;
            const Borders border = borders(chunk);
            pack_columns(C, a.stride, n, a.N, q, Cc, Ne), pack_columns(B, a.stride, n, a.N, q, Bc, Ne);
            pack_rows(C, a.stride, n, a.N, q, Cr, Np), pack_rows(B, a.stride, n, a.N, q, Br, Np);
            transpose(q, Ne, Bc, Ne, Bt, Q);
            lower_of_product(q, Ne, Cc, Ne, Bt, Q, S, Q);
            memset(dS, 0, Q * Q * sizeof(float)), memset(dCs, 0, Q * Np * sizeof(float)), memset(dBs, 0, Q * Np * sizeof(float));
            for (int64_t h = h0; h < h1; h++) head(h, chunk, border, carried, dA[h - h0], dD[h - h0]);
            carried = true;
            for (int64_t i = 0; i < q; i += 2)
                for (int64_t j = 0; j < q; j += VL) {
                    vf first = load(dS + i * Q + j), second = load(dS + (i + 1) * Q + j);
                    store_rows(dSr, Q, i, j, first, second);
                    store_columns(dSc, Qe, i, j, first), store_columns(dSc, Qe, i + 1, j, second);
                }
            lower_product(q, Np, dSc, Qe, Br, Np, dCs, Np, ones());
            for (int64_t m = 0; m < q; m += MR)
                product<E, true>(MR, Np, (q - m) / PACK<E>, dSr + m / PACK<E> * Q + m, Q, Cr + m / PACK<E> * Np, Np, dBs + m * Np, Np, ones());
            write(dBs, n, out.dB, out.partial, row);
            write(dCs, n, out.dC, out.partial + (out.partial ? a.groups * a.N : 0), row);
        }
        for (int64_t h = h0; h < h1; h++) out.dA[b * a.heads + h] = (float)dA[h - h0], out.dD[b * a.heads + h] = (float)dD[h - h0];
        for (int64_t h = h0; out.dinitial && h < h1; h++)
            store_state(dstate(h), Pp, a.P, a.N, out.dinitial + (b * a.heads + h) * a.P * a.N);
    }
};

template <class T>
void scan_backward(const Scan<T>& a, const ScanGradients<T>& out) {
    const int64_t per_group = a.heads / a.groups, slices = head_slices(a.batch, a.groups, per_group, a.threads);
    parallel_tasks(a.batch * a.groups * slices, a.threads, [&](int64_t task) {
        int64_t b = task / (a.groups * slices), g = task / slices % a.groups, s = task % slices;
        int64_t h0 = g * per_group + per_group * s / slices, h1 = g * per_group + per_group * (s + 1) / slices;
        BackwardTask<T>(a, out, b, g, h0, h1, s).run();
    });
}

}  // namespace halflap
