// RMSNorm with an optional residual sum, Mamba-2's gated group norm, and the MLP activations, forward and backward.
// One read and one write a value; sums in float32. A row is a token.
#pragma once
#include "parallel.h"
#include "vector.h"

namespace halflap {

// gradient rows of a gain are summed per task and then added up in the order of the tasks, so a run repeats bit for bit
template <class Body>
void rows_with_gain(int64_t rows, int64_t width, int threads, float* dweight, float* partial, int64_t parts, const Body& body) {
    parallel_tasks(parts, threads, [&](int64_t part) {
        float* sums = partial + part * width;
        memset(sums, 0, width * sizeof(float));
        for (int64_t r = rows * part / parts; r < rows * (part + 1) / parts; r++) body(r, sums);
    });
    for (int64_t c = 0; c < width; c++) {
        float total = 0;
        for (int64_t part = 0; part < parts; part++) total += partial[part * width + c];
        dweight[c] = total;
    }
}

// --- gated group norm: out = w * v / sqrt(mean_group(v^2) + eps), v = y * silu(z) -----------------------------------

template <class T>
struct GatedNorm {
    int64_t rows, width, groups, y_stride, z_stride;  // of y and its gradient, of z; out (rows, width)
    const T *y, *z;
    const float* weight;
    float eps;
    int threads;
};

template <class T>
void gated_norm(const GatedNorm<T>& a, T* out) {
    const int64_t size = a.width / a.groups;
    parallel_ranges(a.rows, 8, a.threads, [&](int64_t begin, int64_t end) {
        float* v = scratch(round_up(size, VL));
        for (int64_t r = begin; r < end; r++)
            for (int64_t g = 0; g < a.groups; g++) {
                const T *y = a.y + r * a.y_stride + g * size, *z = a.z + r * a.z_stride + g * size;
                vf squares = splat(0);
                for (int64_t c = 0; c < size; c += VL) {
                    vf u = load_to(y + c, size - c) * silu<T>(load_to(z + c, size - c));
                    store(v + c, u);
                    squares += u * u;
                }
                float scale = 1 / std::sqrt(sum(squares) / size + a.eps);
                for (int64_t c = 0; c < size; c += VL)
                    store_to(out + r * a.width + g * size + c, load(v + c) * scale * load_to(a.weight + g * size + c, size - c), size - c);
            }
    });
}

template <class T>
void gated_norm_backward(const GatedNorm<T>& a, const T* grad, T* dy, T* dz, int64_t dz_stride, float* dweight, float* partial, int64_t parts) {
    const int64_t size = a.width / a.groups;
    rows_with_gain(a.rows, a.width, a.threads, dweight, partial, parts, [&](int64_t r, float* sums) {
        float* v = scratch(round_up(size, VL));
        for (int64_t g = 0; g < a.groups; g++) {
            const int64_t at = g * size;
            const T *y = a.y + r * a.y_stride + at, *z = a.z + r * a.z_stride + at, *d = grad + r * a.width + at;
            vf squares = splat(0), inner = splat(0);
            for (int64_t c = 0; c < size; c += VL) {
                vf u = load_to(y + c, size - c) * silu<T>(load_to(z + c, size - c));
                store(v + c, u);
                squares += u * u;
                inner += u * load_to(d + c, size - c) * load_to(a.weight + at + c, size - c);
            }
            float scale = 1 / std::sqrt(sum(squares) / size + a.eps);
            float pull = sum(inner) * scale * scale / size;  // mean(n dn) / rms, n = v / rms
            for (int64_t c = 0; c < size; c += VL) {
                const int64_t left = size - c;
                vf u = load(v + c), up = load_to(d + c, left), zs = load_to(z + c, left), s = sigmoid<T>(zs);
                vf du = scale * (up * load_to(a.weight + at + c, left) - u * pull);
                store_to(sums + at + c, load_to(sums + at + c, left) + up * u * scale, left);
                store_to(dy + r * a.y_stride + at + c, du * zs * s, left);
                store_to(dz + r * dz_stride + at + c, du * load_to(y + c, left) * s * (1.0f + zs * (1.0f - s)), left);
            }
        }
    });
}

// --- RMSNorm: out = w * x / sqrt(mean(x^2) + eps) --------------------------------------------------------------------

// scales (rows) keeps 1/rms for the backward pass; may be null
template <class T, class O>
void rms_norm(int64_t rows, int64_t width, const T* x, const float* weight, float eps, O* out, float* scales, int threads) {
    parallel_ranges(rows, 8, threads, [&](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; r++) {
            const T* in = x + r * width;
            vf squares = splat(0), more = splat(0);
            int64_t c = 0;
            for (; c + 2 * VL <= width; c += 2 * VL) {
                vf u = load(in + c), w = load(in + c + VL);
                squares += u * u;
                more += w * w;
            }
            for (; c < width; c += VL) {
                vf u = load_to(in + c, width - c);
                squares += u * u;
            }
            float scale = 1 / std::sqrt(sum(squares + more) / width + eps);
            if (scales) scales[r] = scale;
            for (c = 0; c < width; c += VL) store_to(out + r * width + c, load_to(in + c, width - c) * scale * load_to(weight + c, width - c), width - c);
        }
    });
}

// dx = residual (or 0) + gradient through the norm
template <class T, class O>
void rms_norm_backward(int64_t rows, int64_t width, const T* x, const float* weight, const float* scales, const O* grad,
                       const T* residual, T* dx, float* dweight, float* partial, int64_t parts, int threads) {
    rows_with_gain(rows, width, threads, dweight, partial, parts, [&](int64_t r, float* sums) {
        const T* in = x + r * width;
        const O* up = grad + r * width;
        const float scale = scales[r];
        vf inner = splat(0);
        for (int64_t c = 0; c < width; c += VL) inner += load_to(in + c, width - c) * load_to(up + c, width - c) * load_to(weight + c, width - c);
        const float pull = sum(inner) * scale * scale / width;
        for (int64_t c = 0; c < width; c += VL) {
            const int64_t left = width - c;
            vf u = load_to(in + c, left), d = load_to(up + c, left);
            store_to(sums + c, load_to(sums + c, left) + d * u * scale, left);
            vf dv = scale * (d * load_to(weight + c, left) - u * pull);
            if (residual) dv += load_to(residual + r * width + c, left);
            store_to(dx + r * width + c, dv, left);
        }
    });
}

// --- activations -------------------------------------------------------------------------------------------------------

// y = max(x, 0)^2; the gradient needs only y: dx = 2 sqrt(y) dy. out may be x, and dx may be dy.
template <class T>
void relu2(int64_t n, const T* x, T* y, int threads) {
    parallel_ranges(n / VL + 1, 512, threads, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin * VL; i < end * VL && i < n; i += VL) {
            vf u = load_to(x + i, n - i);
            u = select(u < 0.0f, splat(0), u);  // a NaN stays one
            store_to(y + i, u * u, n - i);
        }
    });
}
inline vf square_root(vf x) {
#if defined(__AVX512F__)
    return (vf)_mm512_sqrt_ps((__m512)x);
#else
    vf r;
    for (int i = 0; i < VL; i++) r[i] = std::sqrt(x[i]);
    return r;
#endif
}
template <class T>
void relu2_backward(int64_t n, const T* y, const T* dy, T* dx, int threads) {
    parallel_ranges(n / VL + 1, 512, threads, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin * VL; i < end * VL && i < n; i += VL)
            store_to(dx + i, 2.0f * square_root(load_to(y + i, n - i)) * load_to(dy + i, n - i), n - i);
    });
}

// y = silu(g) * u
template <class T>
void swiglu(int64_t n, const T* g, const T* u, T* y, int threads) {
    parallel_ranges(n / VL + 1, 512, threads, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin * VL; i < end * VL && i < n; i += VL)
            store_to(y + i, silu<T>(load_to(g + i, n - i)) * load_to(u + i, n - i), n - i);
    });
}
template <class T>
void swiglu_backward(int64_t n, const T* g, const T* u, const T* dy, T* dg, T* du, int threads) {
    parallel_ranges(n / VL + 1, 512, threads, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin * VL; i < end * VL && i < n; i += VL) {
            vf x = load_to(g + i, n - i), d = load_to(dy + i, n - i), s = sigmoid<T>(x);
            store_to(du + i, d * x * s, n - i);
            store_to(dg + i, d * load_to(u + i, n - i) * s * (1.0f + x * (1.0f - s)), n - i);
        }
    });
}

}  // namespace halflap
