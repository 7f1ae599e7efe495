// The C interface of the depthwise causal convolution with SiLU (convolution.h).
#include "convolution.h"

using namespace halflap;

namespace {

struct Sizes {  // mirrored by ops/native/convolution.py
    int64_t batch, time, channels, width, stride, bf16, threads;
};

struct Pointers {
    const void* x;
    const float *weight, *bias;  // (W, C), (C) or null
    const void* state;
    const int32_t* reach;
    void* y;
    const void* dy;
    void* dx;
    float *dweight, *dbias;
};

template <class T, int W>
void run(const Sizes& s, const Pointers& p) {
    const Convolution<T> c{s.batch, s.time, s.channels, s.stride, s.channels, (const T*)p.x, p.weight, p.bias, (const T*)p.state, p.reach, (int)s.threads};
    if (!p.dy) return convolution_silu<T, W>(c, (T*)p.y);
    convolution_silu_backward<T, W>(c, ConvolutionGradients<T>{(const T*)p.dy, nullptr, 0, 0, (T*)p.dx, s.channels, p.dweight, p.dbias});
}
template <class T>
void run(const Sizes& s, const Pointers& p) {
    if (s.width == 2) run<T, 2>(s, p);
    else if (s.width == 3) run<T, 3>(s, p);
    else run<T, 4>(s, p);
}

}  // namespace

#pragma GCC visibility push(default)
extern "C" {

// forward without dy, backward with it
void halflap_conv_silu(const Sizes* s, const Pointers* p) {
    if (s->bf16) run<bf16>(*s, *p);
    else run<float>(*s, *p);
}

}
