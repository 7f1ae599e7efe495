// The C interface of draws from logits (sampling.h): a row of logits every `stride` floats.
#include "parallel.h"
#include "sampling.h"

using namespace halflap;

#pragma GCC visibility push(default)
extern "C" {

void halflap_draw(int64_t rows, int64_t size, const float* logits, int64_t stride, const Asked* asked, int64_t* tokens, int threads) {
    parallel_tasks(rows, threads, [&](int64_t row) { tokens[row] = draw(size, logits + row * stride, asked[row]); });
}

}
