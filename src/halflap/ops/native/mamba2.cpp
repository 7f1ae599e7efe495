// Mamba-2's inner part, from the input projection's output to the output projection's input, as four passes over the
// tokens: time steps, convolution with SiLU, scan, gated norm. Forward keeps y; backward computes the rest again.
#include "convolution.h"
#include "norms.h"
#include "scan.h"
#include "scan_backward.h"

using namespace halflap;

namespace {

struct Sizes {  // mirrored by ops/native/mamba2.py
    int64_t batch, time, heads, channels, groups, states, width, bf16, threads;
    float low, high, eps;  // limits of the time step; of the norm
};

struct Inputs {
    const void* projected;  // (B, T, 2 I + 2 G N + H): z, x, B, C, dt
    const float *conv_weight, *conv_bias, *dt_bias, *A, *D, *norm_weight;  // conv_weight (W, C); A negative
    const void* conv_state;   // (B, W-1, C) or null
    const float* ssm_state;   // (B, H, P, N) or null
    const int64_t *runs, *lengths;
    const int32_t* reach;
};

struct Work {
    float* dt;          // (B, T, H)
    void *mixed, *y;    // rows of C and I, `row_stride` apart
    float* states;      // as many floats as halflap_kept_states says, kept for the gradient, or null
};

struct Gradients {
    const void* dout;
    const float* dfinal;
    void *dprojected, *dmixed, *dy;
    float *ddt, *dconv_weight, *dconv_bias, *ddt_bias, *dA, *dD, *dnorm_weight, *dinitial;  // dA and dD (B, H)
    float *bc_partial, *gain_partial;
    int64_t gain_parts;
};

template <class T>
struct Mixer {
    const Sizes& s;
    const Inputs& in;
    const Work& w;
    const int64_t inner = s.heads * s.channels, bc = s.groups * s.states, conv = inner + 2 * bc, row = inner + conv + s.heads;
    const int64_t y_stride = row_stride<T>(inner), mixed_stride = row_stride<T>(conv);
    const T* projected = (const T*)in.projected;
    const int threads = (int)s.threads;

    bool valid(int64_t r) const { return !in.lengths || r % s.time < in.lengths[r / s.time]; }
    Convolution<T> convolution() const {
        return {s.batch, s.time, conv, row, mixed_stride, projected + inner, in.conv_weight, in.conv_bias, (const T*)in.conv_state, in.reach, threads};
    }
    Scan<T> scan_of(float* final) const {
        const T* m = (const T*)w.mixed;
        return {s.batch, s.time, s.heads, s.groups, s.channels, s.states, mixed_stride, y_stride, m, m + inner, m + inner + bc,
                w.dt, in.A, in.D, in.runs, in.ssm_state, final, (T*)w.y, w.states, threads};
    }
    GatedNorm<T> norm() const { return {s.batch * s.time, inner, s.groups, y_stride, row, (const T*)w.y, projected, in.norm_weight, s.eps, threads}; }

    void time_steps() const {
        parallel_ranges(s.batch * s.time, 64, threads, [&](int64_t begin, int64_t end) {
            for (int64_t r = begin; r < end; r++)
                for (int64_t h = 0; h < s.heads; h += VL) {
                    vf step = softplus(load_to(projected + r * row + inner + conv + h, s.heads - h) + load_to(in.dt_bias + h, s.heads - h));
                    step = minimum(maximum(step, splat(s.low)), splat(s.high));
                    store_to(w.dt + r * s.heads + h, valid(r) ? step : splat(0), s.heads - h);
                }
        });
    }
    void time_steps_backward(const Gradients& g) const {
        T* d = (T*)g.dprojected;
        rows_with_gain(s.batch * s.time, s.heads, threads, g.ddt_bias, g.gain_partial, g.gain_parts, [&](int64_t r, float* sums) {
            for (int64_t h = 0; h < s.heads; h += VL) {
                const int64_t left = s.heads - h;
                vf raw = load_to(projected + r * row + inner + conv + h, left) + load_to(in.dt_bias + h, left), step = softplus(raw);
                vf up = load_to(g.ddt + r * s.heads + h, left) * sigmoid_float(raw);
                up = select((step >= s.low) & (step <= s.high), valid(r) ? up : splat(0), splat(0));
                store_to(sums + h, load_to(sums + h, left) + up, left);
                store_to(d + r * row + inner + conv + h, up, left);
            }
        });
    }
    void mix_tokens() const {
        time_steps();
        auto c = convolution();
        if (s.width == 2) convolution_silu<T, 2>(c, (T*)w.mixed);
        else if (s.width == 3) convolution_silu<T, 3>(c, (T*)w.mixed);
        else convolution_silu<T, 4>(c, (T*)w.mixed);
    }
    void forward(void* out, float* final) const {
        mix_tokens();
        scan(scan_of(final));
        gated_norm(norm(), (T*)out);
    }
    void backward(const Gradients& g) const {
        T *d = (T*)g.dprojected, *dm = (T*)g.dmixed;
        mix_tokens();
        gated_norm_backward(norm(), (const T*)g.dout, (T*)g.dy, d, row, g.dnorm_weight, g.gain_partial, g.gain_parts);
        scan_backward(scan_of(nullptr), ScanGradients<T>{(const T*)g.dy, g.dfinal, dm, dm + inner, dm + inner + bc, mixed_stride,
                                                         g.bc_partial, g.ddt, g.dA, g.dD, g.dinitial});
        auto c = convolution();
        const int64_t parts = head_slices(s.batch, s.groups, s.heads / s.groups, threads) - 1;
        const ConvolutionGradients<T> dc{dm, g.bc_partial, parts, 2 * bc, d + inner, row, g.dconv_weight, g.dconv_bias};
        if (s.width == 2) convolution_silu_backward<T, 2>(c, dc);
        else if (s.width == 3) convolution_silu_backward<T, 3>(c, dc);
        else convolution_silu_backward<T, 4>(c, dc);
        time_steps_backward(g);
    }
};

}  // namespace

#pragma GCC visibility push(default)
extern "C" {

int halflap_head_slices(const Sizes* s) { return (int)head_slices(s->batch, s->groups, s->heads / s->groups, s->threads); }

int64_t halflap_kept_states(const Sizes* s) {
    const int64_t pack = s->bf16 ? PACK<Element<bf16>> : 1, chunks = (s->time + Q - 1) / Q;
    return s->batch * s->heads * chunks * (round_up(s->states, TILE) / pack * round_up(s->channels, TILE));
}

void halflap_mamba2(const Sizes* s, const Inputs* in, const Work* w, void* out, float* final) {
    if (s->bf16) Mixer<bf16>{*s, *in, *w}.forward(out, final);
    else Mixer<float>{*s, *in, *w}.forward(out, final);
}
void halflap_mamba2_backward(const Sizes* s, const Inputs* in, const Work* w, const Gradients* g) {
    if (s->bf16) Mixer<bf16>{*s, *in, *w}.backward(*g);
    else Mixer<float>{*s, *in, *w}.backward(*g);
}

}
