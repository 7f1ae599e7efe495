// The C interface of Mamba-1's selective scan (selective_scan.h) and step (selective_step.h).
#include "selective_step.h"

using namespace halflap::selective;

#pragma GCC visibility push(default)
extern "C" {

int64_t halflap_selective_kept(const Scan* s) { return s->kept_floats(); }
int64_t halflap_selective_partial(const Scan* s) { return s->slices() * s->batch * s->time * 2 * s->padded(); }

void halflap_selective_scan(const Scan* s) { forward(*s); }
void halflap_selective_scan_backward(const Scan* s, const Gradients* g) { backward(*s, *g); }
void halflap_selective_step(const Step* s) { step(*s); }

}
