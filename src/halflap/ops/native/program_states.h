// The recurrences of a program (program.cpp). A pass that holds leaves their states as they are and puts aside what they
// read; settled, they read so much of it as counts.
#pragma once
#include "mamba2_step.h"
#include "program.h"
#include "selective_step.h"
#include <vector>

namespace halflap {
namespace program {

struct Mamba2 : Instruction {
    Place from, to, held;
    int64_t state;
    Mamba2Step step;
};

inline int64_t tasks(const Mamba2& m, const Run& run) { return run.sequences * m.step.groups; }

inline void advance(const Mamba2& m, const Run& run, const Row& row, int64_t g, int64_t count, const float* from, int64_t stride, bool holds, float* to, int64_t to_stride) {
    const State& s = run.state(row, m.state);
    auto steps = [&](auto* conv, auto* ssm) {
        mamba2_group_steps(m.step, g, count, from, stride, conv + row.index * s.first_batch, ssm + row.index * s.second_batch, holds, to, to_stride);
    };
    auto of_conv = [&](auto* conv) { s.second_narrow ? steps(conv, (bf16*)s.second) : steps(conv, (float*)s.second); };
    s.first_narrow ? of_conv((bf16*)s.first) : of_conv((float*)s.first);
}

inline void work(const Mamba2& m, const Run& run, int64_t task) {
    const int64_t g = task % m.step.groups;
    const Row& row = run.rows[task / m.step.groups];
    const float* from = m.from.of(run, row.first);
    if (run.holds && g == 0)
        for (int64_t t = 0; t < row.count; t++) memcpy(m.held.put_aside(run, row.first + t), from + t * m.from.stride, m.step.row() * sizeof(float));
    advance(m, run, row, g, row.count, from, m.from.stride, run.holds, m.to.of(run, row.first), m.to.stride);
}

inline int64_t settle_tasks(const Mamba2& m, const Run& run) { return tasks(m, run); }

inline void settle(const Mamba2& m, const Run& run, int64_t task, const int64_t* counts) {
    static thread_local std::vector<float> unread;
    const int64_t b = task / m.step.groups;
    const Row& row = run.rows[b];
    unread.resize(counts[b] * m.step.inner());
    if (counts[b]) advance(m, run, row, task % m.step.groups, counts[b], m.held.put_aside(run, row.first), m.held.stride, false, unread.data(), m.step.inner());
}

// A depthwise convolution and SiLU of Mamba-1
struct Convolution : Instruction {
    Place from, to, held;
    int64_t state, channels, width;
    const float *weight, *bias;  // weight (W, C)
};
constexpr int64_t CHANNELS = 512;  // of a task

inline int64_t slices(const Convolution& c) { return (c.channels + CHANNELS - 1) / CHANNELS; }
inline int64_t tasks(const Convolution& c, const Run& run) { return run.sequences * slices(c); }

// act(state of one slice of channels, its first channel, how many)
template <class Act>
inline void of_slice(const Convolution& c, const Run& run, int64_t task, const Act& act) {
    const Row& row = run.rows[task / slices(c)];
    const State& s = run.state(row, c.state);
    const int64_t c0 = task % slices(c) * CHANNELS, count = c.channels - c0 < CHANNELS ? c.channels - c0 : CHANNELS, at = row.index * s.first_batch + c0;
    if (s.first_narrow) act(row, (bf16*)s.first + at, c0, count);
    else act(row, (float*)s.first + at, c0, count);
}

inline void work(const Convolution& c, const Run& run, int64_t task) {
    of_slice(c, run, task, [&](const Row& row, auto* state, int64_t c0, int64_t count) {
        auto* own = state;
        int64_t apart = c.channels;
        if (run.holds) {
            own = (decltype(own))scratch((c.width - 1) * CHANNELS), apart = CHANNELS;
            for (int64_t k = 0; k < c.width - 1; k++) memcpy(own + k * apart, state + k * c.channels, count * sizeof *own);
            for (int64_t t = 0; t < row.count; t++) memcpy(c.held.put_aside(run, row.first + t) + c0, c.from.of(run, row.first + t) + c0, count * sizeof(float));
        }
        for (int64_t t = 0; t < row.count; t++)
            convolve_step(c.weight + c0, c.channels, c.bias ? c.bias + c0 : nullptr, c.width, c.from.of(run, row.first + t) + c0, own, apart, count, c.to.of(run, row.first + t) + c0);
    });
}

inline int64_t settle_tasks(const Convolution& c, const Run& run) { return tasks(c, run); }

inline void settle(const Convolution& c, const Run& run, int64_t task, const int64_t* counts) {
    of_slice(c, run, task, [&](const Row& row, auto* state, int64_t c0, int64_t count) {
        float* unread = scratch(count);
        for (int64_t t = 0; t < counts[&row - run.rows]; t++)
            convolve_step(c.weight + c0, c.channels, c.bias ? c.bias + c0 : nullptr, c.width, c.held.put_aside(run, row.first + t) + c0, state, c.channels, count, unread);
    });
}

// Mamba-1's step of the state, with time step, skip and gate
struct Selective : Instruction {
    Place u, dt, B, C, gate, to, held;  // held: u, dt, B
    int64_t state, channels, states;
    const float *A, *D, *dt_bias;
};

inline int64_t tasks(const Selective& s, const Run& run) { return run.sequences * selective::step_pieces(s.channels); }

// act(the state of the channels of one piece)
template <class Act>
inline void of_piece(const Selective& s, const Run& run, const Row& row, int64_t piece, const Act& act) {
    const State& state = run.state(row, s.state);
    const int64_t at = row.index * state.second_batch + piece * selective::PIECE * s.states;
    state.second_narrow ? act((bf16*)state.second + at) : act((float*)state.second + at);
}

inline void work(const Selective& s, const Run& run, int64_t task) {
    static thread_local std::vector<float> moved;
    const int64_t pieces = selective::step_pieces(s.channels), piece = task % pieces, I = s.channels;
    const Row& row = run.rows[task / pieces];
    moved.resize(selective::PIECE * s.states);
    of_piece(s, run, row, piece, [&](auto* own) {
        auto *from = own, *to = run.holds ? (decltype(own))moved.data() : own;
        for (int64_t t = 0; t < row.count; t++, from = to) {
            auto rows = [&](const Place& p) { return selective::Rows{p.of(run, row.first + t), 0, 0, 0}; };
            const selective::Step step{1, I, s.states, 1, rows(s.u), rows(s.dt), rows(s.B), rows(s.C), rows(s.gate), rows(s.to), s.A, s.D, s.dt_bias, nullptr};
            selective::step_piece(step, 0, piece, from, to);
        }
    });
    if (!run.holds || piece) return;
    for (int64_t t = 0; t < row.count; t++) {
        float* aside = s.held.put_aside(run, row.first + t);
        memcpy(aside, s.u.of(run, row.first + t), I * sizeof(float)), memcpy(aside + I, s.dt.of(run, row.first + t), I * sizeof(float));
        memcpy(aside + 2 * I, s.B.of(run, row.first + t), s.states * sizeof(float));
    }
}

inline int64_t settle_tasks(const Selective& s, const Run& run) { return tasks(s, run); }

inline void settle(const Selective& s, const Run& run, int64_t task, const int64_t* counts) {
    static thread_local std::vector<float> unread;
    const int64_t pieces = selective::step_pieces(s.channels), piece = task % pieces, b = task / pieces, I = s.channels;
    const Row& row = run.rows[b];
    unread.resize(I);
    of_piece(s, run, row, piece, [&](auto* own) {
        for (int64_t t = 0; t < counts[b]; t++) {
            float* aside = s.held.put_aside(run, row.first + t);
            auto rows = [&](float* data) { return selective::Rows{data, 0, 0, 0}; };
            const selective::Step step{1, I, s.states, 1, rows(aside), rows(aside + I), rows(aside + 2 * I), rows(aside + 2 * I), rows(nullptr), rows(unread.data()), s.A, s.D, s.dt_bias, nullptr};
            selective::step_piece(step, 0, piece, own, own);
        }
    });
}

}  // namespace program
}  // namespace halflap
