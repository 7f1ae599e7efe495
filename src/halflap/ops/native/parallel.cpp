// Where the threads come from and where their scratch memory lives.
#include "parallel.h"
#include <dlfcn.h>
#include <new>

namespace halflap {

team_function start_team = (team_function)dlsym(RTLD_DEFAULT, "GOMP_parallel");

namespace {
struct Block {
    float* memory = nullptr;
    int64_t size = 0;
    ~Block() { free(memory); }
};
thread_local Block block;
}  // namespace

float* scratch(int64_t floats) {
    if (floats > block.size) {
        free(block.memory);
        block.size = 0;
        int64_t bytes = (floats * 4 + 63) / 64 * 64;
        block.memory = static_cast<float*>(aligned_alloc(64, bytes));
        if (!block.memory) abort();
        block.size = floats;
    }
    return block.memory;
}

}  // namespace halflap

extern "C" __attribute__((visibility("default"))) int halflap_has_threads() { return halflap::start_team != nullptr; }
