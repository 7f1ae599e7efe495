// The C interface of causal attention (attention.h).
#include "attention.h"

using namespace halflap;

namespace {

struct Sizes {  // mirrored by ops/native/attention.py
    int64_t batch, time, keys, heads, key_heads, size, value_size, offset, window, meta, bf16, threads;
    Strides q, k, v, out, dout, dq, dk, dv;
    double scale;
};

struct Pointers {
    const void *q, *k, *v;
    const int64_t* start;
    void* out;
    float* lse;
    const void* dout;
    void *dq, *dk, *dv;
    float* partial;
};

template <class T>
Attention<T> attention(const Sizes& s, const Pointers& p) {
    return {s.batch, s.time, s.keys, s.heads, s.key_heads, s.size, s.value_size, s.offset, s.window, s.meta, s.q, s.k, s.v, s.out, (const T*)p.q, (const T*)p.k,
            (const T*)p.v, p.start, (T*)p.out, p.lse, (float)s.scale, (int)s.threads};
}
template <class T>
AttentionGradients<T> gradients(const Sizes& s, const Pointers& p) {
    return {(const T*)p.dout, s.dout, s.dq, s.dk, s.dv, (T*)p.dq, (T*)p.dk, (T*)p.dv, p.partial};
}
}  // namespace

#pragma GCC visibility push(default)
extern "C" {

void halflap_attention(const Sizes* s, const Pointers* p) {
    if (!s->bf16) attend<float, float>(attention<float>(*s, *p));
    else attend<bf16, Element<bf16>>(attention<bf16>(*s, *p));
}
void halflap_attention_backward(const Sizes* s, const Pointers* p) {
    if (!s->bf16) attention_backward<float, float>(attention<float>(*s, *p), gradients<float>(*s, *p));
    else attention_backward<bf16, Element<bf16>>(attention<bf16>(*s, *p), gradients<bf16>(*s, *p));
}

}
