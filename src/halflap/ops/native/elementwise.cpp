// The C interface of RMSNorm and the MLP activations (norms.h). `types` says which operands are bfloat16, bit by bit.
#include "norms.h"

using namespace halflap;

#pragma GCC visibility push(default)
extern "C" {

// types: 1 the input x, 2 the output
void halflap_rms_norm(int64_t rows, int64_t width, const void* x, const float* weight, double eps, void* out, float* scales, int types, int threads) {
    const float e = (float)eps;
    switch (types) {
        case 0: return rms_norm(rows, width, (const float*)x, weight, e, (float*)out, scales, threads);
        case 1: return rms_norm(rows, width, (const bf16*)x, weight, e, (float*)out, scales, threads);
        case 2: return rms_norm(rows, width, (const float*)x, weight, e, (bf16*)out, scales, threads);
        default: return rms_norm(rows, width, (const bf16*)x, weight, e, (bf16*)out, scales, threads);
    }
}

// types: 1 x, dx and residual, 2 grad; residual may be null
void halflap_rms_norm_backward(int64_t rows, int64_t width, const void* x, const float* weight, const float* scales, const void* grad,
                               const void* residual, void* dx, float* dweight, float* partial, int64_t parts, int types, int threads) {
    switch (types) {
        case 0: return rms_norm_backward(rows, width, (const float*)x, weight, scales, (const float*)grad, (const float*)residual, (float*)dx, dweight, partial, parts, threads);
        case 1: return rms_norm_backward(rows, width, (const bf16*)x, weight, scales, (const float*)grad, (const bf16*)residual, (bf16*)dx, dweight, partial, parts, threads);
        case 2: return rms_norm_backward(rows, width, (const float*)x, weight, scales, (const bf16*)grad, (const float*)residual, (float*)dx, dweight, partial, parts, threads);
        default: return rms_norm_backward(rows, width, (const bf16*)x, weight, scales, (const bf16*)grad, (const bf16*)residual, (bf16*)dx, dweight, partial, parts, threads);
    }
}

void halflap_relu2(int64_t n, const void* x, void* y, int narrow, int threads) {
    if (narrow) relu2(n, (const bf16*)x, (bf16*)y, threads);
    else relu2(n, (const float*)x, (float*)y, threads);
}
void halflap_relu2_backward(int64_t n, const void* y, const void* dy, void* dx, int narrow, int threads) {
    if (narrow) relu2_backward(n, (const bf16*)y, (const bf16*)dy, (bf16*)dx, threads);
    else relu2_backward(n, (const float*)y, (const float*)dy, (float*)dx, threads);
}
void halflap_swiglu(int64_t n, const void* g, const void* u, void* y, int narrow, int threads) {
    if (narrow) swiglu(n, (const bf16*)g, (const bf16*)u, (bf16*)y, threads);
    else swiglu(n, (const float*)g, (const float*)u, (float*)y, threads);
}
void halflap_swiglu_backward(int64_t n, const void* g, const void* u, const void* dy, void* dg, void* du, int narrow, int threads) {
    if (narrow) swiglu_backward(n, (const bf16*)g, (const bf16*)u, (const bf16*)dy, (bf16*)dg, (bf16*)du, threads);
    else swiglu_backward(n, (const float*)g, (const float*)u, (const float*)dy, (float*)dg, (float*)du, threads);
}

}
