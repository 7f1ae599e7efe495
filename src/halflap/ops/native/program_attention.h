// The attention of a program (program.cpp): new keys and values written, and queries answered.
#pragma once
#include "attention_step.h"
#include "program.h"
#include <algorithm>
#include <vector>

namespace halflap {
namespace program {

// The new keys and values of a block, where a pass writes them before any is read. A window's ring has no room for more
// than one: what they displace is put aside, and whoever reads for an earlier token swaps the later ones out.
struct Keep : Instruction {
    Place key, value, held;
    int64_t state;
    AttentionStep step;
};

// Keys and values of one key head of one sequence, in the type T of its state
template <class T>
struct Head {
    const AttentionStep& s;
    const Run& run;
    const Row& row;
    const Place& held;
    T *keys, *values;
    int64_t h;

    Head(const AttentionStep& s, const Run& run, const Row& row, const State& state, const Place& held, int64_t h)
        : s(s), run(run), row(row), held(held), keys((T*)state.first + row.index * state.first_batch + h * state.first_head),
          values((T*)state.second + row.index * state.second_batch + h * state.second_head), h(h) {}
    T* key(int64_t t) const { return keys + s.slot(row.position + t) * s.size; }
    T* value(int64_t t) const { return values + s.slot(row.position + t) * s.value_size; }
    // token t's place in the ring against what is put aside
    void swap(int64_t t) const {
        T* aside = (T*)held.put_aside(run, row.first + t) + h * (s.size + s.value_size);
        std::swap_ranges(aside, aside + s.size, key(t));
        std::swap_ranges(aside + s.size, aside + s.size + s.value_size, value(t));
    }
};

// act(head) of the type that a state has
template <class Act>
inline void of_head(const AttentionStep& s, const Run& run, const Row& row, int64_t state, const Place& held, int64_t h, const Act& act) {
    const State& own = run.state(row, state);
    if (own.first_narrow) act(Head<bf16>(s, run, row, own, held, h));
    else act(Head<float>(s, run, row, own, held, h));
}

inline int64_t tasks(const Keep& k, const Run& run) { return run.writes_first() ? run.sequences * k.step.key_heads : 0; }

inline void work(const Keep& k, const Run& run, int64_t task) {
    const Row& row = run.rows[task / k.step.key_heads];
    const int64_t h = task % k.step.key_heads;
    of_head(k.step, run, row, k.state, k.held, h, [&](const auto& head) {
        for (int64_t t = 0; t < row.count; t++) {
            if (k.step.window >= 0) head.swap(t);
            keep_step(k.step, row.position + t, k.key.of(run, row.first + t) + h * k.step.size, k.value.of(run, row.first + t) + h * k.step.value_size, head.key(t), head.value(t));
        }
    });
}

inline int64_t settle_tasks(const Keep& k, const Run& run) { return k.step.window >= 0 ? run.sequences * k.step.key_heads : 0; }

inline void settle(const Keep& k, const Run& run, int64_t task, const int64_t* counts) {
    const int64_t b = task / k.step.key_heads;
    const Row& row = run.rows[b];
    of_head(k.step, run, row, k.state, k.held, task % k.step.key_heads, [&](const auto& head) {
        for (int64_t t = row.count - 1; t >= counts[b]; t--) head.swap(t);
    });
}

struct Attention : Instruction {
    Place query, key, value, to, held;
    int64_t state, own;  // own: this block's keys and values are to be written there; held: where their Keep puts things
    AttentionStep step;
};

// The later tokens of a window are taken back one by one, so a task is then all tokens of a key head.
inline bool takes_back(const Attention& a, const Run& run) { return a.step.window >= 0 && run.writes_first(); }

// A key head's positions are divided where there are too few heads for all threads to have the same work.
inline int64_t parts(const Attention& a, const Run& run) {
    if (takes_back(a, run) || run.batch * a.step.key_heads >= 4 * run.threads) return 1;
    int64_t most = 1;
    for (int64_t b = 0; b < run.sequences; b++) most = std::max(most, a.step.parts(a.step.kept(run.rows[b].position + run.rows[b].count - 1)));
    return most;
}

inline int64_t tasks(const Attention& a, const Run& run) {
    return (takes_back(a, run) ? run.sequences : run.batch) * a.step.key_heads * parts(a, run);
}

inline const float* query(const Attention& a, const Run& run, int64_t token, int64_t h) {
    return a.query.of(run, token) + h * a.step.shared() * a.step.size;
}

// All parts of one key head's positions for token t of a sequence, by one thread
template <class H>
inline void attend_alone(const Attention& a, const Run& run, const H& head, int64_t t) {
    static thread_local std::vector<float> memory;
    const AttentionStep& s = a.step;
    const int64_t token = head.row.first + t, position = head.row.position + t;
    memory.resize(2 * Attended::floats(s));
    Attended whole(s, memory.data()), part(s, memory.data() + Attended::floats(s));
    attend_step(s, position, 0, s.parts(s.kept(position)), query(a, run, token, head.h), head.keys, head.values,
                [&](int64_t which) { return which ? part : whole; }, [&](int64_t which) { if (which) whole.add(part); });
    whole.put(s, a.to.of(run, token) + head.h * s.shared() * s.value_size);
}

// One part, and where all are there, the whole
template <class H>
inline void attend_divided(const Attention& a, const Run& run, const H& head, int64_t t, int64_t which, int64_t all) {
    const AttentionStep& s = a.step;
    const int64_t token = head.row.first + t, position = head.row.position + t, place = token * s.key_heads + head.h;
    const int64_t own = s.parts(s.kept(position));
    auto of_part = [&](int64_t part) { return Attended(s, run.attended + (place * all + part) * Attended::floats(s)); };
    if (which >= own) return;
    attend_step(s, position, which, which + 1, query(a, run, token, head.h), head.keys, head.values, of_part, [](int64_t) {});
    if (run.arrived[place].fetch_add(1, std::memory_order_acq_rel) + 1 < own) return;
    run.arrived[place].store(0, std::memory_order_relaxed);  // for the next instruction
    Attended whole = of_part(0);
    for (int64_t other = 1; other < own; other++) whole.add(of_part(other));
    whole.put(s, a.to.of(run, token) + head.h * s.shared() * s.value_size);
}

inline void work(const Attention& a, const Run& run, int64_t task) {
    const AttentionStep& s = a.step;
    const int64_t all = parts(a, run), part = task % all, h = task / all % s.key_heads, which = task / all / s.key_heads;
    if (takes_back(a, run)) {
        const Row& row = run.rows[which];
        return of_head(s, run, row, a.state, a.held, h, [&](const auto& head) {
            for (int64_t t = row.count - 1; t >= 0; t--) {
                attend_alone(a, run, head, t);
                if (t) head.swap(t);
            }
            for (int64_t t = 1; t < row.count; t++) head.swap(t);
        });
    }
    const Row& row = run.rows[run.sequence[which]];
    const int64_t t = which - row.first, position = row.position + t;
    of_head(s, run, row, a.state, a.held, h, [&](const auto& head) {
        const int64_t kept = s.kept(position), begin = s.begin(kept, part), slot = s.slot(position);
        if (a.own && !run.writes_first() && part < s.parts(kept) && (all == 1 || (begin <= slot && slot < s.begin(kept, part + 1))))
            keep_step(s, position, a.key.of(run, which) + h * s.size, a.value.of(run, which) + h * s.value_size, head.key(t), head.value(t));
        if (all == 1) attend_alone(a, run, head, t);
        else attend_divided(a, run, head, t, part, all);
    });
}

}  // namespace program
}  // namespace halflap
