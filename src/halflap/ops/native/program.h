// What the instructions of a program (program.cpp) share: the pass they are part of, places of its numbers, norms.
#pragma once
#include "parallel.h"
#include "vector.h"
#include <atomic>

namespace halflap {
namespace program {

// What one cache keeps of a block: convolution tail and SSM state, or keys and values. Mirrored by program.py.
struct State {
    void *first, *second;
    int64_t first_batch, first_head, second_batch, second_head, first_narrow, second_narrow;  // strides in elements; narrow: in bfloat16
};

// A sequence, row `index` of a cache, and the tokens first .. first + count of the pass that continue it
struct Row {
    int64_t position, cache, index, first, count;  // position: of its first new token, meta tokens counted
};

struct Asked {  // mirrored by program.py
    int64_t batch, sequences, threads, states_each, holds;  // batch: tokens of all sequences together
    float *workspace, *output, *held;  // held: what is put aside, wanted where a sequence has several tokens or the pass holds
    const Row* rows;                   // (sequences)
    const State* states;               // (caches, states_each)
};

struct Run : Asked {
    const int64_t* sequence;        // of each token
    float* attended;                // what each task of an attention has found
    std::atomic<int64_t>* arrived;  // of each key head and token, how many of those are there

    const State& state(const Row& row, int64_t which) const { return states[row.cache * states_each + which]; }
    // whether keys and values are written before any is read, and not by who reads them
    bool writes_first() const { return holds || batch > sequences; }
};

// Columns of a buffer: a token's row of it begins at offset * batch + token * stride + column of the workspace, or of the
// output where offset is -1
struct Place {
    int64_t offset, stride, column;
    float* of(const Run& run, int64_t token) const {
        return (offset < 0 ? run.output : run.workspace + offset * run.batch) + token * stride + column;
    }
    float* put_aside(const Run& run, int64_t token) const { return run.held + offset * run.batch + token * stride; }
};

struct Instruction {  // mirrored by program.py, as are its kinds
    int64_t kind, waits;  // waits: for all instructions before it
};

enum Normalisation { NONE, RMS, LAYER };

struct Norm {
    int64_t kind;
    const float *gain, *shift;
    double eps;

    void apply(const float* x, int64_t size, float* to) const {
        if (kind == NONE) return (void)memmove(to, x, size * sizeof(float));
        vf sums = splat(0), squares = splat(0);
        if (kind == LAYER)
            for (int64_t i = 0; i < size; i += VL) sums += load_to(x + i, size - i);
        const float mean = sum(sums) / size;
        for (int64_t i = 0; i < size; i += VL) {
            const vf d = load_to(x + i, size - i) - mean;
            squares += i + VL <= size ? d * d : d * d * select(iota() < (int32_t)(size - i), splat(1), splat(0));
        }
        const float scale = (float)(1 / std::sqrt(sum(squares) / size + eps));
        for (int64_t i = 0; i < size; i += VL) {
            vf y = (load_to(x + i, size - i) - mean) * scale * load_to(gain + i, size - i);
            if (shift) y += load_to(shift + i, size - i);
            store_to(to + i, y, size - i);
        }
    }
};

}  // namespace program
}  // namespace halflap
